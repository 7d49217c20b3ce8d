"""How much memory a real size takes: loading, one sharded optimiser step, saving; and how much a GPU needs for training.

    python tests/memory.py --size tiny                 a check of this script, a minute
    python tests/memory.py --size 2b --dir /big/disk   Gemma 2 2B: 22 GB of memory, 11 GB of disk, minutes; nothing else may run beside it
    python tests/memory.py --plan                      the computed table alone

A random bfloat16 checkpoint is written shard by shard into a temporary folder of --dir. Each measurement is a process of its own (one
a rank, over gloo), in bfloat16 throughout so that 2B fits a desktop. A thread of it reads RssAnon of /proc/self/status every 10 ms:
memory that the process holds itself, without the pages of files that it has mapped, which the system may drop (VmHWM, the largest
resident size, has them too). "More" is the peak over what the process held just before, imports and all.

  load   Gemma2.from_pretrained, peak RssAnon (all of it) over the checkpoint's size: at most 1.15
  step   act.build_model, a forward and backward pass of one short sequence with checkpointing, act.clip_and_step with RMSprop:
         bytes of parameters, gradients and optimiser state that a rank holds; of two ranks at most 0.55 of what one holds
  save   a frozen sharded model in small shards: a rank that does not write may hold one tensor whole, the writer a shard and a tensor

`training_memory` says what training needs from the sizes alone; what it says is held all along is set against what `step` and
`save` found. Ends with status 1 when something is over its limit.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import act  # noqa: E402
from gemma import Gemma2, Gemma2Config, TokenLogps, write_json  # noqa: E402

MIB, GIB = 2**20, 2**30
# layers, hidden, intermediate, heads, key/value heads, head_dim, query_pre_attn_scalar, vocabulary: the published ones, and a small one
SIZES = {
    "tiny": (4, 512, 2048, 4, 2, 64, 64, 32000),
    "2b": (26, 2304, 9216, 8, 4, 256, 256, 256000),
    "9b": (42, 3584, 14336, 16, 8, 256, 256, 256000),
    "27b": (46, 4608, 36864, 32, 16, 128, 144, 256000),
}
LOAD_LIMIT, RANK_LIMIT = 1.15, 0.55
SLACK = 0.05  # of the tensor or shard that `save` may hold: the allocator's, and the messages between ranks
TOKENS = 16  # of the sequence that `step` trains on


def config_of(size):
    layers, hidden, intermediate, heads, kv_heads, head_dim, scalar, vocabulary = SIZES[size]
    return Gemma2Config(vocabulary, hidden, intermediate, layers, heads, kv_heads, head_dim, scalar, 4096, 50.0, 30.0)


def on_meta(config):
    """A model without memory, for its names and shapes."""
    with torch.device("meta"):
        return Gemma2(config)


# ---------------------------------------------------------------------------------------------------------- a checkpoint


def write_checkpoint(directory, config, max_shard_bytes):
    """A random bfloat16 checkpoint of which one shard at a time is in memory. Returns the bytes of its tensors."""
    directory.mkdir()
    shapes = {f"model.{name}": parameter.shape for name, parameter in on_meta(config).named_parameters()}
    shards = [[]]
    for name in shapes:
        if shards[-1] and 2 * sum(shapes[n].numel() for n in [*shards[-1], name]) > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    torch.manual_seed(0)
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: random_weight(shapes[name]) for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    total = 2 * sum(shape.numel() for shape in shapes.values())
    write_json(directory / "config.json", config.to_json(torch.bfloat16))
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def random_weight(shape):
    """As a fresh Gemma2 has it: normal with a deviation of fan_in^-0.5; the scales of norms are 1 + 0."""
    if len(shape) == 1:
        return torch.zeros(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[1] ** -0.5)


# ------------------------------------------------------------------------------------------- measurements, a process each


def status_bytes(key):
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


@contextlib.contextmanager
def watched():
    """Yields a dict; when the block is left it has "before" and "peak" of RssAnon, and VmHWM as "resident", in bytes."""
    seen, done = {"before": status_bytes("RssAnon")}, threading.Event()
    seen["peak"] = seen["before"]

    def look():
        seen["peak"] = max(seen["peak"], status_bytes("RssAnon"))

    def watch():
        while not done.wait(0.01):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
        look()
    finally:
        done.set()
        thread.join()
    seen["resident"] = status_bytes("VmHWM")


def held(tensors):
    """Bytes of this rank's part of some tensors."""
    local = [tensor.to_local() if isinstance(tensor, act.DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def load(directory):
    with watched() as seen:
        model = Gemma2.from_pretrained(directory, dtype=torch.bfloat16)
    assert held(model.parameters()) > 0
    return seen


def sharded(directory, **options):
    mesh = act.make_mesh(torch.device("cpu"), 1)
    return act.build_model(directory, mesh, torch.bfloat16, **options)


def step(directory):
    """One optimiser step on one sequence. Gradients are counted before it, since clip_and_step ends by letting them go."""
    training = act.TrainingConfig(optim="rmsprop", learning_rate=1e-3)
    with watched() as seen:
        model = sharded(directory, checkpointing=True)
        optimizer = act.make_optimizer(model, training)
        tokens = torch.randint(model.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
        scored = act.Scored([(tokens[: TOKENS // 2], tokens[TOKENS // 2 :], [1] * (TOKENS // 2))], torch.device("cpu"))
        (-scored.logps(model).sum() / TOKENS).backward()
        gradients = held([parameter.grad for parameter in model.parameters()])
        norm = act.clip_and_step(model, optimizer, training.max_grad_norm, training.learning_rate)
    assert 0 < norm < float("inf"), f"the gradient's norm is {norm}"
    state = held([value for values in optimizer.state.values() for value in values.values()])
    assert len(optimizer.state) == len(list(model.parameters()))
    return {**seen, "parameters": held(model.parameters()), "gradients": gradients, "optimizer": state}


def save(directory):
    """A frozen model, as the reference is, written in shards as large as its largest tensor."""
    model = sharded(directory, trainable=False)
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with watched() as seen:
        model.save_pretrained(directory.parent / "saved", max_shard_bytes=largest)
    return {**seen, "reference": held(model.parameters()), "largest": largest}


MEASURED = {"load": load, "step": step, "save": save}


def child(name, directory):
    """What a measuring process does: `load` alone, the others as a rank among others. Its results go to NAME-RANK.json."""
    torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("WORLD_SIZE", 1))))
    if name != "load":
        act.start_processes()
    result = MEASURED[name](directory)
    write_json(directory.parent / f"{name}-{os.environ.get('RANK', 0)}.json", result)
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(name, directory, ranks=1):
    """The results of one measurement, a dict a rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable] if name == "load" else command
    command += [__file__, "--child", name, "--dir", str(directory)]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"memory.py: {name} with {ranks} ranks failed ({done.returncode})\n{done.stderr[-3000:]}")
    results = [json.loads((directory.parent / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]
    print(f"{name}, {ranks} ranks: {json.dumps(results)}", file=sys.stderr, flush=True)
    return results


# --------------------------------------------------------------------------------------------------- computed from the sizes

HELD = ("parameters", "gradients", "optimizer", "reference")


def training_memory(config, ranks, dtype_bytes=4, rows=1, eval_rows=32, prompt=1792, reply=256, new=128):
    """Bytes that one of `ranks` GPUs needs for ACT with RMSprop, bf16 compute and checkpointing, the model sharded over all of them.

    `rows` pairs are trained on at a time, `eval_rows` turns are played at a time; prompts of `prompt` tokens that share nothing,
    replies of `reply` tokens, responses of `new`. What is computed in bfloat16 has 2 bytes; `dtype_bytes`: of a held parameter.
    """
    model = on_meta(config)
    total, embedding = (sum(p.numel() for p in part.parameters()) for part in (model, model.embed_tokens))
    layer = sum(p.numel() for p in model.layers[0].parameters())
    hidden, wide, heads, layers = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_hidden_layers
    kv = config.num_key_value_heads * config.head_dim
    logits = 4 * TokenLogps.chunks(range(10**9), range(config.vocab_size))[0].stop * config.vocab_size  # one chunk, float32

    def attention(rows, length, kept):
        return rows * heads * length**2 * kept  # the scores of a layer, in all the forms that are alive at once

    def decoding(rows):
        """The whole copy, the cache of a conversation, and the largest of: prefill of one layer, logits of one token a row."""
        cache = rows * (prompt + new) * layers * 2 * kv * 2
        prefill = attention(rows, prompt, 12) + rows * prompt * (8 * hidden + 3 * wide) * 2 + rows * prompt**2 * 8
        return 2 * total + cache + max(prefill, 4 * rows * config.vocab_size * 4)

    width = prompt + 2 * reply  # of a pair: its prompt once, and both sides
    tokens = rows * width
    gathered = 2 * (2 * embedding + 2 * layer)  # of policy and reference the embedding stays whole; of the layers the next one comes early
    inside = attention(rows, width, 16) + tokens * (16 * hidden + 5 * wide) * 2 + rows * width**2 * 8 + (2 + 4) * layer
    head = 4 * logits + 2 * rows * reply * hidden * 2 + (4 + 2) * embedding
    end = (2 + 4) * embedding  # the embedding's gradient, whole, in bfloat16 and as it is summed over ranks
    return {
        **{key: dtype_bytes * total / ranks for key in ("parameters", "gradients", "optimizer")},
        "reference": 2 * total / ranks,
        "rollout": decoding(rows),
        "evaluation": decoding(eval_rows),
        "update": gathered + tokens * hidden * layers * 2 + max(inside, head, end),
    }


def peak_of(memory):
    """Rollout, evaluation and update come one after the other."""
    return sum(memory[key] for key in HELD) + max(memory[key] for key in ("rollout", "evaluation", "update"))


def print_plan(ranks=(1, 8, 16)):
    print("\n### Memory a GPU needs, computed\n")
    print("GiB; `act` with the lengths and batch sizes of configs/gemma2_SIZE_pacific.json, prompts as long as they may be. Held all")
    print("along: float32 parameters, gradients and RMSprop state, and the bfloat16 reference, all sharded. In turn: a rollout and an")
    print("evaluation (whole bfloat16 copy, key-value cache, prefill), an update (gathered weights, activations, logits).\n")
    print("| model | GPUs | policy | reference | rollout | evaluation | update | peak | gradients gone: peak of rollout |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in ("2b", "9b", "27b"):
        training = act.load_config(ROOT / "configs" / f"gemma2_{size}_pacific.json").training_config
        for n in ranks:
            memory = training_memory(
                config_of(size), n, 4, training.per_device_train_batch_size, training.per_device_eval_batch_size,
                training.max_prompt_length, training.max_length - training.max_prompt_length, training.max_new_tokens,
            )  # fmt: skip
            policy = sum(memory[key] for key in HELD[:3])
            cells = [policy, *(memory[key] for key in ("reference", "rollout", "evaluation", "update")), peak_of(memory)]
            print(f"| {size} | {n} | " + " | ".join(f"{cell / GIB:.1f}" for cell in cells) + " |")


# --------------------------------------------------------------------------------------------------------------- the tables


def table(directory, size, total):
    """Measure everything and print it. Returns whether all is within limits."""
    verdicts = []

    def within(value, limit):
        verdicts.append(value <= limit)
        return "ok" if value <= limit else "OVER THE LIMIT"

    print(f"\n### {size}: checkpoint of {total / 1e9:.3f} GB in bfloat16 ({total // 2:,} parameters)\n")
    print("| load | peak RssAnon | of it before | over the checkpoint | limit | VmHWM | |\n|---|---|---|---|---|---|---|")
    [seen] = measure("load", directory)
    excess = seen["before"] if size == "tiny" else 0  # beside so small a model the imports alone would count
    ratio = (seen["peak"] - excess) / total
    cells = [f"{seen['peak'] / 1e9:.3f} GB", f"{seen['before'] / 1e9:.3f} GB", f"{ratio:.3f}", LOAD_LIMIT, f"{seen['resident'] / 1e9:.3f} GB"]
    print("| from_pretrained | " + " | ".join(map(str, cells)) + f" | {within(ratio, LOAD_LIMIT)} |")

    print("\n| step | rank | parameters | gradients | optimiser | sum | of one rank | limit | peak RssAnon | VmHWM | |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    steps = {ranks: measure("step", directory, ranks) for ranks in (1, 2)}
    sums = {ranks: [sum(seen[key] for key in HELD[:3]) for seen in results] for ranks, results in steps.items()}
    for ranks, results in steps.items():
        for rank, seen in enumerate(results):
            share, limit = sums[ranks][rank] / sums[1][0], RANK_LIMIT if ranks == 2 else 1
            cells = [seen[key] / 1e9 for key in HELD[:3]] + [sums[ranks][rank] / 1e9]
            row = f"| {ranks} ranks | {rank} | " + " | ".join(f"{cell:.4f} GB" for cell in cells)
            row += f" | {share:.4f} | {limit} | {seen['peak'] / 1e9:.3f} GB | {seen['resident'] / 1e9:.3f} GB | {within(share, limit)} |"
            print(row)

    print("\n| save | rank | parameters held | largest tensor | more RssAnon while saving | in tensors | limit | |")
    print("|---|---|---|---|---|---|---|---|")
    saves = {ranks: measure("save", directory, ranks) for ranks in (1, 2)}
    for ranks, results in saves.items():
        for rank, seen in enumerate(results):
            more, limit = (seen["peak"] - seen["before"]) / seen["largest"], (1 if rank else 2) + SLACK
            row = f"| {ranks} ranks | {rank} ({'does not write' if rank else 'writes'}) | {seen['reference'] / 1e9:.4f} GB "
            row += f"| {seen['largest'] / MIB:.1f} MiB | {(seen['peak'] - seen['before']) / MIB:.1f} MiB | {more:.2f} | {limit} "
            print(row + f"| {within(more, limit)} |")

    print("\n| held all along, computed and measured | ranks | computed | measured | deviation | |\n|---|---|---|---|---|---|")
    for ranks in (1, 2):
        memory = training_memory(config_of(size), ranks, dtype_bytes=2)
        computed, found = sum(memory[key] for key in HELD), max(sums[ranks]) + max(seen["reference"] for seen in saves[ranks])
        deviation = found / computed - 1
        print(f"| {size}, bfloat16 | {ranks} | {computed / 1e9:.4f} GB | {found / 1e9:.4f} GB | {deviation:+.4%} | {within(abs(deviation), 0.01)} |")
    return all(verdicts)


def main():
    parser = argparse.ArgumentParser(description="Measure the memory of loading, training and saving; compute what GPUs need.")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dir", default=None, help="where the temporary folder with the checkpoint is made")
    parser.add_argument("--plan", action="store_true", help="print the computed table alone")
    parser.add_argument("--child", choices=MEASURED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, Path(args.dir))
        return 0
    good = True
    if not args.plan:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            config = config_of(args.size)
            total = write_checkpoint(Path(folder) / "checkpoint", config, max_shard_bytes=10**9 if args.size != "tiny" else 10**7)
            good = table(Path(folder) / "checkpoint", args.size, total)
    print_plan()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
