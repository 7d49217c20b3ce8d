"""A real Gemma on conversations that people wrote: five methods on PACIFIC, every dialogue tested once. `act.py` does the work.

    python data.py pacific validation.json pacific.jsonl
    python tests/proofs/pacific.py pacific.jsonl gemma-3-270m             the table: many hours on two cores; with
                                                                          --jobs 8 half an hour on a GPU of 80 GB
    python tests/proofs/pacific.py pacific.jsonl gemma-3-270m --search    how settings were chosen

The dialogues are dealt into folds. Fold k is tested with models that were trained on the other folds with seed k, which
fixes the order of the data and every sample: one SFT model a fold, from which the other methods start. The search sees
the training dialogues of the first fold only, a quarter of which it holds out. With --halves, SFT learns from every
other training dialogue and the other methods from those between, which its model has not seen (seed 100 + k). Methods
called balanced take CLARIFY turns 2.5 times as often and ANSWER turns half as often; --methods names them.

Everything is kept in --out: a finished run is not run again and an interrupted one resumes, so the command can be stopped
at any time and given again. After a change of configs, code or options take another --out. Written there: pacific.md or
search.md, and pacific.json or search.json with every number.

A standard error is the bootstrap's, over dialogues, since the turns of one are not independent; of a difference, over
the same draws for both methods.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from act import logged_rows, summarize  # noqa: E402
from data import CLARIFY, read_json, write_json, write_jsonl  # noqa: E402

EVEN = '{"CLARIFY": 2.5, "ANSWER": 0.5}'  # as many pairs as before, about half of them of each action
SFT, DPO, ACT = (f"configs/gemma3_270m_pacific_{name}.json" for name in ("sft", "dpo", "act"))
METHODS = {  # method -> its config, and what differs from it; SFT starts from the base model, the others from SFT's
    "SFT": (SFT, {}),
    "SFT continued": (SFT, {"learning_rate": 1e-5, "num_train_epochs": 1}),
    "offline DPO": (DPO, {}),
    "ACT, no simulation": (ACT, {"simulate_user": False}),
    "ACT": (ACT, {}),
    "offline DPO, balanced": (DPO, {"class_balance": EVEN}),
    "ACT, no simulation, balanced": (ACT, {"simulate_user": False, "class_balance": EVEN}),
    "ACT, balanced": (ACT, {"class_balance": EVEN}),
}
LORA = {"lora_r": 16, "dtype": "bfloat16"}  # --lora: adapters are trained, at ten times the learning rate
COLUMNS = {  # title -> (what of the samples, scale, digits)
    "action macro F1": (lambda rows: summarize(rows)["Macro F1"], 100, 1),
    "turn-level F1": (lambda rows: mean(rows, "turn_f1"), 100, 1),
    "trajectory F1": (lambda rows: mean(rows, "f1"), 100, 1),
    "after clarification": (lambda rows: mean([r for r in rows if r["inferred_action"] == CLARIFY], "f1"), 100, 1),
    "asks where it should": (
        lambda rows: statistics.fmean(r["inferred_action"] == CLARIFY for r in rows if r["target_action"] == CLARIFY),
        100, 1,
    ),
    "questions a turn": (lambda rows: mean(rows, "questions"), 1, 2),
}  # fmt: skip
SEARCHED = (  # (method, what differs from its config); the last is the table's ACT
    ("SFT", {"num_train_epochs": 2}), ("SFT", {}), ("SFT", {"num_train_epochs": 8}), ("SFT continued", {}),
    ("offline DPO", {"learning_rate": 5e-6}), ("offline DPO", {"learning_rate": 2e-5}), ("offline DPO", {}),
    ("ACT", {"learning_rate": 5e-6}), ("ACT", {"learning_rate": 2e-5}), ("ACT", {}),
)  # fmt: skip


def mean(rows, key):
    return statistics.fmean(row[key] for row in rows) if rows else 0.0


class Folds:
    """Runs `act.py` in `out`, `jobs` runs at a time; every run once."""

    def __init__(self, conversations, model, out, jobs, lora=False, halves=False, count=3):
        self.lora, self.halves = lora, halves
        self.model, self.out, self.jobs, self.count = Path(model).resolve(), out.resolve(), jobs, count
        with open(conversations, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        random.Random("pacific").shuffle(rows)
        for k in range(count):
            self.write(f"fold{k}", [row for i, row in enumerate(rows) if i % count != k], rows[k::count])
        first = [row for i, row in enumerate(rows) if i % count]  # what fold 0 trains on
        self.write("search", [row for i, row in enumerate(first) if i % 4], first[::4])

    def write(self, fold, train, test):
        (self.out / fold).mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", train), ("first", train[::2]), ("second", train[1::2]), ("test", test)):
            write_jsonl(self.out / fold / f"{name}.jsonl", rows)

    @cache  # noqa: B019
    def samples(self, method, fold, changed=()):
        """[row of eval_samples.jsonl] of a method's model on a fold's test dialogues. changed: ((key, value), ...)"""
        self.train(method, fold, changed)
        name = self.name(method, fold, changed)
        self.act(f"{name}-test", METHODS[method][0], {
            "task": "evaluate", "policy_model_config.model_path": self.out / name / "model",
            "data_config.validation_split": 0, "data_config.validation_path": self.out / fold / "test.jsonl",
        })  # fmt: skip
        with open(self.out / f"{name}-test/eval_samples.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return [{**row, "dialogue": (fold, row["where"].rpartition(":")[2])} for row in rows]  # its line

    def train(self, method, fold, changed=()):
        config, own = METHODS[method]
        start = self.model if method == "SFT" else self.out / self.name("SFT", fold) / "model"
        seed = int(fold[-1]) + 100 * self.halves if fold[-1].isdigit() else 100
        part = ("first" if method == "SFT" else "second") if self.halves else "train"
        own = {"learning_rate": read_json(ROOT / config)["training_config"]["learning_rate"], **own, **dict(changed)}
        settings = {}
        if self.lora:
            own["learning_rate"] *= 10
            settings = {f"policy_model_config.{key}": value for key, value in LORA.items()}
        settings |= {f"{'data' if key == 'tolerance' else 'training'}_config.{key}": value for key, value in own.items()}
        self.act(self.name(method, fold, changed), config, {
            "policy_model_config.model_path": start, "data_config.train_path": self.out / fold / f"{part}.jsonl",
            "data_config.validation_split": 0, "training_config.seed": seed, **settings,
        })  # fmt: skip

    def name(self, method, fold, changed=()):
        return "-".join([f"{fold}/{method.replace(',', '').replace(' ', '_')}", *(f"{k}={v}" for k, v in changed)])

    def act(self, name, config, settings):
        """One run of act.py, unless it is finished."""
        folder, began = self.out / name, time.monotonic()
        if (folder / "finished").exists():
            return
        folder.mkdir(exist_ok=True)
        again = [] if "task" in settings else ["--resume"]
        settings = {**settings, "training_config.output_dir": folder}
        command = [sys.executable, "act.py", "--config", config, *again]
        command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            environment = {"OMP_NUM_THREADS": threads, **os.environ}
            ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        if ran.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\nended with {ran.returncode}: see {folder / 'log.txt'}")
        (folder / "finished").touch()
        print(f"{time.strftime('%H:%M')} {name}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)

    def minutes(self, method, folds):
        """Of training, a mean over folds; resumed runs count as one."""
        rows = [row for fold in folds for row in logged_rows(self.out / self.name(method, fold) / "metrics.jsonl")]
        return sum(row.get("seconds/rollout", 0) + row.get("seconds/train", 0) for row in rows) / 60 / len(folds)

    def map(self, cells):
        """{(method, fold, changed): samples}: first the SFT models, from which the others start."""
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda fold: self.train("SFT", fold), dict.fromkeys(fold for _, fold, _ in cells)))
            return dict(zip(cells, pool.map(lambda cell: self.samples(*cell), cells), strict=True))


# ----------------------------------------------------------------------------------------------------------- the tables


def table(rows, draws=1000):
    """(markdown, numbers) of {label: samples}, all of the same turns; the last row is compared with the others."""
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
        found[label] = {t: (f(rows[label]), [f(one) for one in resampled]) for t, (f, _, _) in COLUMNS.items()}

    def cell(title, value, spread, sign=""):
        _, scale, digits = COLUMNS[title]
        return f"{scale * value:{sign}.{digits}f} ± {scale * spread:.{digits}f}"

    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label in rows:
        cells = [cell(title, value, statistics.stdev(one)) for title, (value, one) in found[label].items()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    last, numbers = list(rows)[-1], {}
    for label in list(rows)[:-1]:
        cells = []
        for title in COLUMNS:
            (a, ours), (b, theirs) = found[last][title], found[label][title]
            cells.append(cell(title, a - b, statistics.stdev(x - y for x, y in zip(ours, theirs, strict=True)), "+"))
        lines.append(f"| {last} minus {label} | {' | '.join(cells)} |")
    for label in rows:
        numbers[label] = {title: value for title, (value, _) in found[label].items()}
    return "\n".join(lines), numbers


def write(out, name, text, numbers):
    print("\n" + text)
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    write_json(out / f"{name}.json", numbers)


def main():
    parser = argparse.ArgumentParser(description="A real Gemma on conversations that people wrote.")
    parser.add_argument("conversations", type=Path, help="PACIFIC as data.py pacific converts it")
    parser.add_argument("model", type=Path, help="a directory in Hugging Face's layout")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/pacific")
    parser.add_argument("--jobs", type=int, choices=range(1, 17), metavar="N", default=1, help="runs at a time")
    parser.add_argument("--folds", type=int, choices=range(1, 4), metavar="N", default=3, help="the first N of 3 only")
    parser.add_argument("--lora", action="store_true", help="train adapters instead of all weights; take another --out")
    parser.add_argument("--halves", action="store_true", help="SFT learns from one half, the others from the other")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:5], help="rows of the table")
    parser.add_argument("--search", action="store_true", help="try settings on a part of fold 0's training dialogues")
    args = parser.parse_args()
    runs = Folds(args.conversations, args.model, args.out, args.jobs, args.lora, args.halves)
    if args.search:
        found = runs.map([(method, "search", tuple(changed.items())) for method, changed in SEARCHED])
        rows = {" ".join([m, *(f"{k} {v}" for k, v in c)]): samples for (m, _, c), samples in found.items()}
        return write(runs.out, "search", *table(rows))
    folds = [f"fold{k}" for k in range(args.folds)]
    found = runs.map([(method, fold, ()) for fold in folds for method in args.methods])
    rows = {method: [row for fold in folds for row in found[method, fold, ()]] for method in args.methods}
    text, numbers = table(rows)
    minutes = ", ".join(f"{m} {runs.minutes(m, folds):.0f}" for m in args.methods)
    turns = rows[args.methods[0]]
    dialogues = len({row["dialogue"] for row in turns})
    text += f"\n\n{dialogues} dialogues, {len(turns)} turns a row; minutes of training a fold: {minutes}."
    return write(runs.out, "pacific", text, numbers)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("pacific.py: interrupted; started again, it goes on where it was")
