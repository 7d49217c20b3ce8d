"""ACT, Action-Based Contrastive Self-Training (arXiv 2406.00222): when to ask instead of guessing.

    torchrun act.py --config tiny.json                           on a laptop: 45 seconds
    torchrun --nproc-per-node 8 act.py --config gemma2_2b_pacific.json
                                                                 on GPUs, sharded with fully_shard
    torchrun act.py --config tiny.json --training_config.beta 0.1
                                                                 any key can be overridden
    python act.py --help                                         all tasks, flags and keys

Reading order: data.py to the end of Algorithm 1, this file to the end of `train`, gemma.py to the
end of the decoder. That is the method. What comes after it here are rooms to enter when you change
what stands in them: sampling, evaluation, configuration, processes, models, runs and
checkpoints, helper models, command line.

Where we depart from the paper's Algorithm 2 and from the published research code, and why
(README.md has the whole list):
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
"""

import fcntl
import hashlib
import http.client
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from datetime import timedelta
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints
from urllib.parse import quote, urlsplit

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import data
import gemma
from data import ANSWER, CLARIFY, HEURISTICS, ROLES, InputError, read_json, write_json
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


def act_pair(pair, tolerance, max_turns, simulate_user=True):
    """The paper's Algorithm 2 for one example: returns the on-policy pair and its outcome.

    A generator that yields what it asks for, so that `in_lockstep` can run a batch side by side:
        ("respond", trajectory)   is sent (y, ended): a response, and whether it came to its end
        ("classify", y)           is sent A(y), the action of a response
        ("simulate", trajectory)  is sent U(p, trajectory), the simulated user's reply
        ("score", trajectory)     is sent (exact, score), score being H(y, g) of its final answer

    In the paper's symbols: p is pair.context and pair.history, a pair.action, y_w pair.chosen,
    y_l pair.rejected, g pair.target, H the heuristic, epsilon `tolerance`, pi the policy. Without
    simulate_user (an ablation) a question where one is called for wins as it is.
    """
    trajectory = []
    y, action, ended = yield from respond(trajectory)      # y ~ pi(. | p)
    if ended and action != pair.action:                    # if A(y) != a:
        return contrast(pair, trajectory, WRONG_ACTION)    #     y_l = y
    while ended and action == CLARIFY and simulate_user:   # while A(y) != ANSWER:
        if len(trajectory) == 2 * max_turns - 1:
            return contrast(pair, trajectory, NO_ANSWER)
        user = yield "simulate", trajectory                #     u = U(p, trajectory)
        trajectory.append(("user", user))                  #     trajectory += u
        y, action, ended = yield from respond(trajectory)  #     trajectory += y ~ pi
    if not ended:
        return contrast(pair, trajectory, CUT_OFF)
    if action == CLARIFY:  # nobody was simulated
        return contrast(pair, trajectory, GOOD_OUTCOME)
    _, score = yield "score", trajectory                   # H(y, g)
    if score > tolerance:                                  # if H(y, g) > epsilon:
        return contrast(pair, trajectory, GOOD_OUTCOME)    #     y_w = trajectory
    return contrast(pair, trajectory, BAD_OUTCOME)         # else: y_l = trajectory


def respond(trajectory):
    """The policy's next message, added to the trajectory: returns (y, A(y), ended)."""
    y, ended = yield "respond", trajectory
    trajectory.append(("model", y))
    return y, (yield "classify", y), ended


def contrast(pair, trajectory, outcome):
    """A good trajectory becomes y_w, any other y_l; two sides of the same words tell nothing."""
    if outcome == GOOD_OUTCOME:
        new = replace(pair, chosen=trajectory)
    else:
        new = replace(pair, rejected=trajectory, cut=outcome == CUT_OFF)
    words = [[(role, text.split()) for role, text in side] for side in (new.chosen, new.rejected)]
    return (pair, SAME_TEXT) if words[0] == words[1] else (new, outcome)


def in_lockstep(conversations, answers):
    """Run generators that ask as `act_pair` does side by side: one batch for what many wait for.

    answers: {what is asked for: function(rows, requests) -> [answer]}, rows being positions in
    `conversations`. Returns what each conversation returned; None where a helper had no answer.
    """
    results = [None] * len(conversations)
    waiting = {row: next(conversation) for row, conversation in enumerate(conversations)}
    while waiting:
        for wanted, answer_all in answers.items():
            rows = sorted(row for row, (what, _) in waiting.items() if what == wanted)
            requests = [waiting.pop(row)[1] for row in rows]
            for row, answer in zip(rows, answer_all(rows, requests) if rows else [], strict=True):
                if answer is None:  # a helper failed: this conversation ends here
                    continue
                try:
                    waiting[row] = conversations[row].send(answer)
                except StopIteration as end:
                    results[row] = end.value
    return results


def on_policy(run, pairs, step, positions):
    """Algorithm 2 for a batch: its new pairs, how many had which outcome, and what was sampled.

    Samples are (pair before, trajectory, pair after, outcome), one for each example.
    """
    training, helpers = run.config.training_config, run.helpers
    rules = run.config.data_config.tolerance, training.max_turns, training.simulate_user
    noise = noise_generators(training.seed, step, positions)
    policy = Sampler(unsharded(run.policy, training.bf16), run.template, pairs, training, noise)
    answers = {"respond": policy, **helpers.answers(pairs, run.config.data_config.heuristic)}
    before = Counter(HELPER_COUNTS)
    results = together(lambda: in_lockstep([act_pair(pair, *rules) for pair in pairs], answers))
    results = [result or (pair, HELPER_FAILED) for pair, result in zip(pairs, results, strict=True)]
    samples = [(pair, policy.trajectories[i], *results[i]) for i, pair in enumerate(pairs)]
    outcomes = Counter(outcome for _, outcome in results)
    counts = {f"act/{outcome}": outcomes[outcome] for outcome in OUTCOMES}
    if helpers.cost:
        counts |= {f"helpers/{key}": HELPER_COUNTS[key] - before[key] for key in COUNTED}
    return [new for new, _ in results], counts, samples


def noise_generators(seed, step, positions):
    """A generator for each example, keyed so that no batching, rank or resume changes a sample."""
    keys = [random.Random(f"{seed}/{step}/{position}").getrandbits(62) for position in positions]
    return [torch.Generator().manual_seed(key) for key in keys]


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


def forest_of(sequences, device):
    """Sequences (prompt, reply, mask) as one Forest."""
    masks = [[0] * len(prompt) + mask for prompt, _, mask in sequences]
    return Forest([prompt + reply for prompt, reply, _ in sequences], masks).to(device)


def preference_step(run, pairs, weight):
    """Forward and backward of a micro-batch of pairs, its gradient times `weight`. Returns sums."""
    training = run.config.training_config
    sequences = []  # chosen, rejected, chosen, rejected, ...
    for pair in pairs:
        for messages, ended in ((pair.chosen, True), (pair.rejected, not pair.cut)):
            sequences.append(sequence_of(pair, messages, ended, run.template, training))
    forest = forest_of(sequences, run.device)
    lengths = torch.tensor(forest.counts, device=run.device)
    with torch.no_grad():
        reference_logps = run.reference.logps(forest)
    chosen, rejected = run.policy.logps(forest).view(-1, 2).T
    options = training.beta, training.label_smoothing, training.loss_type
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen, rejected, *reference_logps.view(-1, 2).T, *options
    )
    likelihoods = chosen / lengths[::2].clamp(min=1)  # per token
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


def sft_step(run, pairs, weight):
    """The same for gold replies: negative log-likelihood per token, a mean over each reply."""
    training = run.config.training_config
    golds = [sequence_of(pair, pair.gold[:1], True, run.template, training) for pair in pairs]
    forest = forest_of(golds, run.device)
    losses = -run.policy.logps(forest) / torch.tensor(forest.counts, device=run.device).clamp(min=1)
    (losses.sum() * weight).backward()
    return {"loss": losses.sum().item(), "tokens": forest.used}


def prompt_of(template, pair, max_length):
    return template.prompt(pair.context, pair.history, max_length, pair.instruction)


def sequence_of(pair, messages, ended, template, training):
    """(prompt, reply, mask) of a prompt and one side, cut to max_length; mask: 1 where scored."""
    prompt = prompt_of(template, pair, training.max_prompt_length)
    tokens, mask = template.reply(messages, ended)
    if training.loss_on == "all":
        mask = [1] * len(tokens)
    room = max(1, training.max_length - len(prompt))
    return prompt, tokens[:room], mask[:room]


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
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not norm.isfinite():  # the same on all ranks; the parameters are still good
        raise NotANumber("the gradient's norm is not a finite number")
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(policy.parameters(), max_grad_norm, norm)
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
    training, rank, world = config.training_config, dist.get_rank(), dist.get_world_size()
    local, micro = run.local, training.per_device_train_batch_size  # of a step, a forward pass
    order, log = DataOrder(run.pairs, training.seed), Log(config, run.start)
    progress = Progress("step", run.steps)
    print0(f"{config.task}: {len(run.pairs)} training turns, {len(run.validation)} for validation, "
           f"steps of {local * world} turns, step {run.start} to {run.steps}")  # fmt: skip
    done = run.start
    try:
        for step in range(run.start, run.steps + 1):
            # evaluate before the first step, after the last, and in between as asked
            between = training.eval_steps and step % training.eval_steps == 0
            due = between or step in (0, run.steps)
            if run.validation and due and step not in log.evaluated:
                setting = run.template, run.validation, run.helpers, config
                with set_aside(run):
                    log.evaluation(step, *evaluate_pairs(run.policy, *setting))
            if step == run.steps:
                break

            # this rank's part of the global batch, which is the same however it is divided
            began = time.perf_counter()
            positions = range((step * world + rank) * local, (step * world + rank + 1) * local)
            batch, sums = [run.pairs[order[position]] for position in positions], Counter()

            # on-policy pairs (Algorithm 2)
            n = training.sample_frequency
            if config.task == "act" and n and (step + 1) % n == 0:
                with set_aside(run):
                    batch, counts, samples = on_policy(run, batch, step, positions)
                log.rollouts(step + 1, samples)
                sums.update(counts)
            rolled = time.perf_counter()

            # forward and backward, micro-batch by micro-batch; gradients are averaged over ranks
            for i in range(0, local, micro):
                take_step = preference_step if run.reference else sft_step
                sums.update(take_step(run, batch[i : i + micro], 1 / local))
            check_finite(sums, NotANumber)  # on all ranks, before anything is learnt from them
            lr = learning_rate(step, run.steps, training)
            grad_norm = clip_and_step(run.policy, run.optimizer, training.max_grad_norm, lr)
            done = step + 1

            # one line of metrics: means over the global batch, sums of what is counted
            if done % training.logging_steps == 0 or done == run.steps:
                totals = zip(sums, all_sum(list(sums.values()), run.device), strict=True)
                row = {key: x if is_total(key) else x / (local * world) for key, x in totals}
                row |= {"grad_norm": grad_norm, "learning_rate": lr}
                row |= {"seconds/rollout": rolled - began}
                row |= {"seconds/train": time.perf_counter() - rolled}
                log.step(done, row)
                margin = f"  margin {row['rewards/margins']:.3f}" if run.reference else ""
                progress(done, f"loss {row['loss']:.4f}{margin}")

            if training.save_steps and done % training.save_steps == 0 and done < run.steps:
                save_checkpoint(run, done)
            together(stop_if_asked)  # by Ctrl-C or SIGTERM
    except RunStopped as error:  # a number that is none, a helper that gave up, a signal
        raise stopped(run, done, error) from None
    save_trained(run)
    log.finish()


def is_total(key):
    """Whether the log shows a metric as a sum over the global batch rather than as a mean."""
    return key == "tokens" or key.startswith(("act/", "helpers/"))


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# The policy's voice in a conversation.


class Sampler:
    """`respond` of `in_lockstep`: continues all prompts in one batch and keeps their key-value cache between turns.

    Where a GPU has no memory for that, the batch is halved, which changes no reply, and said.
    """

    def __init__(self, model, template, pairs, training, generators=None):
        """generators: one for each pair; None: greedy."""
        self.model, self.template, self.max_new_tokens = model, template, training.max_new_tokens
        self.max_length = training.max_length
        self.prompts = [prompt_of(template, pair, training.max_prompt_length) for pair in pairs]
        self.sampling = {"temperature": training.temperature, "top_k": training.top_k, "top_p": training.top_p}
        self.generators, self.trajectories = generators, {}  # row -> the list that its conversation goes on filling
        self.parts = [(list(range(len(pairs))), KVCache())]  # rows that are continued together

    def __call__(self, rows, trajectories):
        """[(the policy's next message, whether it came to its end)] in each of these rows."""
        self.trajectories.update(zip(rows, trajectories, strict=True))
        parts, replies = [([row for row in held if row in rows], held, cache) for held, cache in self.parts], {}
        self.parts = []
        while parts:
            part, held, cache = parts.pop(0)
            if not part:
                continue
            said, half = self.continued(part, held, cache), len(part) // 2
            if said is None:
                print0(f"no memory to continue {len(part)} conversations at once: going on with {half or 1}")
                parts = [(part[:half], [], KVCache()), (part[half:], [], KVCache()), *parts]
            else:
                replies |= zip(part, said, strict=True)
                self.parts.append((part, cache))
        return [(self.template.text(replies[row]), len(replies[row]) < self.max_new_tokens) for row in rows]

    def continued(self, part, held, cache):
        """The replies' tokens in the rows `part` of those that a cache holds; None: there is not the memory."""
        prompts = []
        for row in part:
            said = self.template.following(self.trajectories[row]) if self.trajectories[row] else []
            prompts.append(self.prompts[row] + said[-max(1, self.max_length - len(self.prompts[row])) :])
        sampling, generators = {"temperature": 0.0}, [self.generators[row] for row in part] if self.generators else []
        if generators:
            sampling = {**self.sampling, "generator": generators}
        before = [generator.get_state() for generator in generators]
        stop_ids = self.template.stop_ids
        try:
            if cache.order:
                cache.keep([held.index(row) for row in part])
            return generate(self.model, prompts, self.max_new_tokens, stop_ids=stop_ids, kv_cache=cache, **sampling)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        for generator, state in zip(generators, before, strict=True):  # the same noise once more
            generator.set_state(state)
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# Every validation turn played to its end with greedy decoding, by the driver of Algorithm 2.


def play_turn(pair, max_turns):
    """Asks as `act_pair` does; goes on whatever the first action. Returns what is kept of the turn.

    A conversation that does not end in an answer scores 0.
    """
    trajectory, actions, final = [], [], (0.0, 0.0)
    while True:
        y, action, ended = yield from respond(trajectory)
        actions.append(action)
        if not ended or action == ANSWER or len(actions) == max_turns:
            break
        trajectory.append(("user", (yield "simulate", trajectory)))
    answered = ended and action == ANSWER
    if answered:
        final = yield "score", trajectory
    texts = {"trajectory": trajectory, "final_answer": y if answered else None}
    scores = {"exact_match": float(final[0]), "f1": float(final[1])}
    return {**texts, "inferred_action": actions[0], "questions": actions.count(CLARIFY), **scores}


def evaluate_pairs(model, template, pairs, helpers, config):
    """Play every turn. Returns (metrics, samples), the same on all ranks."""
    training, heuristic = config.training_config, config.data_config.heuristic
    mine = shares(len(pairs), dist.get_rank(), dist.get_world_size())
    policy, progress = unsharded(model, training.bf16), Progress("evaluating turn", len(mine))

    def play():
        samples = []
        for start in range(0, len(mine), training.per_device_eval_batch_size):
            stop_if_asked()
            batch = [pairs[i] for i in mine[start : start + training.per_device_eval_batch_size]]
            answers = {"respond": Sampler(policy, template, batch, training), **helpers.answers(batch, heuristic)}
            played = in_lockstep([play_turn(pair, training.max_turns) for pair in batch], answers)
            samples += [sample_of(pair, turn, heuristic) for pair, turn in zip(batch, played, strict=True)]
            progress(len(samples))
        return samples

    samples = all_gathered(together(play))
    return summarize(samples), samples


FAILED_TURN = {"trajectory": [], "final_answer": None, "inferred_action": None, "questions": 0,
               "exact_match": 0.0, "f1": 0.0}  # fmt: skip


def score_of(compare, pair, answer, gold):
    """(exact, score) of an answer on this turn. Raises InputError naming it, where a gold query fails, say."""
    try:
        return data.score_of(compare, answer, gold, pair.context)
    except InputError as error:
        raise InputError(f"{pair.where}: {error}") from None


def sample_of(pair, turn, heuristic):
    """A line of eval_samples.jsonl: the turn, how it was played, and its first reply beside the gold one.

    inferred_action is None where a helper failed (turn is None): it is then counted, but left out of all means.
    """
    compare = HEURISTICS.get(heuristic, data.drop_f1)  # a judge rates answers, not first replies
    exact, f1 = score_of(compare, pair, turn["trajectory"][0][1], pair.gold[0][1]) if turn else (0.0, 0.0)
    source = {"where": pair.where, "context": pair.context, "history": pair.history, "gold": pair.gold}
    source |= {"target_action": pair.action, "gold_target": pair.target}
    source |= {"gold_questions": len(pair.gold) // 2 or int(pair.action == CLARIFY)}
    return {**source, **(turn or FAILED_TURN), "turn_exact_match": float(exact), "turn_f1": float(f1)}


def summarize(samples):
    """Metrics of evaluated turns, as fractions; a mean over nothing is None, and counts say how many each is over."""

    def means(name, f1, exact_match, chosen):
        return {
            f"{name} DROP F1": data.mean_or_none(sample[f1] for sample in chosen),
            f"{name} Exact Match": data.mean_or_none(sample[exact_match] for sample in chosen),
            f"{name} Turns": len(chosen),
        }

    failures = sum(sample["inferred_action"] is None for sample in samples)
    samples = [sample for sample in samples if sample["inferred_action"] is not None]
    asked = [sample for sample in samples if sample["inferred_action"] == CLARIFY]
    of = {action: [sample for sample in samples if sample["target_action"] == action] for action in (CLARIFY, ANSWER)}
    gold, inferred = ([sample[key] for sample in samples] for key in ("target_action", "inferred_action"))
    return {
        **data.action_metrics(gold, inferred),
        **means("Turn-Level", "turn_f1", "turn_exact_match", samples),
        **means("Trajectory-level", "f1", "exact_match", samples),
        **means("Post-Clarification", "f1", "exact_match", asked),
        **means("CLARIFY Turns: Trajectory-level", "f1", "exact_match", of[CLARIFY]),
        **means("ANSWER Turns: Trajectory-level", "f1", "exact_match", of[ANSWER]),
        "Questions per Turn": data.mean_or_none(sample["questions"] for sample in samples),
        "Gold Questions per Turn": data.mean_or_none(sample["gold_questions"] for sample in samples),
        "Helper Failures": failures,
    }


SHOWN = (
    "Accuracy", "Macro F1", "Trajectory-level Exact Match", "Trajectory-level DROP F1",
    "Post-Clarification Exact Match", "CLARIFY Turns: Trajectory-level Exact Match",
    "ANSWER Turns: Trajectory-level Exact Match", "Questions per Turn",
)  # fmt: skip


def comparison(before, after):
    """A table of the main metrics before and after training; the whole of them is in metrics.jsonl."""
    lines = [f"{'':44} {'before':>8} {'after':>8}"]
    for name in SHOWN:
        scale, digits = (1, 2) if name == "Questions per Turn" else (100, 1)
        found = [metrics[name] for metrics in (before, after)]
        cells = ["-" if value is None else f"{scale * value:.{digits}f}" for value in found]
        lines.append(f"{name:44} {cells[0]:>8} {cells[1]:>8}")
    return "\n".join(lines)


def changed_conversations(before, after):
    """How many turns ended in a better answer after training than before, and how many in a worse one, as text.

    Two of the first and one of the others are shown, those that became right or wrong first, then those with questions.
    """
    rows = [(b, a) for b, a in zip(before, after, strict=True) if b["inferred_action"] and a["inferred_action"]]
    better = [(b, a) for b, a in rows if a["f1"] > b["f1"]]
    worse = [(b, a) for b, a in rows if a["f1"] < b["f1"]]
    better.sort(key=lambda row: (row[0]["exact_match"] - row[1]["exact_match"], -row[1]["questions"]))
    worse.sort(key=lambda row: (row[1]["exact_match"] - row[0]["exact_match"], -row[0]["questions"]))
    lines = [f"{len(better)} turns got a better answer, {len(worse)} a worse one, of {len(rows)}"]
    for b, a in better[:2] + worse[:1]:
        context = [line for line in a["context"].split("\n")[-6:] if line]
        lines += ["", *[f"  {line}" for line in context], f"  User: {data.fold(a['history'][-1][1])}"]
        for name, sample in (("before", b), ("after ", a)):
            said = [f"{data.SPEAKERS[role]}: {data.fold(text)}" for role, text in sample["trajectory"]]
            lines.append(f"    {name} | {'  '.join(said)}")
        lines.append(f"    gold   | {data.fold(a['gold_target'])}")
    return "\n".join(lines)


class Log:
    """metrics.jsonl, eval_metrics.json, eval_samples.jsonl (first and last evaluation), rollouts.jsonl, report.html."""

    def __init__(self, config, start):
        self.config, self.folder = config, Path(config.training_config.output_dir)
        self.first, self.last = None, None
        rows = on_main(lambda: whole_rows(self.folder / "metrics.jsonl"))
        self.evaluated = {row["step"] for row in rows if "eval/Accuracy" in row}
        samples = on_main(lambda: whole_rows(self.folder / "eval_samples.jsonl")) if start else []
        samples = [row for row in samples if row["step"] == 0]
        if samples:  # resumed: the evaluation before training is on disk
            self.first = summarize(samples), samples

    def append(self, name, rows):
        on_main(data.append_jsonl, self.folder / name, rows)  # a full disk stops all ranks

    def step(self, step, metrics):
        self.append("metrics.jsonl", [{"step": step, **metrics}])

    def rollouts(self, step, samples):
        """What the policy said in a step, example by example; `score`: of an answer that was judged by a formula."""
        compare, rows = HEURISTICS.get(self.config.data_config.heuristic), []
        for pair, said, new, outcome in samples:
            won_by_asking = not self.config.training_config.simulate_user and pair.action == CLARIFY
            judged = compare and (outcome == BAD_OUTCOME or outcome == GOOD_OUTCOME and not won_by_asking)
            replaced = {id(new.chosen): "chosen", id(new.rejected): "rejected"}.get(id(said))
            row = {key: getattr(pair, key) for key in ("where", "context", "history", "action", "target")}
            row |= {"trajectory": said, "outcome": outcome, "replaced": replaced}
            rows.append({"step": step, **row, "score": None})
            if judged:
                rows[-1]["score"] = score_of(compare, pair, said[-1][1], pair.target)[1]
        self.append("rollouts.jsonl", all_gathered(rows))

    def evaluation(self, step, metrics, samples):
        self.step(step, {f"eval/{name}": value for name, value in metrics.items()})
        self.last = metrics, [{"step": step, **sample} for sample in samples]
        self.first = self.first or self.last
        kept = self.first[1] + (self.last[1] if self.last is not self.first else [])
        on_main(write_evaluation, self.folder, metrics, kept)

    def finish(self):
        if self.last and self.first is not self.last:
            print0("\n" + comparison(self.first[0], self.last[0]))
            print0("\n" + changed_conversations(self.first[1], self.last[1]))
        write_report(self.folder)
        print0(f"\nThe model is in {self.folder / 'model'}; to look at in a browser: {self.folder / 'report.html'}")
        if self.last:
            found = [f"{score:.3f} after step {step}" for step, score in scores_of(self.config.training_config).items()]
            print0(f"{self.config.training_config.metric_for_best_model}, the best first: {', '.join(found[:5])}")


def write_evaluation(folder, metrics, samples):
    write_json(folder / "eval_metrics.json", metrics)
    data.write_jsonl(folder / "eval_samples.jsonl", samples)
    write_report(folder)


def write_report(folder):
    """report.html: the template with what the folder's files hold as JSON in it, each long text once."""
    template = HERE / "configs" / "report.html"
    if not is_main() or not template.exists():
        return
    texts, held = {}, {}

    def shared(row):
        long = [key for key in ("context", "history", "gold") if key in row]
        return row | {key: texts.setdefault(json.dumps(row[key]), len(texts)) for key in long}

    def read(text):
        return json.loads(text, object_hook=shared, parse_constant=lambda _: None)

    for name in ("config.json", "eval_metrics.json", "metrics.jsonl", "eval_samples.jsonl", "rollouts.jsonl"):
        path = folder / name
        if path.exists():
            raw = path.read_bytes()  # of lines, a killed run leaves half a one
            held[path.stem] = read(raw) if path.suffix == ".json" else [read(line) for line in raw.split(b"\n")[:-1]]
    held = json.dumps(held | {"texts": [json.loads(text) for text in texts]})  # in ASCII, U+2028 is \u2028
    held = re.sub("[<>&]", lambda mark: f"\\u{ord(mark[0]):04x}", held)
    before, at, after = template.read_text(encoding="utf-8").partition('<script type="application/json" id="data">')
    data.write_text(folder / "report.html", [before, at, held, after.removeprefix("null")])


# ----------------------------------------------------------------------------------------------------------------------
# Configuration
# Every key there is, with its default; `python act.py --help` prints them. Nothing else is read.


@dataclass(frozen=True)
class PolicyModelConfig:
    model_path: str = ""  # directory with config.json, *.safetensors, tokenizer.model
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the parameters held between steps; see training_config.bf16
    lora_r: int = 0  # above 0: the weights are frozen, adapters of this rank are trained, in float32 (LoRA); e.g. 16
    lora_alpha: float = 32.0  # adapters are scaled by lora_alpha / lora_r
    lora_target_modules: list | None = None  # which have adapters; null: all of a layer
    adapter_path: str = ""  # start from adapters in PEFT's layout, as adapter/ of a run, with their r and alpha


@dataclass(frozen=True)
class HelperConfig:
    backend: Literal["", "rule", "gemma", "gemini", "openai"] = ""  # "": gemini where model_id is set, else rule
    model_path: str = ""  # gemma: directory of a checkpoint with its tokenizer.model, or "reference": the policy's own
    model_id: str = ""  # gemini, openai: e.g. "gemini-2.0-flash-001", "llama3.2"
    base_url: str = ""  # gemini, openai: of a server that speaks as they do, e.g. "http://localhost:11434/v1"
    prompt_path: str = ""  # what a model is told; "": the role's file in configs/prompts/
    temperature: float = 0.0  # 0: greedy
    max_new_tokens: int = 128  # of one answer
    batch_size: int = 16  # gemma: prompts that are continued together
    concurrency: int = 16  # servers: calls in flight
    max_retries: int = 5  # servers: of one call, after 429, 5xx, resets, time-outs and half answers
    max_failures: int = 20  # answers in a row, failed, blocked or unusable, after which the run saves and stops
    timeout: float = 60.0  # servers: seconds of one call
    cache_path: str = "helper_cache.sqlite"  # servers: answers already paid for; "" keeps none


@dataclass(frozen=True)
class DataConfig:
    train_path: str = ""  # JSONL: conversations, or pairs where is_preference is set
    validation_path: str = ""  # the same, for the evaluations; "": none
    validation_split: float = 0.0  # without a validation_path: the share of the training conversations held out for it
    prompt_format: Literal["plain", "gemma"] = "plain"  # "plain": User: / Assistant: lines; "gemma": its chat template
    heuristic: Literal[(*HEURISTICS, "judge")] = "drop_f1"  # or coqa_f1, exact_match, execution_match, judge
    tolerance: float = 0.9  # a trajectory wins if its score is above this


@dataclass(frozen=True)
class TrainingConfig:
    output_dir: str = "output"  # everything that a run writes
    seed: int = 42  # of the data order, the samples and the pairs; independent of the number of processes
    per_device_train_batch_size: int = 1  # examples of one forward pass on one device
    per_device_eval_batch_size: int = 16  # examples that are continued together in an evaluation
    gradient_accumulation_steps: int = 1  # forward passes to one optimiser step; all sample from the same policy
    learning_rate: float = 5e-7  # after the warm-up; the published code's, as are beta, optim, schedule and epochs
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    warmup_steps: int = 0  # from 0 up to learning_rate
    optim: Literal["rmsprop", "adamw"] = "rmsprop"
    weight_decay: float = 0.0  # of the optimiser
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to it; 0: no clipping
    num_train_epochs: float = 2.0  # passes over the training turns
    max_steps: int = -1  # above 0 it replaces num_train_epochs
    eval_steps: int = 0  # 0: evaluate before the first and after the last step only
    logging_steps: int = 1  # a line of metrics.jsonl every n steps, of that step
    save_steps: int = 0  # a checkpoint every n steps; 0: only the final model
    save_total_limit: int = 1  # checkpoints kept, and the best of those that were evaluated; 0 keeps all
    metric_for_best_model: Literal[SHOWN[:-1]] = "Trajectory-level DROP F1"  # of an evaluation: says which is the best
    load_best_model_at_end: bool = False  # model/ is the best checkpoint, where that is better than the last step
    bf16: bool = False  # compute in bfloat16; parameters stay in policy_model_config.dtype, sums in float32
    gradient_checkpointing: bool = False  # recompute each layer in the backward pass
    offload_for_generation: bool = False  # optimiser state and reference are in CPU memory while replies are made
    dp_replicate_size: int = 1  # copies of the sharded model, e.g. the number of nodes: sharding stays inside a node
    max_length: int = 1024  # tokens of prompt and trajectory; longer ones lose their end; no room for a reply: left out
    max_prompt_length: int = 896  # a longer prompt loses its oldest turns, then the head of its context, of its turn
    beta: float = 0.05  # DPO: how far the policy may move from the reference
    label_smoothing: float = 0.0  # share of pairs taken to be the wrong way round (conservative DPO)
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"  # sigmoid: DPO
    rpo_alpha: float = 0.0  # weight of the chosen side's negative log-likelihood per token, added to the DPO loss
    loss_on: Literal["assistant", "all"] = "assistant"  # "assistant": its tokens only; "all": the simulated user's too
    sample_frequency: int = 1  # sample on policy at every n-th step; 0: never, which is offline DPO
    simulate_user: bool = True  # False (ablation): a question where one is called for wins as it is
    icl_examples: int = 10  # examples that the preference model is shown
    action_labels: Literal["gold", "classifier", "random"] = "gold"  # of training turns; "random" (ablation): by a coin
    class_balance: dict | None = None  # e.g. {"CLARIFY": 2, "ANSWER": 1}: resample the training turns of each action
    is_preference: bool = False  # the data files hold pairs: records, Vertex's preference lines or TRL's
    max_new_tokens: int = 128  # of one response
    temperature: float = 1.0  # of the policy's samples in training; evaluation is greedy
    top_k: int = 0  # sample among the k most likely tokens only; 0: all
    top_p: float = 1.0  # sample among the most likely tokens that together have this probability
    max_turns: int = 3  # responses of one simulated trajectory; with 1, every question loses


@dataclass(frozen=True)
class Config:
    task: Literal["act", "sft", "dpo", "generate_preference", "evaluate"] = "act"
    policy_model_config: PolicyModelConfig = PolicyModelConfig()
    action_model_config: HelperConfig = HelperConfig()
    user_simulator_config: HelperConfig = HelperConfig()
    intent_model_config: HelperConfig = HelperConfig()
    preference_model_config: HelperConfig = HelperConfig()
    judge_model_config: HelperConfig = HelperConfig()
    data_config: DataConfig = DataConfig()
    training_config: TrainingConfig = TrainingConfig()


AT_LEAST_ONE = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps",
    "max_new_tokens", "max_turns", "icl_examples", "dp_replicate_size", "batch_size", "concurrency", "max_failures",
}  # fmt: skip
ANY_NUMBER = {"max_steps", "seed"}  # all others are from 0 up
INPUT_FILES = ("train_path", "validation_path", "prompt_path")
INPUT_PATHS = {"model_path", "adapter_path", *INPUT_FILES}
PATHS = INPUT_PATHS | {"output_dir", "cache_path"}
RENAMED = {  # keys of earlier versions, and what to write instead
    "do_eval": "an empty data_config.validation_path",
    "judge": "simulate_user: true for 'trajectory', false for 'action' (answers are then judged all the same)",
}
FOREIGN = {  # keys of the published research code's configs that mean nothing here: accepted, named once, not read
    "policy_model_config": "model_id token revision trust_remote_code use_flash_attention_2 model_code_revision "
    "torch_dtype tokenizer_name_or_path load_in_4bit load_in_8bit",
    "data_config": "preference_batch_generation has_context_metadata train_preference_filename truncation_side "
    "validation_preference_filename eval_data eval_result_output_path eval_sample_output_path eval_max_input_length",
    "training_config": "project_id location staging_bucket machine_type accelerator_type packing target_label "
    "gradient_checkpointing_kwargs resume_from_checkpoint eval_strategy save_strategy logging_strategy max_seq_length "
    "world_size log_level logging_first_step",
}
HERE = Path(__file__).resolve().parent


def located(path):
    """A path as given if it is there, else beside act.py, so that shipped configs run from any working directory."""
    try:
        return str(HERE / path) if path and not Path(path).exists() and (HERE / path).exists() else str(path)
    except OSError:  # too long a name: whoever opens it says so
        return str(path)


def load_config(path, overrides=()):
    """Config from a JSON file, looked for as given, beside act.py and in configs/. Raises InputError.

    overrides: {"section.key": value}, or pairs of the two; a text is read as JSON where it is JSON. A key that nothing
    reads is an error that names the nearest known one; so is a value of another type or out of range.
    """
    path = next((p for p in (Path(path), HERE / path, HERE / "configs" / path) if p.is_file()), Path(path))
    raw, where = read_json(path), {}  # where: override -> how to call it in an error
    for key, value in dict(overrides).items():
        section, _, name = key.rpartition(".")
        target = raw.setdefault(section, {}) if section else raw
        if not isinstance(target, dict):
            raise InputError(f"--{key}: {section} is not a section of {path}")
        target[name] = parse_value(value) if isinstance(value, str) else value
        where[key] = f"--{key}"
    for section, names in FOREIGN.items():
        unread = raw[section].keys() & set(names.split()) if isinstance(raw.get(section), dict) else ()
        if unread:
            print0(f"{path}: {section}: not read here: {', '.join(sorted(unread))}")
            raw[section] = {key: value for key, value in raw[section].items() if key not in unread}
    config = build_section(Config, raw, str(path), "", where)
    check_config(config, f"{path} with {', '.join(where.values())}" if where else path)
    return config


def parse_value(text):
    try:
        return json.loads(text, parse_constant=str)  # NaN and Infinity stay texts
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def build_section(cls, raw, path, prefix, where):
    """An instance of a config dataclass from a dict, every key and type checked."""
    if not isinstance(raw, dict):
        raise InputError(f"{path}: {prefix.rstrip('.')} is {raw!r}, expected an object")
    types, values = get_type_hints(cls), {}
    for key, value in raw.items():
        at = where.get(prefix + key, f"{path}: {prefix}{ascii(key)[1:-1]}")
        if key in RENAMED:
            raise InputError(f"{at}: no longer a key, write {RENAMED[key]} instead")
        if key not in types:
            known = {name: prefix + name for name in types}
            if not prefix and not isinstance(value, dict):  # a section may have been left out
                known |= {name.rpartition(".")[2]: name for name in flat(asdict(Config()))} | known
            near = get_close_matches(key, known, 1, 0)[0]
            raise InputError(f"{at}: unknown key, the nearest known one is {known[near]}")
        if is_dataclass(types[key]):
            values[key] = build_section(types[key], value, path, f"{prefix}{key}.", where)
        else:
            values[key] = checked_value(key, value, types[key], at, typed=prefix + key in where)
    return cls(**values)


def checked_value(key, value, kind, at, typed=False):
    """A value of one key, of its type and in its range. typed: on the command line, where a number may be a name."""
    choices = get_args(kind) if str(kind).startswith("typing.Literal") else ()
    kind = str if choices else kind
    value = "" if value is None and key in PATHS else value
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if isinstance(value, dict):
        value = {name: checked_value(name, number, float, f"{at}.{name}") for name, number in value.items()}
    if kind is str and type(value) in (int, float) and typed:
        value = str(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{at} is {value!r}, expected {getattr(kind, '__name__', kind)}")
    if choices and value not in choices:
        near = get_close_matches(value, choices, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"{at} is {value!r}, expected one of {', '.join(filter(None, choices))}{hint}")
    odd = kind is str and re.search("[\0\ud800-\udfff]" + "|://" * (key in PATHS), value)
    if odd or value == "" and key == "output_dir":
        raise InputError(f"{at} is {value!r}, expected {'a path on this machine' if key in PATHS else 'text in UTF-8'}")
    if key in AT_LEAST_ONE and value < 1:
        raise InputError(f"{at} is {value}, expected at least 1")
    lowest = -(2**53) if key in ANY_NUMBER else 0
    if type(value) in (int, float) and not lowest <= value < 2**53:
        raise InputError(f"{at} is {value}, expected a number from {lowest}, below 2**53")
    return located(value) if key in INPUT_PATHS else value


def check_config(config, path):
    """The rules that concern more than one key."""
    training, files, policy, task = config.training_config, config.data_config, config.policy_model_config, config.task
    longest, shorter, preference = training.max_length, training.max_prompt_length, training.is_preference
    balance = "class_balance" if training.class_balance else f"task {task!r}"
    needs = f"is missing, task '{task}' needs it"
    rules = (
        (shorter >= longest, f"max_prompt_length {shorter} leaves no room below max_length {longest} for a response"),
        (preference and training.action_labels == "classifier",
         "action_labels is 'classifier', but is_preference is set, and files of pairs hold their actions"),
        (training.action_labels == "random" and (training.class_balance or task == "sft"),
         f"action_labels is 'random', which changes pairs, not gold replies: not with {balance}"),
        (files.validation_split >= 1, f"validation_split is {files.validation_split}, expected a share below 1"),
        (files.tolerance >= 1, f"tolerance is {files.tolerance}, expected less than 1: a trajectory wins above it"),
        (not 0 < training.top_p <= 1, f"top_p is {training.top_p}, expected a number above 0, up to 1"),
        (training.load_best_model_at_end and (training.save_steps or math.nan) % (training.eval_steps or math.nan),
         "load_best_model_at_end is set, expected eval_steps, and save_steps to be a multiple of them"),
        (training.load_best_model_at_end and not (files.validation_path or files.validation_split),
         "load_best_model_at_end is set, expected a validation_path or validation_split to tell the best by"),
        (training.loss_type == "ipo" and not training.beta, "beta is 0, expected more for loss_type 'ipo'"),
        (not all(target in gemma.PROJECTIONS for target in policy.lora_target_modules or ()),
         f"lora_target_modules has {policy.lora_target_modules}, not of {gemma.PROJECTIONS}"),
        (policy.adapter_path and any(getattr(config, name).model_path == "reference" for name in ROLES),
         "a helper's model_path is 'reference', which is the base alone where adapter_path is set, expected a model"),
        (training.label_smoothing and training.loss_type != "sigmoid",
         f"label_smoothing is {training.label_smoothing}, which loss_type '{training.loss_type}' does not read"),
        (training.label_smoothing >= 0.5, f"label_smoothing is {training.label_smoothing}, expected less than 0.5"),
        (task != "generate_preference" and not policy.model_path,
         f"policy_model_config.model_path {needs}"),
        (task == "evaluate" and not files.validation_path and not (files.validation_split and files.train_path),
         f"data_config.validation_path {needs}"),
        (task in WRITES and task != "evaluate" and files.validation_path and files.validation_split,
         f"validation_split is {files.validation_split}, but validation_path is set too, expected one of them"),
        (task != "evaluate" and not files.train_path, f"data_config.train_path {needs}"),
        (files.heuristic == "judge" and backend_of(config.judge_model_config) == "rule",
         "heuristic is 'judge', expected a judge_model_config.backend that is a model"),
        (task == "generate_preference" and preference,
         "task 'generate_preference' makes pairs from conversations, but is_preference is set"),
    )  # fmt: skip
    for broken, message in rules:
        if broken:
            raise InputError(f"{path}: {message}")


def flat(config):
    """{"section.key": value} of a config as a dict."""
    values = {}
    for name, section in config.items():
        values |= {f"{name}.{key}": v for key, v in section.items()} if isinstance(section, dict) else {name: section}
    return values


# ----------------------------------------------------------------------------------------------------------------------
# Processes
# One rank or many: what only rank 0 says or does, what all ranks share, and the progress of long stages.


def start_processes():
    """Join the process group that torchrun describes, or make one of a single process. Returns the device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        hours = timedelta(hours=6)  # a rank may wait long for another whose helper is slow
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=hours, **alone)
    return torch.device("cuda" if cuda else "cpu")


def is_main():
    return int(os.environ.get("RANK", 0)) == 0


def print0(text):
    if is_main():
        print(text, flush=True)


class Progress:
    """One line that says how far a stage is: updated in place on a terminal, else printed every ten seconds."""

    def __init__(self, label, total):
        self.label, self.total, self.start, self.tty = label, total, time.monotonic(), sys.stdout.isatty()
        self.every = 0.1 if self.tty else 10.0
        self.next, self.first = self.start + self.every, None

    def __call__(self, done, text=""):
        now = time.monotonic()
        self.first = self.first or (now, done)  # a pace is measured from here: what is compiled or resumed is behind
        if is_main() and (now >= self.next or done == self.total):
            self.next = now + self.every
            left = ""
            if self.first[1] < done < self.total:
                seconds = (now - self.first[0]) * (self.total - done) / (done - self.first[1])
                left = f", {seconds:.0f} s left" if seconds < 120 else f", {seconds / 60:.0f} min left"
            line = f"{self.label} {done}/{self.total}  {now - self.start:.0f} s{left}  {text}".rstrip()
            start, end = ("\r\033[K", "\n" if done == self.total else "") if self.tty else ("", "\n")
            print(start + line, end=end, flush=True)


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


def on_main(function, *arguments):
    """Call a function on rank 0 alone; its result, or its InputError, on every rank."""
    answer = [None, None]
    if is_main():
        try:
            answer[0] = function(*arguments)
        except (InputError, OSError) as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise InputError(answer[1])
    return answer[0]


def together(work):
    """work() on every rank; where a helper gives up on one, RunStopped on all, so that none waits for another."""
    result, errors = None, []
    try:
        result = work()
    except (RunStopped, InputError) as error:
        errors = [str(error)]
    errors = all_gathered(errors)
    if errors:
        raise RunStopped(errors[0])
    return result


ASKED = []  # the signal that asks this run to save and stop


def heed_signals(heed=True):
    """Note a first Ctrl-C or SIGTERM for `stop_if_asked`; the next one, or with heed=False each, ends the process."""

    def note(number, frame):
        heed_signals(False)
        ASKED.append(number)
        if is_main():
            os.write(2, b"\nact.py: saves a checkpoint at the end of this step; once more leaves at once\n")

    ASKED.clear()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, note if heed else signal.default_int_handler)
        signal.signal(signal.SIGTERM, note if heed else signal.SIG_DFL)


def stop_if_asked():
    if ASKED:
        raise RunStopped("interrupted")


def check_finite(values, error=None):
    """RunStopped on all ranks where one of `values`, numbers or tensors by name, holds an infinity or NaN on one."""
    held = {name: gemma.local_slice(torch.as_tensor(value))[0] for name, value in values.items()}
    found = all_gathered([name for name, value in held.items() if not value.isfinite().all()])
    if found:
        raise (error or RunStopped)(f"{found[0]} is not a finite number")


# ----------------------------------------------------------------------------------------------------------------------
# Models
# Sharded over the ranks to train, whole on each of them to sample.


def make_mesh(device, replicas):
    """The ranks as [copies, shards]: parameters are sharded along the second dimension, repeated along the first."""
    world = dist.get_world_size()
    if world % replicas:
        raise InputError(f"dp_replicate_size is {replicas}, expected a divisor of the number of processes, {world}")
    return init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def build_model(directory, mesh, dtype, bf16=False, trainable=True, checkpointing=False, lora=None, start=""):
    """A Gemma sharded over the ranks of a mesh, each of which reads only its part of the checkpoint.

    lora: LoraConfig of adapters to add; start: the directory of those that it starts from, "" for none.
    """
    with torch.device("meta"):
        model = Gemma(GemmaConfig.from_json(Path(directory) / "config.json")).to(dtype)
        model.requires_grad_(trainable)
        if lora:
            gemma.add_adapters(model, lora)
    model.set_checkpointing(checkpointing)
    model.compute_dtype = torch.bfloat16 if bf16 else dtype
    if mesh.size() > 1:  # one process has nothing to gather
        shard(model, mesh)
    model.to_empty(device=mesh.device_type)
    gemma.load_safetensors(gemma.base_weights(model), directory, prefix="model.")
    return model


def lora_config(policy):
    """LoraConfig of a PolicyModelConfig: the adapter's own where one is given; None: full fine-tuning."""
    targets = policy.lora_target_modules or gemma.PROJECTIONS
    return gemma.LoraConfig(policy.lora_r, policy.lora_alpha, targets) if policy.lora_r else None


class Reference:
    """The policy as it was before training: with LoRA no second model, but the same without what is trained."""

    def __init__(self, policy):
        self.policy = policy

    def logps(self, *batch):
        with gemma.adapters_off(self.policy):
            return self.policy.logps(*batch)


def shard(model, mesh):
    """Each layer's parameters, and those outside of layers, are gathered when they are needed; sums are in float32."""
    precision = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh if mesh.size(0) > 1 else mesh["shard"], mp_policy=precision)
    register_fsdp_forward_method(model, "logps")


@torch.no_grad()
def unsharded(model, bf16=False):
    """A whole model to sample from: weights are gathered once for a rollout, in which no rank waits for another."""
    check_finite(dict(model.named_parameters()))
    with torch.device("meta"):
        whole = Gemma(model.config)
        if model.lora:
            gemma.add_adapters(whole, model.lora)
    dtype = torch.bfloat16 if bf16 else model.embed_tokens.weight.dtype
    weights = {name: p.to(dtype) for name, p in model.named_parameters() if ".start_" not in name}
    weights = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in weights.items()}
    whole.load_state_dict(weights, assign=True)
    return whole


@contextmanager
def set_aside(run):
    """With offload_for_generation: what sampling does without is in the CPU's memory, and its own is free for it."""
    tensors = []
    if run.config.training_config.offload_for_generation:
        tensors = [x for state in run.optimizer.state.values() for x in state.values() if x.ndim]
        tensors += run.reference.parameters() if isinstance(run.reference, Gemma) else []
    tensors = [x.detach().to_local() if isinstance(x, DTensor) else x.detach() for x in tensors]
    aside = [torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x) for x in tensors]
    storages = [x.untyped_storage() for x in tensors]  # with what FSDP pads a rank's rows by
    sizes = [storage.nbytes() for storage in storages]
    for storage in storages:
        storage.resize_(0)
    try:
        yield
    finally:
        for x, copy, storage, size in zip(tensors, aside, storages, sizes, strict=True):
            storage.resize_(size)
            x.copy_(copy)


def make_optimizer(model, training):
    """The optimiser with its state in place from the start, so that saving and loading need no special case."""
    cls, moments, options = torch.optim.RMSprop, ("square_avg",), {}
    if training.optim == "adamw":
        cls, moments, options = torch.optim.AdamW, ("exp_avg", "exp_avg_sq"), {"fused": True}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = cls(parameters, lr=training.learning_rate, weight_decay=training.weight_decay, **options)
    for parameter in parameters:
        state = {key: torch.zeros_like(parameter) for key in moments}
        optimizer.state[parameter] = {"step": torch.tensor(0.0, device=parameter.device), **state}
    return optimizer


# ----------------------------------------------------------------------------------------------------------------------
# Runs and checkpoints
# What a run consists of, its output directory, and a directory checkpoints/step-N each: a model in Hugging Face's
# layout with the optimiser's tensors beside it.


@dataclass
class Run:
    """What a training run consists of."""

    config: Config
    device: torch.device
    tokenizer: Tokenizer
    template: Template
    helpers: Any  # Helpers
    pairs: list  # of the training turns
    validation: list  # of the validation turns
    policy: Gemma
    reference: Gemma | None  # None in task sft
    optimizer: torch.optim.Optimizer
    state: dict  # what a checkpoint says besides its step, and a resumed run must share: examples of a step, files
    start: int  # optimiser steps that a resumed run has behind it
    steps: int  # and how many it shall have at its end
    local: int  # examples of a step on this rank


def prepare(config, overwrite, resume):
    """Read, check and build all that a run needs; only then is its output directory touched. None: nothing to do."""
    training, source, device = config.training_config, config.policy_model_config.model_path, start_processes()
    tokenizer = Tokenizer(Path(source) / "tokenizer.model")
    template = Template(tokenizer, config.data_config.prompt_format)
    mesh = make_mesh(device, training.dp_replicate_size)
    checkpoint = on_main(check_output, config, resume, overwrite)
    if checkpoint == "done":
        return print0(f"{training.output_dir}: this run is finished, nothing to resume")
    if resume and not checkpoint:
        print0(f"{training.output_dir}: no checkpoint yet, starting from the beginning")

    world, local = dist.get_world_size(), training.per_device_train_batch_size * training.gradient_accumulation_steps
    state = {"examples_per_step": local * world, **on_main(fingerprints, config)}
    start = on_main(start_of, checkpoint, state) if checkpoint else 0
    dtype, reference = getattr(torch, config.policy_model_config.dtype), None
    lora = lora_config(config.policy_model_config)
    if config.task != "sft" and not lora:
        reference = build_model(source, mesh, torch.bfloat16 if training.bf16 else dtype, trainable=False)
    helpers = build_helpers(config)
    pairs, validation = load_pairs(config, helpers, template)
    if not pairs:
        expected = "expected complete answers that fit into max_length, not all held out, and a class_balance above 0"
        raise InputError(f"{config.data_config.train_path}: no turn is left to train on, {expected}")
    held = training.bf16, True, training.gradient_checkpointing
    if lora:  # a checkpoint holds adapters only
        policy = build_model(source, mesh, dtype, *held, lora, config.policy_model_config.adapter_path)
        if checkpoint:
            gemma.load_safetensors(gemma.adapters(policy), checkpoint, "adapter_model")
        elif not config.policy_model_config.adapter_path:
            gemma.init_adapters(policy, training.seed)
        reference = None if config.task == "sft" else Reference(policy)
    else:
        policy = build_model(checkpoint or source, mesh, dtype, *held)
    gemma.check_vocabulary(tokenizer, policy)
    template.mark_stops(policy.config)

    steps = math.ceil(training.num_train_epochs * len(pairs) / (local * world))
    steps = training.max_steps if training.max_steps > 0 else steps
    if start > steps:
        raise InputError(f"--resume: {checkpoint} is beyond the {steps} steps of this run")
    optimizer = make_optimizer(policy, training)
    if checkpoint:
        gemma.load_safetensors(optimizer_tensors(policy, optimizer), checkpoint, stem="optimizer")
    on_main(start_output, config, resume, overwrite, checkpoint)
    heed_signals()
    return Run(config, device, tokenizer, template, helpers, pairs, validation, policy, reference, optimizer, state,
               start, steps, local)  # fmt: skip


def fingerprints(config):
    """{key: bytes and hash} of the files, weights aside, that decide what is learnt."""
    paths = {key: path for key, path in flat(asdict(config)).items() if key.endswith(INPUT_FILES) and path}
    for name, role in ROLES.items():
        helper = getattr(config, name)
        if backend_of(helper) != "rule":
            paths[f"{name}.prompt_path"] = helper.prompt_path or located(f"configs/prompts/{role.prompt}")
    files = {key: data.read_bytes(path) for key, path in paths.items()}
    return {key: f"{len(raw)} bytes, sha256 {hashlib.sha256(raw).hexdigest()}" for key, raw in files.items()}


def start_of(checkpoint, now):
    """The step of a checkpoint, whose run must have had steps as long as this one's, and the files that it has."""
    step, path = int(checkpoint.name[5:]), checkpoint / "trainer_state.json"
    then = read_json(path)
    for key, value in {"step": step, **now}.items():
        if then.get(key, value) != value:
            raise InputError(f"--resume: {key} is {value}, expected {then[key]} as in {path}")
    return step


def load_pairs(config, helpers, template=None):
    """(training, validation) pairs, with actions and questions from the helper models where the files lack them.

    With a template, training pairs whose reply does not fit are left out.
    """
    questions = split_over_ranks("writing question", helpers.write_questions)
    classify = split_over_ranks("classifying reply", helpers.label_actions)
    compare, files = helpers.classify_actions is data.rule_actions, config.data_config
    pairs, validation = data.get_datasets_from_config(config, questions, classify, print0, compare)
    if template:
        pairs, lines = fitting(pairs, files.train_path, template, config.training_config)
        held = files.validation_path or files.train_path
        lines += fitting(validation, held, template, config.training_config, trained_on=False)[1]
        for line in lines:
            print0(line)
    if files.heuristic == "execution_match":
        progress = Progress("trying gold query", len(pairs + validation))
        for i, pair in enumerate(pairs + validation):
            score_of(HEURISTICS[files.heuristic], pair, pair.target, pair.target)
            progress(i + 1)
    asked = all_sum([HELPER_COUNTS[key] for key in COUNTED], "cpu")
    if sum(asked):
        counts = ", ".join(f"{number:.0f} {key}" for number, key in zip(asked, COUNTED, strict=True))
        print0(f"helper models: {counts}; where one gave nothing, the rule took its place")
    texts = [text for pair in pairs + validation for _, text in (pair.history[-1], pair.gold[0])]
    broken = sum(len(text.strip().splitlines()) > 1 for text in texts)
    if broken and config.data_config.prompt_format == "plain":
        print0(f"prompt_format 'plain' puts each message on one line: {broken} of {len(texts)} have line breaks")
    return pairs, validation


def fitting(pairs, path, template, training, trained_on=True):
    """(pairs without those whose first reply does not fit into max_length, lines about these and what else is cut)."""
    longest, room, kept, cut, unfit = training.max_prompt_length, training.max_length, [], {}, {}  # cut: turn -> tokens
    unsaid = {}  # turns whose gold replies are longer than a sample can be
    for pair in pairs:
        turn = "" if training.is_preference else f".{sum(role == 'user' for role, _ in pair.history)}"
        at, whole = pair.where.rpartition(":")[2] + turn, len(prompt_of(template, pair, sys.maxsize))
        length = whole if whole <= longest else len(prompt_of(template, pair, longest))
        if length < whole:
            cut[at] = whole - length
        if trained_on and length + len(template.reply(pair.chosen[:1])[0]) > room:
            unfit[at] = True
            continue
        kept.append(pair)
        if any(len(template.reply([message])[0]) > training.max_new_tokens for message in pair.gold[::2]):
            unsaid[at] = True
    lines = []
    if cut:
        lost = " to ".join(map(str, sorted({min(cut.values()), max(cut.values())})))
        lines = [f"{path}: {len(cut)} prompts lose {lost} tokens to max_prompt_length {longest}: {data.listed(cut)}"]
    if unfit:
        turns = f"{len(unfit)} turns whose reply does not fit into max_length {room} are left out"
        lines.append(f"{path}: {turns}: {data.listed(unfit)}")
    if unsaid:
        turns = f"{len(unsaid)} turns have gold replies longer than max_new_tokens {training.max_new_tokens}"
        lines.append(f"{path}: {turns}: {data.listed(unsaid)}")
    return kept, lines


def checks_of(config):
    """For `data.py check`: (the classifier that a run has, a function (path, pairs) -> lines about their lengths)."""
    config = load_config(config)
    tokenizer = Tokenizer(Path(config.policy_model_config.model_path) / "tokenizer.model")
    template = Template(tokenizer, config.data_config.prompt_format)
    helpers = build_helpers(replace(config, task="generate_preference"))  # of which two are needed

    def classify(replies):
        try:
            return helpers.label_actions(replies)
        except RunStopped as error:
            raise InputError(str(error)) from None

    return classify, lambda path, pairs: fitting(pairs, path, template, config.training_config)[1]


def split_over_ranks(label, answer):
    """A role for requests that are the same on all ranks: each asks for its share, and all get all results."""

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


def optimizer_tensors(model, optimizer):
    """The optimiser's state by name, e.g. "square_avg.layers.0.mlp.up_proj.weight"."""
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p.requires_grad}
    return {f"{key}.{name}": value for name, state in states.items() for key, value in state.items()}


def save_trained(run):
    """What a run was for: model/, and with LoRA also adapter/, the adapters that are merged into that model."""
    training, policy = run.config.training_config, run.policy
    output, saved = Path(training.output_dir), checkpoints(training.output_dir)
    best = next((n for n in on_main(scores_of, training) if n in saved or n == run.steps), run.steps)
    if training.load_best_model_at_end and best != run.steps:
        print0(f"load_best_model_at_end: the model is that of step {best}")
        held, names = (gemma.adapters, ("adapter_model",)) if policy.lora else (gemma.base_weights, ("model", "model."))
        gemma.load_safetensors(held(policy), saved[best], *names)
    if policy.lora:
        save_model(run, output / "adapter", adapters=True)
        gemma.merge_adapters(policy)
    save_model(run, output / "model")
    heed_signals(False)


def save_model(run, directory, optimizer=None, state=None, adapters=False):
    """The model and its tokenizer, or its adapters only, and what a resumed run needs.

    The directory appears when it is complete. Every rank calls this. RunStopped where a parameter is no number.
    """
    model, tokenizer, partial = run.policy, run.tokenizer, directory.with_name(f".{directory.name}.part")
    check_finite(dict(model.named_parameters()))
    if is_main():
        remove_tree(partial)
    if adapters:
        gemma.save_adapters(model, partial, run.config.policy_model_config.model_path)
    else:
        model.save_pretrained(partial)
    if optimizer:
        gemma.save_safetensors(optimizer_tensors(model, optimizer), partial if is_main() else None, "optimizer")
    if is_main():
        save_tokenizer(tokenizer, model.config, partial)
        if state:
            write_json(partial / "trainer_state.json", state)
        remove_tree(directory)
        partial.rename(directory)


def remove_tree(path):
    """Remove a directory or file, if it is there; of a link only the link.

    It is renamed first: whenever the process is killed, all of it is there or nothing.
    """
    aside = path.with_name(f".{path.name}.old")
    for there in (os.path.lexists(path), False):  # first what was left there by a process that was killed
        if aside.is_symlink() or aside.is_file():
            aside.unlink()
        elif aside.exists():
            shutil.rmtree(aside)
        if there:
            path.rename(aside)


def save_tokenizer(tokenizer, config, directory):
    """Copy tokenizer.model and what transformers and vLLM look for beside it, or write what they need."""
    shutil.copyfile(tokenizer.path, directory / "tokenizer.model")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if tokenizer.path.with_name(name).is_file():
            shutil.copyfile(tokenizer.path.with_name(name), directory / name)
    if not tokenizer.config:
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        turns = [i for i in (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) if i is not None]
        # transformers 5 then follows tokenizer.model; its GemmaTokenizer takes a unigram for a BPE, and cuts 32 spaces
        settings = {"tokenizer_class": "TokenizersBackend", "add_bos_token": True}
        settings |= {key: tokenizer.sp.id_to_piece(i) for key, i in ids.items() if i is not None}
        settings["extra_special_tokens"] = [tokenizer.sp.id_to_piece(i) for i in turns]
        write_json(directory / "tokenizer_config.json", settings)
    if gemma.is_chat(tokenizer, config) and "chat_template" not in tokenizer.config:
        if not (directory / "chat_template.jinja").exists():
            shutil.copyfile(HERE / "configs" / "chat_template.jinja", directory / "chat_template.jinja")


def save_checkpoint(run, step):
    """All random draws are keyed by seed and step, so parameters, optimiser and step are the whole state."""
    training = run.config.training_config
    directory = Path(training.output_dir) / "checkpoints" / f"step-{step}"
    if step not in on_main(checkpoints, training.output_dir):  # else it is this very state: nothing to be replaced
        save_model(run, directory, run.optimizer, {"step": step, **run.state}, run.policy.lora is not None)
    if is_main() and training.save_total_limit:
        saved = checkpoints(training.output_dir)
        kept = [n for n in scores_of(training) if n in saved][:1] + list(saved)[-training.save_total_limit :]
        for n in saved.keys() - kept:
            remove_tree(saved[n])
    dist.barrier()


def checkpoints(output_dir):
    """{step: directory} of complete checkpoints, oldest first: those that hold what is written last."""
    found = [path.parent for path in (Path(output_dir) / "checkpoints").glob("step-*/trainer_state.json")]
    return dict(sorted((int(path.name[5:]), path) for path in found if path.name[5:].isdigit()))


def scores_of(training):
    """{step: what its evaluation said by metric_for_best_model}; the best first, of equals the later one."""
    key, rows = f"eval/{training.metric_for_best_model}", whole_rows(Path(training.output_dir) / "metrics.jsonl")
    found = {row["step"]: row[key] for row in rows if row.get(key) is not None}
    return dict(sorted(found.items(), key=lambda item: item[::-1], reverse=True))


def stopped(run, done, error):
    """The error of a run that stops after `done` steps, which are saved where they are sound."""
    said, training = str(error), run.config.training_config
    if isinstance(error, NotANumber):
        size, order = run.local * dist.get_world_size(), DataOrder(run.pairs, training.seed)
        lines = dict.fromkeys(run.pairs[order[i]].where for i in range(done * size, (done + 1) * size))
        said += f" in step {done + 1}, on {', '.join(lines)}"
    try:
        if done > run.start:
            save_checkpoint(run, done)
            said += "; saved"
    except RunStopped as unsound:
        said += f"; step {done} is not saved, since {unsound}"
    return RunStopped(f"{said}, --resume goes on from step {max(on_main(checkpoints, training.output_dir), default=0)}")


PAIR_FILES = {"records": ".jsonl", "vertex": ".vertex.jsonl", "trl": ".trl.jsonl"}  # form -> how its file ends
TRAINING_FILES = ("config.json", "metrics.jsonl", "eval_metrics.json", "eval_samples.jsonl", "rollouts.jsonl",
                  "report.html", "model", "adapter", "checkpoints")  # fmt: skip
WRITES = {  # the files of output_dir that a task writes, and removes in this order before it starts anew
    **dict.fromkeys(("act", "sft", "dpo"), TRAINING_FILES),
    "evaluate": ("eval_metrics.json", "eval_samples.jsonl", "report.html"),
    "generate_preference": tuple(name + ending for name in ("train", "validation") for ending in PAIR_FILES.values()),
}
MAY_CHANGE = {  # keys that a resumed run may have changed: how far, how often, on how many devices; not what is learnt
    "max_steps", "num_train_epochs", "eval_steps", "logging_steps", "save_steps", "save_total_limit", "output_dir",
    "metric_for_best_model", "load_best_model_at_end",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "dp_replicate_size",
    "gradient_checkpointing", "timeout", "concurrency", "max_retries", "max_failures", "base_url", "cache_path",
    "offload_for_generation", "batch_size",
}  # fmt: skip


def check_output(config, resume, overwrite):
    """May this run write to its output directory? Changes nothing. Returns the checkpoint to resume, "done", or None.

    Tasks evaluate and generate_preference replace what an earlier run of the same task left, and nothing else.
    """
    output, writes = Path(config.training_config.output_dir), (*WRITES[config.task], "config.json")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: output_dir is a file, expected a directory")
    if (output / ".lock").exists():
        lock(output)
    for key, source in flat(asdict(config)).items():
        at = Path(source).resolve() if key.endswith("_path") and source else None
        if at and any((output / name).resolve() in (at, at / "config.json", *at.parents) for name in writes):
            raise InputError(f"{key} {source}: this run would write over it, expected another output_dir than {output}")
    former = output / "config.json"
    held = next((name for name in writes if (output / name).exists()), None)
    if config.task not in ("act", "sft", "dpo"):
        task = read_json(former).get("task", "act") if former.exists() else None
        if held and task != config.task:
            found = f"a run of task {task!r}" if task else held
            raise InputError(f"{output}: holds {found}, expected another output_dir for task {config.task!r}")
        return None
    if held and not overwrite and not (resume and former.exists()):
        found, way = ("a run", "--resume to continue it or ") if former.exists() else (held, "")
        raise InputError(f"{output}: already holds {found}, expected {way}--overwrite to restart")
    return resume_from(output, config) if resume and former.exists() else None


def resume_from(output, config):
    """The newest checkpoint of the run in `output`, if that run learnt as this one does; "done" if it has ended."""
    former = output / "config.json"
    defaults, now, then = flat(asdict(Config())), flat(asdict(config)), flat(read_json(former))
    for key in then.keys() - now.keys():
        raise InputError(f"--resume: {former} has {key}, no key of this version, expected --overwrite to start again")
    then = defaults | then  # keys that are newer than that run had their defaults
    for key in (key for key in now if key.rpartition(".")[2] in INPUT_PATHS and then[key]):
        if Path(located(then[key])).absolute() == Path(now[key]).absolute():  # from another working directory
            then[key] = now[key]
    changed = [key for key, value in now.items() if then.get(key) != value]
    for key in changed:
        if key.rpartition(".")[2] not in MAY_CHANGE:
            raise InputError(f"--resume: {key} is {now[key]!r}, expected {then.get(key)!r} as in {former}")
    longer = {"training_config.max_steps", "training_config.num_train_epochs"} & set(changed)
    if (output / "model").exists() and not longer:
        return "done"
    checkpoint = next(reversed(checkpoints(output).values()), None)
    if (output / "model").exists() and not checkpoint:
        raise InputError(f"--resume: {output} holds a model but no checkpoint, expected --overwrite to start again")
    return checkpoint


def start_output(config, resume=False, overwrite=False, checkpoint=None):
    """Remove what a former run wrote and this one will write again: the first thing that a run changes on disk."""
    output = Path(config.training_config.output_dir)
    claim(output)
    if check_output(config, resume, overwrite) != checkpoint:
        raise InputError(f"{output}: another run has written to it meanwhile, expected to be the only one")
    for path in output.glob("checkpoints/.*"):  # left where a run was killed
        remove_tree(path)
    if checkpoint:  # what was logged after it will be logged again, and the model is no longer the last one
        step, logs = int(checkpoint.name[5:]), ("metrics.jsonl", "eval_samples.jsonl", "rollouts.jsonl")
        rows = {output / name: whole_rows(output / name) for name in logs if (output / name).exists()}
        remove_tree(output / "model")
        for path in rows:
            data.write_jsonl(path, [row for row in rows[path] if row["step"] <= step])
    else:
        for name in WRITES[config.task]:
            remove_tree(output / name)
    write_json(output / "config.json", asdict(config))


def claim(output):
    output.mkdir(parents=True, exist_ok=True)
    (output / ".lock").touch()
    lock(output)


HELD = []  # the file whose lock says that output_dir is this process's, as long as it lives


def lock(output):
    """Claim an output directory. Raises InputError where another process has it."""
    HELD[:] = [open(output / ".lock", "w")]  # which closes the last one
    try:
        fcntl.flock(HELD[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{output}: another run is writing to it, expected one at a time") from None
    except OSError as error:  # a file system without locks
        print0(f"{output}: a second run at once would not be noticed here ({error.strerror})")


def whole_rows(path):
    """The rows of a JSONL file that a killed run may have left with half a line at its end."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]  # the half line may end in half a character
    try:
        return [row for row in map(json.loads, lines[:-1]) if isinstance(row["step"], int)]
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: a line is not an object with a step, expected what a run wrote") from None


# ----------------------------------------------------------------------------------------------------------------------
# Helper models
# Who plays ACT's roles (data.ROLES): a rule, a local Gemma, or a model behind a server. A back end is a function
# ask(prompts) -> answers, each a text or None; a new one goes into `build_helpers`.

COUNTED = ("asked", "cached", "retried", "failed", "blocked", "unusable")  # failed: given up; blocked: or empty;
HELPER_COUNTS = Counter()  # of these, since the start                         unusable: not understood
COUNTS_LOCK = threading.Lock()


class RunStopped(RuntimeError):
    """The run cannot go on: one line, for the user. It saves and stops."""


class NotANumber(RunStopped):
    """A loss, a log-probability or a gradient is infinite or NaN."""


class HelperError(RunStopped):
    """A helper model cannot be used any longer."""


def count(what, number=1):
    with COUNTS_LOCK:  # calls run in threads
        HELPER_COUNTS[what] += number


@dataclass(frozen=True)
class Helpers:
    """The roles: functions from lists to lists. None where a helper model failed, which rules never do."""

    classify_actions: Any  # [response] -> [CLARIFY | ANSWER | None]
    summarize_intents: Any  # [Pair] -> [text | None]
    simulate_users: Any  # [(Pair, trajectory, intent)] -> [text | None]
    write_questions: Any  # [(Pair, examples: [Pair])] -> [text | None]
    judge_answers: Any = None  # [(Pair, answer)] -> [1.0 | 0.0 | None], where data_config.heuristic is "judge"
    cost: bool = False  # whether any of them is a model, whose calls are worth counting

    def answers(self, pairs, heuristic):
        """What `in_lockstep` may ask for besides the policy's responses, about these pairs."""

        def score(rows, trajectories):
            ends = [(pairs[row], trajectory[-1][1]) for row, trajectory in zip(rows, trajectories, strict=True)]
            if heuristic == "judge":
                return [None if right is None else (right, right) for right in self.judge_answers(ends)]
            return [score_of(HEURISTICS[heuristic], pair, answer, pair.target) for pair, answer in ends]

        classify = self.classify_actions
        return {"classify": lambda rows, texts: classify(texts), "simulate": self.users_of(pairs), "score": score}

    def label_actions(self, replies):
        """Actions of gold replies, which need one in any case: the rule decides where the model fails."""
        actions = zip(self.classify_actions(replies), data.rule_actions(replies), strict=True)
        return [action or rule for action, rule in actions]

    def users_of(self, pairs):
        """`simulate` of `in_lockstep` for these pairs: each user's intent is summarised once, when first asked."""
        intents = {}

        def simulate(rows, trajectories):
            new = [row for row in rows if row not in intents]
            intents.update(zip(new, self.summarize_intents([pairs[row] for row in new]) if new else [], strict=True))
            known = {
                row: (pairs[row], trajectory, intents[row])
                for row, trajectory in zip(rows, trajectories, strict=True)
                if intents[row] is not None  # a user whose intent could not be summarised says nothing
            }
            replies = self.simulate_users(list(known.values())) if known else []
            replies = dict(zip(known, replies, strict=True))
            return [replies.get(row) for row in rows]

        return simulate


def build_helpers(config):
    """The roles as the configuration casts them; a checkpoint that several share is loaded once."""
    load = cache(lambda path: load_helper(config, path))

    def cast(name):
        helper, role = getattr(config, name), ROLES[name]
        backend = backend_of(helper)
        labels = name in ("action_model_config", "preference_model_config")
        if backend == "rule" or (config.task == "generate_preference" and not labels):
            return role.rule
        needed = "model_path" if backend == "gemma" else "model_id"
        if not getattr(helper, needed):
            raise InputError(f"{name}.{needed} is missing, backend '{backend}' needs it")
        prompt = read_prompt(helper.prompt_path or located(f"configs/prompts/{role.prompt}"), role)
        if backend == "gemma":
            return played(gemma_asker(*load(helper.model_path), helper), role, prompt, helper.max_failures)
        client = GeminiClient if backend == "gemini" else OpenAIClient
        return played(client(helper, role.stop), role, prompt, helper.max_failures)

    user_is_rule = backend_of(config.user_simulator_config) == "rule"  # it knows the gold trajectory and no intent
    return Helpers(
        cast("action_model_config"),
        data.rule_intents if user_is_rule else cast("intent_model_config"),
        cast("user_simulator_config"),
        cast("preference_model_config"),
        cast("judge_model_config"),
        cost=any(backend_of(getattr(config, name)) != "rule" for name in ROLES),
    )


def backend_of(helper):
    return helper.backend or ("gemini" if helper.model_id else "rule")


def read_prompt(path, role):
    """What a model is told in a role, with {names} in it. Raises InputError."""
    try:
        prompt = data.read_bytes(path).decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8, expected the text of a prompt") from None
    missing = [name for name in role.names if f"{{{name}}}" not in prompt]
    if missing:
        raise InputError(f"{path}: lacks {{{missing[0]}}}, expected a prompt with {', '.join(map(repr, role.names))}")
    return prompt


def played(ask, role, prompt, max_failures=20):
    """A role: requests -> results, None where the model gave nothing usable; HelperError if that goes on and on."""
    in_a_row = 0

    def filled(request):
        texts = role.fields(request)
        return re.sub(r"\{(\w+)\}", lambda name: texts.get(name[1], name[0]), prompt)  # one pass: texts may hold {}

    def play(requests):
        answers = ask([filled(request) for request in requests])
        results = [None if answer is None else role.parse(answer) for answer in answers]
        nonlocal in_a_row
        for result, answer in zip(results, answers, strict=True):
            unusable = result is None and answer is not None
            count("unusable", unusable)
            in_a_row = in_a_row + 1 if unusable else 0 if answer is not None else in_a_row
            if in_a_row >= max_failures:
                raise HelperError(f"{in_a_row} answers to {role.prompt} in a row were of no use, like {answer[:80]!r}")
        return results

    return play


def load_helper(config, path):
    """(model, tokenizer) of a checkpoint, whole on this rank's device, in the precision that the policy computes in."""
    directory = Path(config.policy_model_config.model_path if path == "reference" else path)
    dtype = torch.bfloat16 if config.training_config.bf16 else getattr(torch, config.policy_model_config.dtype)
    tokenizer = Tokenizer(directory / "tokenizer.model")
    model = Gemma.from_pretrained(directory, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    gemma.check_vocabulary(tokenizer, model)
    return model.requires_grad_(False), tokenizer


def gemma_asker(model, tokenizer, config):
    """ask(prompts) with a local checkpoint: in its chat template where its vocabulary has one, else as a continuation.

    An answer depends on its prompt alone, not on the batch: what is random is drawn from a generator keyed by it.
    """
    template = Template(tokenizer, "plain" if tokenizer.end_of_turn_id is None else "gemma")
    before, after = [tokenizer.bos_id], []
    if not template.plain:
        before, after = before + template.turn("user"), template.end + template.newline + template.opening
    room = max(1, model.config.max_position_embeddings - config.max_new_tokens - len(before) - len(after))

    def continued(prompts):
        seeds = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big") for prompt in prompts]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        tokens = [before + tokenizer.encode(prompt)[-room:] + after for prompt in prompts]  # too long: without its head
        sampling = {"stop_ids": template.stop_ids, "generator": generators}
        answers = generate(model, tokens, config.max_new_tokens, config.temperature, **sampling)
        return [tokenizer.decode(answer).strip() for answer in answers]

    def ask(prompts):
        new, answers = list(dict.fromkeys(prompts)), {}
        for start in range(0, len(new), config.batch_size):
            batch = new[start : start + config.batch_size]
            answers.update(zip(batch, continued(batch), strict=True))
        count("asked", len(new))
        return [answers[prompt] for prompt in prompts]

    return ask


FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a call is tried again: at most, and however often it has failed
UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, RecursionError, OverflowError)  # of a strange reply
HARMS = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")


class HelperClient:
    """ask(prompts) over HTTP: calls run side by side, are tried again where that may help, and are paid only once.

    stop: texts at which an answer ends. None stands for an answer that was blocked, empty, or not to be had in
    max_retries + 1 calls. Raises HelperError where the server refuses a request as such, and when max_failures calls in
    a row led to None; the client is then spent. URL, key, headers, body and answer are those of the dialects below.
    """

    def __init__(self, config, stop=()):
        self.config, self.stop = config, list(stop)
        base = config.base_url or self.home
        try:
            address = urlsplit(base)
            fits = address.scheme in ("http", "https") and address.hostname and address.port != 0
        except ValueError:  # "http://[::1", "http://host:port"
            fits = False
        if not fits or re.search("[?#@]", base):
            raise InputError("base_url of a helper model: expected http(s)://HOST, with none of '?', '#' and '@'")
        self.key = os.environ.get(self.key_name, "").strip()
        if not re.fullmatch("[!-~]*", self.key) or not (self.key or (config.base_url and self.key_is_optional)):
            problem = "holds a blank or a character beyond ASCII" if self.key else "is not set"
            raise InputError(f"{self.key_name} {problem}, expected the key for helper model {config.model_id!r}")
        self.url, self.cache = base.rstrip("/") + self.path(), answer_cache(config.cache_path)
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

    def cache_key(self, prompt):
        request = json.dumps([self.url, self.body(prompt)], sort_keys=True)
        return hashlib.sha256(request.encode()).hexdigest()

    def answer(self, prompt):
        """The answer to one prompt, stored as soon as it is there, or None; runs in a thread of its own."""
        text, outcome = None, "failed"
        for attempt in range(self.config.max_retries + 1):
            if self.spent.is_set() or ASKED:
                raise HelperError(self.error)
            try:
                text, why = self.call(prompt)
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
                requests = f"{self.in_a_row} requests to {self.config.model_id} in a row"
                self.give_up(f"{requests} failed, the last one with: {why}")
        return text

    def give_up(self, message):
        if not self.spent.is_set():
            self.error = message
        self.spent.set()
        raise HelperError(message)

    def call(self, prompt):
        """One POST: (text, "") or (None, why there is none). Raises CallFailed. The key is in neither, even echoed."""
        headers = {"Content-Type": "application/json", **self.headers()}
        request = urllib.request.Request(self.url, json.dumps(self.body(prompt)).encode(), headers)
        try:
            with OPENER.open(request, timeout=self.config.timeout) as response:
                text, why = self.text_of(json.loads(self.read(response)))
                text = text.encode("utf-8", "replace").decode()  # half of a character becomes "?"
        except urllib.error.HTTPError as error:
            raise self.http_failure(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise CallFailed(self.one_line(getattr(error, "reason", error) or type(error).__name__)) from None
        except UNREADABLE:
            raise CallFailed("its reply is not the JSON of an answer") from None
        if not text.strip():
            return None, self.one_line(why)
        return self.masked(text), ""

    def http_failure(self, error):
        """CallFailed for an HTTP status: 408, 429, 5xx may pass. The wait is Retry-After's, or Google's RetryInfo's."""
        message, waits = error.reason, [error.headers.get("Retry-After", "")]
        try:
            with error:
                report = json.loads(self.read(error))["error"]
            message = report if isinstance(report, str) else report["message"]
            waits += [str(detail.get("retryDelay", ""))[:-1] for detail in report.get("details", [])]  # "27s"
        except (OSError, http.client.HTTPException, CallFailed, *UNREADABLE):
            pass  # the status says enough
        wait = max((float(text) for text in waits if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text)), default=0.0)
        final = error.code < 500 and error.code not in (408, 429)
        return CallFailed(self.one_line(f"HTTP {error.code}: {message}"), wait, final)

    def read(self, response, limit=4_000_000):
        """The bytes of a reply, a bounded number of them. Raises CallFailed."""
        body = b""
        while chunk := response.read1(65536):
            body += chunk
            if len(body) > limit:
                raise CallFailed("its reply is too long")
        if getattr(response, "length", None):  # what Content-Length promised and did not come
            raise CallFailed("its reply breaks off")
        return body

    def one_line(self, message):
        """What a server said, without what a terminal would obey."""
        words = "".join(c if c.isprintable() else " " for c in self.masked(str(message))).split()
        return self.masked(" ".join(words))[:300]

    def masked(self, text):
        """Without the key, as it is or %-encoded, line breaks and blanks in it or not."""
        for key in filter(None, dict.fromkeys((self.key, quote(self.key, safe="")))):
            text = re.sub(r"\s*".join(map(re.escape, key)), "[key]", text)
        return text


class GeminiClient(HelperClient):
    """Google's generateContent."""

    home, key_name, key_is_optional = "https://generativelanguage.googleapis.com", "GOOGLE_API_KEY", False

    def path(self):
        return f"/v1beta/models/{quote(self.config.model_id)}:generateContent"

    def headers(self):
        return {"x-goog-api-key": self.key}

    def body(self, prompt):
        temperature, length = self.config.temperature, self.config.max_new_tokens
        sampling = {"temperature": temperature, "topP": 1.0, "topK": 40 if temperature else 1}
        return {
            "contents": [{"role": "user", "parts": [{"text": prompt}]}],
            "generationConfig": {**sampling, "maxOutputTokens": length, "stopSequences": self.stop},
            "safetySettings": [{"category": f"HARM_CATEGORY_{harm}", "threshold": "BLOCK_NONE"} for harm in HARMS],
        }

    def text_of(self, reply):
        """(text, why there is none) of a reply's JSON."""
        blocked = (reply.get("promptFeedback") or {}).get("blockReason")
        if blocked or not reply.get("candidates"):
            return "", f"prompt blocked ({blocked})" if blocked else "no candidates"
        candidate = reply["candidates"][0]
        finish = candidate.get("finishReason", "STOP")
        parts = (candidate.get("content") or {}).get("parts") or []
        text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
        return text if finish in ("STOP", "MAX_TOKENS") else "", f"no text (finishReason {finish})"


class OpenAIClient(HelperClient):
    """OpenAI's chat completions, which vLLM, Ollama, llama.cpp and LM Studio speak too: these may do without a key."""

    home, key_name, key_is_optional = "https://api.openai.com/v1", "OPENAI_API_KEY", True

    def path(self):
        return "/chat/completions"

    def headers(self):
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def body(self, prompt):
        sampling = {"temperature": self.config.temperature, "max_tokens": self.config.max_new_tokens}
        messages = [{"role": "user", "content": prompt}]
        return {"model": self.config.model_id, "messages": messages, **sampling, "stop": self.stop}

    def text_of(self, reply):
        """(text, why there is none) of a reply's JSON."""
        choice = reply["choices"][0] if reply.get("choices") else {}
        finish = choice.get("finish_reason") or "stop"
        text = (choice.get("message") or {}).get("content") or ""
        return text if finish in ("stop", "length") else "", f"no text (finish_reason {finish})"


class CallFailed(Exception):
    """One call brought no answer. wait: seconds for which the server asks; final: the same call can only fail again."""

    def __init__(self, message, wait=0.0, final=False):
        super().__init__(message)
        self.wait, self.final = wait, final


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the key on to wherever a redirect points."""

    def redirect_request(self, *_):
        return None


class TimedReply(http.client.HTTPResponse):
    """A reply that must have come, to its end, within the timeout: http.client grants as much to each piece of it."""

    def __init__(self, connection, *arguments, **options):
        super().__init__(connection, *arguments, **options)
        stream, deadline = self.fp.raw, time.monotonic() + connection.gettimeout()

        def readinto(buffer):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            connection.settimeout(left)
            return type(stream).readinto(stream, buffer)

        stream.readinto = readinto


class Timed:
    def do_open(self, connect, request, **options):
        def connected(*arguments, **more):
            connection = connect(*arguments, **more)
            connection.response_class = TimedReply
            return connection

        return super().do_open(connected, request, **options)


class TimedHTTP(Timed, urllib.request.HTTPHandler):
    pass


class TimedHTTPS(Timed, urllib.request.HTTPSHandler):
    pass


OPENER = urllib.request.build_opener(NoRedirects, TimedHTTP, TimedHTTPS)


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
        """The first row of the result. Each statement is a transaction of its own, and waits for other processes."""
        if not self.path:
            return None
        with self.lock:
            try:
                if self.connection is None:
                    options = {"timeout": 60, "isolation_level": None, "check_same_thread": False}
                    self.connection = sqlite3.connect(self.path, **options)
                    self.connection.execute("PRAGMA synchronous = OFF")  # safe from kill -9, and 100 times as fast
                    table = "answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"
                    self.connection.execute(f"CREATE TABLE IF NOT EXISTS {table}")
                return self.connection.execute(statement, values).fetchone()
            except (sqlite3.Error, MemoryError) as error:  # execution_match bounds the memory of all sqlite
                raise HelperError(f"{self.path}: not usable as the cache of helper models ({error})") from None


answer_cache = cache(AnswerCache)  # one connection to a file, whichever roles share it


# ----------------------------------------------------------------------------------------------------------------------
# Other tasks and the command line
# What `act.py` does besides training, and how it is told what to do.


def evaluate(config, overwrite=False, resume=False):
    """Task evaluate: the metrics of policy_model_config.model_path on data_config.validation_path."""
    training, source, device = config.training_config, config.policy_model_config.model_path, start_processes()
    on_main(check_output, config, resume, overwrite)
    tokenizer = Tokenizer(Path(source) / "tokenizer.model")
    template, helpers = Template(tokenizer, config.data_config.prompt_format), build_helpers(config)
    _, pairs = load_pairs(config, helpers, template)
    if not pairs:
        path = config.data_config.validation_path or config.data_config.train_path
        raise InputError(f"{path}: holds no turn with a complete answer to evaluate")
    dtype = getattr(torch, config.policy_model_config.dtype)
    policy, mesh = config.policy_model_config, make_mesh(device, training.dp_replicate_size)
    lora = lora_config(policy) if policy.adapter_path else None  # new adapters, of lora_r, would change nothing
    model = build_model(source, mesh, dtype, trainable=False, lora=lora, start=policy.adapter_path)
    gemma.check_vocabulary(tokenizer, model)
    on_main(claim, Path(training.output_dir))  # what an earlier evaluation left stays until there is another
    metrics, samples = evaluate_pairs(model, template, pairs, helpers, config)
    on_main(start_output, config, resume, overwrite)
    on_main(write_evaluation, Path(training.output_dir), metrics, samples)
    for name, value in metrics.items():
        print0(f"{name:50} {'-' if value is None else round(value, 4)}")


def generate_preference(config, overwrite=False, resume=False):
    """Task generate_preference: conversations in, files of pairs out (Algorithm 1), in output_dir."""
    start_processes()
    on_main(check_output, config, resume, overwrite)
    both = load_pairs(config, build_helpers(config))
    if not any(both):
        raise InputError(f"{config.data_config.train_path}: holds no turn with a complete answer")
    on_main(start_output, config, resume, overwrite)
    for name, pairs in zip(("train", "validation"), both, strict=True):
        start = str(Path(config.training_config.output_dir) / name)
        paths = {form: start + ending for form, ending in PAIR_FILES.items()}
        if pairs and is_main():
            for form, path in paths.items():
                data.write_preferences(path, pairs, form)
            print0(f"{len(pairs)} pairs: {paths['records']}; to tune Gemini {paths['vertex']}; for TRL {paths['trl']}")


TASKS = {"act": train, "sft": train, "dpo": train, "evaluate": evaluate, "generate_preference": generate_preference}
TASK_HELP = {
    "act": "train on pairs that are sampled from the policy as it is (Algorithm 2)",
    "sft": "train on the gold replies",
    "dpo": "train on the pairs of Algorithm 1, nothing sampled",
    "evaluate": "the metrics of policy_model_config.model_path on data_config.validation_path",
    "generate_preference": "write the pairs of Algorithm 1, for Gemini, TRL and other programs too",
}
USAGE = "expected --config FILE, --task NAME, --section.key VALUE, --resume or --overwrite"


def parse_arguments(arguments):
    """(config path, overrides, flags) of --config FILE [--task T] [--section.key VALUE ...] [--resume|--overwrite]."""
    overrides, flags, rest = {}, set(), list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("-h", "--help"):
            print(help_text())
            raise SystemExit(0)
        if not word.startswith("--"):
            raise InputError(f"{word!r}: {USAGE}")
        if name in ("resume", "overwrite"):
            if equals:
                raise InputError(f"{word}: --{name} takes no value")
            flags.add(name)
            continue
        near = get_close_matches(name, ("resume", "overwrite", "config"), 1, 0.75)
        if near and name != "config":
            raise InputError(f"{word}: unknown, did you mean --{near[0]}?")
        if not equals and (not rest or rest[0].startswith("--")):
            raise InputError(f"--{name}: a value is missing")
        overrides[name] = value if equals else rest.pop(0)
    path = overrides.pop("config", None)
    if path is None:
        raise InputError("--config FILE is missing")
    if len(flags) == 2:
        raise InputError("--resume and --overwrite: expected one of them")
    return path, overrides, flags


def help_text():
    """The header's commands, the tasks, the flags, and every key as the dataclasses above give it."""
    tasks = [f"  {name:20} {about}" for name, about in TASK_HELP.items()]
    lines = [__doc__.partition("Reading order")[0].rstrip(), "", "tasks (--task NAME):", *tasks, "", "flags:"]
    lines += ["  --resume             go on from the newest checkpoint of output_dir"]
    lines += ["  --overwrite          start again in an output_dir that holds a run"]
    sections = {}  # the helpers have the same keys
    for name, kind in get_type_hints(Config).items():
        sections.setdefault(kind, []).append(name)
    for kind, names in list(sections.items())[1:]:
        body = [line.removeprefix("  ") for line in inspect.getsource(kind).splitlines()[2:]]
        lines += ["", f"--{', '.join(names)}:", *body]
    return "\n".join(lines)


def main(arguments=None):
    """Run what the command line says; returns the exit status."""
    config = None
    try:
        path, overrides, flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        config = load_config(path, overrides)
        if "resume" in flags and TASKS[config.task] is not train:
            raise InputError(f"--resume: task '{config.task}' has nothing to resume")
        TASKS[config.task](config, "overwrite" in flags, "resume" in flags)
        dist.destroy_process_group()
    except (InputError, OSError, SafetensorError) as error:  # OSError: of a full or read-only disk, say
        rank = int(os.environ.get("LOCAL_RANK", 0))
        if rank:  # mostly the same error on all ranks: the first says it, and torchrun ends the others meanwhile
            time.sleep(2)
        print(f"act.py: error: {error}" + (f" (local rank {rank})" if rank else ""), file=sys.stderr, flush=True)
        return 2
    except RunStopped as error:
        if is_main():
            print(f"act.py: stopped: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        saved = checkpoints(config.training_config.output_dir) if config else []
        if is_main():
            hint = f"; --resume goes on from step {max(saved)}" if saved else ""
            print(f"\nact.py: interrupted{hint}", file=sys.stderr, flush=True)
        return 130
    finally:
        heed_signals(False)
        HELD.clear()
        if dist.is_initialized() and dist.get_world_size() == 1:  # with more it could wait for ranks that wait for it
            dist.destroy_process_group()
    return 0


def run_as_program():
    """main(), and the end of the process with what it returns as exit status."""
    data.speak_plainly()
    try:
        status = main()
    except Exception:  # nobody foresaw it: here is its traceback; Python's own way out could wait for other ranks
        traceback.print_exc()
        status = 1
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # calls in flight are paid for: they end, and their answers are kept, unless it was Ctrl-C that ended the run
    for thread in threading.enumerate() if status != 130 else ():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: gloo's threads can drop tensors while the interpreter shuts down, destroy_process_group or not, and
    # that aborts a process which has finished (seen with torch 2.13 and a replicated mesh, in up to one run of three).
    os._exit(status)


if __name__ == "__main__":
    run_as_program()
