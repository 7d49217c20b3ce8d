"""Make the tiny world: dialogues, tokenizer and checkpoints small enough to train on a laptop's CPU.

    python tests/make_tiny.py                       # everything, about four minutes on two cores
    python tests/make_tiny.py --only data           # train.jsonl, validation.jsonl, test.jsonl (Vertex JSONL)
    python tests/make_tiny.py --only data --train 400    # more training conversations; the first 100 stay the same
    python tests/make_tiny.py --only tokenizer      # tokenizer.model (SentencePiece)
    python tests/make_tiny.py --only base           # base/: trained from nothing on dialogues whose assistant asks at random
    python tests/make_tiny.py --only sft            # sft/: base/ after a short training on train.jsonl

An assistant turns requests into queries (`get revenue mar rome`). The context lists the values that the three slots of a
query can take in this conversation. A slot that the user leaves out is ambiguous only where the context lists more than one
value for it, and the assistant should ask for it then, one slot a question, in the order item, month, place.
Everything is keyed by split and number, so any conversation comes out the same alone, in a longer file or on another machine.
"""

import argparse
import io
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from data import INSTRUCTION, write_jsonl  # noqa: E402
from gemma import Gemma2, Gemma2Config  # noqa: E402

# ---------------------------------------------------------------------------------------------------------- the world

SLOTS = {  # in the order in which queries name them and questions ask for them
    "item": "revenue costs profit sales orders returns visits stock wages rent tax debt".split(),
    "month": "jan feb mar apr may jun jul aug sep oct nov dec".split(),
    "place": "rome paris oslo lima cairo delhi tokyo quito milan berlin dublin madrid".split(),
}
OPENINGS = ("Show me", "I need", "Look up", "Please find", "Can I see", "Do you have")  # the last two make a question
NO_ITEM = ("the figure", "the number")
WHERE = {"month": ("for {}", "from {}"), "place": ("in {}", "at {}")}
FOLLOW_UPS = ("And {}?", "What about {}?", "Now {}.", "The same for {}, please.")
QUESTIONS = (  # people word a question in many ways: the probability of asking is spread over several wordings
    "Which {} do you mean?", "What {} are you looking for?", "For which {}?", "Could you say the {}?", "Is there a specific {}?",
    "The {}, please?",
)  # fmt: skip
REPLIES = ("{}.", "{}, please.", "I mean {}.", "For {}.")
NOTHING_TO_ADD = "I have nothing to add."  # what the rule-based user simulator answers to a question that misses the point


def draw_context(rng):
    """The values that each slot can take in one conversation: a single one with probability .2, else 3 to 5."""
    return {slot: rng.sample(words, 1 if rng.random() < 0.2 else rng.randint(3, 5)) for slot, words in SLOTS.items()}


def context_text(context):
    return "\n".join(f"{slot}s: {', '.join(values)}" for slot, values in context.items())


def request(rng, context):
    """A fresh request: (what the user says, what the user wants, the slots that the text names), 0 to 2 slots left out."""
    intent = {slot: rng.choice(values) for slot, values in context.items()}
    left_out = rng.sample(list(SLOTS), rng.choices((0, 1, 2), (0.17, 0.43, 0.40))[0])
    opening = rng.choice(OPENINGS)
    subject = rng.choice(NO_ITEM) if "item" in left_out else intent["item"]
    phrases = [rng.choice(WHERE[slot]).format(intent[slot]) for slot in WHERE if slot not in left_out]
    rng.shuffle(phrases)
    end = "?" if opening in OPENINGS[-2:] else "."
    return " ".join([opening, subject, *phrases]) + end, intent, set(SLOTS) - set(left_out)


def follow_up(rng, context, query):
    """A request that changes one slot of the query just answered, so that nothing is left open; None where nothing can change."""
    changeable = [slot for slot, values in context.items() if len(values) > 1]
    if not changeable:
        return None
    slot = rng.choice(changeable)
    value = rng.choice([value for value in context[slot] if value != query[slot]])
    return rng.choice(FOLLOW_UPS).format(value), {**query, slot: value}, set(SLOTS)


def open_slots(context, named):
    """The slots to ask for: not named by the user so far, and with more than one value in the context."""
    return [slot for slot, values in context.items() if slot not in named and len(values) > 1]


def careful(rng, context, named, refused):
    """The gold assistant asks for the first open slot. Returns a slot, or None to answer."""
    return next(iter(open_slots(context, named)), None)


def careless(rng, context, named, refused):
    """The base model's teacher asks with probability .35, needed or not, about a slot that the user left out, if there is one.

    A useless reply ends its questions.
    """
    return rng.choice([slot for slot in SLOTS if slot not in named] or list(SLOTS)) if rng.random() < 0.35 and not refused else None


def exchange(rng, context, ask, text, intent, named):
    """One request until its answer: (messages, the query answered). `ask` is `careful` or `careless`."""
    messages, named, refused = [], set(named), False
    while True:
        slot = ask(rng, context, named, refused)
        messages.append({"role": "user", "content": text, "requires_clarification": slot is not None})
        if slot is None:
            break
        messages.append({"role": "model", "content": rng.choice(QUESTIONS).format(slot)})
        refused = slot not in open_slots(context, named)
        text = NOTHING_TO_ADD if refused else rng.choice(REPLIES).format(intent[slot])
        named |= set() if refused else {slot}
    query = {slot: intent[slot] if slot in named else rng.choice(context[slot]) for slot in SLOTS}
    messages.append({"role": "model", "content": "get " + " ".join(query.values())})
    return messages, query


def conversation(rng, ask=careful):
    """One conversation as a dict in Vertex AI's `messages` form: 4 to 6 fresh requests, one in four with a follow-up."""
    context = draw_context(rng)
    messages = [{"role": "system", "content": context_text(context)}]
    for _ in range(rng.randint(4, 6)):
        more, query = exchange(rng, context, ask, *request(rng, context))
        messages += more
        following = follow_up(rng, context, query) if rng.random() < 0.25 else None
        if following:
            messages += exchange(rng, context, ask, *following)[0]
    return {"messages": messages}


def conversations(split, ask=careful, seed=0):
    """An endless stream; the i-th conversation of a split depends on nothing but (split, seed, i)."""
    return (conversation(random.Random(f"{split}/{seed}/{i}"), ask) for i in itertools.count())


def user_turns(stream, turns):
    """The first conversations of `stream` that hold at least `turns` user turns together."""
    taken, count = [], 0
    while count < turns:
        taken.append(next(stream))
        count += sum(message["role"] == "user" for message in taken[-1]["messages"])
    return taken


def make_data(out, train):
    """train.jsonl (`train` conversations), validation.jsonl and test.jsonl (600 user turns or a few more each)."""
    write_jsonl(out / "train.jsonl", itertools.islice(conversations("train"), train))
    for split in ("validation", "test"):
        write_jsonl(out / f"{split}.jsonl", user_turns(conversations(split), 600))


# ------------------------------------------------------------------------------------------------------ the tokenizer

SYMBOLS = ["<start_of_turn>", "<end_of_turn>", "\n"]


def vocabulary(instruction):
    """The words of the tiny world and of its prompts, each with the space before it, if any, and without a final . , or ?"""
    speaker = {"system": "", "user": "User: ", "model": "Assistant: "}
    lines = {"[context]", "[conversation]", "user", "model", "User: " + NOTHING_TO_ADD, *instruction.split("\n")}
    for record in itertools.islice(conversations("tokenizer"), 300):
        for message in record["messages"]:
            lines.update((speaker[message["role"]] + message["content"]).split("\n"))
    return sorted({word.rstrip(".,?") for line in lines for word in re.findall(" ?[^ ]+", line)})


def make_tokenizer(out):
    """tokenizer.model: one piece a word, the ids of Gemma's first four tokens, and bytes for whatever the tiny world lacks."""
    words, model = vocabulary(INSTRUCTION), io.BytesIO()
    # A piece is considered only if it occurs in two different strings: hence every word bare (often) and before each mark (rarely).
    text = [word + mark for word in words for mark, times in (("", 100), (".", 10), (",", 10), ("?", 10)) for _ in range(times)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type="unigram", vocab_size=1000, hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, character_coverage=1.0, user_defined_symbols=SYMBOLS,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, split_by_unicode_script=False,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    split = [word for word in words if len(processor.encode(word)) > 1]
    assert not split, f"not single tokens: {split}"
    temporary = out / "tokenizer.model.tmp"
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, out / "tokenizer.model")


# ---------------------------------------------------------------------------------------------------- the checkpoints

MODEL = Gemma2Config(
    vocab_size=416, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, query_pre_attn_scalar=32, sliding_window=64, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    max_position_embeddings=2048,
)  # fmt: skip
BASE = {
    "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 50, "max_steps": 1600, "per_device_train_batch_size": 64,
    "icl_examples": 1, "logging_steps": 50,
}  # fmt: skip


def init_model(directory, tokenizer, config=MODEL, seed=0):
    """Write a random checkpoint, 0.84 million parameters.

    Gemma2 draws every matrix, the embedding too, with standard deviation fan_in^-0.5: scaled embeddings and logits begin near
    unit size. What the blocks add to them begins small: the scales `1 + weight` of the norms after attention and MLP are 0.3.
    """
    torch.manual_seed(seed)
    model = Gemma2(config)
    for name, parameter in model.named_parameters():
        if "post_" in name:
            torch.nn.init.constant_(parameter, -0.7)
    model.save_pretrained(directory)
    shutil.copyfile(tokenizer, Path(directory) / "tokenizer.model")


def sft(start, train_path, validation_path, target, settings):
    """configs/tiny_sft.json from checkpoint `start` on `train_path`; the final model takes the place of directory `target`."""
    with tempfile.TemporaryDirectory() as scratch:
        overrides = {
            "policy_model_config.model_path": start,
            "data_config.train_path": train_path, "data_config.validation_path": validation_path,
            "training_config.output_dir": scratch,
            **{f"training_config.{key}": value for key, value in settings.items()},
        }  # fmt: skip
        arguments = [text for key, value in overrides.items() for text in (f"--{key}", str(value))]
        command = [sys.executable, ROOT / "act.py", "--config", ROOT / "configs/tiny_sft.json", *arguments]
        subprocess.run(command, check=True)
        partial = target.with_name(target.name + ".part")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(Path(scratch) / "model", partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)


def train_base(out, seed=0):
    """base/: from nothing, on the random assistant's dialogues. It learns to fill slots and to ask, not when to ask."""
    with tempfile.TemporaryDirectory() as scratch:
        start, stream = Path(scratch) / "start", Path(scratch) / "train.jsonl"
        init_model(start, out / "tokenizer.model", seed=seed)
        turns = BASE["max_steps"] * BASE["per_device_train_batch_size"]
        write_jsonl(stream, user_turns(conversations("base", careless, seed), turns))
        sft(start, stream, "", out / "base", BASE)


def train_sft(out, seed=0):
    """sft/: base/ after a short training on the gold replies of train.jsonl, stopped early: *when* to ask is only half learnt."""
    sft(out / "base", out / "train.jsonl", out / "validation.jsonl", out / "sft", {"seed": seed})


def main():
    parser = argparse.ArgumentParser(description="Make the tiny world: dialogues, tokenizer and checkpoints.")
    parser.add_argument("--out", type=Path, default=ROOT / "configs/tiny")
    parser.add_argument("--only", choices=("data", "tokenizer", "base", "sft"))
    parser.add_argument("--train", type=int, default=100, help="training conversations")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    steps = {"data": lambda: make_data(args.out, args.train), "tokenizer": lambda: make_tokenizer(args.out),
             "base": lambda: train_base(args.out), "sft": lambda: train_sft(args.out)}  # fmt: skip
    for name, step in steps.items():
        if args.only in (None, name):
            print(f"{name} ...", flush=True)
            step()


if __name__ == "__main__":
    main()
