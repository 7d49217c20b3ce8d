"""Conversations, preference pairs and metrics.

The method, in reading order:
    Conversations     `read_vertex_jsonl`: what a conversation and its messages are
    Pairs             `Pair`: one user turn and the two ways of going on that the loss compares
    Algorithm 1       `ACTDataset`: every user turn becomes a pair (arXiv 2406.00222)
Rooms to enter when you change what stands in them:
    Checks            what is wrong with a file of conversations
    Files of pairs    records of the published code, Vertex AI's and TRL's lines <-> pairs
    Metrics           DROP F1, CoQA F1, exact match, rows of SQL queries, F1 of actions
    Helper roles      what a helper model is told, how it is read; rules that need no model
    Converters        published datasets -> Vertex JSONL
    JSON              an address in every error, files renamed into place

    python data.py check FILE.jsonl [--config CONFIG.json]
    python data.py pacific IN.json OUT.jsonl
    python data.py abg_coqa IN.json OUT.jsonl
    python data.py spider IN.json DATABASES OUT.jsonl
    python data.py vertex_preferences IN.jsonl OUT.jsonl
    python data.py trl_preferences IN.jsonl OUT.jsonl
"""

import argparse
import json
import math
import os
import random
import re
import sqlite3
import string
import sys
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

CLARIFY, ANSWER = "CLARIFY", "ANSWER"  # the paper's actions: ask a clarifying question, or answer
OTHER = {CLARIFY: ANSWER, ANSWER: CLARIFY}
INSTRUCTION = "Answer the user's question, or ask a clarifying question if it is ambiguous."


class InputError(ValueError):
    """Something the user gave is wrong: one line with where, what was found, what was expected."""


# --------------------------------------------------------------------------------------------------
# Conversations


def read_vertex_jsonl(path):
    """Reads either of Vertex AI's two forms of conversation, one a line. Raises InputError.

    Returns a list of {"messages": [{"role": "system" | "user" | "model", "content": str}],
    "where": "train.jsonl:17"}. System only comes first; a user message has
    "requires_clarification": bool, the gold action of the reply, where the file says so. Texts are
    left as they are.
    """
    conversations = parse_lines(path, parse_conversation)
    if not conversations:
        raise InputError(f"{path}: holds no conversation, expected at least one line of JSON")
    return conversations


def parse_conversation(row, where):
    """One line of either form. `where`: its address, "train.jsonl:17", with which errors begin."""
    forms = [key for key in ("messages", "contents") if key in row]
    if len(forms) != 1:
        found = " and ".join(forms) or "neither messages nor contents"
        is_pair = any(key in row for key in ("completions", "input_text", "chosen"))
        hint = " (a file of pairs? then set training_config.is_preference)" if is_pair else ""
        raise InputError(f"{where}: has {found}, expected either messages or contents{hint}")
    [form] = forms
    systems = [key for key in ("systemInstruction", "system_instruction") if key in row]
    if len(systems) > 1:
        raise InputError(f"{where}: has {' and '.join(systems)}, expected one of them")
    messages = [
        {"role": "system", "content": parts_text(row[key], f"{where}: {key}")} for key in systems
    ]
    for i, turn in enumerate(require(row, form, f"{where}: ", list)):
        system_allowed = form == "messages" and i == 0 and not systems
        messages.append(parse_turn(turn, f"{where}: {form}[{i}]", form, system_allowed))
    if all(message["role"] != "user" for message in messages):
        raise InputError(f"{where}: {form} has no user turn, expected at least one")
    return {"messages": messages, "where": where}


def parse_turn(turn, where, form, system_allowed=False):
    """One message of either form -> {"role", "content"} and perhaps "requires_clarification"."""
    role = require(turn, "role", where, str)
    role = "model" if role == "assistant" else role
    if role not in ("user", "model") and not (role == "system" and system_allowed):
        only_first = " (system only comes first)" if role == "system" else ""
        raise InputError(f"{where} has role {role!r}, expected 'user' or 'model'{only_first}")
    text = require(turn, "content", where, str) if form == "messages" else parts_text(turn, where)
    if role == "user" and not text.strip():
        raise InputError(f"{where} is a user turn without text")
    message = {"role": role, "content": text}
    for key in turn.keys() - {"role", "content", "parts", "requires_clarification"}:
        if get_close_matches(key, ["requires_clarification"], 1, 0.8):
            raise InputError(f"{where} has {key!r}, expected 'requires_clarification'")
    if "requires_clarification" in turn:
        if role != "user":
            problem = f"has requires_clarification and role {role!r}, expected it on user turns"
            raise InputError(f"{where} {problem}")
        message["requires_clarification"] = require(turn, "requires_clarification", where, bool)
    return message


def parts_text(content, where):
    """The text of {"parts": [{"text": ...}, ...]}, joined without a separator, as Vertex does."""
    texts = []
    for i, part in enumerate(require(content, "parts", where, list)):
        at = f"{where}.parts[{i}]"
        other = sorted(set(expect(part, at, dict)) - {"text"})
        if other:
            raise InputError(f"{at} has {other[0]!r}, expected 'text' alone (text only is known)")
        texts.append(require(part, "text", at, str))
    return "".join(texts)


# --------------------------------------------------------------------------------------------------
# Pairs


@dataclass
class Pair:
    """One user turn and two ways of going on. A message is (role, text), role "user" or "model".

    Texts are what the file says, line breaks included, from here to the tokens and to every file.
    """

    context: str  # what the system message says: paragraphs, tables
    history: list  # messages, the last by the user; with the context: the prompt p
    action: str  # a: the gold action
    chosen: list  # y_w: messages of the winning trajectory
    rejected: list  # y_l: messages of the losing one
    gold: list  # messages of the gold trajectory
    target: str  # g: the gold final answer
    instruction: str = INSTRUCTION  # stands before the context in prompt format "plain"
    where: str = ""  # the line it comes from
    cut: bool = False  # `rejected` breaks off where the policy ran out of tokens


def dialogues(pairs):
    """Index lists of consecutive pairs of one dialogue: each history goes on from the last."""
    groups = []
    for i, pair in enumerate(pairs):
        before = pairs[i - 1] if i else pair
        goes_on = pair.history[: len(before.history)] == before.history
        if i and goes_on and pair.context == before.context:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


# --------------------------------------------------------------------------------------------------
# Algorithm 1


class ACTDataset:
    """The paper's Algorithm 1: a Pair for every user turn of the conversations.

    dataset            as `read_vertex_jsonl` gives them; with is_preference the finished pairs of
                       `read_preferences`, which are only balanced here
    target_label       CLARIFY: the action that the preference model shows where answering is right
    icl_examples       how many examples of such questions the preference model sees (at least one)
    preference_model   [(Pair, examples: [Pair])] -> [question]; None: the data's own questions
    class_balance      None, or e.g. {"CLARIFY": 2, "ANSWER": 1}: multiples of each action's pairs
    action_model       [reply] -> [action], for turns without a label; None: `rule_actions`

    After `prepare_datasets`: `skipped`, the addresses of turns without an answer in the data;
    `labelled`, how many turns got their action from action_model. Raises InputError.
    """

    def __init__(self, dataset, target_label, icl_examples, preference_model=None,
                 class_balance=None, is_preference=False, action_model=None, seed=0):  # fmt: skip
        if target_label != CLARIFY:
            raise InputError(f"target_label is {target_label!r}, expected {CLARIFY!r}")
        if type(icl_examples) is not int or icl_examples < 0:
            raise InputError(f"icl_examples is {icl_examples!r}, expected a whole number from 0")
        for action, multiple in expect(class_balance or {}, "class_balance", dict).items():
            if action not in OTHER:
                raise InputError(f"class_balance names {action!r}, expected CLARIFY or ANSWER")
            if type(multiple) not in (int, float) or not math.isfinite(multiple) or multiple < 0:
                problem = f"is {multiple!r}, expected a number from 0"
                raise InputError(f"class_balance[{action!r}] {problem}")
        self.dataset, self.is_preference, self.seed = dataset, is_preference, seed
        self.icl_examples, self.class_balance = max(1, icl_examples), class_balance or {}
        self.preference_model = preference_model or rule_questions
        self.action_model = action_model or rule_actions
        self.skipped, self.labelled, self.pairs = [], 0, None

    def __len__(self):
        return len(self.prepare_datasets() if self.pairs is None else self.pairs)

    def __getitem__(self, i):
        return (self.prepare_datasets() if self.pairs is None else self.pairs)[i]

    def prepare_datasets(self):
        """The pairs, in the order of the data; the turns of a dialogue stay together."""
        self.pairs = self.balance(self.dataset if self.is_preference else self.turns())
        return self.pairs

    def turns(self):
        pairs, owners, self.skipped = [], [], []
        for owner, messages in enumerate(self.labelled_messages()):
            where = self.dataset[owner].get("where", f"conversation {owner + 1}")
            new = turn_pairs(messages, where, self.skipped)
            pairs += new
            owners += [owner] * len(new)
        self.reject_questions(pairs, owners)
        return pairs

    def labelled_messages(self):
        """The messages of each conversation, user turns labelled with the action of their reply."""
        conversations = [[dict(message) for message in row["messages"]] for row in self.dataset]
        turns, replies = [], []
        for messages in conversations:
            for turn, reply in zip(messages, messages[1:], strict=False):
                answered = turn["role"] == "user" and reply["role"] == "model"
                if answered and "requires_clarification" not in turn:
                    turns.append(turn)
                    replies.append(reply["content"])
        actions = self.action_model(replies) if replies else []
        assert len(actions) == len(turns) and set(actions) <= set(OTHER), (len(turns), actions)
        for turn, action in zip(turns, actions, strict=True):
            turn["requires_clarification"] = action == CLARIFY
        self.labelled = len(turns)
        return conversations

    def reject_questions(self, pairs, owners):
        """Where answering is right, a question becomes `rejected`; owners: whose each is."""
        pool = [i for i, pair in enumerate(pairs) if pair.action == CLARIFY]
        # ascending: the examples of a conversation are one range of the pool
        pool_owners = [owners[i] for i in pool]
        requests = []
        for i, pair in enumerate(pairs):
            if pair.action == ANSWER:
                own = bisect_left(pool_owners, owners[i]), bisect_right(pool_owners, owners[i])
                drawn = self.draw_examples(len(pool), *own, random.Random(f"{self.seed}/{i}"))
                requests.append((pair, [pairs[pool[k]] for k in drawn]))
        questions = self.preference_model(requests) if requests else []
        rules = rule_questions(requests)
        for (pair, _), question, rule in zip(requests, questions, rules, strict=True):
            useless = ([], pair.chosen[0][1].split())  # two equal sides would teach nothing
            asked = (text for text in (question or "", rule) if text.split() not in useless)
            pair.rejected = [("model", next(asked, FALLBACK_QUESTION))]

    def draw_examples(self, size, start, stop, rng):
        """Positions in a pool of `size`; those from start to stop only where others run out."""
        own = stop - start
        count = min(self.icl_examples, size - own)
        drawn = [k if k < start else k + own for k in rng.sample(range(size - own), count)]
        return drawn + rng.sample(range(start, stop), min(self.icl_examples - count, own))

    def balance(self, pairs):
        """Draws round(multiple * count) pairs of an action, with replacement; the order stays."""
        if not self.class_balance:
            return list(pairs)
        kept = [i for i, pair in enumerate(pairs) if pair.action not in self.class_balance]
        for action, multiple in self.class_balance.items():
            indices = [i for i, pair in enumerate(pairs) if pair.action == action]
            rng = random.Random(f"{self.seed}/class_balance/{action}")
            kept += rng.choices(indices, k=round(multiple * len(indices))) if indices else []
        return [pairs[i] for i in sorted(kept)]


def turn_pairs(messages, where, skipped):
    """A Pair for every user turn that is answered in the end; addresses of others go to `skipped`.

    The `rejected` of an ANSWER turn is left empty: a preference model writes it.
    """
    context = messages[0]["content"] if messages[0]["role"] == "system" else ""
    messages = [message for message in messages if message["role"] != "system"]
    said = [(message["role"], message["content"]) for message in messages]
    pairs = []
    for i, message in enumerate(messages):
        if message["role"] != "user":
            continue
        end = answer_index(messages, i)
        if end is None:
            skipped.append(f"{where}: user turn {sum(role == 'user' for role, _ in said[: i + 1])}")
            continue
        action = CLARIFY if message["requires_clarification"] else ANSWER
        gold = said[i + 1 : end + 1]  # [question, the user's reply, ...] answer
        rejected = gold[-1:] if action == CLARIFY else []  # answering at once
        history, target = said[: i + 1], gold[-1][1]
        pairs.append(Pair(context, history, action, gold, rejected, gold, target, where=where))
    return pairs


def answer_index(messages, i):
    """Where the gold trajectory of the user turn `i` ends: at its first answer, or None."""
    while [message["role"] for message in messages[i : i + 2]] == ["user", "model"]:
        if not messages[i + 1]["content"].strip():
            return None
        if not messages[i]["requires_clarification"]:
            return i + 1
        i += 2  # that reply asked; the user's answer to it comes next
    return None


def random_actions(pairs, seed):
    """A coin's action for each turn; if it is not the gold one, the sides swap (ablation)."""
    drawn = []
    for i, pair in enumerate(pairs):
        swapped = {"action": OTHER[pair.action], "chosen": pair.rejected, "rejected": pair.chosen}
        coin = random.Random(f"{seed}/random_actions/{i}").random() < 0.5
        drawn.append(replace(pair, **swapped) if coin else pair)
    return drawn


def get_datasets_from_config(config, preference_model=None, action_model=None, report=print,
                             compare=True):  # fmt: skip
    """(training pairs, validation pairs); [] for a path that is not set. report: takes a line.

    compare: whether labels are compared with `rule_actions`; not where a model classifies, which
    costs.

    Only training pairs are balanced (`class_balance`) and may take their actions from elsewhere
    (`action_labels`). A losing question is asked for only where it is used: in training on pairs,
    and in files of pairs.
    """
    training, files = config.training_config, config.data_config
    written = config.task == "generate_preference"

    def read(path):
        if not path:
            return []
        return read_preferences(path, report) if training.is_preference else read_vertex_jsonl(path)

    def prepare(path, rows, preference_model, class_balance=None, action_labels="gold"):
        if action_labels == "classifier":
            for message in (message for row in rows for message in row["messages"]):
                message.pop("requires_clarification", None)
        dataset = ACTDataset(rows, CLARIFY, training.icl_examples, preference_model, class_balance,
                             training.is_preference, action_model, training.seed)  # fmt: skip
        pairs = dataset.prepare_datasets()
        if rows and not training.is_preference:
            for line in check_conversations(path, rows, dataset, rule_actions if compare else None):
                report(line)
        return random_actions(pairs, training.seed) if action_labels == "random" else pairs

    held = read(files.validation_path)
    rows = read("" if config.task == "evaluate" and held else files.train_path)
    if files.validation_split and not held:
        rows, held = split_conversations(rows, files.validation_split, training.seed)
        share = f"{len(held)} of {len(rows) + len(held)}"
        report(f"{files.train_path}: {share} are held out for validation")
    rows = [] if config.task == "evaluate" else rows
    asks = preference_model if written or config.task in ("act", "dpo") else None
    train = prepare(files.train_path, rows, asks, training.class_balance, training.action_labels)
    where = files.validation_path or files.train_path
    return train, prepare(where, held, preference_model if written else None)


def split_conversations(rows, share, seed):
    """(rows to train on, rows held out): a share of the conversations, or of the pairs' dialogues."""
    groups = [[i] for i in range(len(rows))]
    if rows and isinstance(rows[0], Pair):
        groups = dialogues(rows)
    rng = random.Random(f"{seed}/validation_split")
    held = {i for group in rng.sample(groups, round(share * len(groups))) for i in group}
    train = [row for i, row in enumerate(rows) if i not in held]
    return train, [rows[i] for i in sorted(held)]


# ----------------------------------------------------------------------------------------------------------------------
# Checks
# What is in a file of conversations and what is wrong with it: for `data.py check`, and at the start of every run.

KEYS_READ = {"messages", "contents", "systemInstruction", "system_instruction"}
TURN_KEYS_READ = {"role", "content", "parts", "requires_clarification"}


def check_conversations(path, rows, dataset, classify):
    """What is wrong with the conversations of a file, a line each; turns are named "line.turn", as in "17.2".

    dataset: the ACTDataset of the rows, prepared. classify: [reply] -> [action], compared with the labels, or None.
    """
    skipped, found, labelled = set(dataset.skipped), {}, []
    for row in rows:
        messages = [message for message in row["messages"] if message["role"] != "system"]
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        for number, i in enumerate(users, start=1):
            at, label = f"{row['where'].rpartition(':')[2]}.{number}", messages[i].get("requires_clarification")
            if f"{row['where']}: user turn {number}" in skipped:
                found.setdefault(f"are skipped, {why_skipped(messages[i:])}", []).append(at)
            if label is not None and [message["role"] for message in messages[i + 1 : i + 2]] == ["model"]:
                labelled.append((at, CLARIFY if label else ANSWER, messages[i + 1]["content"]))
    actions = classify([reply for *_, reply in labelled]) if classify and labelled else []
    apart = [(at, label) for (at, label, _), action in zip(labelled, actions, strict=False) if label != action]
    for at, label in apart:
        found.setdefault(f"are labelled {label}, but the classifier says {OTHER[label]}", []).append(at)
    lines = [f"{path}: the action classifier labelled {dataset.labelled} turns"] if dataset.labelled else []
    lines += [f"{path}: {len(turns)} user turns {problem}: {listed(turns)}" for problem, turns in found.items()]
    unread = unread_keys(path, {row["where"] for row in rows})
    lines += [f"{path}: {key!r} is not read: lines {listed(numbers)}" for key, numbers in unread.items()]
    if len(apart) > 0.1 * len(labelled):
        share = f"{path}: labels and classifier disagree in {len(apart) / len(labelled):.0%} of turns"
        lines.append(f"{share}. ACT judges the policy's replies with the same classifier, so there the gold action can "
                     "hardly win, and evaluations count against it: set training_config.action_labels to 'classifier', "
                     "or cast another action_model_config")  # fmt: skip
    return lines


def why_skipped(messages):
    """What stands where an answer should, in messages from a user turn on that has none: questions alone come first."""
    while [message["role"] for message in messages[:2]] == ["user", "model"] and messages[1]["content"].strip():
        messages = messages[2:]
    if not messages[1:]:
        return "the conversation ends before an answer"
    follows = {("user", "model"): "an empty reply follows", ("user", "user"): "another user turn follows"}
    return follows.get(tuple(message["role"] for message in messages[:2]), "two replies follow one another")


def unread_keys(path, lines):
    """{key that nothing reads: [line number]} of these lines, "path:line", of a file of conversations."""
    found = {}
    for number, row in read_jsonl(path):
        turns = row["messages"] if "messages" in row else row["contents"]
        unread = row.keys() - KEYS_READ | {key for turn in turns for key in turn.keys() - TURN_KEYS_READ}
        for key in sorted(unread) if f"{path}:{number}" in lines else ():
            found.setdefault(key, []).append(number)
    return found


def listed(items, shown=10):
    more = f" ... and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(map(str, list(items)[:shown])) + more


def check_file(path, config=None):
    """Lines about a file of conversations. config: a file of act.py's, which has lengths and may cast a classifier."""
    classify, lengths = rule_actions, lambda path, pairs: []
    if config:
        sys.modules.setdefault("data", sys.modules[__name__])  # this program is what act.py imports as `data`
        import act

        classify, lengths = act.checks_of(config)
    rows = read_vertex_jsonl(path)
    dataset = ACTDataset(rows, CLARIFY, 1, action_model=classify)
    pairs = dataset.prepare_datasets()
    asked = sum(pair.action == CLARIFY for pair in pairs)
    turns = f"{asked} {CLARIFY}, {len(pairs) - asked} {ANSWER}, {len(dataset.skipped)} skipped"
    summary = f"{path}: {len(rows)} conversations, {len(pairs) + len(dataset.skipped)} user turns: {turns}"
    return [summary, *check_conversations(path, rows, dataset, classify), *lengths(path, pairs)]


# ----------------------------------------------------------------------------------------------------------------------
# Files of pairs
# Texts and JSON lines that hold a pair: made when a file is written, taken apart when one is read, nowhere else.

RECORD_KEYS = ("input_text", "output_text", "dialogue_policy", "gold_target", "gold_trajectory",
               "chosen_policy", "rejected_policy", "chosen", "rejected")  # fmt: skip
SPEAKERS = {"user": "User", "model": "Assistant"}
SPEAKER_LINE = re.compile(r"^(User|Assistant): ", re.MULTILINE)
MARKED = r"\\*(?:(?:User|Assistant): |\[conversation\]$)"  # what a line inside a message must not begin with, or be
TO_ESCAPE, ESCAPED = (re.compile(pattern, re.MULTILINE) for pattern in (rf"^(?={MARKED})", rf"^\\(?={MARKED})"))
UNANSWERED = "This question was not answered by the Assistant."  # the published code's stand-in for a missing answer


def format_messages(messages):
    """Messages -> "Assistant: text\\nUser: text\\n...". A line of a text that looks like a mark gets a backslash."""
    return "".join(f"{SPEAKERS[role]}: {TO_ESCAPE.sub(lambda _: chr(92), text)}\n" for role, text in messages)


def split_messages(text):
    """The inverse of `format_messages`: a message goes on until the next line that begins with a speaker.

    What stands before the first such line is the model's.
    """
    before, *rest = SPEAKER_LINE.split(text)
    messages = [("model", before)] if before.strip() else []
    roles = {name: role for role, name in SPEAKERS.items()}
    messages += [(roles[name], said) for name, said in zip(rest[::2], rest[1::2], strict=True)]
    return [(role, ESCAPED.sub("", said.removesuffix("\n"))) for role, said in messages]


def make_record(pair):
    """A record of the published research code: what it calls a preference example, all of it text."""
    prompt = f"{pair.instruction}\n[context]\n{pair.context}\n[conversation]\n{format_messages(pair.history)}"
    gold = format_messages(pair.gold)
    return {"input_text": prompt, "output_text": gold, "dialogue_policy": pair.action,
            "gold_target": format_messages([("model", pair.target)]), "gold_trajectory": prompt + gold,
            "chosen_policy": pair.action, "rejected_policy": OTHER[pair.action],
            "chosen": format_messages(pair.chosen), "rejected": format_messages(pair.rejected)}  # fmt: skip


def parse_record(row, where):
    """The inverse of `make_record`, for files of the published code too. Raises InputError.

    Their input_text may hold "[data]" lines, which are the context's. Of clarifying turns it also holds the gold
    answer, as the published code wrote it: such a file trains a model that has seen what it is asked for.
    """
    for key in RECORD_KEYS:
        if key.endswith("_policy") and require(row, key, f"{where}: ", str) not in OTHER:
            raise InputError(f"{where}: {key} is {row[key]!r}, expected {CLARIFY!r} or {ANSWER!r}")
        require(row, key, f"{where}: ", str)
    lines = row["input_text"].split("\n")
    if "[conversation]" not in lines:
        raise InputError(f"{where}: input_text has no line '[conversation]'")
    last = len(lines) - 1 - lines[::-1].index("[conversation]")  # a context may hold such a line, a message does not
    first = lines.index("[context]") if "[context]" in lines[:last] else last
    said = "\n".join(lines[last + 1 :]).lstrip("\n")
    if not SPEAKER_LINE.match(said) or split_messages(said)[-1][0] != "user":
        raise InputError(f"{where}: input_text does not end with a line 'User: ' after '[conversation]'")
    sides = [split_messages(row[key]) for key in ("chosen", "rejected", "output_text")]
    for key, messages in zip(("chosen", "rejected", "output_text"), sides, strict=True):
        if not messages or messages[0][0] != "model":
            raise InputError(f"{where}: {key} does not begin with the assistant's text")
    target = next((said for role, said in split_messages(row["gold_target"]) if role == "model"), "")
    instruction, context = "\n".join(lines[:first]), "\n".join(lines[first + 1 : last])
    return Pair(context, split_messages(said), row["dialogue_policy"], *sides, target, instruction, where)


def pair_of_sides(messages, chosen, rejected, where):
    """A Pair from a form that has no actions: `rule_actions` of the first replies. Its gold trajectory is `chosen`."""
    if messages[-1][0] != "user":
        raise InputError(f"{where}: the conversation ends with role {messages[-1][0]!r}, expected 'user'")
    context = messages.pop(0)[1] if messages[0][0] == "system" else ""
    actions = rule_actions([chosen[0][1], rejected[0][1]])
    trajectory = chosen
    if actions == [CLARIFY, ANSWER] and len(chosen) == 1:  # Vertex's form has room for one reply
        trajectory = rejected  # Algorithm 1 rejects answering at once: that answer is the target
    return Pair(context, messages, actions[0], chosen, rejected, chosen, trajectory[-1][1], where=where)


def vertex_preference(pair):
    """Vertex AI's preference-tuning form. Of a trajectory only its first reply fits: a tuned model writes one turn."""

    def turn(role, text):
        return {"role": role, "parts": [{"text": text}]}

    system = f"{pair.instruction}\n{pair.context}" if pair.context else pair.instruction
    scored = [(1, pair.chosen[0][1]), (0, pair.rejected[0][1])]
    return {
        "systemInstruction": {"parts": [{"text": system}]},
        "contents": [turn(role, text) for role, text in pair.history],
        "completions": [{"score": score, "completion": turn("model", text)} for score, text in scored],
    }


def parse_vertex_preference(row, where):
    """The inverse of `vertex_preference`, as far as that goes."""
    conversation = parse_conversation({key: row[key] for key in row if key != "completions"}, where)
    sides = {}
    for i, entry in enumerate(require(row, "completions", f"{where}: ", list)):
        at = f"{where}: completions[{i}]"
        score = require(entry, "score", at, int, float)
        turn = parse_turn(require(entry, "completion", at, dict), f"{at}.completion", "contents")
        if turn["role"] != "model" or not turn["content"].strip():
            found = f"role {turn['role']!r} and text {turn['content']!r}"
            raise InputError(f"{at}.completion has {found}, expected a text by 'model'")
        if score not in (0, 1) or score in sides:
            raise InputError(f"{at}.score is {score}, expected 1 for one completion and 0 for the other")
        sides[score] = [("model", turn["content"])]
    if len(sides) != 2:
        raise InputError(f"{where}: completions has {len(sides)} entries, expected 2")
    pair = pair_of_sides(messages_of(conversation["messages"]), sides[1], sides[0], where)
    context = "" if pair.context == INSTRUCTION else pair.context.removeprefix(f"{INSTRUCTION}\n")  # as we write it
    return replace(pair, context=context)


def trl_preference(pair):
    """TRL's conversational preference form; the context is the system message."""

    def turns(messages):
        return [{"role": "assistant" if role == "model" else role, "content": text} for role, text in messages]

    system = [("system", pair.context)] if pair.context else []
    return {"prompt": turns(system + pair.history), "chosen": turns(pair.chosen), "rejected": turns(pair.rejected)}


def parse_trl_preference(row, where):
    """The inverse of `trl_preference`. Raises InputError."""
    sides = {}
    for key in ("prompt", "chosen", "rejected"):
        turns = enumerate(require(row, key, f"{where}: ", list))
        parsed = [parse_turn(turn, f"{where}: {key}[{i}]", "messages", key == "prompt" and i == 0) for i, turn in turns]
        sides[key] = messages_of(parsed)
        if not parsed or (key != "prompt" and (sides[key][0][0] != "model" or not sides[key][0][1].strip())):
            raise InputError(f"{where}: {key} does not begin with a text by 'assistant'")
    return pair_of_sides(sides["prompt"], sides["chosen"], sides["rejected"], where)


def messages_of(turns):
    return [(turn["role"], turn["content"]) for turn in turns]


def read_preferences(path, report=print):
    """Pairs from a JSONL of records, of Vertex's preference-tuning lines or of TRL's conversational ones.

    Records of the published research code for turns that nobody answered teach nothing; they are skipped and counted.
    """

    def parse(row, where):
        if ("messages" in row or "contents" in row) and "completions" not in row:
            raise InputError(f"{where}: holds a conversation, expected a pair: is_preference is set")
        if "completions" in row:
            return parse_vertex_preference(row, where)
        if "prompt" in row and "input_text" not in row:
            return parse_trl_preference(row, where)
        unanswered = row.get("chosen") == "" or UNANSWERED in str(row.get("gold_target"))
        return None if unanswered else parse_record(row, where)

    parsed = parse_lines(path, parse)
    pairs = [pair for pair in parsed if pair]
    skipped = len(parsed) - len(pairs)
    if skipped:
        report(f"{path}: {skipped} records without an answer were skipped")
    same = sum(pair.chosen == pair.rejected for pair in pairs)
    if same:
        report(f"{path}: {same} pairs have two equal sides, which teach nothing")
    preferred = {json.dumps([pair.context, pair.history, pair.chosen]) for pair in pairs}
    against = sum(json.dumps([pair.context, pair.history, pair.rejected]) in preferred for pair in pairs) - same
    if against:
        report(f"{path}: {against} pairs reject what another pair of the same turn prefers")
    alone = sum(pair.action == CLARIFY and len(pair.gold) == 1 for pair in pairs)
    if alone:
        report(f"{path}: {alone} clarifying turns come without the user's reply: a rule cannot play that user")
    if not pairs:
        raise InputError(f"{path}: holds no preference pair, expected at least one line of JSON")
    return pairs


PREFERENCE_FORMS = {"records": make_record, "vertex": vertex_preference, "trl": trl_preference}


def write_preferences(path, pairs, form):
    """Writes pairs, one a line, in a form of PREFERENCE_FORMS."""
    write_jsonl(path, map(PREFERENCE_FORMS[form], pairs))


# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# How an answer is scored and how actions are compared. A new heuristic is a row of HEURISTICS and a function of the
# predicted answer, the gold one and the pair's context; it returns (exact match, score), or the score alone.

NOT_IN_NUMBERS = str.maketrans("", "", "'\"\\$€£¥%(),[]")
PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
SCALES = {"hundred": 100, "thousand": 1000, "million": 1000000, "billion": 1000000000, "percent": 0.01}


def scale_of(word):
    return next((value for name, value in SCALES.items() if name in word), 1)


def number_text(token):
    """A lower-case token as the PACIFIC and TAT-QA scorer writes its number, or None where it sees no number.

    Its quirks are kept, since published figures contain them: "12%" is 0.12, "(5)" is -5, ".5" is the text "None".
    """
    clean = token.translate(NOT_IN_NUMBERS)
    words = clean.split()
    try:
        if not words or math.isnan(float(words[0])) or (len(words) > 1 and scale_of(words[1]) == 1):
            return None
        digits = re.search(r"([+-]?\d+(?:\.\d+)?)|[+-]?\.\d+", clean)
        if not digits or not digits[1]:
            return "None"
        number = float(digits[1]) if "." in digits[1] else int(digits[1])
        scaled = re.search(r"[\d.]\s?[a-zA-Z]+", token)
        sign = -1 if re.search(r"\([\d.\s]+\)", token) else 1
        percent = 0.01 if re.search(r"[\d.\s]%", token.strip()) else 1
        return str(round(number * (scale_of(scaled[0]) if scaled else 1) * sign * percent, 4))
    except (ValueError, OverflowError):  # no number, or thousands of digits (where the scorer itself breaks off)
        return None


def drop_words(text):
    """The words that DROP compares: lower case, numbers in one spelling, no punctuation or articles."""
    words = []
    for token in text.lower().split(" "):
        number = number_text(token)
        token = token.translate(PUNCTUATION) if number is None else number
        words += ARTICLES.sub(" ", token).split()
    return words


def drop_f1(predicted, gold, context=""):
    """(exact match, F1) of two texts, as PACIFIC's and TAT-QA's scorer counts them: sets of words, two decimals.

    Rules: github dengyang17/PACIFIC, tatqa_metric.py, get_metrics.
    """
    said, wanted = drop_words(predicted), drop_words(gold)
    common = len(set(said) & set(wanted))
    precision = common / len(set(said)) if said else 1.0  # an empty side is precise, or complete, by definition
    recall = common / len(set(wanted)) if wanted else 1.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return float(said == wanted), float(np.round(f1, 2))


def coqa_f1(predicted, gold, context=""):
    """(exact match, F1) of two texts as CoQA counts them: repeated words count."""
    said, wanted = (ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split() for text in (predicted, gold))
    common = sum((Counter(said) & Counter(wanted)).values())
    if not common:
        return float(said == wanted), float(said == wanted)
    precision, recall = common / len(said), common / len(wanted)
    return float(said == wanted), 2 * precision * recall / (precision + recall)


def exact_match(predicted, gold, context=""):
    """(1.0, 1.0) where the texts are equal but for case and spacing, else (0.0, 0.0)."""
    same = float(predicted.casefold().split() == gold.casefold().split())
    return same, same


SQL_KINDS = sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE
SQL_FUNCTIONS = set("""abs avg ceil ceiling coalesce concat count cume_dist date datetime dense_rank exp first_value
    floor glob group_concat ifnull iif instr julianday lag last_value lead length like ln log lower ltrim max min mod
    nth_value ntile nullif percent_rank pow power rank replace round row_number rtrim sign sqrt strftime string_agg
    substr substring sum time total trim trunc typeof unicode unixepoch upper""".split())  # printf can loop for seconds
SQL_SECONDS, SQL_MEMORY, SQL_TEXT = 0.5, 2**25, 10_000  # of processor time, bytes, characters of a query
SQL_LIMITS = {"LENGTH": 20_000, "SQL_LENGTH": SQL_TEXT, "COLUMN": 100, "EXPR_DEPTH": 100, "COMPOUND_SELECT": 50,
              "VDBE_OP": 50_000, "LIKE_PATTERN_LENGTH": 200}  # so that no single step takes long  # fmt: skip
SQL_QUOTED = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`|\[[^]]*]|--[^\n]*|/\*.*?\*/""", re.DOTALL)
SQL_ERRORS = sqlite3.Error, sqlite3.Warning, ValueError, MemoryError  # ValueError: NUL, or half a character


def execution_match(predicted, gold, context=""):
    """(same text, same rows) of two SQL queries on the tables that `context` makes, an SQL script, in sqlite's memory.

    A query may stand in a ```sql block. Same rows: in any order, unless the gold query ends in ORDER BY, whatever the
    columns are called; same text: but for case, white space and a last semicolon. A prediction that is no single query,
    or takes too much time or memory, scores 0 and changes nothing. A gold text that asks is no query: `exact_match`.
    Raises InputError for a context or gold query that fails.
    """
    if is_question(gold):
        return exact_match(predicted, gold)
    query = sql_of(gold)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        failing, text = "context", context
        try:
            database.execute(f"PRAGMA hard_heap_limit = {SQL_MEMORY}")  # of all sqlite in this process, from now on
            database.execute("PRAGMA temp_store = MEMORY")
            run_script(database, context)
            failing, text = "gold query", query
            wanted = list(rows_of(database, query))
        except SQL_ERRORS as error:
            problem = f"the {failing} {fold(text)[:80]!r} fails: {str(error) or 'out of memory'}"
            raise InputError(f"execution_match: {problem}") from None
        bare = SQL_QUOTED.sub(" ", query)
        while bare != (bare := re.sub(r"\([^()]*\)", " ", bare)):
            pass
        numbered = enumerate if re.search(r"(?i)\border\s+by\b", bare) else iter
        missing = Counter(numbered(wanted))
        try:
            for row in numbered(rows_of(database, sql_of(predicted))):
                if not missing[row]:
                    return 0.0, 0.0
                missing[row] -= 1
        except SQL_ERRORS:
            return 0.0, 0.0
    said, meant = (" ".join(sql_of(text).casefold().split()).rstrip("; ") for text in (predicted, gold))
    score = float(not missing.total())
    return score * (said == meant), score


def sql_of(text):
    """The query in a fenced block, or the whole text."""
    fenced = re.search(r"```(?:sql|sqlite)?\s(.*?)```", text, re.DOTALL | re.IGNORECASE)
    return fenced[1] if fenced else text


def run_script(database, script, seconds=SQL_SECONDS):
    """Runs the statements of a script, which reach no file: ATTACH and VACUUM INTO fail."""
    if sys.version_info < (3, 11):
        raise InputError("SQL needs Python 3.11, whose sqlite3 can limit what a query takes")
    database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    end = time.thread_time() + seconds
    database.set_progress_handler(lambda: time.thread_time() > end, 1000)
    database.executescript(script)


def rows_of(database, query):
    """Yields the rows of one query, with numbers that are equal to 12 digits made equal. It reads tables only."""
    end = time.thread_time() + SQL_SECONDS

    def authorize(kind, _, function, *__):
        known = kind in SQL_KINDS and (kind != sqlite3.SQLITE_FUNCTION or function.lower() in SQL_FUNCTIONS)
        return sqlite3.SQLITE_OK if known and time.thread_time() < end else sqlite3.SQLITE_DENY

    database.set_authorizer(authorize)
    database.set_progress_handler(lambda: time.thread_time() > end, 100)
    for limit, most in SQL_LIMITS.items():
        database.setlimit(getattr(sqlite3, f"SQLITE_LIMIT_{limit}"), most)
    cursor = database.execute(query if len(query) <= SQL_TEXT else "")
    if cursor.description is None:
        raise ValueError("no query, or too long")
    for row in cursor:
        yield tuple(float(f"{value:.12g}") if type(value) is float else value for value in row)


HEURISTICS = {"drop_f1": drop_f1, "coqa_f1": coqa_f1, "exact_match": exact_match, "execution_match": execution_match}


def score_of(heuristic, predicted, gold, context=""):
    """(exact match, score), also of a heuristic that returns the score alone: its exact match is that of the texts."""
    scored = heuristic(predicted, gold, context)
    return scored if isinstance(scored, tuple) else (exact_match(predicted, gold)[0], float(scored))


def action_metrics(gold, predicted):
    """How well the actions agree, as fractions; CLARIFY is the positive class of the binary ones.

    F1 over an action that nobody took is 0; the means are over the actions that occur (scikit-learn's f1_score with
    zero_division=0). Every value is None where there is nothing to compare.
    """
    names = ("Accuracy", "Weighted F1", "Macro F1", "Binary F1", "Binary Recall", "Binary Precision")
    counts = Counter(zip(gold, predicted, strict=True))
    if not counts:
        return dict.fromkeys(names)
    support, taken = Counter(gold), Counter(predicted)
    f1 = {action: 2 * counts[action, action] / (support[action] + taken[action]) for action in support | taken}
    hits = counts[CLARIFY, CLARIFY]
    values = (
        sum(counts[action, action] for action in f1) / len(gold),
        sum(f1[action] * support[action] for action in f1) / len(gold),
        sum(f1.values()) / len(f1),
        f1.get(CLARIFY, 0.0),
        hits / support[CLARIFY] if support[CLARIFY] else 0.0,
        hits / taken[CLARIFY] if taken[CLARIFY] else 0.0,
    )
    return dict(zip(names, values, strict=True))


def mean_or_none(values):
    """The mean, or None for no values: a figure over nothing is not a number to report."""
    values = list(values)
    return sum(values) / len(values) if values else None


# ----------------------------------------------------------------------------------------------------------------------
# Helper roles
# What each of ACT's helpers does, as text: the rule that plays it without a model; what a model is told
# (configs/prompts/, or the file that `prompt_path` names) and how its answer is read. Back ends are in act.py.

FALLBACK_QUESTION = "Could you say more precisely what you would like to know?"
NOTHING_TO_ADD = "I have nothing to add."
NOT_SAID = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|(?:https?://|www\.)\S*\w", re.DOTALL)  # code and links
QUERY = re.compile(r"(?is)\s*(?:select\b.*\bfrom|with\b.*\bselect)\b")  # in SQL, what is quoted asks nobody
MENTIONED = re.compile(r"[?？؟](?=[\"'”’»」』]\s*[a-z,;])")  # a question quoted in the middle of a sentence
SENTENCE_END = re.compile(r"(?<=[.!?؟…])[\"'”’»)\]*_]*\s+|(?<=[。？！])(?![」』”\"])|\n")
QUESTION_END = re.compile(r"(?:(?<![=<>(,|&])(?<![=<>(,|&] )[?？؟]|か。)(?:[^\w.。]|_)*\Z")
REQUEST = re.compile(r"""(?i)\b(?:please|could\ you|can\ you)\b.{0,20}\b(?:tell|give)\ (?:me|us)\b(?!\ a\ moment)
    |\blet\ (?:me|us)\ know\ (?:wh|the\b|your\b)|\bplease\ (?:specify|clarify)\b|\b(?:please|just)\ send\ (?:me|us)\b
    |\b(?:I|we)(?:['’](?:d|ll)|\ would|\ will)?\ need\ (?:to\ know\ wh|your\b)
    |\A(?:could|can|would)\ you\b|\A(?:what|which)\ (?!a\ )[\w\ ]{1,40}\Z|教えてください""", re.VERBOSE)
OFFER = re.compile(r"""(?i)\b(?:shall\ I|should\ I|(?:can|may)\ I\ (?:help|do|assist)|(?:like|want)\ me\ to
    |would\ you\ like\ to|also|(?:does|did|was)\ (?:that|this)|does\ it\ work)\b""", re.VERBOSE)
CLOSING = re.compile(r"(?i)\banything else\b|\balgo más\b|\bsonst noch\b|(?:ほか|他)に")  # always an offer
CHOICE = re.compile(r"(?i)\b(?:or|which|what|when|where|who|how)\b")  # in no offer
TO_THE_USER = re.compile(r"(?i)\b(?:you|your|or|which|welche[rns]?|quel|quelle|cuál)\b|どちら|どれ")
ANSWERED, EXPLAINED = re.compile(r"(?i)\W*(?:yes|no|because)\b"), re.compile(r"(?i)\W*(?:how|why)\b")
LISTED = re.compile(r"\s*(?:[-*•]|\(?\w{1,2}[.)])(?:\s|\Z)")
COMMON_WORDS = set("""a amount an and any are ask asking about be by can could did do does exactly for from how i in
    interested is it kind know like looking mean me more of on one or please precisely referring s say sort specific
    specifically talking that the there they thing this to type value want was were what which who whose would you
    your""".split())  # fmt: skip
SLOTS = {  # words that ask for the same kind of thing
    **dict.fromkeys("date day fiscal month period quarter time when year".split(), "time"),
    **dict.fromkeys("area country place region where".split(), "place"),
}


def is_question(text):
    """Does a reply ask for something that it needs to know?

    It does with a question at its end, before choices or before a remark ("Which one do you mean? I can check both."),
    and with a request ("Please tell me the date."); not with an offer after an answer ("Shall I also book it?"), with a
    question that it answers itself, or with one in code, in a link or quoted in the middle of a sentence.
    """
    text = SQL_QUOTED.sub("''", text) if QUERY.match(text) else text
    said = MENTIONED.sub("", NOT_SAID.sub("code", text))
    sentences = [sentence for sentence in SENTENCE_END.split(said) if re.search(r"[\w?？؟]", sentence)]
    stated = False  # whether something was said before
    for sentence, following in zip(sentences, [*sentences[1:], ""], strict=False):
        asked = QUESTION_END.search(sentence[-40:])
        offered = CLOSING.search(sentence) or (stated and OFFER.search(sentence))
        if asked and not (offered and not CHOICE.search(sentence)):
            choices = LISTED.match(following) and not EXPLAINED.match(sentence)
            if not following or choices or (TO_THE_USER.search(sentence) and not ANSWERED.match(following)):
                return True
        if not asked and REQUEST.search(sentence):
            return True
        stated = stated or not (asked or sentence.rstrip().endswith(("!", "！")))
    return False


def rule_actions(replies):
    return [CLARIFY if is_question(reply) else ANSWER for reply in replies]


def content_words(text):
    """What a text is about: its words in the singular, without common ones, and "time" for year, month and so on."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    words = {word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] != "s" else word for word in words}
    return {SLOTS.get(word, word) for word in words - COMMON_WORDS}


def same_question(asked, gold, topic):
    """How much a question asks for what the gold question asks, from 0 to 1; topic: the user turn that both are about.

    For a time or a place, the other words do not matter. Else the share of the words that both have, where those that
    the question only repeats from the user do not count against it.
    """
    asked, wanted, slots = content_words(asked), content_words(gold), set(SLOTS.values())
    if slots & (asked | wanted):
        return float(bool(slots & asked & wanted))
    if not wanted:  # "Which one?" is met by any question
        return 1.0
    return len(wanted & asked) / len(wanted | (asked - content_words(topic)))


def rule_users(requests):
    """The user's gold reply to the gold question that is asked, if at least half of it is; else nothing new.

    requests: [(Pair, trajectory that ends in a question, intent)]; the rule knows the gold trajectory, not the intent.
    """
    answers = []
    for pair, trajectory, _ in requests:
        best, answer = 0.0, NOTHING_TO_ADD
        for (_, question), (role, reply) in zip(pair.gold, pair.gold[1:], strict=False):
            match = same_question(trajectory[-1][1], question, pair.history[-1][1]) if role == "user" else 0.0
            if match >= 0.5 and match > best:
                best, answer = match, reply
        answers.append(answer)
    return answers


def rule_intents(pairs):
    """The gold trajectory itself, without its final answer, as the summary of what the user wants."""
    return [indented(pair.gold[:-1]).strip() for pair in pairs]


def rule_questions(requests):
    """For each (Pair, examples) the question of its first example."""
    return [examples[0].chosen[0][1] if examples else FALLBACK_QUESTION for _, examples in requests]


def indented(messages):
    """Messages for a helper's prompt; later lines of a text are indented, so that none looks like a new message."""
    return "".join(f"{SPEAKERS[role]}: {in_prompt(text)}\n" for role, text in messages)


def in_prompt(text, longest=20_000):
    """A text for a helper's prompt, of a longer one the end."""
    return text[-longest:].replace("\n", "\n  ")


def action_fields(reply):
    return {"response": in_prompt(reply.strip())}


def intent_fields(pair):
    """Without the final answer: what the summary does not know, the simulated user cannot give away."""
    return {"conversation": indented(pair.history + pair.gold[:-1])}


def user_fields(request):
    pair, trajectory, intent = request
    return {"intent": in_prompt(intent), "conversation": indented(pair.history + trajectory)}


def question_fields(request):
    asking = "Assistant (asks a clarifying question):"
    pair, examples = request
    shown = [(example, f"{asking} {in_prompt(example.chosen[0][1])}\n\n") for example in examples]
    return {"examples": "".join(
        f"{each.instruction}\n[context]\n{each.context}\n[conversation]\n{indented(each.history)}{end}"
        for each, end in [*shown, (pair, asking)]
    )}  # fmt: skip


def judge_fields(request):
    pair, answer = request
    conversation = indented(pair.history + pair.gold[:-1])
    return {"conversation": conversation, "gold": in_prompt(pair.target), "answer": in_prompt(answer)}


def parse_verdict(answer):
    """1.0 for RIGHT, 0.0 for WRONG; None for neither, both or "not right", up to what looks like a next example."""
    answer = re.split(r"\n\s*CONVERSATION:", answer.upper())[0]
    found = set(re.findall(r"((?:NOT|N['’]T)[\s*_]+)?(?<![A-Z])(RIGHT|WRONG)(?![A-Z])", answer))
    return {("", "RIGHT"): 1.0, ("", "WRONG"): 0.0}.get(found.pop()) if len(found) == 1 else None


def parse_action(answer):
    """The first of the two words, in capitals if there is one, else in any case; None where neither is written."""
    answer = unlabelled(answer, "Answer")
    found = re.search("CLARIFY|ANSWER", answer) or re.search(r"(?i)clarify|\banswer", answer)
    return found and found[0].upper()


def parse_intent(answer):
    """The first paragraph that is no announcement ("Here is the summary:"), up to what looks like a next example."""
    answer = re.split(r"\n\s*(?:Intent|Conversation|User|Assistant):", unlabelled(answer, "Intent"))[0]
    paragraphs = [fold(paragraph) for paragraph in re.split(r"\n\s*\n", answer)]
    return next((text for text in paragraphs if text and not text.endswith(":")), None)


def parse_user(answer):
    """The first line, up to what the model writes for the assistant."""
    line = unlabelled(answer, "User").partition("\n")[0]
    return line.partition("Assistant:")[0].strip() or None


def parse_question(answer):
    """The first line that is a question, before anybody else speaks; None where none was written."""
    lines = re.split(r"\n\s*User:", unlabelled(answer, "Assistant"))[0].split("\n")
    return next((line for line in (unlabelled(line, "Assistant") for line in lines) if is_question(line)), None)


def unlabelled(answer, name):
    """Without a "User: ", "**Assistant:** " or "Assistant (asks): " in front."""
    return re.sub(rf"\A[\s*]*{name}(?: \([^)\n]*\))?[\s*]*:[\s*]*", "", answer.strip()).strip()


def fold(text):
    """The text on one line: line breaks, and the spaces around them, become one space."""
    return " ".join(filter(None, (part.strip() for part in re.split("[\r\n]", text))))


class Role(NamedTuple):
    """How a helper's part is played; a request is what its rule takes a list of."""

    rule: Callable  # [request] -> [result]
    names: tuple  # what its prompt must have in {}
    fields: Callable  # request -> {name: text} for them
    parse: Callable  # a model's answer -> result, or None where it cannot be used
    stop: tuple  # texts at which an answer may be cut short
    prompt: str  # the file of its prompt in configs/prompts/


ROLES = {
    "action_model_config": Role(
        rule_actions, ("response",), action_fields, parse_action, ("\nMessage:",), "action.txt"),
    "user_simulator_config": Role(
        rule_users, ("intent", "conversation"), user_fields, parse_user, ("\nAssistant:",), "user.txt"),
    "intent_model_config": Role(
        rule_intents, ("conversation",), intent_fields, parse_intent, ("\nConversation:",), "intent.txt"),
    "preference_model_config": Role(
        rule_questions, ("examples",), question_fields, parse_question, ("\nUser:",), "question.txt"),
    "judge_model_config": Role(  # no rule: a heuristic is one
        None, ("conversation", "gold", "answer"), judge_fields, parse_verdict, ("\nConversation:",), "judge.txt"),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Converters
# Published datasets -> conversations. A new one is a function that takes an item, and a row of CONVERTERS.


def exchange(question, answer, clarify=False):
    """A user turn with the gold action of its reply, and that reply."""
    return [{"role": "user", "content": question.strip(), "requires_clarification": clarify},
            {"role": "model", "content": answer.strip()}]  # fmt: skip


def convert_pacific(item):
    """An item of PACIFIC's JSON, {"table", "paragraphs", "questions"} -> a conversation in the messages form.

    Its context: the paragraphs, one a line, then the rows of the table as "row name : cell | cell".
    """
    lines = [fold(paragraph["text"]) for paragraph in item["paragraphs"]]
    for row in item["table"]["table"]:
        name, *cells = map(fold, row)
        lines.append(f"{name} : {' | '.join(cells)}")
    messages = [{"role": "system", "content": "\n".join(lines)}]
    for question in item["questions"]:
        messages += exchange(question["question"], pacific_answer(question), question["req_clari"])
    return {"messages": messages}


def pacific_answer(question):
    """The gold reply: several spans joined by commas; of an arithmetic answer the derivation too, "2+6 = 8"."""
    answer, derivation = question["answer"], question["derivation"].strip()
    if isinstance(answer, list):
        return ", ".join(str(span).strip() for span in answer)
    return f"{derivation} = {answer}" if question["answer_type"] == "arithmetic" and derivation else str(answer)


def convert_abg_coqa(item):
    """An item of Abg-CoQA's JSON -> a conversation in the messages form.

    Of an ambiguous turn the first question, with its first reading and that reading's first answer, is gold.
    """
    messages = [{"role": "system", "content": item["story"].strip()}]
    for turn in item["history_turns"]:
        messages += exchange(turn["question"], turn["answer"])
    target = item["target_turn"]
    if item["ambiguity"] == "non_ambiguous":
        return {"messages": messages + exchange(target["question"], target["answer"])}
    asked = item["clarification_turn"]
    reading = asked["answers"][0]
    messages += exchange(target["question"], asked["question"], clarify=True)
    return {"messages": messages + exchange(reading["clr_ans"], reading["org_ans"])}


def convert_spider(item, databases):
    """An item of Spider's JSON -> a conversation: the script of its database, the question, and the query, which runs.

    Spider has no clarifying questions: mixed with data that has, it shows when not to ask.
    """
    script = script_of(Path(databases, item["db_id"]))
    execution_match(item["query"], item["query"], script)  # raises InputError where it fails
    return {"messages": [{"role": "system", "content": script}, *exchange(item["question"], item["query"])]}


@cache
def script_of(folder):
    """An SQL script of the tables of Spider's database in a folder, with the first three rows of each."""
    names = f"{folder.name}.sqlite", f"{folder.name}.sql", "schema.sql"
    path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    script, lines, count = path.suffix == ".sql", [], Counter()
    try:
        address = ":memory:" if script else f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True)) as database:
            database.text_factory = lambda raw: raw.decode("utf-8", "replace")
            run_script(database, path.read_text("utf-8") if script else "", math.inf)
            for statement in database.iterdump():
                table = statement.partition(" VALUES(")[0]
                count[table] += 1
                if table.startswith(("CREATE TABLE", "INSERT INTO")) and "sqlite_" not in table and count[table] <= 3:
                    lines.append(statement)
    except (OSError, *SQL_ERRORS) as error:
        raise InputError(f"{path}: cannot be read as a database ({str(error) or 'out of memory'})") from None
    return "\n".join(lines)


CONVERTERS = {  # name -> (the list of items in the file's JSON, an item -> a conversation)
    "pacific": (lambda file: file, convert_pacific),
    "abg_coqa": (lambda file: file["data"], convert_abg_coqa),
    "spider": (lambda file: file, convert_spider),
}


def convert_file(name, source, target, *more):
    """Writes the conversations of a published file. Raises InputError naming the file and the item that is unlike."""
    items_of, convert = CONVERTERS[name]
    content, at = parse_json(read_bytes(source), source), "the file"
    conversations = []
    try:
        for i, item in enumerate(items_of(content)):
            at = f"item {i}"
            try:
                conversation = convert(item, *more)
            except InputError as error:  # of what belongs to it
                raise InputError(f"{source}: {at}: {error}") from None
            conversations.append(parse_conversation(conversation, f"{source}: {at}"))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: {at} is not as {name} is published ({type(error).__name__}: {error})") from None
    write_jsonl(target, [{"messages": row["messages"]} for row in conversations])
    turns = [m["requires_clarification"] for row in conversations for m in row["messages"] if m["role"] == "user"]
    return f"{len(conversations)} conversations, {len(turns)} user turns, {sum(turns)} {CLARIFY} turns"


# ----------------------------------------------------------------------------------------------------------------------
# JSON
# Reading with an address in every error, writing so that a reader never sees half a file.

KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object",
         type(None): "null"}  # fmt: skip


def expect(value, where, *types):
    """`value` itself if it is of one of these JSON types, else an InputError that begins with its address `where`."""
    if type(value) not in types:
        wanted = " or ".join(dict.fromkeys(KINDS[t] for t in types))
        raise InputError(f"{where} is {KINDS.get(type(value), type(value).__name__)}, expected {wanted}")
    return value


def require(owner, key, where, *types):
    """`owner[key]`, checked. `where` is the owner's address: "train.jsonl:17: messages[3]", or "train.jsonl:17: "."""
    expect(owner, where.rstrip(": "), dict)
    address = where + key if where.endswith(" ") else f"{where}.{key}"
    if key not in owner:
        raise InputError(f"{address} is missing")
    return expect(owner[key], address, *types)


def read_bytes(path):
    try:
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def unique_keys(pairs):
    keys = Counter(key for key, _ in pairs)
    if len(keys) < len(pairs):
        raise ValueError(f"the key {keys.most_common(1)[0][0]!r} stands twice in one object")
    return dict(pairs)


def parse_json(raw, path, line=1):
    """The value that the UTF-8 bytes `raw` hold, which begin at this line (from 1) of the file. Raises InputError."""
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique_keys)
        if "\\ud" in text.lower():  # an escape is the only way to half a character in valid UTF-8
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        problem = f"not UTF-8 (byte 0x{raw[error.start]:02x}), expected JSON in UTF-8"
    except UnicodeEncodeError:
        problem = "an escape \\ud800 to \\udfff without its other half, expected whole characters"
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        problem = f"invalid JSON at column {error.colno}: {error.msg}"
    except RecursionError:
        problem = "invalid JSON: nested too deeply"
    except ValueError as error:
        problem = f"invalid JSON: {str(error).partition(';')[0]}"
    raise InputError(f"{path}:{line}: {problem}")


def read_json(path):
    """The JSON object in a file. Raises InputError."""
    return expect(parse_json(read_bytes(path), path), f"{path}: the file", dict)


def parse_lines(path, parse, shown=20):
    """[parse(object, "path:line")] of every line that is not blank. Raises InputError: a line for each that is bad.

    Lines end at "\\n" alone: U+2028 and its like may stand inside a JSON string.
    """
    parsed, errors, content = [], [], read_bytes(path)
    if content.lstrip().startswith(b"["):
        raise InputError(f"{path}: begins with '[', expected JSON Lines, an object a line (jq -c '.[]' makes them)")
    for number, raw in enumerate(content.split(b"\n"), start=1):
        try:
            if raw.strip():
                row = expect(parse_json(raw, path, number), f"{path}:{number}: the line", dict)
                parsed.append(parse(row, f"{path}:{number}"))
        except InputError as error:
            errors.append(str(error))
    if errors[shown:]:
        errors[shown:] = [f"{path}: and {len(errors) - shown} more bad lines"]
    if errors:
        raise InputError("\n".join(errors))
    return parsed


def read_jsonl(path):
    """[(line number from 1, object)] of every line that is not blank. Raises InputError."""
    return parse_lines(path, lambda row, where: (int(where.rpartition(":")[2]), row))


def write_text(path, parts):
    """Writes a file beside its target and renames it: `path` is either the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(parts)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_text(path, [json.dumps(value, indent=2, ensure_ascii=False), "\n"])


def write_jsonl(path, rows):
    """One object a line."""
    write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path, rows):
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def speak_plainly():
    """A terminal that lacks a character shows its code: no message must end a program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main(arguments=None):
    speak_plainly()
    about = "Checks conversations; converts published datasets, and files of pairs."
    parser = argparse.ArgumentParser(prog="data.py", description=about)
    parser.add_argument("command", choices=["check", *CONVERTERS, "vertex_preferences", "trl_preferences"])
    parser.add_argument("source", help="the file to read")
    parser.add_argument("databases", nargs="?", help="spider only: the folder with a folder for each database")
    parser.add_argument("target", nargs="?", help="the JSONL file to write; none for check")
    parser.add_argument("--config", help="check only: a file of act.py's, for its lengths and its classifier")
    given = parser.parse_args(arguments)
    if given.target is None:  # argparse fills them from the left
        given.databases, given.target = None, given.databases
    check = given.command == "check"
    unlike = (given.command == "spider") != bool(given.databases) or check == bool(given.target)
    if unlike or (given.config and not check):
        parser.error("expected check FILE [--config CONFIG], spider IN DATABASES OUT, or another command with IN OUT")
    try:
        if check:
            print("\n".join(check_file(given.source, given.config)))
        elif given.command in CONVERTERS:
            more = [given.databases] if given.databases else []
            print(f"{given.target}: {convert_file(given.command, given.source, given.target, *more)}")
        else:
            pairs = read_preferences(given.source)
            write_preferences(given.target, pairs, given.command.removesuffix("_preferences"))
            print(f"{given.target}: {len(pairs)} pairs of {len(dialogues(pairs))} conversations")
    except (InputError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
