"""Is all well on this GPU? Its path against the CPU's, whole runs, then how fast it is.

    python tests/proofs/gpu.py                   some ten minutes, nearly all of them compilations
    python tests/proofs/gpu.py --only bfloat16   a part of it; parts may run side by side, but not
                                                 beside the speeds
    python tests/proofs/gpu.py --peer            eight minutes: is it as fast as it should be?
    python tests/proofs/gpu.py --device cpu      a check of this script, without the speeds
    python tests/proofs/gpu.py --device cpu --peer --size tiny --minutes 60
                                                 the same of the comparison; of the speeds alone:
                                                 --only speeds instead of --peer

For a person with a GPU, to be run first. Random models of four layers, with heads of 64, 128 and
256 and a window of 48: log-probabilities and gradients of forests of one and several rows (one row
of 65 to 127 tokens among them), in float32 and bfloat16, with and without checkpointing and with
LoRA; greedy replies of two turns, in which rows end at different times and the cache is kept; then
runs of act.py on the tiny world, with LoRA and in full, on one rank and, where there are two GPUs,
on two. One line a point; status 1 when one is over its limit. bfloat16 is compared with float32 on
the CPU, so its limit is rounding. What torch leaves uncompiled, and what a run does without, is a
failure here.

The speeds are bench.py's, of a model of Gemma 2 2B's sizes with random weights, in bfloat16: a DPO
step of four pairs and its operations as a share of the card's own, a rollout of 32 replies of 100
tokens over prompts of 1,000 and what decoding reads as a share of the card's bandwidth, and an ACT
step.

With --peer, all within --minutes: some of these parts side by side, then bench.py's measurements of
ours and of TRL and transformers in turns, from what matters most to what matters least, and once
more while there is time. TRL trains float32 weights with bfloat16 products, as ours, recomputes as
ours, and attends by the first that works of flash attention 2, flex attention and transformers'
own; its step is neither compiled nor does it have others' kernels. transformers generates with a
static cache, its steps compiled. PEFT and vLLM are rows where they are installed; what fails is a
row that says so. Results are printed and written to --out as they come. Last, the goals.
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

import bench  # noqa: E402
import torch  # noqa: E402

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
                    [first, *_], model = act.logged_rows(out / "metrics.jsonl"), gemma.Gemma.from_pretrained(out / "model")
                    finite = all(parameter.isfinite().all() for parameter in model.parameters())
                    said, ok = f"first loss {first['loss']:.6f}", ok and finite and abs(first["loss"] - 0.693147) < 1e-4
                else:
                    print(ran.stdout[-1500:], ran.stderr[-3000:], sep="\n")
                report(f"a run of act.py {name}, {count} rank{'s' * (count > 1)}", said, ok, began)


# --------------------------------------------------------------------------------------- how fast

PLAN = [  # title, ours, what it is set against; the first matter most
    ("DPO on 8 turns of a dialogue, per pair", "dialogues", ["TRL, dialogues"]),
    ("DPO step, 4 pairs", "dpo", ["TRL DPOTrainer"]),
    ("DPO step, nothing shared", "nothing shared", ["TRL, nothing shared"]),
    ("rollout", "rollout", ["transformers, static cache, compiled"]),
    ("ACT step", "ACT step", ["ACT step, 4 samples"]),
    ("DPO step, 4 pairs, LoRA of rank 16", "LoRA", ["TRL, LoRA"]),
    ("DPO step, 4 pairs", "dpo", ["norms not fused", "TRL, reference precomputed"]),
    ("rollout", "rollout", ["vLLM"]),
    ("DPO on the dialogue, LoRA, per pair", "dialogues, LoRA", ["TRL, dialogues, LoRA"]),
    ("DPO on the dialogue, per pair", "dialogues", ["TRL, dialogues, reference precomputed"]),
]
SPEEDS = [(name, name, []) for name in ("dpo", "rollout", "ACT step")]
CHECKED = (  # under --peer, a process each; all of them take ten minutes
    "float32, heads of 64, forest of (70, 90, 260), checkpointing",
    "bfloat16, heads of 256, forest of (300, 400), checkpointing",
    "bfloat16, heads of 256, one row of (100,), LoRA",
    "float32, heads of 256, replies of two turns",
)


def side_by_side(device, seconds):
    """Some of the parts above, of which each line is printed when its process is done."""
    command = [sys.executable, __file__, "--device", device, "--only"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    began = time.monotonic()
    for part, process in [(part, subprocess.Popen([*command, part], **pipes)) for part in CHECKED]:
        try:
            left = max(1, seconds - (time.monotonic() - began))
            lines = process.communicate(timeout=left)[0].splitlines()
        except subprocess.TimeoutExpired:
            process.kill()
            lines = [f"not done after {seconds:.0f} s, a quarter of --minutes"]
        points = [line for line in lines if line.endswith(("  ok", "  FAILED"))]
        print(*points or [f"{part}: FAILED", *lines[-5:]], sep="\n", flush=True)
        if process.wait() != 0:
            FAILED.append(part)


def speeds(args, minutes=None):
    """bench.py's table of what ours does, with --peer beside what others do."""
    options = ["--size", args.size, "--device", args.device, "--peer-python", args.peer_python]
    options += ["--attention", "flash_attention_2,flex_attention,auto"]
    if not args.peer:
        bench.measured(SPEEDS, bench.parser().parse_args([*options, "--rounds", "1"]))
        return
    options += ["--peer", "--rounds", "2", "--minutes", str(minutes), "--out", args.out]
    print_goals(bench.measured(PLAN, bench.parser().parse_args(options)))


def print_goals(table):
    """What was aimed at on an H100 with the 2B's sizes, beside what was found."""

    def ratio(ours, peer, column):
        """Theirs over ours of a column of `figures`: 0 seconds, 2 memory."""
        found = table.figures(ours), table.figures(peer)
        return found[1][column] / found[0][column] if all(found) else None

    def share(name, what):
        return table.shares(name).get(what, (0, None))[1]

    step, decoding = "forward and backward FLOP/s", "decoding B/s"
    peers = {ours: rivals[0] for _, ours, rivals in PLAN[:3]}
    rows = [("MFU, forward and backward, nothing shared", share("nothing shared", step), 0.45)]
    rows += [("share of bandwidth, decoding 32 rows", share("rollout", decoding), 0.6)]
    for name, goal in (("dialogues", 5), ("nothing shared", 1.2)):
        rows.append((f"times as fast as TRL, {name}", ratio(name, peers[name], 0), goal))
    for name, peer in peers.items():
        rows.append((f"times our memory that TRL takes, {name}", ratio(name, peer, 2), 1 / 0.7))
    print("\n| goal on an H100 | at least | found | |\n|---|---|---|---|")
    for what, found, goal in rows:
        value = "not measured" if found is None else f"{found:.2f}"
        verdict = "" if found is None else "reached" if found >= goal else "missed"
        print(f"| {what} | {goal:.2f} | {value} | {verdict} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--device", default="cuda")
    option("--only", default="", metavar="TEXT", help="points so named; runs; speeds")
    option("--peer", action="store_true", help="some points, then the speeds beside TRL's")
    option("--peer-python", default=sys.executable, help="a Python that has transformers and trl")
    option("--size", choices=bench.SIZES, default="2b", help="of the speeds' model")
    option("--minutes", type=float, default=8, help="for all of --peer")
    option("--out", default="gpu_peer.jsonl", help="--peer's measurements, lines of JSON")
    args = parser.parse_args()
    if args.peer and args.only:
        parser.error("--peer has its own choice of points, expected no --only beside it")
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    began = time.monotonic()
    if args.peer:
        side_by_side(args.device, 15 * args.minutes)  # a quarter of the time, in seconds
        speeds(args, args.minutes - (time.monotonic() - began) / 60)
    elif args.only not in ("runs", "speeds"):
        parity(args.device, args.only)
    if args.only == "runs" or not (args.only or args.peer):
        runs(args.device)
    everything = args.only == "" and args.device == "cuda" and not args.peer
    if everything or args.only == "speeds":
        speeds(args)
    if not (DONE or args.peer or args.only == "speeds"):
        parser.error(f"--only: no point has {args.only!r} in its line")
    print(f"\n{len(FAILED)} failed" if FAILED else "\nall is well")
    return int(bool(FAILED))


if __name__ == "__main__":
    sys.exit(main())
