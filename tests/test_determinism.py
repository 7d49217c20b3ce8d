"""The same command ends in the same bits, on several threads, beside other programs, and where it was killed in between.

A step's tensors are above 32,768 numbers here, from which on torch divides the work between threads.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
from common import ROOT, THREADS, TINY, assert_same_weights, environment, metrics_of, rows_of

KILLED = """
import os, signal, torch
step, calls = torch.optim.AdamW.step, []
def killed(*arguments):
    calls.append(1)
    return step(*arguments) if len(calls) < 5 else os.kill(os.getpid(), signal.SIGKILL)
torch.optim.AdamW.step = killed
import act
act.run_as_program()
"""


def started(folder, program, *words):
    """A run in a process of its own, on two threads at least."""
    variables = {**environment(), "OMP_NUM_THREADS": str(max(2, THREADS)), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, *program, "--config", str(folder / "run.json"), *words]
    return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of a whole run of 6 steps, folder of one killed in its 5th and resumed, the latter's metrics before that).

    They run side by side, and another process keeps a core busy.
    """
    whole, killed = folders = [tmp_path_factory.mktemp(name) for name in ("whole", "killed")]
    config = json.loads((ROOT / "configs" / "tiny.json").read_text(encoding="utf-8"))
    config["policy_model_config"]["model_path"] = str(TINY / "sft")
    config["data_config"] = {"train_path": str(TINY / "train.jsonl")}
    config["training_config"] |= {"max_steps": 6, "sample_frequency": 3, "save_steps": 3, "save_total_limit": 0, "optim": "adamw"}
    for folder in folders:
        config["training_config"]["output_dir"] = str(folder / "out")
        (folder / "run.json").write_text(json.dumps(config))
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        first, second = started(whole, [ROOT / "act.py"]), started(killed, ["-c", KILLED])
        assert (first.wait(240), second.wait(240)) == (0, -signal.SIGKILL)
        before = metrics_of(killed)
        assert started(killed, [ROOT / "act.py"], "--resume").wait(240) == 0
    finally:
        busy.kill()
        busy.wait()
    return whole, killed, before


def test_two_runs_of_a_command_have_the_same_bits(runs):
    """As far as the killed one came, and what both had saved by then."""
    whole, killed, before = runs
    assert [row["step"] for row in before] == [1, 2, 3, 4]
    assert before == metrics_of(whole)[:4]
    assert all(row["tokens"] * 128 > 32_768 for row in before), "hidden states that several threads work on"
    assert_same_weights(*(folder / "out" / "checkpoints" / "step-3" for folder in (whole, killed)))


def test_a_killed_run_ends_in_the_same_bits(runs):
    whole, killed, _ = runs
    assert metrics_of(killed) == metrics_of(whole)
    assert rows_of(killed / "out" / "rollouts.jsonl") == rows_of(whole / "out" / "rollouts.jsonl")
    for name in os.listdir(whole / "out" / "model"):
        assert (killed / "out" / "model" / name).read_bytes() == (whole / "out" / "model" / name).read_bytes(), name
