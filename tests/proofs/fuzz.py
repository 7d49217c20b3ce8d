"""Random damage to everything that is read: each case must be read, or be refused by one InputError of one line.

    python tests/proofs/fuzz.py                     20,000 cases of every reader, a few minutes
    python tests/proofs/fuzz.py --cases 1000 --seed 7 --only conversations,config

A case is a sound text with up to three changes: a value replaced by one of another type, a key lost, doubled or misspelt, a
piece of text cut out, repeated, or replaced by characters that often break things. A property is checked where a case is
read: pairs survive being written and read again, and a config gives the same config when written and read.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import act  # noqa: E402
import data  # noqa: E402
import gemma  # noqa: E402

VALUES = [None, True, False, 0, -1, 1, 2**63, 1e308, -0.5, "", " ", "x", "\u2028", "a" * 5000, [], [[]], {}, {"": {}}, [None, 1],
          "</script>", "\ud83d", "<end_of_turn>", "9" * 400]  # fmt: skip
PIECES = ["\0", "\ufeff", "{", "}", "]", '"', "\\", "\\ud800", ",", "1e999", "NaN", "Infinity", "-", "\r", "\n", "\x85", "é", "𝔘", ":"]


def nodes(value, path=()):
    """The paths of all values within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


def damaged(rng, value):
    """A copy of a JSON value with one value or key changed."""
    value = json.loads(json.dumps(value))
    path = rng.choice([path for path in nodes(value) if path] or [()])
    if not path:
        return rng.choice(VALUES)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, what = path[-1], rng.randrange(4)
    if what == 0 and isinstance(holder, dict):
        holder[key[:-1] if rng.random() < 0.5 else key + "s"] = holder.pop(key)
    elif what == 1:
        del holder[key]
    elif what == 2 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), holder[key])
    else:
        holder[key] = rng.choice(VALUES)
    return value


def case(rng, sound):
    """The text of a damaged value, itself damaged every other time."""
    value = sound
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        value = damaged(rng, value) if isinstance(value, dict | list) and value else value
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.3:
        at, length = rng.randrange(len(text) + 1), rng.choice((0, 1, 5))
        text = text[:at] + rng.choice(PIECES) * rng.choice((1, 1, 1, 50)) + text[at + length :]
    return text.encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")


def read_conversations(path):
    rows = data.read_vertex_jsonl(path)
    pairs = data.ACTDataset(rows, data.CLARIFY, 2).prepare_datasets()
    if pairs:
        written = path.with_name("pairs.jsonl")
        data.write_preferences(written, pairs, "records")
        keys = ("context", "history", "action", "chosen", "rejected", "target")
        again = data.read_preferences(written, lambda _: None)
        assert [[getattr(p, k) for k in keys] for p in pairs] == [[getattr(p, k) for k in keys] for p in again]


def read_config(path):
    config = act.load_config(path)
    written = path.with_name("again.json")
    data.write_json(written, asdict(config))
    assert act.load_config(written) == config


def readers():
    """{name: (sound JSON values, what reads a file of one)}."""
    rows = data.read_jsonl(ROOT / "configs/tiny/test.jsonl")
    conversations = [row for _, row in list(rows)[:20]]
    parts = [{"text": "Sales 2018: 5."}]
    contents = [{"role": "user", "parts": [{"text": "Sales?"}]}, {"role": "model", "parts": [{"text": "5"}]}]
    conversations.append({"systemInstruction": {"parts": parts}, "contents": contents})
    pairs = data.ACTDataset([data.parse_conversation(row, "x:1") for row in conversations], data.CLARIFY, 2).prepare_datasets()
    records = [make(pair) for pair in pairs[:8] for make in data.PREFERENCE_FORMS.values()]
    configs = [json.loads(path.read_text()) for path in sorted((ROOT / "configs").glob("*.json"))]
    models = [json.loads((ROOT / f"tests/golden/{name}/config.json").read_text()) for name in ("gemma2", "gemma3")]
    return {
        "conversations": (conversations, read_conversations),
        "pairs": (records, lambda path: data.read_preferences(path, lambda _: None)),
        "config": (configs, read_config),
        "model": (models, gemma.GemmaConfig.from_json),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers, e.g. config,model")
    args = parser.parse_args()
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "case.json")
        for name, (sound, read) in readers().items():
            if args.only and name not in args.only.split(","):
                continue
            began, refused, bad = time.monotonic(), 0, []
            for number in range(args.cases):
                rng = random.Random(f"{args.seed}/{name}/{number}")
                path.write_bytes(case(rng, rng.choice(sound)))
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        read(path)
                except data.InputError as error:
                    refused += 1
                    if not name.startswith(("conv", "pairs")) and len(str(error).splitlines()) != 1:
                        bad.append((number, f"{len(str(error).splitlines())} lines: {error}"))
                except Exception as error:  # what a user would see as a traceback
                    bad.append((number, f"{type(error).__name__}: {error}"))
            took = time.monotonic() - began
            print(f"{name}: {args.cases} cases, {refused} refused, {len(bad)} broken, {took:.0f} s", flush=True)
            for number, what in bad[:5]:
                print(f"  case {number}: {what[:300]}")
            broken += len(bad)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
