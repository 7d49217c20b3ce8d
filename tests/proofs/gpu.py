"""The GPU's path against the CPU's: flex attention forward and backward, the compiled and recorded decoding step.

    python tests/proofs/gpu.py

For a person with a GPU. A random model of four layers, heads of 64 and a window of 48; forests of one and several
rows, with and without checkpointing; replies of two turns, in which rows end at different times and the cache is
kept. One line a point; ends with status 1 when one is over its limit. bfloat16 is compared with float32 on the CPU,
so its limit is rounding. Attention that torch leaves uncompiled is a failure, too.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import gemma  # noqa: E402

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def model_on(device, dtype):
    torch.manual_seed(0)
    names = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        vocab_size sliding_window"""
    shape = dict(zip(names.split(), (256, 512, 4, 4, 2, 64, 512, 48), strict=True))
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 64}
    return gemma.Gemma(gemma.GemmaConfig(**shape, **caps)).to(dtype).to(device)


def tokens(seed, count):
    return torch.randint(5, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def dialogues(sizes):
    """For each size a stem of so many tokens and three ways to go on from it."""
    return [tokens(size, size) + tokens(size + i, 20 * i) for size in sizes for i in (1, 2, 3)]


def logps_and_gradients(model, sequences, checkpointing):
    device = model.embed_tokens.weight.device
    model.set_checkpointing(checkpointing)
    forest = gemma.Forest(sequences).to(device)
    rows = torch.cat([torch.full((10,), row) for row, _ in forest.paths]).to(device)
    slots = torch.cat([torch.from_numpy(path[-11:-1]) for _, path in forest.paths]).to(device)
    targets = torch.tensor([token for sequence in sequences for token in sequence[-10:]], device=device)
    logps = model.logps(forest, rows, slots, targets)
    gradients = torch.autograd.grad(logps.sum(), list(model.parameters()))
    return [logps.detach().cpu(), *(gradient.float().cpu() for gradient in gradients)]


def worst(found, expected):
    """The largest difference, as a share of the largest entry of its tensor."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def two_turns(model):
    cache, stops = gemma.KVCache(), range(5, 512, 40)
    first = dialogues((7, 90, 140, 30, 60, 45))
    replies = gemma.generate(model, first, 24, temperature=0, stop_ids=stops, kv_cache=cache)
    cache.keep(kept := list(range(1, len(first), 2)))
    later = [first[row] + replies[row] + tokens(row, 3 + row) for row in kept]
    return replies + gemma.generate(model, later, 24, temperature=0, stop_ids=stops, kv_cache=cache)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    device, failed = parser.parse_args().device, 0
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    reference = model_on("cpu", torch.float32)

    def report(what, value, ok, began):
        nonlocal failed
        failed += not ok
        print(f"{what:60} {value:<28} {time.monotonic() - began:5.1f} s  {'ok' if ok else 'FAILED'}", flush=True)

    for dtype, limit in LIMITS.items():
        model = model_on(device, dtype)
        for sizes in ((100,), (70, 90, 260), (20,), (300, 400)):
            for checkpointing in (False, True):
                began = time.monotonic()
                results = [logps_and_gradients(each, dialogues(sizes), checkpointing) for each in (model, reference)]
                difference = worst(*results)
                title = f"{str(dtype)[6:]}, forest of {sizes}{', checkpointing' * checkpointing}"
                report(title, f"difference {difference:.1e}", difference < limit, began)
    began = time.monotonic()
    found, expected = (two_turns(each) for each in (model_on(device, torch.float32), reference))
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    report("float32, replies of two turns", f"{same} of {len(expected)} equal", same == len(expected), began)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
