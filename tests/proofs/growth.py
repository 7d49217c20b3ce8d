"""How the cost grows: with a dialogue's turns, a file's conversations, a model's vocabulary.

    python tests/proofs/growth.py                              all of it, six minutes of the processor
    python tests/proofs/growth.py --only turns,vocabulary      without the long files

Each row is a run of act.py (ACT, made-up conversations, the tiny world's model, one thread) in a process of its own.
Seconds are of the processor, so that other work on the machine hardly counts. start: all before the first step; a step:
rollout and update, the median of STEPS after a first one that is left out; memory: the largest resident size before the
first step and at the end.

  turns       steps of 50 turns: 10 dialogues of 5, 1 of 50, a tenth of one of 500, whose prompts are cut to PROMPT
              tokens (last column: how many turns lose some). written: rollouts.jsonl, a turn
  files       conversations of 3 turns, steps of 8 turns
  vocabulary  random weights and a tokenizer with as many pieces, steps of 8 turns
"""

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PROMPT, STEPS = 1920, 6
TINY = ROOT / "configs" / "tiny" / "sft"
CONTEXT = "items: revenue, stock, wages, debt\nmonths: jul, mar, aug, jan\nplaces: paris, madrid, cairo"


def conversation(rng, turns):
    """Every third turn asks for an item, which the user names in the next."""
    messages = [{"role": "system", "content": CONTEXT}]
    asked = False
    for turn in range(turns):
        item, month, place = rng.choice("revenue stock wages debt".split()), rng.choice(["jul", "mar"]), "paris"
        asks = turn % 3 == 0 and turn + 1 < turns
        said = f"For {item}." if asked else f"Do you have the figure in {place} for {month}?"
        reply = "What item are you looking for?" if asks else f"get {item} {month} {place}"
        messages.append({"role": "user", "content": said, "requires_clarification": asks})
        messages.append({"role": "model", "content": reply})
        asked = asks
    return {"messages": messages}


def write_conversations(path, count, turns):
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(conversation(rng, turns)) + "\n" for _ in range(count))


def write_model(directory, vocabulary):
    """The tiny model's layers at random, and its tokenizer with more pieces: to a message of protobuf others are added
    by appending them."""
    from gemma import Gemma, GemmaConfig

    config = GemmaConfig.from_json(TINY / "config.json")
    pieces = (TINY / "tokenizer.model").read_bytes()
    for i in range(config.vocab_size, vocabulary):
        piece = b"\x0a%c<w%06d>" % (9, i)  # field 1, its text
        piece += b"\x15\x00\x00\x80\xc2"  # field 2, its score: -64
        pieces += b"\x0a%c" % len(piece) + piece
    config.vocab_size = vocabulary
    Gemma(config).save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(pieces)


def child(arguments):
    """act.py with these arguments; the last line that it says is what was measured, as JSON."""
    import act

    begun, took, memory = [], [], []

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def on_policy(*args, real=act.on_policy):
        begun.append(time.process_time())
        memory.append(peak())
        return real(*args)

    def clip_and_step(*args, real=act.clip_and_step):
        result = real(*args)
        took.append(time.process_time() - begun[-1])
        return result

    act.on_policy, act.clip_and_step = on_policy, clip_and_step
    if act.main(arguments):
        os._exit(1)
    found = {"start": begun[0], "step": statistics.median(took[1:]), "before": memory[0], "peak": peak()}
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)


def measure(folder, model, size, train):
    """(what `child` found, the run's words) of ACT on a file, in steps of `size` turns."""
    training = {
        "output_dir": str(folder / "run"), "max_steps": 1 + STEPS, "per_device_train_batch_size": size, "optim": "adamw",
        "learning_rate": 1e-5, "max_new_tokens": 16, "max_length": PROMPT + 128, "max_prompt_length": PROMPT,
    }  # fmt: skip
    sections = {
        "policy_model_config": {"model_path": str(model)},
        "data_config": {"train_path": str(train)},
        "training_config": training,
    }
    (folder / "config.json").write_text(json.dumps(sections))
    command = [sys.executable, __file__, "--child", "--config", folder / "config.json", "--overwrite"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"growth.py: {train.name} failed\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def table(title, more=()):
    titles = title, "start, s", "a step, s", "GiB at the start", "GiB in the end", *more
    print("\n| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")


def row(name, found, *more):
    memory = (f"{found[key] / 2**30:.2f}" for key in ("before", "peak"))
    print("|", " | ".join([name, f"{found['start']:.1f}", f"{found['step']:.3f}", *memory, *more]), "|", flush=True)


def grow_turns(folder):
    table("turns of a dialogue", ["KB written a turn", "prompts cut"])
    for turns in (5, 50, 500):
        train = folder / f"{turns}-turns.jsonl"
        write_conversations(train, 500 // turns, turns)
        found, said = measure(folder, TINY, 50, train)
        written = (folder / "run" / "rollouts.jsonl").stat().st_size / (1 + STEPS) / 50 / 1000
        cut = re.search(r"(\d+) prompts lose tokens", said)
        row(str(turns), found, f"{written:.1f}", f"{cut[1] if cut else 0} of 500")


def grow_files(folder):
    table("conversations of a file")
    for count in (1_000, 10_000, 100_000):
        train = folder / f"{count}.jsonl"
        write_conversations(train, count, 3)
        row(f"{count:,}", measure(folder, TINY, 8, train)[0])


def grow_vocabulary(folder):
    table("pieces of a vocabulary")
    train = folder / "train.jsonl"
    write_conversations(train, 100, 3)
    for vocabulary in (2**15, 2**18):
        write_model(folder / "model", vocabulary)
        row(f"{vocabulary:,}", measure(folder, folder / "model", 8, train)[0])


ITEMS = {"turns": grow_turns, "files": grow_files, "vocabulary": grow_vocabulary}


def main():
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    parser = argparse.ArgumentParser(description="How the cost grows.")
    parser.add_argument("--only", default=",".join(ITEMS), help="of turns, files, vocabulary")
    for name in parser.parse_args().only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            ITEMS[name](Path(folder))


if __name__ == "__main__":
    main()
