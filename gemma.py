"""Gemma 2 and Gemma 3 (text): tries, decoder, safetensors, SentencePiece tokenizer, batched generation.

    python gemma.py MODEL_DIR                                      talks with it
    python gemma.py MODEL_DIR --prompt "Why is the sky blue?"      continues it: is this checkpoint sound?

To read: from here to the end of class Gemma, what a batch is and what the decoder computes. For reference
after it: configuration, attention, large products, safetensors, tokenizer, generation, command line.

Parameters are named as in the published checkpoints, so loading is a strict copy without a table of names.
What is odd about Gemma is noted where it happens. Sources: Gemma 2 (arXiv 2408.00118), Gemma 3 (arXiv
2503.19786) and the published configurations.

Shapes: B rows, T tokens, S key slots, N query heads, K key/value heads, D head_dim, C hidden_size,
V vocab_size, P tokens that are scored.
"""

import argparse
import contextlib
import math
import os
import random
import re
import shutil
import sys
import warnings
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache, wraps
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from data import InputError, Pair, fold, read_json, speak_plainly, write_json

LOCAL, GLOBAL = "sliding_attention", "full_attention"
NEVER = float("-inf")
FLOATS = ("BF16", "F16", "F32", "F64")  # the types of safetensors that weights may have


@dataclass
class GemmaConfig:
    """The fields of Hugging Face's config.json that change what is computed, as named there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # not always hidden_size / num_attention_heads
    query_pre_attn_scalar: float  # queries are scaled by its root's inverse; not always head_dim
    sliding_window: int
    attn_logit_softcapping: float | None = None  # Gemma 2: 50; Gemma 3 has no caps
    final_logit_softcapping: float | None = None  # Gemma 2: 30
    model_type: str = "gemma2"  # or "gemma3_text"
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None  # default: 10,000, in Gemma 3 a million
    rope_local_base_freq: float | None = None  # Gemma 3: theta of the window layers, 10,000
    max_position_embeddings: int = 8192
    pad_token_id: int = 0
    eos_token_id: int | list = 1
    bos_token_id: int = 2
    sliding_window_pattern: int | None = None  # one layer in so many is global: 2, in Gemma 3 6
    layer_types: list | None = None  # LOCAL or GLOBAL, for each layer; default: by the pattern
    source, generation = {}, {}  # not fields: all that stands in config.json and in generation_config.json beside it

    def __post_init__(self):
        gemma3 = self.model_type == "gemma3_text"
        self.rope_theta = self.rope_theta or (1e6 if gemma3 else 1e4)
        self.rope_local_base_freq = (self.rope_local_base_freq or 1e4) if gemma3 else self.rope_theta
        self.sliding_window_pattern = self.sliding_window_pattern or (6 if gemma3 else 2)
        if self.layer_types is None and isinstance(self.num_hidden_layers, int):
            numbers = range(1, 1 + self.num_hidden_layers)
            every = self.sliding_window_pattern
            self.layer_types = [LOCAL if i % every else GLOBAL for i in numbers]

    @staticmethod
    def from_json(path):
        """Read a config.json, as transformers 4 or 5 writes it. Raises InputError."""
        return read_config(path)

    def to_json(self, dtype):
        """What transformers (4 and 5) and vLLM expect to find in config.json."""
        return config_json(self, dtype)


def fused(function):
    """The function's lines; on a GPU one kernel instead of several, if flex attention compiles there."""

    @wraps(function)
    def call(x, *args):
        alone = x.is_cuda and not torch.compiler.is_compiling() and FLEX not in FAILED
        return compiled(function, dynamic=True)(x, *args) if alone else function(x, *args)

    return call


# --------------------------------------------------------------------------------------------------
# A batch: sequences that share beginnings


class Forest:
    """Token sequences laid out so that what they share is computed once.

    Sequences that have half or more in common are merged into a trie, and tries are packed side by
    side into rows, as long as the longest of them or up to half longer, where that leaves less
    empty. Inside a row a trie lies in depth-first order, so the descendants of the token in slot s
    are the slots s+1 .. ends[s]-1: the token in slot t may attend to slot s if s <= t < ends[s].

    tokens, positions, ends: int64 [B, T]; positions count along each branch.
    paths[i] = (row, slots of sequence i in order); padding: the fraction of slots without a token.
    """

    def __init__(self, sequences):
        sequences = [list(map(int, sequence)) for sequence in sequences]
        if not sequences or not all(sequences):
            raise InputError("a token sequence is empty, expected at least one token in each")
        tries = [self._trie(sequences, group) for group in self._groups(sequences)]
        tries.sort(key=lambda trie: -len(trie["tokens"]))
        sizes = [len(trie["tokens"]) for trie in tries]
        widths = [sizes[0] + sizes[0] * i // 16 for i in range(9)]
        layouts = [self._pack(sizes, width) for width in widths]
        count, width, places = min(layouts, key=lambda layout: layout[0] * layout[1])

        self.tokens = torch.zeros(count, width, dtype=torch.int64)
        self.positions = torch.zeros_like(self.tokens)
        self.ends = torch.arange(1, width + 1).repeat(count, 1)  # padding sees itself only
        self.paths = [None] * len(sequences)
        for (row, start), trie in zip(places, tries, strict=True):
            span = slice(start, start + len(trie["tokens"]))
            self.tokens[row, span] = torch.tensor(trie["tokens"])
            self.positions[row, span] = torch.tensor(trie["positions"])
            self.ends[row, span] = torch.tensor(trie["ends"]) + start
            for i, path in trie["paths"].items():
                self.paths[i] = (row, np.array(path) + start)
        self.padding = 1 - sum(sizes) / (count * width)

    @staticmethod
    def _groups(sequences):
        """Lists of the sequences (their numbers, in sorted order) that make a trie each.

        In sorted order a sequence shares most with its neighbour. Sharing less than half of the
        shorter one is not worth the attention over each other's slots.
        """
        order = sorted(range(len(sequences)), key=lambda i: sequences[i])
        groups = [[order[0]]]
        for a, b in zip(order, order[1:], strict=False):
            shared = common_prefix(sequences[a], sequences[b])
            if 2 * shared < min(len(sequences[a]), len(sequences[b])):
                groups.append([])
            groups[-1].append(b)
        return groups

    @staticmethod
    def _trie(sequences, group):
        """tokens, positions, ends of one trie, and paths {sequence: its slots}."""
        tokens, positions, ends, paths = [], [], [], {}
        path = []  # the slots of the sequence before
        for i in group:
            shared = common_prefix([tokens[slot] for slot in path], sequences[i])
            for slot in path[shared:]:
                ends[slot] = len(tokens)  # the branch left behind ends here
            branch = sequences[i][shared:]
            path = path[:shared] + list(range(len(tokens), len(tokens) + len(branch)))
            tokens += branch
            positions += range(shared, len(sequences[i]))
            ends += [None] * len(branch)
            paths[i] = path
        ends = [len(tokens) if end is None else end for end in ends]
        return {"tokens": tokens, "positions": positions, "ends": ends, "paths": paths}

    @staticmethod
    def _pack(sizes, width):
        """Where tries of these sizes, longest first, go in rows of up to `width`, first fit.

        Returns (number of rows, their width, [(row, start) of each trie]).
        """
        used, places = [], []
        for size in sizes:
            row = next((r for r, n in enumerate(used) if n + size <= width), len(used))
            if row == len(used):
                used.append(0)
            places.append((row, used[row]))
            used[row] += size
        return len(used), max(used), places

    def to(self, device):
        self.tokens = self.tokens.to(device)
        self.positions = self.positions.to(device)
        self.ends = self.ends.to(device)
        return self


def common_prefix(a, b):
    """How many tokens two lists begin with in common."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


# --------------------------------------------------------------------------------------------------
# The decoder


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
        C, D = config.hidden_size, config.head_dim
        self.index, self.kind, self.head_dim = index, config.layer_types[index], D
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping
        self.q_proj = Linear(C, config.num_attention_heads * D)
        self.k_proj = Linear(C, config.num_key_value_heads * D)
        self.v_proj = Linear(C, config.num_key_value_heads * D)
        self.o_proj = Linear(config.num_attention_heads * D, C)
        if config.model_type == "gemma3_text":  # each head's queries and keys are normalised
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, angles, masks, cache=None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))  # [B, T, N, D]
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # [B, T, K, D]
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q, k = rotate(q, *angles[self.kind]), rotate(k, *angles[self.kind])
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
        C, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(C, eps)
        self.post_attention_layernorm = RMSNorm(C, eps)
        self.pre_feedforward_layernorm = RMSNorm(C, eps)
        self.post_feedforward_layernorm = RMSNorm(C, eps)
        self.checkpointing = False  # recompute activations in the backward pass, or keep them

    def forward(self, *args):
        return recomputed(self._forward, *args) if self.checkpointing else self._forward(*args)

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

    def logps(self, forest, rows, slots, targets):
        """Log-probabilities, float32 [P], of targets predicted in (rows, slots), all int64 [P]."""
        masks = tree_masks(forest.positions, forest.ends, self)
        tied = []
        hidden = self.hidden(forest.tokens, forest.positions, masks, at=(rows, slots), tied=tied)
        softcap = self.config.final_logit_softcapping
        return TokenLogps.apply(hidden, self.embed_tokens.weight, targets, softcap, tied)

    def set_checkpointing(self, on):
        for layer in self.layers:
            layer.checkpointing = on

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        """The model of a directory in Hugging Face's layout. Raises InputError."""
        with torch.device("meta"):
            model = cls(GemmaConfig.from_json(Path(directory) / "config.json")).to(dtype)
        model.to_empty(device=device)
        load_safetensors(base_weights(model), directory, prefix="model.")
        return model

    def save_pretrained(self, directory, max_shard_bytes=5_000_000_000):
        """Write config.json, generation_config.json and the weights in Hugging Face's layout.

        Other files in the directory stay. Every rank of a sharded model calls this; rank 0 writes.
        """
        save_model(self, Path(directory), max_shard_bytes)


Gemma2, Gemma2Config = Gemma, GemmaConfig  # their first names


# ----------------------------------------------------------------------------------------------------------------------
# Configuration
# What a config.json must say for this decoder to compute what transformers computes.

ARCHITECTURES = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
GELU = "gelu_pytorch_tanh"
CAPS = ["attn_logit_softcapping", "final_logit_softcapping"]
THETAS = {GLOBAL: "rope_theta", LOCAL: "rope_local_base_freq"}


def read_config(path):
    raw, beside = read_json(regular(Path(path))), regular(Path(path).with_name("generation_config.json"))
    source, generation = dict(raw), read_json(beside) if beside.exists() else {}
    if raw.get("model_type") not in [*ARCHITECTURES]:
        hint = " (text only, no pictures)" if raw.get("model_type") == "gemma3" else ""
        known = " or ".join(map(repr, ARCHITECTURES))
        raise InputError(f"{path}: model_type is {raw.get('model_type')!r}, expected {known}{hint}")
    if raw.get("use_bidirectional_attention"):
        raise InputError(f"{path}: use_bidirectional_attention is true, expected a model that reads from left to right")
    if raw.get("hidden_activation", GELU) != GELU:
        raise InputError(f"{path}: hidden_activation is {raw['hidden_activation']!r}, expected {GELU!r}")
    for key in ("rope_scaling", "rope_parameters"):  # the latter, of transformers 5, holds thetas too
        rope = raw.get(key) or {}
        by_kind = rope if isinstance(rope, dict) and (GLOBAL in rope or LOCAL in rope) else {GLOBAL: rope}
        for kind, name in THETAS.items():
            scheme = by_kind.get(kind, {})
            if not isinstance(scheme, dict) or scheme.get("rope_type", scheme.get("type", "default")) != "default":
                raise InputError(f"{path}: {key} is {rope!r}, expected an object with rope_type 'default'")
            raw[name] = scheme.get("rope_theta", raw.get(name))
    raw.setdefault("sliding_window_pattern", raw.get("_sliding_window_pattern"))
    if ends := id_list(raw.get("eos_token_id"), generation.get("eos_token_id")):
        raw["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    required = [f.name for f in fields(GemmaConfig) if f.default is MISSING] + CAPS * (raw["model_type"] == "gemma2")
    missing = [name for name in required if name not in raw]
    if missing:
        raise InputError(f"{path}: missing key {', '.join(map(repr, missing))}")

    def must(key, right, expected):
        if not right:
            raise InputError(f"{path}: {key} is {raw[key]!r}, expected {expected}")

    given = {f.name: raw[f.name] for f in fields(GemmaConfig) if f.name in raw}
    for f in fields(GemmaConfig):
        value = given.get(f.name, f.default)
        if f.type not in (str, list | None) and (value is not None or f.default is not None):
            real, lowest = f.type in (float, float | None), 0 if f.name.endswith("_token_id") else 1e-12
            numbers = value if f.type == int | list and isinstance(value, list) else [value]
            right = all(type(n) is int or real and type(n) is float for n in numbers)
            highest = 1000 if f.name == "num_hidden_layers" else 2**31
            right = right and all(lowest <= n <= highest for n in numbers)
            must(f.name, right, f"a {'number' if real else 'whole number'} above 0 and at most {highest}")
    config = GemmaConfig(**given)
    heads, layers, types = config.num_attention_heads, config.num_hidden_layers, config.layer_types
    must("num_key_value_heads", heads % config.num_key_value_heads == 0, f"a divisor of num_attention_heads {heads}")
    must("head_dim", config.head_dim % 2 == 0, "an even number")
    right = isinstance(types, list) and len(types) == layers and all(kind in (LOCAL, GLOBAL) for kind in types)
    must("layer_types", right, f"a list of {layers} times '{LOCAL}' or '{GLOBAL}'")
    config.source, config.generation = source, generation
    return config


def regular(path):
    """The path, unless something else than a file is there: a FIFO would be waited for. Raises InputError."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file, expected one")
    return path


def id_list(*values):
    """The ids of some values of eos_token_id, each of which may be a number, a list or null."""
    ids = [i for value in values for i in (value if isinstance(value, list) else [value])]
    return [i for n, i in enumerate(ids) if i is not None and i not in ids[:n]]


def config_json(config, dtype):
    rope = {kind: {"rope_type": "default", "rope_theta": getattr(config, key)} for kind, key in THETAS.items()}
    written = {
        **{key: value for key, value in config.source.items() if key != "dtype"},  # torch_dtype in transformers 5
        "architectures": [ARCHITECTURES[config.model_type]],
        **asdict(config),
        "rope_parameters": rope if config.model_type == "gemma3_text" else rope[GLOBAL],
        "hidden_activation": GELU,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if config.model_type == "gemma2":  # which has one theta
        del written["rope_local_base_freq"]
    return written


# ----------------------------------------------------------------------------------------------------------------------
# Masks and attention
# Who sees whom in a Forest, and attention over it, by blocks of queries on a CPU and by flex attention on a GPU.


def tree_masks(positions, ends, model):
    """Who sees whom in a Forest, {GLOBAL, LOCAL: mask}, in the form that `attend` takes on its device."""
    config, dtype = model.config, model.compute_dtype or model.embed_tokens.weight.dtype
    shape = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    make = tree_blocks
    if positions.is_cuda and flex_compiles(*shape, config.attn_logit_softcapping, dtype):
        make = tree_block_masks
    return make(positions, ends, config.sliding_window)


@cache
def flex_compiles(heads, kv_heads, head_dim, softcap, dtype, device="cuda"):
    """Whether flex attention compiles on this GPU, forward and backward; if not, it is said and blocks do."""

    def work():
        q, kv = (torch.zeros(2, n, 256, head_dim, dtype=dtype, device=device) for n in (heads, kv_heads))
        positions = torch.arange(256, device=device).expand(2, -1)
        mask = tree_block_masks(positions, torch.full_like(positions, 256), 256)[GLOBAL]
        attend(q.requires_grad_(), kv, kv, mask, 1.0, softcap).sum().backward()
        return True

    with torch.inference_mode(False), torch.enable_grad():
        return attempt(FLEX, work) or False


FAILED, FLEX = set(), "flex attention"  # optimisations that do not work on this machine; the name of one


def attempt(name, work):
    """work(); None where it fails, which is said once: what only makes a run faster must not end it."""
    if name in FAILED:
        return None
    try:
        return work()
    except torch.OutOfMemoryError:  # a smaller batch may do
        raise
    except Exception as error:  # a compiler's, of whatever kind
        FAILED.add(name)
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        print(f"{name} does not work on this machine, going on without it ({reason[:200]})", flush=True)
        return None


def tree_block_masks(positions, ends, window):
    def ancestor(batch, head, query, key):
        return (key <= query) & (query < ends[batch, key])

    def near(batch, head, query, key):
        return ancestor(batch, head, query, key) & (positions[batch, query] - positions[batch, key] < window)

    (B, T), sees = positions.shape, {GLOBAL: ancestor, LOCAL: near}
    return {kind: create_block_mask(sees[kind], B, None, T, T, device=positions.device) for kind in sees}


def tree_blocks(positions, ends, window, size=128):
    """The same by blocks of `size` queries: {GLOBAL, LOCAL: [(queries, keys, bias)]}. positions, ends: int64 [B, T].

    queries, keys: slices of t and s slots; bias [B, t, s]: 0, or -inf where a key is hidden. A token sees its ancestors
    and itself; in a window layer only window - 1 positions back. Keys end with a block's last query and begin with the
    first key that any of its queries sees.
    """
    blocks, T = {GLOBAL: [], LOCAL: []}, positions.shape[1]
    slots = torch.arange(T, device=positions.device)
    for start in range(0, T, size):
        stop = min(start + size, T)
        queries = slice(start, stop)
        visible = (slots[:stop] <= slots[queries, None]) & (slots[queries, None] < ends[:, None, :stop])
        near = positions[:, queries, None] - positions[:, None, :stop] < window
        for kind, seen in ((GLOBAL, visible), (LOCAL, visible & near)):
            first = int(seen.flatten(0, 1).any(0).int().argmax())
            blocks[kind].append((queries, slice(first, stop), torch.where(seen[:, :, first:], 0.0, NEVER)))
    return blocks


def attend(q, k, v, mask, scale, softcap):
    """Attention of q [B, N, T, D] over k, v [B, K, S, D]: [B, N, T, D]. mask: BlockMask or blocks, of `tree_masks`.

    Written out, since F.scaled_dot_product_attention takes 0.14 s where this takes 0.11 (270M, 1550 tokens, a layer
    forward and backward, 2 CPU cores), and 0.20 s on all queries at once, where it cannot skip what a trie hides.
    """
    if isinstance(mask, BlockMask):  # on a GPU: one fused kernel, which skips blocks that nothing sees
        kernel = compiled(flex_attention, dynamic=True) if q.is_cuda else flex_attention
        cap = softcap and (lambda score, batch, head, query, key: softcap * torch.tanh(score / softcap))
        options = kernel_options(q.device, q.shape[-1]) if q.is_cuda else None
        return kernel(q, k, v, cap, mask, scale, enable_gqa=True, kernel_options=options)
    q, out = q * scale, []
    for queries, keys, bias in mask:
        out.append(attend_block(q[:, :, queries], k[:, :, keys], v[:, :, keys], bias, softcap))
    return torch.cat(out, 2)


def attend_block(q, k, v, bias, softcap):
    """The same under one bias [B, T, S]. The query heads of a key head are stacked: keys are not expanded."""
    (B, N, T, D), K = q.shape, k.shape[1]
    scores = q.reshape(B, K, N // K * T, D) @ k.transpose(-1, -2)
    scores = soft_capped(scores, softcap).view(B, N, T, -1) + bias[:, None]
    weights = scores.softmax(-1).to(v.dtype).view(B, K, N // K * T, -1)
    return (weights @ v).view(B, N, T, D)


@cache
def kernel_options(device, head_dim):
    """Of flex attention. Its kernel for short queries has no valid size for one row of 65 to 127 tokens (torch 2.13).

    Cards with some 99 KiB of shared memory (L4, A10, L40S, RTX 4090) need smaller blocks for heads of 256.
    """
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    if head_dim > 128 and torch.cuda.get_device_properties(device).shared_memory_per_block_optin < 160 * 1024:
        options |= {"fwd_num_stages": 2, **{f"bwd_BLOCK_{name}": 32 for name in ("M1", "N1", "M2", "N2")}}
    return options


def compiled(function, **options):
    """The function as torch.compile makes it, again for each kind of batch: grad or none, one row or more, and so on.

    Beyond its usual limit of 8 versions torch would silently go on uncompiled, with all scores in memory. And it would
    make tensors of the caps, which flex attention cannot compile.
    """
    if torch._dynamo.config.recompile_limit < 64:  # in each thread: autograd has its own
        torch._dynamo.config.recompile_limit, torch._dynamo.config.specialize_float = 64, True
        warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo)")  # advice to those who write compilers
    return compile_once(function, **options)


compile_once = cache(torch.compile)


# ----------------------------------------------------------------------------------------------------------------------
# Large products
# What a line of PyTorch says, too slowly or with too much memory: a few rows by a large weight, all of the vocabulary.


class Linear(nn.Linear):
    """Without a bias, and by `product`; with adapters W x + scale B A x (LoRA, see below)."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        for name in ADAPTERS + STARTS:
            self.register_parameter(name, None)
        self.names, self.scale = ADAPTERS, 0.0

    def forward(self, x):
        out, (A, B) = product(x, self.weight), self.names
        A, B = getattr(self, A), getattr(self, B)
        return out if A is None else torch.add(out, product(product(x, A), B), alpha=self.scale)


def product(x, weight):
    """x [..., inputs] times weight [outputs, inputs] transposed: [..., outputs].

    4 to 15 rows, as in decoding, by blocks of a large weight, on a CPU in float32: F.linear takes up to 2.5 times as
    long (MKL), which makes a rollout of 8 rows 15 % longer (48 M parameters).
    """
    (outputs, inputs), rows, block = weight.shape, x.numel() // weight.shape[1], 32
    weight = weight.to(x.dtype)
    slow = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= 2**19 and 3 < rows < 16
    if not slow or outputs % block:
        return F.linear(x, weight)
    blocks = weight.view(-1, block, inputs).transpose(1, 2)
    parts = x.reshape(rows, inputs).expand(len(blocks), rows, inputs) @ blocks  # [outputs / 32, rows, 32]
    return parts.transpose(0, 1).reshape(*x.shape[:-1], outputs)


@torch.compiler.assume_constant_result
def rounded(number, dtype):
    """A Python number as near to another as the dtype can come."""
    return torch.tensor(number, dtype=dtype).item()


class TokenLogps(torch.autograd.Function):
    """Log-probabilities, float32 [P], of targets [P] from hidden states [P, C] and embedding [V, C].

    By parts of the vocabulary, computed again in the backward pass: only a part of the logits [P, V] is held at once,
    and each part of the embedding's gradient is written once, where it stays. `tied` is a list in which that gradient
    waits for `Lookup`: autograd would add up the embedding's two uses in new memory (270M: half of a step's time).
    """

    @staticmethod
    def forward(ctx, hidden, embedding, targets, softcap, tied):
        parts = TokenLogps.parts(hidden, embedding, softcap)
        norms = torch.stack([logits.logsumexp(-1) for _, _, logits in parts]).logsumexp(0)
        scores = (hidden.float() * embedding[targets].to(hidden.dtype)).sum(-1)
        scores = soft_capped(scores.to(hidden.dtype), softcap)  # rounded as those in the norms
        ctx.save_for_backward(hidden, embedding, targets, norms, scores)
        ctx.softcap, ctx.tied = softcap, tied
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


class Lookup(torch.autograd.Function):
    """Rows of a matrix. Their gradient is added to what `TokenLogps` has left in `tied`, if it has.

    A row may be taken several times: what plain indexing adds up on a CPU, or an embedding on a GPU, depends on which
    thread comes first.
    """

    @staticmethod
    def forward(ctx, tokens, embedding, tied):
        ctx.save_for_backward(tokens, embedding)
        ctx.tied = tied
        return F.embedding(tokens, embedding)

    @staticmethod
    def backward(ctx, grad):
        tokens, embedding = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, None
        waiting = ctx.tied.pop() if ctx.tied else None  # held here alone, so that autograd takes it without a copy
        embedding_grad = torch.zeros_like(embedding) if waiting is None else waiting
        add_rows(embedding_grad, tokens.flatten(), grad.flatten(0, -2))
        return None, embedding_grad if waiting is None else None, None


def add_rows(matrix, rows, values):
    """matrix[row] += value, of each, always in the same order: of the two ways each is so on one kind of device only.

    On a CPU index_put_ adds float32 from several threads at once; on a GPU, where it sorts, index_add_ does.
    """
    values = values.to(matrix.dtype)
    if matrix.is_cuda:
        matrix.index_put_((rows,), values, accumulate=True)
    else:
        matrix.index_add_(0, rows, values)


LOGITS_HELD = {"cpu": 2**20, "cuda": 2**27}  # on a CPU what its cache holds


def recomputed(function, *args):
    """function(*args), computed again in the backward pass instead of keeping what it holds in between."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


# ----------------------------------------------------------------------------------------------------------------------
# LoRA (arXiv 2106.09685)
# Beside a frozen weight W [out, in], trained in float32: lora_A [r, in] and lora_B [out, r]. B is zero at the start, so
# the model is then its base. The loss's reference is the same model with the adapters that it started from, or none.

ADAPTERS, STARTS = ("lora_A", "lora_B"), ("start_A", "start_B")
ORDINARY = """r lora_alpha target_modules peft_type task_type base_model_name_or_path inference_mode lora_dropout
    auto_mapping peft_version revision megatron_core qalora_group_size""".split()
STARTED = True, "gaussian", "orthogonal", "eva"  # init_lora_weights that leave the base as it is, as PiSSA does not
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class LoraConfig:
    """Keys of PEFT's adapter_config.json."""

    r: int
    lora_alpha: float  # scale = lora_alpha / r
    target_modules: list

    @classmethod
    def from_json(cls, path):
        """Of an adapter that PEFT or this project wrote. Raises InputError for what is not plain LoRA."""
        raw = read_json(path)
        for key, value in raw.items():
            known = key in ORDINARY or (key == "init_lora_weights" and value in STARTED)
            if value and value != "none" and not known:
                raise InputError(f"{path}: {ascii(key)[1:-1]} is {value!r}, expected plain LoRA")
        if raw.get("peft_type", "LORA") != "LORA":
            raise InputError(f"{path}: peft_type is {raw['peft_type']!r}, expected 'LORA'")
        r, alpha, targets = (raw.get(f.name) for f in fields(cls))
        if type(r) is not int or r < 1 or type(alpha) not in (int, float):
            raise InputError(f"{path}: r is {r!r} and lora_alpha {alpha!r}, expected numbers above 0, r whole")
        if not isinstance(targets, list) or not targets or not all(target in PROJECTIONS for target in targets):
            raise InputError(f"{path}: target_modules is {targets!r}, expected a list of {', '.join(PROJECTIONS)}")
        return cls(r, alpha, targets)

    def to_json(self, base):
        kind = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
        plain = {"bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False, "inference_mode": True}
        return {**kind, **asdict(self), **plain}


def add_adapters(model, lora, started=False):
    """Freeze a model, and give its target modules adapters; started: also those that it starts from, frozen."""
    model.requires_grad_(False)
    model.lora = lora
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in lora.target_modules:
            (outputs, inputs), module.scale = module.weight.shape, lora.lora_alpha / lora.r
            for names, trained in ((ADAPTERS, True), (STARTS, False))[: 1 + started]:
                for key, shape in zip(names, ((lora.r, inputs), (outputs, lora.r)), strict=True):
                    values = torch.zeros(shape, device=module.weight.device)
                    setattr(module, key, nn.Parameter(values, requires_grad=trained))


@torch.no_grad()
def init_adapters(model, seed):
    """A uniform in +-1 / sqrt(in), as in the published code, the same however the model is sharded; B zero."""
    for name, parameter in adapters(model).items():
        generator = torch.Generator().manual_seed(random.Random(f"{seed}/{name}").getrandbits(62))
        bound = parameter.shape[1] ** -0.5 if ".lora_A." in name else 0.0
        part, rows = local_slice(parameter)
        part.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)[rows])


def adapters(model, names=ADAPTERS):
    """{name as PEFT writes it: parameter}."""
    return {
        f"base_model.model.model.{module}.{peft}.weight": getattr(linear, name)
        for module, linear in model.named_modules() if isinstance(linear, Linear) and linear.lora_A is not None
        for name, peft in zip(names, ADAPTERS, strict=True)
    }  # fmt: skip


def base_weights(model):
    """{name: parameter} of all but adapters."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] not in ADAPTERS + STARTS}


@contextlib.contextmanager
def starting_adapters(model):
    """Within it the model computes as it did before training: with the adapters that it started from, or with none."""
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    for module in linears:
        module.names = STARTS
    try:
        yield
    finally:
        for module in linears:
            module.names = ADAPTERS


def save_adapters(model, directory, base):
    """adapter_config.json and adapter_model.safetensors, as PEFT and vLLM load them. Every rank calls this.

    base: the directory of the weights that they belong to.
    """
    target = directory if int(os.environ.get("RANK", 0)) == 0 else None
    if target:
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "adapter_config.json", model.lora.to_json(base))
    save_safetensors(adapters(model), target, "adapter_model", max_shard_bytes=math.inf)


@torch.no_grad()
def merge_adapters(model):
    """W becomes W + scale B A, computed in float32 and rounded once. The adapters must not be used afterwards."""
    for module in model.modules():
        if isinstance(module, Linear) and module.lora_A is not None:
            A = module.lora_A.full_tensor() if isinstance(module.lora_A, DTensor) else module.lora_A
            (weight, _), (B, _) = local_slice(module.weight), local_slice(module.lora_B)  # the same rows
            weight.copy_(weight.float() + module.scale * B.float() @ A.float())


# ----------------------------------------------------------------------------------------------------------------------
# Safetensors
# Weights in and out: strict, of a sharded model only the rows of this rank.


def local_slice(parameter):
    """(this rank's part of a parameter, which rows of the whole these are). fully_shard cuts along dimension 0."""
    if not isinstance(parameter, DTensor):
        return parameter, slice(0, parameter.shape[0] if parameter.ndim else 1)
    start, stop = 0, parameter.shape[0]
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():
            step = -(-(stop - start) // parameter.device_mesh.size(dim))
            first = min(start + step * parameter.device_mesh.get_local_rank(dim), stop)
            start, stop = first, min(first + step, stop)
    return parameter.to_local(), slice(start, stop)


def load_safetensors(tensors, directory, stem="model", prefix=""):
    """Fill `tensors`, name -> tensor (of a DTensor this rank's rows), from STEM.safetensors or its shards.

    Raises InputError that lists all missing, unexpected and mis-shaped tensors together.
    """
    directory = Path(directory)
    index = directory / f"{stem}.safetensors.index.json"
    names, where = [f"{stem}.safetensors"], directory / f"{stem}.safetensors"
    if index.exists():
        weight_map, where = read_json(regular(index)).get("weight_map"), index
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: weight_map is not an object that maps tensor names to file names")
        names = sorted(set(weight_map.values()))
    with contextlib.ExitStack() as stack:
        found, problems = {}, []
        for name in names:
            if Path(name).name != name:
                raise InputError(f"{index}: weight_map names {name!r}, expected a file beside it")
            try:
                file = stack.enter_context(safe_open(regular(directory / name), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{directory / name}: not readable as safetensors ({error})") from None
            for key in file.keys():
                problems += [f"{key} stands in two places"] if key.removeprefix(prefix) in found else []
                found[key.removeprefix(prefix)] = file, key
        if "lm_head.weight" in found and "embed_tokens.weight" in found:  # some writers store the tied head once more
            tied = found["lm_head.weight"], found["embed_tokens.weight"]
            if torch.equal(*(file.get_tensor(key) for file, key in tied)):
                del found["lm_head.weight"]
        slices = {name: file.get_slice(key) for name, (file, key) in found.items()}
        problems += [f"missing {name}" for name in tensors if name not in found]
        problems += [f"unexpected {name}" for name in found if name not in tensors]
        problems += [
            f"{name} is {part.get_dtype()} {part.get_shape()}, expected floats {list(tensors[name].shape)}"
            for name, part in slices.items()
            if name in tensors and (part.get_shape() != list(tensors[name].shape) or part.get_dtype() not in FLOATS)
        ]
        if problems:
            more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise InputError(f"{where}: does not hold the expected tensors: {'; '.join(problems[:12])}{more}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                file, key = found[name]
                part, rows = local_slice(tensor)
                part.copy_(slices[name][rows] if part.ndim else file.get_tensor(key))
                if part.numel() and not torch.stack(part.aminmax()).isfinite().all():  # 10 times as fast as each
                    raise InputError(f"{where}: {name} holds numbers that are not finite, expected finite ones")


def save_model(model, directory, max_shard_bytes):
    """`Gemma.save_pretrained`. Files are renamed into place when all are complete."""
    staging = directory / ".saving" if int(os.environ.get("RANK", 0)) == 0 else None
    if staging:
        remove_tree(staging)
        staging.mkdir(parents=True)
        write_json(staging / "config.json", model.config.to_json(model.embed_tokens.weight.dtype))
        ids = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(staging / "generation_config.json", {**model.config.generation, **ids})
    save_safetensors(base_weights(model), staging, "model", "model.", max_shard_bytes)
    if staging:
        new = sorted(path.name for path in staging.iterdir())
        for old in directory.glob("model*.safetensors*"):
            if old.name not in new:
                old.unlink()
        for name in reversed(new):  # config.json last
            (staging / name).replace(directory / name)
        staging.rmdir()


def save_safetensors(tensors, directory, stem, prefix="", max_shard_bytes=5_000_000_000):
    """Write `tensors` as STEM.safetensors, or as shards with an index when they are larger than one shard may be.

    Sharded tensors are gathered one at a time; rank 0, the writer (directory not None), holds a file's worth at most.
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    shards = [[]]
    for name in tensors:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        whole = {}
        for name in shard:
            tensor = tensors[name].detach()
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if directory:
                whole[prefix + name] = tensor.cpu().contiguous()
        if directory:
            save_file(whole, directory / file, metadata={"format": "pt"})
            (directory / file).chmod(0o644)  # safetensors makes files that their owner alone can read
    if directory and len(shards) > 1:
        weight_map = {prefix + name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / f"{stem}.safetensors.index.json", index)


def remove_tree(path):
    """Remove a directory or file, if it is there; of a link only the link.

    It is renamed first: whenever the process is killed, all of it is there or nothing.
    """
    aside = path.with_name(f".{path.name}.old")
    for there in (os.path.lexists(path), False):  # first what was left there by a process that was killed
        if aside.is_symlink() or aside.is_file():
            aside.unlink()
        elif aside.exists():
            shutil.rmtree(aside)
        if there:
            path.rename(aside)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and prompt formats
# SentencePiece with Gemma's control tokens; messages to tokens, as "plain" text or in the chat template.


class Tokenizer:
    """A SentencePiece model. `encode` never yields a control token for text that merely spells one."""

    def __init__(self, path):
        if not Path(path).exists():
            raise InputError(f"{path}: no such file, expected a model's directory, as Hugging Face publishes it")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(regular(Path(path))))
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: not readable as a SentencePiece model ({reason})") from None
        self.path, beside = Path(path), regular(Path(path).with_name("tokenizer_config.json"))
        self.config = read_json(beside) if beside.exists() else {}
        ids = self.sp.pad_id(), self.sp.eos_id(), self.sp.bos_id()
        self.pad_id, self.eos_id, self.bos_id = (i if i >= 0 else None for i in ids)  # None: not in the vocabulary
        self.start_of_turn_id, self.end_of_turn_id = map(self._find, ("<start_of_turn>", "<end_of_turn>"))
        self.control_ids = {self.pad_id, self.eos_id, self.bos_id, self.start_of_turn_id, self.end_of_turn_id} - {None}
        pieces = [re.escape(self.sp.id_to_piece(i)) for i in self.control_ids]
        self._control = re.compile("|".join(pieces) or "(?!)")

    def _find(self, piece):
        i = self.sp.piece_to_id(piece)
        return i if i >= 0 and self.sp.id_to_piece(i) == piece else None  # an unknown piece has the id of <unk>, or -1

    def __len__(self):
        return self.sp.get_piece_size()

    def encode(self, text, bos=False):
        """Token ids of a text. A control token spelt out in it is cut after its first character: it stays text."""
        cuts = [match.start() + 1 for match in self._control.finditer(text)]
        ids = [self.bos_id] if bos else []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            part = self.sp.encode(text[start:stop])
            if not self.control_ids.isdisjoint(part):  # a vocabulary that normalises: spelt with other signs
                part = [i for sign in text[start:stop] for i in self.sp.encode(sign) if i not in self.control_ids]
            ids += part
        return ids

    def decode(self, ids):
        return self.sp.decode([int(i) for i in ids if i < len(self)])


def is_chat(tokenizer, config):
    """Whether a checkpoint's files say that it talks in Gemma's chat template: replies end with a turn, not a line."""
    ends, turn = id_list(config.eos_token_id), tokenizer.end_of_turn_id
    template = "chat_template" in tokenizer.config or tokenizer.path.with_name("chat_template.jinja").exists()
    return turn is not None and (template or turn in ends) and not set(ends) & set(tokenizer.encode("\n"))


def check_vocabulary(tokenizer, model):
    if len(tokenizer) > model.config.vocab_size:
        limit = f"at most the model's vocab_size {model.config.vocab_size}"
        raise InputError(f"{tokenizer.path}: {len(tokenizer)} pieces, expected {limit}")


class Template:
    """Text to tokens, message by message, so that dialogues that begin alike begin with the same tokens.

    plain:  <bos>instruction / [context] / context / [conversation] / User: text / Assistant: text, a line each
    gemma:  <bos><start_of_turn>user / context, blank line, text<end_of_turn> / <start_of_turn>model / text<end_of_turn>
            token for token what transformers' apply_chat_template gives, white space around a text taken off
    """

    def __init__(self, tokenizer, prompt_format):
        self.tokenizer, self.plain, self.encode = tokenizer, prompt_format == "plain", tokenizer.encode
        self.newline = self.encode("\n")
        if tokenizer.bos_id is None or not self.newline:
            raise InputError(f"{tokenizer.path}: a prompt needs <bos> and newlines, this vocabulary lacks one of them")
        if not self.plain and None in (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id):
            raise InputError(f"{tokenizer.path}: no pieces <start_of_turn> and <end_of_turn>, which 'gemma' needs")
        self.end = self.newline if self.plain else [tokenizer.end_of_turn_id]
        self.opening = self.encode("Assistant:") if self.plain else self.turn("model")
        self.stop_ids = {self.end[-1], tokenizer.eos_id} - {None}
        self.newlines = {i for i in range(len(tokenizer)) if tokenizer.sp.id_to_piece(i).startswith("\n")}
        if self.plain:  # a message is one line; large vocabularies have pieces of several newlines, too
            self.stop_ids |= self.newlines

    def mark_stops(self, config):
        """Let a model's files name what ends a reply in this format, for programs that read no more than the files."""
        others = [i for i in id_list(config.eos_token_id) if i not in self.newlines]
        config.eos_token_id = id_list(others, sorted(self.stop_ids))

    def turn(self, role):
        return [self.tokenizer.start_of_turn_id, *self.encode(f"{role}\n")]

    def message(self, role, text):
        """[(tokens, whether the assistant wrote them), ...] of one message, all its markers included."""
        text = fold(text) if self.plain else text.strip()
        if self.plain and role == "user":
            return [(self.encode("User: " + text) + self.newline, False)]
        if self.plain:
            return [(self.opening, False), (self.encode(" " + text), True), (self.end, True)]
        if role == "user":
            return [(self.turn("user") + self.encode(text) + self.end + self.newline, False)]
        return [(self.opening, False), (self.encode(text), True), (self.end, True), (self.newline, False)]

    def prompt(self, pair, max_length):
        """Tokens that ask for the assistant's next message, at most `max_length` if that holds more than the markers.

        A longer prompt loses its oldest turns first, then the head of its context, in steps of an eighth of max_length,
        so that most turns of a dialogue still begin with the same tokens. A last user turn that is longer even alone
        loses its own head.
        """
        turns = [[token for tokens, _ in self.message(*message) for token in tokens] for message in pair.history]
        if self.plain:
            before = [self.tokenizer.bos_id, *self.encode(f"{pair.instruction}\n[context]\n")]
            head, context, after = [], self.encode(pair.context), self.encode("\n[conversation]\n")
        else:  # no system role: the context stands at the head of the first user turn, one text with its header
            before, after = [self.tokenizer.bos_id], []
            head = self.encode("user\n") if pair.context else []
            context = self.encode(f"user\n{pair.context}\n\n") if pair.context else []
        room = max_length - len(before) - len(after) - len(self.opening) + len(head)  # the first turn has it too
        users = [i for i, (role, _) in enumerate(pair.history) if role == "user"]
        kept = 0 if self.plain else users[0]  # Gemma's template begins with the user
        while kept < users[-1] and len(context) + sum(map(len, turns[kept:])) > room:
            kept = next(i for i in users if i > kept)
        turns = turns[kept:]
        excess, step = len(context) + sum(map(len, turns)) - room, max(1, max_length // 8)
        if excess > 0:
            context = head + context[len(head) + math.ceil(excess / step) * step :]
        if not self.plain and context:
            start = self.turn("user")
            turns[0], context = start[:1] + context + turns[0][len(start) :], []
        excess = sum(map(len, [before, context, after, *turns, self.opening])) - max_length
        if excess > 0:
            mark = self.encode("User:") if self.plain else self.turn("user")
            end = len(turns[-1]) - len(self.end if self.plain else self.end + self.newline)
            turns[-1] = mark + turns[-1][min(len(mark) + excess, end) :]
        return [token for tokens in (before, context, after, *turns, self.opening) for token in tokens]

    def reply(self, messages, ended=True):
        """(tokens, mask) of a trajectory that follows `prompt`; mask: 1 where the assistant wrote the token.

        ended: whether the assistant closed its last message, so that an end token is there to be scored.
        """
        pieces = [piece for message in messages for piece in self.message(*message)][1:]  # the prompt has the opening
        while pieces and not pieces[-1][1]:  # nothing after the last reply
            pieces.pop()
        if not ended:
            pieces.pop()
        tokens = [token for tokens, _ in pieces for token in tokens]
        return tokens, [int(written) for tokens, written in pieces for _ in tokens]

    def following(self, messages):
        """All tokens of messages that follow `prompt`, up to the opening of the assistant's next."""
        pieces = [piece for message in messages for piece in self.message(*message)][1:]
        return [token for tokens, _ in pieces for token in tokens] + self.opening

    def text(self, tokens):
        """A response as a message's text."""
        return self.tokenizer.decode(tokens).strip()


# ----------------------------------------------------------------------------------------------------------------------
# Generation
# Batched sampling, with a key/value cache that outlives a reply.


class KVCache:
    """Keys and values of a batch of growing sequences; the caller owns it and may hand it to `generate` again.

    keys[layer], values[layer]: [B, K, S, D]. A row's slot is its token's position, so rows are aligned at the left and
    need no padding in front. tokens[b] are the tokens that row b holds. Rows may trade places while decoding: order[b]
    says which prompt the row belongs to.
    """

    multiple = 64  # of slots: a GPU's products are slow where rows do not begin at multiples of 16 bytes

    def __init__(self):
        self.keys, self.values, self.tokens, self.order = [], [], [], []
        self.steps = {}  # on a GPU: number of rows -> CapturedStep

    def prefill(self, model, prompts, room):
        """Fill an empty cache, what prompts share computed once, with room for more. Returns the next logits [B, V]."""
        device = model.embed_tokens.weight.device
        forest = Forest(prompts).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        rows = torch.tensor([row for row, _ in forest.paths])[:, None]
        slots = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        room += -(slots.shape[1] + room) % self.multiple
        for b, (_, path) in enumerate(forest.paths):
            slots[b, : len(path)] = torch.from_numpy(path)
        last = rows[:, 0].to(device), slots.gather(1, lengths[:, None] - 1)[:, 0].to(device)
        rows, slots = rows.to(device), slots.to(device)

        def copy_branches(layer, k, v):
            for store, x in ((self.keys, k), (self.values, v)):
                store.append(F.pad(x[rows, :, slots].transpose(1, 2), (0, 0, 0, room)))
            return k, v

        masks = tree_masks(forest.positions, forest.ends, model)
        hidden = model.hidden(forest.tokens, forest.positions, masks, copy_branches, last)
        self.tokens, self.order = [list(prompt) for prompt in prompts], list(range(len(prompts)))
        return model.logits(hidden)

    def rewind(self, prompts):
        """Make each row hold a beginning of its prompt, forgetting what differs. Returns what is left, a list a row."""
        tails = []
        for row, prompt in enumerate(self.order):
            held = common_prefix(self.tokens[row], prompts[prompt][:-1])
            self.tokens[row] = prompts[prompt][:held]
            tails.append(prompts[prompt][held:])
        return tails

    def advance(self, model, new, room=1):
        """Append the token lists `new` to the first len(new) rows. Returns the logits after each row's last, [B, V].

        room, at least 1: free slots to keep behind each row, lest the cache move too often.
        """
        held, T = [len(tokens) for tokens in self.tokens[: len(new)]], max(map(len, new))
        for tokens, tail in zip(self.tokens, new, strict=False):
            tokens.extend(tail)
        end = max(held) + T
        lacking = end + room - self.keys[0].shape[2]
        if lacking > 0:
            lacking += -(end + room) % self.multiple
            self.steps = {}  # they hold the old tensors, which go one by one
            for store in (self.keys, self.values):
                for layer, x in enumerate(store):
                    store[layer] = F.pad(x, (0, 0, 0, lacking))
        if T == 1 and self._captures():
            logits = self._decode(model, [new, [[start] for start in held]])
            if logits is not None:
                return logits
        device = self.keys[0].device
        tokens = torch.tensor([tail + [0] * (T - len(tail)) for tail in new], device=device)  # zeros: unused slots
        positions = torch.tensor(held, device=device)[:, None] + torch.arange(T, device=device)
        last = torch.tensor([len(tail) - 1 for tail in new], device=device)
        first = max(0, min(held) - model.config.sliding_window + 1)
        spans = {GLOBAL: slice(0, end), LOCAL: slice(first, end)}
        return extend(model, *self._rows(len(new)), tokens, positions, last, spans)

    def _captures(self):
        """Whether steps of one token are recorded."""
        return self.keys[0].is_cuda

    def _decode(self, model, inputs):
        """A step of one token a row by a graph for 4, 16, 64, ... rows or all; rows that are done go along."""
        active, rows = len(inputs[0]), 4
        while rows < active:
            rows *= 4
        rows = min(rows, len(self.tokens))
        idle = self.tokens[active:rows]
        inputs = torch.tensor([inputs[0] + [[0] for _ in idle], inputs[1] + [[len(tokens)] for tokens in idle]])
        if rows not in self.steps:
            self.steps[rows] = attempt("a recorded step", lambda: CapturedStep(model, *self._rows(rows), inputs))
        return self.steps[rows](inputs)[:active] if self.steps[rows] else None

    def _rows(self, count):
        """Keys and values of the first rows."""
        return ([x[:count] for x in store] for store in (self.keys, self.values))

    def swap(self, a, b):
        """Two rows trade places."""
        for x in self.keys + self.values:
            x[[a, b]] = x[[b, a]]
        for held in (self.tokens, self.order):
            held[a], held[b] = held[b], held[a]

    @torch.inference_mode()  # as in `generate`: a step compiled for such tensors is not compiled again for others
    def keep(self, prompts):
        """Keep the rows of these prompts only (numbers as of the last call), in this order."""
        rows = [self.order.index(prompt) for prompt in prompts]
        self.steps = {}
        for store in (self.keys, self.values):
            for layer, x in enumerate(store):
                store[layer] = x[rows]
        self.tokens, self.order = [self.tokens[row] for row in rows], list(range(len(rows)))


def extend(model, keys, values, tokens, positions, last, spans):
    """Put `tokens` at `positions`, int64 [B, T], of a cache of B rows; logits [B, V] after each one's token `last` [B].

    keys, values: a tensor [B, K, S, D] for each layer; spans {GLOBAL, LOCAL: a slice of all slots that any token sees}.
    """
    device, window, masks = tokens.device, model.config.sliding_window, {}
    rows, slots = torch.arange(len(tokens), device=device)[:, None], torch.arange(keys[0].shape[2], device=device)
    for kind, span in spans.items():
        distance = positions[:, :, None] - slots[span]
        seen = (distance >= 0) & (distance < window) if kind == LOCAL else distance >= 0
        masks[kind] = [(slice(None), slice(None), torch.where(seen, 0.0, NEVER))]

    def write(layer, k, v):
        for store, x in ((keys[layer], k), (values[layer], v)):
            store[rows, :, positions] = x.transpose(1, 2)
        span = spans[model.config.layer_types[layer]]
        return keys[layer][:, :, span], values[layer][:, :, span]

    return model.logits(model.hidden(tokens, positions, masks, write, (rows[:, 0], last)))


class CapturedStep:
    """`extend` by one token a row, compiled and recorded as a CUDA graph: one launch a step, not one a kernel."""

    def __init__(self, model, keys, values, inputs):
        """inputs: tokens and positions, int64 [2, B, 1]."""
        self.inputs, step = inputs.to(keys[0].device), compiled(extend, fullgraph=True)
        tokens, positions = self.inputs
        last, everything = torch.zeros_like(tokens[:, 0]), {GLOBAL: slice(None), LOCAL: slice(None)}
        for x, dims in [(x, 0) for x in (tokens, positions, last)] + [(x, (0, 2)) for x in keys + values]:
            torch._dynamo.maybe_mark_dynamic(x, dims)  # one compilation for all numbers of rows above one, and of slots
        self.arguments = model, keys, values, tokens, positions, last, everything  # kept: a graph knows addresses only
        step(*self.arguments)  # compiles; what it writes will be written again by the first replay
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # not torch.cuda.graph, which empties the allocator's cache each time
            self.graph.capture_begin(capture_error_mode="thread_local")  # NCCL's own thread may use the GPU
            try:
                self.logits = step(*self.arguments)
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, inputs):
        self.inputs.copy_(inputs)
        self.graph.replay()
        return self.logits


@torch.inference_mode()
def generate(
    model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_ids=(), generator=None, kv_cache=None
):
    """Continue token lists of different lengths; returns the new tokens of each, without the stop token.

    A row was cut, rather than stopping by itself, exactly if it has max_new_tokens tokens (one whose stop token would
    have come next counts as cut). temperature 0 is greedy; top_k 0 and top_p 1 keep the whole distribution. A row's
    result does not depend on the other rows: each draws its own noise, from `generator[i]` if that is a list, else from
    a stream made for row i from `generator` (None: seed 0). A `kv_cache` of an earlier call (KVCache() at first) is
    continued: of prompt i, only the tokens that its row does not hold yet are processed. Finished rows leave the batch.
    """
    if not all(prompts):
        raise InputError("an empty prompt, expected at least one token (the <bos> token, say)")
    if min(temperature, top_k, max_new_tokens) < 0:
        values = f"temperature {temperature}, top_k {top_k}, max_new_tokens {max_new_tokens}"
        raise InputError(f"{values}: expected numbers from 0")
    prompts = [list(prompt) for prompt in prompts]
    cache = KVCache() if kv_cache is None else kv_cache
    held = len(cache.order)
    assert held in (0, len(prompts)), f"the cache holds {held} rows for {len(prompts)} prompts: call keep() first"
    stop, outputs = set(stop_ids), [[] for _ in prompts]
    if max_new_tokens == 0 or not prompts:
        return outputs
    noise = draw_noise(generator, len(prompts), max_new_tokens) if temperature > 0 else None
    if held:
        logits = cache.advance(model, cache.rewind(prompts), max_new_tokens)
    else:
        logits = cache.prefill(model, prompts, max_new_tokens)
    active = len(prompts)  # rows 0 .. active-1 of the cache are still being written
    for step in range(max_new_tokens):
        u = noise[cache.order[:active], step].to(logits.device) if temperature > 0 else None
        tokens = sample(logits, u, temperature, top_k, top_p).tolist()
        for row in reversed(range(active)):
            if tokens[row] in stop:
                active -= 1
                cache.swap(row, active)
                tokens[row] = tokens[active]
            else:
                outputs[cache.order[row]].append(tokens[row])
        if active == 0 or step + 1 == max_new_tokens:
            break
        logits = cache.advance(model, [[token] for token in tokens[:active]])
    return outputs


def draw_noise(generator, rows, steps):
    """Uniform numbers, float64 [rows, steps], from each of which a token is found by inverting the distribution."""
    if not isinstance(generator, list | tuple):
        generator = generator or torch.Generator().manual_seed(0)
        seeds = torch.randint(2**62, (rows,), generator=generator).tolist()
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    assert len(generator) == rows, f"{len(generator)} generators for {rows} prompts"
    return torch.stack([torch.rand(steps, generator=g, dtype=torch.float64) for g in generator])


def sample(logits, u, temperature, top_k, top_p):
    """One token a row, int64 [B], from logits [B, V] and uniform numbers u [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, ids = logits / temperature, None
    if top_k or top_p < 1:
        logits, ids = candidates(logits, top_k, top_p)
    pick = invert(logits.softmax(-1), u)
    return pick if ids is None else ids.gather(-1, pick[:, None])[:, 0]


def invert(weights, u, block=256):
    """For each row of weights [B, V] the first entry up to which they sum to more than the share u [B] of their sum.

    First among blocks, then within one: sums over a vocabulary, one by one in float64, are slow on any device.
    """
    below = 1 - 2**-52  # rounding must not lead to an entry of weight 0
    blocks = F.pad(weights, (0, -weights.shape[1] % block)).unflatten(1, (-1, block))
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = (u.clamp(max=below) * ends[:, -1])[:, None]
    at = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)  # beyond it: not a number
    before = F.pad(ends, (1, 0)).gather(1, at)
    within = blocks.gather(1, at[..., None].expand(-1, 1, block))[:, 0].cumsum(-1, dtype=torch.float64)
    target = torch.minimum(target - before, within[:, -1:] * below)
    return (at * block + torch.searchsorted(within, target, right=True))[:, 0].clamp_(max=weights.shape[1] - 1)


def candidates(logits, top_k, top_p, guess=1024):
    """The most likely tokens' logits and ids, sorted; -inf beyond top_k or the smallest set of probability top_p."""
    V = logits.shape[-1]
    best, ids = logits.topk(min(top_k or guess, V))
    if top_p < 1:
        total = (best if top_k else logits).logsumexp(-1, keepdim=True)
        if not top_k and ((best - total).exp().sum(-1) < top_p).any():  # a flat distribution: the guess was too small
            best, ids = logits.sort(descending=True)
        before = (best - total).exp().cumsum(-1) - (best - total).exp()
        before[..., 0] = -1  # the most likely token always stays
        best = best.masked_fill(before >= top_p, NEVER)
    return best, ids


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# `python gemma.py MODEL_DIR`: talk with it. With --prompt TEXT: is this checkpoint sound?


@torch.inference_mode()
def stream(model, prompt, cache, room, temperature, stop_ids):
    """Yields up to `room` tokens that continue `prompt`, as they are sampled; the next call goes on with the cache."""
    logits = cache.advance(model, cache.rewind([prompt]), room) if cache.order else cache.prefill(model, [prompt], room)
    for _ in range(room):
        [token] = sample(logits, torch.rand(1, dtype=torch.float64).to(logits.device), temperature, 0, 1.0).tolist()
        if token in stop_ids:
            return
        yield token
        logits = cache.advance(model, [[token]])


def chat(model, template, context, limit, temperature):
    """A conversation in the terminal, until Ctrl-D raises EOFError. Ctrl-C ends a reply."""
    history, cache = [], KVCache()
    pair = Pair(context, history, action="", chosen=[], rejected=[], gold=[], target="")  # a prompt's part of one
    while True:
        said = input("> ")
        if not said.strip():
            continue
        history.append(("user", said))
        prompt = template.prompt(pair, max(1, model.config.max_position_embeddings - limit))
        tokens, text = [], ""
        try:
            for token in stream(model, prompt, cache, limit, temperature, template.stop_ids):
                tokens.append(token)
                shown, text = text, template.text(tokens).rstrip("\ufffd")  # a sign whose last bytes are to come
                print(text[len(shown) :], end="", flush=True)
        except KeyboardInterrupt:
            cache = KVCache()  # the old one may hold half a step
        print()
        history.append(("model", text))


def readable(argument):
    """A text of the command line, with a sign for each byte that is not UTF-8."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def main(arguments=None):
    speak_plainly()
    parser = argparse.ArgumentParser(description="Talk with a Gemma checkpoint, or continue a text with it.")
    parser.add_argument("model_dir", help="directory with config.json, *.safetensors and tokenizer.model")
    parser.add_argument("--prompt", type=readable, help="a text to continue; without it, a chat (Ctrl-D ends it)")
    parser.add_argument("--context", type=readable, default="", help="what a chat is about: its system text")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    devices = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    parser.add_argument("--device", default=devices[-1], choices=devices)
    args = parser.parse_args(arguments)
    for file in (sys.stdin, sys.stdout):
        file.reconfigure(errors="replace")
    try:
        if not (args.temperature >= 0 and args.max_new_tokens > 0):
            raise InputError("--temperature, --max_new_tokens: expected a number from 0 and one from 1")
        tokenizer = Tokenizer(Path(args.model_dir) / "tokenizer.model")
        model = Gemma.from_pretrained(args.model_dir, getattr(torch, args.dtype), args.device)
        check_vocabulary(tokenizer, model)
        positions = model.config.max_position_embeddings
        if args.prompt is None:
            if 2 * args.max_new_tokens > positions:
                raise InputError(f"--max_new_tokens {args.max_new_tokens}: expected at most {positions // 2} in a chat,"
                                 " half of the model's positions; the rest is for what was said")  # fmt: skip
            template = Template(tokenizer, "gemma" if is_chat(tokenizer, model.config) else "plain")
            with contextlib.suppress(EOFError, KeyboardInterrupt):
                chat(model, template, args.context, args.max_new_tokens, args.temperature)
            print()
            return 0
        stop = {tokenizer.eos_id, tokenizer.end_of_turn_id}
        prompt = tokenizer.encode(args.prompt, bos=True)
        [tokens] = generate(model, [prompt], args.max_new_tokens, args.temperature, stop_ids=stop)
    except InputError as error:
        print(f"gemma.py: error: {error}", file=sys.stderr)
        return 2
    print(args.prompt + tokenizer.decode(tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
