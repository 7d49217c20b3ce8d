"""How fast, how much memory, how near to the machine's limit; and beside TRL and transformers.

    python tests/proofs/bench.py --size tiny --peer --peer-python PEER/bin/python
                                        a check of this script: a few minutes
    python tests/proofs/bench.py --size 48m --peer --peer-python PEER/bin/python
                                        in turns: ours, peer, ours, peer, ...
    python tests/proofs/bench.py --size 48m --only a,f --dialogues FILE.jsonl
                                        f over dialogues of Vertex JSONL

  a  a DPO step: reference forward, policy forward and backward, clipping, optimiser; against TRL's
     DPOTrainer
  b  a rollout of ragged prompts, sampled at temperature 1, none of which stops early; against
     transformers' generate, as a left-padded batch and, as published research code samples, one
     prompt at a time without a cache
  c  the first token of a second simulated turn, continuing the kept cache; against prefilling the
     conversation anew
  d  a whole ACT step: rollout with simulated users, pairs, reference, update
  e  evaluation: turns played with greedy decoding
  f  DPO over dialogues, all turns of a dialogue in one batch; against one row per pair, and against
     TRL
  g  a DPO step with LoRA; against item a

What a GPU is asked for more than these is the plan of gpu.py, which measures by this script. The
machine's own limits are measured first: a matrix product; a sum over memory or a copy of it,
whichever is faster.

The weights are random and made in a temporary directory; words become tokens by a hash. A
measurement warms up, measures a few times, and gives a line of JSON (--out FILE keeps them) with
its times and its peak memory: on a CPU the process's largest resident size, imports included, and
so each measurement is a process of its own; on CUDA the most that was allocated, and one process a
side makes all measurements, since it compiles and imports once. A row of the table is printed as it
comes; rows of a later round show medians over all rounds so far and, in brackets, the least; ratios
are of medians. What takes a peer minutes on a CPU is measured in the first round only. What fails
is a row that says so; --minutes ends the whole and names what is left out.

float32 on CPU. On CUDA training computes in bfloat16 over float32 weights, the peer's too, and
generation runs in bfloat16. The peers load the same weights and get the same tokens: `logps`, the
mean log-probability of a chosen reply before the first update, must be the same on both sides. The
peer's attention is the first of --attention that works.

Operations are counted from the shapes. A forward pass: 2 per weight of the linear layers and token
computed (in the last MLP, only tokens that something is predicted from), 4 * heads * head_dim per
token and key that it sees in each layer, 2 * hidden_size * vocab_size per scored token. A training
step is 1 forward pass of the reference and 3 of the policy (4 with checkpointing; the output head's
is always recomputed). A decoding step reads every weight once, and the keys and values that each
row sees. Prefill is measured by generating one token; decoding by what all tokens take longer than
the first few.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# hidden, intermediate, layers, heads, key/value heads, head_dim, vocabulary, window
SIZES = {
    "tiny": (64, 128, 2, 4, 2, 16, 512, 16),
    "48m": (512, 2048, 8, 8, 4, 64, 32000, 128),
    "270m": (640, 2048, 18, 4, 1, 256, 262144, 512),  # Gemma 3's smallest
    "2b": (2304, 9216, 26, 8, 4, 256, 256000, 4096),  # Gemma 2's
}
# pairs of a batch, tokens of their prompts and replies, rows of a rollout, the least and greatest
# share of those prompts' tokens that its prompts have; dialogues at most (a peer takes minutes for
# one), and exchanges of a made-up one: 6 are 8 turns
WORKLOADS = {
    "tiny": (2, 64, 16, 4, (0.25, 0.75), 2, 6),
    "48m": (4, 512, 64, 8, (0.25, 0.75), 3, 7),
    "270m": (4, 512, 64, 8, (0.25, 0.75), 2, 7),
    "2b": (4, 1000, 100, 32, (1.0, 1.0), 1, 6),
}
SHORTEST = 48  # tokens of a prompt; fewer do not hold the format's own
FEW = 8  # tokens of a reply after which decoding is timed: by then its step is recorded
NEWLINE, WORDS = 4, 8  # ids below WORDS are for control tokens
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
WARM = 2 if CUDA else 1  # steps before those that count: the second may still compile


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


def processor():
    """What the CPU is, and the instructions that products here may use."""
    name, flags = platform.processor(), ""
    if os.path.exists("/proc/cpuinfo"):
        said = dict(re.findall(r"(model name|flags)\s*: (.*)", Path("/proc/cpuinfo").read_text()))
        name, flags = said.get("model name", name), said.get("flags", "")
    kinds = ("AVX-512", "avx512f"), ("its bfloat16", "avx512_bf16"), ("AMX", "amx_tile")
    has = " and ".join(f"{'' if flag in flags else 'no '}{kind}" for kind, flag in kinds)
    return f"{name} with {has} (torch: {torch.backends.cpu.get_cpu_capability()})"


def peak_bytes():
    if CUDA:
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --------------------------------------------------------------------------------------------------
# The workload


class HashTokenizer:
    """Words to ids: <17> is 17, any other word is hashed. Decoded ids are encoded as before."""

    path, bos_id, eos_id, pad_id, start_of_turn_id, end_of_turn_id = "(hash)", 2, 1, 0, None, None

    def __init__(self, vocab_size):
        self.vocab_size, self.sp, self.ids = vocab_size, self, {"\n": NEWLINE}

    def __len__(self):
        return self.vocab_size

    def id_to_piece(self, i):
        return "\n" if i == NEWLINE else f"<{i}>"

    def encode(self, text, bos=False):
        words = re.findall(r"<\d+>|\n|\w+|[^\w\s]", text)
        return [self.bos_id] * bos + [self._id(word) for word in words]

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
        names = """hidden_size intermediate_size num_hidden_layers num_attention_heads
            num_key_value_heads head_dim vocab_size sliding_window"""
        shapes = dict(zip(names.split(), SIZES[size], strict=True))
        kind = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        if size == "270m":
            kind = {"model_type": "gemma3_text"}
        self.config = gemma.GemmaConfig(**shapes, **kind, query_pre_attn_scalar=shapes["head_dim"])
        self.pair_count, self.prompt, self.response, self.rows, self.spread, *rest = WORKLOADS[size]
        self.dialogue_count, self.exchanges = rest
        self.checkpointing = checkpointing
        self.training = act.TrainingConfig(
            bf16=CUDA, gradient_checkpointing=checkpointing, max_new_tokens=self.response,
            max_length=2**20, max_prompt_length=self.prompt, per_device_eval_batch_size=self.rows,
            loss_on="all",  # as TRL does: the simulated user's tokens too
        )  # fmt: skip
        self.template = act.Template(HashTokenizer(self.config.vocab_size), "plain")
        self.helpers = act.Helpers(act.Config(), {})  # rules
        self.helpers.roles["action_model_config"] = self.classify

    def classify(self, texts):
        """Actions as random as the replies."""
        actions = self.data.ANSWER, self.data.CLARIFY
        return [actions[zlib.crc32(text.encode()) % 2] for text in texts]

    def words(self, rng, count):
        return as_text(rng.randrange(WORDS, self.config.vocab_size) for _ in range(count))

    def pair(self, seed, prompt, response=None):
        """A pair whose prompt is cut to `prompt` tokens, and whose two sides are single replies."""
        rng = random.Random(seed)
        count = (response or self.response) - 1  # a newline ends each
        chosen, rejected = ([("model", self.words(rng, count))] for _ in range(2))
        action = (self.data.CLARIFY, self.data.ANSWER)[seed % 2]
        history = [("user", self.words(rng, 12))]
        self.words(rng, prompt)  # as many draws as before, so that the pairs are the same
        room = prompt - len(self.template.prompt("", history, prompt))
        pair = self.data.Pair(self.words(rng, room), history, action, chosen, rejected, chosen, "")
        return self.prompted(pair)

    def prompted(self, pair):
        return replace(pair, prompt=self.template.prompt(pair.context, pair.history, 2**20))

    def pairs(self):
        """Each with a prompt of its own, which its two sides share."""
        return [self.pair(seed, self.prompt) for seed in range(self.pair_count)]

    def unshared_pairs(self):
        """As long and a little longer, nearly all of it reply: nothing is computed once for two."""
        response = self.prompt + self.response
        return [self.pair(seed, SHORTEST, response) for seed in range(self.pair_count)]

    def ragged(self, count):
        """Pairs whose prompts have from the least to the greatest share of `prompt` tokens."""
        least, greatest = (int(self.prompt * share) for share in self.spread)
        step = (greatest - least) / max(1, count - 1)
        return [self.pair(seed, least + int(seed * step)) for seed in range(count)]

    def prompts(self):
        return [pair.prompt for pair in self.ragged(self.rows)]

    def synthetic_dialogues(self):
        rng, rows = random.Random(0), []
        for _ in range(self.dialogue_count):
            messages = [{"role": "system", "content": self.words(rng, 600 * self.prompt // 512)}]
            for turn in range(self.exchanges):
                asks = turn % 3 == 0
                messages += self.data.exchange(self.words(rng, 10), self.words(rng, 10), asks)
                if asks:
                    messages += self.data.exchange(self.words(rng, 4), self.words(rng, 10))
            rows.append({"messages": messages})
        self.data.write_jsonl(self.folder / "dialogues.jsonl", rows)

    def dialogues(self):
        """The pairs of a few dialogues of the file, from its shortest to its longest."""
        rows = self.data.read_vertex_jsonl(self.folder / "dialogues.jsonl")
        pairs = self.data.ACTDataset(rows, self.data.CLARIFY, 1).prepare_datasets()
        groups = [[self.prompted(pairs[i]) for i in group] for group in self.data.dialogues(pairs)]
        groups.sort(key=lambda group: len(group[-1].prompt))
        count = min(self.dialogue_count, len(groups))
        return [groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)]

    def sequences(self, pairs):
        """(tokens, mask) of both sides of each pair."""
        sides = [(pair, side) for pair in pairs for side in (pair.chosen, pair.rejected)]
        setting = True, self.template, self.training
        return [self.act.sequence(pair, side, *setting) for pair, side in sides]

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
        """Of one forward pass through the layers for tokens at these positions; each sees all
        before it in its branch.

        outputs: of how many tokens the last hidden state is asked for; the last MLP is computed for
        no others.
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
        """Read by `steps` decoding steps of rows with so many tokens: weights, and the keys and
        values seen.
        """
        c, size = self.config, torch.finfo(DTYPE).bits // 8
        with torch.device("meta"):
            total = steps * sum(parameter.numel() for parameter in self.gemma.Gemma(c).parameters())
        for kind in c.layer_types:
            limit = c.sliding_window if kind == self.gemma.LOCAL else 2**40
            ends = (length + step for length in lengths for step in range(1, steps + 1))
            seen = sum(min(end, limit) for end in ends)
            total += 2 * c.num_key_value_heads * c.head_dim * seen
        return total * size

    # -- our models

    def trainer(self, lora=None, **changes):
        """What the trainer's steps read of a run.

        changes: of its training_config; lora: of adapters, else in full.
        """
        act, training, source = self.act, replace(self.training, **changes), self.folder / "model"
        act.start_processes()
        mesh = act.make_mesh(DEVICE, 1)
        model = act.PolicyModelConfig(str(source), str(DTYPE).removeprefix("torch."))
        if lora:
            named = {"lora_target_modules": lora.target_modules}
            model = replace(model, lora_r=lora.r, lora_alpha=lora.lora_alpha, **named)
        config = act.Config(policy_model_config=model, training_config=training)
        policy = act.build_model(config, mesh)
        reference = None if lora else act.build_model(config, mesh, trained=False)
        return SimpleNamespace(
            config=config, device=DEVICE, template=self.template, helpers=self.helpers,
            policy=policy, reference=reference,
            optimizer=act.make_optimizer(policy, training),
        )  # fmt: skip

    def update(self, run, batch, micro=None):
        """One DPO step, `micro` pairs at a time.

        Returns the mean log-probability of the chosen sides before it, and its seconds but for
        clipping and the optimiser.
        """
        training, micro, total = run.config.training_config, micro or len(batch), 0.0
        began = clock()
        for i in range(0, len(batch), micro):
            sums = self.act.preference_step(run, batch[i : i + micro], 1 / len(batch))
            total += sums["logps/chosen"]
        spent = clock() - began
        rates = training.max_grad_norm, training.learning_rate
        self.act.clip_and_step(run.policy, run.optimizer, *rates)
        return total / len(batch), spent

    def model(self):
        return self.gemma.Gemma.from_pretrained(self.folder / "model", dtype=DTYPE, device=DEVICE)


# --------------------------------------------------------------------------------------------------
# Our measurements; each returns what its line of JSON says


def setup(work):
    """Random weights, and the tokens for the peers."""
    torch.manual_seed(0)
    with DEVICE:
        work.gemma.Gemma(work.config).to(DTYPE).save_pretrained(work.folder / "model")
    if not (work.folder / "dialogues.jsonl").exists():
        work.synthetic_dialogues()
    tokens = {"dpo": work.token_pairs(work.pairs()), "rollout": work.prompts()}
    tokens["unshared"] = work.token_pairs(work.unshared_pairs())
    tokens |= {"new": work.response, "vocab_size": work.config.vocab_size}
    tokens["dialogues"] = [work.token_pairs(group) for group in work.dialogues()]
    (work.folder / "tokens.json").write_text(json.dumps(tokens))
    device = torch.cuda.get_device_name() if CUDA else processor()
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device}


def limits(work):
    """Operations a second of a square matrix product; bytes a second of a sum over 1 GiB or a copy
    of it, which reads and writes, whichever is faster.
    """
    n = 8192 if CUDA else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    memory, target = torch.ones(2, 2**30 // DTYPE.itemsize, device=DEVICE, dtype=DTYPE)
    product, read = min(timed(lambda: a @ b, 20)), min(timed(memory.sum, 5))
    copied = min(timed(lambda: target.copy_(memory), 5))
    return {"flops": 2 * n**3 / product, "bandwidth": max(2**30 / read, 2**31 / copied)}


def dpo_steps(work, batches, micro=None, lora=None):
    """Of one DPO step per batch of pairs, fed `micro` pairs at a time: (seconds, seconds but for
    clipping and optimiser, the first step's `logps`).
    """
    run, times, parts, logps = work.trainer(lora), [], [], []
    for batch in [*batches[:1] * WARM, *batches]:
        began = clock()
        found, part = work.update(run, batch, micro)
        times.append(clock() - began)
        parts.append(part)
        logps.append(found)
    return times[WARM:], parts[WARM:], logps[0]


def dpo(work, pairs=None, lora=None):
    pairs = pairs or work.pairs()
    flops, tokens, padding = work.step_flops(pairs)
    times, parts, logps = dpo_steps(work, [pairs] * 3, None, lora)
    part, whole = statistics.median(parts), statistics.median(times)
    result = {"seconds": times, "logps": logps}
    result["note"] = f"{tokens} tokens computed, {padding} slots of padding"
    result["note"] += f"; clipping and optimiser {whole - part:.3f} s of it"
    if lora is None:  # what is counted is training in full
        result |= {"flops": flops, "train_rate": flops / part}
    return result


def unshared(work):
    return dpo(work, work.unshared_pairs())


def adapters(work):
    return work.gemma.LoraConfig(16, 32.0, work.gemma.PROJECTIONS)


def dpo_lora(work):
    return dpo(work, lora=adapters(work))


def dpo_unfused(work):
    """Norms, rotation and the gated product not as a kernel each: the functions that `fused` has
    wrapped, as where flex attention does not compile.
    """
    kernels = {name: getattr(work.gemma, name) for name in ("normalized", "rotate", "gated")}
    vars(work.gemma).update({name: kernel.__wrapped__ for name, kernel in kernels.items()})
    try:
        return dpo(work)
    finally:
        vars(work.gemma).update(kernels)


def rollout(work):
    model, prompts, new = work.model(), work.prompts(), work.response
    few = min(FEW, new // 2)
    lengths = [len(prompt) + few - 1 for prompt in prompts]
    prefill, begun, times = (
        timed(lambda count=count: work.gemma.generate(model, prompts, count))
        for count in (1, few, new)
    )
    step = (statistics.median(times) - statistics.median(begun)) / (new - few)
    flops = sum(work.pass_flops(torch.arange(len(prompt)), 1) for prompt in prompts)
    read = work.decode_bytes(lengths, new - few) / (new - few)
    rates = {"prefill_rate": flops / min(prefill), "bytes_rate": read / step}
    note = f"{len(prompts) * new} tokens; prefill {min(prefill):.3f} s of it, then"
    note += f" {1000 * step:.1f} ms a token of each row"
    return {"seconds": times, "units": len(prompts) * new, **rates, "note": note}


def second_turn(work, anew=False):
    """First turn: a prompt of half the usual length, a reply of 16 tokens; the user says 12."""
    model, rng, vocab = work.model(), random.Random(0), work.config.vocab_size
    half = work.prompt // 2
    prompts = [[rng.randrange(WORDS, vocab) for _ in range(half)] for _ in range(work.rows)]
    cache = work.gemma.KVCache()
    replies = work.gemma.generate(model, prompts, 16, kv_cache=cache)
    said = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    now = [row + [rng.randrange(WORDS, vocab) for _ in range(12)] for row in said]

    def first_token():
        if not anew:  # as it was after the first turn
            cache.tokens = [said[prompt][:-1] for prompt in cache.order]
        work.gemma.generate(model, now, 1, kv_cache=None if anew else cache)

    note = f"{work.rows} rows of {half} + 16 + 12 tokens"
    return {"seconds": timed(first_token, 5), "note": note}


def act_step(work, samples=1):
    """With so many samples a turn, which the trainer's num_generations says."""
    run, pairs, spent = work.trainer(num_generations=samples), work.pairs(), []

    def step():
        began = clock()
        batch, *_ = work.act.on_policy(run, pairs, len(spent), range(len(pairs)))
        rolled = clock()
        work.update(run, batch)
        spent.append((rolled - began, clock() - rolled, work.step_flops(batch)[0]))

    times = timed(step)
    rolled, trained, flops = map(statistics.median, zip(*spent[1:], strict=True))
    note = f"{len(pairs)} turns, rollout {rolled:.2f} s, training {trained:.2f} s"
    return {"seconds": times, "train_rate": flops / trained, "note": note}


def evaluation(work):
    run, pairs, samples = work.trainer(), work.ragged(2 * work.rows), []
    run.validation = pairs
    times = timed(lambda: samples.extend(work.act.evaluate_pairs(run)[1]), 2)
    responses = sum(role == "model" for sample in samples for role, _ in sample["trajectory"]) // 3
    note = f"{len(pairs)} turns, {responses} responses of {work.response} tokens"
    return {"seconds": times, "units": len(pairs), "note": note}


def dialogues(work, micro=None, lora=None):
    """Seconds per pair, the batches being dialogues.

    micro 1: a row for each pair, gradients accumulated.
    """
    groups = work.dialogues()
    count = sum(map(len, groups))
    batches = [
        group[i : i + (micro or len(group))]
        for group in groups
        for i in range(0, len(group), micro or len(group))
    ]
    counted = zip(*map(work.step_flops, batches), strict=True)
    flops, tokens, padding = (sum(column) for column in counted)
    times, _, logps = dpo_steps(work, groups * repeats(groups), micro, lora)
    note = f"{count} pairs of {len(groups)} dialogues, {tokens} tokens computed,"
    note += f" {padding} slots of padding"
    seconds = [sum(times) / count / repeats(groups)]
    rates = {} if lora else {"flops": flops / count}
    return {"seconds": seconds, **rates, "logps": logps, "note": note}


def repeats(groups):
    """How often the dialogues are gone through: several make up for one another."""
    return 3 if len(groups) == 1 else 1


# --------------------------------------------------------------------------------------------------
# The peers' measurements: the same weights, the same tokens


def peer_model(peer, dtype, attention):
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options = {} if attention == "auto" else {"attn_implementation": attention}
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(peer.folder / "model", dtype=dtype, **options).to(DEVICE)


FAILED = {}  # kinds of attention that did not work in this process, and why


def with_attention(peer, work):
    """What `work`, a function of an attention's name, gives with the first that works."""
    torch._dynamo.config.recompile_limit = 64  # beyond 8 flex attention would hold all scores
    torch._dynamo.config.specialize_float = True
    for attention in peer.attention.split(","):
        if attention in FAILED:
            continue
        try:
            result = work(attention)
        except Exception as error:  # whatever a package that is not there or a compiler raises
            FAILED[attention] = in_a_line(error)
            traceback.print_exc()
        else:
            note = f"{result['note']}; attention {result.pop('attention')}"
            note += f", not {' nor '.join(FAILED)}" if FAILED else ""
            return {**result, "note": note, "failed": FAILED}
        free_memory()
    raise RuntimeError(str(FAILED))


def trl_tokenizer(vocab_size):
    import tokenizers
    import transformers

    vocab = {f"<{i}>": i for i in range(vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<3>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<3>", "pad_token": "<0>"}
    special["eos_token"] = f"<{NEWLINE}>"  # a newline ends every reply
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def trl_steps(peer, batches, attention, micro=None, lora=False, precompute=False):
    """Of TRL's steps, one per batch of [prompt, chosen, rejected]: (seconds, {the first one's
    `logps`, attention, note}).

    micro: pairs of a forward pass, where not all of the batch. lora: adapters of rank 16, else in
    full. precompute: the reference's log-probabilities, before the first step.
    """
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    datasets.disable_caching()  # of what is precomputed
    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(-clock())

        def on_step_end(self, *_, **__):
            times[-1] += clock()

    rows = []
    for prompt, chosen, rejected in (map(as_text, pair) for batch in batches for pair in batch):
        rows.append({"prompt": f" {prompt} ", "chosen": chosen, "rejected": rejected})
    size = len(batches[0])
    micro = micro or size
    arguments = trl.DPOConfig(
        str(peer.folder / "trl"), per_device_train_batch_size=micro, max_steps=len(batches),
        bf16=CUDA, gradient_accumulation_steps=size // micro, use_cpu=not CUDA, optim="rmsprop",
        gradient_checkpointing=not peer.no_checkpointing, max_length=None, logging_steps=1,
        train_sampling_strategy="sequential", save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, precompute_ref_log_probs=precompute,
    )  # fmt: skip
    options = {}
    if lora:
        import peft

        named = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
        options["peft_config"] = peft.LoraConfig(r=16, lora_alpha=32, target_modules=named)
    policy = peer_model(peer, DTYPE if lora else torch.float32, attention)  # as ours
    reference = None if lora or precompute else peer_model(peer, DTYPE, attention)
    began = clock()
    trainer = trl.DPOTrainer(
        policy, reference, arguments, processing_class=trl_tokenizer(peer.tokens["vocab_size"]),
        train_dataset=datasets.Dataset.from_list(rows), callbacks=[Clock()], **options,
    )  # fmt: skip
    made = clock() - began
    trainer.train()
    note = f"trl {trl.__version__}, transformers {transformers.__version__}"
    if precompute:
        note += f"; before that, reference, tokens and hash of {len(rows)} pairs {made:.1f} s"
    kind = policy.config._attn_implementation
    logps = trainer.state.log_history[0]["logps/chosen"]
    return times, {"logps": logps, "attention": kind, "note": note}


def trl_dpo(peer, pairs="dpo", **options):
    def work(attention):
        batches = [peer.tokens[pairs]] * (WARM + peer.steps)
        times, said = trl_steps(peer, batches, attention, **options)
        return {"seconds": times[WARM:], **said}

    return with_attention(peer, work)


def trl_dialogues(peer, **options):
    """Seconds per pair; batches as large as a dialogue is on average, in the dialogues' order."""
    groups = peer.tokens["dialogues"]
    pairs = [pair for group in groups for pair in group] * repeats(groups)
    size = max(1, round(len(pairs) / len(groups) / repeats(groups)))
    large = peer.tokens["vocab_size"] > 100_000 and not CUDA
    micro = 1 if large else size  # logits of more would not fit the memory of a laptop
    batches = [(pairs * size)[:size]] * WARM
    batches += [pairs[i : i + size] for i in range(0, len(pairs), size)]

    def work(attention):
        times, said = trl_steps(peer, batches, attention, micro, **options)
        said["note"] += f"; batches of {size} pairs, {micro} at a time"
        return {"seconds": [sum(times[WARM:]) / len(pairs)], **said}

    return with_attention(peer, work)


def hf_generate(peer, **options):
    """A function (token lists, new) that samples so many new tokens with transformers, and a note.
    """
    import transformers

    model = peer_model(peer, DTYPE, "auto")
    model.generation_config.eos_token_id = None

    def run(prompts, new):
        width = max(map(len, prompts))
        empty = [width - len(prompt) for prompt in prompts]
        rows = [[0] * n + prompt for n, prompt in zip(empty, prompts, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in empty]
        rows, mask = torch.tensor(rows, device=DEVICE), torch.tensor(mask, device=DEVICE)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": new}
        made = model.generate(rows, attention_mask=mask, **sampling, **options)
        assert made.shape == (len(prompts), width + new)

    kind = model.config._attn_implementation
    return run, f"transformers {transformers.__version__}, attention {kind}"


def hf_rollout(peer, **options):
    prompts, new = peer.tokens["rollout"], peer.tokens["new"]
    run, note = hf_generate(peer, **options)
    times = timed(lambda: run(prompts, new))
    return {"seconds": times, "units": len(prompts) * new, "note": note}


def hf_static(peer):
    """The cache a static one, by which generate compiles the steps, on a GPU into CUDA graphs."""
    import transformers

    settings = transformers.CompileConfig()
    settings._compile_all_devices = True  # else a CPU goes without
    return hf_rollout(peer, cache_implementation="static", compile_config=settings)


def hf_uncached(peer):
    """The shortest and the longest prompt stand for all of them: the time is scaled to that."""
    prompts, new = peer.tokens["rollout"], peer.tokens["new"]
    run, note = hf_generate(peer, use_cache=False)
    run(prompts[:1], 2)
    began = clock()
    for prompt in (prompts[0], prompts[-1]):
        run([prompt], new)
    seconds = (clock() - began) * len(prompts) / 2
    note += f"; 2 of {len(prompts)} prompts, scaled"
    return {"seconds": [seconds], "units": len(prompts) * new, "note": note}


def vllm_rollout(peer):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else its memory would be another process's
    import vllm

    prompts, new = peer.tokens["rollout"], peer.tokens["new"]
    longest = max(map(len, prompts)) + new
    engine = vllm.LLM(
        str(peer.folder / "model"), skip_tokenizer_init=True, dtype="bfloat16",
        max_model_len=longest, gpu_memory_utilization=0.5, enable_prefix_caching=False,
    )  # fmt: skip
    sampling = vllm.SamplingParams(
        temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False
    )
    rows = [{"prompt_token_ids": prompt} for prompt in prompts]
    times = timed(lambda: engine.generate(rows, sampling, use_tqdm=False))
    note = f"vllm {vllm.__version__}, which takes half of the memory whatever it needs"
    return {"seconds": times, "units": len(prompts) * new, "note": note}


# --------------------------------------------------------------------------------------------------
# The table

OURS = {
    "setup": setup,
    "limits": limits,
    "dpo": dpo,
    "rollout": rollout,
    "second turn": second_turn,
    "prefilled anew": lambda work: second_turn(work, anew=True),
    "ACT step": act_step,
    "ACT step, 4 samples": lambda work: act_step(work, 4),
    "evaluation": evaluation,
    "dialogues": dialogues,
    "a row per pair": lambda work: dialogues(work, micro=1),
    "LoRA": dpo_lora,
    "dialogues, LoRA": lambda work: dialogues(work, lora=adapters(work)),
    "nothing shared": unshared,
    "norms not fused": dpo_unfused,
}
PEERS = {
    "TRL DPOTrainer": trl_dpo,
    "TRL, dialogues": trl_dialogues,
    "TRL, nothing shared": lambda peer: trl_dpo(peer, "unshared"),
    "TRL, LoRA": lambda peer: trl_dpo(peer, lora=True),
    "TRL, dialogues, LoRA": lambda peer: trl_dialogues(peer, lora=True),
    "TRL, reference precomputed": lambda peer: trl_dpo(peer, precompute=True),
    "TRL, dialogues, reference precomputed": lambda peer: trl_dialogues(peer, precompute=True),
    "transformers": hf_rollout,
    "transformers, static cache, compiled": hf_static,
    "transformers, one by one, no cache": hf_uncached,
    "vLLM": vllm_rollout,
}
SLOW = ("TRL, dialogues", "transformers, one by one, no cache")  # on a CPU: in one round only
ITEMS = {  # letter: (title, ours, what it is set against)
    "a": ("DPO step", "dpo", ["TRL DPOTrainer"]),
    "b": ("rollout", "rollout", ["transformers", "transformers, one by one, no cache"]),
    "c": ("first token of a second turn", "second turn", ["prefilled anew"]),
    "d": ("ACT step", "ACT step", []),
    "e": ("evaluation", "evaluation", []),
    "f": ("DPO over dialogues, per pair", "dialogues", ["a row per pair", "TRL, dialogues"]),
    "g": ("DPO step with LoRA, rank 16", "LoRA", ["dpo"]),
}
COLUMNS = "figure | median (least) | peak memory | times as fast | our share of its memory"
COLUMNS = f"| {COLUMNS} | near the limit | notes |"


def in_a_line(error):
    """What went wrong, short enough for a row."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text.replace("|", "/")[:160]


def free_memory():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def result_of(name, args):
    """One measurement, in this process. What it raises is its result."""
    try:
        if name in PEERS:
            tokens = json.loads(Path(args.folder, "tokens.json").read_text())
            settings = {"steps": 3 if CUDA else 2, **vars(args), "folder": Path(args.folder)}
            result = PEERS[name](SimpleNamespace(tokens=tokens, **settings))
        else:
            work = Work(args.folder, args.size, not args.no_checkpointing)
            result = OURS[name](work)
            if work.gemma.FAILED:
                without = f"WITHOUT {', '.join(sorted(work.gemma.FAILED))}"
                result["note"] = "; ".join(filter(None, [result.get("note"), without]))
        return {**result, "peak": peak_bytes()}
    except Exception as error:
        traceback.print_exc()
        return {"error": in_a_line(error)}


def serve(args):
    """Measure what stdin names, a line each; its results go to stdout, all else to stderr."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        result = result_of(line.strip(), args)
        free_memory()
        held = torch.cuda.memory_allocated() if CUDA else 0
        print(json.dumps({**result, "held": held}), file=results, flush=True)
    os._exit(0)  # nothing that process groups do at exit should count


class Worker:
    """A process that measures one thing after another."""

    def __init__(self, python, args):
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        command = [python, __file__, "--serve", "--size", args.size, "--folder", args.folder]
        command += ["--attention", args.attention]
        command += ["--no-checkpointing"] * args.no_checkpointing
        said = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        said["THP_MEM_ALLOC_ENABLE"] = "1"  # huge pages, as gemma.py asks for, on both sides
        said |= {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(
            command, env={**os.environ, **said}, text=True, start_new_session=True, **pipes
        )

    def measure(self, name, seconds):
        """Its result, or an "error" after so many seconds. seconds None: as long as it takes."""
        ends = time.monotonic() + (10**6 if seconds is None else seconds)
        timer = threading.Timer(ends - time.monotonic(), self.stop)
        timer.daemon = True
        timer.start()
        line = ""
        with contextlib.suppress(BrokenPipeError):
            print(name, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        timer.cancel()
        if line:
            return json.loads(line)
        self.stop()
        said = self.said()
        late = time.monotonic() > ends
        reason = "the time is over" if late else f"process ended, {said[-1][:120]}"
        return {"error": reason.replace("|", "/")}

    def said(self):
        """The lines of its standard error, one at least."""
        self.log.seek(0)
        return (self.log.read().strip() or "nothing said").splitlines()

    def stop(self):
        """With all that it has started, as compilers are."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Table:
    """The measurements of a plan, [(title, ours, what it is set against)], and their rows."""

    def __init__(self, args):
        self.args, self.began, self.workers = args, time.monotonic(), {}
        self.results, self.missed = defaultdict(list), []
        self.limit = {}

    def left(self):
        """Seconds, or None where there is no limit."""
        return self.args.minutes and 60 * self.args.minutes - (time.monotonic() - self.began)

    def measure(self, name):
        """One more result of this name.

        On a CPU by a new process, for its peak of memory; a check of this script does as on a GPU.
        """
        python = self.args.peer_python if name in PEERS else sys.executable
        kind = name in PEERS
        if kind not in self.workers:
            self.workers[kind] = Worker(python, self.args)
        began = time.monotonic()
        result = self.workers[kind].measure(name, self.left())
        held = result.pop("held", 0)
        said = {"said": self.workers[kind].said()[-30:]} if "error" in result else {}
        fresh = self.args.device == "cpu" and self.args.size != "tiny"
        if fresh or "error" in result or held > 2**26:
            self.workers.pop(kind).stop()
        took, so_far = time.monotonic() - began, time.monotonic() - self.began
        named = {"name": name, **result}
        line = f"[{so_far:6.0f} s, {took:4.0f} of it] {json.dumps(named)}"
        print(line, file=sys.stderr, flush=True)
        if self.args.out:
            with open(self.args.out, "a") as file:
                file.write(json.dumps({**named, **said}) + "\n")
        self.results[name].append(result)
        return result

    def fill(self, plan):
        """All rounds: ours, rival, ours, rival; what has failed once is not tried again."""
        machine, self.limit = self.measure("setup"), self.measure("limits")
        for result in (machine, self.limit):
            if "error" in result:
                raise SystemExit(f"bench.py: {result['error']}")
        print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']};")
        print(f"matrix product {rate(self.limit['flops'])}FLOP/s,", end=" ")
        print(f"memory {rate(self.limit['bandwidth'])}B/s\n\n{COLUMNS}\n|{'---|' * 7}", flush=True)
        for number in range(self.args.rounds):
            done = set()
            for title, ours, rivals in plan:
                for name in [ours, *rivals]:
                    once = number > 0 and name in SLOW and self.args.device == "cpu"
                    if name in done or once or name in PEERS and not self.args.peer:
                        continue
                    done.add(name)
                    self.add(title, ours, name)
        if self.missed:
            print(f"\nNot run, the time being over: {'; '.join(self.missed)}")

    def stop(self):
        """All processes."""
        for worker in self.workers.values():
            worker.stop()

    def add(self, title, ours, name):
        """A row, while there is time; a later round's that fails leaves the earlier one's."""
        title = f"**{title}**" if name == ours else f"{title}, against {name}"
        if any("error" in result for result in self.results[name]):
            return
        if self.args.minutes and self.left() < 5:
            self.missed += [] if self.results[name] else [name]
            return
        result = self.measure(name)
        if "error" not in result or not self.figures(name):
            print(self.row(title, name, ours), flush=True)

    def figures(self, name):
        """(median, least, largest peak) of a measurement, None where it failed."""
        results = [result for result in self.results[name] if "error" not in result]
        if not results:
            return None
        times = [time for result in results for time in result["seconds"]]
        peak = max(result["peak"] for result in results)
        return statistics.median(times), min(times), peak

    def row(self, title, name, ours):
        """A line of the table; `ours` is what this one is a rival of, if not itself."""
        result = self.results[name][-1]
        if "error" in result:
            return f"| {title} | failed: {result['error']} | | | | | |"
        middle, least, peak = self.figures(name)
        units = f", {result['units'] / middle:.3g}/s" if result.get("units") else ""
        cells = [title, f"{middle:.3g} s ({least:.3g}){units}", f"{peak / 1e9:.2f} GB"]
        ratios = ["", ""]
        if name != ours and self.figures(ours):
            base, _, memory = self.figures(ours)
            ratios = [f"{middle / base:.2f}", f"{memory / peak:.2f}"]
        logps = f"logps {result['logps']:.4f}" if result.get("logps") else ""
        notes = "; ".join(filter(None, [result.get("note", ""), logps]))
        return f"| {' | '.join([*cells, *ratios, self.share(name), notes])} |"

    def shares(self, name):
        """{what: (rate, share of the machine's limit)}."""
        if not self.figures(name):
            return {}
        result = [result for result in self.results[name] if "error" not in result][-1]
        found = {}
        for what, per_second in (
            ("", result.get("flops", 0) / self.figures(name)[0]),
            ("prefill ", result.get("prefill_rate", 0)),
            ("forward and backward ", result.get("train_rate", 0)),
        ):
            if per_second:
                found[f"{what}FLOP/s"] = per_second, per_second / self.limit["flops"]
        if read := result.get("bytes_rate"):
            found["decoding B/s"] = read, read / self.limit["bandwidth"]
        return found

    def share(self, name):
        """How near to the machine's limits, in words."""
        words = []
        for what, (per_second, part) in self.shares(name).items():
            what, _, unit = what.rpartition(" ")
            words.append(f"{what} {rate(per_second)}{unit}, {part:.0%}".strip())
        return "; ".join(words)


def rate(number):
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def parser():
    epilog = "The items are described at the head of the file."
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=epilog)
    option = parser.add_argument
    option("--size", choices=SIZES, default="48m")
    option("--only", default=",".join(ITEMS), help="items, e.g. a,b")
    option("--device", choices=("cpu", "cuda"), default="cuda" if CUDA else "cpu")
    option("--no-checkpointing", action="store_true",
           help="keep all activations in training, on both sides")  # fmt: skip
    option("--dialogues", help="Vertex JSONL for item f (default: made-up dialogues)")
    option("--peer", action="store_true", help="measure TRL and transformers too")
    option("--peer-python", default=sys.executable, help="a Python that can import them")
    best = "flash_attention_2,flex_attention,auto" if CUDA else "auto"
    option("--attention", default=best, help="TRL's, the first that works; auto: transformers'")
    option("--rounds", type=int, default=2)
    option("--minutes", type=float, help="after which nothing more is measured")
    option("--out", help="a file for each measurement's line of JSON")
    option("--serve", action="store_true", help=argparse.SUPPRESS)
    option("--folder", help=argparse.SUPPRESS)
    return parser


def measured(plan, args):
    """A plan's Table, filled and printed, in a temporary folder."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which leaves no folder and no process
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as args.folder:
        if args.dialogues:
            Path(args.folder, "dialogues.jsonl").write_bytes(Path(args.dialogues).read_bytes())
        table = Table(args)
        try:
            table.fill(plan)
        finally:
            table.stop()
        return table


def main():
    args = parser().parse_args()
    if args.serve:
        return serve(args)
    words = [word for word in sys.argv[1:] if word not in ("--peer-python", args.peer_python)]
    print(f"`python tests/proofs/bench.py {' '.join(words)}`:")
    measured([ITEMS[letter] for letter in args.only.split(",")], args)


if __name__ == "__main__":
    main()
