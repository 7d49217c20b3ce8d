"""How fast, how much memory, how near to the machine's limit; and beside TRL and transformers, where a Python has them.

    python tests/proofs/bench.py --size 48m                                        all items, on a GPU if there is one
    python tests/proofs/bench.py --size 48m --peer --peer-python PEER/bin/python   in turns: ours, peer, ours, peer, ...
    python tests/proofs/bench.py --size 48m --only a,f --dialogues FILE.jsonl      f over dialogues of Vertex JSONL

  a  a DPO step: reference forward, policy forward and backward, clipping, optimiser; against TRL's DPOTrainer
  b  a rollout of ragged prompts, sampled at temperature 1, none of which stops early; against transformers' generate,
     as a left-padded batch and, as published research code samples, one prompt at a time without a cache
  c  the first token of a second simulated turn, continuing the kept cache; against prefilling the conversation anew
  d  a whole ACT step: rollout with simulated users, pairs, reference, update
  e  evaluation: turns played with greedy decoding
  f  DPO over dialogues, all turns of a dialogue in one batch; against one row per pair, and against TRL
  g  a DPO step with LoRA; against a
  The machine's own limits are measured first: a matrix product, and a sum over memory.

The weights are random and made in a temporary directory; words become tokens by a hash. Every measurement is a
process of its own: it warms up once, measures a few times, and prints a line of JSON with its times and its peak
memory (the process's largest resident size, imports included; on CUDA the most that was allocated). The table shows
medians over all rounds and, in brackets, the smallest; ratios are of medians. float32 on CPU. On CUDA training
computes in bfloat16 over float32 weights, the peer's too, and generation runs in bfloat16. The peers load the same
weights and get the same tokens: `logps`, the mean log-probability of a chosen reply before the first update, must be
the same on both sides.

Operations are counted from the shapes. A forward pass: 2 per weight of the linear layers and token computed (in the
last MLP, only tokens that something is predicted from), 4 * heads * head_dim per token and key that it sees in each
layer, 2 * hidden_size * vocab_size per scored token. A training step is 1 forward pass of the reference and 3 of the
policy (4 with checkpointing; the output head's is always recomputed). A decoding step reads every weight once, and
the keys and values that each row sees. Prefill is measured by generating one token, and taken off to get the decoding
time.
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
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# hidden, intermediate, layers, heads, key/value heads, head_dim, vocabulary, window; then the workload: pairs of a
# batch, tokens of their prompts and replies, rows of a rollout (prompts of a quarter to three quarters of those tokens)
SIZES = {
    "tiny": (64, 128, 2, 4, 2, 16, 512, 16, 2, 64, 16, 4),
    "48m": (512, 2048, 8, 8, 4, 64, 32000, 128, 4, 512, 64, 8),
    "270m": (640, 2048, 18, 4, 1, 256, 262144, 512, 4, 512, 64, 8),  # Gemma 3's smallest
    "2b": (2304, 9216, 26, 8, 4, 256, 256000, 4096, 4, 960, 64, 32),
}
NEWLINE, WORDS = 4, 8  # ids below WORDS are for control tokens
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32


def clock():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, repeats=3):
    """Seconds of each of `repeats` calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        began = clock()
        function()
        times.append(clock() - began)
    return times[1:]


def peak_bytes():
    if CUDA:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ----------------------------------------------------------------------------------------------------------------------
# The workload


class HashTokenizer:
    """Words to ids: <17> is 17, any other word is hashed. What is decoded is encoded to the same ids again."""

    path, bos_id, eos_id, pad_id, start_of_turn_id, end_of_turn_id = "(hash)", 2, 1, 0, None, None

    def __init__(self, vocab_size):
        self.vocab_size, self.sp, self.ids = vocab_size, self, {"\n": NEWLINE}

    def __len__(self):
        return self.vocab_size

    def id_to_piece(self, i):
        return "\n" if i == NEWLINE else f"<{i}>"

    def encode(self, text, bos=False):
        return [self.bos_id] * bos + [self._id(word) for word in re.findall(r"<\d+>|\n|\w+|[^\w\s]", text)]

    def _id(self, word):
        if word == "\n":
            return NEWLINE
        if word[0] == "<" and word[1:-1].isdigit():
            return int(word[1:-1])
        return WORDS + zlib.crc32(word.encode()) % (self.vocab_size - WORDS)

    def decode(self, ids):
        return as_text(ids)


def as_text(ids):
    return " ".join(f"<{i}>" for i in ids)


class Work:
    """What all measurements share: sizes, tokens and our own objects, the same in every process."""

    def __init__(self, folder, size, checkpointing):
        import act
        import data
        import gemma

        self.act, self.data, self.gemma, self.folder = act, data, gemma, Path(folder)
        names = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
            vocab_size sliding_window"""
        shapes = dict(zip(names.split(), SIZES[size], strict=False))
        kind = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        if size == "270m":
            kind = {"model_type": "gemma3_text"}
        self.config = gemma.GemmaConfig(**shapes, **kind, query_pre_attn_scalar=shapes["head_dim"])
        self.dialogue_count = 2 if size == "270m" else 5  # a peer takes minutes for one
        self.pair_count, self.prompt, self.response, self.rows = SIZES[size][8:]
        self.checkpointing = checkpointing
        self.training = act.TrainingConfig(
            bf16=CUDA, gradient_checkpointing=checkpointing, max_new_tokens=self.response, max_length=2**20,
            max_prompt_length=self.prompt, per_device_eval_batch_size=self.rows,
        )  # fmt: skip
        self.template = act.Template(HashTokenizer(self.config.vocab_size), "plain")
        self.helpers = act.Helpers(act.Config(), {})  # rules
        self.helpers.roles["action_model_config"] = self.classify

    def classify(self, texts):
        """Actions as random as the replies."""
        return [(self.data.ANSWER, self.data.CLARIFY)[zlib.crc32(text.encode()) % 2] for text in texts]

    def words(self, rng, count):
        return as_text(rng.randrange(WORDS, self.config.vocab_size) for _ in range(count))

    def pair(self, seed, prompt):
        """A pair whose prompt is cut to `prompt` tokens, and whose two sides are single replies."""
        rng = random.Random(seed)
        chosen, rejected = ([("model", self.words(rng, self.response - 1))] for _ in range(2))  # a newline ends each
        action = (self.data.CLARIFY, self.data.ANSWER)[seed % 2]
        history = [("user", self.words(rng, 12))]
        self.words(rng, prompt)  # as many draws as before, so that the pairs are the same
        room = prompt - len(self.template.prompt("", history, prompt))
        pair = self.data.Pair(self.words(rng, room), history, action, chosen, rejected, chosen, "")
        return self.prompted(pair)

    def prompted(self, pair):
        return replace(pair, prompt=self.template.prompt(pair.context, pair.history, 2**20))

    def pairs(self):
        return [self.pair(seed, self.prompt) for seed in range(self.pair_count)]

    def ragged(self, count):
        """Pairs whose prompts have a quarter to three quarters of `prompt` tokens."""
        step = self.prompt // 2 / max(1, count - 1)
        return [self.pair(seed, self.prompt // 4 + int(seed * step)) for seed in range(count)]

    def prompts(self):
        return [pair.prompt for pair in self.ragged(self.rows)]

    def synthetic_dialogues(self, count=3, turns=7):
        rng, rows = random.Random(0), []
        for _ in range(count):
            messages = [{"role": "system", "content": self.words(rng, 600 * self.prompt // 512)}]
            for turn in range(turns):
                asks = turn % 3 == 0
                messages += self.data.exchange(self.words(rng, 10), self.words(rng, 10), asks)
                if asks:
                    messages += self.data.exchange(self.words(rng, 4), self.words(rng, 10))
            rows.append({"messages": messages})
        self.data.write_jsonl(self.folder / "dialogues.jsonl", rows)

    def dialogues(self):
        """The pairs of a few dialogues of the file, from its shortest to its longest in even steps."""
        rows = self.data.read_vertex_jsonl(self.folder / "dialogues.jsonl")
        pairs = self.data.ACTDataset(rows, self.data.CLARIFY, 1).prepare_datasets()
        groups = [[self.prompted(pairs[i]) for i in group] for group in self.data.dialogues(pairs)]
        groups.sort(key=lambda group: len(group[-1].prompt))
        count = min(self.dialogue_count, len(groups))
        return [groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)]

    def sequences(self, pairs):
        """(tokens, mask) of both sides of each pair."""
        sides = [(pair, side) for pair in pairs for side in (pair.chosen, pair.rejected)]
        return [self.act.sequence(pair, side, True, self.template, self.training) for pair, side in sides]

    def token_pairs(self, pairs):
        """[prompt, chosen, rejected] of each pair, as the peers read them."""
        rows = [tokens for tokens, _ in self.sequences(pairs)]
        found = []
        for pair, chosen, rejected in zip(pairs, rows[::2], rows[1::2], strict=True):
            start = len(pair.prompt)
            found.append([pair.prompt, chosen[start:], rejected[start:]])
        return found

    # -- what is to be computed

    def pass_flops(self, positions, outputs):
        """Of one forward pass through the layers for tokens at these positions; each sees all before it in its branch.

        outputs: of how many tokens the last hidden state is asked for; the last MLP is computed for no others.
        """
        c, keys = self.config, positions.double() + 1
        heads, C = c.num_attention_heads * c.head_dim, c.hidden_size
        mlp = 3 * C * c.intermediate_size
        weights = C * (2 * heads + 2 * c.num_key_value_heads * c.head_dim) + mlp
        near = keys.clamp(max=c.sliding_window)
        seen = {self.gemma.GLOBAL: keys.sum().item(), self.gemma.LOCAL: near.sum().item()}
        layers = sum(2 * weights * len(keys) + 4 * heads * seen[kind] for kind in c.layer_types)
        return layers - 2 * mlp * (len(keys) - outputs)

    def step_flops(self, pairs):
        """(operations of a training step, tokens computed, slots that hold padding)."""
        forest = self.gemma.Forest(*zip(*self.sequences(pairs), strict=True))
        used = torch.zeros_like(forest.tokens, dtype=torch.bool)
        for row, path in forest.paths:
            used[row, path] = True
        head = 2 * self.config.vocab_size * self.config.hidden_size * len(forest.targets)
        layers = self.pass_flops(forest.positions[used], len(forest.targets))
        flops = layers * (5 if self.checkpointing else 4) + head * 5
        return flops, forest.used, forest.tokens.numel() - forest.used

    def decode_bytes(self, lengths, steps):
        """Read by `steps` decoding steps of rows with so many tokens: weights, and the keys and values seen."""
        c, size = self.config, torch.finfo(DTYPE).bits // 8
        with torch.device("meta"):
            total = steps * sum(parameter.numel() for parameter in self.gemma.Gemma(c).parameters())
        for kind in c.layer_types:
            limit = c.sliding_window if kind == self.gemma.LOCAL else 2**40
            seen = sum(min(length + step, limit) for length in lengths for step in range(1, steps + 1))
            total += 2 * c.num_key_value_heads * c.head_dim * seen
        return total * size

    # -- our models

    def trainer(self, lora=None, **changes):
        """What the trainer's steps read of a run. changes: of its training_config; lora: of adapters, else in full."""
        act, training, source = self.act, replace(self.training, **changes), self.folder / "model"
        act.start_processes()
        mesh = act.make_mesh(DEVICE, 1)
        model = act.PolicyModelConfig(str(source), str(DTYPE).removeprefix("torch."))
        if lora:
            model = replace(model, lora_r=lora.r, lora_alpha=lora.lora_alpha, lora_target_modules=lora.target_modules)
        config = act.Config(policy_model_config=model, training_config=training)
        policy = act.build_model(config, mesh)
        reference = None if lora else act.build_model(config, mesh, trained=False)
        return SimpleNamespace(
            config=config, device=DEVICE, template=self.template, helpers=self.helpers,
            policy=policy, reference=reference,
            optimizer=act.make_optimizer(policy, training),
        )  # fmt: skip

    def update(self, run, batch, micro=None):
        """One DPO step, `micro` pairs at a time. Returns the mean log-probability of the chosen sides before it."""
        training, micro, total = run.config.training_config, micro or len(batch), 0.0
        for i in range(0, len(batch), micro):
            total += self.act.preference_step(run, batch[i : i + micro], 1 / len(batch))["logps/chosen"]
        self.act.clip_and_step(run.policy, run.optimizer, training.max_grad_norm, training.learning_rate)
        return total / len(batch)

    def model(self):
        return self.gemma.Gemma.from_pretrained(self.folder / "model", dtype=DTYPE, device=DEVICE)


# ----------------------------------------------------------------------------------------------------------------------
# Our measurements; each returns what its line of JSON says


def setup(work):
    """Random weights, and the tokens for the peers."""
    torch.manual_seed(0)
    with DEVICE:
        work.gemma.Gemma(work.config).to(DTYPE).save_pretrained(work.folder / "model")
    if not (work.folder / "dialogues.jsonl").exists():
        work.synthetic_dialogues()
    tokens = {"dpo": work.token_pairs(work.pairs()), "rollout": work.prompts()}
    tokens |= {"new": work.response, "vocab_size": work.config.vocab_size}
    tokens["dialogues"] = [work.token_pairs(group) for group in work.dialogues()]
    (work.folder / "tokens.json").write_text(json.dumps(tokens))
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device}


def limits(work):
    """Operations per second of a square matrix product, and bytes per second of a sum over 1 GiB."""
    n = 8192 if CUDA else 2048
    shapes = (n, n), (n, n), (2**30 // DTYPE.itemsize,)
    a, b, memory = (torch.ones(*shape, device=DEVICE, dtype=DTYPE) for shape in shapes)
    product, read = min(timed(lambda: a @ b, 20)), min(timed(memory.sum, 10))
    return {"flops": 2 * n**3 / product, "bandwidth": 2**30 / read}


def dpo_steps(work, batches, micro, lora=None):
    """Seconds of one DPO step per batch of pairs, fed `micro` pairs at a time, and the first step's `logps`."""
    run, logps, times = work.trainer(lora, max_prompt_length=2**20 - 1), [], []
    for batch in [batches[0], *batches]:
        began = clock()
        logps.append(work.update(run, batch, micro))
        times.append(clock() - began)
    return times[1:], logps[0]


def dpo(work, lora=None):
    pairs = work.pairs()
    flops, tokens, padding = work.step_flops(pairs)
    times, logps = dpo_steps(work, [pairs] * 3, None, lora)
    note = f"{tokens} tokens computed, {padding} slots of padding"
    return {"seconds": times, "flops": flops, "logps": logps, "note": note}


def dpo_lora(work):
    result = dpo(work, work.gemma.LoraConfig(16, 32.0, work.gemma.PROJECTIONS))
    return {key: value for key, value in result.items() if key != "flops"}  # counted for training in full


def rollout(work):
    model, prompts = work.model(), work.prompts()
    prefill = timed(lambda: work.gemma.generate(model, prompts, 1))
    times = timed(lambda: work.gemma.generate(model, prompts, work.response))
    decode = statistics.median(times) - statistics.median(prefill)
    flops = sum(work.pass_flops(torch.arange(len(prompt)), 1) for prompt in prompts)
    read = work.decode_bytes(list(map(len, prompts)), work.response - 1)
    rates = {"prefill_rate": flops / min(prefill), "bytes_rate": read / decode}
    tokens = len(prompts) * work.response
    return {"seconds": times, "units": tokens, **rates, "note": f"{tokens} tokens; prefill {min(prefill):.3f} s of it"}


def second_turn(work, anew=False):
    """First turn: a prompt of half the usual length and a reply of 16 tokens; the user's answer has 12."""
    model, rng, vocab = work.model(), random.Random(0), work.config.vocab_size
    prompts = [[rng.randrange(WORDS, vocab) for _ in range(work.prompt // 2)] for _ in range(work.rows)]
    cache = work.gemma.KVCache()
    replies = work.gemma.generate(model, prompts, 16, kv_cache=cache)
    said = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    now = [row + [rng.randrange(WORDS, vocab) for _ in range(12)] for row in said]

    def first_token():
        if not anew:
            cache.tokens = [said[prompt][:-1] for prompt in cache.order]  # as it was after the first turn
        work.gemma.generate(model, now, 1, kv_cache=None if anew else cache)

    return {"seconds": timed(first_token, 5), "note": f"{work.rows} rows of {work.prompt // 2} + 16 + 12 tokens"}


def act_step(work):
    run, pairs, spent = work.trainer(), work.pairs(), []

    def step():
        began = clock()
        batch, *_ = work.act.on_policy(run, pairs, len(spent), range(len(pairs)))
        rolled = clock()
        work.update(run, batch)
        spent.append((rolled - began, clock() - rolled, work.step_flops(batch)[0]))

    times = timed(step)
    rolled, trained, flops = (statistics.median(column) for column in zip(*spent[1:], strict=True))
    return {
        "seconds": times,
        "train_rate": flops / trained,
        "note": f"rollout {rolled:.2f} s, training {trained:.2f} s",
    }


def evaluation(work):
    run, pairs, samples = work.trainer(), work.ragged(2 * work.rows), []
    setting = work.template, pairs, work.helpers, run.config
    times = timed(lambda: samples.extend(work.act.evaluate_pairs(run.policy, *setting)[1]), 2)
    responses = sum(role == "model" for sample in samples for role, _ in sample["trajectory"]) // 3
    note = f"{len(pairs)} turns, {responses} responses of {work.response} tokens"
    return {"seconds": times, "units": len(pairs), "note": note}


def dialogues(work, micro=None):
    """Seconds per pair, the batches being dialogues; micro 1: a row for each pair, gradients accumulated."""
    groups = work.dialogues()
    count = sum(map(len, groups))
    batches = [
        group[i : i + (micro or len(group))] for group in groups for i in range(0, len(group), micro or len(group))
    ]
    flops, tokens, padding = (sum(column) for column in zip(*map(work.step_flops, batches), strict=True))
    times, logps = dpo_steps(work, groups, micro)
    note = f"{count} pairs of {len(groups)} dialogues, {tokens} tokens computed, {padding} slots of padding"
    return {"seconds": [sum(times) / count], "flops": flops / count, "logps": logps, "note": note}


# ----------------------------------------------------------------------------------------------------------------------
# The peers' measurements: the same weights, the same tokens


def peer_model(folder, dtype):
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).to(DEVICE)


def trl_steps(folder, vocab_size, batches, checkpointing, micro=None):
    """Seconds of TRL's steps, one per batch of [prompt, chosen, rejected], the first one's `logps`, and versions.

    micro: pairs of a forward pass, where not all of the batch.
    """
    import datasets
    import tokenizers
    import transformers
    import trl

    datasets.disable_progress_bars()
    vocab = {f"<{i}>": i for i in range(vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<3>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<3>", "pad_token": "<0>", "eos_token": f"<{NEWLINE}>"}  # a newline ends every reply
    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(-clock())

        def on_step_end(self, *_, **__):
            times[-1] += clock()

    pairs = [tuple(map(as_text, pair)) for batch in batches for pair in batch]
    rows = [{"prompt": f" {prompt} ", "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
    arguments = trl.DPOConfig(
        str(folder / "trl"), per_device_train_batch_size=micro or len(batches[0]), max_steps=len(batches), bf16=CUDA,
        gradient_accumulation_steps=len(batches[0]) // (micro or len(batches[0])),
        use_cpu=not CUDA, gradient_checkpointing=checkpointing, optim="rmsprop", max_length=None, logging_steps=1,
        train_sampling_strategy="sequential", save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    trainer = trl.DPOTrainer(
        peer_model(folder, torch.float32), peer_model(folder, DTYPE), arguments, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return times, trainer.state.log_history[0]["logps/chosen"], f"trl {trl.__version__}, torch {torch.__version__}"


def trl_dpo(folder, tokens, checkpointing):
    times, logps, note = trl_steps(folder, tokens["vocab_size"], [tokens["dpo"]] * 4, checkpointing)
    return {"seconds": times[1:], "logps": logps, "note": note}


def trl_dialogues(folder, tokens, checkpointing):
    """Seconds per pair; batches as large as a dialogue is on average, in the order of the dialogues."""
    pairs = [pair for group in tokens["dialogues"] for pair in group]
    size = max(1, round(len(pairs) / len(tokens["dialogues"])))
    micro = 1 if tokens["vocab_size"] > 100_000 else size  # logits of more would not fit the memory of a laptop
    batches = [(pairs * size)[:size]] + [pairs[i : i + size] for i in range(0, len(pairs), size)]
    times, _, _ = trl_steps(folder, tokens["vocab_size"], batches, checkpointing, micro)
    return {"seconds": [sum(times[1:]) / len(pairs)], "note": f"batches of {size} pairs, {micro} at a time"}


def hf_generate(folder, **options):
    """A function (token lists, new) that samples so many new tokens with transformers."""
    model = peer_model(folder, DTYPE)
    model.generation_config.eos_token_id = None

    def run(prompts, new):
        width = max(map(len, prompts))
        rows = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=DEVICE)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=DEVICE)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": new}
        made = model.generate(rows, attention_mask=mask, **sampling, **options)
        assert made.shape == (len(prompts), width + new)

    return run


def hf_rollout(folder, tokens, checkpointing):
    import transformers

    run, prompts, new = hf_generate(folder), tokens["rollout"], tokens["new"]
    note = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {"seconds": timed(lambda: run(prompts, new)), "units": len(prompts) * new, "note": note}


def hf_uncached(folder, tokens, checkpointing):
    """The shortest and the longest prompt stand for all of them: the time is scaled to their number."""
    run, prompts, new = hf_generate(folder, use_cache=False), tokens["rollout"], tokens["new"]
    run(prompts[:1], 2)
    began = clock()
    for prompt in (prompts[0], prompts[-1]):
        run([prompt], new)
    seconds = (clock() - began) * len(prompts) / 2
    return {"seconds": [seconds], "units": len(prompts) * new, "note": f"2 of {len(prompts)} prompts, scaled"}


# ----------------------------------------------------------------------------------------------------------------------
# The table

OURS = {
    "dpo": dpo, "rollout": rollout, "second turn": second_turn, "ACT step": act_step, "evaluation": evaluation,
    "dialogues": dialogues, "DPO step with LoRA": dpo_lora, "prefilled anew": lambda work: second_turn(work, anew=True),
    "a row per pair": lambda work: dialogues(work, micro=1), "setup": setup, "limits": limits,
}  # fmt: skip
PEERS = {
    "TRL DPOTrainer": trl_dpo, "TRL": trl_dialogues,
    "transformers": hf_rollout, "transformers, one by one, no cache": hf_uncached,
}  # fmt: skip
ITEMS = {  # letter: (title, ours, what it is set against)
    "a": ("DPO step", "dpo", ["TRL DPOTrainer"]),
    "b": ("rollout", "rollout", ["transformers", "transformers, one by one, no cache"]),
    "c": ("first token of a second turn", "second turn", ["prefilled anew"]),
    "d": ("ACT step", "ACT step", []),
    "e": ("evaluation", "evaluation", []),
    "f": ("DPO over dialogues, per pair", "dialogues", ["a row per pair", "TRL"]),
    "g": ("DPO step with LoRA, rank 16", "DPO step with LoRA", ["dpo"]),
}


def measure(name, args, folder):
    """Run one measurement in a process of its own and return its line of JSON."""
    python = args.peer_python if name in PEERS else sys.executable
    command = [python, __file__, "--size", args.size, "--child", name, "--folder", folder]
    command += ["--no-checkpointing"] * args.no_checkpointing
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else dict(os.environ)
    done = subprocess.run(command, env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench.py: {name} failed\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().split("\n")[-1])
    print(f"{name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def child(args):
    if args.child in PEERS:
        tokens = json.loads(Path(args.folder, "tokens.json").read_text())
        result = PEERS[args.child](Path(args.folder), tokens, not args.no_checkpointing)
    else:
        result = OURS[args.child](Work(args.folder, args.size, not args.no_checkpointing))
    print("\n" + json.dumps({**result, "peak": peak_bytes()}), flush=True)
    os._exit(0)  # the measurement is done: nothing that process groups do at exit should count


def share(result, seconds, limit):
    """How near to the machine's limits, in words."""
    flops = {"": result.get("flops", 0) / seconds}
    flops |= {"prefill ": result.get("prefill_rate", 0), "training ": result.get("train_rate", 0)}
    words = [f"{what}{rate / 1e9:.0f} GFLOP/s, {rate / limit['flops']:.0%}" for what, rate in flops.items() if rate]
    if "bytes_rate" in result:
        words.append(f"decoding {result['bytes_rate'] / 1e9:.1f} GB/s, {result['bytes_rate'] / limit['bandwidth']:.0%}")
    return "; ".join(words)


def row(title, results, limit, ours=None):
    """A line of the table; `ours` are the results that this one is a rival of."""
    times = [time for result in results for time in result["seconds"]]
    memory, middle = max(result["peak"] for result in results) / 1e9, statistics.median(times)
    units = f", {results[0]['units'] / middle:.3g}/s" if results[0].get("units") else ""
    cells = [title, f"{middle:.3g} s ({min(times):.3g}){units}", f"{memory:.2f} GB"]
    ratios = ["", ""]
    if ours:
        base = statistics.median(time for result in ours for time in result["seconds"])
        ratios = [f"{middle / base:.2f}", f"{max(result['peak'] for result in ours) / 1e9 / memory:.2f}"]
    note = [results[0].get("note", ""), f"logps {results[0]['logps']:.4f}" if results[0].get("logps") else ""]
    return "| " + " | ".join([*cells, *ratios, share(results[0], middle, limit), "; ".join(filter(None, note))]) + " |"


def main():
    epilog = "The items are described at the head of the file."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=epilog)
    parser.add_argument("--size", choices=SIZES, default="48m")
    parser.add_argument("--only", default="a,b,c,d,e,f,g", help="items, e.g. a,b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if CUDA else "cpu")
    parser.add_argument(
        "--no-checkpointing", action="store_true", help="keep all activations in training, on both sides"
    )
    parser.add_argument("--dialogues", help="Vertex JSONL for item f (default: three made-up dialogues of 7 exchanges)")
    parser.add_argument("--peer", action="store_true", help="measure TRL and transformers too")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that can import them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.dialogues:
            Path(folder, "dialogues.jsonl").write_bytes(Path(args.dialogues).read_bytes())
        machine, limit = measure("setup", args, folder), measure("limits", args, folder)
        lines = []
        for title, ours, rivals in (ITEMS[letter] for letter in args.only.split(",")):
            names = [ours] + [rival for rival in rivals if args.peer or rival not in PEERS]
            results = {name: [] for name in names}
            for _ in range(args.rounds):
                for name in names:
                    results[name].append(measure(name, args, folder))
            lines.append(row(f"**{title}**", results[ours], limit))
            lines += [row(f"against {name}", results[name], limit, results[ours]) for name in names[1:]]
    words = [word for word in sys.argv[1:] if word not in ("--peer-python", args.peer_python)]
    print(f"`python tests/proofs/bench.py {' '.join(words)}`:")
    print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']};", end=" ")
    print(f"matrix product {limit['flops'] / 1e9:.0f} GFLOP/s, memory read {limit['bandwidth'] / 1e9:.1f} GB/s\n")
    print(
        "| figure | median (least) | peak memory | times as fast | our share of its memory | near the limit | notes |"
    )
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
