"""How much memory a real size takes: loading, a sharded optimiser step, saving; and what a GPU needs for training.

    python tests/proofs/memory.py --size tiny                 a check of this script, a minute
    python tests/proofs/memory.py --size 2b --dir /big/disk   Gemma 2 2B: 20 GB of free memory, 11 GB of disk, minutes
    python tests/proofs/memory.py --plan                      the computed table alone

A random bfloat16 checkpoint is written shard by shard into a temporary folder of --dir. Each measurement is a process
of its own (one a rank, over gloo), in bfloat16 throughout so that 2B fits a desktop. A thread of it reads RssAnon of
/proc/self/status every 10 ms: memory that the process holds itself, without the pages of files that it has mapped,
which the system may drop (VmHWM, the largest resident size, has them too). "More" is the peak over what the process
held just before, imports and all. Ranks run with a malloc that gives memory back when it is freed.

  load   Gemma.from_pretrained, peak RssAnon (all of it) over the checkpoint's size: at most 1.15
  step   act.build_model, forward and backward of a short sequence with checkpointing, act.clip_and_step with RMSprop:
         bytes of parameters, gradients and optimiser state that a rank holds; each of two at most 0.55 of one alone
  save   a frozen sharded model in small shards: the rank that writes may hold a shard and a tensor, others a tensor

`training_memory` says what training needs from the sizes alone; what it says is held all along is set against what
`step` and `save` found. Ends with status 1 when something is over its limit.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import act  # noqa: E402
from data import write_json  # noqa: E402
from gemma import Forest, Gemma, GemmaConfig  # noqa: E402

MIB, GIB = 2**20, 2**30
# layers, hidden, intermediate, heads, key/value heads, head_dim, query_pre_attn_scalar, vocabulary: the published ones,
# and a small one
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
    return GemmaConfig(vocabulary, hidden, intermediate, layers, heads, kv_heads, head_dim, scalar, 4096, 50.0, 30.0)


def on_meta(config):
    """A model without memory, for its names and shapes."""
    with torch.device("meta"):
        return Gemma(config)


# --------------------------------------------------------------------------------------------------------- a checkpoint


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
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return total


def random_weight(shape):
    """As a fresh Gemma has it: normal with a deviation of fan_in^-0.5; the scales of norms are 1 + 0."""
    if len(shape) == 1:
        return torch.zeros(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[1] ** -0.5)


# ----------------------------------------------------------------------------------------- measurements, a process each


def status_bytes(key):
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


@contextlib.contextmanager
def watched():
    """Yields a dict; when the block is left it has "before" and "peak" of RssAnon, and VmHWM as "resident": bytes."""
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
    local = [tensor.to_local() if isinstance(tensor, act.gemma.DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def load(directory):
    on_meta(config_of("tiny"))  # torch imports some 20 MB more when it first makes a model on the meta device
    with watched() as seen:
        model = Gemma.from_pretrained(directory, dtype=torch.bfloat16)
    assert held(model.parameters()) > 0
    return seen


def sharded(directory, trained=True):
    mesh = act.make_mesh(torch.device("cpu"), 1)
    policy = act.PolicyModelConfig(str(directory), "bfloat16")
    training = act.TrainingConfig(gradient_checkpointing=True)
    return act.build_model(act.Config(policy_model_config=policy, training_config=training), mesh, trained)


def step(directory):
    """One optimiser step on one sequence. Gradients are counted before clip_and_step, which lets them go."""
    training = act.TrainingConfig(optim="rmsprop", learning_rate=1e-3)
    with watched() as seen:
        model = sharded(directory)
        tokens = torch.randint(model.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
        half = TOKENS // 2
        forest = Forest([tokens], [[0] * half + [1] * half])
        (-model.logps(forest).sum() / TOKENS).backward()
        gradients = held([parameter.grad for parameter in model.parameters()])
        optimizer = act.make_optimizer(
            model, training
        )  # training has it before; here the peak of two ranks must fit one machine
        norm = act.clip_and_step(model, optimizer, training.max_grad_norm, training.learning_rate)
    assert 0 < norm < float("inf"), f"the gradient's norm is {norm}"
    state = held([value for values in optimizer.state.values() for value in values.values()])
    assert len(optimizer.state) == len(list(model.parameters()))
    return {**seen, "parameters": held(model.parameters()), "gradients": gradients, "optimizer": state}


def save(directory):
    """A frozen model, as the reference is, written in shards as large as its largest tensor."""
    model = sharded(directory, trained=False)
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with watched() as seen:
        model.save_pretrained(directory.parent / "saved", max_shard_bytes=largest)
    return {**seen, "reference": held(model.parameters()), "largest": largest}


MEASURED = {"load": load, "step": step, "save": save}


def child(name, directory):
    """A measuring process: `load` alone, the others as a rank among others. Its results go to NAME-RANK.json."""
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
    env = {"CUDA_VISIBLE_DEVICES": ""} | ({} if name == "load" else {"MALLOC_MMAP_THRESHOLD_": str(MIB)})
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"memory.py: {name} with {ranks} ranks failed ({done.returncode})\n{done.stderr[-3000:]}")
    results = [json.loads((directory.parent / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]
    print(f"{name}, {ranks} ranks: {json.dumps(results)}", file=sys.stderr, flush=True)
    return results


# ---------------------------------------------------------------------------------------------- computed from the sizes

HELD = ("parameters", "gradients", "optimizer", "reference")


def training_memory(config, ranks, dtype_bytes=4, rows=1, eval_rows=32, prompt=1792, reply=256, new=128, lora_r=0):
    """Bytes that each of `ranks` GPUs needs for ACT with RMSprop, bf16 compute and checkpointing, sharded over all.

    lora_r: of adapters on all projections, in float32, beside bf16 weights that are policy and reference at once.

    `rows` pairs are trained on at a time and `eval_rows` samples are continued at a time, on each GPU. Prompts have `prompt`
    tokens and share nothing, replies `reply`, responses `new`. What is held is exact, `dtype_bytes` to a parameter.
    What comes in turn is an estimate from the tensors that are alive at the same time in gemma.py, and leaves out what
    the allocator wastes.
    """
    model, vocabulary, wide, hidden = on_meta(config), config.vocab_size, config.intermediate_size, config.hidden_size
    total, embedding, layer = (
        sum(p.numel() for p in part.parameters()) for part in (model, model.embed_tokens, model.layers[0])
    )
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))

    def decoding(rows):
        """The whole copy; keys and values, with half as much room again for a second turn; prefill, or a choice."""
        cache = rows * 1.5 * (prompt + new) * config.num_hidden_layers * 2 * keys * 2
        prefill = (
            rows * prompt * (6 * wide + 16 * hidden + 16 * queries) + 10 * rows * prompt**2
        )  # the last: making the mask
        copy = 0 if lora_r and ranks == 1 else 2 * total  # one process samples from the frozen weights themselves
        return copy + cache + max(prefill, 28 * rows * vocabulary)

    tokens, scored = rows * (prompt + 2 * reply), rows * 2 * reply  # a pair: its prompt once and both its sides
    gathered = 2 * 2 * embedding + 2 * 2 * layer  # both models' embeddings stay whole; the next layer comes early
    inputs = config.num_hidden_layers * tokens * hidden * 2  # of each layer, all that is kept of it
    recomputed = tokens * (14 * wide + 24 * hidden + 16 * queries) + 6 * layer + 10 * rows * (prompt + 2 * reply) ** 2
    logits = (
        14 * min(2**28, scored * vocabulary) + 8 * embedding
    )  # TokenLogps: a chunk in several forms, the embedding's gradient
    summed = 8 * embedding  # the embedding's gradient from its other end, and in float32 to be summed over ranks
    if lora_r:
        sides = sum(sum(p.shape) for name, p in model.layers.named_parameters() if p.ndim == 2)
        gathered = gathered / 2 if ranks > 1 else 0  # one model, whole where there is one process
        logits = 14 * min(2**28, scored * vocabulary) + 2 * embedding  # no gradient of the embedding
        update = gathered + inputs + max(recomputed - 6 * layer, logits)
        held = 4 * lora_r * sides / ranks
        return {
            "parameters": 2 * total / ranks + held, "gradients": held, "optimizer": held, "reference": 0.0,
            "sampling": decoding(eval_rows), "update": update,
        }  # fmt: skip
    return {
        **dict.fromkeys(HELD[:3], dtype_bytes * total / ranks),
        "reference": 2 * total / ranks,
        "sampling": decoding(eval_rows),
        "update": gathered + inputs + max(recomputed, logits, summed),
    }


def peak_of(memory):
    """Gradients are held during an update only; sampling and updates come one after the other."""
    held = sum(memory[key] for key in HELD)
    return held + max(memory["update"], memory["sampling"] - memory["gradients"])


CARDS = (24, 48, 80, 141)  # GB
CUDA = 2.5 * GIB  # the context, cuBLAS, NCCL, compiled graphs: 2 to 3 GiB


def print_plan():
    print("\n### Memory of each GPU, computed\n")
    print("GiB for the configs as they are, prompts as long as they may be. Held all along, sharded: parameters, optimiser's")
    print("state, reference. In turn: sampling (key-value cache, prefill, sharded also a whole bfloat16 copy), an update with")
    print(f"its gradients. Peak: of all that, and {CUDA / GIB:.1f} for CUDA itself. Then the smallest card that holds it.\n")
    print("| config | GPUs | pairs, samples at a time | held | sampling | update | peak | card |")
    print("|---|---|---|---|---|---|---|---|")
    for size, kind, ranks in itertools.product(("2b", "9b", "27b"), ("_lora", ""), (1, 2, 8)):
        name = f"gemma2_{size}_pacific{kind}.json"
        config = act.load_config(ROOT / "configs" / name)
        training, rank = config.training_config, config.policy_model_config.lora_r
        rows, samples = training.per_device_train_batch_size, training.per_device_eval_batch_size
        prompt, reply = training.max_prompt_length, training.max_length - training.max_prompt_length
        memory = training_memory(
            config_of(size), ranks, 4, rows, samples, prompt, reply, training.max_new_tokens, rank
        )
        peak = peak_of(memory) + CUDA
        card = next((f"{card} GB" for card in CARDS if peak <= card * 1e9), f"over {CARDS[-1]} GB")
        held = sum(memory[key] for key in ("parameters", "optimizer", "reference"))
        cells = held, memory["sampling"], memory["update"] + memory["gradients"], peak
        numbers = " | ".join(f"{cell / GIB:.1f}" for cell in cells)
        print(f"| {name} | {ranks} | {rows}, {samples} | {numbers} | {card} |")


# ----------------------------------------------------------------------------------------------------------- the tables


def gb(*values):
    return [f"{value / 1e9:.4f} GB" for value in values]


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*titles):
    print()
    row(*titles)
    row(*["---"] * len(titles))


def table(directory, size, total):
    """Measure everything and print it. Returns whether all is within limits."""
    verdicts = []

    def judged(value, limit):
        """The last cells of a row."""
        verdicts.append(value <= limit)
        return f"{value:.4f}", limit, "ok" if value <= limit else "OVER THE LIMIT"

    print(f"\n### {size}: a checkpoint of {total / 1e9:.3f} GB in bfloat16, {total // 2:,} parameters")
    header("load", "peak RssAnon", "before", "VmHWM", "over the checkpoint's size", "limit", "")
    [seen] = measure("load", directory)
    imports = seen["before"] if size == "tiny" else 0  # beside so small a model they would count
    row(
        "from_pretrained",
        *gb(seen["peak"], seen["before"], seen["resident"]),
        *judged((seen["peak"] - imports) / total, LOAD_LIMIT),
    )

    header(
        "step",
        "rank",
        "peak RssAnon",
        "VmHWM",
        "parameters",
        "gradients",
        "optimiser",
        "together",
        "of one rank's",
        "limit",
        "",
    )
    steps = {ranks: measure("step", directory, ranks) for ranks in (1, 2)}
    sums = {ranks: [sum(seen[key] for key in HELD[:3]) for seen in results] for ranks, results in steps.items()}
    for ranks, results in steps.items():
        for rank, seen in enumerate(results):
            cells = gb(seen["peak"], seen["resident"], *(seen[key] for key in HELD[:3]), sums[ranks][rank])
            row(f"of {ranks}", rank, *cells, *judged(sums[ranks][rank] / sums[1][0], RANK_LIMIT if ranks == 2 else 1))

    header("save", "rank", "parameters", "largest tensor", "more RssAnon", "in largest tensors", "limit", "")
    saves = {ranks: measure("save", directory, ranks) for ranks in (1, 2)}
    for ranks, results in saves.items():
        for rank, seen in enumerate(results):
            more = seen["peak"] - seen["before"]
            cells = gb(seen["reference"], seen["largest"], more)
            row(
                f"of {ranks}",
                f"{rank}{'' if rank else ', writes'}",
                *cells,
                *judged(more / seen["largest"], (1 if rank else 2) + SLACK),
            )

    header("held all along", "computed", "measured", "deviation", "limit", "")
    for ranks in (1, 2):
        memory = training_memory(config_of(size), ranks, dtype_bytes=2)
        computed, found = (
            sum(memory[key] for key in HELD),
            max(sums[ranks]) + max(seen["reference"] for seen in saves[ranks]),
        )
        row(f"{size}, {ranks} ranks, bfloat16", *gb(computed, found), *judged(abs(found / computed - 1), 0.01))
    return all(verdicts)


def main():
    parser = argparse.ArgumentParser(
        description="Measure the memory of loading, training and saving; compute what GPUs need."
    )
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
            total = write_checkpoint(
                Path(folder) / "checkpoint", config, max_shard_bytes=10**9 if args.size != "tiny" else 10**7
            )
            good = table(Path(folder) / "checkpoint", args.size, total)
    print_plan()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
