"""ACT, Action-Based Contrastive Self-Training (arXiv 2406.00222): when to ask instead of guessing.

    torchrun act.py --config tiny.json                  on a laptop: about a minute
    torchrun --nproc-per-node 8 act.py --config gemma2_2b_pacific.json
                                                        on GPUs, sharded with fully_shard
    torchrun act.py --config tiny.json --beta 0.1       any key can be overridden
    python act.py --config tiny.json --task check       what is wrong with a run's data?
    python act.py --help                                all keys

tasks (--task NAME, or a config's key "task"):
  act                  train on pairs that are sampled from the policy as it is (Algorithm 2)
  sft                  train on the gold replies
  dpo                  train on the pairs of Algorithm 1, nothing sampled
  evaluate             the metrics of policy_model_config.model_path on validation turns
  generate_preference  write the pairs of Algorithm 1 as files
  check                say what is wrong with the data, and what becomes of it

flags:
  --resume             go on from the newest checkpoint of output_dir; keys with FREE may change
  --overwrite          start again in an output_dir that holds a run

Reading order: data.py to the end of Algorithm 1, this file to the end of `train`, gemma.py to the
end of the decoder. That is the method. What comes after it here are rooms to enter when you change
what stands in them: turns and tokens, evaluation, configuration, processes, models, output
directories and checkpoints, helper models, command line.

Where we depart from the paper's Algorithm 2 and from the published research code, and why
(tests/proofs/README.md has the whole list):
  - `max_turns` bounds the simulated conversation; one that never answers loses (the paper's loop
    has no bound, the code allows one turn). So does a response cut off at `max_new_tokens`.
  - A lucky answer on a turn that called for a question is still the wrong action (the published
    code rewards it).
  - Policy and reference score the same sequences (the published code samples inside a forward pass
    that both run).
  - Only the assistant's tokens are scored, not the simulated user's (`loss_on: "all"` scores both,
    as the paper's formula reads and the published code does).
  - A pair whose sides have become the same text goes back to its original pair: its gradient would
    be zero.
  - The action is classified from every response, by the same classifier that labels unlabelled
    data.
  - With `num_generations` above 1 both sides of a pair can be the policy's own.
"""

import ast
import email.utils
import fcntl
import hashlib
import http.client
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from array import array
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from difflib import get_close_matches
from functools import cache, partial, wraps
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin
from urllib.parse import quote

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

import data
import gemma
from data import ANSWER, CLARIFY, HEURISTICS, InputError, Pair, read_json, write_json
from gemma import Forest, Gemma, GemmaConfig, KVCache, Template, Tokenizer, generate

# --------------------------------------------------------------------------------------------------
# Algorithm 2: on-policy pairs

WRONG_ACTION = "wrong_action"  # the first response asks where it should answer, or the reverse
GOOD_OUTCOME = "good_outcome"  # right action, and the trajectory ends in a good answer
BAD_OUTCOME = "bad_outcome"  # right action, but the answer is not good enough
NO_ANSWER = "no_answer"  # right action, but it is still asking after max_turns responses
CUT_OFF = "cut_off"  # a response did not come to its end within max_new_tokens
SAME_TEXT = "same_text"  # the two sides have become equal: the original pair stays
HELPER_FAILED = "helper_failed"  # a helper model gave no usable answer: the original pair stays
OUTCOMES = (WRONG_ACTION, GOOD_OUTCOME, BAD_OUTCOME, NO_ANSWER, CUT_OFF, SAME_TEXT, HELPER_FAILED)


class HelperFailed(Exception):
    """A helper model gave no usable answer in this conversation."""


@dataclass
class Rollout:
    """What Algorithm 2 made of an example."""

    before: Pair
    pair: Pair  # the on-policy pair
    trajectory: list  # messages of the policy and of the simulated user
    outcome: str  # one of OUTCOMES
    score: float | None = None  # H(y, g), where the final answer was judged
    replaced: str | None = None  # the side that the trajectory has become: "chosen" or "rejected"


def act_pair(pair, tolerance, max_turns, simulate_user=True):
    """The paper's Algorithm 2 for one example: returns its Rollout.

    A generator that yields what it asks for, so that `in_lockstep` can run a batch side by side:
        ("respond", trajectory)   is sent (y, ended): a response, and whether it came to its end
        ("classify", y)           is sent A(y), the action of a response
        ("simulate", trajectory)  is sent U(p, trajectory), the simulated user's reply
        ("score", trajectory)     is sent (exact, score), score being H(y, g) of its final answer
    A helper without an answer throws HelperFailed into it.

    In the paper's symbols: p is pair.context and pair.history, a pair.action, y_w pair.chosen,
    y_l pair.rejected, g pair.target, H the heuristic, epsilon `tolerance`, pi the policy. Without
    simulate_user (an ablation) a question where one is called for wins as it is.
    """
    trajectory = []
    try:
        y, action, ended = yield from respond(trajectory)      # y ~ pi(. | p)
        if ended and action != pair.action:                    # if A(y) != a:
            return contrast(pair, trajectory, WRONG_ACTION)    #     y_l = y
        while ended and action == CLARIFY and simulate_user:   # while A(y) != ANSWER:
            if len(trajectory) == 2 * max_turns - 1:  # responses, and users between them
                return contrast(pair, trajectory, NO_ANSWER)
            user = yield "simulate", trajectory                #     u = U(p, trajectory)
            trajectory.append(("user", user))                  #     trajectory += u
            y, action, ended = yield from respond(trajectory)  #     trajectory += y ~ pi
        if not ended:
            return contrast(pair, trajectory, CUT_OFF)
        if action == CLARIFY:  # nobody was simulated
            return contrast(pair, trajectory, GOOD_OUTCOME)
        _, score = yield "score", trajectory                   # H(y, g)
        outcome = GOOD_OUTCOME if score > tolerance else BAD_OUTCOME
        return contrast(pair, trajectory, outcome, score)      # y_w or y_l = trajectory
    except HelperFailed:
        return Rollout(pair, pair, trajectory, HELPER_FAILED)


def respond(trajectory):
    """The policy's next message, added to the trajectory: returns (y, A(y), ended)."""
    y, ended = yield "respond", trajectory
    trajectory.append(("model", y))
    return y, (yield "classify", y), ended


def contrast(pair, trajectory, outcome, score=None):
    """A good trajectory becomes y_w, any other y_l; two sides of the same words tell nothing."""
    replaced = "chosen" if outcome == GOOD_OUTCOME else "rejected"
    cut = outcome == CUT_OFF and bool(trajectory[-1][1])  # else no token of it would be scored
    new = replace(pair, cut=cut, **{replaced: trajectory})
    if data.same_words(new):
        return Rollout(pair, pair, trajectory, SAME_TEXT)
    return Rollout(pair, new, trajectory, outcome, score, replaced)


def best_contrast(rollouts):
    """One pair of several rollouts of an example: its first win against its first loss.

    A side that none has won, or lost, stays the example's; the other rollouts replaced nothing.
    """
    pair = new = rollouts[0].before
    won = next((rollout for rollout in rollouts if rollout.replaced == "chosen"), None)
    lost = next((rollout for rollout in rollouts if rollout.replaced == "rejected"), None)
    if won:
        new = replace(new, chosen=won.trajectory)
    if lost:
        new = replace(new, rejected=lost.trajectory, cut=lost.pair.cut)
    if data.same_words(new):
        new, won, lost = pair, None, None
    for rollout in rollouts:
        if rollout is not won and rollout is not lost:
            rollout.replaced = None
    return new


def in_lockstep(conversations, answers):
    """Run generators that ask as `act_pair` does side by side: one batch for what many wait for.

    answers: {what is asked for: function(rows, requests) -> [answer]}, rows being positions in
    `conversations`; an answer None throws HelperFailed. Returns what each conversation returned.
    """
    results = [None] * len(conversations)
    waiting = {row: next(conversation) for row, conversation in enumerate(conversations)}
    while waiting:
        for wanted, answer_all in answers.items():
            rows = sorted(row for row, (what, _) in waiting.items() if what == wanted)
            requests = [waiting.pop(row)[1] for row in rows]
            for row, answer in zip(rows, answer_all(rows, requests) if rows else [], strict=True):
                conversation = conversations[row]
                try:
                    if answer is None:
                        waiting[row] = conversation.throw(HelperFailed())
                    else:
                        waiting[row] = conversation.send(answer)
                except StopIteration as end:
                    results[row] = end.value
    return results


def on_policy(run, pairs, step, positions):
    """Algorithm 2 for a batch, `num_generations` samples an example.

    Returns its new pairs, counts of the outcomes, and the lines of rollouts.jsonl of all ranks.
    """
    training, files = run.config.training_config, run.config.data_config
    n = training.num_generations
    together = training.per_device_eval_batch_size
    examples = [pair for pair in pairs for _ in range(n)]
    noise = noise_generators(training.seed, step, positions, n)
    policy = unsharded(run.policy, training.bf16)
    rules = files.tolerance, training.max_turns, training.simulate_user
    rollouts, groups, new = [], [], []

    def sample():
        for i in range(0, len(examples), together):
            batch = examples[i : i + together]
            respond = sampler(policy, run.template, batch, training, noise[i : i + together])
            answers = {"respond": respond, **run.helpers.answers(batch, files.heuristic)}
            rollouts.extend(in_lockstep([act_pair(pair, *rules) for pair in batch], answers))
        groups.extend(rollouts[i : i + n] for i in range(0, len(rollouts), n))
        new.extend(map(best_contrast, groups))
        return [rollout_row(step + 1, rollout) for rollout in rollouts]

    rows = sum(on_all(sample), [])
    outcomes = Counter(rollout.outcome for rollout in rollouts)
    counts = {f"act/{outcome}": outcomes[outcome] for outcome in OUTCOMES}
    if n > 1:
        taken = [sum(rollout.replaced is not None for rollout in group) for group in groups]
        counts["act/both_sides_own"] = taken.count(2)
    return new, counts, rows


def noise_generators(seed, step, positions, samples=1):
    """A generator for each sample, keyed so that no batching, rank or resume changes it."""
    keys = [f"{seed}/{step}/{position}" for position in positions]
    keys = [f"{key}/{n}" if n else key for key in keys for n in range(samples)]
    return [torch.Generator().manual_seed(random.Random(key).getrandbits(62)) for key in keys]


# --------------------------------------------------------------------------------------------------
# The loss


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             reference_chosen_logps, reference_rejected_logps,
             beta, label_smoothing=0.0, loss_type="sigmoid"):  # fmt: skip
    """Losses of preference pairs; all arguments and results float32 [batch].

    With the margin m = log(pi(y_w) / ref(y_w)) - log(pi(y_l) / ref(y_l)):
        sigmoid   -log sigmoid(beta m), DPO (arXiv 2305.18290, equation 7); `label_smoothing` is
                  the share of pairs taken to be the wrong way round (conservative DPO)
        hinge     max(0, 1 - beta m), SLiC (arXiv 2305.10425)
        ipo       (m - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17; TRL takes m per token)
    Returns (losses, chosen_rewards, rejected_rewards), rewards being beta times the log-ratios.
    """
    chosen_ratios = policy_chosen_logps - reference_chosen_logps
    rejected_ratios = policy_rejected_logps - reference_rejected_logps
    margins = chosen_ratios - rejected_ratios
    if loss_type == "sigmoid":
        right, wrong = F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * margins)
    elif loss_type == "ipo":
        losses = (margins - 1 / (2 * beta)).square()
    else:
        raise InputError(f"loss_type is {loss_type!r}, expected one of sigmoid, hinge, ipo")
    return losses, beta * chosen_ratios.detach(), beta * rejected_ratios.detach()


def preference_step(run, pairs, weight):
    """Forward and backward of a micro-batch of pairs, its gradient times `weight`. Returns sums."""
    training = run.config.training_config
    sequences = []  # chosen, rejected, chosen, rejected, ...
    for pair in pairs:
        sequences.append(sequence(pair, pair.chosen, True, run.template, training))
        sequences.append(sequence(pair, pair.rejected, not pair.cut, run.template, training))
    forest = Forest(*zip(*sequences, strict=True)).to(run.device)
    reference_chosen, reference_rejected = reference_logps(run, forest).view(-1, 2).T
    chosen, rejected = run.policy.logps(forest).view(-1, 2).T
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen, rejected, reference_chosen, reference_rejected,
        training.beta, training.label_smoothing, training.loss_type,
    )  # fmt: skip
    likelihoods = chosen / scored_tokens(forest)[::2]  # per token
    losses = losses - training.rpo_alpha * likelihoods
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
    values = torch.stack(list(sums.values())).tolist()  # one wait for the device
    return {**dict(zip(sums, values, strict=True)), "tokens": forest.used}


@torch.no_grad()
def reference_logps(run, forest):
    """Under the initial policy: a second model, or with LoRA the policy without its adapters."""
    with gemma.adapters_off(run.policy) if run.policy.lora else nullcontext():
        return (run.reference or run.policy).logps(forest)


def sft_step(run, pairs, weight):
    """As `preference_step`, of gold replies: negative log-likelihood, a mean over each's tokens."""
    training = run.config.training_config
    golds = [sequence(pair, pair.gold[:1], True, run.template, training) for pair in pairs]
    forest = Forest(*zip(*golds, strict=True)).to(run.device)
    losses = -run.policy.logps(forest) / scored_tokens(forest)
    (losses.sum() * weight).backward()
    return {"loss": losses.sum().item(), "tokens": forest.used}


def sequence(pair, messages, ended, template, training):
    """(tokens, mask) of a prompt and one side, cut to max_length; mask: 1 where scored."""
    prompt = list(pair.prompt)
    tokens, mask = template.reply(messages, ended)
    if training.loss_on == "all":
        mask = [1] * len(tokens)
    room = max(1, training.max_length - len(prompt))
    return prompt + tokens[:room], [0] * len(prompt) + mask[:room]


def scored_tokens(forest):
    """How many tokens of each sequence are scored, at least 1: int64 [sequences]."""
    return torch.tensor(forest.counts, device=forest.tokens.device).clamp(min=1)


# --------------------------------------------------------------------------------------------------
# Training


class DataOrder:
    """Which example comes when: epoch after epoch, dialogues shuffled, their turns together."""

    def __init__(self, pairs, seed):
        self.dialogues, self.count, self.seed = data.dialogues(pairs), len(pairs), seed
        self.epochs = {}  # the current one: number -> indices in order

    def __getitem__(self, position):
        epoch, index = divmod(position, self.count)
        if epoch not in self.epochs:
            rng = random.Random(f"{self.seed}/epoch/{epoch}")
            shuffled = rng.sample(self.dialogues, len(self.dialogues))
            self.epochs = {epoch: [i for dialogue in shuffled for i in dialogue]}
        return self.epochs[epoch][index]


def learning_rate(step, steps, training):
    """The learning rate of step `step` (from 0) of `steps`: a linear warm-up, then the schedule."""
    if step < training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    done = (step - training.warmup_steps) / max(1, steps - training.warmup_steps)
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return training.learning_rate * factors[training.lr_scheduler_type]


def clip_and_step(policy, optimizer, max_grad_norm, lr):
    """Clip, take one optimiser step, and return the gradient's norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm or math.inf)
    norm = gemma.whole_tensor(norm)
    if not norm.isfinite():  # the same on all ranks; the parameters are still good
        raise NotANumber("the gradient's norm is not a finite number")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def train(config, overwrite=False, resume=False):
    """Tasks sft, dpo and act: the whole run, told straight through."""
    run = prepare(config, overwrite, resume)
    if run is None:
        return
    training = config.training_config
    size = run.state["examples_per_step"]
    local = size // dist.get_world_size()  # this rank's part of them
    micro = training.per_device_train_batch_size  # of a forward pass
    order, log, progress = run.order, run.log, meter("step", run.steps)
    take_step = sft_step if config.task == "sft" else preference_step
    print0(f"{config.task}: {len(run.pairs)} training turns, {len(run.validation)} for validation, "
           f"steps of {size} turns, step {run.saved} to {run.steps}")  # fmt: skip
    done = run.saved
    try:
        for step in range(run.saved, run.steps + 1):
            # evaluate before the first step, after the last, and in between as asked
            due = training.eval_steps and step % training.eval_steps == 0 or step in (0, run.steps)
            if run.validation and due and step not in log.evaluated:
                log.evaluation(step, *evaluate_pairs(run))
            if step == run.steps:
                break

            # this rank's part of the global batch, which is the same however it is divided
            began = time.perf_counter()
            start = step * size + dist.get_rank() * local
            positions = range(start, start + local)
            batch, sums = [run.pairs[order[position]] for position in positions], Counter()

            # on-policy pairs (Algorithm 2)
            n = training.sample_frequency
            if config.task == "act" and n and (step + 1) % n == 0:
                batch, counts, rows = on_policy(run, batch, step, positions)
                log.append("rollouts.jsonl", rows)
                sums.update(counts)
            rolled = time.perf_counter()

            # forward and backward, micro-batch by micro-batch; gradients are averaged over ranks
            for i in range(0, local, micro):
                sums.update(take_step(run, batch[i : i + micro], 1 / local))
            sums["stop"] = log.problem is not None or bool(ASKED)
            totals = dict(zip(sums, all_sum([*sums.values()]), strict=True))
            require_finite(totals, NotANumber)  # on all ranks, before they are learnt from
            stop = totals.pop("stop")  # by Ctrl-C, SIGTERM or a full disk
            lr = learning_rate(step, run.steps, training)
            grad_norm = clip_and_step(run.policy, run.optimizer, training.max_grad_norm, lr)
            done = step + 1

            # one line of metrics: means over the global batch, sums of what is counted
            if done % training.logging_steps == 0 or done == run.steps:
                row = {k: x if is_total(k) else x / size for k, x in totals.items()}
                row |= {"grad_norm": grad_norm, "learning_rate": lr}
                row["seconds/rollout"] = rolled - began
                row["seconds/train"] = time.perf_counter() - rolled
                log.append("metrics.jsonl", [{"step": done, **row}])
                margin = f"  margin {row['rewards/margins']:.3f}" if config.task != "sft" else ""
                progress(done, f"loss {row['loss']:.4f}{margin}")

            if stop:
                raise RunStopped(log.problem or "interrupted")
            if training.save_steps and (done % training.save_steps == 0 or done == run.steps):
                save_checkpoint(run, done)
    except RunStopped as error:
        raise stopped(run, done, error) from None
    except torch.OutOfMemoryError as error:
        if dist.get_world_size() > 1:  # the others wait for this rank: nothing can be saved
            raise
        error.__traceback__ = None  # which holds what the step has computed
        raise stopped(run, done, RunStopped(OUT_OF_MEMORY)) from None
    save_trained(run)
    log.finish()
    run.helpers.report("these turns kept their pair, or are left out of the means")


# --------------------------------------------------------------------------------------------------
# Turns and tokens
# From files to pairs with the tokens of their prompts; the policy's voice in a conversation.


def load_pairs(config, helpers, template, contents):
    """(training, validation) pairs of a configuration's files. Raises InputError.

    Read, label, pair, ask, balance, tokenise, report. contents: {key: bytes} of the files.
    """
    files, training = config.data_config, config.training_config

    def prepared(path, pairs, trained_on):
        if not training.is_preference:
            pairs = make_pairs(path, pairs, config, helpers, trained_on)
        if trained_on:
            pairs = data.balance(pairs, training.class_balance, training.seed)
        if trained_on and training.action_labels == "random":
            pairs = data.random_actions(pairs, training.seed)
        return tokenize(path, pairs, template, config, trained_on) if template else pairs

    rows, held_out = read_rows(config, contents)
    pairs = prepared(files.train_path, rows, True)
    held = files.validation_path or f"{files.train_path} (held out)"
    validation = prepared(held, held_out, False)
    if files.heuristic == "execution_match":
        progress = meter("trying gold query", len(pairs + validation))
        for i, pair in enumerate(pairs + validation):  # one that fails is named now
            score(data.execution_match, pair, pair.target, pair.target)
            progress(i + 1)
    helpers.report("there the rule took its place")
    report_trust(files, (pairs + validation)[:500])
    return pairs, validation


def report_trust(files, pairs):
    """How far the heuristic can be trusted on these turns, before it is."""
    if pairs and files.heuristic in HEURISTICS:
        compare = HEURISTICS[files.heuristic]
        wins, others, losses, golds = data.heuristic_check(pairs, compare, files.tolerance)
        wins = f"{wins / max(1, others):.0%} of wrong answers (gold ones of other turns) win"
        losses = f"{losses / golds:.0%} of right ones in a sentence lose"
        print0(f"{files.heuristic} above tolerance {files.tolerance}: {wins}, {losses}")


def read_rows(config, contents):
    """(training rows, validation rows): conversations, or pairs where is_preference is set."""
    files, training = config.data_config, config.training_config
    read = data.read_preferences if training.is_preference else data.read_conversations
    found = []
    for key in ("train_path", "validation_path"):
        raw = contents.get(f"data_config.{key}")
        rows, lines = ([], []) if raw is None else read(getattr(files, key), raw)
        print0(*lines)
        found.append(rows)
    rows, held_out = found
    if files.validation_split and not held_out:
        rows, held_out = data.split_dialogues(rows, files.validation_split, training.seed)
        print0(f"{files.train_path}: {len(held_out)} are held out for validation, {len(rows)} not")
    if files.half:
        groups = data.dialogues(rows)[files.half == "second" :: 2]
        rows = [rows[i] for group in groups for i in group]
        print0(f"{files.train_path}: of these the {files.half} half is trained on, {len(rows)}")
    return [] if config.task == "evaluate" else rows, held_out


def make_pairs(path, rows, config, helpers, trained_on=True):
    """The pairs of conversations, after Algorithm 1.

    Those trained on may take their actions from elsewhere (`action_labels`). A losing question is
    asked for only where it is used: in training on pairs, and in files of pairs.
    """
    training, task = config.training_config, config.task
    asks = task == "generate_preference" or trained_on and task in ("act", "dpo")
    if trained_on and training.action_labels == "classifier":
        for row in rows:
            for message in row["messages"]:
                message.pop("requires_clarification", None)
    missing = data.missing_labels(rows)
    replies = [reply for _, reply in missing]
    classify = helpers.roles["action_model_config"]
    actions = divided("classifying reply", classify, replies)
    rules = zip(actions, data.rule_actions(replies), strict=True)  # where a model gave nothing
    data.label_turns(missing, [action or rule for action, rule in rules])
    pairs, skipped = data.make_pairs(rows)
    requests = data.question_requests(pairs, training.icl_examples, training.seed)
    write = helpers.roles["preference_model_config"] if asks else data.rule_questions
    questions = divided("writing question", write, requests)
    data.reject_questions(requests, questions)
    # a rule costs nothing: it is compared with the labels
    free = backend_of(config.action_model_config) == "rule"
    actions = classify([pair.gold[0][1] for pair in pairs]) if free else ()
    print0(*data.check_conversations(path, pairs, skipped, len(missing), actions))
    return pairs


def tokenize(path, pairs, template, config, trained_on):
    """Pairs with the tokens of their prompts; of those trained on the ones whose good side fits.

    Each text of a dialogue is tokenised once for all its turns. What is cut, folded or left out is
    said.
    """
    training, kept = config.training_config, []
    found, done, progress = defaultdict(list), 0, meter("tokenising turn", len(pairs))
    for group in data.dialogues(pairs):
        turns = [pairs[i] for i in group]
        first = turns[0]
        if not template.plain and first.messages[0][0] == "model":
            found["greetings come first, which format 'gemma' leaves out"].append(first.line)
        lengths = [pair.length or len(first.messages) for pair in turns]
        prompts = template.prompts(
            first.context, first.messages, lengths, training.max_prompt_length, first.instruction
        )
        for pair, length, (prompt, lost) in zip(turns, lengths, prompts, strict=True):
            pair.prompt = array("i", prompt)
            if lost:
                found["prompts lose tokens to max_prompt_length"].append(f"{pair.at} ({lost})")
            room = training.max_length - len(prompt)
            sides = pair.chosen, pair.rejected
            taught, other = (pair.gold[:1], []) if config.task == "sft" else sides
            if trained_on and len(template.reply(taught)[0]) > room:
                found["turns whose reply does not fit into max_length are left out"].append(pair.at)
                continue
            if trained_on and len(template.reply(other)[0]) > room:
                found["turns have a losing side that max_length cuts"].append(pair.at)
            kept.append(pair)
            said = first.messages[length - 1], pair.gold[0]
            if template.plain and any("\n" in text.strip() for _, text in said):
                found["turns have line breaks, which format 'plain' makes spaces"].append(pair.at)
        done += len(group)
        progress(done)
    print0(*data.noted(path, found))
    return kept


def score(compare, pair, answer, gold):
    """(exact, score) of an answer on this turn. Raises InputError naming it, where SQL fails."""
    try:
        return data.scored(compare, answer, gold, pair.context)
    except InputError as error:
        raise InputError(f"{pair.where}: {error}") from None


def sampler(model, template, pairs, training, generators=None):
    """`respond` of `in_lockstep`: continues all prompts in one batch, and keeps their cache.

    generators: one for each pair; None: greedy. Returns a function (rows, trajectories) -> [(the
    policy's next message, whether it came to its end)].
    """
    most = training.max_new_tokens
    cache = KVCache()
    cached = []  # the rows that the cache holds, in its order

    def next_messages(rows, trajectories):
        prompts = []
        for row, trajectory in zip(rows, trajectories, strict=True):
            prompt = list(pairs[row].prompt)
            said = template.following(trajectory) if trajectory else []
            room = max(1, training.max_length - len(prompt))
            prompts.append(prompt + said[-room:])
        if cache.order:
            cache.keep([cached.index(row) for row in rows])
        cached[:] = rows
        replies = generate(
            model,
            prompts,
            most,
            temperature=training.temperature if generators else 0.0,
            top_k=training.top_k,
            top_p=training.top_p,
            stop_ids=template.stop_ids,
            generator=generators and [generators[row] for row in rows],
            kv_cache=cache,
        )
        return [(template.text(reply), len(reply) < most) for reply in replies]

    return next_messages


# --------------------------------------------------------------------------------------------------
# Evaluation and logs
# Every validation turn to its end with greedy decoding, by the driver of Algorithm 2; what a run
# writes down on the way.


def play_turn(pair, max_turns, compare=data.drop_f1):
    """Asks as `act_pair` does; goes on whatever the first action. Returns a row of eval_samples.

    A conversation that does not end in an answer scores 0. inferred_action is None where a helper
    failed: the turn is then counted, but left out of all means. compare: what the first reply
    scores beside the gold one.
    """
    trajectory, actions, answer, ended = [], [], None, True
    exact = f1 = turn_exact = turn_f1 = 0.0
    try:
        while ended and ANSWER not in actions and len(actions) < max_turns:
            if actions:
                trajectory.append(("user", (yield "simulate", trajectory)))
            y, action, ended = yield from respond(trajectory)
            actions.append(action)
        if ended and action == ANSWER:
            answer = y
            exact, f1 = yield "score", trajectory
        if compare is data.execution_match and pair.gold[0][1] != pair.target:
            compare = data.exact_match  # a question is no query, whatever the rule says of it
        turn_exact, turn_f1 = score(compare, pair, trajectory[0][1], pair.gold[0][1])
    except HelperFailed:
        actions = [None]
    return {
        "where": pair.where, "context": pair.context, "history": pair.history, "gold": pair.gold,
        "target_action": pair.action, "gold_target": pair.target,
        "gold_questions": len(pair.gold) // 2 or int(pair.action == CLARIFY),
        "trajectory": trajectory, "final_answer": answer, "inferred_action": actions[0],
        "questions": actions.count(CLARIFY), "exact_match": exact, "f1": f1, "ended": ended,
        "turn_exact_match": turn_exact, "turn_f1": turn_f1,
    }  # fmt: skip


def evaluate_pairs(run):
    """Every validation turn to its end. Returns (metrics, samples), the same on all ranks."""
    config, helpers = run.config, run.helpers
    training, heuristic = config.training_config, config.data_config.heuristic
    policy = unsharded(run.policy, training.bf16)
    compare = HEURISTICS.get(heuristic, data.drop_f1)  # a judge rates answers, not first replies

    def play(batch):
        respond = sampler(policy, run.template, batch, training)
        answers = {"respond": respond, **helpers.answers(batch, heuristic)}
        turns = [play_turn(pair, training.max_turns, compare) for pair in batch]
        return in_lockstep(turns, answers)

    size = training.per_device_eval_batch_size
    samples = divided("evaluating turn", play, run.validation, size)
    unended = sum(not sample["ended"] for sample in samples)
    if unended:
        print0(f"{unended} of {len(samples)} turns end in a reply that is cut at max_new_tokens")
    asked = [sample["trajectory"] for sample in samples if sample["target_action"] == CLARIFY]
    replies = [trajectory[1][1] for trajectory in asked if len(trajectory) > 1]
    if replies:
        refused = replies.count(config.data_config.nothing_to_add)
        said = f"{CLARIFY} turns: the simulated user refused {refused} of {len(replies)} questions"
        rule = backend_of(config.user_simulator_config) == "rule"
        print0(said + rule * " (a rule that compares words; user_simulator_config casts a model)")
    return summarize(samples), samples


def rollout_row(step, rollout):
    """A line of rollouts.jsonl."""
    pair = rollout.before
    return {
        "step": step, "where": pair.where, "context": pair.context, "history": pair.history,
        "action": pair.action, "target": pair.target, "trajectory": rollout.trajectory,
        "outcome": rollout.outcome, "replaced": rollout.replaced, "score": rollout.score,
    }  # fmt: skip


def summarize(samples):
    """Metrics of evaluated turns, as fractions.

    A mean over nothing is None, and counts say how many turns each mean is over.
    """
    usable = [sample for sample in samples if sample["inferred_action"]]

    def those(key, action):
        return [sample for sample in usable if sample[key] == action]

    gold = [sample["target_action"] for sample in usable]
    inferred = [sample["inferred_action"] for sample in usable]
    metrics = data.action_metrics(gold, inferred)
    for name, prefix, chosen in (
        ("Turn-Level", "turn_", usable),
        ("Trajectory-level", "", usable),
        ("Post-Clarification", "", those("inferred_action", CLARIFY)),
        ("CLARIFY Turns: Trajectory-level", "", those("target_action", CLARIFY)),
        ("ANSWER Turns: Trajectory-level", "", those("target_action", ANSWER)),
    ):
        for metric, key in (("DROP F1", "f1"), ("Exact Match", "exact_match")):
            values = [sample[prefix + key] for sample in chosen]
            metrics[f"{name} {metric}"] = data.mean_or_none(values)
        metrics[f"{name} Turns"] = len(chosen)
    for name, key in (("Questions", "questions"), ("Gold Questions", "gold_questions")):
        metrics[f"{name} per Turn"] = data.mean_or_none([sample[key] for sample in usable])
    metrics["Helper Failures"] = len(samples) - len(usable)
    return metrics


SHOWN = (
    "Accuracy", "Macro F1", "Binary Recall", "Trajectory-level Exact Match",
    "Trajectory-level DROP F1", "Post-Clarification Exact Match",
    "CLARIFY Turns: Trajectory-level Exact Match", "ANSWER Turns: Trajectory-level Exact Match",
    "Questions per Turn",
)  # fmt: skip


def table(names, heuristic, *columns):
    """Lines of metrics for people: in percent, DROP F1 only where that is the heuristic."""
    lines = []
    for name in names:
        line = f"{title(name, heuristic):46}"
        for metrics in columns:
            value = metrics[name]
            if isinstance(value, float):
                value = f"{value:.2f}" if "per Turn" in name else f"{100 * value:.1f}"
            line += f" {'-' if value is None else value:>8}"
        lines.append(line)
    return lines


def title(name, heuristic):
    """A metric's name for people."""
    name = name.replace("Binary Recall", "Asks Where It Should (Binary Recall)")
    return name if heuristic == "drop_f1" else name.replace("DROP F1", heuristic)


def comparison(before, after, heuristic):
    """Lines: the main metrics before and after training over the turns that both have, and turns.

    Of the conversations that ended better or worse than before two and one are shown, those that
    changed most, with the last messages before them; no lucky guess where a question was due.
    """
    both = [(b, a) for b, a in zip(before, after, strict=True)
            if b["inferred_action"] and a["inferred_action"]]  # fmt: skip
    first, last = (summarize([pair[i] for pair in both]) for i in (0, 1))
    lines = [f"{'':46} {'before':>8} {'after':>8}", *table(SHOWN, heuristic, first, last)]
    both.sort(key=lambda pair: pair[0]["f1"] - pair[1]["f1"])
    better = [pair for pair in both if pair[1]["f1"] > pair[0]["f1"]]
    worse = [pair for pair in both if pair[1]["f1"] < pair[0]["f1"]]
    count = f"{len(better)} turns got a better answer, {len(worse)} a worse one, of {len(both)}"
    lines += ["", count]
    right = [pair for pair in better if pair[1]["inferred_action"] == pair[1]["target_action"]]
    for before, after in right[:2] + worse[-1:]:
        lines += ["", f"  {one_line(after['history'][-3:])}"]
        lines.append(f"    before | {one_line(before['trajectory'])}")
        lines.append(f"    after  | {one_line(after['trajectory'])}")
        lines.append(f"    gold   | {data.fold(after['gold_target'])}")
    return lines


def one_line(messages):
    """Messages for people, of a long one the head."""
    said = ((role, shorten(text, 240, placeholder=" ...")) for role, text in messages)
    return "  ".join(f"{data.SPEAKERS[role]}: {text}" for role, text in said)


def is_total(key):
    """Whether the log shows a metric as a sum over the global batch rather than as a mean."""
    return key == "tokens" or key.startswith("act/")


class Log:
    """metrics.jsonl, rollouts.jsonl, and of the first and last evaluation eval_samples.jsonl.

    Rank 0 writes. A write that fails is noted in `problem`: the run saves and stops.
    """

    def __init__(self, config):
        self.config = config
        self.folder = output_of(config)
        self.problem = None
        self.metric = config.training_config.metric_for_best_model
        path, key = self.folder / "metrics.jsonl", f"eval/{self.metric}"
        self.evaluated = {  # by metric
            row["step"]: data.require(row, key, f"{path}: ", int, float, type(None)) or 0.0
            for row in on_main(lambda: [*logged_rows(path)]) if key in row  # if it is resumed
        }  # fmt: skip
        samples = on_main(lambda: [*logged_rows(self.folder / "eval_samples.jsonl")])
        self.first = [sample for sample in samples if sample["step"] == 0]  # before training
        self.last = [sample for sample in samples if sample["step"]]  # of the last evaluation

    def write(self, function, *arguments):
        try:
            if is_main():
                require_lock(self.folder)
                function(*arguments)
        except (RunStopped, InputError, OSError) as error:
            self.problem = str(error)

    def append(self, name, rows):
        self.write(data.append_jsonl, self.folder / name, rows)

    def evaluation(self, step, metrics, samples):
        self.evaluated[step] = metrics[self.metric] or 0.0  # a mean over nothing is nothing
        rows = [{"step": step, **sample} for sample in samples]
        if step == 0:
            self.first = rows
        else:
            self.last = rows
        row = {"step": step} | {f"eval/{name}": value for name, value in metrics.items()}
        self.write(write_evaluation, self.folder, metrics, self.first + self.last, row)

    def best_first(self):
        """Steps by the metric of their evaluation, the best first; of equals the later one."""
        return sorted(self.evaluated, key=lambda step: (self.evaluated[step], step), reverse=True)

    def finish(self):
        if self.first and self.last:
            try:
                print0("", *comparison(self.first, self.last, self.config.data_config.heuristic))
            except (LookupError, TypeError, ValueError):  # what a resumed run has read
                print0("eval_samples.jsonl is not as a run wrote it: nothing is compared")
        self.write(write_report, self.folder)
        report = self.folder / "report.html"
        print0("", f"The model is in {self.folder / 'model'}; to look at in a browser: {report}")
        best = [f"{100 * self.evaluated[at]:.1f} after step {at}" for at in self.best_first()[:5]]
        if best:
            metric = title(self.metric, self.config.data_config.heuristic)
            print0(f"{metric}, the best first: {', '.join(best)}")
        if self.problem:
            print0(f"Not all was written: {self.problem}")


def write_evaluation(folder, metrics, samples, row=None):
    """row: of metrics.jsonl; it comes last, since it says that the evaluation is done."""
    data.write_jsonl(folder / "eval_samples.jsonl", samples)
    write_json(folder / "eval_metrics.json", metrics)
    if row:
        data.append_jsonl(folder / "metrics.jsonl", [row])
    write_report(folder)


def logged_rows(path):
    """Yields the rows of a log that a killed run may have left with half a line at its end."""
    with open(path, "rb") if path.exists() else nullcontext(()) as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                yield data.expect(data.parse_json(line, path, number), f"{path}:{number}", dict)


def write_report(folder):
    """report.html: a template with what the folder's files hold as JSON in it, long texts once."""
    found = {}
    texts = {}
    try:
        page = (HERE / "configs" / "report.html").read_text(encoding="utf-8")
        for name in ("config", "eval_metrics"):
            if (folder / f"{name}.json").exists():
                found[name] = read_json(folder / f"{name}.json")
        for name in ("metrics", "eval_samples", "rollouts"):
            most = 5000 if name == "rollouts" else None  # the newest: a browser has to hold them
            found[name] = [*deque(logged_rows(folder / f"{name}.jsonl"), most)]
    except (InputError, OSError) as error:
        return print0(f"{error}; report.html stays as it was")
    for row in found["eval_samples"] + found["rollouts"]:
        for key in ("context", "history", "gold"):
            if key in row:
                row[key] = texts.setdefault(json.dumps(row[key]), len(texts))
    found["texts"] = [json.loads(text) for text in texts]
    block = json.dumps(found).replace("<", "\\u003c")  # nothing in it ends the block; ASCII
    mark = '<script type="application/json" id="data">'
    data.write_text(folder / "report.html", [page.replace(f"{mark}null", mark + block)])


# --------------------------------------------------------------------------------------------------
# Configuration
# Every key there is, with its default and limits; `python act.py --help` prints them. Nothing else
# is read.

INPUT, OUTPUT = "an input path", "an output path"
FREE = "free"  # a resumed run may change it: how far, how often, on what; not what is learnt


class Range(NamedTuple):
    """The numbers that a key may have."""

    lowest: float = 0
    highest: float = 2**53


InputPath = Annotated[str, INPUT]
Count = Annotated[int, Range(1, 2**20)]
Positive = Annotated[float, Range(1e-12)]
Share = Annotated[float, Range(0, 0.999)]  # not all of it
Free = Annotated[int, FREE]
FreeCount = Annotated[Count, FREE]
FreeFlag = Annotated[bool, FREE]


@dataclass(frozen=True)
class PolicyModelConfig:
    model_path: InputPath = ""  # directory with config.json, *.safetensors, tokenizer.model
    dtype: Literal["float32", "bfloat16"] = "float32"  # of what is frozen; trained is float32
    lora_r: Annotated[int, Range(0, 2**16)] = 0  # above 0: train adapters of this rank (LoRA)
    lora_alpha: Positive = 32.0  # adapters are scaled by lora_alpha / lora_r
    lora_target_modules: list | None = None  # which have adapters; null: all of a layer


@dataclass(frozen=True)
class HelperConfig:
    # a rule knows a question that ends a reply in any language, requests in English alone
    backend: Literal["", "rule", "gemma", "gemini", "openai"] = ""  # "": gemini with a model_id
    model_path: InputPath = ""  # gemma: a checkpoint, or "reference": the policy's own
    model_id: str = ""  # gemini, openai: e.g. "gemini-2.0-flash-001", "llama3.2"
    base_url: Annotated[str, FREE] = ""  # of a server, e.g. "http://localhost:11434/v1"
    prompt_path: InputPath = ""  # what a model is told; "": the role's file in configs/prompts/
    temperature: float = 0.0  # 0: greedy
    max_new_tokens: Count = 128  # of one answer
    batch_size: FreeCount = 16  # gemma: prompts that are continued together
    concurrency: FreeCount = 16  # servers: calls in flight
    max_retries: Free = 5  # servers: of one call, after 429, 5xx, resets, time-outs
    max_failures: FreeCount = 20  # answers in a row of no use, after which the run saves and stops
    timeout: Annotated[Positive, FREE] = 60.0  # servers: seconds of one call
    cache_path: Annotated[str, OUTPUT, FREE] = "helper_cache.jsonl"  # servers: answers; "": none


@dataclass(frozen=True)
class DataConfig:
    train_path: InputPath = ""  # JSONL: conversations, or pairs where is_preference is set
    validation_path: InputPath = ""  # the same, for the evaluations; "": none
    validation_split: Share = 0.0  # without one: the share of training conversations held out
    half: Literal["", "first", "second"] = ""  # train on every other conversation, or on the others
    prompt_format: Literal["auto", "plain", "gemma"] = "auto"  # "auto": as the checkpoint says
    # drop_f1, coqa_f1, exact_match, number_match, execution_match or judge:
    heuristic: Literal[(*HEURISTICS, "judge")] = "drop_f1"  # how an answer is scored
    tolerance: Share = 0.9  # a trajectory wins if its score is above this
    nothing_to_add: str = data.NOTHING_TO_ADD  # what a user by rule says to any other question


@dataclass(frozen=True)
class TrainingConfig:
    output_dir: Annotated[str, OUTPUT, FREE] = "output"  # all that a run writes but cache_path
    seed: Annotated[int, Range(-(2**53))] = 42  # of order, samples and pairs, on any ranks
    per_device_train_batch_size: FreeCount = 1  # examples of one forward pass on one device
    per_device_eval_batch_size: FreeCount = 16  # samples continued together, in rollouts too
    gradient_accumulation_steps: FreeCount = 1  # forward passes to one optimiser step
    learning_rate: Positive = 5e-7  # after the warm-up; the published code's, as optim
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0  # from 0 up to learning_rate
    optim: Literal["rmsprop", "adamw"] = "rmsprop"
    weight_decay: float = 0.0  # of the optimiser
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to it; 0: no clipping
    num_train_epochs: Annotated[Positive, FREE] = 2.0  # passes over the training turns
    max_steps: Annotated[int, Range(-1), FREE] = -1  # above 0 it replaces num_train_epochs
    eval_steps: Free = 0  # 0: evaluate before the first and after the last step only
    logging_steps: FreeCount = 1  # a line of metrics.jsonl every n steps, of that step
    save_steps: Free = 0  # a checkpoint every n steps, and of the last; 0: only the model
    save_total_limit: Free = 1  # checkpoints kept, and the best that was evaluated; 0: all
    # a share of the closing table, by its name in eval_metrics.json
    metric_for_best_model: Annotated[Literal[SHOWN[:-1]], FREE] = "Trajectory-level DROP F1"
    load_best_model_at_end: FreeFlag = False  # model/ is the best checkpoint, if better
    bf16: bool = False  # compute in bfloat16; sums and what is trained are in float32
    gradient_checkpointing: FreeFlag = False  # recompute each layer in the backward pass
    dp_replicate_size: FreeCount = 1  # copies of the sharded model, e.g. the number of nodes
    max_length: Count = 1024  # tokens of prompt and trajectory; longer ones lose their end
    max_prompt_length: Count = 896  # longer ones lose their oldest turns, then their context's head
    beta: Positive = 0.05  # DPO: how far the policy may move from the reference
    label_smoothing: Annotated[float, Range(0, 0.499)] = 0.0  # pairs the wrong way round
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"  # sigmoid: DPO
    rpo_alpha: float = 0.0  # of the chosen side's negative log-likelihood per token, in the loss
    loss_on: Literal["assistant", "all"] = "assistant"  # "all": the simulated user's tokens too
    sample_frequency: int = 1  # sample on policy at every n-th step; 0: never, offline DPO
    num_generations: Annotated[int, Range(1, 1024)] = 1  # samples of an example; 1: the paper's
    simulate_user: bool = True  # False (ablation): a question where one is called for wins
    icl_examples: Count = 10  # examples that the preference model is shown
    action_labels: Literal["gold", "classifier", "random"] = "gold"  # "random": an ablation
    class_balance: dict | None = None  # e.g. {"CLARIFY": 2, "ANSWER": 1}: resample the turns
    is_preference: bool = False  # the files hold pairs: records, Vertex's, TRL's or OpenAI's
    max_new_tokens: Count = 128  # of one response
    temperature: float = 1.0  # of the policy's samples in training; evaluation is greedy
    top_k: Annotated[int, Range(0, 2**31)] = 0  # among the k most likely tokens only; 0: all
    top_p: Annotated[float, Range(1e-12, 1)] = 1.0  # the most likely of this probability
    max_turns: Count = 3  # responses of one simulated trajectory; with 1, every question loses


Task = Literal["act", "sft", "dpo", "generate_preference", "evaluate", "check"]


@dataclass(frozen=True)
class Config:
    task: Task = "act"
    policy_model_config: PolicyModelConfig = PolicyModelConfig()
    helper_config: HelperConfig = HelperConfig()  # what the five below inherit
    action_model_config: HelperConfig = HelperConfig()
    user_simulator_config: HelperConfig = HelperConfig()
    intent_model_config: HelperConfig = HelperConfig()
    preference_model_config: HelperConfig = HelperConfig()
    judge_model_config: HelperConfig = HelperConfig()
    data_config: DataConfig = DataConfig()
    training_config: TrainingConfig = TrainingConfig()


def with_metadata(kind):
    """(type, its Range, INPUT, OUTPUT, FREE) of a field."""
    return get_args(kind) if get_origin(kind) is Annotated else (kind,)


SECTIONS = {field.name: field.type for field in fields(Config) if field.name != "task"}
KEYS = {"task": with_metadata(Task)}
KEYS |= {f"{section}.{field.name}": with_metadata(field.type)
         for section, kind in SECTIONS.items() for field in fields(kind)}  # fmt: skip
HERE = Path(__file__).resolve().parent


def located(path):
    """A path as given if it is there, else beside act.py: shipped configs run from anywhere."""
    elsewhere = path and not os.path.exists(path) and os.path.exists(HERE / path)
    return str(HERE / path) if elsewhere else path


def load_config(path, overrides=None):
    """Config from a JSON file, looked for as given, beside act.py and in configs/.

    overrides: {"section.key", or a bare key that is unique: value}; a text is read as JSON where it
    is JSON. Raises InputError for a key that nothing reads, naming the nearest known one, and for a
    value of another type or out of its range.
    """
    overrides = overrides or {}
    if not isinstance(overrides, dict):
        raise InputError(f"overrides are {overrides!r}, expected a dictionary like {{'beta': 0.1}}")
    places = Path(path).expanduser(), HERE / path, HERE / "configs" / path
    path = next((place for place in places if place.is_file()), places[0])
    values = {}
    for key, value in flat(read_json(path)).items():
        values[key] = checked(key, value, f"{path}: {ascii(key)[1:-1]}")
    for name, value in overrides.items():
        key = full_key(name)
        values[key] = checked(key, value, f"--{name}")
    for key in [key for key in values if key.startswith("helper_config.")]:
        for role in ROLES:
            values.setdefault(key.replace("helper_config", role), values[key])
    config = Config()
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section:
            value = replace(getattr(config, section), **{name: value})
        config = replace(config, **{section or name: value})
    try:
        check_config(config)
    except InputError as error:
        given = f" with --{', --'.join(overrides)}" if overrides else ""
        raise InputError(f"{path}{given}: {error}") from None
    return config


def flat(config):
    """{"section.key": value} of a configuration as JSON has it."""
    values = {}
    for name, section in config.items():
        if isinstance(section, dict) and name in SECTIONS:
            values |= {f"{name}.{key}": value for key, value in section.items()}
        else:
            values[name] = section
    return values


def full_key(name):
    """The key that a flag means, with its section, which may be left out where that is clear."""
    found = [key for key in KEYS if f".{key}".endswith(f".{name}")]
    if len(found) > 1:
        raise InputError(f"--{name}: expected one of --{', --'.join(found)}")
    return found[0] if found else name


def parse_value(text):
    """What a text from the command line means in JSON or in Python, else the text itself."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return parse(text)
    return text


def checked(key, value, at):
    """A value of a key, of its type and in its range. Raises InputError, which begins with `at`."""
    if key in SECTIONS:
        raise InputError(f"{at}: not a key but a section, expected an object")
    if key not in KEYS:
        names = (*KEYS, *SECTIONS)
        known = {near: name for name in names for near in (name, name.rpartition(".")[2])}
        [near] = get_close_matches(key, known, 1, 0)
        raise InputError(f"{at}: unknown key, the nearest known one is {known[near]}")
    kind, *about = KEYS[key]
    is_path = INPUT in about or OUTPUT in about
    if is_path and value is None:
        value = ""
    if isinstance(value, str) and kind is not str:
        value = parse_value(value)
    if get_origin(kind) is Literal:
        right = value in get_args(kind)
        expected = f"one of {', '.join(filter(None, get_args(kind)))}"
    elif kind in (int, float):
        low, high = next((limits for limits in about if isinstance(limits, Range)), Range())
        right = type(value) in (int, kind) and low <= value <= high
        expected = f"{kind.__name__} from {low} to {high}"
    elif kind is str:
        unfit = "[\0\ud800-\udfff]" + "|://" * is_path
        right = isinstance(value, str) and not re.search(unfit, value)
        expected = "a path on this machine" if is_path else "text in UTF-8"
    else:
        right = isinstance(value, kind)
        expected = getattr(kind, "__name__", kind)
    if not right:
        raise InputError(f"{at} is {value!r}, expected {expected}")
    if is_path:
        value = os.path.expanduser(value)
    if INPUT in about:
        value = located(value)
    return float(value) if kind is float else value


def check_config(config):
    """The rules that concern more than one key. Raises InputError."""
    training, files, policy = config.training_config, config.data_config, config.policy_model_config
    task = config.task
    validates = files.validation_path or files.validation_split
    evaluations = (training.save_steps or math.nan) % (training.eval_steps or math.nan)
    data.balance([], training.class_balance, training.seed)  # raises InputError
    rules = (
        (training.max_prompt_length >= training.max_length,
         f"max_prompt_length {training.max_prompt_length} leaves no room below max_length "
         f"{training.max_length} for a response"),
        (training.max_new_tokens >= training.max_length,
         f"max_new_tokens {training.max_new_tokens} do not fit into max_length "
         f"{training.max_length}"),
        (training.is_preference and training.action_labels == "classifier",
         "action_labels is 'classifier', but files of pairs (is_preference) hold their actions"),
        (training.action_labels == "random" and (training.class_balance or task == "sft"),
         "action_labels 'random' changes pairs: not with class_balance, nor with task 'sft'"),
        (training.load_best_model_at_end and (evaluations or not validates),
         "load_best_model_at_end expects validation turns, and save_steps that are a multiple of "
         "eval_steps"),
        ([name for name in policy.lora_target_modules or () if name not in gemma.PROJECTIONS],
         f"lora_target_modules has {policy.lora_target_modules}, not of {gemma.PROJECTIONS}"),
        (training.label_smoothing and training.loss_type != "sigmoid",
         f"label_smoothing is set, which loss_type '{training.loss_type}' does not read"),
        (task not in ("generate_preference", "check") and not policy.model_path,
         f"policy_model_config.model_path is missing, task '{task}' needs it"),
        (task == "evaluate" and not validates,
         "data_config.validation_path is missing, task 'evaluate' needs it"),
        (not files.train_path and (task != "evaluate" or not files.validation_path),
         f"data_config.train_path is missing, task '{task}' needs it"),
        (files.heuristic == "judge" and backend_of(config.judge_model_config) == "rule",
         "heuristic is 'judge', expected a judge_model_config.backend that is a model"),
    )  # fmt: skip
    for broken, message in rules:
        if broken:
            raise InputError(message)


# --------------------------------------------------------------------------------------------------
# Processes
# One rank or many: what only rank 0 says, what all ranks share, and the progress of long stages.


OUT_OF_MEMORY = (
    "out of memory, lower per_device_train_batch_size, per_device_eval_batch_size or max_length"
)


class RunStopped(RuntimeError):
    """The run cannot go on: one line, for the user. It saves and stops."""


class NotANumber(RunStopped):
    """A loss, a log-probability or a gradient of a step is infinite or NaN."""


def start_processes():
    """Join the process group that torchrun describes, or make one of a single process.

    Returns the device. Raises InputError where the environment describes half of a group.
    """
    cuda = torch.cuda.is_available()
    group = {}
    if "RANK" not in os.environ:
        group = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    hours = timedelta(hours=6)  # a rank may wait long for another whose helper is slow
    try:
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        rank, world = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE"))
        if rank and world and int(rank) >= int(world):  # which the others would wait for
            raise ValueError(f"RANK is {rank}, expected less than WORLD_SIZE {world}")
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, timeout=hours, **group)
    except (ValueError, RuntimeError) as error:
        problem = str(error).partition("\n")[0]
        raise InputError(f"expected RANK and what else torchrun sets: {problem}") from None
    return torch.device("cuda" if cuda else "cpu")


def is_main():
    return os.environ.get("RANK", "0") == "0"


def say(text, file=None, end="\n"):
    """Print. A reader that is gone, a full disk or a closed stream never ends a run."""
    with suppress(OSError, ValueError):
        print(text, file=file or sys.stdout, end=end, flush=True)


CLEAR = "\r\033[K"  # the line that a terminal is on


def print0(*lines):
    for line in lines if is_main() else ():
        say(CLEAR * sys.stdout.isatty() + line)  # not behind a line of progress


def meter(label, total):
    """A function of how much is done, which says how far a long stage is: one line, in place on a
    terminal, else every ten seconds."""
    tty = sys.stdout.isatty()
    start = last = time.monotonic()
    first = None  # (seconds, done) of the first call: compilation is behind it

    def show(done, text=""):
        nonlocal first, last
        now = time.monotonic()
        ended = done == total
        first = first or (now, done)
        due = now - last >= (0.1 if tty else 10) or (ended and last > start)
        if due and is_main():
            last = now
            pace = (now - first[0]) / max(1, done - first[1])
            left = f", {pace * (total - done):.0f} s left" if pace and not ended else ""
            line = f"{label} {done}/{total}  {now - start:.0f} s{left}  {text}".rstrip()
            say(CLEAR * tty + line, end="" if tty and not ended else "\n")

    return show


def all_sum(values):
    """Sum of a list of numbers over all ranks, element by element, in one message."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def on_all(work, *arguments):
    """[work(...) of each rank], on every rank; the error of one is raised on all: none waits."""
    result = error = None
    try:
        result = work(*arguments)
    except torch.OutOfMemoryError:
        error = RunStopped(OUT_OF_MEMORY)
    except (RunStopped, InputError, OSError) as problem:
        error = problem
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (result, error))
    for _, error in answers:
        if error:
            raise error
    return [answer for answer, _ in answers]


def on_main(function, *arguments):
    """Call a function on rank 0 alone; its result, or its error, on every rank."""
    return on_all(lambda: function(*arguments) if is_main() else None)[0]


def divided(label, work, items, size=64):
    """work(batch), a list, for all items: each rank does its share of them, all get the whole."""
    rank = dist.get_rank()
    world = dist.get_world_size()
    # in their order: the turns of a dialogue stay together
    mine = items[len(items) * rank // world : len(items) * (rank + 1) // world]
    progress = meter(label, len(mine))

    def work_on_share():
        done = []
        for start in range(0, len(mine), size):
            stop_if_asked()
            done.extend(work(mine[start : start + size]))
            progress(len(done))
        return done

    return sum(on_all(work_on_share), [])


ASKED = []  # the signal that asks this run to save and stop


def heed_signals(heed=True):
    """Note a first Ctrl-C or SIGTERM for `stop_if_asked`; the next, or without heed each, ends."""

    def note(number, frame):
        heed_signals(False)
        ASKED.append(number)
        said = b"\nact.py: saves a checkpoint at the end of this step; once more leaves at once\n"
        with suppress(OSError):  # whoever reads it may be gone
            os.write(2, said * is_main())

    ASKED.clear()
    with suppress(ValueError):  # in another thread than the main one
        signal.signal(signal.SIGINT, note if heed else signal.default_int_handler)
        signal.signal(signal.SIGTERM, note if heed else signal.SIG_DFL)


def stop_if_asked():
    if ASKED:
        raise RunStopped("interrupted")


def require_finite(values, error=RunStopped):
    """Raises `error` for an infinity or NaN among numbers or tensors by name."""
    finite = [gemma.all_finite(torch.as_tensor(value)) for value in values.values()]
    finite = torch.stack(finite).tolist()  # one wait for the device
    for name, right in zip(values, finite, strict=True):
        if not right:
            raise error(f"{name} is not a finite number")


# --------------------------------------------------------------------------------------------------
# Models
# Sharded over the ranks to train, whole on each of them to sample.


def make_mesh(device, copies):
    """The ranks as [copies, shards]: parameters are sharded along the second dimension."""
    world = dist.get_world_size()
    if world % copies:
        raise InputError(f"dp_replicate_size is {copies}, expected a divisor of {world} processes")
    names, sizes = ("replicate", "shard"), (copies, world // copies)
    return init_device_mesh(device.type, sizes, mesh_dim_names=names)


def build_model(config, mesh, trained=True):
    """The policy of a configuration, sharded over a mesh; a rank reads only its part of the files.

    trained: in float32, or with LoRA adapters in float32 beside what is frozen. Else as a reference
    is, all of it frozen.
    """
    policy, training = config.policy_model_config, config.training_config
    source, lora = Path(policy.model_path), trained and policy.lora_r
    dtype = getattr(torch, policy.dtype)
    if trained and not lora:
        dtype = torch.float32
    elif training.bf16 and not trained:
        dtype = torch.bfloat16
    with torch.device("meta"):
        model = Gemma(GemmaConfig.from_json(source / "config.json")).to(dtype)
        model.requires_grad_(trained)
        if lora:
            targets = policy.lora_target_modules or gemma.PROJECTIONS
            gemma.add_adapters(model, gemma.LoraConfig(lora, policy.lora_alpha, targets))
    for module in model.modules():
        if isinstance(module, gemma.RMSNorm) and not trained:
            module.float()  # as the policy's: the two must not differ at the start
    gemma.load_safetensors(gemma.base_weights(model), source, prefix="model.")  # shapes
    model.compute_dtype = torch.bfloat16 if training.bf16 else dtype
    if mesh.size() > 1:  # one process has nothing to gather
        shard(model, mesh)
    model.to_empty(device=mesh.device_type)
    gemma.load_safetensors(gemma.base_weights(model), source, prefix="model.")
    gemma.init_adapters(model, training.seed)
    model.set_checkpointing(training.gradient_checkpointing)
    return model


def shard(model, mesh):
    """Parameters are gathered layer by layer when they are needed; sums are in float32."""
    precision = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
    mesh = mesh if mesh.size(0) > 1 else mesh["shard"]
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(model, "logps")


def load_checkpoint(model, checkpoint):
    """Give a policy the weights of a checkpoint, which with LoRA are those of its adapters."""
    if model.lora:
        gemma.load_safetensors(gemma.adapters(model), checkpoint, "adapter_model")
    else:
        gemma.load_safetensors(gemma.base_weights(model), checkpoint, prefix="model.")


@torch.no_grad()
def unsharded(model, bf16=False):
    """A whole model to sample from: gathered once for a rollout, in which no rank waits."""
    with torch.device("meta"):
        whole = Gemma(model.config)
        if model.lora:
            gemma.add_adapters(whole, model.lora)
    dtype = torch.bfloat16 if bf16 else model.embed_tokens.weight.dtype
    parameters = model.named_parameters()
    weights = {name: gemma.whole_tensor(p.detach().to(dtype)) for name, p in parameters}
    require_finite(weights)
    whole.load_state_dict(weights, assign=True)
    return whole


def make_optimizer(model, training):
    """The optimiser with its state in place from the start, so that loading is no special case.

    Its learning rate is that of each step: see `clip_and_step`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = training.weight_decay
    if training.optim == "adamw":
        optimizer = torch.optim.AdamW(parameters, weight_decay=decay, fused=True)
        moments = ("exp_avg", "exp_avg_sq")
    else:
        optimizer = torch.optim.RMSprop(parameters, weight_decay=decay)
        moments = ("square_avg",)
    for parameter in parameters:
        state = optimizer.state[parameter]
        state["step"] = torch.tensor(0.0, device=parameter.device)
        state |= {moment: torch.zeros_like(parameter) for moment in moments}
    return optimizer


def optimizer_tensors(model, optimizer):
    """The optimiser's state by name, e.g. "square_avg.layers.0.mlp.up_proj.weight"."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


# --------------------------------------------------------------------------------------------------
# Runs
# What every task begins with, and what a training run consists of.


@dataclass
class Run:
    """What every task begins with (`begin`), and what training needs beside it (`prepare`)."""

    config: Config
    output: Path
    device: torch.device
    checkpoint: Path | None  # that a resumed run goes on from
    state: dict  # what decides what is learnt: keys, fingerprints of files
    template: Template | None
    helpers: Any  # Helpers
    pairs: list  # of the training turns
    validation: list  # of the validation turns
    policy: Gemma = None
    reference: Gemma = None
    optimizer: torch.optim.Optimizer = None
    order: DataOrder = None
    log: Log = None
    steps: int = 0  # optimiser steps at its end
    saved: int = 0  # and at its newest checkpoint, which a resumed run goes on from


def begin(config, overwrite=False, resume=False):
    """A Run: read the files, decide about the output directory, check. It changes nothing there."""
    ASKED.clear()  # in a notebook: of a run before
    device, checkpoint = start_processes(), None
    print0(machine(device))
    contents = {key: data.read_bytes(path) for key, path in input_files(config).items()}
    state = learnt(config) | fingerprints(config, contents)
    ranks = on_all(lambda: flat(asdict(config)) | state)
    for rank, found in enumerate(ranks):
        require_equal(found, ranks[0], f"rank {rank}", "on rank 0")
    if config.task in WRITES:
        checkpoint = on_main(open_output, config, resume, overwrite)
    if checkpoint:
        on_main(require_same_run, checkpoint, state)
    template = None
    if config.policy_model_config.model_path and config.task != "generate_preference":
        template = make_template(config)  # pairs that are generated are for any model
    helpers = Helpers(config, contents)
    turns = load_pairs(config, helpers, template, contents)
    return Run(config, output_of(config), device, checkpoint, state, template, helpers, *turns)


def machine(device):
    """On what the last bits of a run depend beside its configuration, in a line."""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        cpus = Path("/proc/cpuinfo")  # of Linux; on ARM it does not name a model
        named = re.search(r"model name\s*:\s*(.+)", cpus.read_text() if cpus.exists() else "")
        name = named[1] if named else platform.machine()
        kind = f"{name} ({torch.backends.cpu.get_cpu_capability()})"
    processes = f"processes: {dist.get_world_size()}, threads each: {torch.get_num_threads()}"
    return f"{kind}, {processes}, torch {torch.__version__} (the last bits depend on these)"


def make_template(config):
    """The policy's Template; "auto" is Gemma's chat format where the checkpoint says so."""
    chosen, source = config.data_config.prompt_format, Path(config.policy_model_config.model_path)
    tokenizer = Tokenizer(source / "tokenizer.model")
    model = GemmaConfig.from_json(source / "config.json")
    gemma.check_vocabulary(tokenizer, model)
    chat = gemma.is_chat(tokenizer, model)
    if chosen == "auto":
        chosen = "gemma" if chat else "plain"
        print0(f"{source}: its files speak for prompt_format {chosen!r}")
    for line in gemma.foreign(tokenizer, model):
        if chosen == "gemma":
            raise InputError(f"{line}, expected prompt_format 'plain'")
        print0(line)
    if chosen == "gemma" and not chat and config.policy_model_config.lora_r:
        print0(f"{source} does not talk in this format yet: with LoRA it will hardly learn to stop")
    return Template(tokenizer, chosen)


def prepare(config, overwrite, resume):
    """A Run to train; only now is its output directory changed. None: it is done already."""
    training, run = config.training_config, begin(config, overwrite, resume)
    if not run.pairs:
        expected = "expected complete answers that fit into max_length, not all of them held out "
        expected += "or in the other half"
        raise InputError(f"{config.data_config.train_path}: no turn to train on, {expected}")
    run.steps = training.max_steps
    if run.steps <= 0:
        turns = training.num_train_epochs * len(run.pairs)
        run.steps = math.ceil(turns / run.state["examples_per_step"])
    require_reachable(run)
    if resume:
        run.saved = on_main(resumed_step, run)
        if run.saved is None:
            return print0(f"{run.output}: this run is finished, nothing to resume")
    mesh = make_mesh(run.device, training.dp_replicate_size)
    run.policy = build_model(config, mesh)
    if config.task != "sft" and not run.policy.lora:  # its base is what LoRA starts from
        run.reference = build_model(config, mesh, trained=False)
    run.template.mark_stops(run.policy.config)
    run.optimizer = make_optimizer(run.policy, training)
    if run.checkpoint:
        load_checkpoint(run.policy, run.checkpoint)
        tensors = optimizer_tensors(run.policy, run.optimizer)
        gemma.load_safetensors(tensors, run.checkpoint, stem="optimizer")
    on_main(clear_output, run)
    run.log, run.order = Log(config), DataOrder(run.pairs, training.seed)
    heed_signals()
    return run


def require_reachable(run):
    """What can be checked only when the number of steps and the turns are known."""
    training = run.config.training_config
    if training.warmup_steps >= run.steps:
        problem = f"warmup_steps is {training.warmup_steps}, expected fewer than the run's"
        raise InputError(f"{problem} {run.steps} steps")
    action = training.metric_for_best_model.partition(" Turns:")[0]
    none = action in data.OTHER and all(pair.action != action for pair in run.validation)
    if training.load_best_model_at_end and none:
        problem = f"no validation turn has the action {action}"
        raise InputError(f"metric_for_best_model: {problem}, expected another metric or some")


def input_files(config):
    """{key: path} of the files beside the models that decide what is learnt."""
    files, paths = config.data_config, {}
    if config.task != "evaluate" or not files.validation_path:
        paths["data_config.train_path"] = files.train_path
    paths["data_config.validation_path"] = files.validation_path
    for name, role in ROLES.items():
        helper = getattr(config, name)
        if backend_of(helper) != "rule":
            prompt = helper.prompt_path or located(f"configs/prompts/{role.prompt}")
            paths[f"{name}.prompt_path"] = prompt
    return {key: path for key, path in paths.items() if path}


def learnt(config):
    """What decides what is learnt, but for the files: those are known by their content."""
    training, values = config.training_config, flat(asdict(config))
    state = {key: x for key, x in values.items() if {FREE, INPUT}.isdisjoint(KEYS[key])}
    local = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return {**state, "examples_per_step": local * dist.get_world_size()}


def fingerprints(config, contents):
    """Size and hash of what is learnt from: the files read, all weights and tokenizers."""
    found = {}
    for key, raw in contents.items():
        found[key] = f"{len(raw)} bytes, sha256 {hashlib.sha256(raw).hexdigest()}"
    for key, path in flat(asdict(config)).items():
        if key.endswith("model_path") and path:
            for file in sorted(Path(path).glob("*")):
                if OURS.fullmatch(file.name) and file.is_file():
                    found[f"{key}/{file.name}"] = fingerprint(file)
    return found


def fingerprint(path, block=2**18, blocks=1024):
    """Size and hash of a file; where that is above 256 MB, of 1,024 blocks spread over it."""
    size, sha = os.path.getsize(path), hashlib.sha256()
    with open(path, "rb") as file:
        for start in range(0, size, max(block, size // blocks)):
            file.seek(start)
            sha.update(file.read(block))
    return f"{size} bytes, blocks of sha256 {sha.hexdigest()}"


# --------------------------------------------------------------------------------------------------
# Output directories and checkpoints
# What is written appears when it is complete, staged beside its place under a name that nobody else
# uses. A checkpoint is a model in Hugging Face's layout with the optimiser's tensors beside it.

PART, OLD = ".act-part", ".act-old"  # what is being written, and what is going
STEP = re.compile(r"step-\d{1,15}", re.ASCII)
OURS = re.compile(
    r"((generation_|adapter_|tokenizer_)?config|trainer_state|tokenizer|special_tokens_map)\.json"
    r"|tokenizer\.model|chat_template\.jinja"
    r"|(model|adapter_model|optimizer)[-\w]*\.safetensors(\.index\.json)?"
)  # the files of a model or a checkpoint
PAIR_FILES = {"records": ".jsonl", "vertex": ".vertex.jsonl", "trl": ".trl.jsonl"}  # form -> ending
EVALUATION_FILES = ("eval_metrics.json", "eval_samples.jsonl", "report.html")
TRAINING_FILES = ("checkpoints", "model", "adapter", "metrics.jsonl", "rollouts.jsonl",
                  *EVALUATION_FILES)  # fmt: skip
WRITES = {  # what a task writes into output_dir beside config.json
    "act": TRAINING_FILES,
    "sft": TRAINING_FILES,
    "dpo": TRAINING_FILES,
    "evaluate": EVALUATION_FILES,
    "generate_preference": [f"{name}{ending}" for ending in PAIR_FILES.values()
                            for name in ("train", "validation")],
}  # fmt: skip


def output_of(config):
    return Path(config.training_config.output_dir)


def open_output(config, resume=False, overwrite=False):
    """The one decision about the output directory: the checkpoint to go on from, or None.

    Takes its lock and changes nothing else. Raises InputError where what is there may not go.
    """
    output, names = output_of(config), [*WRITES[config.task], "config.json"]
    written = {Path(os.path.realpath(output / name)) for name in names}
    for key, path in flat(asdict(config)).items():
        if INPUT in KEYS[key] and path:
            at = Path(os.path.realpath(path))
            if not written.isdisjoint((at, at / "config.json", *at.parents)):
                expected = f"expected another output_dir than {output}"
                raise InputError(f"{key} {at}: this run would write over it, {expected}")
    take_lock(output)
    former, present = former_task(output), [n for n in names if os.path.lexists(output / n)]
    trains = WRITES[config.task] is TRAINING_FILES
    if present and not former:
        raise InputError(f"{output}: holds {present[0]} of no run, expected another output_dir")
    if former not in (None, config.task) and not (trains and overwrite):
        raise InputError(f"{output}: holds a run of task {former!r}, expected another output_dir")
    if not trains:
        return None
    require_ours(output)
    if overwrite or not former:
        return None
    if not resume:
        way = "expected --resume to continue it or --overwrite to start again"
        raise InputError(f"{output}: already holds a run, {way}")
    complete = checkpoints(output)
    for folder in set(step_folders(output)) - set(complete.values()):
        print0(f"{folder}: passed over, it has no trainer_state.json")
    return next(reversed(complete.values()), None)


def former_task(output):
    """The task of the run in a directory; None where its config.json is no run's."""
    with suppress(InputError):
        found = read_json(output / "config.json")
        return found.get("task") if isinstance(found.get("training_config"), dict) else None


def require_ours(output):
    """Raises InputError where a directory that may have to go holds what no run writes."""
    for folder in (output / "model", output / "adapter", *step_folders(output)):
        for entry in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
            if entry.is_dir() or not OURS.fullmatch(entry.name):
                expected = "expected another output_dir, or this elsewhere"
                raise InputError(f"{entry}: of no run, {expected}")


def require_same_run(checkpoint, state):
    """Raises InputError where a checkpoint is damaged, or of a run that learns otherwise."""
    path = checkpoint / "trainer_state.json"
    then = read_json(path)
    now = {"step": int(checkpoint.name[5:]), "steps": then.get("steps"), **state}
    now |= {file.name: fingerprint(file) for file in checkpoint.iterdir() if file != path}
    require_equal(now, learnt(Config()) | then, "--resume", f"in {path}")


def require_equal(found, expected, who, where):
    for key in found | expected:
        if found.get(key) != expected.get(key):
            wanted = f"expected {expected.get(key)} as {where}"
            raise InputError(f"{who}: {key} is {found.get(key)}, {wanted}")


def resumed_step(run):
    """How many steps a resumed run has behind it; None where model/ is that of all.

    Raises InputError where it cannot go on.
    """
    model = run.output / "model"
    done = model / "trainer_state.json"
    if done.exists() and read_json(done).get("step") == run.steps:
        return None
    if not run.checkpoint:
        if model.exists():
            problem = "holds a model but no checkpoint, expected --overwrite to start again"
            raise InputError(f"--resume: {run.output} {problem}")
        print0(f"{run.output}: no checkpoint yet, starting from the beginning")
        return 0
    then = read_json(run.checkpoint / "trainer_state.json")
    step, planned = then["step"], then["steps"]
    if step > run.steps:
        problem = f"is beyond the {run.steps} steps of this run"
        raise InputError(f"--resume: {run.checkpoint} {problem}")
    if planned != run.steps:
        jumps = f"the learning rate jumps to that of step {step} of {run.steps}"
        print0(f"--resume: {planned} steps were planned; {jumps}")
    return step


def clear_output(run):
    """Remove what a former run wrote and this one will write again: the first change on disk.

    Checkpoints go first: whenever the process is killed, one that is left has its logs.
    """
    require_lock(run.output)
    if run.checkpoint:  # what was logged after it will be logged again
        logs = [run.output / name for name in TRAINING_FILES if name.endswith(".jsonl")]
        for path in logs:
            deque(rows_until(path, run.saved), 0)  # one that is damaged is refused before a change
        for path in filter(Path.exists, logs):
            data.write_jsonl(path, rows_until(path, run.saved))
    else:
        for name in TRAINING_FILES:
            remove(run.output / name)
    write_json(run.output / "config.json", asdict(run.config))


def rows_until(path, step):
    """Yields the rows of a log up to a step's."""
    for row in logged_rows(path):
        if data.require(row, "step", f"{path}: ", int) <= step:
            yield row


def remove(path):
    """Remove a file, a link or a directory of ours; of checkpoints/ only the checkpoints.

    A directory is renamed first: whenever the process is killed, all of it is there or nothing.
    """
    aside = path.with_name(OLD)
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    elif path.name == "checkpoints":
        for folder in (*step_folders(path.parent), path / PART):
            remove(folder)
    else:
        if aside.exists():  # left where a run was killed
            shutil.rmtree(aside)
        path.rename(aside)
        shutil.rmtree(aside)


LOCK = []  # the file whose lock says that output_dir is this process's, and whether it made that


def take_lock(output):
    """Claim an output directory. Raises InputError where another process has it."""
    new, flags = not output.exists(), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        output.mkdir(parents=True, exist_ok=True)
        LOCK[:] = [os.fdopen(os.open(output / ".lock", flags, 0o666)), new]
    except OSError as error:
        raise InputError(f"{error}, expected a directory that can have a file .lock") from None
    try:
        fcntl.flock(LOCK[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        LOCK.clear()
        problem = "another run is writing to it, expected one at a time"
        raise InputError(f"{output}: {problem}") from None
    except OSError as error:  # a file system without locks
        print0(f"{output}: a second run at once would not be noticed here ({error.strerror})")


def holds_lock(output):
    """Whether the locked file is the one that is there."""
    path = output / ".lock"
    return LOCK and path.exists() and os.path.samestat(os.fstat(LOCK[0].fileno()), path.stat())


def require_lock(output):
    """Raises RunStopped where another run may write to an output directory."""
    if not holds_lock(output):
        raise RunStopped(f"{output}: its .lock is not this run's any more, another may write there")


def release_lock(output):
    """Let go of an output directory, which goes too if this run made it and wrote nothing."""
    if LOCK[1:] == [True] and holds_lock(output) and os.listdir(output) == [".lock"]:
        (output / ".lock").unlink()
        output.rmdir()
    LOCK.clear()


def save_trained(run):
    """What a run was for: model/, and with LoRA also adapter/, which is merged into that model."""
    output = run.output
    if run.config.training_config.load_best_model_at_end:
        saved = on_main(checkpoints, output)  # that of the last step among them
        best = next((step for step in run.log.best_first() if step in saved), run.steps)
        if best != run.steps:
            said = f"model/ is that of step {best}, figures and report are of the last"
            print0(f"load_best_model_at_end: {said}")
            load_checkpoint(run.policy, saved[best])
    if run.policy.lora:
        save(run, output / "adapter", run.steps)
        gemma.merge_adapters(run.policy)
    save(run, output / "model", run.steps)
    heed_signals(False)


def save(run, directory, step, optimizer=False):
    """The model, or its adapters, with the tokenizer; of a checkpoint also the optimiser.

    The directory appears when it is complete. Every rank calls this. RunStopped where a parameter
    is no number.
    """
    model, part = run.policy, directory.with_name(PART)
    parts = {name: gemma.local_slice(p)[0] for name, p in model.named_parameters()}
    on_all(require_finite, parts)
    on_main(clear_part, run, part)
    if model.lora:
        on_all(gemma.save_adapters, model, part, run.config.policy_model_config.model_path)
    else:
        on_all(model.save_pretrained, part)
    if optimizer:
        tensors = optimizer_tensors(model, run.optimizer)
        on_all(gemma.save_safetensors, tensors, part if is_main() else None, "optimizer")
    on_main(take_place, run, part, directory, step)


def clear_part(run, part):
    require_lock(run.output)
    remove(part)
    part.mkdir(parents=True)


def take_place(run, part, directory, step):
    """What names the files of a checkpoint is written last; then it takes its place."""
    save_tokenizer(run.template, part)
    files = {path.name: fingerprint(path) for path in sorted(part.iterdir())}
    state = {"step": step, "steps": run.steps, **run.state, **files}
    write_json(part / "trainer_state.json", state)
    remove(directory)
    part.rename(directory)


def save_tokenizer(template, directory):
    """What transformers and vLLM look for beside tokenizer.model, with the format trained in."""
    tokenizer, chat = template.tokenizer, "chat_template.jinja"
    kept = [] if template.plain else [chat]
    for name in ("tokenizer.model", "tokenizer.json", "special_tokens_map.json", *kept):
        if tokenizer.path.with_name(name).is_file():
            shutil.copyfile(tokenizer.path.with_name(name), directory / name)
    settings = dict(tokenizer.config)
    if not settings:
        turns = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
        ids = {
            "bos_token": tokenizer.bos_id,
            "eos_token": tokenizer.eos_id,
            "pad_token": tokenizer.pad_id,
        }
        piece = tokenizer.sp.id_to_piece
        # transformers 5 then follows tokenizer.model; its GemmaTokenizer takes a unigram for a BPE
        settings = {"tokenizer_class": "TokenizersBackend", "add_bos_token": True}
        settings |= {name: piece(i) for name, i in ids.items() if i is not None}
        settings["extra_special_tokens"] = [piece(i) for i in turns if i is not None]
    if template.plain:
        settings.pop("chat_template", None)
    write_json(directory / "tokenizer_config.json", settings)
    if "chat_template" not in settings and not (directory / chat).exists():
        ours = "chat_template_plain.jinja" if template.plain else chat
        shutil.copyfile(HERE / "configs" / ours, directory / chat)


def save_checkpoint(run, step):
    """All random draws are keyed by seed and step: parameters, optimiser and step are the state."""
    if step != run.saved:
        save(run, run.output / "checkpoints" / f"step-{step}", step, optimizer=True)
        run.saved = step
        on_main(prune, run)


def prune(run):
    """Keep the last `save_total_limit` checkpoints, and the best of those that were evaluated."""
    saved, limit = checkpoints(run.output), run.config.training_config.save_total_limit
    best = [step for step in run.log.best_first() if step in saved][:1]
    for step in saved.keys() - (list(saved)[-limit:] + best):
        remove(saved[step])


def step_folders(output):
    """All checkpoints/step-N, complete or not. Raises OSError for what cannot be read."""
    folder = output / "checkpoints"
    entries = folder.iterdir() if os.path.lexists(folder) else ()
    return [path for path in entries if STEP.fullmatch(path.name)]


def checkpoints(output):
    """{step: directory} of complete checkpoints, oldest first: those with what is written last."""
    complete = [path for path in step_folders(output) if (path / "trainer_state.json").exists()]
    return dict(sorted((int(path.name[5:]), path) for path in complete))


def stopped(run, done, error):
    """The error of a run that stops after `done` steps, which are saved where they are sound."""
    said = str(error)
    if isinstance(error, NotANumber):
        size = run.state["examples_per_step"]
        turns = (run.pairs[run.order[i]].where for i in range(done * size, (done + 1) * size))
        said += f" in step {done + 1}, on {', '.join(dict.fromkeys(turns))}"
    try:
        save_checkpoint(run, done)
    except (RunStopped, InputError, OSError) as unsound:
        said += f"; step {done} is not saved, since {unsound}"
    run.log.write(write_report, run.output)
    return RunStopped(f"{said}, --resume goes on from step {run.saved}")


# --------------------------------------------------------------------------------------------------
# Helper models
# Who answers for ACT's roles: a rule (data.py), a local Gemma, or a model behind a server. What a
# model is told stands in configs/prompts/, or in the file that `prompt_path` names. A back end is a
# function ask(prompts) -> answers, each a text or the CallFailed that says why there is none; a new
# one goes into `Helpers`.


def indented(messages):
    """Messages for a prompt; later lines are indented, so that none looks like a new message."""
    return "".join(f"{data.SPEAKERS[role]}: {in_prompt(text)}\n" for role, text in messages)


def in_prompt(text):
    """A text for a helper's prompt, of a longer one the end."""
    return text[-20_000:].replace("\n", "\n  ")


def action_fields(reply):
    return {"response": in_prompt(reply.strip())}


def intent_fields(pair):
    """Without the final answer: what is not known, the simulated user cannot give away."""
    return {"conversation": indented(pair.history + pair.gold[:-1])}


def user_fields(request):
    pair, trajectory, intent = request
    return {"intent": in_prompt(intent), "conversation": indented(pair.history + trajectory)}


def question_fields(request):
    pair, examples = request
    shown = [f"{asking(each)} {in_prompt(each.chosen[0][1])}\n\n" for each in examples]
    return {"examples": "".join([*shown, asking(pair)])}


def asking(pair):
    """A conversation up to where the assistant asks."""
    prompt = f"{pair.instruction}\n[context]\n{pair.context}\n[conversation]\n"
    return f"{prompt}{indented(pair.history)}Assistant (asks a clarifying question):"


def judge_fields(request):
    pair, answer = request
    fields = {"gold": in_prompt(pair.target), "answer": in_prompt(answer)}
    return {"conversation": indented(pair.history + pair.gold[:-1]), **fields}


def affirmed(answer, words):
    """Those of the words that an answer says and does not deny, as it spells them."""
    denied = r"(?:\bnot|n['’]t)[\s*_]+(?:an? |to )?"
    found = re.findall(rf"(?i)({denied})?(?<![a-z])({words})", answer)
    return [word for no, word in found if not no]


def parse_verdict(answer):
    """(exact, score), 1.0 for RIGHT, 0.0 for WRONG; None for neither, both or "not right" alone."""
    said = affirmed(re.split(r"\n[ \t]*Conversation:", answer)[0], r"(?:right|wrong)(?![a-z])")
    said = list(filter(str.isupper, said)) or said  # "WRONG, the right answer is 5"
    rights = {float(word.upper() == "RIGHT") for word in said}
    return (*rights, *rights) if len(rights) == 1 else None


def parse_action(answer):
    """The first of the two words that is not denied, in capitals if there is one."""
    label = r"(?i)\A[\s*]*answer[\s*]*:(?=\W*(?:clarify|answer)\b)"  # else it is the answer itself
    found = affirmed(re.sub(label, "", answer), "clarify|answer")
    return max(found, key=str.isupper, default="").upper() or None


def parse_intent(answer):
    """The first paragraph, up to what looks like a next example."""
    end = r"\n[ \t]*(?:Intent|Conversation|User|Assistant):|\n\s*\n"
    return data.fold(re.split(end, unlabelled(answer, "Intent"))[0]) or None


def parse_user(answer):
    """The first line, up to what the model writes for the assistant."""
    return re.split(r"\n|Assistant:", unlabelled(answer, "User"))[0].strip() or None


def parse_question(answer):
    """The first line that is a question, before anybody else speaks; None without one."""
    lines = re.split(r"\n[ \t]*User:", answer)[0].split("\n")
    lines = (unlabelled(line, "Assistant") for line in lines)
    return next(filter(data.is_question, lines), None)


LABELS = r"(?:(?:final|next|clarifying) )*(?:answer|reply|response|message|question)"


def unlabelled(answer, name):
    """Without a "User: ", "**Assistant:** ", "Assistant (asks): " or "Reply: " in front."""
    label = rf"(?i)\A[\s*]*(?:{name}(?:['’]s {LABELS})?|{LABELS})(?: \([^)\n]*\))?[\s*]*:[\s*]*"
    return undressed(re.sub(label, "", answer.strip()))


class Role(NamedTuple):
    """What a helper is told, and how it is read; a request is what its rule takes a list of."""

    rule: Any  # [request] -> [result], without a model
    names: tuple  # what its prompt must have in {}
    fields: Any  # request -> {name: text} for them
    parse: Any  # a model's answer -> result, or None where it cannot be used
    stop: str  # where an answer may be cut short
    prompt: str  # the file of its prompt in configs/prompts/


ROLES = {
    "action_model_config": Role(
        data.rule_actions, ("response",), action_fields, parse_action,
        "\nMessage:", "action.txt",
    ),
    "user_simulator_config": Role(
        data.rule_users, ("intent", "conversation"), user_fields, parse_user,
        "\nAssistant:", "user.txt",
    ),
    "intent_model_config": Role(
        data.rule_intents, ("conversation",), intent_fields, parse_intent,
        "\nConversation:", "intent.txt",
    ),
    "preference_model_config": Role(
        data.rule_questions, ("examples",), question_fields, parse_question,
        "\nUser:", "question.txt",
    ),
    "judge_model_config": Role(  # no rule: a heuristic is one
        None, ("conversation", "gold", "answer"), judge_fields, parse_verdict,
        "\nConversation:", "judge.txt",
    ),
}  # fmt: skip

THOUGHTS = (
    "think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad|inner_monologue"
    "|internal_monologue|seed:think|details"
)
OPENING = re.compile(  # where models of several makers begin to think aloud
    rf"(?i)<\|?\s?(?:{THOUGHTS}|(?:begin|start)_of_thought|start_thinking|inner_prefix)"
    r"(?:\s[^<>\n]{0,40})?\|?>|\[think\]|◁think▷|<\|channel\|?>(?:analysis|thought)"
    r"|\A\W{0,4}(?:here is my thought process|reasoning|thoughts?|thinking(?: process)?)\W{0,2}:"
)
CLOSING = re.compile(  # and where they have come to the answer
    rf"(?i)<\|?/\s?(?:{THOUGHTS})\s?\|?>|<\|(?:end_of_thought|end_thinking|inner_suffix)\|>"
    r"|\[/think\]|◁/think▷|<\|channel\|>final<\|message\|>|<channel\|>"
    r"|(?<!\w )(?<!`)<(?:answer|response|output)>"
    r"|(?:\n|\A)[*#> ]{0,4}(?:here is my response|final answer)\W{0,2}:[*_ ]*"
    r"|\A\W{0,4}(?:reasoning|thoughts?|thinking(?: process)?)\W{0,2}:(?s:.*)"
    r"\n[*#> ]{0,4}(?:answer|response|action|verdict|reply|question|intent)\W{0,2}:[*_ ]*"
)
MARKS = re.compile(  # what a model's template puts around its answer
    r"(?i)(?:<\|(?:im_start|start_header_id)\|>assistant|<start_of_turn>model)\b"
    r"|<\|[^|<>\n]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?s>|<[be]os>|<(?:start|end)_of_turn>|\[/INST\]"
    r"|</(?:answer|response|output)>"
)
ANNOUNCED = re.compile(  # a heading, "Sure, here it is:" as a first line, "Here is the reply: "
    r"(?i)\A#{1,6} [^\n]{1,60}\n"
    r"|\A[*_#]{0,3}(?:(?:here|sure|ok|okay|certainly|of course|the|this|based|below|summary)\b"
    r"[^\n]{0,100}:[*_ \t]*(?:\n|\Z)"
    r"|here(?:['’]s| is)\b[^\n:]{0,60}\b(?:message|question|reply|response|answer|summary|intent)"
    r"\b[^\n:]{0,20}:)"
)
WRAPPED = re.compile(  # in a code fence, quotes of any kind, bold, \boxed{} or {"key": ""}
    r"(?s)```[^\n]*\n(.*)```|(\*\*|[*\"'`”])((?:(?!\2).)*)\2"
    r"|(?:[“„«‘「]|\\boxed\{)([^“”»’」}]*)[“”»’」}]|\{\s*\"\w+\":\s*\"([^\"]*)\"\s*\}"
)


def without_reasoning(text):
    """What stands after the last thought; None where one was cut off."""
    answer = CLOSING.split(text)[-1]
    return None if OPENING.search(answer) else answer


def undressed(text):
    """An answer without an announcement, a code fence, quotes around it or a template's marks."""
    text = next(filter(str.strip, MARKS.split(text)), "").strip()
    text = ANNOUNCED.sub("", text).strip()
    for _ in range(4):  # one in another
        wrapped = WRAPPED.fullmatch(text)
        text = wrapped[wrapped.lastindex].strip() if wrapped else text
    return text


@dataclass
class Helper:
    """A role that a model has: requests in, results out, None where it gave nothing of use."""

    name: str
    config: HelperConfig
    prompt: str
    ask: Any = None  # the back end: prompts in, answers out
    failed: list = field(default_factory=list)  # of each request, whether it brought nothing of use
    in_a_row: int = 0  # different prompts that brought nothing of use
    why: str = ""  # of the last that did

    def __call__(self, requests):
        """Raises RunStopped when max_failures in a row brought nothing. Asks the same only once."""
        prompts = [self.filled(request) for request in requests]
        new = list(dict.fromkeys(prompts))
        answers = dict(zip(new, self.ask(new), strict=True))
        results = {prompt: self.understood(answer) for prompt, answer in answers.items()}
        self.failed += [results[prompt] is None for prompt in prompts]
        for prompt, answer in answers.items():
            self.in_a_row = self.in_a_row + 1 if results[prompt] is None else 0
            if isinstance(answer, CallFailed):
                self.why = str(answer)
            elif results[prompt] is None:
                self.why = f"{answer[:80]!r} (max_new_tokens {self.config.max_new_tokens})"
            if self.in_a_row == self.config.max_failures:
                said = f"{self.in_a_row} failures in a row, at last {self.why}"
                raise RunStopped(f"{self.name}: {said}")
        return [results[prompt] for prompt in prompts]

    def filled(self, request):
        texts = ROLES[self.name].fields(request)  # in one pass: a text may hold {}
        return re.sub(r"\{(\w+)\}", lambda name: texts.get(name[1], name[0]), self.prompt)

    def understood(self, answer):
        """The result that an answer means, of at most 16 characters a token; or None."""
        if isinstance(answer, CallFailed):
            return None
        answer = without_reasoning(answer[: 16 * self.config.max_new_tokens])
        return None if answer is None else ROLES[self.name].parse(undressed(answer))


class Helpers:
    """ACT's helpers as the configuration has them: functions from lists of requests to results."""

    def __init__(self, config, contents):
        """contents: {"role.prompt_path": the bytes of that file}. Raises InputError."""
        load = cache(partial(load_helper, config))  # a checkpoint that several share, once
        clients = {}  # (url, model) -> one of those that ask it
        self.roles = {name: role.rule for name, role in ROLES.items()}
        user = partial(data.rule_users, nothing=config.data_config.nothing_to_add)
        self.roles["user_simulator_config"] = user
        self.models = []  # the Helpers among them
        by_rule = backend_of(config.user_simulator_config) == "rule"  # who needs no intent
        for name, role in ROLES.items():
            helper = getattr(config, name)
            backend = backend_of(helper)
            if backend == "rule" or (by_rule and name == "intent_model_config"):
                continue
            needed = "model_path" if backend == "gemma" else "model_id"
            if not getattr(helper, needed):
                raise InputError(f"{name}.{needed} is missing, backend '{backend}' needs it")
            raw = contents[f"{name}.prompt_path"]
            model = Helper(name, helper, read_prompt(raw, helper.prompt_path or role.prompt, role))
            if backend == "gemma":
                model.ask = gemma_backend(*load(helper.model_path), helper)
            else:
                model.ask = Client(helper, DIALECTS[backend], role.stop, model.understood)
                clients[model.ask.url, helper.model_id] = model.ask
            self.roles[name] = model
            self.models.append(model)
        for client in clients.values():
            on_main(client.try_once)

    def answers(self, pairs, heuristic):
        """What `in_lockstep` may ask for besides the policy's responses, about these pairs."""
        intents = {}  # each user's, summarised once, when first asked

        def classify(rows, texts):
            return self.roles["action_model_config"](texts)

        def simulate(rows, trajectories):
            new = [row for row in rows if row not in intents]
            found = self.roles["intent_model_config"]([pairs[row] for row in new])
            intents.update(zip(new, found, strict=True))
            said = dict(zip(rows, trajectories, strict=True))
            known = [row for row in rows if intents[row] is not None]
            requests = [(pairs[row], said[row], intents[row]) for row in known]
            replies = dict(zip(known, self.roles["user_simulator_config"](requests), strict=True))
            return [replies.get(row) for row in rows]

        def judge(rows, trajectories):
            ends = [(pairs[row], said[-1][1]) for row, said in zip(rows, trajectories, strict=True)]
            if heuristic == "judge":
                return self.roles["judge_model_config"](ends)
            return [score(HEURISTICS[heuristic], pair, said, pair.target) for pair, said in ends]

        return {"classify": classify, "simulate": simulate, "score": judge}

    def report(self, consequence):
        """How many requests each model had so far, and how many brought nothing."""
        for helper in self.models:
            asked, failed = all_sum([len(helper.failed), sum(helper.failed)])
            if asked:
                said = f"{failed:.0f} of {asked:.0f} requests brought nothing of use"
                why = f"; the last one: {helper.why}; {consequence}" if failed else ""
                print0(f"{helper.name}: {said}{why}")


def backend_of(helper):
    return helper.backend or ("gemini" if helper.model_id else "rule")


def read_prompt(raw, path, role):
    """What a model is told in a role, with {names} in it. Raises InputError."""
    try:
        prompt = raw.decode("utf-8").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8, expected the text of a prompt") from None
    for name in role.names:
        if f"{{{name}}}" not in prompt:
            raise InputError(f"{path}: lacks {{{name}}}, expected a prompt with {role.names}")
    return prompt


def load_helper(config, path):
    """(model, tokenizer) of a checkpoint, whole on this rank's device, as the policy computes."""
    policy, training = config.policy_model_config, config.training_config
    directory = Path(policy.model_path if path == "reference" else path)
    dtype = torch.bfloat16 if training.bf16 else getattr(torch, policy.dtype)
    tokenizer = Tokenizer(directory / "tokenizer.model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Gemma.from_pretrained(directory, dtype, device)
    gemma.check_vocabulary(tokenizer, model.config)
    return model.requires_grad_(False), tokenizer


def gemma_backend(model, tokenizer, config):
    """ask(prompts) with a local checkpoint: in Gemma's chat template if its vocabulary has turns.

    An answer depends on its prompt alone, not on the batch: its noise is keyed by the prompt.
    """
    template = Template(tokenizer, "plain" if tokenizer.end_of_turn_id is None else "gemma")
    longest = max(2, model.config.max_position_embeddings - config.max_new_tokens)

    def tokens_of(prompt):
        if template.plain:
            return [tokenizer.bos_id, *tokenizer.encode(prompt)[1 - longest :]]
        return template.prompt("", [("user", prompt)], longest)

    def noise(prompt):
        seed = int(hashlib.sha256(prompt.encode()).hexdigest()[:14], 16)
        return torch.Generator().manual_seed(seed)

    def ask(prompts):
        answers = []
        for start in range(0, len(prompts), config.batch_size):
            stop_if_asked()
            batch = prompts[start : start + config.batch_size]
            found = generate(
                model, list(map(tokens_of, batch)), config.max_new_tokens, config.temperature,
                stop_ids=template.stop_ids, generator=list(map(noise, batch)),
            )  # fmt: skip
            answers += map(tokenizer.decode, found)
        return answers

    return ask


FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a call is tried again: at most
FIRST_TIMEOUT = 10.0  # seconds of the call that only asks whether the server is there
LONGEST_REPLY = 4_000_000  # bytes
UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
ADDRESS = r"(?ia)https?://([\w.-]+|\[[\da-f:.]+\])(:[1-9]\d{0,4})?(/[^?#@\s]*)?"
THIS_MACHINE = r"(?i)https?://(localhost|127\.|\[::1\])"  # no proxy leads there
RENAMED = {"max_tokens": "max_completion_tokens", "temperature": None, "stop": None}  # None: gone
TOO_LONG = "(?i)context|too l(?:ong|arge)"  # of one prompt, whatever else is named


class CallFailed(Exception):
    """One call brought no answer. code: the HTTP status that says why, 0 where nobody was reached.

    again: whether the same call may do later, after `wait` seconds; final: whether all would fail.
    """

    def __init__(self, why, code=500, wait=0.0):
        words = " ".join(str(why).split())
        super().__init__(repr(words)[1:-1][:300])  # what a server says, and no terminal obeys
        self.code, self.wait = code, wait
        self.again = code in (0, 408, 429) or code >= 500
        self.final = not self.again and code not in (400, 413, 422)


class Client:
    """ask(prompts) over HTTP: calls run side by side, are tried again and are paid for only once.

    CallFailed stands for an answer that was blocked, empty, or not to be had in max_retries + 1
    calls. Raises RunStopped where the server refuses all calls.
    understood: answer -> None where it is not worth keeping.
    """

    def __init__(self, config, dialect, stop, understood):
        self.config = config
        self.understood = understood
        base = config.base_url or dialect.home
        if not re.fullmatch(ADDRESS, base):
            expected = "expected http(s)://HOST, with none of '?', '#' and '@'"
            raise InputError(f"base_url of a helper model: {expected}")
        self.key = os.environ.get(dialect.key_name, "").strip()
        optional = config.base_url and config.backend == "openai"
        if not re.fullmatch("[!-~]*" if optional else "[!-~]+", self.key):
            problem = "is not set, or has a blank or a character beyond ASCII"
            expected = f"expected the key for helper model {config.model_id!r} at {base}"
            raise InputError(f"{dialect.key_name} {problem}, {expected}")
        self.url = base.rstrip("/") + dialect.path.format(quote(config.model_id))
        self.headers = {"Content-Type": "application/json"}
        if self.key:
            self.headers[dialect.header] = dialect.scheme + self.key
        self.body = partial(dialect.body, config, stop)
        self.text = dialect.text
        proxies = {} if re.match(THIS_MACHINE, base) else None  # None: those of the environment
        self.opener = urllib.request.build_opener(Replies, urllib.request.ProxyHandler(proxies))
        self.cached = cached_answers(config.cache_path)
        self.refused = refused_by(self.url, config.model_id)
        self.spent = threading.Event()  # set: nothing is tried again

    def __call__(self, prompts):
        self.spent.clear()
        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            calls = [pool.submit(self.answer, prompt) for prompt in prompts]
            while wait(calls, 0.5).not_done:
                stop_if_asked()
            return [call.result() for call in calls]
        finally:
            self.spent.set()  # calls that still run, after a RunStopped, shall not try again
            pool.shutdown(wait=False, cancel_futures=True)

    def try_once(self):
        """Raises InputError where the server is not there or refuses us; a slow one may wake up."""
        print0(f"helper model {self.config.model_id}: conversations go to {self.url}")
        try:
            self.call(self.body("Say yes."), FIRST_TIMEOUT)
        except CallFailed as failure:
            if failure.final or failure.code in (0, 400):
                raise InputError(f"{self.url}: {failure}") from None
            print0(f"{self.url}: no answer yet, going on ({failure})")

    def answer(self, prompt):
        """The answer to one prompt, kept as soon as it is there; in its own thread."""
        config, body = self.config, self.body(prompt)
        request = json.dumps([self.url, body], sort_keys=True)
        key = hashlib.sha256(request.encode()).hexdigest()
        if key in self.cached:
            return self.cached[key]
        failed = CallFailed("not called")
        for attempt in range(config.max_retries + 1):
            if self.spent.wait(min(failed.wait, LONGEST_WAIT)):
                break
            try:
                text = self.call(body, config.timeout)
                if config.cache_path and self.understood(text) is not None:
                    data.append_jsonl(config.cache_path, [[key, text]])
                    self.cached[key] = text
                return text
            except InputError as error:  # a full disk: the run saves
                raise RunStopped(str(error)) from None
            except CallFailed as error:
                failed = error
                if failed.final:
                    self.spent.set()
                    raise RunStopped(f"{config.model_id}: {failed}") from None
                if not failed.again:
                    break
                quota = failed.code == 429 and not failed.wait  # mostly of a minute
                failed.wait += random.uniform(0, FIRST_WAIT * 2**attempt * (4 if quota else 1))
        return failed

    def call(self, body, timeout):
        """One POST: the text that it brings. Raises CallFailed."""
        for name in self.refused & body.keys():
            value = body.pop(name)
            if RENAMED[name]:
                body[RENAMED[name]] = value
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
        deadline = time.monotonic() + timeout
        try:
            with self.opener.open(request, timeout=timeout) as response:
                raw = read_reply(response, deadline)
        except urllib.error.URLError as error:  # the request was not even sent
            raise CallFailed(error.reason, 0) from None
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: odd headers
            raise CallFailed(type(error).__name__) from None
        if len(self.key) > 15:  # which a server may echo; a shorter one stands for none
            raw = raw.replace(self.key.encode(), b"[key]")
        if raw.lstrip().startswith((b"data:", b"event:")):
            raise CallFailed("its reply is streamed, expected one JSON object", 422)
        reply = report = None
        with suppress(*UNREADABLE):
            reply = json.loads(raw)
            report = reply.get("error") or reply["choices"][0].get("error")
        if response.status // 100 != 2:
            report = report or reply or http.client.responses.get(response.status)
        if report:
            failure = failure_of(report, response)
            named = RENAMED.keys() & body.keys() & set(re.findall(r"\w+", str(report)))
            refused = response.status in (400, 422) and named
            if not refused or re.search(TOO_LONG, str(failure)):
                raise failure
            if named - self.refused:
                print0(f"{self.url}: going on without {', '.join(named)} ({failure})")
            self.refused |= named
            return self.call(body, timeout)
        try:
            text = self.text(reply).encode("utf-8", "replace").decode()  # half a character: "?"
        except LookupError:
            text = ""
        except UNREADABLE:
            raise CallFailed("its reply is not the JSON of an answer", 0) from None
        if not text.strip():
            limit = f"max_new_tokens {self.config.max_new_tokens}"
            raise CallFailed(f"no text ({limit}) in {reply}", 422)
        return text


def failure_of(report, response):
    """CallFailed for what a server calls an error."""
    fields = report if isinstance(report, dict) else {}
    code = response.status if response.status != 200 else fields.get("code")
    if "insufficient_quota" in str(report):
        code = 402
    words = f"HTTP {response.status}: {fields.get('message') or report}"
    delay = re.search(r"'retryDelay': '([\d.]+)s'", str(report))  # where Gemini says it
    wait = retry_after(response.headers.get("Retry-After") or (delay[1] if delay else ""))
    return CallFailed(words, code if isinstance(code, int) else 500, wait)


def retry_after(text):
    """Seconds of a Retry-After header: a number, or a date."""
    with suppress(ValueError, TypeError, OverflowError):
        if re.fullmatch(r"[\d.]+", text, re.ASCII):
            return float(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def read_reply(response, deadline):
    """The bytes of a reply, a bounded number of them in a bounded time. Raises CallFailed."""
    body = b""
    while chunk := response.read1(65536):
        body += chunk
        if len(body) > LONGEST_REPLY or time.monotonic() > deadline:
            raise CallFailed("its reply is too long, or too long on its way")
    return body


class Replies(urllib.request.HTTPErrorProcessor):
    """Passes every reply on, errors and redirects too: urllib would send the key on to wherever one
    points. What only announces a reply is passed over."""

    def http_response(self, request, reply):
        for _ in range(10):
            if reply.status in (102, 103):
                reply.headers = None
                reply.begin()
        return reply

    https_response = http_response


class Dialect(NamedTuple):
    """How a kind of server is spoken to."""

    home: str  # where it is, if no base_url says otherwise
    path: str  # of a model there
    key_name: str  # of the environment's variable with the key
    header: str  # that the key is sent in
    scheme: str  # before the key
    body: Any  # (HelperConfig, where to stop, prompt) -> what is sent
    text: Any  # what comes back -> its text, "" or a LookupError where it has none


def gemini_body(config, stop, prompt):
    harms = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")
    return {
        "contents": [{"role": "user", "parts": [{"text": prompt}]}],
        "generationConfig": {
            "temperature": config.temperature, "topP": 1.0,
            "topK": 40 if config.temperature else 1,
            "maxOutputTokens": config.max_new_tokens, "stopSequences": [stop],
        },
        "safetySettings": [
            {"category": f"HARM_CATEGORY_{harm}", "threshold": "BLOCK_NONE"} for harm in harms
        ],
    }  # fmt: skip


def gemini_text(reply):
    candidate = reply["candidates"][0]
    if candidate.get("finishReason", "STOP") not in ("STOP", "MAX_TOKENS"):
        return ""
    parts = candidate["content"]["parts"]
    return "".join(part.get("text", "") for part in parts if not part.get("thought"))


def openai_body(config, stop, prompt):
    messages = [{"role": "user", "content": prompt}]
    return {
        "model": config.model_id, "messages": messages, "temperature": config.temperature,
        "max_tokens": config.max_new_tokens, "stop": [stop],
    }  # fmt: skip


def openai_text(reply):
    choice = reply["choices"][0]
    if choice.get("finish_reason") in ("content_filter", "tool_calls"):
        return ""
    content = choice["message"]["content"] or ""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    return content


DIALECTS = {
    "gemini": Dialect(  # Google's generateContent
        "https://generativelanguage.googleapis.com", "/v1beta/models/{}:generateContent",
        "GOOGLE_API_KEY", "x-goog-api-key", "", gemini_body, gemini_text,
    ),
    "openai": Dialect(  # chat completions, which vLLM, Ollama and others speak too, without a key
        "https://api.openai.com/v1", "/chat/completions",
        "OPENAI_API_KEY", "Authorization", "Bearer ", openai_body, openai_text,
    ),
}  # fmt: skip


@cache  # one for each file, whichever roles share it
def cached_answers(path):
    """{key: answer} of a file of JSON lines [key, answer], to which any number of runs may add."""
    raw = data.read_bytes(path) if path and os.path.exists(path) else b""
    answers = {}
    if raw and not re.match(rb'\["([0-9a-f]{64}|[0-9a-f]*\Z)', raw):
        raise InputError(f"{path}: not a cache of helper models' answers")
    for line in raw.splitlines():
        with suppress(*UNREADABLE):  # half a line, which a killed run has left
            key, answer = json.loads(line)
            answers[key] = answer + ""
    return answers


@cache
def refused_by(url, model_id):
    """What is learnt about a server and a model: the set of parameters that they do not take."""
    return set()


# --------------------------------------------------------------------------------------------------
# Other tasks and the command line
# What `act.py` does besides training, and how it is told what to do.


def does(*tasks):
    """Marks a function of a Config as what does these tasks. However it ends, signals, the output
    directory and a process group of one are as before.
    """

    def marked(function):
        @wraps(function)
        def call(config, *flags, **more):
            if config.task not in tasks:
                expected = f"expected one of {', '.join(tasks)} for {function.__name__}()"
                raise InputError(f"task is {config.task!r}, {expected}")
            try:
                return function(config, *flags, **more)
            finally:
                heed_signals(False)
                with suppress(OSError):
                    release_lock(output_of(config))
                if dist.is_initialized() and dist.get_world_size() == 1:  # of more, one could wait
                    dist.destroy_process_group()

        return call

    return marked


train = does("act", "sft", "dpo")(train)


@does("evaluate")
def evaluate(config, overwrite=False):
    """Task evaluate: the metrics of a model on the validation turns. Returns them."""
    begun = begin(config, overwrite)
    if not begun.validation:
        path = config.data_config.validation_path or config.data_config.train_path
        raise InputError(f"{path}: holds no turn with a complete answer to evaluate")
    mesh = make_mesh(begun.device, config.training_config.dp_replicate_size)
    begun.policy = build_model(config, mesh, trained=False)
    metrics, samples = evaluate_pairs(begun)
    on_main(put, config, write_evaluation, metrics, samples)
    print0(*table(metrics, config.data_config.heuristic, metrics))
    begun.helpers.report("these turns are left out of the means")
    return metrics


def put(config, write, *results):
    """Let write(folder, ...) put a task's results beside those of a former run, then swap them.

    The configuration comes first: without it the rest is nobody's.
    """
    output = output_of(config)
    part = output / PART
    require_lock(output)
    remove(part)
    part.mkdir()
    try:
        write_json(part / "config.json", asdict(config))
        write(part, *results)
        for name in ("config.json", *WRITES[config.task]):
            if (part / name).exists():
                (part / name).replace(output / name)
            else:
                remove(output / name)
    finally:
        remove(part)


@does("generate_preference")
def generate_preference(config, overwrite=False):
    """Task generate_preference: files of the pairs of Algorithm 1, in output_dir."""
    begun = begin(config, overwrite)
    found = {"train": begun.pairs, "validation": begun.validation}
    if not any(found.values()):
        raise InputError(f"{config.data_config.train_path}: holds no turn with a complete answer")
    files = {
        f"{name}{ending}": (form, pairs)
        for name, pairs in found.items() if pairs
        for form, ending in PAIR_FILES.items()
    }  # fmt: skip
    on_main(put, config, write_pairs, files)
    for name, (form, pairs) in files.items():
        print0(f"{output_of(config) / name}: {len(pairs)} pairs, form {form!r}")


def write_pairs(folder, files):
    """Files of pairs, {name: (form, pairs)}."""
    for name, (form, pairs) in files.items():
        data.write_preferences(folder / name, pairs, form)


@does("check")
def check(config):
    """Task check: what is wrong with a run's data, and what becomes of it."""
    begun = begin(config)
    for name, pairs in (("training", begun.pairs), ("validation", begun.validation)):
        asks = [pair.at for pair in pairs if pair.action == CLARIFY]
        places = f", which are {data.listed(asks)} (line.turn)" if asks else ""
        answers = f"{len(pairs) - len(asks)} {ANSWER} and"
        print0(f"{name}: {len(pairs)} turns, {answers} {len(asks)} {CLARIFY}{places}")


TASKS = {"evaluate": evaluate, "generate_preference": generate_preference, "check": check}
USAGE = "expected --config FILE [--task NAME] [--KEY VALUE ...] [--resume | --overwrite]"


def parse_arguments(arguments):
    """(config path, overrides, flags) of a command line as USAGE has it. Raises InputError."""
    overrides, flags, words = {}, set(), iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("--resume", "--overwrite"):
            flags.add(name)
            continue
        overrides[name] = value if equals else next(words, "--")  # "--": there is none
        if not word.startswith("--") or overrides[name].startswith("--"):
            raise InputError(f"{word!r} without a value: {USAGE}")
    if "config" not in overrides or len(flags) == 2:
        raise InputError(USAGE)
    return overrides.pop("config"), overrides, flags


def help_text():
    """The head of this file, and every key as its dataclass has it."""
    kinds = Config, *dict.fromkeys(SECTIONS.values())
    return __doc__.partition("Reading order")[0] + "\n".join(map(inspect.getsource, kinds))


def main(arguments=None):
    """Run what the command line says; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        say(help_text())
        return 0
    try:
        path, overrides, flags = parse_arguments(arguments)
        config = load_config(path, overrides)
        for flag in flags:
            if config.task == "check" or (flag == "resume" and config.task in TASKS):
                raise InputError(f"--{flag}: task '{config.task}' has nothing to {flag}")
        TASKS.get(config.task, train)(config, **dict.fromkeys(flags, True))
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except (InputError, OSError, SafetensorError, torch.OutOfMemoryError) as error:  # a full disk
        if not is_main():
            time.sleep(2)  # mostly all ranks have this error: the first says it, torchrun ends all
        say(f"act.py: error: {error}", sys.stderr)
        return 2
    except RunStopped as error:
        if is_main():
            say(f"act.py: stopped: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        if is_main():
            say("\nact.py: interrupted", sys.stderr)
        return 130


def run_as_program():
    """main(), and the end of the process with what it returns as exit status."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    data.speak_plainly()
    try:
        status = main()
    except Exception:  # nobody foresaw it; Python's own way out could wait for other ranks
        say(traceback.format_exc(), sys.stderr)
        status = 1
    # Not sys.exit: gloo's threads can drop tensors while the interpreter shuts down, which aborts a
    # process that has finished (seen with torch 2.13 and a replicated mesh, in one run of three).
    os._exit(status)


if __name__ == "__main__":
    run_as_program()
