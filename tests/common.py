"""What several test files build: tiny random models, pairs, runs of act.py here, in a new process or on ranks."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import act
import data
from act import TrainingConfig
from data import CLARIFY, Pair
from gemma import Gemma, GemmaConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs" / "tiny"
WINDOW = 8  # of the random models here; all prompts are longer
VOCABULARY = 416  # of the tiny world
FORMATS = ("plain", "gemma")
THREADS = int(os.environ.get("OMP_NUM_THREADS", 1))  # of each process


# ----------------------------------------------------------------------------------------------------------------------
# Models and pairs


def random_model(seed=4):
    """Three layers, of random weights, that like to say "?" and to end a line: an assistant that talks nonsense.

    It sometimes asks; with some seeds it never does, and the tests that need its questions say so then.
    """
    config = GemmaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW,
        attn_logit_softcapping=4.0, final_logit_softcapping=12.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Gemma(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(std=0.3)
            elif "self_attn" in name:
                weight *= 2
        model.embed_tokens.weight[:, 0] = 0.3
        model.embed_tokens.weight[[6, 265], 0] = torch.tensor([0.95, 0.9])  # newline and "?"
        model.norm.weight[0] = 6.0
    return model.eval()


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs_of(path, icl_examples=2, seed=0):
    """All turns of a file of conversations."""
    return data.ACTDataset(data.read_vertex_jsonl(path), CLARIFY, icl_examples, seed=seed).prepare_datasets()


def pairs_from(*conversations):
    """All turns of conversations in Vertex's messages form."""
    raw = "".join(json.dumps(row) + "\n" for row in conversations).encode()
    return data.ACTDataset(data.read_vertex_jsonl("c.jsonl", raw), CLARIFY, 2).prepare_datasets()


def prompted(pairs, template, max_length=900):
    """The same pairs with the tokens of their prompts, as a run makes them."""
    return [
        replace(pair, prompt=template.prompt(pair.context, pair.history, max_length, pair.instruction)) for pair in pairs
    ]


def a_pair(action=CLARIFY, chosen="right?", rejected="wrong", target="gold", **values):
    """A pair for Algorithm 2, its sides of one message each."""
    values = {"context": "", "messages": [("user", "hello")], "gold": [("model", "gold?")], **values}
    values["messages"] = values.pop("history", values["messages"])
    return Pair(action=action, chosen=[("model", chosen)], rejected=[("model", rejected)], target=target, **values)


def training_of(**values):
    return TrainingConfig(**{"max_length": 1000, "max_prompt_length": 900, "max_new_tokens": 6, **values})


def both_sides(pairs, template, training):
    """The sequences of a preference step: (tokens, mask: 1 where scored)."""
    return [
        act.sequence(pair, side, ended, template, training)
        for pair in prompted(pairs, template, training.max_prompt_length)
        for side, ended in ((pair.chosen, True), (pair.rejected, not pair.cut))
    ]


def model_config(world, lora_r=0, **training):
    """As much of a configuration as a model needs."""
    policy = act.PolicyModelConfig(model_path=str(world / "model"), lora_r=lora_r)
    return act.Config(policy_model_config=policy, training_config=training_of(**training))


def run_of(policy, reference, template, training, device="cpu", **values):
    """As much of an act.Run as a step needs."""
    config = SimpleNamespace(training_config=training)
    return SimpleNamespace(
        config=config, policy=policy, reference=reference, template=template, device=device, **values
    )


def oracle_logps(model, sequences):
    """Of each (tokens, mask) alone in its row, through the whole vocabulary's log_softmax."""
    sums = []
    for tokens, mask in sequences:
        logps = model(torch.tensor([tokens]))[0].log_softmax(-1)
        sums.append(sum(logps[i - 1, tokens[i]] for i in range(len(tokens)) if mask[i]))
    return torch.stack(sums)


def gradients_of(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(found, expected):
    """float32 rounds at 6e-8; orders of summation differ by some 2e-6 of a gradient, by processor."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert expected[name].norm() > 0, name
        assert (found[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def words(seed, count):
    """Random tokens."""
    return torch.randint(7, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def run_config(world, folder, task="act", evaluated=True, is_preference=False, **training):
    """A config file in `folder` of a run that takes a second; it writes to folder/out."""
    settings = {
        "output_dir": str(folder / "out"), "max_steps": 2, "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 4, "beta": 0.5, "learning_rate": 1e-3, "warmup_steps": 0, "max_new_tokens": 4,
        "temperature": 0.7, "max_length": 400, "max_prompt_length": 300, "max_turns": 2, "is_preference": is_preference,
        **training,
    }  # fmt: skip
    files = {
        "train_path": str(world / "train.jsonl"),
        "validation_path": str(world / "validation.jsonl") if evaluated else "",
        "tolerance": 0.0,
    }
    policy = {"model_path": str(world / "model")}
    config = {"task": task, "policy_model_config": policy, "data_config": files, "training_config": settings}
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(config))
    return str(folder / "run.json")


SMALLEST = {"policy_model_config": {"model_path": "m"}, "data_config": {"train_path": "t"}}


def config_file(folder, **sections):
    """A config file with the keys that every run needs and these sections'."""
    merged = dict(SMALLEST)
    for name, values in sections.items():
        both = isinstance(values, dict) and name in SMALLEST
        merged[name] = {**SMALLEST[name], **values} if both else values
    path = folder / "run.json"
    path.write_text(json.dumps(merged))
    return path


def run(*words):
    """act.py in this process: its exit status."""
    return act.main([str(word) for word in words])


def error_of(capsys, *words):
    """The one line of a run that is refused."""
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("act.py: error: ") and len(said.splitlines()) == 1 and said.endswith("\n")
    return said


def environment():
    return {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(ROOT)}


def run_program(*words):
    """`python *words` as a user runs it: (exit status, stdout, stderr)."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(), check=False)
    return done.returncode, done.stdout, done.stderr


SERVER = multiprocessing.get_context("forkserver")  # has imported torch and act.py once for all processes made from it
SERVER.set_forkserver_preload(["common"])


def run_on_ranks(count, folder, *words, patch=None):
    """act.py on `count` ranks, as torchrun describes them to it: (their exit statuses, all that they said).

    patch: called on each before; what they say is collected in folder/log.
    """
    ranks = start_on_ranks(count, folder, *words, patch=patch)
    for process in ranks:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in ranks], (folder / "log").read_text()


def start_on_ranks(count, folder, *words, patch=None):
    """The same without waiting for their end: the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patched:  # the server's sys.path need not be ours
        patched.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        forkserver.ensure_running()
    words, log = [str(word) for word in words], folder / "log"
    ranks = [SERVER.Process(target=one_rank, args=(rank, count, port, log, words, patch)) for rank in range(count)]
    for process in ranks:
        process.start()
    return ranks


def one_rank(rank, count, port, log, words, patch):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(THREADS)
    if patch:
        patch()
    sys.argv[1:] = words
    act.run_as_program()


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_of(folder):
    """The rows of metrics.jsonl without what a clock measured."""
    rows = rows_of(folder / "out" / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in rows]


def training_rows(folder):
    return [row for row in metrics_of(folder) if "loss" in row]


def weights_of(directory):
    return dict(Gemma.from_pretrained(directory).named_parameters())


def assert_same_weights(a, b):
    first, second = weights_of(a), weights_of(b)
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_same_rows(rows, expected):
    """The same global batches: losses, sampled trajectories and evaluations."""
    for row, wanted in zip(rows, expected, strict=True):
        for key in wanted:
            if key.startswith("act/"):
                assert row[key] == wanted[key]
        row.pop("tokens", None), wanted.pop("tokens", None)  # ranks share no prefixes
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-4)  # log-probabilities of -100 are rounded at 4e-6
    happened = {key for row in rows for key, value in row.items() if key.startswith("act/") and value}
    assert len(happened) > 1, "more than one outcome"


def assert_nearly_same_weights(found, wanted):
    found, wanted = weights_of(found), weights_of(wanted)
    for name in wanted:
        assert_nearly_same(found[name], wanted[name], name)


def assert_nearly_same(found, wanted, name):
    """After some steps. Each moves a weight by 1e-3 or so, even one whose gradient is nothing but rounding.

    Such weights are few, and may differ by all of that: the bound is on the root of the mean square.
    """
    off = (found - wanted).square().mean().sqrt()
    assert off < 1e-5, f"{name} is off by {off}"
