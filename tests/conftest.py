# ruff: noqa: E402
"""Fixtures that several test files share; plain functions are in common.py.

The tests run on the CPU, whatever the machine has: they compare exact values, and start more processes than it may have
GPUs.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for others do not take their cores meanwhile

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from common import THREADS, TINY, pairs_from, random_model, write_lines

import act
from gemma import Template, Tokenizer


@pytest.fixture(autouse=True, scope="session")
def threads():
    """As many as OMP_NUM_THREADS says; without it one, since most models here are far too small for more."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(TINY / "tokenizer.model")


@pytest.fixture
def plain(tokenizer):
    return Template(tokenizer, "plain")


@pytest.fixture
def chat(tokenizer):
    return Template(tokenizer, "gemma")


@pytest.fixture(scope="session")
def model():
    return random_model()


@pytest.fixture(scope="session")
def tiny_rows():
    """The first conversations of the tiny world."""
    lines = (TINY / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:7]]


@pytest.fixture(scope="session")
def pairs(tiny_rows):
    """All turns of three dialogues of the tiny world, in order."""
    return pairs_from(*tiny_rows[:3])


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_rows):
    """A folder with model/, train.jsonl (3 conversations) and validation.jsonl (2, cut short)."""
    folder = tmp_path_factory.mktemp("world")
    random_model().save_pretrained(folder / "model")
    shutil.copyfile(TINY / "tokenizer.model", folder / "model" / "tokenizer.model")
    write_lines(folder / "train.jsonl", tiny_rows[:3])
    cut = [{"messages": row["messages"][: 1 + 2 * n]} for row, n in zip(tiny_rows[3:5], (2, 5), strict=True)]
    write_lines(folder / "validation.jsonl", cut)
    return folder


@pytest.fixture
def one_process():
    """A process group of this process alone, as `python act.py` makes one."""
    yield act.start_processes()
    if dist.is_initialized():  # a run within the test ends with its own
        dist.destroy_process_group()


@pytest.fixture
def mesh(one_process):
    return act.make_mesh(one_process, 1)
