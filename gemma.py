"""Gemma 2 in one file: configuration, decoder, safetensors in and out, SentencePiece tokenizer, batched generation.

    python gemma.py MODEL_DIR --prompt "Why is the sky blue?"      prints a continuation: is this checkpoint sound?

Parameters are named as in the published checkpoints, so loading is a strict copy without a table of names. Gemma 2's oddities
are noted where they happen: scaled embeddings, `1 + weight` norms (four a layer), soft-caps on attention scores and on logits,
a sliding window on every other layer. Sources: Gemma 2 (arXiv 2408.00118) and the published configurations.

Shapes: B rows, T tokens, S key slots, N query heads, K key/value heads, G = N / K, D head_dim, C hidden_size, V vocab_size.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

LOCAL, GLOBAL = "sliding_attention", "full_attention"
NEVER = float("-inf")


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: where, what was found, what was expected."""


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class Gemma2Config:
    """The fields of a Hugging Face config.json of `model_type: gemma2` that change what is computed."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # not hidden_size / num_attention_heads in Gemma 2
    query_pre_attn_scalar: float  # queries are scaled by its square root's inverse; 144 in the 27B, whose head_dim is 128
    sliding_window: int
    attn_logit_softcapping: float
    final_logit_softcapping: float
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192
    pad_token_id: int = 0
    eos_token_id: int | list = 1
    bos_token_id: int = 2
    layer_types: list | None = None  # default: sliding, full, sliding, full, ...

    def __post_init__(self):
        if self.layer_types is None and isinstance(self.num_hidden_layers, int):
            self.layer_types = [(LOCAL, GLOBAL)[i % 2] for i in range(self.num_hidden_layers)]

    @classmethod
    def from_json(cls, path):
        """Read a config.json of either dialect (`rope_theta` at the top or in `rope_parameters`). Raises InputError."""
        raw = read_json(path)
        rope = raw.get("rope_parameters") or {}
        if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
            raise InputError(f"{path}: rope_parameters is {rope!r}, expected an object with rope_type 'default'")
        raw = {"hidden_activation": "gelu_pytorch_tanh", **rope, **raw}
        for key, value in (("model_type", "gemma2"), ("hidden_activation", "gelu_pytorch_tanh")):
            if raw.get(key) != value:
                raise InputError(f"{path}: {key} is {raw.get(key)!r}, expected {value!r}")
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in raw]
        if missing:
            raise InputError(f"{path}: missing key {', '.join(map(repr, missing))}")
        config = cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})
        config._check(path)
        return config

    def _check(self, path):
        """Every number a number, and the few rules between them."""
        wrong = None
        for f in fields(self):
            value = getattr(self, f.name)
            types, lowest = ((int,), 0) if f.name.endswith("_token_id") else ((int, float) if f.type is float else (int,), 1e-12)
            numbers = value if f.name == "eos_token_id" and isinstance(value, list) else [value]
            if f.name != "layer_types" and not all(type(n) in types and n >= lowest for n in numbers):
                raise InputError(f"{path}: {f.name} is {value!r}, expected a {'number' if float in types else 'whole number'} above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            wrong = "num_key_value_heads", f"a divisor of num_attention_heads {self.num_attention_heads}"
        if self.head_dim % 2:
            wrong = "head_dim", "an even number"
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self, key) > 80:
                wrong = key, "at most 80, whose exponential a float32 still holds (no maximum is taken off capped scores)"
        types, layers = self.layer_types, self.num_hidden_layers
        if not isinstance(types, list) or len(types) != layers or not {LOCAL, GLOBAL}.issuperset(map(str, types)):
            wrong = "layer_types", f"a list of {layers} times '{LOCAL}' or '{GLOBAL}'"
        if wrong:
            raise InputError(f"{path}: {wrong[0]} is {getattr(self, wrong[0])!r}, expected {wrong[1]}")

    def to_json(self, dtype):
        """What transformers (4 and 5) and vLLM expect to find in config.json."""
        return {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            **asdict(self),
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }


def read_json(path):
    """A JSON object from a file. Raises InputError when the file is not there, not JSON or not an object."""
    try:
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Batches of sequences that share beginnings


class Forest:
    """Token sequences laid out so that what they share is computed once.

    Sequences that begin alike are merged into a trie, and tries that share nothing are packed side by side into rows, as long as the
    longest of them or up to half longer, where that leaves less empty. Inside a row a trie lies in depth-first order, so the
    descendants of the token in slot s are the slots s+1 .. ends[s]-1, and the token in slot t may attend to slot s exactly if
    s <= t < ends[s].

    tokens, positions, ends: int64 [R, T]; positions count along each branch. paths[i] = (row, slots of sequence i, in order).
    """

    def __init__(self, sequences):
        sequences = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        if not sequences or min(map(len, sequences)) == 0:
            raise InputError("a token sequence is empty, expected at least one token in each")
        tries = sorted(self._tries(sequences), key=lambda trie: -len(trie[0]))
        sizes = [len(trie[0]) for trie in tries]
        layouts = [self._pack(sizes, sizes[0] + sizes[0] * i // 16) for i in range(9)]
        count, width, places = min(layouts, key=lambda layout: layout[0] * layout[1])
        tokens = np.zeros((3, count, width), dtype=np.int64)
        tokens[2] = np.arange(1, width + 1)  # padding sees itself only
        self.paths = [None] * len(sequences)
        for (row, start), (trie_tokens, positions, ends, paths) in zip(places, tries, strict=True):
            tokens[:, row, start : start + len(ends)] = trie_tokens, positions, ends + start
            for i, slots in paths.items():
                self.paths[i] = (row, slots + start)
        self.tokens, self.positions, self.ends = torch.from_numpy(tokens)
        self.padding = 1 - sum(sizes) / (count * width)  # fraction of the slots that hold nothing

    @staticmethod
    def _pack(sizes, width):
        """Where tries of these sizes, longest first, go in rows of up to `width`: (rows, their width, [(row, start)]), first fit."""
        used, places = [], []
        for size in sizes:
            row = next((r for r, n in enumerate(used) if n + size <= width), len(used))
            used += [0] * (row == len(used))
            places.append((row, used[row]))
            used[row] += size
        return len(used), max(used), places

    @staticmethod
    def _tries(sequences):
        """Yield (tokens, positions, ends, {sequence: slots}) for each trie. In sorted order a sequence shares most with its neighbour."""
        trie, previous = None, sequences[0][:0]
        for i in sorted(range(len(sequences)), key=lambda i: sequences[i].tolist()):
            sequence = sequences[i]
            n = min(len(previous), len(sequence))
            differs = previous[:n] != sequence[:n]
            shared = int(differs.argmax()) if differs.any() else n
            if trie is None or 2 * shared < n:  # sharing less than half is not worth the attention over each other's slots
                if trie:
                    yield Forest._close(trie)
                trie, shared = {"tokens": [], "positions": [], "size": 0, "ends": [], "paths": {}, "path": np.zeros(0, np.int64)}, 0
            trie["ends"].append((trie["path"][shared:], trie["size"]))  # the branch left behind ends here
            new = np.arange(len(sequence) - shared)
            trie["tokens"].append(sequence[shared:])
            trie["positions"].append(new + shared)
            trie["path"] = np.concatenate([trie["path"][:shared], new + trie["size"]])
            trie["size"] += len(new)
            trie["paths"][i] = trie["path"]
            previous = sequence
        yield Forest._close(trie)

    @staticmethod
    def _close(trie):
        ends = np.full(trie["size"], trie["size"], dtype=np.int64)
        for slots, end in trie["ends"]:
            ends[slots] = end
        return np.concatenate(trie["tokens"]), np.concatenate(trie["positions"]), ends, trie["paths"]

    def to(self, device):
        self.tokens, self.positions, self.ends = (x.to(device) for x in (self.tokens, self.positions, self.ends))
        return self


# ----------------------------------------------------------------------------------------------------------------------
# The decoder


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32 whatever the dtype of x."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x):
        return Normalize.apply(x, self.weight, self.eps) if torch.is_grad_enabled() else Normalize.compute(x, self.weight, self.eps)[0]


class Normalize(torch.autograd.Function):
    """What RMSNorm computes. With y = x / rms(x) and g = grad (1 + weight): dx = (g - y mean(g y)) / rms(x)."""

    @staticmethod
    def compute(x, weight, eps):
        y = x.float()
        scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        return (y * scale).mul_(1 + weight.float()).to(x.dtype), scale

    @staticmethod
    def forward(ctx, x, weight, eps):
        out, scale = Normalize.compute(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        y, grad = x.float() * scale, grad.float()
        product = grad * y
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        gain = 1 + weight.float()
        mean = (product @ gain).div_(len(gain))[..., None]
        return (grad * gain).addcmul_(y, mean, value=-1).mul_(scale).to(x.dtype), grad_weight, None


def rotary(positions, config):
    """cos and sin, float32 [B, 1, T, D], for positions [B, T]. The two halves of a head are rotated, not neighbouring pairs."""
    frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim)
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """The first half of `sin` has its sign turned, so that a rotated half needs no copy of its own."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attend(torch.autograd.Function):
    """Soft-capped attention in blocks of queries; nothing of the size [T, S] is kept for the backward pass, which computes it again.

    The G query heads of a key head are stacked along the query axis, so that keys are not expanded. Scores z = c tanh(q k / c) are
    bounded by the cap c, so exp(z) needs no maximum taken off: out = sum exp(z) v / n with n = sum exp(z). In the backward pass
    dz = p (dout v - dout out) with p = exp(z) / n, and d(q k) = dz (1 - (z / c)^2).
    """

    @staticmethod
    def forward(ctx, q, k, v, blocks, scale, softcap):
        """q [B, N, T, D], k and v [B, K, S, D]; blocks [(queries, keys, mask [B, t, s])] as `tree_blocks` makes them."""
        (B, N, T, D), K = q.shape, k.shape[1]
        q = (q * (scale / softcap)).view(B, K, N // K, T, D)
        out, norms = torch.empty_like(q), torch.empty(q.shape[:4], device=q.device)
        for queries, keys, mask in blocks:
            weights = Attend.scores(q, k, queries, keys).mul_(softcap).exp_().mul_(mask[:, None, None])
            norm = weights.sum(-1, keepdim=True)
            t, s = weights.shape[3:]
            values = weights.to(v.dtype).view(B, K, -1, s) @ v[:, :, keys]
            out[:, :, :, queries] = values.view(B, K, -1, t, D).div_(norm)
            norms[:, :, :, queries] = norm[..., 0]
        ctx.save_for_backward(q, k, v, out, norms)
        ctx.rest = blocks, scale, softcap
        return out.view(B, N, T, D)

    @staticmethod
    def scores(q, k, queries, keys):
        """tanh of the scaled products, float32 [B, K, G, t, s]."""
        part = q[:, :, :, queries]
        B, K, G, t, D = part.shape
        return (part.reshape(B, K, G * t, D) @ k[:, :, keys].transpose(-1, -2)).float().tanh_().view(B, K, G, t, -1)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, norms = ctx.saved_tensors
        blocks, scale, softcap = ctx.rest
        grad = grad.reshape(out.shape)
        means = (grad * out).sum(-1, keepdim=True, dtype=torch.float32).div_(norms[..., None])
        grad = (grad / norms[..., None]).to(v.dtype)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        B, K, G, T, D = q.shape
        for queries, keys, mask in blocks:
            tanh = Attend.scores(q, k, queries, keys)
            weights = (tanh * softcap).exp_().mul_(mask[:, None, None])
            t, s = weights.shape[3:]
            flat = B, K, G * t, s
            part = grad[:, :, :, queries].reshape(B, K, G * t, D)
            dv[:, :, keys] += weights.to(v.dtype).view(flat).transpose(-1, -2) @ part
            slope = (part @ v[:, :, keys].transpose(-1, -2)).float().view(weights.shape)
            slope.sub_(means[:, :, :, queries]).mul_(weights)
            slope.addcmul_(slope, tanh.square_(), value=-1)
            slope = slope.to(q.dtype).view(flat)
            dq[:, :, :, queries] = (slope @ k[:, :, keys]).view(B, K, G, t, D)
            dk[:, :, keys] += slope.transpose(-1, -2) @ q[:, :, :, queries].reshape(B, K, G * t, D)
        return dq.mul_(scale).view(B, K * G, T, D), dk.mul_(softcap), dv, None, None, None


def flex_attend(q, k, v, mask, scale, softcap):
    """The same by one fused kernel, on a GPU; mask is a BlockMask of `tree_masks`. Blocks that nothing sees are not computed."""
    kernel = compiled(flex_attention, dynamic=True) if q.is_cuda else flex_attention

    def cap(score, batch, head, query, key):
        return softcap * torch.tanh(score / softcap)

    return kernel(q, k, v, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=True)


def compiled(function, **options):
    """The function as torch.compile makes it, again for each kind of batch: grad or none, one row or more, one block of keys or more.

    Beyond its usual limit of 8 versions torch would silently go on uncompiled, with all scores in memory. And it would make tensors of
    the caps, which flex attention cannot compile.
    """
    if torch._dynamo.config.recompile_limit < 64:  # in each thread: autograd has its own
        torch._dynamo.config.recompile_limit, torch._dynamo.config.specialize_float = 64, True
    return compile_once(function, **options)


compile_once = cache(torch.compile)


def product(x, weight):
    """x [..., inputs] times weight [outputs, inputs] transposed: [..., outputs].

    By blocks of the weight where a CPU is faster so: up to 2.5 times for 4 to 15 rows and a large float32 weight (MKL, 1 and 2 threads).
    """
    (outputs, inputs), rows, block = weight.shape, x.numel() // weight.shape[1], 32
    large = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= 2**19 and outputs % block == 0
    if not (large and 3 < rows < 16):
        return F.linear(x, weight)
    parts = x.reshape(rows, inputs).expand(outputs // block, rows, inputs) @ weight.view(-1, block, inputs).transpose(1, 2)
    return parts.transpose(0, 1).reshape(*x.shape[:-1], outputs)


class Linear(nn.Linear):
    """Without a bias."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return product(x, self.weight)


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.index, self.kind, self.head_dim = index, config.layer_types[index], D
        self.scale, self.softcap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
        self.q_proj = Linear(C, config.num_attention_heads * D)
        self.k_proj = Linear(C, config.num_key_value_heads * D)
        self.v_proj = Linear(C, config.num_key_value_heads * D)
        self.o_proj = Linear(config.num_attention_heads * D, C)

    def forward(self, x, cos, sin, masks, cache):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache(self.index, k, v)
        attend = flex_attend if isinstance(masks[self.kind], BlockMask) else Attend.apply
        out = attend(q, k, v, masks[self.kind], self.scale, self.softcap)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, H)
        self.up_proj = Linear(C, H)
        self.down_proj = Linear(H, C)

    def forward(self, x):
        gate, up = F.gelu(self.gate_proj(x), approximate="tanh"), self.up_proj(x)
        return self.down_proj(gate * up if torch.is_grad_enabled() else gate.mul_(up))


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
        self.checkpointing = False  # recompute this layer in the backward pass instead of keeping its activations

    def forward(self, x, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, *args, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, *args)

    def _forward(self, x, cos, sin, masks, cache=None, at=None):
        # Norms on both sides of each block: what is added to the residual stream is normalised too.
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin, masks, cache))
        if at is not None:
            x = x[at]
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class TokenLogps(torch.autograd.Function):
    """Log-probabilities of given tokens from hidden states, without ever holding more than a chunk of the V-wide logits.

    The backward pass recomputes each chunk from the saved log-normaliser: logits z = cap * tanh(h E^T / cap), and
    d logp / dz = onehot - softmax(z), d z / d(h E^T) = 1 - (z / cap)^2.
    """

    @staticmethod
    def forward(ctx, hidden, embedding, targets, softcap):
        """hidden [P, C], embedding [V, C], targets int64 [P]; returns float32 [P]."""
        logps, norms = (torch.empty(len(targets), device=hidden.device) for _ in range(2))
        for rows in TokenLogps.chunks(hidden, embedding):
            logits = TokenLogps.logits(hidden[rows], embedding, softcap)
            logps[rows] = logits.gather(-1, targets[rows, None])[:, 0]
            norms[rows] = logits.exp_().sum(-1).log_()  # the cap bounds the logits, so no maximum need be taken off
        logps -= norms
        ctx.save_for_backward(hidden, embedding, targets, norms)
        ctx.softcap = softcap
        return logps

    @staticmethod
    def backward(ctx, grad):
        hidden, embedding, targets, norms = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        chunks = TokenLogps.chunks(hidden, embedding)
        dtype = embedding.dtype if len(chunks) == 1 else torch.float32  # sums over several chunks are in float32
        grad_embedding = torch.zeros_like(embedding, dtype=dtype)
        for rows in chunks:
            logits = TokenLogps.logits(hidden[rows], embedding, ctx.softcap)
            delta = (logits - norms[rows, None]).exp_().neg_()
            delta.scatter_add_(-1, targets[rows, None], torch.ones_like(delta[:, :1]))
            delta.mul_(grad[rows, None])
            delta = delta.addcmul_(delta, logits.square_(), value=-(ctx.softcap**-2)).to(embedding.dtype)
            grad_hidden[rows] = delta @ embedding
            if grad_embedding.dtype == embedding.dtype:
                grad_embedding.addmm_(delta.T, hidden[rows])
            else:
                grad_embedding += delta.T @ hidden[rows]
        return grad_hidden, grad_embedding.to(embedding.dtype), None, None

    @staticmethod
    def logits(hidden, embedding, softcap):
        return (hidden @ embedding.T).float().div_(softcap).tanh_().mul_(softcap)

    @staticmethod
    def chunks(hidden, embedding, entries=None):
        entries = entries or max(2**28 if hidden.is_cuda else 2**22, 64 * len(embedding))  # float32 logits held at once
        step = max(1, entries // len(embedding))
        return [slice(i, i + step) for i in range(0, len(hidden), step)]


@torch.compiler.assume_constant_result
def rounded(number, dtype):
    """A Python number as near to another as the dtype can come."""
    return torch.tensor(number, dtype=dtype).item()


def soft_capped(logits, softcap):
    return torch.tanh(logits.float() / softcap) * softcap


class Gemma2(nn.Module):
    """The decoder, its output head tied to the embedding. A new model is initialised at random (torch's global generator)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def hidden(self, tokens, positions, masks, cache=None, at=None):
        """The last hidden states [B, T, C]. masks: as `tree_masks` makes them; cache: (layer, k, v) -> the k, v to attend to.

        at, (rows, slots) int64 [P] both: the hidden states [P, C] of these tokens only; the last MLP is computed for no others.
        """
        x = self.embed_tokens(tokens)
        x = x * rounded(self.config.hidden_size**0.5, x.dtype)  # as the checkpoints expect
        cos, sin = rotary(positions, self.config)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, cos, sin, masks, cache)
        return self.norm(last(x, cos, sin, masks, cache, at))

    def logits(self, hidden):
        """Soft-capped float32 logits [..., V] of hidden states [..., C]."""
        return soft_capped(product(hidden, self.embed_tokens.weight), self.config.final_logit_softcapping)

    def forward(self, tokens):
        """int64 [B, T] -> float32 logits [B, T, V]; every row starts at position 0."""
        assert tokens.ndim == 2 and tokens.dtype == torch.int64, f"tokens: int64 [batch, time], not {tokens.dtype} {list(tokens.shape)}"
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        ends = torch.full_like(tokens, tokens.shape[1])
        return self.logits(self.hidden(tokens, positions, tree_masks(positions, ends, self.config.sliding_window)))

    def logps(self, forest, rows, slots, targets):
        """Log-probabilities, float32 [P], of `targets` as predicted in (`rows`, `slots`) of a Forest; all int64 [P]."""
        masks = tree_masks(forest.positions, forest.ends, self.config.sliding_window)
        hidden = self.hidden(forest.tokens, forest.positions, masks, at=(rows, slots))
        return TokenLogps.apply(hidden, self.embed_tokens.weight, targets, self.config.final_logit_softcapping)

    def set_checkpointing(self, on):
        for layer in self.layers:
            layer.checkpointing = on

    # -- safetensors in and out

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        """Read config.json and model.safetensors, or the shards of model.safetensors.index.json. Raises InputError."""
        with torch.device("meta"):
            model = cls(Gemma2Config.from_json(Path(directory) / "config.json")).to(dtype)
        model.to_empty(device=device)
        load_safetensors(dict(model.named_parameters()), directory, prefix="model.")
        return model

    def save_pretrained(self, directory, max_shard_bytes=5_000_000_000):
        """Write config.json, generation_config.json and the weights, as transformers and vLLM read them.

        Files are renamed into place when all are complete; other files in the directory stay. Of a sharded model every rank must
        call this; rank 0 writes.
        """
        directory = Path(directory)
        staging = directory / ".saving" if int(os.environ.get("RANK", 0)) == 0 else None
        if staging:
            remove_tree(staging)
            staging.mkdir(parents=True)
            write_json(staging / "config.json", self.config.to_json(self.embed_tokens.weight.dtype))
            ids = {key: getattr(self.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            write_json(staging / "generation_config.json", ids)
        save_safetensors(dict(self.named_parameters()), staging, "model", "model.", max_shard_bytes)
        if staging:
            new = sorted(path.name for path in staging.iterdir())
            for old in directory.glob("model*.safetensors*"):
                if old.name not in new:
                    old.unlink()
            for name in reversed(new):  # config.json last
                (staging / name).replace(directory / name)
            staging.rmdir()


# ----------------------------------------------------------------------------------------------------------------------
# Masks


def tree_masks(positions, ends, window):
    """Who sees whom in a Forest, {GLOBAL, LOCAL: mask}, in the form that the attention of the device takes."""
    return tree_block_masks(positions, ends, window) if positions.is_cuda else tree_blocks(positions, ends, window)


def tree_block_masks(positions, ends, window):
    """Flex attention's BlockMasks of a Forest."""

    def ancestor(batch, head, query, key):
        return (key <= query) & (query < ends[batch, key])

    def near(batch, head, query, key):
        return ancestor(batch, head, query, key) & (positions[batch, query] - positions[batch, key] < window)

    (B, T), device = positions.shape, positions.device
    return {kind: create_block_mask(sees, B, None, T, T, device=device) for kind, sees in ((GLOBAL, ancestor), (LOCAL, near))}


def tree_blocks(positions, ends, window, size=128):
    """Who sees whom in a Forest, by blocks of `size` queries: {GLOBAL, LOCAL: [(queries, keys, mask [B, t, s])]}.

    positions, ends int64 [B, T]. A token sees its ancestors and itself; in a window layer only window - 1 positions back. Keys end with
    its last query and begin with the first key that any of its queries sees; mask is 1 where a query sees a key, else 0.
    """
    blocks, T = {GLOBAL: [], LOCAL: []}, positions.shape[1]
    slots = torch.arange(T, device=positions.device)
    for start in range(0, T, size):
        queries, stop = slice(start, min(start + size, T)), min(start + size, T)
        visible = (slots[:stop] <= slots[queries, None]) & (slots[queries, None] < ends[:, None, :stop])
        near = positions[:, queries, None] - positions[:, None, :stop] < window
        for kind, seen in ((GLOBAL, visible), (LOCAL, visible & near)):
            first = int(seen.flatten(0, 1).any(0).int().argmax())
            blocks[kind].append((queries, slice(first, stop), seen[:, :, first:].float()))
    return blocks


# ----------------------------------------------------------------------------------------------------------------------
# Safetensors


def local_slice(parameter):
    """(this rank's part of a parameter, the rows of the whole that it holds). Parts are cut along dimension 0, as fully_shard does."""
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
    """Fill `tensors` (name -> tensor or DTensor, of which only this rank's rows are read) from STEM.safetensors or its shards.

    Raises InputError that lists all missing, unexpected and mis-shaped tensors together.
    """
    directory = Path(directory)
    index = directory / f"{stem}.safetensors.index.json"
    names = shard_names(index) if index.exists() else [f"{stem}.safetensors"]
    where = index if index.exists() else directory / names[0]
    with contextlib.ExitStack() as stack:
        found = {}
        for name in names:
            try:
                file = stack.enter_context(safe_open(directory / name, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{directory / name}: not readable as safetensors ({error})") from None
            found.update({key.removeprefix(prefix): (file, key) for key in file.keys()})
        if "lm_head.weight" in found and "embed_tokens.weight" in found:  # some writers store the tied head once more
            head, embedding = (file.get_tensor(key) for file, key in (found["lm_head.weight"], found["embed_tokens.weight"]))
            if torch.equal(head, embedding):
                del found["lm_head.weight"]
        shapes = {name: list(file.get_slice(key).get_shape()) for name, (file, key) in found.items()}
        problems = [f"missing {name}" for name in tensors if name not in found]
        problems += [f"unexpected {name}" for name in found if name not in tensors]
        problems += [
            f"{name} has shape {shapes[name]}, expected {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in found and shapes[name] != list(tensor.shape)
        ]
        if problems:
            more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise InputError(f"{where}: does not hold the expected tensors: {'; '.join(problems[:12])}{more}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                file, key = found[name]
                part, rows = local_slice(tensor)
                part.copy_(file.get_slice(key)[rows] if part.ndim else file.get_tensor(key))


def shard_names(index):
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map is not an object that maps tensor names to file names")
    return sorted(set(weight_map.values()))


def save_safetensors(tensors, directory, stem, prefix="", max_shard_bytes=5_000_000_000):
    """Write `tensors` as STEM.safetensors, or as shards with an index when they are larger than one shard may be.

    Sharded tensors are collected one at a time on rank 0, the writer (directory not None), which holds a shard of them at most.
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
            tensor = collected(tensors[name].detach())
            if directory:
                whole[prefix + name] = tensor.cpu().contiguous()
        if directory:
            save_file(whole, directory / file, metadata={"format": "pt"})
            (directory / file).chmod(0o644)  # safetensors makes files that their owner alone can read
    if directory and len(shards) > 1:
        weight_map = {prefix + name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / f"{stem}.safetensors.index.json", index)


def collected(tensor):
    """The whole of a sharded tensor on rank 0. The others send their rows, hold nothing more than them, and get None."""
    if not isinstance(tensor, DTensor):
        return tensor
    [group] = [tensor.device_mesh.get_group(dim) for dim, placement in enumerate(tensor.placements) if placement.is_shard()]
    part, ranks = tensor.to_local().contiguous(), dist.get_process_group_ranks(group)
    if len(ranks) == 1:
        return part
    if dist.get_rank():
        if ranks[0] == 0 and len(part):  # not in a copy of the sharded model
            dist.send(part, dst=0, group=group)
        return None
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=part.device)
    for rank, rows in zip(ranks, whole.chunk(len(ranks)), strict=False):  # no rows are left for the last ranks of a short tensor
        if rank:
            dist.recv(rows, src=rank, group=group)
        else:
            rows.copy_(part)
    return whole


def remove_tree(path):
    """Remove a directory or file, if it is there; of a link only the link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def write_json(path, value):
    """Write beside the target and rename, so that a reader never sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


class Tokenizer:
    """A SentencePiece model. `encode` never yields a control token for text that merely spells one."""

    def __init__(self, path):
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{path}: not readable as a SentencePiece model ({' '.join(str(error).split())})") from None
        self.path = Path(path)
        ids = self.sp.pad_id(), self.sp.eos_id(), self.sp.bos_id()
        self.pad_id, self.eos_id, self.bos_id = (i if i >= 0 else None for i in ids)  # None where the vocabulary lacks it
        self.start_of_turn_id, self.end_of_turn_id = map(self._find, ("<start_of_turn>", "<end_of_turn>"))
        control = [self.pad_id, self.eos_id, self.bos_id, self.start_of_turn_id, self.end_of_turn_id]
        pieces = [re.escape(self.sp.id_to_piece(i)) for i in control if i is not None]
        self._control = re.compile("|".join(pieces) or "(?!)")

    def _find(self, piece):
        i = self.sp.piece_to_id(piece)
        return i if self.sp.id_to_piece(i) == piece else None  # an unknown piece has the id of <unk>

    def __len__(self):
        return self.sp.get_piece_size()

    def encode(self, text, bos=False):
        """Token ids of a text. A control token spelt out in it is cut after its first character, so that it stays text."""
        cuts = [match.start() + 1 for match in self._control.finditer(text)]
        ids = [self.bos_id] if bos else []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += self.sp.encode(text[start:stop])
        return ids

    def decode(self, ids):
        return self.sp.decode([int(i) for i in ids if i < len(self)])


def check_vocabulary(tokenizer, model):
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(f"{tokenizer.path}: {len(tokenizer)} pieces, expected at most the model's vocab_size {model.config.vocab_size}")


# ----------------------------------------------------------------------------------------------------------------------
# Generation


class KVCache:
    """Keys and values of a batch of growing sequences; the caller owns it and may hand it to `generate` again.

    keys[layer], values[layer]: [B, K, S, D]. A row's slot is its token's position, so rows are aligned at the left and need no
    padding in front. tokens[b] are the tokens that row b holds. Rows may trade places while decoding: order[b] says which prompt
    the row belongs to.
    """

    def __init__(self):
        self.keys, self.values, self.tokens, self.order = [], [], [], []
        self.steps = {}  # on a GPU: number of rows -> CapturedStep

    def prefill(self, model, prompts, room):
        """Fill an empty cache, with room for more tokens; what prompts share is computed once. Returns the logits after each [B, V]."""
        device = model.embed_tokens.weight.device
        forest = Forest(prompts).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        rows = torch.tensor([row for row, _ in forest.paths], device=device)[:, None]
        slots = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for b, (_, path) in enumerate(forest.paths):
            slots[b, : len(path)] = torch.from_numpy(path)
        slots = slots.to(device)

        def copy_branches(layer, k, v):
            for store, x in ((self.keys, k), (self.values, v)):
                store.append(F.pad(x[rows, :, slots].transpose(1, 2), (0, 0, 0, room)))
            return k, v

        masks = tree_masks(forest.positions, forest.ends, model.config.sliding_window)
        last = rows[:, 0], slots.gather(1, lengths[:, None] - 1)[:, 0]
        hidden = model.hidden(forest.tokens, forest.positions, masks, copy_branches, last)
        self.tokens, self.order = [list(prompt) for prompt in prompts], list(range(len(prompts)))
        return model.logits(hidden)

    def rewind(self, prompts):
        """Make each row hold a beginning of its prompt, forgetting what differs. Returns what is still to be processed, a list a row."""
        tails = []
        for row, prompt in enumerate(self.order):
            held = common_prefix(self.tokens[row], prompts[prompt][:-1])
            self.tokens[row] = prompts[prompt][:held]
            tails.append(prompts[prompt][held:])
        return tails

    def advance(self, model, new, room=1):
        """Append the token lists `new` to the first len(new) rows. Returns the logits after each one's last token, [B, V].

        room, at least 1: free slots to keep behind each row, lest the cache move too often.
        """
        held, T = [len(tokens) for tokens in self.tokens[: len(new)]], max(map(len, new))
        for tokens, tail in zip(self.tokens, new, strict=False):
            tokens.extend(tail)
        end = max(held) + T
        self._reserve(end + room)
        if T == 1 and self._captures():
            return self._decode(model, [new, [[start] for start in held]])
        device = self.keys[0].device
        tokens = torch.tensor([tail + [0] * (T - len(tail)) for tail in new], device=device)  # padding is written behind what a row holds
        positions = torch.tensor(held, device=device)[:, None] + torch.arange(T, device=device)
        last = torch.tensor([len(tail) - 1 for tail in new], device=device)
        spans = {GLOBAL: slice(0, end), LOCAL: slice(max(0, min(held) - model.config.sliding_window + 1), end)}
        return extend(model, *self._rows(len(new)), tokens, positions, last, spans)

    def _captures(self):
        """Whether steps of one token are recorded."""
        return self.keys[0].is_cuda

    def _decode(self, model, inputs):
        """A step of one token a row on a GPU, through a graph recorded for 4, 16, 64, ... rows or all; those that are done go along."""
        active, rows = len(inputs[0]), 4
        while rows < active:
            rows *= 4
        rows = min(rows, len(self.tokens))
        idle = self.tokens[active:rows]
        inputs = torch.tensor([inputs[0] + [[0] for _ in idle], inputs[1] + [[len(tokens)] for tokens in idle]])
        if rows not in self.steps:
            self.steps[rows] = CapturedStep(model, *self._rows(rows), inputs)
        return self.steps[rows](inputs)[:active]

    def _rows(self, count):
        """Keys and values of the first rows."""
        return ([x[:count] for x in store] for store in (self.keys, self.values))

    def _reserve(self, width):
        if width > self.keys[0].shape[2]:
            grow = width - self.keys[0].shape[2]
            for store in (self.keys, self.values):
                store[:] = [F.pad(x, (0, 0, 0, grow)) for x in store]
            self.steps = {}

    def swap(self, a, b):
        """Two rows trade places."""
        for x in self.keys + self.values:
            row = x[a].clone()
            x[a], x[b] = x[b], row
        for held in (self.tokens, self.order):
            held[a], held[b] = held[b], held[a]

    @torch.inference_mode()  # as in `generate`: a step compiled for such tensors is not compiled again for others
    def keep(self, prompts):
        """Keep the rows of these prompts only (numbers as of the last call), in this order."""
        rows = [self.order.index(prompt) for prompt in prompts]
        for store in (self.keys, self.values):
            store[:] = [x[rows] for x in store]
        self.tokens, self.order, self.steps = [self.tokens[row] for row in rows], list(range(len(rows))), {}


def extend(model, keys, values, tokens, positions, last, spans):
    """Put `tokens` at `positions`, int64 [B, T], of a cache of B rows. Returns the logits after token `last` [B] of each row, [B, V].

    keys, values: a tensor [B, K, S, D] for each layer; spans: {GLOBAL, LOCAL: slice}, a slice with all slots that any of the tokens sees.
    """
    rows, slots = torch.arange(len(tokens), device=tokens.device)[:, None], torch.arange(keys[0].shape[2], device=tokens.device)
    masks, window = {}, model.config.sliding_window
    for kind, span in spans.items():
        distance = positions[:, :, None] - slots[span]
        seen = (distance >= 0) & (distance < window) if kind == LOCAL else distance >= 0
        masks[kind] = [(slice(None), slice(None), seen.float())]

    def write(layer, k, v):
        for store, x in ((keys[layer], k), (values[layer], v)):
            store[rows, :, positions] = x.transpose(1, 2)
        span = spans[model.config.layer_types[layer]]
        return keys[layer][:, :, span], values[layer][:, :, span]

    return model.logits(model.hidden(tokens, positions, masks, write, (rows[:, 0], last)))


class CapturedStep:
    """`extend` by one token a row, compiled, and recorded as a CUDA graph: one launch for the whole step instead of one for each kernel."""

    def __init__(self, model, keys, values, inputs):
        """inputs: tokens and positions, int64 [2, B, 1]."""
        self.inputs, step = inputs.to(keys[0].device), compiled(extend, fullgraph=True)
        tokens, positions = self.inputs
        last, everything = torch.zeros_like(tokens[:, 0]), {GLOBAL: slice(None), LOCAL: slice(None)}
        for x, dims in [(x, 0) for x in (tokens, positions, last)] + [(x, (0, 2)) for x in keys + values]:
            torch._dynamo.maybe_mark_dynamic(x, dims)  # one compilation for all numbers of rows above one, and of slots
        self.arguments = model, keys, values, tokens, positions, last, everything  # kept: a graph knows addresses only
        step(*self.arguments)  # compiles; what it writes will be written again by the first replay
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # NCCL's own thread may use the GPU meanwhile
            self.logits = step(*self.arguments)

    def __call__(self, inputs):
        self.inputs.copy_(inputs)
        self.graph.replay()
        return self.logits


def common_prefix(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_ids=(), generator=None, kv_cache=None):
    """Continue token lists of different lengths; returns the new tokens of each, without the stop token.

    temperature 0 is greedy; top_k 0 and top_p 1 keep the whole distribution. A row's result does not depend on the other rows:
    each draws its own noise, from `generator[i]` if that is a list, else from a stream made for row i from `generator` (None:
    seed 0). A `kv_cache` of an earlier call (KVCache() at first) is continued: of prompt i, only the tokens that its row does not
    hold yet are processed. Rows that finish leave the batch.
    """
    if not all(prompts):
        raise InputError("an empty prompt, expected at least one token (the <bos> token, say)")
    if temperature < 0 or top_k < 0 or max_new_tokens < 0:
        raise InputError(f"temperature {temperature}, top_k {top_k}, max_new_tokens {max_new_tokens}: expected numbers from 0")
    prompts = [list(prompt) for prompt in prompts]
    cache = KVCache() if kv_cache is None else kv_cache
    assert len(cache.order) in (0, len(prompts)), f"the cache holds {len(cache.order)} rows for {len(prompts)} prompts: call keep() first"
    stop, outputs = set(stop_ids), [[] for _ in prompts]
    if max_new_tokens == 0 or not prompts:
        return outputs
    noise = draw_noise(generator, len(prompts), max_new_tokens) if temperature > 0 else None
    if cache.order:
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
    """Uniform numbers, float64 [rows, steps]: a token is found from one number by inverting the cumulative distribution."""
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
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    pick = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True).clamp_(max=logits.shape[-1] - 1)
    return (pick if ids is None else ids.gather(-1, pick))[:, 0]


def candidates(logits, top_k, top_p, guess=1024):
    """The most likely tokens and their logits, sorted, -inf beyond top_k or the smallest set that holds probability top_p."""
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


def main():
    parser = argparse.ArgumentParser(description="Continue a prompt with a Gemma 2 checkpoint: is it sound?")
    parser.add_argument("model_dir", help="directory with config.json, *.safetensors and tokenizer.model")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    args = parser.parse_args()
    try:
        tokenizer = Tokenizer(Path(args.model_dir) / "tokenizer.model")
        model = Gemma2.from_pretrained(args.model_dir)
        check_vocabulary(tokenizer, model)
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
