"""The paper's claims, checked on a laptop: every method, several seeds, a table and a figure. `act.py` does the work.

    python tests/proofs/claim.py --seeds 5           the table and the figure, on configs/tiny/test.jsonl: some two hours
    python tests/proofs/claim.py --seeds 5 --curve   and 25, 50 and 200 conversations
    python tests/proofs/claim.py --search            how hyperparameters were chosen: validation.jsonl, seeds 100 to 102
    python tests/proofs/claim.py --steps             how many steps each method gets, likewise, seeds 100 and 101: some two hours
    python tests/proofs/claim.py --study rpo_alpha   one choice of the recipe in many values, likewise

A seed stands for its own training conversations, its own SFT model and all random draws of its runs; all methods of a
seed start from the same SFT model. Runs are kept in --out; a finished one is not run again, so an interrupted table
goes on where it was. After a change of configs or code take another --out. Stop it with Ctrl-C, which also stops its
runs. The tables are written to --out/test or --out/validation: claim.md, curve.md, search.md, study-NAME.md, the same
as .json with every number of every run, and claim.svg.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from make_tiny import conversations  # noqa: E402

from act import load_config  # noqa: E402
from data import write_json, write_jsonl  # noqa: E402

METHODS = {  # method -> its config, and what differs; SFT starts from the base model, the others from what SFT gives
    "SFT": ("tiny_sft.json", {}),
    "SFT continued": ("tiny_sft_continued.json", {}),
    "offline DPO": ("tiny_dpo.json", {}),
    "ACT, no simulation": ("tiny_act_no_simulation.json", {}),
    "ACT, random actions": ("tiny_act_random_actions.json", {}),
    "ACT, no labels": ("tiny_act_no_labels.json", {}),
    "ACT": ("tiny.json", {"num_generations": 1}),
    "ACT, 4 samples": ("tiny.json", {"num_generations": 4}),
}
ROWS = {  # row of the table -> its method, and its number of steps, by --steps; the ablations have ACT's
    "SFT": ("SFT", None),
    "SFT continued": ("SFT continued", 500),
    "offline DPO": ("offline DPO", 100),
    "offline DPO, 500 steps": ("offline DPO", 500),
    **{method: (method, 500) for method in METHODS if method.startswith("ACT")},
}
STEPS = (50, 100, 250, 500)
COLUMNS = {  # title -> (metric, scale)
    "action macro F1": ("Macro F1", 100),
    "trajectory EM": ("Trajectory-level Exact Match", 100),
    "after clarification": ("Post-Clarification Exact Match", 100),
    "CLARIFY turns": ("CLARIFY Turns: Trajectory-level Exact Match", 100),
    "ANSWER turns": ("ANSWER Turns: Trajectory-level Exact Match", 100),
    "questions a turn": ("Questions per Turn", 1),
}
CURVE = ("SFT", "SFT continued", "offline DPO", "ACT")
SIZES = (25, 50, 100, 200)  # training conversations of the curve
SEARCH_SEEDS = (100, 101, 102)
STEPS_SEEDS = SEARCH_SEEDS[:2]
GRID = {
    "learning_rate": (5e-4, 1e-3),
    "rpo_alpha": (0.0, 0.3, 1.0),
}  # six settings for each method; the classifier's labels get ACT's
STEPPED = ("SFT continued", "offline DPO", "ACT", "ACT, 4 samples")
SEARCH = {
    "SFT continued": {"learning_rate": (3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3)},
    "offline DPO": GRID,
    "ACT, no simulation": GRID,
    "ACT, random actions": GRID,
    "ACT": GRID,
}
STUDIES = {  # name -> ACT's config with other values; max_turns is then evaluated with 3 turns like all others
    "loss_on": ("assistant", "all"),
    "rpo_alpha": (0.0, 0.3, 1.0),
    "max_turns": (1, 2, 3),
    "temperature": (0.5, 0.7, 1.0, 1.3),
    "num_generations": (1, 2, 4, 8),
}  # fmt: skip


class Bench:
    """Runs `act.py` in --out, a few runs at a time, each on one thread; every run once."""

    def __init__(self, out, jobs, evaluation):
        self.out, self.jobs, self.evaluation, self.locks, self.guard = out, jobs, evaluation, {}, threading.Lock()
        out.mkdir(parents=True, exist_ok=True)

    def map(self, cells):
        """{cell: metrics} of all `cells`, which are arguments of `run`."""
        done = itertools.count(1)

        def one(cell):
            result = self.run(*cell)
            found = [f"{title} {text(result[name], scale)}" for title, (name, scale) in list(COLUMNS.items())[:2]]
            cell_text = f"{' '.join(map(str, cell[:3]))} {dict(cell[3]) or ''}"
            print(f"{next(done):3}/{len(cells)}  {cell_text}  {', '.join(found)}", flush=True)
            return result

        with ThreadPoolExecutor(self.jobs) as pool:
            return dict(zip(cells, pool.map(one, cells), strict=True))

    def run(self, method, seed, size=100, overrides=()):
        """Metrics of one method's model on the evaluation file. overrides: ((key of training_config, value), ...)"""
        config, own = METHODS[method]
        given = {f"training_config.{key}": value for key, value in {**own, **dict(overrides)}.items()}
        turns = given.pop("training_config.max_turns", 3)
        name = "-".join(
            [
                method.replace(",", "").replace(" ", "_"),
                str(seed),
                str(size),
                *(f"{key}={value}" for key, value in overrides),
            ]
        )
        start = "configs/tiny/base" if method == "SFT" else self.model("SFT", seed, size)
        with self.guard:
            lock = self.locks.setdefault(name, threading.Lock())
        with lock:  # all methods of a seed wait for the one that trains their SFT model
            settings = {
                "policy_model_config.model_path": start, "data_config.train_path": self.conversations(seed, size),
                "training_config.seed": seed, "training_config.max_turns": turns, "training_config.save_steps": 0,
                **given,
            }  # fmt: skip
            seconds = self.act(name, config, settings)
            if turns != 3:
                settings = {"policy_model_config.model_path": self.out / name / "model"}
                name += "-evaluated"
                seconds += self.act(name, config, settings, "--task", "evaluate")
        return {**json.loads((self.out / name / "eval_metrics.json").read_text(encoding="utf-8")), "seconds": seconds}

    def model(self, method, seed, size):
        self.run(method, seed, size)
        return self.out / f"{method}-{seed}-{size}" / "model"

    def conversations(self, seed, size):
        path = self.out / f"train-{seed}-{size}.jsonl"
        with self.guard:
            if not path.exists():
                write_jsonl(path, itertools.islice(conversations("train", seed=seed), size))
        return path

    def act(self, name, config, settings, *flags):
        """One run of act.py, unless it is finished. Returns its seconds, on one thread; seconds.json finishes it."""
        folder, began = self.out / name, time.monotonic()
        if (folder / "seconds.json").exists():
            return json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
        settings = {**settings, "training_config.output_dir": folder, "data_config.validation_path": self.evaluation}
        command = [sys.executable, "act.py", "--config", f"configs/{config}", *flags, "--overwrite"]
        command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        ran = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if ran.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}")
        seconds = time.monotonic() - began
        write_json(folder / "seconds.json", seconds)
        return seconds


# ----------------------------------------------------------------------------------------------------------- the tables


def text(value, scale=100, spread=None):
    digits = 2 if scale == 1 else 1
    return (
        "-"
        if value is None
        else f"{scale * value:.{digits}f}" + (f" ± {scale * spread:.{digits}f}" if spread is not None else "")
    )


def mean_text(results, metric, scale):
    values = [result[metric] for result in results if result[metric] is not None]
    return (
        text(statistics.mean(values), scale, statistics.stdev(values) if len(values) > 1 else None) if values else "-"
    )


def table(rows, first=""):
    """Markdown: rows of {label: [metrics of each seed]}, mean ± standard deviation over seeds."""
    lines = [f"| {first} | {' | '.join(COLUMNS)} | seconds a run |", "|---" * (len(COLUMNS) + 2) + "|"]
    for label, results in rows.items():
        cells = [mean_text(results, *column) for column in COLUMNS.values()] + [
            f"{statistics.mean(r['seconds'] for r in results):.0f}"
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(rows, minuend="ACT"):
    """Markdown: `minuend` minus each other row, in points: the mean over seeds and each seed."""
    lines = [f"| {minuend} minus | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label, results in rows.items():
        cells = []
        for metric, scale in COLUMNS.values():
            pairs = [(a[metric], b[metric]) for a, b in zip(rows[minuend], results, strict=True)]
            deltas = [scale * (a - b) for a, b in pairs if None not in (a, b)]
            digits = 2 if scale == 1 else 1
            each = ", ".join(f"{delta:+.{digits}f}" for delta in deltas)
            cells.append(f"{statistics.mean(deltas):+.{digits}f} ({each})" if deltas else "-")
        if label != minuend:
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(out, name, found, *parts):
    """The tables to the terminal and to `name`.md, every metric of every run to `name`.json."""
    print("\n" + "\n\n".join(parts))
    (out / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    rows = [
        {"method": m, "seed": s, "conversations": n, **dict(o), **metrics} for (m, s, n, o), metrics in found.items()
    ]
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def claim(bench, seeds, labels):
    def cell(label, seed):
        method, steps = ROWS[label]
        return method, seed, 100, (("max_steps", steps),) if steps else ()

    found = bench.map([cell(label, seed) for seed in seeds for label in labels])
    rows = {label: [found[cell(label, seed)] for seed in seeds] for label in labels}
    gold = next(iter(found.values()))["Gold Questions per Turn"]
    note = f"The gold dialogues ask {gold:.2f} questions a turn."
    compared = [differences(rows, minuend) for minuend in ("ACT, 4 samples", "ACT") if minuend in rows]
    write(bench.out, "claim", found, table(rows, f"{len(seeds)} seeds"), note, *compared)
    metric = COLUMNS["trajectory EM"][0]
    dots = {method: [100 * result[metric] for result in results] for method, results in rows.items()}
    (bench.out / "claim.svg").write_text(svg(dots), encoding="utf-8")


def curve(bench, seeds):
    cells = [(method, seed, size, ()) for method in CURVE for size in SIZES for seed in seeds]
    found = bench.map(cells)
    parts = []
    for size in SIZES:
        rows = {method: [found[method, seed, size, ()] for seed in seeds] for method in CURVE}
        parts.append(table(rows, f"{size} conversations"))
    write(bench.out, "curve", found, *parts)


def search(bench):
    """Every setting of every method in SEARCH; the one of the best mean trajectory exact match is in its config."""
    settings = {
        m: [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        for m, grid in SEARCH.items()
    }
    found = bench.map(
        [(method, seed, 100, setting) for method in SEARCH for setting in settings[method] for seed in SEARCH_SEEDS]
    )
    rows = {
        f"{method}, " + ", ".join(f"{key} {value:g}" for key, value in setting): [
            found[method, seed, 100, setting] for seed in SEARCH_SEEDS
        ] for method in SEARCH for setting in settings[method]
    }  # fmt: skip
    write(bench.out, "search", found, table(rows, "setting"))


def steps(bench):
    """Every number of steps of every method; the one of the best mean trajectory exact match is in the table."""
    found = bench.map(
        [(method, seed, 100, (("max_steps", n),)) for seed in STEPS_SEEDS for method in STEPPED for n in STEPS]
    )
    rows = {
        (method, n): [found[method, seed, 100, (("max_steps", n),)] for seed in STEPS_SEEDS]
        for method in STEPPED for n in STEPS
    }  # fmt: skip
    write(bench.out, "steps", found, table({f"{method}, {n} steps": each for (method, n), each in rows.items()}))


def study(bench, name):
    config, own = METHODS["ACT"]
    own = {**asdict(load_config(ROOT / "configs" / config).training_config), **own}[name]
    settings = {value: () if value == own else ((name, value),) for value in STUDIES[name]}
    found = bench.map([("ACT", seed, 100, setting) for setting in settings.values() for seed in SEARCH_SEEDS])
    rows = {
        str(value): [found["ACT", seed, 100, setting] for seed in SEARCH_SEEDS] for value, setting in settings.items()
    }
    write(bench.out, f"study-{name}", found, table(rows, f"`{name}`"))


# ----------------------------------------------------------------------------------------------------------- the figure

COLOURS = {  # class -> on a light page, on a dark one
    "paper": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "grid": ("#d0d7de", "#30363d"),
    "other": ("#6e7781", "#8b949e"),
    "act": ("#cf222e", "#ff7b72"),
}


def style():
    """The colours, for a light page and, where the reader prefers it, for a dark one."""
    light, dark = (
        "\n".join(f".{name} {{ fill: {pages[i]}; stroke: none }}" for name, pages in COLOURS.items()) for i in (0, 1)
    )
    return f"<style>\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n</style>"


def svg(rows, width=800, left=250, right=40, top=84, row=44):
    """Trajectory exact match; rows: {method: [percent of each seed]}, a dot for each and a bar at their mean."""
    values = [value for row in rows.values() for value in row]
    low, high = 5 * int(min(values) // 5), 5 * int(max(values) // 5 + 1)
    height = top + row * len(rows) + 50

    def x(value):
        return left + (value - low) / (high - low) * (width - left - right)

    def label(at_x, at_y, words, anchor="middle", kind="ink", more=""):
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}" class="{kind}"{more}>{words}</text>'

    bold, seeds = ' font-weight="600"', len(next(iter(rows.values())))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="18">',
        "<title>Trajectory exact match of each method, a dot for each seed</title>",
        style(),
        f'<rect width="{width}" height="{height}" class="paper"/>',
        label(14, 30, "Turns that end in exactly the gold answer, %", "start", more=bold),
        label(14, 56, f"608 test turns of the tiny world; {seeds} seeds, and their mean", "start", more=' font-size="16"'),
    ]
    for tick in range(low, high + 1, 5):
        parts.append(f'<rect x="{x(tick):.1f}" y="{top}" width="1" height="{row * len(rows)}" class="grid"/>')
        parts.append(label(x(tick), height - 20, tick))
    for i, (method, each) in enumerate(rows.items()):
        y, mean = top + row * (i + 0.5), statistics.mean(each)
        kind = "act" if method.startswith("ACT") else "other"
        parts.append(label(left - 14, y + 6, method, "end", kind, bold))
        parts += [f'<circle cx="{x(value):.1f}" cy="{y}" r="5" class="{kind}" fill-opacity="0.5"/>' for value in each]
        parts.append(f'<rect x="{x(mean) - 2:.1f}" y="{y - 14}" width="4" height="28" class="{kind}"/>')
        parts.append(label(x(mean), y - 16, f"{mean:.1f}", kind=kind, more=' font-size="14"'))
    return "\n".join([*parts, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description="The paper's claims, checked on a laptop.")
    parser.add_argument("--seeds", type=int, choices=range(1, 100), metavar="N", default=5, help="0 to N - 1")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows of the table")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--curve", action="store_true", help="also with other numbers of training conversations"
    )
    what.add_argument("--search", action="store_true", help="choose hyperparameters on validation.jsonl instead")
    what.add_argument("--steps", action="store_true", help="choose each method's number of steps instead")
    what.add_argument("--study", choices=STUDIES, help="vary one setting on validation.jsonl instead")
    parser.add_argument(
        "--jobs", type=int, choices=range(1, 100), metavar="N", default=2, help="runs at a time, of one thread each"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs/claim")
    args = parser.parse_args()
    began = time.monotonic()
    if args.search or args.steps or args.study:
        bench = Bench((args.out / "validation").resolve(), args.jobs, ROOT / "configs/tiny/validation.jsonl")
        search(bench) if args.search else steps(bench) if args.steps else study(bench, args.study)
    else:
        bench = Bench((args.out / "test").resolve(), args.jobs, ROOT / "configs/tiny/test.jsonl")
        claim(bench, range(args.seeds), args.rows)
        print(f"\nThis took {(time.monotonic() - began) / 60:.1f} minutes.", flush=True)
        if args.curve:
            curve(bench, range(args.seeds))
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes in all; tables and numbers are in {bench.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("claim.py: interrupted; started again, it goes on from the runs that are finished")
