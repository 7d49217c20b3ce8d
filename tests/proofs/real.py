"""A real Gemma on three tasks, methods side by side, every dialogue tested once, by `act.py`.

    python data.py pacific validation.json pacific.jsonl
    python tests/proofs/real.py pacific gemma-3-270m pacific.jsonl [--halves | --signal | --cross]
    python tests/proofs/real.py abg_coqa gemma-3-270m abg_coqa.jsonl --folds 1
    python tests/proofs/real.py sql gemma-3-270m

On two cores of an AMD EPYC with AVX-512's bfloat16 a fold of PACIFIC with --halves took 35 to 75
minutes, SFT on all 39 more, --signal 31; a seed of sql 66 minutes of one thread, a fold of Abg-CoQA
10; --cross, estimated, an hour a fold. On a GPU of 80 GB take --jobs 8. --set gives keys of act.py
to every run: with "gradient_checkpointing=false" steps are quicker and take more memory (SFT of
PACIFIC 13 GB, ACT of sql 9.5).

Dialogues are dealt into three folds. Fold k is tested with models that were trained on the other
two with seed k, which fixes the order of the data and every sample: one SFT model a fold, from
which the other methods start. Of Abg-CoQA the stories with a question to ask are taken, and as many
others. For sql, `make_ambig_sql.py` makes 240 dialogues to train on and 300 to test for each k,
none of which begins like one of the 240. The last row is compared with the others.

--halves: SFT learns from every other training dialogue and the other methods from those between,
which its model has not seen (seed 100 + k); SFT on all, from all of them. --signal: four samples of
the first fold's SFT model for each turn of the second half, by a run of ACT that is too slow to
learn; how many turns have a winner and a loser. --cross: SFT on one half, ACT on the other, and the
other way round; the pairs that both ended with train the SFT model of all dialogues, offline.
Methods called balanced take CLARIFY turns 2.5 times as often and ANSWER turns half as often;
--methods names them. --search tries settings on the training dialogues of the first fold only, a
quarter of which it holds out.

Everything is kept in --out: a finished run is not run again and an interrupted one resumes, so the
command can be stopped at any time and given again. After a change of configs, code or options take
another --out. Written there: TASK.md, signal.md, cross.md or search.md, and the numbers as .json.

A standard error is the bootstrap's, over dialogues, since the turns of one are not independent; of
a difference, over the same draws for both methods.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from make_ambig_sql import make, requests_of  # noqa: E402

import data  # noqa: E402
from act import CUT_OFF, WRONG_ACTION, load_config, logged_rows, summarize  # noqa: E402
from data import CLARIFY  # noqa: E402

TASKS = {  # task -> (what an answer is measured by, epochs of SFT and after it, settings)
    "pacific": ("F1", (4, 1), {"heuristic": "drop_f1", "tolerance": 0.3}),
    "abg_coqa": ("F1", (4, 2), {"heuristic": "coqa_f1", "tolerance": 0.5}),
    "sql": ("execution match", (6, 2), {
        "heuristic": "execution_match", "tolerance": 0.5, "training_config.max_new_tokens": 48,
        "max_length": 512, "max_prompt_length": 384,
    }),
}  # fmt: skip
SFT, DPO, ACT = (f"configs/gemma3_270m_pacific_{name}.json" for name in ("sft", "dpo", "act"))
EVEN = {"class_balance": '{"CLARIFY": 2.5, "ANSWER": 0.5}'}  # as many pairs, half of each action
FOUR = {"num_generations": 4}
AFTER_SFT = {  # method -> its config, and what differs from it
    "SFT continued": (SFT, {"learning_rate": 1e-5}),
    "offline DPO": (DPO, {}),
    "ACT, no simulation": (ACT, {"simulate_user": False}),
    "ACT": (ACT, {}),
    "ACT, 4 samples": (ACT, FOUR),
}
METHODS = {  # the same, from which method's model it starts, and which dialogues --halves gives it
    "SFT on all": (SFT, {}, None, "train"),
    "SFT": (SFT, {}, None, "first"),
    **{name: (config, own, "SFT", "second") for name, (config, own) in AFTER_SFT.items()},
    **{f"{name}, balanced": (config, {**own, **EVEN}, "SFT", "second")
       for name, (config, own) in AFTER_SFT.items()},
    "SFT, other half": (SFT, {}, None, "second"),
    "ACT, other half": (ACT, FOUR, "SFT, other half", "first"),
    "offline DPO on all": (DPO, {}, "SFT on all", "train"),
    "ACT, crossed": (DPO, {"is_preference": True}, "SFT on all", "crossed"),
}  # fmt: skip
ROWS = ["SFT", "SFT continued", "offline DPO", "ACT", "ACT, 4 samples"]
CROSS = ["SFT", "SFT on all", "offline DPO on all", "ACT, crossed"]
SLOW = {"learning_rate": 1e-12, "num_train_epochs": 1}  # the weights stay as they are
LORA = {"lora_r": 16, "dtype": "bfloat16"}  # adapters are trained, at ten times the learning rate
SEARCHED = (  # (method, what differs from its config); the last is the table's ACT
    ("SFT", {"num_train_epochs": 2}), ("SFT", {}), ("SFT", {"num_train_epochs": 8}),
    ("SFT continued", {}), ("offline DPO", {"learning_rate": 5e-6}),
    ("offline DPO", {"learning_rate": 2e-5}), ("offline DPO", {}),
    ("ACT", {"learning_rate": 5e-6}), ("ACT", {"learning_rate": 2e-5}), ("ACT", {}),
)  # fmt: skip


def deal(task, conversations):
    """{fold: (training dialogues, test dialogues)}; the fold "search" is for trying settings."""
    if task == "sql":
        trained = [make(240, seed) for seed in range(4)]
        tested = [make(300, 1000 + k, requests_of(rows)) for k, rows in enumerate(trained)]
        names = "fold0", "fold1", "fold2", "search"
        return dict(zip(names, zip(trained, tested, strict=True), strict=True))
    with open(conversations, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(task).shuffle(rows)
    if task == "abg_coqa":
        asking, others = [], []
        for row in rows:
            asks = any(message.get("requires_clarification") for message in row["messages"])
            (asking if asks else others).append(row)
        rows = asking + others[: len(asking)]
    folds = {}
    for k in range(3):
        folds[f"fold{k}"] = [row for i, row in enumerate(rows) if i % 3 != k], rows[k::3]
    first, _ = folds["fold0"]
    return folds | {"search": ([row for i, row in enumerate(first) if i % 4], first[::4])}


class Runs:
    """Runs `act.py` in `out`, `jobs` runs at a time, each once.

    epochs: of SFT, and of what starts from its model. settings: {key: value} of all runs.
    """

    def __init__(self, model, folds, out, jobs, lora, halves, epochs, settings):
        self.model, self.out, self.epochs, self.settings = model.resolve(), out, epochs, settings
        self.jobs, self.lora, self.halves = jobs, lora, halves
        self.locks = defaultdict(threading.Lock)  # run -> held by the thread that sees to it
        for fold, (train, test) in folds.items():
            (self.out / fold).mkdir(parents=True, exist_ok=True)
            parts = {"train": train, "first": train[::2], "second": train[1::2], "test": test}
            for name, rows in parts.items():
                data.write_jsonl(self.out / fold / f"{name}.jsonl", rows)

    @cache  # noqa: B019
    def samples(self, method, fold, changed=()):
        """The rows of eval_samples.jsonl on a fold's test; changed: ((key, value), ...)."""
        self.train(method, fold, changed)
        name = self.name(method, fold, changed)
        self.act(f"{name}-test", METHODS[method][0], {
            "task": "evaluate", "policy_model_config.model_path": self.out / name / "model",
            "validation_path": self.out / fold / "test.jsonl",
        })  # fmt: skip
        rows = logged_rows(self.out / f"{name}-test/eval_samples.jsonl")
        return [{**row, "dialogue": (fold, row["where"].rpartition(":")[2])} for row in rows]

    def train(self, method, fold, changed=()):
        config, own, start, part = METHODS[method]
        if start:
            self.train(start, fold)
        if part == "crossed":
            self.cross(fold)
        elif not self.halves:
            part = "train"
        epochs = self.epochs[start is not None]
        own = {"num_train_epochs": epochs, **own, **dict(changed)}
        if self.lora:
            rate = data.read_json(ROOT / config)["training_config"]["learning_rate"]
            own |= {**LORA, "learning_rate": 10 * own.get("learning_rate", rate)}
        started = self.out / self.name(start, fold) / "model" if start else self.model
        seed = 100 * self.halves + int(fold[-1]) if fold[-1].isdigit() else 100
        self.act(self.name(method, fold, changed), config, {
            "policy_model_config.model_path": started, "seed": seed,
            "train_path": self.out / fold / f"{part}.jsonl", **own,
        })  # fmt: skip

    def name(self, method, fold, changed=()):
        words = [f"{fold}/{method.replace(',', '').replace(' ', '_')}"]
        return "-".join([*words, *(f"{key}={value}" for key, value in changed)])

    def act(self, name, config, settings):
        """One run of act.py, unless it is finished."""
        folder = self.out / name
        settings = {"validation_split": 0, **settings, **self.settings}
        command = [sys.executable, "act.py", "--config", config, "--output_dir", str(folder)]
        command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        command += [] if "task" in settings else ["--resume"]
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        with self.locks[name]:
            if (folder / "finished").exists():
                return
            began = time.monotonic()
            folder.mkdir(exist_ok=True)
            with open(folder / "log.txt", "a", encoding="utf-8") as log:
                ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            if ran.returncode:
                log = folder / "log.txt"
                raise SystemExit(f"{' '.join(command)}\nended with {ran.returncode}: see {log}")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 3 GB
            (folder / "finished").touch()
        minutes = (time.monotonic() - began) / 60
        print(f"{time.strftime('%H:%M')} {name}: {minutes:.1f} minutes", flush=True)

    def rollouts(self, method, fold, changed=()):
        """The rows of a run's rollouts.jsonl, which is run first."""
        self.train(method, fold, changed)
        return logged_rows(self.out / self.name(method, fold, changed) / "rollouts.jsonl")

    def cross(self, fold):
        """Writes crossed.jsonl: the pairs of both halves, with the sides that ACT has sampled.

        A side that was cut off stays the data's: a file of pairs cannot say that it has no end.
        """
        pairs, own = [], 0
        for method in ("ACT, 4 samples", "ACT, other half"):
            sampled = {}
            for row in self.rollouts(method, fold):
                if row["replaced"] and row["outcome"] != CUT_OFF:
                    key = row["where"], len(row["history"]), row["replaced"]
                    sampled.setdefault(key, row["trajectory"])
            config = load_config(self.out / self.name(method, fold) / "config.json")
            for pair in data.get_datasets_from_config(config)[0]:
                for side in ("chosen", "rejected"):
                    key = pair.where, len(pair.history), side
                    if key in sampled:
                        pair = replace(pair, **{side: sampled[key]})
                        own += 1
                pairs.append(pair)
        print(f"{fold}: {len(pairs)} crossed pairs, {own} of {2 * len(pairs)} sides are sampled")
        data.write_preferences(self.out / fold / "crossed.jsonl", pairs, "records")

    def minutes(self, method, folds):
        """Of training, a mean over folds; resumed runs count as one."""
        files = [self.out / self.name(method, fold) / "metrics.jsonl" for fold in folds]
        rows = [row for file in files for row in logged_rows(file)]
        seconds = sum(row.get("seconds/rollout", 0) + row.get("seconds/train", 0) for row in rows)
        return seconds / 60 / len(folds)

    def map(self, cells):
        """{(method, fold, changed): samples}; what starts from the base model goes first."""
        with ThreadPoolExecutor(self.jobs) as pool:
            cells = sorted(cells, key=lambda cell: METHODS[cell[0]][2] is not None)
            return dict(zip(cells, pool.map(lambda cell: self.samples(*cell), cells), strict=True))


# --------------------------------------------------------------------------------------- the tables


def mean(rows, key):
    return statistics.fmean(row[key] for row in rows) if rows else 0.0


def those(rows, key):
    return [row for row in rows if row[key] == CLARIFY]


def asked(rows):
    asking = those(rows, "target_action")
    return len(those(asking, "inferred_action")) / max(1, len(asking))


COLUMNS = {  # title -> (what of the samples, scale, digits)
    "action macro F1": (lambda rows: summarize(rows)["Macro F1"], 100, 1),
    "turn-level {}": (lambda rows: mean(rows, "turn_f1"), 100, 1),
    "trajectory {}": (lambda rows: mean(rows, "f1"), 100, 1),
    "after clarification": (lambda rows: mean(those(rows, "inferred_action"), "f1"), 100, 1),
    "asks where it should": (asked, 100, 1),
    "questions a turn": (lambda rows: mean(rows, "questions"), 1, 2),
}


def table(rows, score, draws=1000):
    """(markdown, numbers) of {label: samples}, all of the same turns.

    The last row is compared with the others. score: what an answer is measured by.
    """
    dialogues = sorted({row["dialogue"] for row in next(iter(rows.values()))})
    grouped = {label: {key: [] for key in dialogues} for label in rows}
    for label, samples in rows.items():
        for row in samples:
            grouped[label][row["dialogue"]].append(row)
    rng = random.Random("bootstrap")
    drawn = [rng.choices(dialogues, k=len(dialogues)) for _ in range(draws)]
    found = {}  # label -> title -> (value, values of the draws)
    for label, of in grouped.items():
        resampled = [[row for key in keys for row in of[key]] for keys in drawn]
        found[label] = {
            title: (of_samples(rows[label]), [of_samples(one) for one in resampled])
            for title, (of_samples, _, _) in COLUMNS.items()
        }

    def cell(title, value, spread, sign=""):
        _, scale, digits = COLUMNS[title]
        return f"{scale * value:{sign}.{digits}f} ± {scale * spread:.{digits}f}"

    titles = " | ".join(COLUMNS).format(score, score)
    lines = [f"| | {titles} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label, values in found.items():
        cells = [cell(t, value, statistics.stdev(drawn)) for t, (value, drawn) in values.items()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    *others, last = rows
    for label in others:
        cells = []
        for title in COLUMNS:
            (a, ours), (b, theirs) = found[last][title], found[label][title]
            spread = statistics.stdev(x - y for x, y in zip(ours, theirs, strict=True))
            cells.append(cell(title, a - b, spread, "+"))
        lines.append(f"| {last} minus {label} | {' | '.join(cells)} |")
    numbers = {}
    for label, values in found.items():
        numbers[label] = {title.format(score): value for title, (value, _) in values.items()}
    return "\n".join(lines), numbers


def signal(runs, fold="fold0"):
    """(markdown, numbers) of what there is to learn from four samples a turn."""
    found = []
    for temperature in (0.7, 1.0):
        turns = defaultdict(list)
        changed = tuple({**SLOW, "training_config.temperature": temperature}.items())
        for row in runs.rollouts("ACT, 4 samples", fold, changed):
            turns[row["where"], len(row["history"])].append(row)
        turns = [samples[:4] for samples in turns.values()]  # a last step repeats some turns
        wrong = [row["outcome"] == WRONG_ACTION for samples in turns for row in samples]
        for tolerance in (0.3, 0.9):
            won = [[(row["score"] or 0.0) > tolerance for row in samples] for samples in turns]
            both = [turns[i][0] for i, wins in enumerate(won) if len({*wins}) > 1]
            found.append({
                "temperature": temperature, "tolerance": tolerance, "turns": len(turns),
                "CLARIFY": len(those([samples[0] for samples in turns], "action")),
                "winner and loser": len(both), "of these CLARIFY": len(those(both, "action")),
                "samples that win": f"{statistics.fmean(sum(won, [])):.0%}",
                "wrong action": f"{statistics.fmean(wrong):.0%}",
            })  # fmt: skip
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (found[0], *map(dict.values, found))]
    return "\n".join([lines[0], "|---" * len(found[0]) + "|", *lines[1:]]), found


def write(out, name, text, numbers):
    print("\n" + text)
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    data.write_json(out / f"{name}.json", numbers)


def main():
    parser = argparse.ArgumentParser(description="A real Gemma on three tasks.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model", type=Path, help="a directory in Hugging Face's layout")
    parser.add_argument("conversations", type=Path, nargs="?", help="as data.py converts them")
    parser.add_argument("--out", type=Path, help="by default runs/TASK, with --halves TASK_halves")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--folds", type=int, choices=(1, 2, 3), default=3, help="the first N only")
    parser.add_argument("--lora", action="store_true", help="train adapters; take another --out")
    parser.add_argument("--halves", action="store_true", help="a half for SFT, one for the others")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="rows of the table")
    parser.add_argument("--signal", action="store_true", help="which turns have both sides?")
    parser.add_argument("--cross", action="store_true", help="learn from samples of both halves")
    parser.add_argument("--search", action="store_true", help="try settings")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for every run")
    args = parser.parse_args()
    if (args.conversations is None) != (args.task == "sql"):
        parser.error("pacific and abg_coqa need a file of conversations, sql makes its own")
    halves = args.halves or args.signal or args.cross
    out = (args.out or ROOT / "runs" / f"{args.task}{'_halves' * halves}").resolve()
    given = dict(word.split("=", 1) for word in args.set)
    dealt = deal(args.task, args.conversations)
    score, epochs, settings = TASKS[args.task]
    settings = settings | given
    runs = Runs(args.model, dealt, out, args.jobs, args.lora, halves, epochs, settings)
    if args.signal:
        return write(out, "signal", *signal(runs))
    if args.search:
        cells = [(method, "search", tuple(changed.items())) for method, changed in SEARCHED]
        found = runs.map(cells)
        rows = {" ".join([c[0], *(f"{k} {v}" for k, v in c[2])]): found[c] for c in cells}
        return write(out, "search", *table(rows, score))
    methods = args.methods or (CROSS if args.cross else ["SFT on all"] * halves + ROWS)
    folds = [f"fold{k}" for k in range(args.folds)]
    found = runs.map([(method, fold, ()) for fold in folds for method in methods])
    rows = {m: [row for fold in folds for row in found[m, fold, ()]] for m in methods}
    text, numbers = table(rows, score)
    minutes = ", ".join(f"{method} {runs.minutes(method, folds):.0f}" for method in methods)
    turns = rows[methods[0]]
    text += f"\n\n{len({row['dialogue'] for row in turns})} dialogues, {len(turns)} turns a row; "
    text += f"minutes of training a fold: {minutes}."
    return write(out, "cross" if args.cross else args.task, text, numbers)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("real.py: interrupted; started again, it goes on where it was")
