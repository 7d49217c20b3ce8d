"""Is all well on this GPU? Its path against the CPU's, whole runs, then how fast it is.

    python tests/proofs/gpu.py                   some ten minutes, nearly all of them compilations
    python tests/proofs/gpu.py --only bfloat16   a part of it; parts may run side by side, but not beside the speeds
    python tests/proofs/gpu.py --device cpu      a check of this script, without the speeds

For a person with a GPU, to be run first. Random models of four layers, with heads of 64, 128 and 256 and a window of 48:
log-probabilities and gradients of forests of one and several rows (one row of 65 to 127 tokens among them), in float32
and bfloat16, with and without checkpointing and with LoRA; greedy replies of two turns, in which rows end at different
times and the cache is kept; then runs of act.py on the tiny world, with LoRA and in full, on one rank and, where there
are two GPUs, on two. One line a point; status 1 when one is over its limit. bfloat16 is compared with float32 on the CPU,
so its limit is rounding. What torch leaves uncompiled, and what a run does without, is a failure here.

The speeds are of a model of Gemma 2 2B's sizes with random weights, in bfloat16: an ACT step's training part as a share of
the card's FLOP/s, and decoding at 4 and 32 rows as a share of its bandwidth, both limits measured in the same minute.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/proofs")]

import torch  # noqa: E402
from memory import config_of  # noqa: E402

import act  # noqa: E402
import gemma  # noqa: E402

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
DONE, FAILED = [], []


def report(what, value, ok, began):
    DONE.append(what)
    FAILED.extend([] if ok else [what])
    print(f"{what:64} {value:<26} {time.monotonic() - began:6.1f} s  {'ok' if ok else 'FAILED'}", flush=True)


# ------------------------------------------------------------------------------------------------- the same as on a CPU


def model_on(device, dtype, head_dim, lora=False):
    torch.manual_seed(0)
    names = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        vocab_size sliding_window"""
    shape = dict(zip(names.split(), (256, 512, 4, 4, 2, head_dim, 512, 48), strict=True))
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": head_dim}
    model = gemma.Gemma(gemma.GemmaConfig(**shape, **caps)).to(dtype)
    if lora:
        gemma.add_adapters(model, gemma.LoraConfig(8, 16.0, gemma.PROJECTIONS))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in gemma.adapters(model).values():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.to(device)


def tokens(seed, count):
    return torch.randint(5, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def dialogues(sizes):
    """For each size a stem of so many tokens and three ways to go on from it."""
    return [tokens(size, size) + tokens(size + i, 20 * i) for size in sizes for i in (1, 2, 3)]


def logps_and_gradients(model, sequences, checkpointing):
    device = model.embed_tokens.weight.device
    model.set_checkpointing(checkpointing)
    masks = [[0] * (len(sequence) - 10) + [1] * 10 for sequence in sequences]
    logps = model.logps(gemma.Forest(sequences, masks).to(device))
    gradients = torch.autograd.grad(logps.sum(), [p for p in model.parameters() if p.requires_grad])
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


def parity(device, only=""):
    cases = [(64, sizes, checkpointing, False) for sizes in ((100,), (70, 90, 260), (20,), (300, 400))
             for checkpointing in (False, True)]  # fmt: skip
    cases += [(head_dim, sizes, True, False) for head_dim in (128, 256) for sizes in ((65,), (300, 400))]
    cases += [(64, (70, 90, 260), True, True), (256, (100,), False, True)]
    for dtype, limit in LIMITS.items():
        for head_dim, sizes, checkpointing, lora in cases:
            sequences = [tokens(sizes[0], sizes[0])] if sizes in ((65,), (100,)) else dialogues(sizes)
            title = f"{str(dtype)[6:]}, heads of {head_dim}, {'one row' if len(sequences) == 1 else 'forest'} of {sizes}"
            title += ", checkpointing" * checkpointing + ", LoRA" * lora
            if only not in title:
                continue
            began = time.monotonic()
            models = model_on(device, dtype, head_dim, lora), model_on("cpu", torch.float32, head_dim, lora)
            difference = worst(*(logps_and_gradients(each, sequences, checkpointing) for each in models))
            report(title, f"difference {difference:.1e}", difference < limit, began)
    for head_dim in (64, 256):
        title = f"float32, heads of {head_dim}, replies of two turns"
        if only not in title:
            continue
        began = time.monotonic()
        models = model_on(device, torch.float32, head_dim), model_on("cpu", torch.float32, head_dim)
        found, expected = map(two_turns, models)
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        report(title, f"{same} of {len(expected)} equal", same == len(expected), began)
    if gemma.FAILED:
        report("compilations and recorded steps", f"failed: {', '.join(sorted(gemma.FAILED))}", False, time.monotonic())


def runs(device):
    """act.py on the tiny world; its loss at step 0 is ln 2, what it saves loads, and it does nothing without."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else dict(os.environ)
    ranks = [1, 2] if torch.cuda.device_count() > 1 else [1]
    with tempfile.TemporaryDirectory() as folder:
        for count in ranks:
            for name, options in (("in full", []), ("LoRA", ["--policy_model_config.lora_r", "8"])):
                began, out = time.monotonic(), Path(folder) / f"{name}-{count}"
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
                command += ["act.py", "--config", "tiny.json", "--training_config.output_dir", str(out), *options]
                command += ["--training_config.max_steps", "6", "--training_config.save_steps", "3"]
                command += ["--training_config.rpo_alpha", "0", "--data_config.validation_path", ""]
                ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
                said, ok = f"status {ran.returncode}", ran.returncode == 0 and "going on without" not in ran.stdout
                if ran.returncode == 0:
                    [first, *_], model = act.whole_rows(out / "metrics.jsonl"), gemma.Gemma.from_pretrained(out / "model")
                    finite = all(parameter.isfinite().all() for parameter in model.parameters())
                    said, ok = f"first loss {first['loss']:.6f}", ok and finite and abs(first["loss"] - 0.693147) < 1e-4
                else:
                    print(ran.stdout[-1500:], ran.stderr[-3000:], sep="\n")
                report(f"a run of act.py {name}, {count} rank{'s' * (count > 1)}", said, ok, began)


# ------------------------------------------------------------------------------------------------------------- how fast


def seconds(work, repeats=3):
    """The fastest of some repeats, after one that compiles."""
    work()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)


def card():
    """(FLOP/s of a bfloat16 product, bytes/s read and written by a copy) of this card, measured."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(big)
    return 2 * 8192**3 / seconds(lambda: a @ a, 10), 2 * big.nbytes / seconds(lambda: target.copy_(big), 10)


def speeds(prompt=1500, reply=100, pairs=4, new=64):
    flops, bandwidth = card()
    print(f"\n{torch.cuda.get_device_name()}: {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s")
    with torch.device("meta"):
        policy = gemma.Gemma(config_of("2b")).bfloat16()
    policy.to_empty(device="cuda")
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    policy.set_checkpointing(True)
    sequences = []
    for i in range(pairs):
        start = tokens(i, prompt)
        sequences += [start + tokens(100 + 2 * i + side, reply) for side in (0, 1)]
    forest = gemma.Forest(sequences, [[0] * prompt + [1] * reply] * len(sequences)).to("cuda")

    def update():
        with torch.no_grad():
            reference = policy.logps(forest)
        (policy.logps(forest) - reference).sum().backward()
        policy.zero_grad()

    body = sum(p.numel() for p in policy.layers.parameters())
    head = policy.embed_tokens.weight.numel()
    # reference 2, forward 2, recomputed 2, backward 4 of each weight and token; the head: at scored tokens, recomputed too
    work = 10 * (body * forest.used + head * len(forest.targets))
    took = seconds(update)
    print(f"training part of a step, {pairs} pairs, {forest.used} tokens: {took:.2f} s, MFU {work / took / flops:.0%}")
    policy.requires_grad_(False)
    weights = 2 * (body + head)
    for rows in (4, 32):
        prompts = [tokens(1000 + row, prompt) for row in range(rows)]

        def decode(count, prompts=prompts):
            gemma.generate(policy, prompts, count, temperature=0.7)

        step = (seconds(lambda: decode(new)) - seconds(lambda: decode(8))) / (new - 8)
        config = policy.config
        cache = 4 * rows * prompt * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        share = (weights + cache) / step / bandwidth
        print(f"decoding, {rows} rows: {rows / step:.0f} tokens/s, {1000 * step:.1f} ms a step, {share:.0%} of bandwidth")
        if rows == pairs:
            print(f"replies of {reply} tokens for such a step: {seconds(lambda: decode(reply)):.2f} s")
    print(f"largest memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", metavar="TEXT", help="points with this in their line, or: runs, speeds")
    args = parser.parse_args()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if args.only not in ("runs", "speeds"):
        parity(args.device, args.only)
    if args.only in ("", "runs"):
        runs(args.device)
    if args.device == "cuda" and args.only in ("", "speeds"):
        speeds()
    if not DONE and args.only != "speeds":
        parser.error(f"--only: no point has {args.only!r} in its line")
    print(f"\n{len(FAILED)} failed" if FAILED else "\nall is well")
    return int(bool(FAILED))


if __name__ == "__main__":
    sys.exit(main())
