"""Gemma 2 and Gemma 3 (text): tries, decoder, safetensors, tokenizer, batched generation, LoRA.

    python gemma.py MODEL_DIR                                      talks with it
    python gemma.py MODEL_DIR --prompt "Why is the sky blue?"      continues it: is it sound?

To read: from here to the end of class Gemma, what a batch is and what the decoder computes. For
reference after it: configuration, attention, large products, LoRA, safetensors, tokenizer and
prompt formats, generation, command line.

Parameters are named as in the published checkpoints, so loading is a strict copy without a table
of names. What is odd about Gemma is noted where it happens. Sources: Gemma 2 (arXiv 2408.00118),
Gemma 3 (arXiv 2503.19786) and the published configurations.

Shapes: B rows, T tokens, S key slots, N query heads, K key/value heads, D head_dim, C hidden_size,
V vocab_size, P tokens that are scored.
"""

import argparse
import contextlib
import math
import os
import random
import re
import sys
import warnings
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields
from functools import cache, wraps
from pathlib import Path
from typing import Annotated

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from data import INSTRUCTION, InputError, fold, read_json, speak_plainly, write_json

LOCAL, GLOBAL = "sliding_attention", "full_attention"  # kinds of layers
NEVER = float("-inf")
# Linux, CPU: large tensors in huge pages, which the kernel maps in half of the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


# --------------------------------------------------------------------------------------------------
# A batch: sequences that share beginnings


class Forest:
    """Token sequences laid out so that what they share is computed once.

    Sequences that have half or more in common are merged into a trie, and tries are packed side by
    side into rows, as long as the longest of them or up to half longer, where that leaves less
    empty. Inside a row a trie lies in depth-first order, so the descendants of the token in slot s
    are the slots s+1 .. ends[s]-1: the token in slot t may attend to slot s if s <= t < ends[s].

    sequences: lists of tokens; masks[i][j]: 1 where token j of sequence i is scored (never the
    first, which nothing predicts).
    tokens, positions, ends: int64 [B, T]; positions count along each branch.
    rows, slots, targets: int64 [P], where each scored token is predicted, and which one it is;
    counts[i]: how many of them are sequence i's.
    paths[i] = (row, slots of sequence i in order); used: how many tokens are computed; padding: the
    fraction of slots without a token.
    """

    def __init__(self, sequences, masks=()):
        if not sequences or not all(sequences):
            raise InputError("a token sequence is empty, expected at least one token in each")
        tries = sorted(self._tries(sequences), key=lambda trie: -len(trie[0]))
        sizes = [len(tokens) for tokens, *_ in tries]
        layouts = [self._pack(sizes, sizes[0] + sizes[0] * i // 16) for i in range(9)]
        count, width, places = min(layouts, key=lambda layout: layout[0] * layout[1])

        slots = torch.zeros(3, count, width, dtype=torch.int64)
        self.tokens, self.positions, self.ends = slots
        self.ends[:] = torch.arange(1, width + 1)  # padding sees itself only
        self.paths = [None] * len(sequences)
        for (row, start), (tokens, positions, ends, paths) in zip(places, tries, strict=True):
            span = slice(start, start + len(tokens))
            slots[:, row, span] = torch.tensor([tokens, positions, ends])
            self.ends[row, span] += start
            for i, path in paths.items():
                self.paths[i] = row, [start + slot for slot in path]
        self.used = sum(sizes)
        self.padding = 1 - self.used / (count * width)

        self.counts = [sum(mask) for mask in masks]
        scored = []
        for sequence, mask, (row, path) in zip(sequences, masks, self.paths, strict=False):
            for j, written in enumerate(mask):
                if written:  # the token before predicts it
                    scored.append((row, path[j - 1], sequence[j]))
        places = torch.tensor(scored, dtype=torch.int64).view(len(scored), 3)
        self.rows, self.slots, self.targets = places.T

    @staticmethod
    def _tries(sequences):
        """[(tokens, positions, ends, paths {number of a sequence: its slots})], one of each trie.

        In sorted order a sequence shares most with its neighbour. Sharing less than half of the
        shorter one is not worth the attention over each other's slots, nor is a trie of more than
        four times a sequence's tokens.
        """
        tries = []
        tokens = []
        before = []
        for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):
            sequence = sequences[i]
            shared = common_prefix(before, sequence)
            little = 2 * shared < min(len(before), len(sequence))
            if not tries or little or len(tokens) > 4 * len(sequence):
                tokens = []
                positions = []
                ends = []
                paths = {}
                tries.append((tokens, positions, ends, paths))
                path = []
                shared = 0
            branch = sequence[shared:]
            path = path[:shared] + list(range(len(tokens), len(tokens) + len(branch)))
            tokens += branch
            positions += range(shared, len(sequence))
            ends += branch  # as many; what a token's descendants are is known with the last of them
            for slot in path:
                ends[slot] = len(tokens)
            paths[i] = path
            before = sequence
        return tries

    @staticmethod
    def _pack(sizes, width):
        """Where tries of these sizes, longest first, go in rows of up to `width`, first fit.

        Returns (number of rows, their width, [(row, start) of each trie]).
        """
        used = []
        places = []
        for size in sizes:
            row = next((r for r, n in enumerate(used) if n + size <= width), len(used))
            if row == len(used):
                used.append(0)
            places.append((row, used[row]))
            used[row] += size
        return len(used), max(used), places

    def to(self, device):
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, name, value.to(device))
        return self


def common_prefix(a, b):
    """How many tokens two lists begin with in common."""
    return len(os.path.commonprefix([a, b]))


# --------------------------------------------------------------------------------------------------
# The decoder


def fused(function):
    """The function's lines; on a GPU where flex attention compiles, one kernel of all of them."""

    @wraps(function)
    def call(x, *args):
        alone = x.is_cuda and not torch.compiler.is_compiling() and FLEX not in FAILED
        return compiled(function, dynamic=True)(x, *args) if alone else function(x, *args)

    return call


@fused
def normalized(x, weight, eps):
    """x / rms(x) * (1 + weight), in float32 whatever the dtype of x."""
    gain = 1 + weight.float()
    return F.rms_norm(x.float(), gain.shape, gain, eps).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x):
        return normalized(x, self.weight, self.eps)


def rotary(positions, theta, head_dim):
    """cos and sin, float32 [B, T, 1, D], for positions [B, T]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[:, :, None, None].float() * theta**-exponents
    # The two halves of a head are rotated, not neighbouring pairs. The first half of sin has its
    # sign turned, so that `rotate` need not turn that of x.
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


@fused
def rotate(x, cos, sin):
    """x [B, T, heads, D] turned by the angles of its positions."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        C = config.hidden_size
        D = config.head_dim
        self.index = index
        self.kind = config.layer_types[index]
        self.head_dim = D
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping
        self.q_proj = Linear(C, config.num_attention_heads * D)
        self.k_proj = Linear(C, config.num_key_value_heads * D)
        self.v_proj = Linear(C, config.num_key_value_heads * D)
        self.o_proj = Linear(config.num_attention_heads * D, C)
        self.q_norm = self.k_norm = nn.Identity()
        if config.model_type == "gemma3_text":  # each head's queries and keys are normalised
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, angles, masks, cache=None):
        B, T, _ = x.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (project(x).view(B, T, -1, self.head_dim) for project in projections)
        q = rotate(self.q_norm(q), *angles[self.kind])  # [B, T, N, D]
        k = rotate(self.k_norm(k), *angles[self.kind])  # [B, T, K, D]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N or K, T, D]
        if cache is not None:
            k, v = cache(self.index, k, v)
        out = attend(q, k, v, masks[self.kind], self.scale, self.softcap)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


@fused
def gated(gate, up):
    return F.gelu(gate, approximate="tanh") * up


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        C = config.hidden_size
        eps = config.rms_norm_eps
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(C, eps)
        self.post_attention_layernorm = RMSNorm(C, eps)
        self.pre_feedforward_layernorm = RMSNorm(C, eps)
        self.post_feedforward_layernorm = RMSNorm(C, eps)
        self.checkpointing = False  # recompute activations in the backward pass, or keep them

    def forward(self, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=False)
        return self._forward(*args)

    def _forward(self, x, angles, masks, cache=None, at=None):
        # Norms on both sides: what a block adds to the residual stream is normalised too.
        out = self.self_attn(self.input_layernorm(x), angles, masks, cache)
        x = x + self.post_attention_layernorm(out)
        if at is not None:
            rows, slots = at
            x = Lookup.apply(rows * x.shape[1] + slots, x.flatten(0, 1), ())
        out = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(out)


def soft_capped(logits, softcap):
    """In float32; softcap None: no cap."""
    return logits.float() if softcap is None else torch.tanh(logits.float() / softcap) * softcap


class Gemma(nn.Module):
    """The decoder, its output head tied to the embedding. A new one is initialised at random."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.compute_dtype = None  # of activations and products, where it is not the parameters'
        self.lora = None  # LoraConfig, where adapters are trained instead of the weights
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def hidden(self, tokens, positions, masks, cache=None, at=None, tied=()):
        """The last hidden states [B, T, C] of tokens, int64 [B, T].

        masks: as `tree_masks` makes them; cache: (layer, k, v) -> the k, v to attend to.
        at, (rows, slots) int64 [P] both: the hidden states [P, C] of these tokens only; the last
        MLP is computed for no others. tied: see `TokenLogps`.
        """
        config = self.config
        x = Lookup.apply(tokens, self.embed_tokens.weight, tied)
        x = x.to(self.compute_dtype or x.dtype)
        x = x * rounded(config.hidden_size**0.5, x.dtype)  # the checkpoints expect it rounded
        angles = {
            GLOBAL: rotary(positions, config.rope_theta, config.head_dim),
            LOCAL: rotary(positions, config.rope_local_base_freq, config.head_dim),
        }
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, angles, masks, cache)
        return self.norm(last(x, angles, masks, cache, at))

    def logits(self, hidden):
        """Float32 logits [..., V] of hidden states [..., C]."""
        logits = product(hidden, self.embed_tokens.weight)
        return soft_capped(logits, self.config.final_logit_softcapping)

    def forward(self, tokens):
        """int64 [B, T] -> float32 logits [B, T, V]; every row starts at position 0."""
        kind = tokens.dtype, tokens.ndim
        assert kind == (torch.int64, 2), f"tokens: int64 [B, T], not {kind[0]} {list(tokens.shape)}"
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        ends = torch.full_like(tokens, tokens.shape[1])
        masks = tree_masks(positions, ends, self)
        return self.logits(self.hidden(tokens, positions, masks))

    def logps(self, forest):
        """Log-probability of each sequence of a Forest, summed over its scored tokens: float32."""
        masks = tree_masks(forest.positions, forest.ends, self)
        at = (forest.rows, forest.slots)
        tied = []
        hidden = self.hidden(forest.tokens, forest.positions, masks, at=at, tied=tied)
        softcap = self.config.final_logit_softcapping
        weight = self.embed_tokens.weight
        token_logps = TokenLogps.apply(hidden, weight, forest.targets, softcap, tied)
        return torch.stack([part.sum() for part in token_logps.split(forest.counts)])

    def set_checkpointing(self, on):
        for layer in self.layers:
            layer.checkpointing = on

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        """The model of a directory in Hugging Face's layout. Raises InputError."""
        with torch.device("meta"):
            model = cls(GemmaConfig.from_json(Path(directory) / "config.json")).to(dtype)
        load_safetensors(base_weights(model), directory, prefix="model.")  # checks sizes, no more
        model.to_empty(device=device)
        load_safetensors(base_weights(model), directory, prefix="model.")
        return model

    def save_pretrained(self, directory, max_shard_bytes=5_000_000_000):
        """Write config.json, generation_config.json and the weights in Hugging Face's layout.

        Other files in the directory stay. Every rank of a sharded model calls this; rank 0 writes.
        """
        target = made_by_rank_0(directory)
        save_safetensors(base_weights(self), target, "model", "model.", max_shard_bytes)
        if target:  # what says that the rest is complete comes last
            config = self.config.to_json(self.embed_tokens.weight.dtype)
            ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            write_json(target / "generation_config.json", {**self.config.generation, **ids})
            write_json(target / "config.json", config)


# --------------------------------------------------------------------------------------------------
# Configuration
# What a config.json must say for this decoder to compute what transformers computes.

ARCHITECTURES = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
GELU = "gelu_pytorch_tanh"
THETAS = {GLOBAL: "rope_theta", LOCAL: "rope_local_base_freq"}
CAPS = ["attn_logit_softcapping", "final_logit_softcapping"]  # which a Gemma 2 must have

Count = Annotated[int, 1, 2**31]  # a type, the lowest and the highest value
Real = Annotated[float, 1e-12, 2**31]
Id = Annotated[int, 0, 2**31]


@dataclass
class GemmaConfig:
    """The fields of Hugging Face's config.json that change what is computed, as named there."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, 1, 1000]
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count  # not always hidden_size / num_attention_heads
    query_pre_attn_scalar: Real  # queries are scaled by its root's inverse; not always head_dim
    sliding_window: Count
    attn_logit_softcapping: Real = None  # Gemma 2: 50; Gemma 3 has no caps
    final_logit_softcapping: Real = None  # Gemma 2: 30
    model_type: str = "gemma2"  # or "gemma3_text"
    rms_norm_eps: Real = 1e-6
    rope_theta: Real = None  # default: 10,000, in Gemma 3 a million
    rope_local_base_freq: Real = None  # Gemma 3: theta of the window layers, 10,000
    max_position_embeddings: Count = 8192
    pad_token_id: Id = 0
    eos_token_id: int | list = 1
    bos_token_id: Id = 2
    sliding_window_pattern: Count = None  # one layer in so many is global: 2, in Gemma 3 6
    layer_types: list = None  # LOCAL or GLOBAL, for each layer; default: by the pattern
    source = {}  # not a field: config.json as it was read
    generation = {}  # generation_config.json beside it

    def __post_init__(self):
        gemma3 = self.model_type == "gemma3_text"
        self.rope_theta = self.rope_theta or (1e6 if gemma3 else 1e4)
        self.rope_local_base_freq = self.rope_local_base_freq or 1e4 if gemma3 else self.rope_theta
        self.sliding_window_pattern = self.sliding_window_pattern or (6 if gemma3 else 2)
        if self.layer_types is None:
            numbers = range(1, 1 + self.num_hidden_layers)
            every = self.sliding_window_pattern
            self.layer_types = [LOCAL if i % every else GLOBAL for i in numbers]

    @classmethod
    def from_json(cls, path):
        """Read a config.json, as transformers 4 or 5 writes it. Raises InputError."""
        source = read_json(no_pipe(Path(path)))
        beside = no_pipe(Path(path).with_name("generation_config.json"))
        generation = read_json(beside) if beside.exists() else {}
        raw = dict(source)

        def must(key, right, expected):
            if not right:
                found = repr(raw[key]) if key in raw else "missing"
                raise InputError(f"{path}: {key} is {found}, expected {expected}")

        model_type = raw.get("model_type")
        activation = raw.get("hidden_activation", GELU)
        known = " or ".join(map(repr, ARCHITECTURES))
        must("model_type", model_type in [*ARCHITECTURES], f"{known} (text, no pictures)")
        must("hidden_activation", activation == GELU, repr(GELU))
        both_ways = "use_bidirectional_attention"
        must(both_ways, not raw.get(both_ways), "a model that reads from left to right")
        for key in ("rope_scaling", "rope_parameters"):  # transformers 5: the thetas, too
            rope = raw.get(key) or {}
            must(key, isinstance(rope, dict), "an object")
            for kind, theta in THETAS.items():
                scheme = rope.get(kind, rope if kind == GLOBAL else {})
                must(key, isinstance(scheme, dict), "an object of objects")
                rope_type = scheme.get("rope_type", scheme.get("type", "default"))
                must(key, rope_type == "default", "rope_type 'default'")
                raw[theta] = scheme.get("rope_theta", raw.get(theta))
        raw.setdefault("sliding_window_pattern", raw.get("_sliding_window_pattern"))
        if ends := id_list(raw.get("eos_token_id"), generation.get("eos_token_id")):
            must("eos_token_id", all(type(i) is int and i >= 0 for i in ends), "ids of tokens")
            raw["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        for f in fields(cls):
            value = raw.get(f.name, f.default)
            if hasattr(f.type, "__metadata__") and not (value is None and f.default is None):
                kind = f.type.__origin__
                lowest, highest = f.type.__metadata__
                right = type(value) in (int, kind) and lowest <= value <= highest
                must(f.name, right, f"a number ({kind.__name__}) from {lowest} to {highest}")
        for key in CAPS:
            must(key, key in raw or model_type != "gemma2", "a number or null")

        config = cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})
        config.source = source
        config.generation = generation
        heads = config.num_attention_heads
        layers = config.num_hidden_layers
        divides = heads % config.num_key_value_heads == 0
        must("num_key_value_heads", divides, f"a divisor of num_attention_heads {heads}")
        must("head_dim", config.head_dim % 2 == 0, "an even number")
        kinds = config.layer_types
        right = isinstance(kinds, list) and len(kinds) == layers
        right = right and all(kind in (LOCAL, GLOBAL) for kind in kinds)
        must("layer_types", right, f"a list of {layers} times '{LOCAL}' or '{GLOBAL}'")
        heads = 2 * config.head_dim * (heads + config.num_key_value_heads)
        layer = config.hidden_size * (heads + 3 * config.intermediate_size)
        size = 4 * (config.vocab_size * config.hidden_size + layers * layer) // 2**30
        if size > 2**12:
            raise InputError(f"{path}: a model of {size:,} GiB, expected one of at most 4,096")
        return config

    def to_json(self, dtype):
        """What transformers (4 and 5) and vLLM expect to find in config.json."""
        rope = {
            kind: {"rope_type": "default", "rope_theta": getattr(self, theta)}
            for kind, theta in THETAS.items()
        }
        gemma3 = self.model_type == "gemma3_text"
        written = {
            **self.source,
            "architectures": [ARCHITECTURES[self.model_type]],
            **asdict(self),
            "rope_parameters": rope if gemma3 else rope[GLOBAL],
            "hidden_activation": GELU,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        written.pop("dtype", None)  # transformers 5's name for torch_dtype
        written.pop("quantization_config", None)  # what is written are plain weights
        if not gemma3:  # which has one theta
            del written["rope_local_base_freq"]
        return written


Gemma2, Gemma2Config = Gemma, GemmaConfig  # their first names


def no_pipe(path):
    """The path, unless something is there that is no file: a pipe would be waited for."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file, expected one")
    return path


def id_list(*values):
    """The ids of values of eos_token_id, each once; a value may be a number, a list or null."""
    ids = [i for value in values for i in (value if isinstance(value, list) else [value])]
    return [i for n, i in enumerate(ids) if i is not None and i not in ids[:n]]


# --------------------------------------------------------------------------------------------------
# Attention
# Over a Forest: by blocks of queries on a CPU, by flex attention on a GPU.


def tree_rules(positions, ends, window):
    """{kind of layer: (row, head, query, key) -> whether the token in one slot sees the other}.

    positions, ends: int64 [B, T]. A token sees its ancestors and itself; in a window layer only
    window - 1 positions back.
    """

    def ancestor(row, head, query, key):
        return (key <= query) & (query < ends[row, key])

    def near(row, head, query, key):
        distance = positions[row, query] - positions[row, key]
        return ancestor(row, head, query, key) & (distance < window)

    return {GLOBAL: ancestor, LOCAL: near}


def tree_masks(positions, ends, model):
    """Who sees whom in a Forest, {kind of layer: mask}, in the form that `attend` takes there."""
    config = model.config
    dtype = model.compute_dtype or model.embed_tokens.weight.dtype
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    make = tree_blocks
    if positions.is_cuda and flex_compiles(*heads, config.attn_logit_softcapping, dtype):
        make = flex_mask
    rules = tree_rules(positions, ends, config.sliding_window)
    return {kind: make(rule, positions) for kind, rule in rules.items()}


def flex_mask(rule, positions):
    B, T = positions.shape
    return create_block_mask(rule, B, None, T, T, device=positions.device)


def tree_blocks(rule, positions, size=128):
    """[(queries, keys, bias)] by blocks of `size` queries.

    queries, keys: slices of t and s slots; bias [B, t, s]: 0, or -inf where a key is hidden. Keys
    end with a block's last query and begin with the first that any of its queries sees.
    """
    B, T = positions.shape
    rows = torch.arange(B, device=positions.device)[:, None, None]
    slots = torch.arange(T, device=positions.device)
    blocks = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        seen = rule(rows, None, slots[start:stop, None], slots[:stop])  # [B, t, stop]
        first = int(seen.flatten(0, 1).any(0).int().argmax())
        bias = torch.where(seen[:, :, first:], 0.0, NEVER)
        blocks.append((slice(start, stop), slice(first, stop), bias))
    return blocks


def attend(q, k, v, mask, scale, softcap):
    """Attention of q [B, N, T, D] over k, v [B, K, S, D]: [B, N, T, D]. mask: by `tree_masks`.

    Written out, since F.scaled_dot_product_attention takes 0.14 s where this takes 0.11 (270M,
    1550 tokens, a layer forward and backward, 2 CPU cores), and 0.20 s on all queries at once,
    where it cannot skip what a trie hides.
    """
    if isinstance(mask, BlockMask):  # one fused kernel, which skips blocks that nothing sees
        kernel = compiled(flex_attention, dynamic=True)
        options = kernel_options(q.device, q.shape[-1])

        def cap(score, row, head, query, key):
            return softcap * torch.tanh(score / softcap)

        cap = softcap and cap
        return kernel(q, k, v, cap, mask, scale, enable_gqa=True, kernel_options=options)
    B, N, _, D = q.shape
    K = k.shape[1]
    if q.shape[2] == 1 and q.device.type == "cpu" and softcap is None:
        [(_, _, bias)] = mask  # a step of decoding: in bfloat16 in a third of the time (270M)
        stacked = q.reshape(B, K, -1, D)
        bias = bias[:, None].to(q.dtype)
        out = F.scaled_dot_product_attention(stacked, k, v, bias, scale=scale)
        return out.reshape(q.shape)
    q = q * scale
    outs = []
    for queries, keys, bias in mask:
        # the query heads of a key head are stacked: keys are not expanded
        block = q[:, :, queries].reshape(B, K, -1, D)
        scores = block @ k[:, :, keys].transpose(-1, -2)
        scores = soft_capped(scores, softcap).view(B, N, *bias.shape[1:]) + bias[:, None]
        weights = scores.softmax(-1).to(v.dtype).view(B, K, -1, bias.shape[-1])
        outs.append((weights @ v[:, :, keys]).view(B, N, -1, D))
    return torch.cat(outs, 2)


@cache
def kernel_options(device, head_dim):
    """Of flex attention. Its kernel for short queries has no valid size for one row of 65 to 127
    tokens (torch 2.13). Cards with some 99 KiB of shared memory (L4, A10, L40S, RTX 4090) need
    smaller blocks for heads of 256.
    """
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    card = torch.cuda.get_device_properties(device)
    if head_dim > 128 and card.shared_memory_per_block_optin < 160 * 1024:
        options |= {"fwd_num_stages": 2, "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32}
        options |= {"bwd_BLOCK_M2": 32, "bwd_BLOCK_N2": 32}
    return options


@cache
def flex_compiles(heads, kv_heads, head_dim, softcap, dtype, device="cuda"):
    """Whether flex attention compiles there, forward and backward; tried once for each shape."""
    if FLEX not in FAILED:
        with optional(FLEX), torch.inference_mode(False), torch.enable_grad():
            q = torch.zeros(2, heads, 256, head_dim, dtype=dtype, device=device, requires_grad=True)
            kv = q[:, :kv_heads].detach().contiguous()
            positions = torch.arange(256, device=device).expand(2, -1)
            rules = tree_rules(positions, torch.full_like(positions, 256), 256)
            mask = flex_mask(rules[GLOBAL], positions)
            attend(q, kv, kv, mask, 1.0, softcap).sum().backward()
            return True
    return False


FAILED = set()  # names of optimisations that do not work on this machine
FLEX = "flex attention"
RECORDED = "a recorded step"


@contextlib.contextmanager
def optional(name):
    """What only makes a run faster must not end it: that it fails is said once, and in FAILED."""
    try:
        yield
    except torch.OutOfMemoryError:  # a smaller batch may do
        raise
    except Exception as error:  # a compiler's, of whatever kind
        FAILED.add(name)
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if rank() == 0:
            said = f"{name} does not work on this machine, going on without it ({reason})"
            print(said, flush=True)


compile_once = cache(torch.compile)


def compiled(function, **options):
    """The function as torch.compile makes it, again for each kind of batch: grad or none, one row
    or more, and so on.

    Beyond its usual limit of 8 versions torch would silently go on uncompiled, with all scores in
    memory. And it would make tensors of the caps, which flex attention cannot compile.
    """
    config = torch._dynamo.config
    if config.recompile_limit < 64:  # in each thread: autograd has its own
        config.recompile_limit = 64
        config.specialize_float = True
        # advice to those who write compilers
        warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo)")
    return compile_once(function, **options)


# --------------------------------------------------------------------------------------------------
# Large products
# What a line of PyTorch says, too slowly or with too much memory: a few rows by a large weight, all
# of the vocabulary.


class Linear(nn.Linear):
    """Without a bias, and by `product`; with adapters W x + scale B A x (LoRA, see below)."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.lora_A = self.lora_B = None
        self.scale = 0.0  # of adapters; 0: there are none, or they are off

    def forward(self, x):
        out = product(x, self.weight)
        if not self.scale:
            return out
        return torch.add(out, product(product(x, self.lora_A), self.lora_B), alpha=self.scale)


def product(x, weight):
    """x [..., inputs] times weight [outputs, inputs] transposed: [..., outputs].

    4 to 15 rows, as in decoding, by blocks of a large weight, on a CPU in float32: F.linear takes
    up to 2.5 times as long (MKL), which makes a rollout of 8 rows 15 % longer (48 M parameters).
    """
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    block = 32
    weight = weight.to(x.dtype)
    slow = weight.device.type == "cpu" and weight.dtype == torch.float32
    slow = slow and weight.numel() >= 2**19 and 3 < rows < 16
    if not slow or outputs % block:
        return F.linear(x, weight)
    blocks = weight.view(-1, block, inputs).transpose(1, 2)
    parts = x.reshape(rows, inputs).expand(len(blocks), rows, inputs) @ blocks  # [V / 32, rows, 32]
    return parts.transpose(0, 1).reshape(*x.shape[:-1], outputs)


@torch.compiler.assume_constant_result
def rounded(number, dtype):
    """A Python number as near to another as the dtype can come."""
    return torch.tensor(number, dtype=dtype).item()


class TokenLogps(torch.autograd.Function):
    """Log-probabilities, float32 [P], of targets [P] from hidden states [P, C], embedding [V, C].

    By parts of the vocabulary, computed again in the backward pass: only a part of the logits
    [P, V] is held at once, and each part of the embedding's gradient is written once, where it
    stays. `tied` is a list in which that gradient waits for `Lookup`: autograd would add up the
    embedding's two uses in new memory (270M: half of a step's time).
    """

    @staticmethod
    def forward(ctx, hidden, embedding, targets, softcap, tied):
        parts = TokenLogps.parts(hidden, embedding, softcap)
        norms = torch.stack([logits.logsumexp(-1) for _, _, logits in parts]).logsumexp(0)
        scores = (hidden.float() * embedding[targets].to(hidden.dtype)).sum(-1)
        scores = soft_capped(scores.to(hidden.dtype), softcap)  # rounded as those in the norms
        ctx.save_for_backward(hidden, embedding, targets, norms, scores)
        ctx.softcap = softcap
        ctx.tied = tied
        return scores - norms

    @staticmethod
    def backward(ctx, grad):
        hidden, embedding, targets, norms, scores = ctx.saved_tensors

        def below_cap(slopes, logits):
            return slopes if ctx.softcap is None else slopes * (1 - (logits / ctx.softcap).square())

        slopes = below_cap(grad, scores)[:, None]
        hidden_grad = slopes * embedding[targets]
        embedding_grad = torch.empty_like(embedding) if ctx.needs_input_grad[1] else None
        for rows, part, logits in TokenLogps.parts(hidden, embedding, ctx.softcap):
            softmax = (logits - norms[:, None]).exp_().mul_(-grad[:, None])
            softmax = below_cap(softmax, logits).to(hidden.dtype)
            hidden_grad += softmax @ part
            if embedding_grad is not None:
                embedding_grad[rows] = softmax.T @ hidden
        if embedding_grad is not None:
            add_rows(embedding_grad, targets, slopes * hidden)
            ctx.tied.append(embedding_grad)
        return hidden_grad.to(hidden.dtype), embedding_grad, None, None, None

    @staticmethod
    def parts(hidden, embedding, softcap):
        """(rows of the embedding, these in hidden's dtype, their logits) of each part."""
        size = max(1, LOGITS_HELD[hidden.device.type] // max(1, len(hidden)))
        for start in range(0, len(embedding), size):
            rows = slice(start, start + size)
            part = embedding[rows].to(hidden.dtype)
            yield rows, part, soft_capped(hidden @ part.T, softcap)


LOGITS_HELD = {"cpu": 2**20, "cuda": 2**27}  # on a CPU what its cache holds


class Lookup(torch.autograd.Function):
    """Rows of a matrix. Their gradient is added to what `TokenLogps` has left in `tied`, if it has.

    A row may be taken several times: what plain indexing adds up on a CPU, or an embedding on a
    GPU, depends on which thread comes first.
    """

    @staticmethod
    def forward(ctx, rows, matrix, tied):
        ctx.save_for_backward(rows, matrix)
        ctx.tied = tied
        return F.embedding(rows, matrix)

    @staticmethod
    def backward(ctx, grad):
        rows, matrix = ctx.saved_tensors
        rows = rows.flatten()
        grad = grad.flatten(0, -2)
        if ctx.tied:  # popped, so that nobody else holds it, and autograd takes it without a copy
            add_rows(ctx.tied.pop(), rows, grad)
        elif ctx.needs_input_grad[1]:
            matrix_grad = torch.zeros_like(matrix)
            add_rows(matrix_grad, rows, grad)
            return None, matrix_grad, None
        return None, None, None


def add_rows(matrix, rows, values):
    """matrix[row] += value, of each, always in the same order: of the two ways each is so on one
    kind of device only. On a CPU index_put_ adds float32 from several threads at once; on a GPU,
    where it sorts, index_add_ does. Returns the matrix.
    """
    if matrix.dtype != torch.float32:  # summed in float32: a GPU would round after each value
        rows, places = rows.unique(return_inverse=True)
        sums = torch.zeros(len(rows), matrix.shape[1], device=matrix.device)
        values = add_rows(sums, places, values)
    values = values.to(matrix.dtype)
    if matrix.is_cuda:
        matrix.index_put_((rows,), values, accumulate=True)
    else:
        matrix.index_add_(0, rows, values)
    return matrix


# --------------------------------------------------------------------------------------------------
# LoRA (arXiv 2106.09685)
# Beside a frozen weight W [out, in], trained in float32: lora_A [r, in] and lora_B [out, r]. B is
# zero at the start, so the model is then its base; the loss's reference is it without its adapters.

ADAPTERS = ("lora_A", "lora_B")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class LoraConfig:
    """Keys of PEFT's adapter_config.json."""

    r: int
    lora_alpha: float  # scale = lora_alpha / r
    target_modules: list

    def to_json(self, base):
        """adapter_config.json; base: the directory of the weights that the adapters belong to."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base),
            **asdict(self),
            "bias": "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
            "inference_mode": True,
        }


def add_adapters(model, lora):
    """Freeze a model and give its target modules adapters, zero for now, which are trained."""
    model.requires_grad_(False)
    model.lora = lora
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in lora.target_modules:
            outputs, inputs = module.weight.shape
            device = module.weight.device
            module.scale = lora.lora_alpha / lora.r
            module.lora_A = nn.Parameter(torch.zeros(lora.r, inputs, device=device))
            module.lora_B = nn.Parameter(torch.zeros(outputs, lora.r, device=device))


@torch.no_grad()
def init_adapters(model, seed):
    """A uniform in +-1 / sqrt(in), as in the published code, the same however the model is
    sharded; B zero.
    """
    for name, parameter in adapters(model).items():
        drawn = random.Random(f"{seed}/{name}").getrandbits(62)
        generator = torch.Generator().manual_seed(drawn)
        bound = parameter.shape[1] ** -0.5 if ".lora_A." in name else 0.0
        whole = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        part, rows = local_slice(parameter)
        part.copy_(whole[rows])


def adapters(model):
    """{name as PEFT writes it: parameter}."""
    return {
        f"base_model.model.model.{name}.weight": parameter
        for name, parameter in model.named_parameters()
        if name.endswith(ADAPTERS)
    }


def base_weights(model):
    """{name: parameter} of all but adapters."""
    return {name: p for name, p in model.named_parameters() if not name.endswith(ADAPTERS)}


def adapted(model):
    """The modules that have adapters."""
    return [module for module in model.modules() if getattr(module, "lora_A", None) is not None]


@contextlib.contextmanager
def adapters_off(model):
    """Within it the model computes as its base does, as before training."""
    scales = {module: module.scale for module in adapted(model)}
    for module in scales:
        module.scale = 0.0
    try:
        yield
    finally:
        for module, scale in scales.items():
            module.scale = scale


def save_adapters(model, directory, base):
    """adapter_config.json and adapter_model.safetensors, as PEFT loads them. Every rank calls this.
    base: the directory of the weights that they belong to.
    """
    target = made_by_rank_0(directory)
    save_safetensors(adapters(model), target, "adapter_model", max_shard_bytes=math.inf)
    if target:
        write_json(target / "adapter_config.json", model.lora.to_json(base))


@torch.no_grad()
def merge_adapters(model):
    """W becomes W + scale B A, computed in float32 and rounded once. The adapters must not be used
    afterwards: for the model there are none.
    """
    for module in adapted(model):
        A = whole_tensor(module.lora_A)
        weight, _ = local_slice(module.weight)
        B, _ = local_slice(module.lora_B)  # the same rows
        weight.copy_(weight.float() + module.scale * B.float() @ A.float())
    model.lora = None


# --------------------------------------------------------------------------------------------------
# Safetensors
# Weights in and out: strict, of a sharded model only the rows of this rank.

FLOATS = ("BF16", "F16", "F32", "F64")  # the types of safetensors that weights may have


def rank():
    return int(os.environ.get("RANK", 0))


def made_by_rank_0(directory):
    """A directory that is there from now on, on rank 0, which writes; None on the others."""
    if rank() > 0:
        return None
    Path(directory).mkdir(parents=True, exist_ok=True)
    return Path(directory)


def whole_tensor(tensor):
    """Of a sharded tensor all rows: every rank calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_slice(parameter):
    """(this rank's part of a parameter, which rows of the whole these are).

    fully_shard cuts along dimension 0, and over the last dimension of its mesh.
    """
    if not isinstance(parameter, DTensor):
        return parameter, ...
    part = parameter.to_local()
    mesh = parameter.device_mesh
    each = -(-parameter.shape[0] // mesh.shape[-1])
    start = each * mesh.get_coordinate()[-1]
    return part, slice(start, start + part.shape[0])


def all_finite(tensor):
    """Whether no number is infinite or NaN; 10 times as fast as to look at each."""
    ends = tensor.aminmax() if tensor.numel() else (tensor.new_zeros(()),)
    return torch.stack([*ends]).isfinite().all()


def load_safetensors(tensors, directory, stem="model", prefix=""):
    """Fill `tensors`, name -> tensor (of a DTensor this rank's rows), from STEM.safetensors or its
    shards; where they are on the meta device, only check that they could be.

    Raises InputError that lists all missing, unexpected and mis-shaped tensors together.
    """
    directory = Path(directory)
    where = directory / f"{stem}.safetensors"
    index = directory / f"{stem}.safetensors.index.json"
    names = [where.name]
    if index.exists():
        where = index
        shards = read_json(no_pipe(index)).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
            problem = "weight_map is not an object that maps tensor names to file names"
            raise InputError(f"{index}: {problem}")
        names = sorted(set(shards.values()))
        alone = f"{stem}.safetensors"
        if alone not in names and (directory / alone).exists():  # which transformers would load
            raise InputError(f"{index}: names other files than {alone} beside it, expected one")
    found = {}
    problems = []
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index}: weight_map names {name!r}, expected a file beside it")
        path = no_pipe(directory / name)
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            expected = "expected the weights, no Git LFS pointer or pytorch_model.bin"
            raise InputError(f"{path}: not readable ({error}), {expected}") from None
        for key in file.keys():
            tensor = key.removeprefix(prefix)
            problems += [f"{key} stands in two places"] if tensor in found else []
            found[tensor] = file.get_slice(key)
    head = found.get("lm_head.weight")
    embedding = found.get("embed_tokens.weight")
    if head and embedding and torch.equal(head[...], embedding[...]):
        del found["lm_head.weight"]  # some writers store the tied head once more
    strange = [name for name in found if name not in tensors]
    quantised = [name for name in strange if found[name].get_dtype() not in FLOATS]
    if quantised:
        expected = "expected weights that are not quantised (as by bitsandbytes)"
        raise InputError(f"{where}: holds {quantised[0]}, {expected}")
    problems += [f"unexpected {name}" for name in strange]
    problems += [f"missing {name}" for name in tensors if name not in found]
    for name in [name for name in tensors if name in found]:
        shape = list(tensors[name].shape)
        stored = found[name].get_shape()
        dtype = found[name].get_dtype()
        if stored != shape or dtype not in FLOATS:
            problems.append(f"{name} is {dtype} {stored}, expected floats {shape}")
    if problems[12:]:
        problems[12:] = [f"and {len(problems) - 12} more"]
    if problems:
        listed = "; ".join(problems)
        raise InputError(f"{where}: does not hold the expected tensors: {listed}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.is_meta:
                continue
            part, rows = local_slice(tensor)
            part.copy_(found[name][rows])
            if not all_finite(part):
                problem = "holds numbers that are not finite, expected finite ones"
                raise InputError(f"{where}: {name} {problem}")


def save_safetensors(tensors, directory, stem, prefix="", max_shard_bytes=5_000_000_000):
    """Write `tensors` as STEM.safetensors, or as shards with an index when they are larger than
    one shard may be. Files of an earlier model stay until those of this one are complete.

    Sharded tensors are gathered one at a time; rank 0, the writer (directory not None), holds a
    file's worth at most.
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    shards = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    count = len(shards)
    files = {}  # of each file the tensors' names
    problem = None
    for i, names in enumerate(shards, start=1):
        part = f"-{i:05d}-of-{count:05d}" if count > 1 else ""
        whole = {}
        for name in names:
            tensor = whole_tensor(tensors[name].detach())
            if directory:
                whole[prefix + name] = tensor.cpu().contiguous()
        if directory and not problem:
            path = directory / f".{stem}{part}.safetensors"
            try:
                path.touch()
                rights = path.stat().st_mode  # safetensors' files are their owner's alone
                save_file(whole, path, metadata={"format": "pt"})
                path.chmod(rights)
            except (SafetensorError, OSError) as error:  # a full disk; others are still gathering
                problem = InputError(f"{directory / path.name[1:]}: {error}")
            files[path] = list(whole)
    if problem:
        raise problem
    if directory:
        weight_map = {}
        for path, names in files.items():
            file = path.name[1:]
            path.replace(directory / file)
            weight_map |= dict.fromkeys(names, file)
        written = set(weight_map.values())
        if count > 1:
            name = f"{stem}.safetensors.index.json"
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_json(directory / name, index)
            written.add(name)
        for old in directory.glob(f"{stem}*.safetensors*"):
            if old.name not in written:
                old.unlink()


# --------------------------------------------------------------------------------------------------
# Tokenizer and prompt formats
# SentencePiece with Gemma's control tokens; messages to tokens, as "plain" text or in the chat
# template.


class Tokenizer:
    """A SentencePiece model. `encode` never yields a control token for text that merely spells one.

    ids: piece -> id; pad_id, eos_id, bos_id, start_of_turn_id, end_of_turn_id: None where the
    vocabulary lacks them; config: what tokenizer_config.json beside it says; chat_template: a text.
    """

    def __init__(self, path):
        self.path = no_pipe(Path(path))
        if not self.path.exists():
            expected = "expected the base model's (a tokenizer.json alone is not enough)"
            raise InputError(f"{path}: no such file, {expected}")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
            pieces = self.sp.id_to_piece(list(range(len(self))))
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: not readable as a SentencePiece model ({reason})") from None
        beside = no_pipe(self.path.with_name("tokenizer_config.json"))
        self.config = read_json(beside) if beside.exists() else {}
        self.chat_template = str(self.config.get("chat_template", ""))
        beside = no_pipe(self.path.with_name("chat_template.jinja"))
        if beside.exists():
            self.chat_template = beside.read_text(encoding="utf-8", errors="replace")
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        ends = self.sp.pad_id(), self.sp.eos_id(), self.sp.bos_id()
        self.pad_id, self.eos_id, self.bos_id = (i if i >= 0 else None for i in ends)
        self.start_of_turn_id = self.ids.get("<start_of_turn>")
        self.end_of_turn_id = self.ids.get("<end_of_turn>")
        self.control_ids = {*ends, self.start_of_turn_id, self.end_of_turn_id} - {None, -1}
        control = [re.escape(pieces[i]) for i in self.control_ids]
        self._control = re.compile("|".join(control) or "(?!)")

    def __len__(self):
        return self.sp.get_piece_size()

    def encode(self, text, bos=False):
        """Token ids of a text. A control token spelt out in it is cut after its first character: it
        stays text.
        """
        cuts = [match.start() + 1 for match in self._control.finditer(text)]
        ids = [self.bos_id] if bos else []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            part = self.sp.encode(text[start:stop])
            if not self.control_ids.isdisjoint(part):  # a vocabulary that normalises other signs
                each = [i for sign in text[start:stop] for i in self.sp.encode(sign)]
                part = [i for i in each if i not in self.control_ids]
            ids += part
        return ids

    def decode(self, ids):
        return self.sp.decode([int(i) for i in ids if i < len(self)])


def is_chat(tokenizer, config):
    """Whether a checkpoint's files say that it talks in Gemma's chat template: replies end with a
    turn, not a line.
    """
    ends = id_list(config.eos_token_id)
    turn = tokenizer.end_of_turn_id
    talks = "<start_of_turn>" in tokenizer.chat_template or turn in ends
    return turn is not None and talks and not set(ends) & set(tokenizer.encode("\n"))


def foreign(tokenizer, config):
    """Lines about what a checkpoint's files have that is not followed here: tokens which
    tokenizer.model lacks, a chat template that is not Gemma's.
    """
    lines = []
    text = ""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = no_pipe(tokenizer.path.with_name(name))
        text += file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    # "id": 7, "content": ... in the one, "7": {"content": ... in the other
    ids = {int(i) for i in re.findall(r'(\d{1,9})"?[,:]\s*\{?\s*"content"', text)}
    added = [i for i in ids if len(tokenizer) <= i < config.vocab_size]
    if added:
        lines.append(f"{tokenizer.path}: lacks {len(added)} added tokens, whose texts are any text")
    known = ("<start_of_turn>", "[conversation]")  # Gemma's, and that of the plain format
    if tokenizer.chat_template and not any(mark in tokenizer.chat_template for mark in known):
        lines.append(f"{tokenizer.path}: the chat template beside it is not Gemma's")
    return lines


def check_vocabulary(tokenizer, config):
    if len(tokenizer) > config.vocab_size:
        limit = f"at most the model's vocab_size {config.vocab_size}"
        raise InputError(f"{tokenizer.path}: {len(tokenizer)} pieces, expected {limit}")


class Template:
    """Text to tokens, message by message, so that dialogues that begin alike begin with the same
    tokens.

    plain:  <bos>instruction / [context] / context / [conversation] / User: text / Assistant: text,
            a line each
    gemma:  <bos><start_of_turn>user / context, blank line, text<end_of_turn> / <start_of_turn>model
            / text<end_of_turn>, token for token what transformers' apply_chat_template gives, white
            space around a text taken off
    """

    def __init__(self, tokenizer, prompt_format):
        self.tokenizer = tokenizer
        self.encode = tokenizer.encode
        self.plain = prompt_format == "plain"
        self.newline = self.encode("\n")
        needed = [tokenizer.bos_id]
        if not self.plain:
            needed += [tokenizer.start_of_turn_id, tokenizer.end_of_turn_id]
        if None in needed or not self.newline:
            pieces = "<bos>, a line break and for 'gemma' <start_of_turn> and <end_of_turn>"
            raise InputError(f"{tokenizer.path}: lacks a piece, expected {pieces}")
        self.end = self.newline if self.plain else [tokenizer.end_of_turn_id]
        self.opening = self.encode("Assistant:") if self.plain else self.turn("model")
        self.stop_ids = {self.end[-1], tokenizer.eos_id} - {None}
        self.newlines = {i for piece, i in tokenizer.ids.items() if piece.startswith("\n")}
        if self.plain:  # a message is one line; large vocabularies have pieces of several newlines
            self.stop_ids |= self.newlines

    def mark_stops(self, config):
        """Let a model's files name what ends a reply in this format, for programs that read no more
        than the files.
        """
        others = [i for i in id_list(config.eos_token_id) if i not in self.newlines]
        config.eos_token_id = id_list(others, sorted(self.stop_ids))

    def turn(self, role):
        return [self.tokenizer.start_of_turn_id, *self.encode(f"{role}\n")]

    def message(self, role, text):
        """(tokens, mask) of a message with its markers; mask: 1 where the assistant wrote it."""
        written = role == "model"
        if self.plain:
            before = self.opening if written else []
            after = []
            text = (" " if written else "User: ") + fold(text)
        else:
            before = self.turn(role)
            after = self.newline
            text = text.strip()
        said = self.encode(text) + self.end
        mask = [0] * len(before) + [int(written)] * len(said) + [0] * len(after)
        return before + said + after, mask

    def prompts(self, context, messages, lengths, max_length, instruction=INSTRUCTION):
        """[(tokens, lost)]: for each n of `lengths` what asks for the reply to messages[:n], and
        how many tokens it lost to be at most `max_length` long, if that holds more than the
        markers. Each text is tokenised once.

        A longer prompt loses its oldest turns first, then the head of its context, both in steps of
        an eighth of max_length, so that most turns of a dialogue still begin with the same tokens.
        A last user turn that is longer even alone loses its own head.
        """
        said = []  # the tokens of all messages
        ends = [0]  # where each of them begins, and the last ends
        for message in messages:
            said += self.message(*message)[0]
            ends.append(len(said))
        starts = [i for i, (role, _) in enumerate(messages) if role == "user"]
        if self.plain:
            before = [self.tokenizer.bos_id, *self.encode(f"{instruction}\n[context]\n")]
            head = []
            context = self.encode(context)
            after = self.encode("\n[conversation]\n")
            skip = 0
            mark = self.encode("User:")
            closing = self.end
            starts = sorted({0, *starts})
        else:  # no system role: the context stands in the first user turn, one text with its header
            before = [self.tokenizer.bos_id, self.tokenizer.start_of_turn_id]
            head = self.encode("user\n")
            after = []
            context = self.encode(f"user\n{context}\n\n") if context else head
            skip = 1 + len(head)
            mark = []
            closing = self.end + self.newline
        room = max_length - len(before) - len(after) - len(self.opening) + skip
        step = max(1, max_length // 8)

        prompts = []
        for n in lengths:
            last = bisect_left(starts, n) - 1
            enough = len(context) + ends[n] - room  # to be lost
            rounded_up = math.ceil(enough / step) * step
            first = bisect_left(starts, rounded_up, hi=last, key=ends.__getitem__)
            excess = enough - ends[starts[first]]
            cut = head + context[len(head) + math.ceil(excess / step) * step :]
            kept = context if excess <= 0 else cut
            turns = said[ends[starts[first]] + skip : ends[n]]
            excess = len(kept) + len(turns) + skip - room
            if excess > 0:
                end = len(turns) - len(closing)
                turns = mark + turns[min(len(mark) + excess, end) :]
            tokens = [*before, *kept, *after, *turns, *self.opening]
            whole = enough - ends[starts[0]] + max_length
            prompts.append((tokens, whole - len(tokens)))
        return prompts

    def prompt(self, context, history, max_length, instruction=INSTRUCTION):
        """The tokens of `prompts` for the whole history."""
        [(tokens, _)] = self.prompts(context, history, [len(history)], max_length, instruction)
        return tokens

    def following(self, messages):
        """All tokens of messages that follow `prompt`, to the opening of the assistant's next."""
        return self._after_opening(messages)[0] + self.opening

    def reply(self, messages, ended=True):
        """(tokens, mask) of a trajectory that follows `prompt`; mask: 1 where the assistant wrote
        the token.

        ended: whether the assistant closed its last message, so that an end token is there to be
        scored.
        """
        tokens, mask = self._after_opening(messages)
        while mask and not mask[-1]:  # nothing after the last reply
            mask.pop()
        if not ended and len(mask) > len(self.end):  # of a reply that says nothing the end counts
            del mask[-len(self.end) :]
        return tokens[: len(mask)], mask

    def _after_opening(self, messages):
        tokens = []
        mask = []
        for message in messages:
            more, written = self.message(*message)
            tokens += more
            mask += written
        skip = len(self.opening)
        return tokens[skip:], mask[skip:]

    def text(self, tokens):
        """A response as a message's text."""
        return self.tokenizer.decode(tokens).strip()


# --------------------------------------------------------------------------------------------------
# Generation
# Batched sampling, with a key/value cache that outlives a reply.


class KVCache:
    """Keys and values of a batch of growing sequences; the caller owns it and may hand it to
    `generate` again.

    stores: [B, K, S, D], keys and values of the first layer, of the second, ... A row's slot is its
    token's position, so rows are aligned at the left and need no padding in front. tokens[b] are
    the tokens that row b holds. Rows may trade places while decoding: order[b] says which prompt
    the row belongs to.
    """

    multiple = 64  # of slots: a GPU's products are slow where rows do not begin at 16 bytes each

    def __init__(self):
        self.stores = []
        self.tokens = []
        self.order = []
        self.steps = {}  # on a GPU: number of rows -> CapturedStep

    def read(self, model, prompts, room):
        """Hold these prompts, and room for more tokens. Returns the logits after each row, [B, V].

        Of a prompt whose row holds a beginning of it only the rest is computed.
        """
        if not self.order:
            return self._prefill(model, prompts, room)
        new = []
        for row, prompt in enumerate(self.order):
            held = common_prefix(self.tokens[row], prompts[prompt][:-1])
            self.tokens[row] = prompts[prompt][:held]
            new.append(prompts[prompt][held:])
        return self.advance(model, new, room)

    def _prefill(self, model, prompts, room):
        """Fill an empty cache: what prompts share is computed once."""
        device = model.embed_tokens.weight.device
        forest = Forest(prompts).to(device)
        longest = max(map(len, prompts))
        rows, paths = zip(*forest.paths, strict=True)
        last = torch.tensor([rows, [path[-1] for path in paths]], device=device)
        rows = last[0, :, None]
        slots = [path + [0] * (longest - len(path)) for path in paths]  # zeros: unused slots
        slots = torch.tensor(slots, device=device)

        def copy_branches(layer, k, v):
            self.stores += [x[rows, :, slots].transpose(1, 2) for x in (k, v)]
            return k, v

        masks = tree_masks(forest.positions, forest.ends, model)
        hidden = model.hidden(forest.tokens, forest.positions, masks, copy_branches, last)
        self.tokens = [list(prompt) for prompt in prompts]
        self.order = list(range(len(prompts)))
        self._reserve(longest + room)
        return model.logits(hidden)

    def _reserve(self, slots):
        lacking = slots - self.stores[0].shape[2]
        if lacking > 0:
            lacking += -slots % self.multiple
            self.steps = {}  # they hold the old tensors, which go one by one
            for i, x in enumerate(self.stores):
                self.stores[i] = F.pad(x, (0, 0, 0, lacking))

    def advance(self, model, new, room=1):
        """Append the token lists `new` to the first rows. Returns the logits after each, [B, V].

        room, at least 1: free slots to keep behind each row, lest the cache move too often.
        """
        held = [len(tokens) for tokens in self.tokens[: len(new)]]
        for tokens, tail in zip(self.tokens, new, strict=False):
            tokens.extend(tail)
        longest = max(map(len, new))
        end = max(held) + longest
        self._reserve(end + room)
        if longest == 1 and self._records():
            logits = self._recorded(model, new, held)
            if logits is not None:
                return logits
        device = self.stores[0].device
        tails = [tail + [0] * (longest - len(tail)) for tail in new]  # zeros: unused slots
        tokens = torch.tensor(tails, device=device)
        positions = torch.tensor(held, device=device)[:, None]
        positions = positions + torch.arange(longest, device=device)
        last = torch.tensor([len(tail) - 1 for tail in new], device=device)
        first = max(0, min(held) - model.config.sliding_window + 1)
        spans = {GLOBAL: slice(0, end), LOCAL: slice(first, end)}
        return extend(model, self._rows(len(new)), tokens, positions, last, spans)

    def _records(self):
        """Whether steps of one token are recorded."""
        return self.stores[0].is_cuda and RECORDED not in FAILED

    def _recorded(self, model, new, held):
        """A step of one token a row by a graph for 4, 16, 64, ... rows or all; rows that are done
        go along. None where it cannot be recorded.
        """
        active = len(new)
        rows = 4
        while rows < active:
            rows *= 4
        rows = min(rows, len(self.tokens))
        idle = self.tokens[active:rows]
        positions = [[start] for start in held + [len(tokens) for tokens in idle]]
        inputs = torch.tensor([new + [[0]] * len(idle), positions])
        if rows not in self.steps:
            with optional(RECORDED):
                self.steps[rows] = CapturedStep(model, self._rows(rows), inputs)
        return self.steps[rows](inputs)[:active] if rows in self.steps else None

    def _rows(self, count):
        return [x[:count] for x in self.stores]

    def swap(self, a, b):
        """Two rows trade places."""
        for x in self.stores:
            kept = x[a].clone()
            x[a] = x[b]
            x[b] = kept
        for each in (self.tokens, self.order):
            each[a], each[b] = each[b], each[a]

    @torch.inference_mode()  # as `stream`: a step compiled for such tensors is not compiled again
    def keep(self, prompts):
        """Keep the rows of these prompts only (numbers as of the last call), in this order."""
        rows = [self.order.index(prompt) for prompt in prompts]
        self.steps = {}
        for i, x in enumerate(self.stores):
            self.stores[i] = x[rows]
        self.tokens = [self.tokens[row] for row in rows]
        self.order = list(range(len(rows)))


def extend(model, stores, tokens, positions, last, spans):
    """Put `tokens` at `positions`, int64 [B, T], of a cache of B rows. Returns the logits [B, V]
    after each one's token `last` [B].

    stores: of a KVCache; spans {kind of layer: a slice of all slots that any token sees}.
    """
    window = model.config.sliding_window
    masks = {}
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    slots = torch.arange(stores[0].shape[2], device=tokens.device)
    for kind, span in spans.items():
        distance = positions[:, :, None] - slots[span]
        seen = (distance >= 0) & (distance < window) if kind == LOCAL else distance >= 0
        masks[kind] = [(slice(None), slice(None), torch.where(seen, 0.0, NEVER))]

    def write(layer, k, v):
        span = spans[model.config.layer_types[layer]]
        keys, values = stores[2 * layer : 2 * layer + 2]
        keys[rows, :, positions] = k.transpose(1, 2)
        values[rows, :, positions] = v.transpose(1, 2)
        return keys[:, :, span], values[:, :, span]

    return model.logits(model.hidden(tokens, positions, masks, write, (rows[:, 0], last)))


class CapturedStep:
    """`extend` by one token a row, compiled and recorded as a CUDA graph: one launch a step, not
    one a kernel.
    """

    def __init__(self, model, stores, inputs):
        """inputs: tokens and positions, int64 [2, B, 1]."""
        self.inputs = inputs.to(stores[0].device)
        step = compiled(extend, fullgraph=True)
        tokens, positions = self.inputs
        last = torch.zeros_like(tokens[:, 0])
        everything = {GLOBAL: slice(None), LOCAL: slice(None)}
        # one compilation for all numbers of rows above one, and of slots
        for x in (tokens, positions, last):
            torch._dynamo.maybe_mark_dynamic(x, 0)
        for x in stores:
            torch._dynamo.maybe_mark_dynamic(x, (0, 2))
        # kept: a graph knows addresses only
        self.arguments = model, stores, tokens, positions, last, everything
        step(*self.arguments)  # compiles; what it writes will be written again by the first replay
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # not torch.cuda.graph, which empties the allocator's cache each time
        with torch.cuda.stream(stream):
            # NCCL's own thread may use the GPU
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.logits = step(*self.arguments)
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, inputs):
        self.inputs.copy_(inputs)
        self.graph.replay()
        return self.logits


def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    stop_ids=(),
    generator=None,
    kv_cache=None,
):
    """Continue token lists of different lengths; returns the new tokens of each, without the stop
    token.

    A row was cut, rather than stopping by itself, exactly if it has max_new_tokens tokens (one
    whose stop token would have come next counts as cut). temperature 0 is greedy; top_k 0 and top_p
    1 keep the whole distribution. A row's result does not depend on the other rows: each draws its
    own noise, from `generator[i]` if that is a list, else from a stream made for row i from
    `generator` (None: seed 0). A `kv_cache` of an earlier call (KVCache() at first) is continued:
    of prompt i, only the tokens that its row does not hold yet are processed. Finished rows leave
    the batch. Raises InputError.
    """
    outputs = [[] for _ in prompts]
    settings = temperature, top_k, top_p, stop_ids, generator, kv_cache or KVCache()
    for step in stream(model, prompts, max_new_tokens, *settings):
        for row, token in step:
            outputs[row].append(token)
    return outputs


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, temperature, top_k, top_p, stop_ids, generator, cache):
    """`generate`, yielding each step's [(number of a prompt, its next token)]."""
    if not all(prompts):
        raise InputError("an empty prompt, expected at least one token (the <bos> token, say)")
    if not (temperature >= 0 and top_k >= 0 and max_new_tokens >= 0):
        values = f"temperature {temperature}, top_k {top_k}, max_new_tokens {max_new_tokens}"
        raise InputError(f"{values}: expected numbers from 0")
    active = len(prompts)  # rows 0 .. active-1 of the cache are still being written
    held = len(cache.order)
    assert held in (0, active), f"the cache holds {held} rows for {active} prompts: call keep()"
    if active == 0 or max_new_tokens == 0:
        return
    noise = draw_noise(generator, active, max_new_tokens) if temperature > 0 else None
    logits = cache.read(model, prompts, max_new_tokens)
    for left in reversed(range(max_new_tokens)):
        u = None if noise is None else noise[cache.order[:active], -1 - left].to(logits.device)
        tokens = sample(logits, u, temperature, top_k, top_p).tolist()
        step = []  # not a token each: inference mode is left and entered where this yields
        for row in reversed(range(active)):
            if tokens[row] in stop_ids:
                active -= 1
                cache.swap(row, active)
                tokens[row] = tokens[active]
            else:
                step.append((cache.order[row], tokens[row]))
        if active == 0:
            return
        yield step
        if left == 0:
            return
        logits = cache.advance(model, [[token] for token in tokens[:active]])


def draw_noise(generator, rows, steps):
    """Uniform numbers, float64 [rows, steps], from each of which a token is found by inverting the
    distribution.
    """
    if not isinstance(generator, list | tuple):
        generator = generator or torch.Generator().manual_seed(0)
        seeds = torch.randint(2**62, (rows,), generator=generator).tolist()
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(steps, generator=g, dtype=torch.float64) for g in generator])


def sample(logits, u, temperature, top_k, top_p):
    """One token a row, int64 [B], from logits [B, V] and uniform numbers u [B]."""
    if temperature < 1e-6 or top_k == 1 or top_p == 0:  # below 1e-37 logits become infinite
        return logits.argmax(-1)
    logits = logits / temperature
    ids = None
    if top_k or top_p < 1:
        logits, ids = candidates(logits, top_k, top_p)
    pick = invert(logits.softmax(-1), u)
    return pick if ids is None else ids.gather(-1, pick[:, None])[:, 0]


def invert(weights, u, block=256):
    """For each row of weights [B, V] the first entry up to which they sum to more than the share
    u [B] of their sum.

    First among blocks, then within one: sums over a vocabulary, one by one in float64, are slow on
    any device.
    """

    def search(ends, target):
        target = torch.minimum(target, ends[:, -1:] * (1 - 2**-52))  # no entry of weight 0
        at = torch.searchsorted(ends, target, right=True)
        at.clamp_(max=ends.shape[1] - 1)  # beyond it: not a number
        return at, target - F.pad(ends, (1, 0)).gather(1, at)

    blocks = F.pad(weights, (0, -weights.shape[1] % block)).unflatten(1, (-1, block))
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    at, rest = search(ends, u[:, None] * ends[:, -1:])
    within = blocks.take_along_dim(at[..., None], 1)[:, 0]
    pick, _ = search(within.cumsum(-1, dtype=torch.float64), rest)
    return (at * block + pick)[:, 0].clamp_(max=weights.shape[1] - 1)


def candidates(logits, top_k, top_p, guess=1024):
    """The most likely tokens' logits and ids, sorted; -inf beyond top_k or the smallest set of
    probability top_p.
    """
    best, ids = logits.topk(min(top_k or guess, logits.shape[-1]))
    if top_p < 1:
        total = (best if top_k else logits).logsumexp(-1, keepdim=True)
        flat = (best - total).exp().sum(-1) < top_p
        if not top_k and flat.any():  # the guess was too small; other rows stay as they are alone
            beyond = (0, logits.shape[-1] - best.shape[-1])
            best, ids = F.pad(best, beyond, value=NEVER), F.pad(ids, beyond)
            best[flat], ids[flat] = logits[flat].sort(descending=True)
        shares = (best - total).exp()
        before = shares.cumsum(-1) - shares
        before[..., 0] = -1  # the most likely token always stays
        best = best.masked_fill(before >= top_p, NEVER)
    return best, ids


# --------------------------------------------------------------------------------------------------
# Command line
# `python gemma.py MODEL_DIR`: talk with it. With --prompt TEXT: is this checkpoint sound?


def chat(model, template, context, limit, temperature):
    """A conversation in the terminal, until Ctrl-D raises EOFError. Ctrl-C ends a reply."""
    history = []
    cache = KVCache()
    noise = torch.Generator()
    noise.seed()
    settings = limit, temperature, 0, 1.0, template.stop_ids, [noise]
    while True:
        said = input("> ")
        if not said.strip():
            continue
        history.append(("user", said))
        room = max(1, model.config.max_position_embeddings - limit)
        prompt = template.prompt(context, history, room)
        tokens = []
        text = ""
        try:
            for [(_, token)] in stream(model, [prompt], *settings, cache):
                tokens.append(token)
                shown = len(text)
                text = template.text(tokens).rstrip("\ufffd")  # a sign whose last bytes are to come
                print(text[shown:], end="", flush=True)
        except KeyboardInterrupt:
            cache = KVCache()  # the old one may hold half a step
        print()
        history.append(("model", text))


def readable(argument):
    """A text of the command line, with a sign for each byte that is not UTF-8."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def talk(args):
    tokenizer = Tokenizer(Path(args.model_dir) / "tokenizer.model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Gemma.from_pretrained(args.model_dir, getattr(torch, args.dtype), device)
    check_vocabulary(tokenizer, model.config)
    for line in foreign(tokenizer, model.config):
        print(line, file=sys.stderr)
    if args.prompt is None:
        template = Template(tokenizer, "gemma" if is_chat(tokenizer, model.config) else "plain")
        limit = min(args.max_new_tokens, model.config.max_position_embeddings // 2)
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            chat(model, template, args.context, limit, args.temperature)
        print()
    else:
        stop = {tokenizer.eos_id, tokenizer.end_of_turn_id}
        prompt = [tokenizer.encode(args.prompt, bos=True)]
        [tokens] = generate(model, prompt, args.max_new_tokens, args.temperature, stop_ids=stop)
        print(args.prompt + tokenizer.decode(tokens))


def main(arguments=None):
    speak_plainly()
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    for file in (sys.stdin, sys.stdout):
        file.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(description="Talk with a Gemma checkpoint, or try it.")
    option = parser.add_argument
    option("model_dir", help="directory with config.json, *.safetensors and tokenizer.model")
    option("--prompt", type=readable, help="a text to continue; without it, a chat")
    option("--context", type=readable, default="", help="what a chat is about: its system text")
    option("--max_new_tokens", type=int, default=256, help="in a chat at most half of what fits")
    option("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    option("--dtype", default="float32", choices=["float32", "bfloat16"])
    try:
        talk(parser.parse_args(arguments))
        sys.stdout.flush()
    except (InputError, OSError) as error:  # a full disk, a reader that is gone
        print(f"gemma.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os._exit(main())  # not sys.exit, which would write again what could not be written
