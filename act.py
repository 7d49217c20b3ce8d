"""ACT, Action-Based Contrastive Self-Training (arXiv 2406.00222): teach a language model when to ask a clarifying question.

    torchrun act.py --config tiny.json                                           on a laptop, no GPU: 45 seconds
    torchrun --nproc-per-node 8 act.py --config configs/gemma2_2b_pacific.json   on GPUs, sharded with fully_shard
    torchrun act.py --config tiny.json --task dpo --training_config.beta 0.1     any key of the file can be overridden

Read data.py first (what a turn and a preference record are), then this file from "ACT" to "Training", then gemma.py.

Where we depart from the paper's Algorithm 2 and from the published research code, and why (README.md has the whole list):
  - `max_turns` bounds the simulated conversation; one that never answers loses (the paper's loop has no bound, the code allows one turn).
  - A lucky answer on a turn that called for a question is still the wrong action (the published code rewards it).
  - Policy and reference score the same sequences (the published code samples inside a forward pass that both models run).
  - Only the assistant's tokens are scored, not the simulated user's (`loss_on: "all"` scores both, as the published code does).
  - A pair whose two sides have become the same text goes back to its original pair: its gradient would be zero.
  - The action is classified from every response by the same classifier that labels unlabelled data.
"""

import hashlib
import http.client
import json
import math
import os
import random
import re
import shutil
import sqlite3
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import get_type_hints
from urllib.parse import quote, urlsplit

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import data
import gemma
from data import ANSWER, CLARIFY, InputError
from gemma import Forest, Gemma2, Gemma2Config, KVCache, Tokenizer, generate, write_json

INPUT_ERRORS = (InputError, gemma.InputError)  # bad input: one line on stderr, exit status 2, no traceback

# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class PolicyModelConfig:
    model_path: str = ""  # directory with config.json, *.safetensors, tokenizer.model
    dtype: str = "float32"  # of the parameters held between steps; training in bfloat16 is training_config.bf16


@dataclass(frozen=True)
class HelperConfig:
    backend: str = ""  # "rule", "gemma" or "gemini"; "": "gemini" where model_id is set, else "rule", which needs no model
    model_path: str = ""  # gemma: directory of a checkpoint with its tokenizer.model, or "reference": the frozen reference's weights
    model_id: str = ""  # gemini: e.g. "gemini-2.0-flash-001"
    base_url: str = "https://generativelanguage.googleapis.com"  # gemini: or that of a proxy
    temperature: float = 0.0  # 0: greedy
    max_new_tokens: int = 128  # of one answer
    batch_size: int = 16  # gemma: prompts that are continued together
    concurrency: int = 16  # gemini: calls in flight
    max_retries: int = 5  # gemini: of one call, after 429, 5xx, resets, time-outs and half answers
    max_failures: int = 20  # gemini: calls in a row without an answer, failed or blocked, after which the run saves and stops
    timeout: float = 60.0  # gemini: seconds without a sign of life
    cache_path: str = "helper_cache.sqlite"  # gemini: answers already paid for; "" keeps none


@dataclass(frozen=True)
class DataConfig:
    train_path: str = ""  # JSONL: conversations, or preference records where is_preference is set
    validation_path: str = ""  # the same, for the evaluation; it may be left out
    prompt_format: str = "plain"  # "plain": User: / Assistant: lines; "gemma": Gemma's chat template
    heuristic: str = "drop_f1"  # the task's score of a final answer: drop_f1, coqa_f1 or exact_match
    tolerance: float = 0.9  # a trajectory wins if its score is above this


@dataclass(frozen=True)
class TrainingConfig:
    output_dir: str = "output"  # everything that a run writes
    seed: int = 42  # of the data order, the samples and the pairs; they do not depend on the number of processes
    per_device_train_batch_size: int = 1  # examples of one forward pass on one device
    per_device_eval_batch_size: int = 16  # examples that are continued together in an evaluation
    gradient_accumulation_steps: int = 1  # forward passes to one optimiser step; all of them sample from the same policy
    learning_rate: float = 5e-7  # at the end of the warm-up; the paper's, as are beta, optim, the schedule and the epochs
    lr_scheduler_type: str = "cosine"  # cosine, linear or constant, after the warm-up
    warmup_steps: int = 0  # from 0 up to learning_rate
    optim: str = "rmsprop"  # rmsprop or adamw
    weight_decay: float = 0.0  # of the optimiser
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to it; 0: no clipping
    num_train_epochs: float = 2.0  # passes over the training turns
    max_steps: int = -1  # above 0 it replaces num_train_epochs
    do_eval: bool = True  # where there is a validation_path
    eval_steps: int = 0  # 0: evaluate before the first and after the last step only
    logging_steps: int = 1  # a line of metrics.jsonl every n steps
    save_steps: int = 0  # a checkpoint every n steps; 0: only the final model
    save_total_limit: int = 1  # checkpoints kept; 0 keeps all
    bf16: bool = False  # compute in bfloat16; parameters stay in policy_model_config.dtype, sums in float32
    gradient_checkpointing: bool = False  # recompute each layer in the backward pass
    dp_replicate_size: int = 1  # copies of the sharded model, e.g. the number of nodes: sharding then stays inside a node
    max_length: int = 1024  # tokens of prompt and trajectory; what is longer loses its end
    max_prompt_length: int = 896  # a longer prompt loses its oldest turns, then the head of its context
    beta: float = 0.05  # DPO: how far the policy may move from the reference
    label_smoothing: float = 0.0  # share of pairs taken to be the wrong way round (conservative DPO)
    loss_type: str = "sigmoid"  # sigmoid (DPO), hinge or ipo
    rpo_alpha: float = 0.0  # weight of the chosen side's negative log-likelihood per token, added to the DPO loss
    loss_on: str = "assistant"  # "assistant": its tokens only; "all": the simulated user's too
    sample_frequency: int = 1  # sample on policy at every n-th step; 0: never, which is offline DPO
    target_label: str = CLARIFY  # the action that the preference model writes; no other is known
    icl_examples: int = 10  # examples that the preference model is shown
    action_labels: str = "gold"  # of the training turns: "gold"; "classifier": as if the file had none; "random": by a coin (ablation)
    class_balance: dict | None = None  # e.g. {"CLARIFY": 2, "ANSWER": 1}: resample the training turns of each action
    is_preference: bool = False  # the data files hold preference records
    max_new_tokens: int = 128  # of one response
    temperature: float = 1.0  # of the policy's samples in training; evaluation is greedy
    top_k: int = 0  # sample among the k most likely tokens only; 0: all
    top_p: float = 1.0  # sample among the most likely tokens that together have this probability
    max_turns: int = 3  # responses of one simulated trajectory
    judge: str = "trajectory"  # what a sample with the right action is judged by: "trajectory", or "action" alone (ablation)


@dataclass(frozen=True)
class Config:
    task: str = "act"
    policy_model_config: PolicyModelConfig = field(default_factory=PolicyModelConfig)
    action_model_config: HelperConfig = field(default_factory=HelperConfig)
    user_simulator_config: HelperConfig = field(default_factory=HelperConfig)
    intent_model_config: HelperConfig = field(default_factory=HelperConfig)
    preference_model_config: HelperConfig = field(default_factory=HelperConfig)
    data_config: DataConfig = field(default_factory=DataConfig)
    training_config: TrainingConfig = field(default_factory=TrainingConfig)


CHOICES = {
    "task": ("act", "sft", "dpo", "generate_preference", "evaluate"),
    "backend": ("", "rule", "gemma", "gemini"),
    "dtype": ("float32", "bfloat16"),
    "prompt_format": ("plain", "gemma"),
    "heuristic": tuple(data.HEURISTICS),
    "lr_scheduler_type": ("cosine", "linear", "constant"),
    "optim": ("rmsprop", "adamw"),
    "loss_type": ("sigmoid", "hinge", "ipo"),
    "loss_on": ("assistant", "all"),
    "action_labels": data.ACTION_LABELS,
    "judge": ("trajectory", "action"),
}
AT_LEAST_ONE = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps", "max_new_tokens",
    "max_turns", "icl_examples", "dp_replicate_size", "batch_size", "concurrency", "max_failures",
}  # fmt: skip
ANY_NUMBER = {"max_steps", "seed"}  # all others are from 0 up
FOREIGN = {  # keys of the published research code's configs that mean nothing here: accepted, named once, not read
    "policy_model_config": "model_id token revision trust_remote_code use_flash_attention_2 model_code_revision torch_dtype "
    "tokenizer_name_or_path load_in_4bit load_in_8bit",
    "data_config": "preference_batch_generation has_context_metadata train_preference_filename validation_preference_filename "
    "truncation_side eval_data eval_result_output_path eval_sample_output_path eval_max_input_length",
    "training_config": "project_id location staging_bucket machine_type accelerator_type packing gradient_checkpointing_kwargs "
    "resume_from_checkpoint eval_strategy save_strategy logging_strategy max_seq_length world_size log_level logging_first_step",
}


def load_config(path, overrides=()):
    """Config from a JSON file, looked for as given and then in configs/, and ("section.key", "value") overrides.

    Raises InputError for a key that nothing reads (naming the nearest that exists), a value of another type or out of range.
    """
    path = next((p for p in (Path(path), Path("configs") / path) if p.is_file()), None) or Path(path)
    raw = gemma.read_json(path)
    where = {}  # override -> how to call it in an error
    for key, text in overrides:
        section, _, name = key.rpartition(".")
        target = raw.setdefault(section, {}) if section else raw
        if not isinstance(target, dict):
            raise InputError(f"--{key}: {section} is not a section of {path}")
        target[name] = text if text in ("NaN", "Infinity", "-Infinity") else parse_value(text)
        where[key] = f"--{key}"
    for section, names in FOREIGN.items():
        unread = raw[section].keys() & set(names.split()) if isinstance(raw.get(section), dict) else ()
        if unread:
            say(f"{path}: {section}: not read here: {', '.join(sorted(unread))}")
            raw[section] = {key: value for key, value in raw[section].items() if key not in unread}
    config = build_section(Config, raw, str(path), "", where)
    check_config(config, path)
    return config


def parse_value(text):
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def build_section(cls, raw, path, prefix, where):
    """An instance of a config dataclass from a dict, every key and type checked."""
    if not isinstance(raw, dict):
        raise InputError(f"{path}: {prefix.rstrip('.')} is {raw!r}, expected an object")
    types, values = get_type_hints(cls), {}
    for key, value in raw.items():
        at = where.get(prefix + key, f"{path}: {prefix}{key}")
        if key not in types:
            near = get_close_matches(key, types, 1, 0) or [""]
            raise InputError(f"{at}: unknown key, the nearest known one is {prefix}{near[0]}")
        if is_dataclass(types[key]):
            values[key] = build_section(types[key], value, path, f"{prefix}{key}.", where)
            continue
        if types[key] is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if types[key] is str and type(value) in (int, float) and prefix + key in where:
            value = str(value)  # a number on the command line may be a name
        if not isinstance(value, types[key]) or (isinstance(value, bool) and types[key] is not bool):
            raise InputError(f"{at} is {value!r}, expected {getattr(types[key], '__name__', types[key])}")
        if key in CHOICES and value not in CHOICES[key]:
            near = get_close_matches(value, CHOICES[key], 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InputError(f"{at} is {value!r}, expected one of {', '.join(filter(None, CHOICES[key]))}{hint}")
        if key in AT_LEAST_ONE and value < 1:
            raise InputError(f"{at} is {value}, expected at least 1")
        if type(value) in (int, float) and key not in ANY_NUMBER and not 0 <= value < math.inf:
            raise InputError(f"{at} is {value}, expected a number from 0")
        values[key] = value
    return cls(**values)


def check_config(config, path):
    """The rules that concern more than one key."""
    training, files = config.training_config, config.data_config
    if training.max_prompt_length >= training.max_length:
        raise InputError(
            f"{path}: max_prompt_length {training.max_prompt_length} leaves no room for a response, expected less than "
            f"max_length {training.max_length}"
        )
    if training.is_preference and training.action_labels == "classifier":
        raise InputError(f"{path}: action_labels is 'classifier', but is_preference is set, and preference records hold their actions")
    if training.action_labels == "random" and (training.class_balance or config.task == "sft"):
        what = f"task {config.task!r}" if config.task == "sft" else "class_balance"
        raise InputError(f"{path}: action_labels is 'random', which changes pairs, not gold replies: not with {what}")
    if not 0 < training.top_p <= 1:
        raise InputError(f"{path}: top_p is {training.top_p}, expected a number above 0, up to 1")
    if training.loss_type == "ipo" and training.beta == 0:
        raise InputError(f"{path}: beta is 0, expected a number above 0 for loss_type 'ipo'")
    if not 0 <= training.label_smoothing < 0.5:
        raise InputError(f"{path}: label_smoothing is {training.label_smoothing}, expected a number from 0, below 0.5")
    needed = {"policy_model_config.model_path": config.policy_model_config.model_path}
    if config.task == "evaluate":
        needed["data_config.validation_path"] = files.validation_path
    else:
        needed["data_config.train_path"] = files.train_path
    if config.task == "generate_preference":
        del needed["policy_model_config.model_path"]
    for key, value in needed.items():
        if not value:
            raise InputError(f"{path}: {key} is missing, task '{config.task}' needs it")
    if config.task == "generate_preference" and training.is_preference:
        raise InputError(f"{path}: task 'generate_preference' makes preference records from conversations, but is_preference is set")


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def start_processes():
    """Join the process group that torchrun describes, or make one of a single process. Returns the device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda" if cuda else "cpu")


def is_main():
    return int(os.environ.get("RANK", 0)) == 0


def say(text):
    if is_main():
        print(text, flush=True)


class Progress:
    """One line that says how far a stage is: updated in place on a terminal, else printed every `every` seconds."""

    def __init__(self, label, total, every=10.0):
        self.label, self.total, self.start = label, total, time.monotonic()
        self.tty, self.every = sys.stdout.isatty(), every
        self.next = self.start + (0 if self.tty else every)

    def __call__(self, done, text=""):
        now = time.monotonic()
        if not is_main() or (now < self.next and done < self.total):
            return
        self.next = now + (0.1 if self.tty else self.every)
        line = f"{self.label} {done}/{self.total}  {now - self.start:.0f} s  {text}".rstrip()
        print(f"\r\033[K{line}" + ("\n" if done == self.total else "") if self.tty else line, end="" if self.tty else "\n", flush=True)


def all_sum(values, device):
    """Sum of a list of numbers over all ranks, element by element, in one message."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_gathered(rows):
    """The lists of all ranks, one after the other."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, rows)
    return [row for rows in lists for row in rows]


def shares(count, rank, world):
    """The part of range(count) that a rank works on: contiguous, so that the turns of a dialogue stay together."""
    return range(count * rank // world, count * (rank + 1) // world)


# ----------------------------------------------------------------------------------------------------------------------
# Models


def make_mesh(device, replicas):
    """The ranks as [copies, shards]: parameters are sharded along the second dimension and repeated along the first."""
    world = dist.get_world_size()
    if world % replicas:
        raise InputError(f"dp_replicate_size is {replicas}, expected a divisor of the number of processes, {world}")
    return init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def build_model(directory, mesh, dtype, bf16=False, trainable=True, checkpointing=False):
    """A Gemma 2 sharded over the ranks of a mesh, each of which reads only its part of the checkpoint."""
    with torch.device("meta"):
        model = Gemma2(Gemma2Config.from_json(Path(directory) / "config.json")).to(dtype)
    model.requires_grad_(trainable)
    model.set_checkpointing(checkpointing)
    mesh = mesh if mesh.size(0) > 1 else mesh["shard"]
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    if bf16:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(model, "logps")
    model.to_empty(device=mesh.device_type)
    gemma.load_safetensors(dict(model.named_parameters()), directory, prefix="model.")
    return model


@torch.no_grad()
def gathered(model, bf16=False):
    """An unsharded copy to sample from: weights are gathered once for a whole rollout, and no rank waits for another in it."""
    with torch.device("meta"):
        whole = Gemma2(model.config)
    dtype = torch.bfloat16 if bf16 else model.embed_tokens.weight.dtype
    whole.load_state_dict({name: parameter.full_tensor().to(dtype) for name, parameter in model.named_parameters()}, assign=True)
    return whole


# ----------------------------------------------------------------------------------------------------------------------
# Pairs, and text to tokens


@dataclass
class Pair:
    """One user turn and the two ways of going on that the loss compares. Messages are (role, text), role "user" or "model"."""

    context: str
    history: list  # messages up to and including the user turn
    action: str  # the gold action
    chosen: list  # messages of the winning trajectory (y_w)
    rejected: list  # messages of the losing one (y_l)
    gold: list  # messages of the gold trajectory
    target: str  # the gold final answer
    instruction: str
    record: dict  # where it comes from


def make_pairs(records, path):
    """Pairs from preference records: their plain text is split again, so that files and conversations give the same tokens."""
    pairs = []
    for i, record in enumerate(records):
        instruction, context, history = data.split_dialogue(record["input_text"])
        chosen, rejected, gold = (data.split_reply(record[key]) for key in ("chosen", "rejected", "output_text"))
        if not history or history[-1][0] != "user":
            raise InputError(f"{path}: record {i + 1}: input_text does not end with a line 'User: '")
        if not all(messages and messages[0][0] == "model" for messages in (chosen, rejected, gold)):
            raise InputError(f"{path}: record {i + 1}: chosen, rejected or output_text does not begin with the assistant's text")
        target = data.first_reply(record["gold_target"])
        pairs.append(Pair(context, history, record["dialogue_policy"], chosen, rejected, gold, target, instruction, record))
    return pairs


class Template:
    """Text to tokens, message by message, so that dialogues that begin alike begin with the same tokens.

    plain:  <bos>instruction / [context] / context / [conversation] / User: text / Assistant: text, a line each
    gemma:  <bos><start_of_turn>user / context, blank line, text<end_of_turn> / <start_of_turn>model / text<end_of_turn> / ...
    """

    def __init__(self, tokenizer, prompt_format):
        self.tokenizer, self.plain, self.encode = tokenizer, prompt_format == "plain", tokenizer.encode
        self.newline = self.encode("\n")
        if tokenizer.bos_id is None or not self.newline:
            raise InputError(f"{tokenizer.path}: a prompt needs <bos> and newlines, this vocabulary lacks one of them")
        if not self.plain and None in (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id):
            raise InputError(f"{tokenizer.path}: no pieces '<start_of_turn>' and '<end_of_turn>', which prompt_format 'gemma' needs")
        self.end = self.newline if self.plain else [tokenizer.end_of_turn_id]
        self.opening = self.encode("Assistant:") if self.plain else self.turn("model")
        self.stop_ids = {self.end[-1], tokenizer.eos_id}
        if self.plain:  # a message is one line; large vocabularies have pieces of several newlines, too
            self.stop_ids |= {i for i in range(len(tokenizer)) if tokenizer.sp.id_to_piece(i).startswith("\n")}

    def turn(self, role):
        return [self.tokenizer.start_of_turn_id, *self.encode(f"{role}\n")]

    def message(self, role, text):
        """[(tokens, whether the assistant wrote them), ...] of one message, all its markers included."""
        if self.plain:
            if role == "user":
                return [(self.encode("User: " + text) + self.newline, False)]
            return [(self.opening, False), (self.encode(" " + text) + self.end, True)]
        if role == "user":
            return [(self.turn("user") + self.encode(text.strip()) + self.end + self.newline, False)]
        return [(self.opening, False), (self.encode(text.strip()) + self.end, True), (self.newline, False)]

    def prompt(self, pair, max_length):
        """Tokens that ask for the assistant's next message, at most `max_length` of them where the last user turn allows it.

        A longer prompt loses its oldest turns first, then the head of its context, never the last user turn.
        """
        turns = [[token for tokens, _ in self.message(*message) for token in tokens] for message in pair.history]
        if self.plain:
            before = [self.tokenizer.bos_id, *self.encode(f"{pair.instruction}\n[context]\n")]
            context, after = self.encode(pair.context), self.encode("\n[conversation]\n")
        else:
            before, after = [self.tokenizer.bos_id], []
            context = self.encode(pair.context.strip()) + self.encode("\n\n") if pair.context.strip() else []
        room = max_length - len(before) - len(after) - len(self.opening)
        users = [i for i, (role, _) in enumerate(pair.history) if role == "user"]
        kept = 0 if self.plain else users[0]  # Gemma's template begins with the user
        while kept < users[-1] and len(context) + sum(map(len, turns[kept:])) > room:
            kept = next(i for i in users if i > kept)
        turns = turns[kept:]
        spare = max(0, room - sum(map(len, turns)))
        context = context[max(0, len(context) - spare) :]
        if not self.plain and context:  # no system role: the context stands at the head of the first user turn
            start = self.turn("user")
            turns[0], context = start + context + turns[0][len(start) :], []
        return [token for tokens in (before, context, after, *turns, self.opening) for token in tokens]

    def reply(self, messages):
        """(tokens, mask) of a trajectory that follows `prompt`; mask: 1 where the assistant wrote the token."""
        pieces = [piece for message in messages for piece in self.message(*message)][1:]  # the prompt ends with the opening
        while pieces and not pieces[-1][1]:  # nothing after the last reply
            pieces.pop()
        tokens = [token for tokens, _ in pieces for token in tokens]
        return tokens, [int(written) for tokens, written in pieces for _ in tokens]

    def text(self, tokens):
        """A response as a message's text: one line in the plain format."""
        text = self.tokenizer.decode(tokens)
        return data.fold(text) if self.plain else text.strip()


# ----------------------------------------------------------------------------------------------------------------------
# Log-probabilities and the loss


class Scored:
    """Sequences (prompt, reply, mask) as one Forest, and for every scored token: where it is predicted, what it is, whose it is."""

    def __init__(self, sequences, device):
        self.forest = Forest([prompt + reply for prompt, reply, _ in sequences])
        self.used = round((1 - self.forest.padding) * self.forest.tokens.numel())  # tokens that are computed
        rows, slots, targets, owners = [], [], [], []
        for i, (prompt, reply, mask) in enumerate(sequences):
            row, path = self.forest.paths[i]
            at = [len(prompt) + j for j, written in enumerate(mask) if written]
            rows += [row] * len(at)
            slots += path[[j - 1 for j in at]].tolist()
            targets += [reply[j - len(prompt)] for j in at]
            owners += [i] * len(at)
        self.rows, self.slots, self.targets, self.owners = torch.tensor([rows, slots, targets, owners], device=device)
        self.lengths = torch.bincount(self.owners, minlength=len(sequences))  # scored tokens of each sequence
        self.forest.to(device)

    def logps(self, model):
        """Log-probability of each reply, summed over its scored tokens: float32 [sequences]. For policy and reference alike."""
        token_logps = model.logps(self.forest, self.rows, self.slots, self.targets)
        return torch.zeros(len(self.lengths), device=token_logps.device).index_add(0, self.owners, token_logps)


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             beta, label_smoothing=0.0, loss_type="sigmoid"):  # fmt: skip
    """Losses of preference pairs; all arguments and results float32 [batch].

    With the margin m = log(pi(y_w)/ref(y_w)) - log(pi(y_l)/ref(y_l)): "sigmoid" is DPO, -log sigmoid(beta m) (arXiv 2305.18290,
    equation 7), with `label_smoothing` the share of pairs taken to be the wrong way round (conservative DPO); "hinge" is
    max(0, 1 - beta m) (SLiC, arXiv 2305.10425); "ipo" is (m - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17).
    Returns (losses, chosen_rewards, rejected_rewards), rewards being beta times the log-ratios.
    """
    chosen_ratios = policy_chosen_logps - reference_chosen_logps
    rejected_ratios = policy_rejected_logps - reference_rejected_logps
    margins = chosen_ratios - rejected_ratios
    if loss_type == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * margins) - label_smoothing * F.logsigmoid(-beta * margins)
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * margins)
    elif loss_type == "ipo":
        losses = (margins - 1 / (2 * beta)).square()
    else:
        raise InputError(f"loss_type is {loss_type!r}, expected one of {', '.join(CHOICES['loss_type'])}")
    return losses, beta * chosen_ratios.detach(), beta * rejected_ratios.detach()


# ----------------------------------------------------------------------------------------------------------------------
# ACT: on-policy pairs (the paper's Algorithm 2)

WRONG_ACTION = "wrong_action"  # the first response asks where it should answer, or answers where it should ask
GOOD_OUTCOME = "good_outcome"  # right action, and the trajectory ends in a good answer
BAD_OUTCOME = "bad_outcome"  # right action, but the answer is not good enough
NO_ANSWER = "no_answer"  # right action, but it is still asking after max_turns responses
SAME_TEXT = "same_text"  # the two sides have become equal: the original pair stays
HELPER_FAILED = "helper_failed"  # a helper model gave no usable answer: the original pair stays
OUTCOMES = (WRONG_ACTION, GOOD_OUTCOME, BAD_OUTCOME, NO_ANSWER, SAME_TEXT, HELPER_FAILED)


def act_pair(pair, respond, classify_action, simulate_user, score, tolerance, max_turns):
    """The on-policy pair of one example, and its outcome. Everything between "sample" and "update" in Algorithm 2.

    This is the form to read beside the paper; training runs `act_pairs`, and a test holds the two equal.

    y_w = pair.chosen, y_l = pair.rejected, a = pair.action; the rest are plain functions:
    respond(pair, trajectory) -> text         y ~ pi_theta(. | prompt, trajectory)
    classify_action(text) -> action           A; None where the helper failed
    simulate_user(pair, trajectory) -> text   U; None where the helper failed. None for the function: the action alone decides (an ablation)
    score(text, target) -> number             H, and `tolerance` is epsilon
    """
    response = respond(pair, [])
    action = classify_action(response)
    trajectory = [("model", response)]
    if action not in (pair.action, None):  # the implicit action is not the gold one: the response loses
        return contrast(pair, trajectory, WRONG_ACTION)
    if not simulate_user and action is not None:
        return contrast(pair, trajectory, GOOD_OUTCOME)
    while action == CLARIFY:  # play the conversation on until there is an answer
        if len(trajectory) >= 2 * max_turns - 1:
            return contrast(pair, trajectory, NO_ANSWER)
        reply = simulate_user(pair, trajectory)
        if reply is None:
            return contrast(pair, trajectory, HELPER_FAILED)
        trajectory.append(("user", reply))
        response = respond(pair, trajectory)
        action = classify_action(response)
        trajectory.append(("model", response))
    if action is None:
        return contrast(pair, trajectory, HELPER_FAILED)
    good = score(response, pair.target) > tolerance  # judged by where it leads
    return contrast(pair, trajectory, GOOD_OUTCOME if good else BAD_OUTCOME)


def contrast(pair, trajectory, outcome):
    """A good trajectory becomes y_w, any other y_l; one that a helper cut short tells nothing and changes nothing."""
    if outcome == HELPER_FAILED:
        return pair, outcome
    new = replace(pair, chosen=trajectory) if outcome == GOOD_OUTCOME else replace(pair, rejected=trajectory)
    if new.chosen == new.rejected:
        return pair, SAME_TEXT
    return new, outcome


def act_pairs(pairs, respond, classify_actions, simulate_users, score, tolerance, max_turns):
    """`act_pair` for many examples at once, turn by turn in lock-step. Returns ([Pair], [outcome])."""
    turns = max_turns if simulate_users else 1
    trajectories, actions = rollouts(pairs, respond, classify_actions, simulate_users, turns, gold_action_only=True)
    new = []
    for pair, trajectory, (first, last) in zip(pairs, trajectories, actions, strict=True):
        if last is None:
            outcome = HELPER_FAILED
        elif first != pair.action:
            outcome = WRONG_ACTION
        elif not simulate_users:
            outcome = GOOD_OUTCOME
        elif last == CLARIFY:
            outcome = NO_ANSWER
        else:
            outcome = GOOD_OUTCOME if score(trajectory[-1][1], pair.target) > tolerance else BAD_OUTCOME
        new.append(contrast(pair, trajectory, outcome))
    return [pair for pair, _ in new], [outcome for _, outcome in new]


def rollouts(pairs, respond, classify_actions, simulate_users, max_turns, gold_action_only=False):
    """Play every conversation on until the policy answers, or has responded `max_turns` times, or a helper fails.

    The functions take and return lists: respond(rows, trajectories), classify_actions(texts), simulate_users(rows, trajectories),
    rows being positions in `pairs`. gold_action_only: go on only where the first response took the gold action.
    Returns trajectories [[(role, text)]] and the actions of each one's first and last response; last is None where a helper failed.
    """
    trajectories, actions = [[] for _ in pairs], [None] * len(pairs)
    active = list(range(len(pairs)))
    for turn in range(max_turns):
        if turn > 0:
            for row, text in zip(active, simulate_users(active, [trajectories[row] for row in active]), strict=True):
                if text is None:
                    actions[row] = (actions[row][0], None)
                else:
                    trajectories[row].append(("user", text))
            active = [row for row in active if actions[row][1] is not None]
        if not active:
            break
        responses = respond(active, [trajectories[row] for row in active])
        for row, response, action in zip(active, responses, classify_actions(responses), strict=True):
            trajectories[row].append(("model", response))
            actions[row] = (actions[row][0] if turn else action, action)
        active = [row for row in active if actions[row][1] == CLARIFY and not (gold_action_only and pairs[row].action != CLARIFY)]
    return trajectories, actions


class Sampler:
    """The policy's voice in `rollouts`: continues prompts in one batch and keeps their key-value cache from turn to turn."""

    def __init__(self, model, template, pairs, training, generators=None):
        self.model, self.template, self.training, self.generators = model, template, training, generators
        self.prompts = [template.prompt(pair, training.max_prompt_length) for pair in pairs]
        self.cache, self.rows = KVCache(), []

    def __call__(self, rows, trajectories):
        """The policy's next message in each of these rows, given what was said since the prompt."""
        if self.rows:
            self.cache.keep([self.rows.index(row) for row in rows])
        self.rows = rows
        prompts = [
            self.prompts[row] + self.template.reply(said)[0] + self._after(said) if said else self.prompts[row]
            for row, said in zip(rows, trajectories, strict=True)
        ]  # fmt: skip
        sampling = {"temperature": 0.0}
        if self.generators:
            sampling = {key: getattr(self.training, key) for key in ("temperature", "top_k", "top_p")}
            sampling["generator"] = [self.generators[row] for row in rows]
        tokens = generate(
            self.model, prompts, self.training.max_new_tokens, stop_ids=self.template.stop_ids, kv_cache=self.cache, **sampling
        )
        return [self.template.text(row) for row in tokens]

    def _after(self, said):
        """Tokens from the end of the assistant's last message to the opening of its next."""
        [*_, (role, text)] = said
        tokens = [token for piece, _ in self.template.message(role, text) for token in piece]
        return ([] if self.template.plain else self.template.newline) + tokens + self.template.opening


def noise_generators(seed, step, positions):
    """One generator per example, keyed by what it is for, so that neither batching, nor ranks, nor a resume changes a sample."""
    return [torch.Generator().manual_seed(random.Random(f"{seed}/{step}/{position}").getrandbits(62)) for position in positions]


# ----------------------------------------------------------------------------------------------------------------------
# Helper models: rules. Each role is a function from a list of requests to a list of results.

COMMON_WORDS = set("""a an and any are asking about be by can could did do does exactly for from how i in interested is it like looking
    mean me more of on or please precisely referring s say specific specifically talking that the there they this to want was were what
    when where which who would you your""".split())  # fmt: skip
NOTHING_TO_ADD = "I have nothing to add."


def content_words(text):
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return set(words) - COMMON_WORDS


def rule_users(conversations):
    """The user's gold reply, if the question shares at least half of the content words of the gold question that it answers.

    conversations: [(messages so far, intent)], intent as `rule_intents` writes it.
    """
    answers = []
    for messages, intent in conversations:
        gold, asked = data.split_reply(intent), content_words(messages[-1][1])
        best, answer = 0.0, NOTHING_TO_ADD
        for (_, question), (role, reply) in zip(gold, gold[1:], strict=False):
            wanted = content_words(question)
            overlap = len(wanted & asked) / len(wanted) if wanted else 1.0
            if role == "user" and overlap >= 0.5 and overlap > best:
                best, answer = overlap, reply
        answers.append(answer)
    return answers


def rule_intents(pairs):
    """The gold trajectory itself, without its final answer, serves as the summary of what the user wants."""
    return [data.format_reply(pair.gold[:-1]) for pair in pairs]


RULES = {
    "action_model_config": data.rule_actions,
    "intent_model_config": rule_intents,
    "user_simulator_config": rule_users,
    "preference_model_config": data.rule_preferences,
}


# ----------------------------------------------------------------------------------------------------------------------
# Helper models: prompts

PROMPTS = {
    "action_model_config": """\
What does an assistant's message do? Write CLARIFY if it asks the user for something that it must know before it can answer. \
Write ANSWER if it answers, states something or declines, even if it then offers more help. Write that one word only.

Message: Do you mean the museum in Lyon or the one in Nice?
Action: CLARIFY

Message: It opened in 1911.
Action: ANSWER

Message: Please tell me which of the two seasons you have in mind.
Action: CLARIFY

Message: 310 - 290 = 20, so 20 more. Is there anything else that I can do?
Action: ANSWER

Message: Sales of the whole group, or of the bakery alone?
Action: CLARIFY

Message: The text does not say.
Action: ANSWER

Message: {response}
Action:""",
    "intent_model_config": """\
Write in one sentence or two what the user of a conversation wants to know at its end, beginning with "The user". \
Include every detail that the user gave, also when asked: which one, when, where, whose, in what unit. Do not answer the user.

Conversation:
User: When did the north station open?
Assistant: In 1887.
User: And how many people used it?
Assistant: In which year?
User: In 1990, please.
Intent: The user wants to know how many people used the north station in 1990.

Conversation:
User: What did the bakery spend on staff?
Assistant: Do you mean wages alone, or wages and pensions?
User: Both together.
Assistant: For which of the two years?
User: The later one.
Intent: The user wants to know how much the bakery spent on wages and pensions together in the later of the two years.

Conversation:
User: Who wrote the second letter?
Intent: The user wants to know who wrote the second letter.

Conversation:
{conversation}Intent:""",
    "user_simulator_config": """\
Play the user of an assistant. Write the user's next message, one short line that replies to what the assistant asked last. \
Tell only what the intent says. If it does not settle what was asked, write: {nothing}

Intent: The user wants to know how many people used the north station in 1990.
Conversation:
User: How many people used it?
Assistant: In which year?
User: In 1990.

Intent: The user wants to know how many people used the north station in 1990.
Conversation:
User: How many people used it?
Assistant: Do you mean the south station?
User: No, the north station.

Intent: The user wants to know who painted the mayor's portrait.
Conversation:
User: Who painted it?
Assistant: How large should the picture be?
User: {nothing}

Intent: {intent}
Conversation:
{conversation}User:""",
    "preference_model_config": """\
Each conversation below ends with the assistant asking one short clarifying question about something that the user may have left open. \
Write the question that ends the last conversation, and nothing else.

{examples}""",
}


def action_prompt(text):
    return PROMPTS["action_model_config"].format(response=data.fold(text))


def intent_prompt(pair):
    """From the gold trajectory without its final answer: what the summary does not know, the simulated user cannot give away."""
    return PROMPTS["intent_model_config"].format(conversation=data.format_reply(pair.history + pair.gold[:-1]))


def user_prompt(conversation):
    messages, intent = conversation
    prompt = PROMPTS["user_simulator_config"]
    return prompt.format(intent=data.fold(intent), conversation=data.format_reply(messages), nothing=NOTHING_TO_ADD)


def question_prompt(request):
    return PROMPTS["preference_model_config"].format(examples=request["prompt"])


def parse_action(answer):
    """The first of the two words, in capitals if there is one, else in any case; None where neither is written."""
    answer = unlabelled(answer, "Answer")
    found = re.search("CLARIFY|ANSWER", answer) or re.search(r"(?i)clarify|\banswer", answer)
    return found and found[0].upper()


def parse_intent(answer):
    """The first paragraph that is no announcement ("Here is the summary:"), on one line, up to what looks like a next example."""
    answer = re.split(r"\n\s*(?:Intent|Conversation|User|Assistant):", unlabelled(answer, "Intent"))[0]
    paragraphs = [data.fold(paragraph) for paragraph in re.split(r"\n\s*\n", answer)]
    return next((text for text in paragraphs if text and not text.endswith(":")), None)


def parse_user(answer):
    """The first line, up to what the model writes for the assistant."""
    line = unlabelled(answer, "User").partition("\n")[0]
    return line.partition("Assistant:")[0].strip() or None


def parse_question(answer):
    """The first line that is a question, before anybody else speaks; None where none was written."""
    lines = re.split(r"\n\s*User:", unlabelled(answer, "Assistant"))[0].split("\n")
    return next((line for line in (unlabelled(line, "Assistant").strip() for line in lines) if data.is_question(line)), None)


def unlabelled(answer, name):
    """Without a "User: ", "**Assistant:** " or "Assistant (asks): " in front."""
    return re.sub(rf"\A[\s*]*{name}(?: \([^)\n]*\))?[\s*]*:[\s*]*", "", answer.strip())


# How a model plays a role: what turns a request into a prompt, what turns an answer into a result, where an answer may be cut short.
ROLES = {
    "action_model_config": (action_prompt, parse_action, ("\nMessage:",)),
    "intent_model_config": (intent_prompt, parse_intent, ("\nConversation:",)),
    "user_simulator_config": (user_prompt, parse_user, ("\nAssistant:",)),
    "preference_model_config": (question_prompt, parse_question, ("\nUser:",)),
}
COUNTED = ("asked", "cached", "retried", "failed", "blocked", "unusable")  # failed: given up; blocked: or empty; unusable: not understood
HELPER_COUNTS = Counter()  # of these, since the start
COUNTS_LOCK = threading.Lock()


class HelperError(RuntimeError):
    """A helper model cannot be used any longer: one line, for the user. The run saves and stops."""


def count(what, number=1):
    with COUNTS_LOCK:
        HELPER_COUNTS[what] += number


def played(ask, write_prompt, parse):
    """A role: requests -> results, None where the model gave nothing usable. ask: prompts -> answers, each a text or None."""

    def play(requests):
        answers = ask([write_prompt(request) for request in requests])
        results = [None if answer is None else parse(answer) for answer in answers]
        count("unusable", sum(result is None and answer is not None for result, answer in zip(results, answers, strict=True)))
        return results

    return play


# ----------------------------------------------------------------------------------------------------------------------
# Helper models: a local Gemma 2


def gemma_asker(model, tokenizer, config):
    """ask(prompts) with a local checkpoint, in its chat template where its vocabulary has one, else one line is continued.

    An answer depends on its prompt alone, not on the batch: what is random is drawn from a generator keyed by the prompt.
    """
    template = Template(tokenizer, "plain" if tokenizer.end_of_turn_id is None else "gemma")
    before, after = [tokenizer.bos_id], []
    if not template.plain:
        before, after = before + template.turn("user"), template.end + template.newline + template.opening
    room = max(1, model.config.max_position_embeddings - config.max_new_tokens - len(before) - len(after))

    def tokens_of(prompt):  # one that is too long loses its head: the task and the first examples
        return before + tokenizer.encode(prompt)[-room:] + after

    def continued(prompts):
        seeds = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big") for prompt in prompts]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        tokens = [tokens_of(prompt) for prompt in prompts]
        answers = generate(model, tokens, config.max_new_tokens, config.temperature, stop_ids=template.stop_ids, generator=generators)
        return [tokenizer.decode(answer).strip() or None for answer in answers]

    def ask(prompts):
        new, answers = list(dict.fromkeys(prompts)), {}
        for start in range(0, len(new), config.batch_size):
            batch = new[start : start + config.batch_size]
            answers.update(zip(batch, continued(batch), strict=True))
        count("asked", len(new))
        count("blocked", sum(answer is None for answer in answers.values()))
        return [answers[prompt] for prompt in prompts]

    return ask


# ----------------------------------------------------------------------------------------------------------------------
# Helper models: Gemini's REST API

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a call is tried again: at most, and however often it has failed
HARMS = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")


class GeminiAsker:
    """ask(prompts) by Gemini's REST API: calls run side by side, are tried again where that may help, and are never paid twice.

    stop: texts at which an answer ends. None stands for an answer that was blocked, empty, or not to be had in max_retries + 1 calls.
    Raises HelperError where the API refuses a request as such, and when max_failures calls in a row led to None; the asker is then spent.
    """

    def __init__(self, config, stop=()):
        address = urlsplit(config.base_url)
        if address.scheme not in ("http", "https") or not address.hostname or address.query or "@" in address.netloc:
            raise InputError("base_url of a helper model: expected http://HOST or https://HOST, with neither '?' nor '@'")
        self.key = os.environ.get("GOOGLE_API_KEY", "").strip()
        if not re.fullmatch("[!-~]+", self.key):
            problem = "holds a blank or a character beyond ASCII" if self.key else "is not set"
            raise InputError(f"GOOGLE_API_KEY {problem}, expected the key for helper model {config.model_id!r}")
        self.url = f"{config.base_url.rstrip('/')}/v1beta/models/{quote(config.model_id)}:generateContent"
        self.config, self.stop, self.cache = config, list(stop), answer_cache(config.cache_path)
        self.lock, self.spent = threading.Lock(), threading.Event()
        self.in_a_row, self.error = 0, "interrupted"

    def __call__(self, prompts):
        answers = {prompt: self.cache.get(self.cache_key(prompt)) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, answer in answers.items() if answer is None]
        count("cached", len(answers) - len(missing))
        count("asked", len(missing))
        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            futures = {pool.submit(self.answer, prompt): prompt for prompt in missing}
            answers.update((futures[future], future.result()) for future in as_completed(futures))
        except BaseException:  # whatever it is, the calls that still run shall not try again
            self.spent.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [answers[prompt] for prompt in prompts]

    def body(self, prompt):
        sampling = {"temperature": self.config.temperature, "topP": 1.0, "topK": 40 if self.config.temperature else 1}
        return {
            "contents": [{"role": "user", "parts": [{"text": prompt}]}],
            "generationConfig": {**sampling, "maxOutputTokens": self.config.max_new_tokens, "stopSequences": self.stop},
            "safetySettings": [{"category": f"HARM_CATEGORY_{harm}", "threshold": "BLOCK_NONE"} for harm in HARMS],
        }

    def cache_key(self, prompt):
        return hashlib.sha256(json.dumps([self.config.model_id, self.body(prompt)], sort_keys=True).encode()).hexdigest()

    def answer(self, prompt):
        """The answer to one prompt, stored as soon as it is there, or None; runs in a thread of its own."""
        text, outcome = None, "failed"
        for attempt in range(self.config.max_retries + 1):
            if self.spent.is_set():
                raise HelperError(self.error)
            try:
                text, why = call_gemini(self.url, self.body(prompt), self.key, self.config.timeout)
                outcome = "blocked"  # unless there is a text
                break
            except CallFailed as failure:
                why = str(failure)
                if failure.final:
                    self.give_up(f"{self.config.model_id}: {why}")
                if attempt < self.config.max_retries:
                    count("retried")
                    back_off = random.uniform(0, FIRST_WAIT * 2**attempt)
                    self.spent.wait(min(failure.wait + back_off, LONGEST_WAIT))
        if text:
            self.cache.put(self.cache_key(prompt), text)
        else:
            count(outcome)
        with self.lock:
            self.in_a_row = 0 if text else self.in_a_row + 1
            if self.in_a_row >= self.config.max_failures:
                self.give_up(f"{self.in_a_row} requests to {self.config.model_id} in a row failed, the last one with: {why}")
        return text

    def give_up(self, message):
        if not self.spent.is_set():
            self.error = message
        self.spent.set()
        raise HelperError(message)


class CallFailed(Exception):
    """One call brought no answer. wait: seconds for which the server asks; final: the same call can only fail again."""

    def __init__(self, message, wait=0.0, final=False):
        super().__init__(message)
        self.wait, self.final = wait, final


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the key on to wherever a redirect points."""

    def redirect_request(self, *_):
        return None


OPENER = urllib.request.build_opener(NoRedirects)


def call_gemini(url, body, key, timeout):
    """One POST: (text, "") or (None, why there is no text). Raises CallFailed. The key is in none of them, even if the server echoes it."""
    headers = {"Content-Type": "application/json", "x-goog-api-key": key}
    try:
        with OPENER.open(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=timeout) as response:
            text, why = answer_of(json.loads(response.read()))
    except urllib.error.HTTPError as error:
        raise http_failure(error, key) from None
    except (OSError, http.client.HTTPException) as error:
        raise CallFailed(one_line(getattr(error, "reason", error) or type(error).__name__, key)) from None
    except (ValueError, TypeError, AttributeError, LookupError):
        raise CallFailed("its reply is not the JSON of an answer") from None
    return text and text.replace(key, "[key]"), one_line(why, key)


def answer_of(reply):
    """(text, "") of Gemini's reply, or (None, why there is no text). Half of a character becomes "?"."""
    blocked = (reply.get("promptFeedback") or {}).get("blockReason")
    if blocked or not reply.get("candidates"):
        return None, f"prompt blocked ({blocked})" if blocked else "no candidates"
    candidate = reply["candidates"][0]
    finish = candidate.get("finishReason", "STOP")
    parts = (candidate.get("content") or {}).get("parts") or []
    text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
    if finish not in ("STOP", "MAX_TOKENS") or not text.strip():
        return None, f"no text (finishReason {finish})"
    return text.encode("utf-8", "replace").decode(), ""


def http_failure(error, key):
    """CallFailed for an HTTP status: 408, 429 and 5xx may pass. The wait stands in Retry-After, or in Google's RetryInfo ("27s")."""
    message, waits = error.reason, [error.headers.get("Retry-After", "")]
    try:
        report = json.loads(error.read())["error"]
        message = report["message"]
        waits += [detail.get("retryDelay", "")[:-1] for detail in report.get("details", [])]
    except (OSError, http.client.HTTPException, ValueError, TypeError, AttributeError, LookupError):
        pass  # the status says enough
    wait = max((float(text) for text in waits if re.fullmatch(r"\d+(\.\d+)?", text)), default=0.0)
    return CallFailed(one_line(f"HTTP {error.code}: {message}", key), wait, final=error.code < 500 and error.code not in (408, 429))


def one_line(message, key):
    return " ".join(str(message).replace(key, "[key]").split())[:300]


class AnswerCache:
    """Answers on disk, for any number of threads and processes; the file is opened at the first use."""

    def __init__(self, path):
        self.path, self.lock, self.connection = path, threading.Lock(), None

    def get(self, key):
        row = self.execute("SELECT answer FROM answers WHERE key = ?", (key,))
        return row and row[0]

    def put(self, key, answer):
        self.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, answer))

    def execute(self, statement, values):
        """The first row of the result. Each statement is a transaction of its own; where another process writes, it waits."""
        with self.lock:
            try:
                if self.connection is None:
                    self.connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
                    self.connection.execute("PRAGMA synchronous = OFF")  # safe from kill -9, and 100 times as fast as waiting for the disk
                    self.connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
                return self.connection.execute(statement, values).fetchone()
            except sqlite3.Error as error:
                raise HelperError(f"{self.path}: not usable as the cache of helper models ({error})") from None


answer_cache = cache(AnswerCache)  # one connection to a file, whichever roles share it


# ----------------------------------------------------------------------------------------------------------------------
# Helper models: who plays which role


@dataclass(frozen=True)
class Helpers:
    """The four roles: functions from lists to lists. None where a helper model failed, which rules never do."""

    classify_actions: callable  # [response text] -> ["CLARIFY" | "ANSWER" | None]
    summarize_intents: callable  # [Pair] -> [text | None]
    simulate_users: callable  # [(messages, intent | None)] -> [text | None]
    write_questions: callable  # [request of data.ACTDataset] -> [text, "" where the model failed]
    early_intents: bool = False  # intents come over the network: ask for them while the policy decodes


def build_helpers(config, reference=None):
    """The four roles as the configuration casts them; a checkpoint that several share is loaded once.

    reference() -> (whole model, tokenizer) of the frozen reference, called if a role wants it; None: it is read from its file.
    """
    models = {}

    def local_model(path):
        if path not in models:
            models[path] = reference() if path == "reference" and reference else load_helper(config, path)
        return models[path]

    def cast(role):
        helper = getattr(config, role)
        backend = backend_of(helper)
        if backend == "rule" or (config.task == "generate_preference" and role not in ("action_model_config", "preference_model_config")):
            return RULES[role]
        needed = {"gemma": "model_path", "gemini": "model_id"}[backend]
        if not getattr(helper, needed):
            raise InputError(f"{role}.{needed} is missing, backend '{backend}' needs it")
        write_prompt, parse, stop = ROLES[role]
        ask = GeminiAsker(helper, stop) if backend == "gemini" else gemma_asker(*local_model(helper.model_path), helper)
        return played(ask, write_prompt, parse)

    write_questions = cast("preference_model_config")
    return Helpers(
        cast("action_model_config"),
        cast("intent_model_config"),
        where_intent_is_known(cast("user_simulator_config")),
        lambda requests: [question or "" for question in write_questions(requests)],
        early_intents=backend_of(config.intent_model_config) == "gemini",
    )


def backend_of(helper):
    return helper.backend or ("gemini" if helper.model_id else "rule")


def load_helper(config, path):
    """(model, tokenizer) of a checkpoint, whole on this rank's device, in the precision in which the policy computes."""
    directory = Path(config.policy_model_config.model_path if path == "reference" else path)
    dtype = torch.bfloat16 if config.training_config.bf16 else getattr(torch, config.policy_model_config.dtype)
    tokenizer = Tokenizer(directory / "tokenizer.model")
    model = Gemma2.from_pretrained(directory, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    return model.requires_grad_(False), tokenizer


def where_intent_is_known(simulate_users):
    """A user whose intent could not be summarised (None) says None."""

    def simulate(conversations):
        known = [i for i, (_, intent) in enumerate(conversations) if intent is not None]
        replies = dict(zip(known, simulate_users([conversations[i] for i in known]), strict=True)) if known else {}
        return [replies.get(i) for i in range(len(conversations))]

    return simulate


def user_for(pairs, helpers):
    """`simulate_users` for `rollouts`: each user's intent is summarised once, when it is first asked something.

    With early_intents, those of the turns that call for a question are asked for at once, while the policy decodes.
    """
    intents, pending = {}, None
    early = [row for row, pair in enumerate(pairs) if helpers.early_intents and pair.action == CLARIFY]
    if early:
        pool = ThreadPoolExecutor(1)
        pending = pool.submit(helpers.summarize_intents, [pairs[row] for row in early])
        pool.shutdown(wait=False)  # it finishes what it has

    def simulate_users(rows, trajectories):
        if pending and not intents:
            intents.update(zip(early, pending.result(), strict=True))
        new = [row for row in rows if row not in intents]
        intents.update(zip(new, helpers.summarize_intents([pairs[row] for row in new]) if new else [], strict=True))
        said = [pairs[row].history + trajectory for row, trajectory in zip(rows, trajectories, strict=True)]
        return helpers.simulate_users([(messages, intents[row]) for messages, row in zip(said, rows, strict=True)])

    return simulate_users


def together(work):
    """work() on every rank; where a helper gives up on one of them, HelperError on all, so that none waits for another."""
    result, errors = None, []
    try:
        result = work()
    except HelperError as error:
        errors = [str(error)]
    errors = all_gathered(errors)
    if errors:
        raise HelperError(errors[0])
    return result


def split_over_ranks(label, answer):
    """The role `answer` for requests that are the same on all ranks: each asks for its share, and all get all results."""

    def ask(requests, chunk=64):
        results, progress = [], Progress(label, len(requests))
        for start in range(0, len(requests), chunk):
            results += answer(requests[start : start + chunk])
            progress(len(results))
        return results

    def split(requests):
        mine = [requests[i] for i in shares(len(requests), dist.get_rank(), dist.get_world_size())]
        return all_gathered(together(lambda: ask(mine)))

    return split


def gold_actions(classify_actions):
    """`classify_actions` for turns that need an action in any case: the rule decides where the model fails."""

    def classify(texts):
        return [action or rule for action, rule in zip(classify_actions(texts), data.rule_actions(texts), strict=True)]

    return classify


def load_records(config, helpers):
    """(training, validation) preference records, with gold actions and questions from the helper models where the files lack them.

    A losing question is paid for only where it is used: in training on pairs, and in files of pairs.
    """
    files, written = config.data_config, config.task == "generate_preference"
    questions = split_over_ranks("writing question", helpers.write_questions)
    classify = split_over_ranks("classifying reply", gold_actions(helpers.classify_actions))
    if not config.training_config.is_preference:
        for path in filter(None, (files.train_path, files.validation_path)):
            report_agreement(path, classify, path == files.train_path and config.training_config.action_labels == "classifier")
    halves = (
        ({"validation_path": ""}, questions if config.task in ("act", "dpo") or written else None),
        ({"train_path": ""}, questions if written else None),
    )
    halves = [data.get_datasets_from_config(replace(config, data_config=replace(files, **no)), q, classify) for no, q in halves]
    return halves[0][0], halves[1][1]


def report_agreement(path, classify_actions, ignored=False):
    """Where the classifier labels turns, because they have no label or it is ignored: how well it agrees with the labels there are."""
    turns = []
    for conversation in data.read_vertex_jsonl(path):
        messages = conversation["messages"]
        both = [(turn, reply) for turn, reply in zip(messages, messages[1:], strict=False) if reply["role"] == "model"]
        turns += [(turn.get("requires_clarification"), reply["content"]) for turn, reply in both if turn["role"] == "user"]
    labelled = [(CLARIFY if label else ANSWER, text) for label, text in turns if label is not None]
    unlabelled = len(turns) if ignored else len(turns) - len(labelled)
    if not unlabelled:
        return
    text = f"{path}: the action classifier labels {unlabelled} of {len(turns)} turns"
    if labelled:
        gold, replies = map(list, zip(*labelled[:: -(-len(labelled) // 200)], strict=True))  # a sample: calls may cost money
        found = data.action_metrics(gold, classify_actions(replies))
        text += f"; with the labels in the file it agrees in {found['Accuracy']:.3f}, Macro F1 {found['Macro F1']:.3f}"
    say(text)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(model, template, pairs, helpers, config):
    """Play every validation turn with greedy decoding. Returns (metrics, samples), the same on all ranks."""
    training, score = config.training_config, data.HEURISTICS[config.data_config.heuristic]
    mine = shares(len(pairs), dist.get_rank(), dist.get_world_size())
    whole, progress, size = gathered(model, training.bf16), Progress("evaluating turn", len(mine)), training.per_device_eval_batch_size

    def play():
        samples = []
        for start in range(0, len(mine), size):
            batch = [pairs[i] for i in mine[start : start + size]]
            respond = Sampler(whole, template, batch, training)
            played = rollouts(batch, respond, helpers.classify_actions, user_for(batch, helpers), training.max_turns)
            samples += [judge(pair, *result, score) for pair, *result in zip(batch, *played, strict=True)]
            progress(len(samples))
        return samples

    samples = all_gathered(together(play))
    return summarize(samples), samples


def judge(pair, trajectory, actions, score):
    """What is kept of one evaluated turn. A conversation that ends in a question has no answer and scores 0.

    inferred_action is None where a helper failed: the turn is then counted, but left out of all means.
    """
    first, last = actions
    turn = score(trajectory[0][1], pair.gold[0][1])
    final = score(trajectory[-1][1], pair.target) if last == ANSWER else (0.0, 0.0)
    return {
        "input_text": pair.record["input_text"],
        "trajectory": data.format_reply(trajectory),
        "gold": data.format_reply(pair.gold),
        "inferred_action": first if last else None,
        "target_action": pair.action,
        "final_answer": trajectory[-1][1] if last == ANSWER else None,
        "gold_target": pair.target,
        "questions": len(trajectory) // 2 + (last == CLARIFY),
        "gold_questions": len(pair.gold) // 2,
        "turn_exact_match": float(turn[0]),
        "turn_f1": float(turn[1]),
        "exact_match": float(final[0]),
        "f1": float(final[1]),
    }


def summarize(samples):
    """Metrics of judged turns, as fractions; a mean over nothing is None, and the counts say how many turns each is over."""

    def means(name, f1, exact_match, chosen):
        return {
            f"{name} DROP F1": data.mean_or_none([sample[f1] for sample in chosen]),
            f"{name} Exact Match": data.mean_or_none([sample[exact_match] for sample in chosen]),
            f"{name} Turns": len(chosen),
        }

    failures = sum(sample["inferred_action"] is None for sample in samples)
    samples = [sample for sample in samples if sample["inferred_action"] is not None]
    asked = [sample for sample in samples if sample["inferred_action"] == CLARIFY]
    by_action = {action: [sample for sample in samples if sample["target_action"] == action] for action in (CLARIFY, ANSWER)}
    actions = [[sample[key] for sample in samples] for key in ("target_action", "inferred_action")]
    return {
        **data.action_metrics(*actions),
        **means("Turn-Level", "turn_f1", "turn_exact_match", samples),
        **means("Trajectory-level", "f1", "exact_match", samples),
        **means("Post-Clarification", "f1", "exact_match", asked),
        **means("CLARIFY Turns: Trajectory-level", "f1", "exact_match", by_action[CLARIFY]),
        **means("ANSWER Turns: Trajectory-level", "f1", "exact_match", by_action[ANSWER]),
        "Questions per Turn": data.mean_or_none([sample["questions"] for sample in samples]),
        "Gold Questions per Turn": data.mean_or_none([sample["gold_questions"] for sample in samples]),
        "Helper Failures": failures,
    }


SHOWN = (
    "Accuracy", "Macro F1", "Trajectory-level Exact Match", "Trajectory-level DROP F1", "Post-Clarification Exact Match",
    "CLARIFY Turns: Trajectory-level Exact Match", "ANSWER Turns: Trajectory-level Exact Match", "Questions per Turn",
)  # fmt: skip


def comparison(before, after):
    """A table of the main metrics before and after training; the whole of them is in metrics.jsonl."""
    lines = [f"{'':44} {'before':>8} {'after':>8}"]
    for name in SHOWN:
        scale = 1 if name == "Questions per Turn" else 100
        cells = ["-" if metrics[name] is None else f"{scale * metrics[name]:.{2 if scale == 1 else 1}f}" for metrics in (before, after)]
        lines.append(f"{name:44} {cells[0]:>8} {cells[1]:>8}")
    return "\n".join(lines)


def changed_conversations(before, after, count=2):
    """Turns that went wrong before and right after, as text; conversations with a question first."""
    changed = [(b, a) for b, a in zip(before, after, strict=True) if a["exact_match"] > b["exact_match"] and b["inferred_action"]]
    changed.sort(key=lambda pair: (pair[0]["inferred_action"], -pair[1]["questions"]))  # ANSWER before CLARIFY, sorted by name
    lines = []
    for b, a in changed[:count]:
        _, context, history = data.split_dialogue(a["input_text"])
        lines += ["", *[f"  {line}" for line in context.split("\n")[-6:] if line]]
        lines += [f"  User: {history[-1][1]}", f"    before | {'  '.join(b['trajectory'].splitlines())}"]
        lines += [f"    after  | {'  '.join(a['trajectory'].splitlines())}", f"    gold   | {a['gold_target']}"]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: a directory checkpoints/step-N each, in the layout of a model, with the optimiser's tensors beside it


def optimizer_tensors(model, optimizer):
    """The optimiser's state by name, e.g. "square_avg.layers.0.mlp.up_proj.weight"."""
    return {f"{key}.{name}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}


def save_model(model, tokenizer, directory, optimizer=None, step=None, examples_per_step=None):
    """The model, its tokenizer and what a resumed run needs, as a directory that appears when it is complete. Every rank calls this."""
    partial = directory.with_name(f".{directory.name}.part")
    if is_main():
        gemma.remove_tree(partial)
    model.save_pretrained(partial)
    if optimizer:
        gemma.save_safetensors(optimizer_tensors(model, optimizer), partial if is_main() else None, "optimizer")
    if is_main():
        shutil.copyfile(tokenizer.path, partial / "tokenizer.model")
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            if tokenizer.path.with_name(name).exists():  # not read here, but transformers and vLLM look for them
                shutil.copyfile(tokenizer.path.with_name(name), partial / name)
        if optimizer:
            write_json(partial / "trainer_state.json", {"step": step, "examples_per_step": examples_per_step})
        gemma.remove_tree(directory)
        partial.rename(directory)


def save_checkpoint(run, step):
    """All random draws are keyed by seed and step, so parameters, optimiser and step are the whole state."""
    training = run.config.training_config
    folder = Path(training.output_dir) / "checkpoints"
    save_model(run.policy, run.tokenizer, folder / f"step-{step}", run.optimizer, step, run.local * dist.get_world_size())
    if is_main() and training.save_total_limit:
        for old in checkpoints(training.output_dir)[: -training.save_total_limit]:
            gemma.remove_tree(old)
    dist.barrier()


def checkpoints(output_dir):
    """Complete checkpoints, oldest first."""
    found = [path for path in (Path(output_dir) / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


WRITES = {  # the files of output_dir that a task writes, and removes before it starts anew
    "evaluate": ("eval_metrics.json", "eval_samples.jsonl"),
    "generate_preference": ("train.jsonl", "validation.jsonl", "train.vertex.jsonl", "validation.vertex.jsonl"),
    "training": ("metrics.jsonl", "eval_metrics.json", "eval_samples.jsonl", "model", "checkpoints"),
}
MAY_CHANGE = {  # keys that a resumed run may have changed: they say how far, how often and on how many devices, not what is learnt
    "max_steps", "num_train_epochs", "do_eval", "eval_steps", "logging_steps", "save_steps", "save_total_limit", "output_dir",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "dp_replicate_size",
    "gradient_checkpointing",
}  # fmt: skip


def on_main(function, *arguments):
    """Call a function on rank 0 alone; its result, or its InputError, on every rank."""
    answer = [None, None]
    if is_main():
        try:
            answer[0] = function(*arguments)
        except (*INPUT_ERRORS, OSError) as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise InputError(answer[1])
    return answer[0]


def check_output(config, resume, overwrite):
    """May this run write to its output directory? Changes nothing. Returns the checkpoint to resume from, "done", or None."""
    output = Path(config.training_config.output_dir)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: output_dir is a file, expected a directory")
    written = [output / name for name in (*WRITES.get(config.task, WRITES["training"]), "config.json")]
    for key, source in flat(asdict(config)).items():
        if key.endswith("_path") and source:
            at = Path(source).resolve()
            if any(path.resolve() in (at, at / "config.json", *at.parents) for path in written):
                raise InputError(f"{key} {source}: this run would write over it, expected another output_dir than {output}")
    former, there = output / "config.json", next((path for path in written if path.exists()), None)
    if there and not overwrite and not (resume and former.exists()):
        flags = "--overwrite to start again" if config.task in WRITES else "--resume to continue it or --overwrite to start again"
        raise InputError(f"{output}: already holds {'a run' if former.exists() else there.name}, expected {flags}")
    return resume_from(output, config) if resume and former.exists() else None


def resume_from(output, config):
    """The newest checkpoint of the run in `output`, if that run learnt as this one does; "done" if it has ended."""
    former = output / "config.json"
    then = flat(asdict(Config())) | flat(gemma.read_json(former))  # keys that are newer than that run had their defaults
    now = flat(asdict(config))
    changed = [key for key, value in now.items() if then.get(key) != value]
    for key in changed:
        if key.rpartition(".")[2] not in MAY_CHANGE:
            raise InputError(f"--resume: {key} is {now[key]!r}, expected {then.get(key)!r} as in {former}")
    if (output / "model").exists() and not {"training_config.max_steps", "training_config.num_train_epochs"} & set(changed):
        return "done"
    checkpoint = next(reversed(checkpoints(output)), None)
    if (output / "model").exists() and not checkpoint:
        raise InputError(f"--resume: {output} holds a finished model but no checkpoint, expected --overwrite to start again")
    return checkpoint


def flat(section, prefix=""):
    """{"a.b": value} of nested dicts."""
    pairs = ((f"{prefix}{key}", value) for key, value in section.items())
    return {k: v for key, value in pairs for k, v in (flat(value, f"{key}.") if isinstance(value, dict) else {key: value}).items()}


def start_output(config, checkpoint=None):
    """Remove what a former run wrote, as far as this one will write it again. The first thing that a run changes on disk."""
    output = Path(config.training_config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if checkpoint:  # what was logged after the checkpoint will be logged again, and the model is no longer the last one
        gemma.remove_tree(output / "model")
        step = int(checkpoint.name[5:])
        for name in ("metrics.jsonl", "eval_samples.jsonl"):
            data.write_jsonl(output / name, [row for row in whole_rows(output / name) if row["step"] <= step])
    else:
        for name in WRITES.get(config.task, WRITES["training"]):
            gemma.remove_tree(output / name)
    write_json(output / "config.json", asdict(config))


def whole_rows(path):
    """The rows of a JSONL file that a killed run may have left with half a line at its end."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    try:
        return [row for row in map(json.loads, lines[:-1]) if isinstance(row["step"], int)]
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: a line is not an object with a step, expected what a run wrote") from None


# ----------------------------------------------------------------------------------------------------------------------
# Training


def make_optimizer(model, training):
    """The optimiser with its state in place from the start, so that saving and loading need no special case."""
    kinds = {"rmsprop": (torch.optim.RMSprop, ("square_avg",)), "adamw": (torch.optim.AdamW, ("exp_avg", "exp_avg_sq"))}
    cls, moments = kinds[training.optim]
    optimizer = cls(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(parameter) for key in moments}}
    return optimizer


def learning_rate(step, steps, training):
    """The learning rate of optimiser step `step` (from 0) of `steps`: a linear warm-up, then the schedule down to 0."""
    if step < training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    done = (step - training.warmup_steps) / max(1, steps - training.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[training.lr_scheduler_type]
    return training.learning_rate * factor


class DataOrder:
    """Which example comes when: epoch after epoch without a gap, dialogues shuffled, the turns of each kept together."""

    def __init__(self, records, seed):
        self.dialogues, self.count, self.seed, self.epochs = data.dialogues(records), len(records), seed, {}

    def __getitem__(self, position):
        epoch, index = divmod(position, self.count)
        if epoch not in self.epochs:
            shuffled = random.Random(f"{self.seed}/epoch/{epoch}").sample(self.dialogues, len(self.dialogues))
            self.epochs = {epoch: [i for dialogue in shuffled for i in dialogue]}
        return self.epochs[epoch][index]


def preference_step(policy, reference, template, pairs, weight, training, device):
    """Forward and backward of one micro-batch of preference pairs. Returns sums over its pairs, for the log."""
    sequences = [sequence_of(pair, messages, template, training) for pair in pairs for messages in (pair.chosen, pair.rejected)]
    scored = Scored(sequences, device)
    with torch.no_grad():
        reference_logps = scored.logps(reference)
    logps = scored.logps(policy)
    (chosen, rejected), (reference_chosen, reference_rejected) = (x.view(-1, 2).T for x in (logps, reference_logps))
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen, rejected, reference_chosen, reference_rejected, training.beta, training.label_smoothing, training.loss_type
    )
    losses = losses - training.rpo_alpha * chosen / scored.lengths.view(-1, 2)[:, 0].clamp(min=1)
    (losses.sum() * weight).backward()
    sums = {
        "loss": losses.detach().sum(),
        "rewards/chosen": chosen_rewards.sum(),
        "rewards/rejected": rejected_rewards.sum(),
        "rewards/margins": (chosen_rewards - rejected_rewards).sum(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float().sum(),
        "logps/chosen": chosen.detach().sum(),
        "logps/rejected": rejected.detach().sum(),
    }
    return {**dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)), "tokens": scored.used}


def sft_step(policy, template, pairs, weight, training, device):
    """Forward and backward of one micro-batch of gold replies: the negative log-likelihood per token, averaged over a turn's reply."""
    scored = Scored([sequence_of(pair, pair.gold[:1], template, training) for pair in pairs], device)
    losses = -scored.logps(policy) / scored.lengths.clamp(min=1)
    (losses.sum() * weight).backward()
    return {"loss": losses.sum().item(), "tokens": scored.used}


def sequence_of(pair, messages, template, training):
    """(prompt, reply, mask) of a pair's prompt and one side of it, cut to max_length."""
    prompt = template.prompt(pair, training.max_prompt_length)
    tokens, mask = template.reply(messages)
    if training.loss_on == "all":
        mask = [1] * len(tokens)
    room = max(1, training.max_length - len(prompt))
    return prompt, tokens[:room], mask[:room]


def clip_and_step(policy, optimizer, max_grad_norm, lr):
    """Clip, take one optimiser step, and return the gradient's norm before clipping."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(policy.parameters(), max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


@dataclass
class Run:
    """What a training run consists of."""

    config: Config
    device: torch.device
    tokenizer: Tokenizer
    template: Template
    helpers: Helpers
    records: list  # of the training turns
    pairs: list
    validation: list  # pairs of the validation turns
    policy: Gemma2
    reference: Gemma2 | None  # None in task sft
    optimizer: torch.optim.Optimizer
    start: int  # optimiser steps that a resumed run has behind it
    steps: int  # and how many it shall have at its end
    local: int  # examples of a step on this rank


def prepare(config, device, overwrite, resume):
    """Read, check and build all that a run needs; only then is its output directory touched. None: nothing is left to do."""
    training, source = config.training_config, config.policy_model_config.model_path
    tokenizer = Tokenizer(Path(source) / "tokenizer.model")
    template, mesh = Template(tokenizer, config.data_config.prompt_format), make_mesh(device, training.dp_replicate_size)
    checkpoint = on_main(check_output, config, resume, overwrite)
    if checkpoint == "done":
        return say(f"{training.output_dir}: this run is finished, nothing to resume")
    if resume and not checkpoint:
        say(f"{training.output_dir}: no checkpoint yet, starting from the beginning")
    dtype, reference = getattr(torch, config.policy_model_config.dtype), None
    if config.task != "sft":
        reference = build_model(source, mesh, torch.bfloat16 if training.bf16 else dtype, trainable=False)
    helpers = build_helpers(config, reference and (lambda: (gathered(reference), tokenizer)))
    records, validation = load_records(config, helpers)
    if not records:
        raise InputError(f"{config.data_config.train_path}: holds no turn with a complete answer")
    pairs = make_pairs(records, config.data_config.train_path)
    validation = make_pairs(validation, config.data_config.validation_path) if training.do_eval else []
    policy = build_model(checkpoint or source, mesh, dtype, training.bf16, checkpointing=training.gradient_checkpointing)
    gemma.check_vocabulary(tokenizer, policy)
    world, local = dist.get_world_size(), training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * len(pairs) / (local * world))
    optimizer, start = make_optimizer(policy, training), 0
    if checkpoint:
        gemma.load_safetensors(optimizer_tensors(policy, optimizer), checkpoint, stem="optimizer")
        state = gemma.read_json(checkpoint / "trainer_state.json")
        start, former = state.get("step"), state.get("examples_per_step")
        if former != local * world:
            raise InputError(f"--resume: a step is of {local * world} examples on {world} processes, expected {former} as in {checkpoint}")
        if start > steps:
            raise InputError(f"--resume: {checkpoint} is beyond the {steps} steps of this run")
    on_main(start_output, config, checkpoint)
    return Run(
        config, device, tokenizer, template, helpers, records, pairs, validation, policy, reference, optimizer, start, steps, local
    )  # fmt: skip


def on_policy(run, batch, step, positions):
    """Sample on policy and contrast: the batch's new pairs, and how many had which outcome."""
    training, helpers = run.config.training_config, run.helpers
    heuristic, tolerance = data.HEURISTICS[run.config.data_config.heuristic], run.config.data_config.tolerance
    before = Counter(HELPER_COUNTS)
    respond = Sampler(
        gathered(run.policy, training.bf16), run.template, batch, training, noise_generators(training.seed, step, positions)
    )

    def score(answer, target):
        return heuristic(answer, target)[1]

    users = user_for(batch, helpers) if training.judge == "trajectory" else None
    batch, outcomes = together(lambda: act_pairs(batch, respond, helpers.classify_actions, users, score, tolerance, training.max_turns))
    counts = {f"act/{outcome}": outcomes.count(outcome) for outcome in OUTCOMES}
    if any(backend_of(getattr(run.config, role)) != "rule" for role in ROLES):
        counts |= {f"helpers/{key}": HELPER_COUNTS[key] - before[key] for key in COUNTED}
    return batch, counts


def train(config, device, overwrite, resume):
    """Tasks sft, dpo and act: the whole run, told straight through."""
    run = prepare(config, device, overwrite, resume)
    if not run:
        return
    training, rank, world = config.training_config, dist.get_rank(), dist.get_world_size()
    pairs, local, steps, micro = run.pairs, run.local, run.steps, training.per_device_train_batch_size
    order, log, progress, done = DataOrder(run.records, training.seed), Log(config, run.start), Progress("step", steps), run.start
    evaluated = on_main(evaluated_steps, training.output_dir)
    sizes = f"{len(pairs)} training turns, {len(run.validation)} for validation, steps of {local * world} turns"
    say(f"{config.task}: {sizes}, step {done} to {steps}")
    try:
        for step in range(run.start, steps + 1):
            due = step in (0, steps) or (training.eval_steps and step % training.eval_steps == 0)
            if run.validation and due and step not in evaluated:
                log.evaluation(step, *evaluate(run.policy, run.template, run.validation, run.helpers, config))
            if step == steps:
                break
            positions = range((step * world + rank) * local, (step * world + rank + 1) * local)
            batch, sums, began = [pairs[order[position]] for position in positions], Counter(), time.perf_counter()
            if config.task == "act" and training.sample_frequency and (step + 1) % training.sample_frequency == 0:
                batch, counts = on_policy(run, batch, step, positions)
                sums.update(counts)
            rolled = time.perf_counter()

            for i in range(0, local, micro):
                rest = run.template, batch[i : i + micro], 1 / local, training, device  # gradients are averaged over ranks
                sums.update(preference_step(run.policy, run.reference, *rest) if run.reference else sft_step(run.policy, *rest))
            lr = learning_rate(step, steps, training)
            grad_norm = clip_and_step(run.policy, run.optimizer, training.max_grad_norm, lr)
            seconds, done = {"seconds/rollout": rolled - began, "seconds/train": time.perf_counter() - rolled}, step + 1

            if done % training.logging_steps == 0 or done == steps:
                totals = dict(zip(sums, all_sum(list(sums.values()), device), strict=True))
                means = {key: value if key in TOTALS else value / (local * world) for key, value in totals.items()}
                log.step(done, {**means, "grad_norm": grad_norm, "learning_rate": lr, **seconds})
                progress(done, f"loss {means['loss']:.4f}" + (f"  margin {means['rewards/margins']:.3f}" if run.reference else ""))
            if training.save_steps and done % training.save_steps == 0 and done < steps:
                save_checkpoint(run, done)
    except HelperError as error:
        if done == run.start:
            raise
        save_checkpoint(run, done)
        raise HelperError(f"{error}; saved, --resume goes on from step {done}") from None
    save_model(run.policy, run.tokenizer, Path(training.output_dir) / "model")
    log.finish()


TOTALS = {"tokens", *(f"act/{outcome}" for outcome in OUTCOMES), *(f"helpers/{key}" for key in COUNTED)}  # logged as sums, not as means


def evaluated_steps(folder):
    return {row["step"] for row in whole_rows(Path(folder) / "metrics.jsonl") if "eval/Accuracy" in row}


def write_evaluation(folder, metrics, samples):
    if is_main():
        write_json(Path(folder) / "eval_metrics.json", metrics)
        data.write_jsonl(Path(folder) / "eval_samples.jsonl", samples)


class Log:
    """metrics.jsonl, eval_metrics.json and eval_samples.jsonl (of the first and the last evaluation), and what is shown at the end."""

    def __init__(self, config, start):
        self.folder, self.first, self.last = Path(config.training_config.output_dir), None, None
        samples = [row for row in whole_rows(self.folder / "eval_samples.jsonl") if row["step"] == 0] if start else []
        if samples:  # resumed: the evaluation before training is on disk
            self.first = summarize(samples), samples

    def step(self, step, metrics):
        if is_main():
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    def evaluation(self, step, metrics, samples):
        self.step(step, {f"eval/{name}": value for name, value in metrics.items()})
        self.last = metrics, [{"step": step, **sample} for sample in samples]
        self.first = self.first or self.last
        write_evaluation(self.folder, metrics, self.first[1] + (self.last[1] if self.last is not self.first else []))

    def finish(self):
        if self.last and self.first is not self.last:
            say("\n" + comparison(self.first[0], self.last[0]))
            say(changed_conversations(self.first[1], self.last[1]))
        say(f"\nThe model is in {self.folder / 'model'}, its metrics in {self.folder / 'metrics.jsonl'}")


# ----------------------------------------------------------------------------------------------------------------------
# Other tasks, and the command line


def evaluate_only(config, device, overwrite, _):
    """Task evaluate: the metrics of policy_model_config.model_path on data_config.validation_path."""
    source = config.policy_model_config.model_path
    on_main(check_output, config, False, overwrite)
    mesh = make_mesh(device, config.training_config.dp_replicate_size)
    tokenizer = Tokenizer(Path(source) / "tokenizer.model")
    helpers = build_helpers(config)
    _, records = load_records(replace(config, data_config=replace(config.data_config, train_path="")), helpers)
    pairs = make_pairs(records, config.data_config.validation_path)
    model = build_model(source, mesh, getattr(torch, config.policy_model_config.dtype), trainable=False)
    gemma.check_vocabulary(tokenizer, model)
    on_main(start_output, config)
    template = Template(tokenizer, config.data_config.prompt_format)
    metrics, samples = evaluate(model, template, pairs, helpers, config)
    write_evaluation(config.training_config.output_dir, metrics, samples)
    for name, value in metrics.items():
        say(f"{name:50} {'-' if value is None else round(value, 4)}")


def generate_preference(config, _, overwrite, __):
    """Task generate_preference: conversations in, preference records out (Algorithm 1), in output_dir."""
    on_main(check_output, config, False, overwrite)
    train_records, validation_records = load_records(config, build_helpers(config))
    on_main(start_output, config)
    for name, records in (("train", train_records), ("validation", validation_records)):
        if records and is_main():
            path = Path(config.training_config.output_dir) / f"{name}.jsonl"
            data.write_jsonl(path, records)
            data.write_vertex_preferences(path.with_suffix(".vertex.jsonl"), records)
            say(f"{path}: {len(records)} preference records; the same for tuning Gemini: {path.with_suffix('.vertex.jsonl')}")


TASKS = {"act": train, "sft": train, "dpo": train, "evaluate": evaluate_only, "generate_preference": generate_preference}


def parse_arguments(arguments):
    """(config path, overrides, flags) of --config FILE [--task T] [--section.key value ...] [--resume | --overwrite]."""
    path, overrides, flags, rest = None, [], set(), list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("-h", "--help"):
            print(__doc__)
            raise SystemExit(0)
        if not word.startswith("--"):
            raise InputError(f"{word!r}: expected --config FILE, --task NAME, --section.key VALUE, --resume or --overwrite")
        if name in ("resume", "overwrite"):
            if equals:
                raise InputError(f"{word}: --{name} takes no value")
            flags.add(name)
            continue
        if not equals:
            if not rest:
                raise InputError(f"--{name}: a value is missing")
            value = rest.pop(0)
        if name == "config":
            path = value
        else:
            overrides.append((name, value))
    if path is None:
        raise InputError("--config FILE is missing")
    if len(flags) == 2:
        raise InputError("--resume and --overwrite: expected one of them")
    return path, overrides, flags


def main(arguments=None):
    try:
        path, overrides, flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        config = load_config(path, overrides)
        device = start_processes()
        if "resume" in flags and TASKS[config.task] is not train:
            raise InputError(f"--resume: task '{config.task}' has nothing to resume, expected --overwrite")
        TASKS[config.task](config, device, "overwrite" in flags, "resume" in flags)
        dist.destroy_process_group()
    except INPUT_ERRORS as error:
        rank = int(os.environ.get("LOCAL_RANK", 0))
        if rank:  # mostly the same error on all ranks: the first one says it, and torchrun ends the others meanwhile
            time.sleep(2)
        print(f"act.py: error: {error}" + (f" (local rank {rank})" if rank else ""), file=sys.stderr, flush=True)
        return 2
    except HelperError as error:
        if is_main():
            print(f"act.py: stopped: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if is_main():
            print("\nact.py: interrupted; --resume goes on from the last checkpoint", file=sys.stderr, flush=True)
        return 130
    finally:
        if dist.is_initialized() and dist.get_world_size() == 1:  # with more it could wait for ranks that wait for this one
            dist.destroy_process_group()
    return 0


def run_as_program():
    """main(), and the end of the process with what it returns as exit status."""
    try:
        status = main()
    except Exception:  # nobody foresaw it: here is its traceback, and Python's own way out could wait for ranks that wait for this one
        traceback.print_exc()
        status = 1
    for thread in threading.enumerate():  # calls in flight are paid for: they end, and their answers are kept
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: gloo's threads can drop tensors while the interpreter shuts down, destroy_process_group or not, and that aborts a
    # process which has finished (seen with torch 2.13 and a replicated mesh, in up to one run of three).
    os._exit(status)


if __name__ == "__main__":
    run_as_program()
