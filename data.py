"""Conversations, preference pairs and metrics: values in, values out; what was found is returned.

The method, in reading order:
    Conversations     `read_conversations`: what a conversation and its messages are
    Pairs             `Pair`: one user turn and the two ways of going on that the loss compares
    Algorithm 1       `make_pairs` and what follows: a pair for every turn (arXiv 2406.00222)
Rooms to enter when you change what stands in them:
    Checks            what is wrong with a file of conversations
    Files of pairs    records of the published code, Vertex AI's, TRL's, OpenAI's lines <-> pairs
    Metrics           DROP F1, CoQA F1, exact match, numbers, rows of SQL queries, F1 of actions
    Rules             helpers that need no model: is it a question, what does the user reply
    Converters        published datasets -> Vertex JSONL
    JSON              an address in every error, files renamed into place

    python data.py check FILE.jsonl
    python data.py pacific IN.json OUT.jsonl
    python data.py abg_coqa IN.json OUT.jsonl
    python data.py spider IN.json DATABASES OUT.jsonl
    python data.py vertex_preferences IN.jsonl OUT.jsonl
    python data.py trl_preferences IN.jsonl OUT.jsonl
"""

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
from collections import Counter, defaultdict
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path

CLARIFY, ANSWER = "CLARIFY", "ANSWER"  # the paper's actions: ask a clarifying question, or answer
OTHER = {CLARIFY: ANSWER, ANSWER: CLARIFY}
INSTRUCTION = "Answer the user's question, or ask a clarifying question if it is ambiguous."
SPEAKERS = {"user": "User", "model": "Assistant"}


class InputError(ValueError):
    """Something the user gave is wrong: one line with where, what was found, what was expected."""


class LeftOut(InputError):
    """A line that holds what is no text; it says what, and the file is read without the line."""


# --------------------------------------------------------------------------------------------------
# Conversations

FORMS = "messages contents conversations".split()  # OpenAI's, Google's and ShareGPT's word
ROLE_NAMES = {"user": "user", "human": "user", "model": "model", "assistant": "model",
              "gpt": "model", "system": "system", "developer": "system"}  # fmt: skip
NO_TEXT = {"tool", "function", "tool_calls", "function_call"}  # roles, and keys of a message
SYSTEM_KEYS = ("systemInstruction", "system_instruction", "system")
KEYS_READ = {*SYSTEM_KEYS} | set(
    """messages contents conversations role from content parts value
    requires_clarification""".split()
)
CONTROL = re.compile(
    r"(?i)<(?:start|end)_of_turn>|<\|\w+\|>|</?(?:s|think)>|<[be]os>|<br ?/?>|\[/?INST\]"
    r"|\n\n(?:human|assistant):|\A\[\{'"
)
FORMATTED = "lines spell control tokens, thoughts, speakers or <br>: formatted already?"


def read_vertex_jsonl(path, raw=None):
    """The conversations of `read_conversations` alone. Raises InputError."""
    return read_conversations(path, raw)[0]


def read_conversations(path, raw=None):
    """Reads Vertex AI's two forms of conversation, OpenAI's and ShareGPT's, one a line.

    raw: the file's bytes, where they have been read already. Returns (conversations, lines about
    what was left out, joined or not read). A conversation is {"messages": [{"role": "system" |
    "user" | "model", "content": str}], "unread": [key], "path": str, "line": int}: system only
    comes first, then user and model take turns, and either may begin. A user message has
    "requires_clarification": bool, the gold action of the reply, where the file says so. Raises
    InputError.
    """
    rows, lines = parse_lines(path, parse_conversation, raw)
    return [{**row, "path": str(path), "line": line} for line, row in rows], lines


def parse_conversation(row, where, odd):
    """{"messages", "unread"} of one line. where: its address, "train.jsonl:17", with which errors
    begin; odd: takes texts about what is odd."""
    row = given(row)
    forms = [form for form in FORMS if form in row]
    if len(forms) != 1:
        is_pair = row.keys() & PAIR_MARKS
        hint = " (a file of pairs? then set training_config.is_preference)" if is_pair else ""
        found = " and ".join(forms) or "neither messages nor contents"
        raise InputError(f"{where}: has {found}, expected either messages or contents{hint}")
    if "requires_clarification" in row:
        raise InputError(f"{where}: has requires_clarification, expected it on user turns alone")
    turns = require(row, forms[0], f"{where}: ", list)
    at = f"{where}: {forms[0]}"
    messages = parse_messages(turns, at, odd, system_messages(row, where))
    if all(message["role"] != "user" for message in messages):
        raise InputError(f"{at} has no user turn, expected at least one")
    unread = sorted({*row, *(key for turn in turns for key in given(turn))} - KEYS_READ)
    for key in unread:
        if get_close_matches(key, ["requires_clarification"], 1, 0.8):
            raise InputError(f"{where}: has {key!r}, expected 'requires_clarification'")
        odd.append(f"lines have {key!r}, which nothing reads")
    if any(CONTROL.search(message["content"]) for message in messages):
        odd.append(FORMATTED)
    return {"messages": messages, "unread": unread}


def system_messages(row, where):
    """The system message that stands beside the others of a line, in a list."""
    messages = []
    for key in filter(row.get, SYSTEM_KEYS):
        system = require(row, key, f"{where}: ", dict, str)
        system = {"content": system} if isinstance(system, str) else system
        messages.append(parse_turn({**system, "role": "system"}, f"{where}: {key}", messages))
    return messages


def given(entries):
    """What is not null, nor NaN: tables give every line all keys. A message's text may be null."""
    found = {key: x for key, x in entries.items() if x is not None and x == x}
    return {"content": None, **found} if "content" in entries else found


def parse_messages(turns, where, odd, before=()):
    """Messages that take turns, after those before: those without text are left out, and neighbours
    of one role joined."""
    messages = list(before)
    for i, turn in enumerate(expect(turns, where, list)):
        messages.append(parse_turn(turn, f"{where}[{i}]", messages))
    said = [each for each in messages if each["role"] == "system" or each["content"].strip()]
    odd += ["messages without text are left out"] * (len(messages) - len(said))
    joined = []
    for _, group in groupby(said, lambda message: message["role"]):
        first, *more = group
        odd += ["messages are joined to the one before, of the same role"] * len(more)
        text = "\n".join(message["content"] for message in (first, *more))
        labels = {key: value for message in more for key, value in message.items()}
        joined.append({**first, **labels, "content": text})
    return joined


def parse_turn(turn, where, before=()):
    """One message, after those before -> {"role", "content"}, perhaps "requires_clarification"."""
    turn = given(expect(turn, where, dict))
    role = turn.get("role") or turn.get("from")
    key = next((key for key in ("parts", "value") if key in turn), "content")
    if not role and key == "parts":  # as Google says: the user's, then in turn
        role = "model" if before and before[-1]["role"] == "user" else "user"
    if str(role) in NO_TEXT or (not turn.get(key) and any(map(turn.get, NO_TEXT))):
        raise LeftOut("tool calls")
    name = ROLE_NAMES.get(str(role).lower())
    if name is None or (name == "system" and before):
        only_first = " (system only comes first)" if name else ""
        raise InputError(f"{where} has role {role!r}, expected {', '.join(ROLE_NAMES)}{only_first}")
    text = require(turn, key, where, str, list, type(None)) or ""  # null: a message without text
    if isinstance(text, list):  # joined without a separator, as Vertex does
        text = "".join(part_text(part, f"{where}.{key}[{i}]") for i, part in enumerate(text))
    message = {"role": name, "content": text}
    if "requires_clarification" in turn:
        message["requires_clarification"] = require(turn, "requires_clarification", where, bool)
        if name != "user":
            raise InputError(f"{where} has requires_clarification, expected it on user turns alone")
    return message


def part_text(part, where):
    if isinstance(part, str):
        return part
    part = given(part) if isinstance(part, dict) else part
    if isinstance(part, dict) and part.get("thought"):  # what a Gemini thought is not its reply
        return ""
    if "text" not in expect(part, where, dict) and part:
        raise LeftOut(next((key for key in part if key != "type"), part.get("type")))
    return require(part, "text", where, str)


def noted(path, found):
    """Lines that say what was found how often and where, of {what: [line, or "line.turn"]}."""
    return [
        f"{path}: {len(at)} {what}: {'line.turn ' * isinstance(at[0], str)}"
        f"{listed(dict.fromkeys(at))}"
        for what, at in found.items()
    ]


def listed(items, shown=10):
    more = f" ... and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(map(str, list(items)[:shown])) + more


# --------------------------------------------------------------------------------------------------
# Pairs


@dataclass
class Pair:
    """One user turn and two ways of going on. A message is (role, text), role "user" or "model".

    Texts are what the file says, line breaks included, from here to the tokens and to every file.
    """

    context: str  # what the system message says: paragraphs, tables
    messages: list  # those of the whole dialogue, one list for all its pairs
    action: str  # a: the gold action
    chosen: list  # y_w: messages of the winning trajectory
    rejected: list  # y_l: messages of the losing one
    gold: list  # messages of the gold trajectory
    target: str  # g: the gold final answer
    instruction: str = INSTRUCTION  # stands before the context in prompt format "plain"
    cut: bool = False  # `rejected` breaks off where the policy ran out of tokens
    length: int | None = None  # how many of `messages` are the history; None: all
    path: str = ""  # where it comes from: file, line, user turn (0 where the file does not say)
    line: int = 0
    turn: int = 0
    dialogue: int = 0  # number of the dialogue in its file
    prompt: list | None = None  # the tokens of instruction, context and history, once they are made

    @property
    def history(self):
        """Messages, the last by the user; with the context: the prompt p."""
        return self.messages[: self.length]

    @property
    def where(self):
        return self.path and f"{self.path}:{self.line}"

    @property
    def at(self):
        """Where it is in its file: line and turn, as in "17.2", or the line alone."""
        return f"{self.line}.{self.turn}" if self.turn else self.line


def same_words(pair):
    """Whether both sides say the same but for white space: then they teach nothing."""
    chosen, rejected = pair.chosen, pair.rejected
    return [(r, t.split()) for r, t in chosen] == [(r, t.split()) for r, t in rejected]


def dialogues(pairs):
    """Index lists of consecutive pairs of one dialogue; of conversations, each for itself."""
    groups = groupby(range(len(pairs)), lambda i: getattr(pairs[i], "dialogue", i))
    return [list(group) for _, group in groups]


# --------------------------------------------------------------------------------------------------
# Algorithm 1


@dataclass
class ACTDataset:
    """The paper's Algorithm 1 in one call: a Pair for every user turn of the conversations."""

    dataset: list  # as read_vertex_jsonl gives them; with is_preference: as read_preferences does
    target_label: str  # CLARIFY: what the preference model shows where answering is right
    icl_examples: int  # how many examples of such questions it sees (at least one)
    preference_model: object = None  # [(Pair, examples: [Pair])] -> [question]; None: by rule
    class_balance: dict | None = None  # e.g. {"CLARIFY": 2}: multiples of each action's pairs
    is_preference: bool = False  # finished pairs, which are only balanced
    action_model: object = None  # [reply] -> [action], of turns without a label; None: by rule
    seed: int = 0

    def prepare_datasets(self):
        """The pairs, in the order of the data; the turns of a dialogue stay together."""
        if self.target_label != CLARIFY:
            raise InputError(f"target_label is {self.target_label!r}, expected {CLARIFY!r}")
        if self.is_preference:
            return balance(self.dataset, self.class_balance, self.seed)
        conversations = deepcopy(self.dataset)  # which get labels
        missing = missing_labels(conversations)
        label_turns(missing, (self.action_model or rule_actions)([reply for _, reply in missing]))
        pairs, _ = make_pairs(conversations)
        requests = question_requests(pairs, self.icl_examples, self.seed)
        reject_questions(requests, (self.preference_model or rule_questions)(requests))
        return balance(pairs, self.class_balance, self.seed)


def missing_labels(conversations):
    """[(user message, the reply's text)] of the turns that have a reply but no gold action."""
    return [
        (turn, reply["content"])
        for conversation in conversations
        for turn, reply in pairwise(conversation["messages"])
        if (turn["role"], reply["role"]) == ("user", "model")
        and "requires_clarification" not in turn
    ]


def label_turns(missing, actions):
    """Gives the user messages of `missing_labels` the actions of their replies."""
    for (message, _), action in zip(missing, actions, strict=True):
        message["requires_clarification"] = action == CLARIFY


def make_pairs(conversations):
    """(a Pair for every user turn that is answered in the end, [(line, turn, why)] of the others).

    The `rejected` of an ANSWER turn is left empty: see `reject_questions`.
    """
    pairs, skipped = [], []
    for number, conversation in enumerate(conversations, start=1):
        path, line = conversation.get("path", ""), conversation.get("line", number)
        messages = conversation["messages"]
        said = messages_of(messages)
        context = said.pop(0)[1] if said[0][0] == "system" else ""
        messages = messages[-len(said) :]
        ends = gold_ends(messages)
        users = [i for i, (role, _) in enumerate(said) if role == "user"]
        for turn, i in enumerate(users, start=1):
            if i not in ends:
                skipped.append((line, turn, "no answer follows"))
                continue
            gold = said[i + 1 : ends[i] + 1]  # [question, the user's reply, ...] answer
            pair = Pair(context, said, ANSWER, gold, [], gold, gold[-1][1], length=i + 1,
                        path=path, line=line, turn=turn, dialogue=number)  # fmt: skip
            if messages[i]["requires_clarification"]:
                pair.action = CLARIFY
                pair.rejected = gold[-1:]  # answering at once
            pairs.append(pair)
    return pairs, skipped


LONGEST_GOLD = 100  # messages: an endless exchange of questions would take memory as its square


def gold_ends(messages):
    """{index of a user message: index of the first answer}, of those that have one."""
    ends = {}
    for i in reversed(range(len(messages) - 1)):
        turn, reply = messages[i], messages[i + 1]
        if turn["role"] == "user" and reply["role"] == "model" and reply["content"].strip():
            end = i + 1
            if turn["requires_clarification"]:  # this reply asks; the user's to it comes next
                end = ends.get(i + 2, math.inf)
            if end - i < LONGEST_GOLD:
                ends[i] = end
    return ends


def question_requests(pairs, icl_examples, seed):
    """[(Pair, examples: [Pair])] of the turns to answer: what a preference model is told.

    It writes the question that loses there. Examples are CLARIFY turns, drawn from other dialogues,
    and from the own one only where others run out.
    """
    pool = [pair for pair in pairs if pair.action == CLARIFY]
    owners = [pair.dialogue for pair in pool]  # ascending: those of a dialogue are one range
    requests = []
    for i, pair in enumerate(pairs):
        if pair.action == ANSWER:
            rng = random.Random(f"{seed}/{i}")
            start, stop = bisect_left(owners, pair.dialogue), bisect_right(owners, pair.dialogue)
            others = len(pool) - (stop - start)
            count = min(max(1, icl_examples), others)
            drawn = rng.sample(range(others), count)
            drawn = [k if k < start else k + stop - start for k in drawn]
            missing = min(max(1, icl_examples) - count, stop - start)
            drawn += rng.sample(range(start, stop), missing)
            requests.append((pair, [pool[k] for k in drawn]))
    return requests


def reject_questions(requests, questions):
    """Fills `rejected` of the pairs of `question_requests`; by rule where a question is useless."""
    for (pair, examples), question in zip(requests, questions, strict=True):
        useless = ([], pair.chosen[0][1].split())  # two equal sides would teach nothing
        texts = (question or "", *rule_questions([(pair, examples), (pair, [])]))
        texts = (text for text in texts if text.split() not in useless)
        pair.rejected = [("model", next(texts, "??"))]


def balance(pairs, class_balance, seed):
    """Draws round(multiple * count) pairs of an action, with replacement; the order stays."""
    class_balance = expect(class_balance or {}, "class_balance", dict)
    kept = [i for i, pair in enumerate(pairs) if pair.action not in class_balance]
    for action, multiple in class_balance.items():
        number = expect(multiple, f"class_balance[{action!r}]", int, float)
        if action not in OTHER or not 0 <= number <= 1000:
            raise InputError(
                f"class_balance has {action!r}: {number}, expected CLARIFY or ANSWER and 0 to 1000"
            )
        indices = [i for i, pair in enumerate(pairs) if pair.action == action]
        rng = random.Random(f"{seed}/class_balance/{action}")
        kept += rng.choices(indices, k=round(number * len(indices))) if indices else []
    return [pairs[i] for i in sorted(kept)]


def random_actions(pairs, seed):
    """A coin's action for each turn; if it is not the gold one, the sides swap (ablation)."""
    drawn = []
    for i, pair in enumerate(pairs):
        if random.Random(f"{seed}/random_actions/{i}").random() < 0.5:
            sides = {"chosen": pair.rejected, "rejected": pair.chosen}
            pair = replace(pair, action=OTHER[pair.action], **sides)
        drawn.append(pair)
    return drawn


def split_dialogues(rows, share, seed):
    """(rows to train on, rows held out): a share of the conversations, or of pairs' dialogues."""
    groups = dialogues(rows)
    rng = random.Random(f"{seed}/validation_split")
    held = {i for group in rng.sample(groups, round(share * len(groups))) for i in group}
    parts = ([], [])
    for i, row in enumerate(rows):
        parts[i in held].append(row)
    return parts


def get_datasets_from_config(config):
    """(training pairs, validation pairs) of a configuration's files, by rules; the first balanced.

    What needs a run is left to `act.load_pairs`: halves, labels from elsewhere, helper models.
    """
    training, files = config.training_config, config.data_config
    read = read_preferences if training.is_preference else read_conversations
    train, held = (
        read(path)[0] if path else [] for path in (files.train_path, files.validation_path)
    )
    if files.validation_split and not held:
        train, held = split_dialogues(train, files.validation_split, training.seed)
    train, held = (
        ACTDataset(rows, CLARIFY, training.icl_examples, None, class_balance,
                   training.is_preference, None, training.seed).prepare_datasets()
        for rows, class_balance in ((train, training.class_balance), (held, None))
    )  # fmt: skip
    return train, held


# --------------------------------------------------------------------------------------------------
# Checks
# What is in a file of conversations and what is wrong with it: for `data.py check`, and when a run
# starts. Turns are named "line.turn", as in "17.2".


def check_conversations(path, pairs, skipped, labelled=0, actions=()):
    """Lines about what is wrong with the conversations of a file.

    pairs, skipped: as `make_pairs` returns them. labelled: how many turns the classifier gave their
    action. actions: what it says of the gold replies of all pairs, where it was asked.
    """
    found = defaultdict(list)
    for line, turn, why in skipped:
        found[f"user turns are skipped, {why}"].append(f"{line}.{turn}")
    apart = [pair for pair, action in zip(pairs, actions, strict=False) if pair.action != action]
    for pair in apart:
        says = f"labelled {pair.action}, but the classifier says {OTHER[pair.action]}"
        found[f"user turns are {says}"].append(pair.at)
    for pair, action in zip(pairs, actions, strict=False):
        if action == pair.action == ANSWER and MARK.search(NOT_SAID.sub("", pair.gold[0][1])):
            what = "replies have a question mark, but the rule takes them for answers"
            found[what].append(pair.at)
    lines = [f"{path}: the action classifier labelled {labelled} turns"] if labelled else []
    lines += noted(path, found)
    if len(apart) > 0.1 * len(pairs):
        lines.append(
            f"{path}: labels and classifier disagree in {len(apart) / len(pairs):.0%} of turns. "
            "ACT judges the policy's replies with the same classifier, so there the gold action "
            "can hardly win, and evaluations count against it: set training_config.action_labels "
            "to 'classifier', or cast another action_model_config"
        )
    other, replies = not_english([pair.gold[0][1] for pair in pairs]) if actions else (0, 0)
    if other > 0.25 * replies:
        lines.append(
            f"{path}: {other} of {replies} longer replies do not look English; the rule that says "
            "whether a reply asks knows question marks, but requests without one in English alone: "
            "where replies ask in other words, label them and cast a model as action_model_config"
        )
    return lines


def not_english(texts):
    """(those without one of the commonest English words, all) of the texts of 6 words or more."""
    words = [set(re.findall(r"[^\W\d_]+", text.lower())) for text in texts if not QUERY.match(text)]
    longer = [found for found in words if len(found) >= 6]
    return sum(not found & ENGLISH for found in longer), len(longer)


def summary(path, conversations, pairs, skipped):
    """How much there is in a file of conversations, in a line."""
    asked = sum(pair.action == CLARIFY for pair in pairs)
    turns = f"{asked} {CLARIFY}, {len(pairs) - asked} {ANSWER}, {len(skipped)} skipped"
    total = f"{len(conversations)} conversations, {len(pairs) + len(skipped)} user turns"
    return f"{path}: {total}: {turns}"


def check_file(path):
    """Lines about a file of conversations, with the rule as the classifier. Raises InputError."""
    conversations, lines = read_conversations(path)
    missing = missing_labels(conversations)
    label_turns(missing, rule_actions([reply for _, reply in missing]))
    pairs, skipped = make_pairs(conversations)
    actions = rule_actions([pair.gold[0][1] for pair in pairs])
    lines += check_conversations(path, pairs, skipped, len(missing), actions)
    return [summary(path, conversations, pairs, skipped), *lines]


# --------------------------------------------------------------------------------------------------
# Files of pairs
# Texts and JSON lines that hold a pair: made when a file is written, taken apart when one is read,
# nowhere else.

PAIR_MARKS = {"input_text", "completions", "chosen", "rejected", "preferred_output"}
PAIR_KEYS = {*SYSTEM_KEYS} | PAIR_MARKS | set(
    """output_text dialogue_policy gold_target gold_trajectory chosen_policy rejected_policy
    contents prompt input non_preferred_output""".split()
)
PAIR_FORMS = ("input_text and more (the published code), contents and completions (Vertex AI), "
              "chosen and rejected (TRL), or preferred_output and non_preferred_output (OpenAI); "
              "for conversations training_config.is_preference is false")  # fmt: skip
SPEAKER_LINE = re.compile(r"^(User|Assistant): ", re.MULTILINE)
# what a line inside a message must not begin with, or be
MARKED = r"\\*(?:(?:User|Assistant): |\[conversation\]$)"
TO_ESCAPE = re.compile(rf"^(?={MARKED})", re.MULTILINE)
ESCAPED = re.compile(rf"^\\(?={MARKED})", re.MULTILINE)
UNANSWERED = "This question was not answered by the Assistant."  # the published code's stand-in


def format_messages(messages):
    """Messages -> "Assistant: text\\nUser: text\\n..."; what looks like a mark gets a backslash."""
    escaped = [(SPEAKERS[role], TO_ESCAPE.sub(r"\\", text)) for role, text in messages]
    return "".join(f"{name}: {text}\n" for name, text in escaped)


def split_messages(text):
    """The inverse of `format_messages`: a message goes on until the next line of a speaker.

    What stands before the first such line is the model's.
    """
    before, *rest = SPEAKER_LINE.split(text)
    messages = [("model", before)] if before.strip() else []
    messages += zip(map(ROLE_NAMES.get, map(str.lower, rest[::2])), rest[1::2], strict=True)
    return [(role, ESCAPED.sub("", said.removesuffix("\n"))) for role, said in messages]


def make_record(pair):
    """A record of the published research code: its preference example, all of it text."""
    history, gold = format_messages(pair.history), format_messages(pair.gold)
    prompt = f"{pair.instruction}\n[context]\n{pair.context}\n[conversation]\n{history}"
    return {
        "input_text": prompt,
        "output_text": gold,
        "dialogue_policy": pair.action,
        "gold_target": format_messages([("model", pair.target)]),
        "gold_trajectory": prompt + gold,
        "chosen_policy": pair.action,
        "rejected_policy": OTHER[pair.action],
        "chosen": format_messages(pair.chosen),
        "rejected": format_messages(pair.rejected),
    }


def parse_record(row, where):
    """The inverse of `make_record`, for files of the published code too. Raises InputError.

    Their input_text may hold "[data]" lines, which are the context's. Of clarifying turns it also
    holds the gold answer, as the published code wrote it: such a file trains a model that has seen
    what it is asked for.
    """
    keys = "input_text dialogue_policy chosen rejected output_text gold_target".split()
    texts = [require(row, key, f"{where}: ", str) for key in keys]
    prompt, action, chosen, rejected, gold, target = texts
    if action not in OTHER:
        raise InputError(f"{where}: dialogue_policy is {action!r}, expected CLARIFY or ANSWER")
    if not chosen or not target.strip() or UNANSWERED in target:
        raise LeftOut("no answer")
    # the last such line: a context may hold one, a message does not
    head, mark, said = f"\n{prompt}".rpartition("\n[conversation]\n")
    said = said.lstrip("\n")
    if not mark or not SPEAKER_LINE.match(said):
        raise InputError(f"{where}: input_text has no line '[conversation]' and 'User: ' after it")
    instruction, _, context = head.partition("\n[context]\n")
    pair = pair_of_sides(where, *map(split_messages, (said, chosen, rejected, gold)))
    target = split_messages(target)[-1][1]
    return replace(pair, context=context, instruction=instruction[1:], action=action, target=target)


def vertex_preference(pair):
    """Vertex AI's preference-tuning form. Of a trajectory only its first reply fits."""

    def turn(role, text):
        return {"role": role, "parts": [{"text": text}]}

    system = f"{pair.instruction}\n{pair.context}" if pair.context else pair.instruction
    sides = (1, pair.chosen), (0, pair.rejected)
    return {
        "systemInstruction": {"parts": [{"text": system}]},
        "contents": [turn(*message) for message in pair.history],
        "completions": [{"score": score, "completion": turn(*side[0])} for score, side in sides],
    }


def trl_preference(pair):
    """TRL's conversational preference form; the context is the system message."""
    names = {"model": "assistant"}
    system = [("system", pair.context)] if pair.context else []
    sides = {"prompt": system + pair.history, "chosen": pair.chosen, "rejected": pair.rejected}
    return {
        key: [{"role": names.get(role, role), "content": text} for role, text in messages]
        for key, messages in sides.items()
    }


def parse_sides(row, where, odd):
    """The inverse of the two above, for TRL's other forms and OpenAI's too. Raises InputError.

    A side may be a text, or repeat the prompt, with a system message or without; without a prompt
    it is what both begin with.
    """
    keys = ("prompt", "chosen", "rejected")
    if "preferred_output" in row:
        keys = ("input", "preferred_output", "non_preferred_output")
    if "completions" in row:
        row = vertex_as_trl(row, where, odd)
    found = []
    for key in keys:
        turns = row.get(key, [])
        if isinstance(turns, dict):  # OpenAI's input, or a message alone
            turns = turns.get("messages", [turns])
        elif isinstance(turns, str):
            turns = [{"role": "user" if key == "prompt" else "model", "content": turns}]
        before = system_messages(row, where) if key == keys[0] else ()
        found.append(messages_of(parse_messages(turns, f"{where}: {key}", odd, before)))
    prompt, *sides = found
    for side in sides:
        if side and side[0][0] == "system":
            system = side.pop(0)
            if not prompt or prompt[0][0] != "system":
                prompt.insert(0, system)
    asked = [message for message in prompt if message[0] != "system"]
    if not asked:
        asked = os.path.commonprefix(sides)
        prompt += asked
    for side in sides:
        if side[: len(asked)] == asked:
            del side[: len(asked)]
        if side and side[-1][0] == "user":
            odd.append("sides end with the user's message, which is left out")
            side.pop()
    return pair_of_sides(where, prompt, *sides)


def vertex_as_trl(row, where, odd):
    """The completion with the higher score is chosen; our own instruction is taken off."""
    conversation = {key: value for key, value in row.items() if key != "completions"}
    prompt = parse_conversation(conversation, where, odd)["messages"]
    if prompt[0]["role"] == "system":
        text = f"{prompt[0]['content']}\n"
        prompt[0]["content"] = text.removeprefix(f"{INSTRUCTION}\n")[:-1]
    try:
        entries = map(given, row["completions"])
        scored = [(0 + entry["score"], entry["completion"]) for entry in entries]
        (_, rejected), (_, chosen) = sorted(scored)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise InputError(
            f"{where}: completions are no two of score and completion, with different scores"
        ) from None
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def pair_of_sides(where, prompt, chosen, rejected, gold=None):
    """A Pair whose sides begin with a reply; the action, and the gold answer, by `rule_actions`."""
    for side in (chosen, rejected, gold or chosen):
        if not side or not side[0][1].strip():
            raise LeftOut("a side that says nothing")
        if side[0][0] != "model":
            raise InputError(f"{where}: a side does not begin with the assistant's text")
    if not prompt or prompt[-1][0] != "user":
        raise InputError(
            f"{where}: has no prompt that ends with the user's text before the sides; "
            f"known are {PAIR_FORMS}"
        )
    context = prompt.pop(0)[1] if prompt[0][0] == "system" else ""
    actions = rule_actions([chosen[0][1], rejected[0][1]])
    trajectory = chosen
    if actions == [CLARIFY, ANSWER] and len(chosen) == 1:  # Vertex's form has room for one reply
        trajectory = rejected  # Algorithm 1 rejects answering at once: that answer is the target
    return Pair(context, prompt, actions[0], chosen, rejected, gold or chosen, trajectory[-1][1])


def messages_of(turns):
    """[{"role", "content"}] -> [(role, text)]."""
    return [(turn["role"], turn["content"]) for turn in turns]


def parse_pair(row, where, odd):
    """A Pair of a line in any of the forms. Raises InputError."""
    row = given(row)
    if "input_text" in row:
        pair = parse_record(row, where)
    elif row.keys() & PAIR_MARKS:
        pair = parse_sides(row, where, odd)
    else:
        raise InputError(f"{where}: is no pair in a known form, expected {PAIR_FORMS}")
    unread = [f"lines have {key!r}, which nothing reads" for key in sorted(row.keys() - PAIR_KEYS)]
    if any(CONTROL.search(text) for _, text in pair.messages + pair.chosen + pair.rejected):
        unread.append(FORMATTED)
    odd += [text for text in unread if text not in odd]
    if same_words(pair):
        raise LeftOut("two equal sides, which teach nothing,")
    return pair


def read_preferences(path, raw=None):
    """(pairs, lines about what was left out or is odd) of a JSONL of PAIR_FORMS. Raises InputError.

    A pair belongs to the dialogue of the one before where its history goes on from that one's; the
    pairs of a dialogue share its messages.
    """
    rows, lines = parse_lines(path, parse_pair, raw)
    pairs, found = [], defaultdict(list)
    for line, pair in rows:
        before = pairs[-1] if pairs else pair
        same = (pair.context, pair.instruction) == (before.context, before.instruction)
        goes_on = same and pair.messages[: before.length] == before.history
        pair.path = str(path)
        pair.line = line
        pair.length = len(pair.messages)
        pair.dialogue = before.dialogue + (not pairs or not goes_on)
        if goes_on:
            before.messages[:] = pair.messages
            pair.messages = before.messages
        pairs.append(pair)
    preferred = {json.dumps([pair.context, pair.history, pair.chosen]) for pair in pairs}
    for pair in pairs:
        if json.dumps([pair.context, pair.history, pair.rejected]) in preferred:
            found["pairs reject what another pair of the same turn prefers"].append(pair.line)
        if pair.action == CLARIFY and len(pair.gold) == 1:
            what = "clarifying turns lack the user's reply: a rule cannot play that user"
            found[what].append(pair.line)
    return pairs, lines + noted(path, found)


PREFERENCE_FORMS = {"records": make_record, "vertex": vertex_preference, "trl": trl_preference}


def write_preferences(path, pairs, form):
    """Writes pairs, one a line, in a form of PREFERENCE_FORMS."""
    write_jsonl(path, map(PREFERENCE_FORMS[form], pairs))


# --------------------------------------------------------------------------------------------------
# Metrics
# How an answer is scored and how actions are compared. A new heuristic is a row of HEURISTICS and a
# function of the predicted answer, the gold one and the pair's context; it returns (exact match,
# score), or the score alone.

NOT_IN_NUMBERS = str.maketrans("", "", "'\"\\$€£¥%(),[]")
PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "percent": 0.01}


def scale_of(word):
    return next((value for name, value in SCALES.items() if name in word), 1)


def number_text(token):
    """A lower-case token as PACIFIC's and TAT-QA's scorer writes its number, or None for no number.

    Its quirks are kept, since published figures contain them: "12%" is 0.12, "(5)" is -5, ".5" is
    the text "None".
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
    except (ValueError, OverflowError):  # no number, or thousands of digits: too many for Python
        return None


def drop_words(text):
    """The words that DROP compares: lower case, numbers in one form, no punctuation or articles."""
    words = []
    for token in text.lower().split(" "):
        number = number_text(token)
        if number is None:
            token = token.translate(PUNCTUATION)
            number = number_text(token)  # "05/06" is one only now
        words += ARTICLES.sub(" ", token if number is None else number).split()
    return words


def f1_of(common, said, wanted):
    """F1 of so many common ones; an empty side is precise, or complete, by definition."""
    precision = common / said if said else 1.0
    recall = common / wanted if wanted else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def drop_f1(predicted, gold, context=""):
    """(exact match, F1) of two texts, as PACIFIC's scorer counts them: sets of words, two decimals.

    Rules: github dengyang17/PACIFIC, tatqa_metric.py, get_metrics.
    """
    said, wanted = drop_words(predicted), drop_words(gold)
    f1 = f1_of(len(set(said) & set(wanted)), len(set(said)), len(set(wanted)))
    return float(said == wanted), round(100 * f1) / 100  # rounded as numpy does


def coqa_f1(predicted, gold, context=""):
    """(exact match, F1) of two texts as CoQA counts them: repeated words count."""
    said, wanted = (
        ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split() for text in (predicted, gold)
    )
    common = (Counter(said) & Counter(wanted)).total()
    same = float(said == wanted)
    return same, f1_of(common, len(said), len(wanted)) if said and wanted else same


def exact_match(predicted, gold, context=""):
    """(1.0, 1.0) where the texts are equal but for case and spacing, else (0.0, 0.0)."""
    same = float(predicted.casefold().split() == gold.casefold().split())
    return same, same


MAGNITUDES = {
    **dict.fromkeys("k thousand tausend".split(), 10**3),
    **dict.fromkeys("million millionen mio mn".split(), 10**6),
    **dict.fromkeys("billion bn milliarde milliarden mrd".split(), 10**9),
}
UNITS = """€ eur euro euros|$ us$ usd dollar dollars|£ gbp pound pounds|% percent prozent
    |min minute minutes minuten|h hour hours stunde stunden|day days tag tage tagen|week weeks woche
    wochen|month months monat monate monaten|year years jahr jahre jahren|g gram grams gramm|kg kilo
    kilos|mm|cm|m meter meters metre metres|km|ml|l liter liters litre litres"""
UNITS = {word: words.split()[0] for words in UNITS.split("|") for word in words.split()}
BLANK = "[ \u00a0\u2009\u202f]"
NUMBER = re.compile(rf"""(?x)
    (?<![\w.,]) ([-−](?=\S))? (us\$|[€$£]|(?:eur|usd|gbp)(?![^\W\d]))? {BLANK}? ([-−](?=\S))?
    (?: ([1-9]\d{{0,2}}(?:([.,'’]|{BLANK})\d{{3}})(?:\5\d{{3}})*) (?:[.,](\d+))? (?![.,]?\d)
    | (\d+(?:[.,]\d+){{2,}}) | (\d+)(?:[.,](\d+))? )  # groups of three; a date; any other
    {BLANK}? (?:({"|".join(sorted(MAGNITUDES, reverse=True))})\b\.?)?
    {BLANK}? ([€$£%]|[a-z]+(?![^\W\d]))?""")


def number_match(predicted, gold, context=""):
    """(1.0, 1.0) where two texts have the same numbers and units, else (0.0, 0.0); without numbers
    `drop_f1`. As people write them: "44,85 €", "€44.85"; "1.299,00", "1 299", "$1,299"."""
    said = quantities(predicted)
    wanted = quantities(gold)
    same = float(said == wanted)
    return (same, same) if wanted else drop_f1(predicted, gold)


def quantities(text):
    """How often each (number, unit) stands in a text; of a date, or a version, each part."""
    found = Counter()
    for match in NUMBER.finditer(text.lower()):
        sign, before, minus, groups, _, cents, parts, whole, decimals, scale, after = match.groups()
        if parts:
            found.update((float(part), None) for part in re.split("[.,]", parts))
            continue
        if before and after in ("m", "b"):  # "$5m"
            scale = {"m": "million", "b": "billion"}[after]
        digits = re.sub(r"\D", "", groups or whole)
        number = float(f"{digits}.{cents or decimals or 0}") * MAGNITUDES.get(scale, 1)
        number = round(-number if sign or minus else number, 6)
        found[number, UNITS.get(before) or UNITS.get(after)] += 1
    return found


# what a query may do, and with which functions; of these printf is none: it can loop for seconds
SQL_KINDS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION,
             sqlite3.SQLITE_RECURSIVE}  # fmt: skip
SQL_FUNCTIONS = set(
    """abs avg ceil ceiling coalesce concat count cume_dist date datetime dense_rank
    exp first_value floor glob group_concat ifnull iif instr julianday lag last_value lead length
    like ln log lower ltrim max min mod nth_value ntile nullif percent_rank pow power quote rank
    replace round row_number rtrim sign sqrt strftime string_agg substr substring sum time total
    trim trunc typeof unicode unixepoch upper""".split()
)
SQL_SECONDS, SQL_MEMORY = 0.5, 2**25  # of processor time, bytes
SQL_TEXT = 10_000  # characters of a query
# no step may be long, since only between steps it is looked whether the time is over
SQL_LIMITS = {"ATTACHED": 0, "LENGTH": 20_000, "COLUMN": 100, "EXPR_DEPTH": 100,
              "VDBE_OP": 50_000, "COMPOUND_SELECT": 50, "LIKE_PATTERN_LENGTH": 200}  # fmt: skip
SQL_QUOTED = re.compile(
    r"""'[^']*(?:'|\Z)|"[^"]*(?:"|\Z)|`[^`]*(?:`|\Z)|\[[^]]*(?:]|\Z)|--[^\n]*|/\*.*?(?:\*/|\Z)""",
    re.DOTALL,
)
SQL_ERRORS = (sqlite3.Error, sqlite3.Warning, MemoryError,
              ValueError)  # of NUL, and of half a character  # fmt: skip


def execution_match(predicted, gold, context=""):
    """(same text, same rows) of two SQL queries on the tables that `context` makes, an SQL script.

    A query may stand in a ```sql block. Same rows: in any order, unless the gold query ends in
    ORDER BY, whatever the columns are called; same text: but for case, white space and a last
    semicolon. A prediction that is no single query, or takes too much time or memory, scores 0 and
    changes nothing. A gold text that asks is no query: `exact_match`. Raises InputError for a
    context or gold query that fails.
    """
    if is_question(gold):
        return exact_match(predicted, gold)
    said, query = sql_of(predicted), sql_of(gold)
    with closing(open_database(":memory:")) as database:
        failing, text = "context", context
        try:
            limit_next(database)
            database.executescript(context)
            failing, text = "gold query", query
            wanted = list(rows_of(database, query))
        except SQL_ERRORS as error:
            problem = f"the {failing} {fold(text)[:80]!r} fails: {str(error) or 'out of memory'}"
            raise InputError(f"execution_match: {problem}") from None
        numbered = enumerate if is_ordered(query) else iter
        missing = Counter(numbered(wanted))
        try:
            for row in numbered(rows_of(database, said)):
                missing[row] -= 1
                if missing[row] < 0:
                    return 0.0, 0.0
        except SQL_ERRORS:
            return 0.0, 0.0
    same_rows = float(not any(missing.values()))
    same_text, _ = exact_match(*(text.rstrip("; \n") for text in (said, query)))
    return same_rows * same_text, same_rows


def is_ordered(query):
    """Whether a query has an ORDER BY of its own, not one of what stands in brackets."""
    bare, inner = "", SQL_QUOTED.sub(" ", query)
    while bare != inner:
        bare = inner
        inner = re.sub(r"\([^()]*\)", " ", bare)
    return re.search(r"(?i)\border\s+by\b", bare) is not None


def sql_of(text):
    """The query in a fenced block, or the whole text."""
    fenced = re.search(r"```\w*\s(.*?)```", text, re.DOTALL)
    return fenced[1] if fenced else text


def open_database(address):
    """A database for SQL that nobody has read: it reaches no other file and takes little memory."""
    if sys.version_info < (3, 11):
        raise InputError("SQL needs Python 3.11, whose sqlite3 can limit what a query takes")
    database = sqlite3.connect(address, uri=True, isolation_level=None)
    database.execute(f"PRAGMA hard_heap_limit = {SQL_MEMORY}")  # of this process, from now on
    database.execute("PRAGMA temp_store = MEMORY")
    for limit, most in SQL_LIMITS.items():
        database.setlimit(getattr(sqlite3, f"SQLITE_LIMIT_{limit}"), most)
    return database


def limit_next(database, kinds=None, seconds=None):
    """What is run next ends after SQL_SECONDS and uses SQL_FUNCTIONS; kinds: all that it may do."""
    end = time.thread_time() + (seconds or SQL_SECONDS)

    def authorize(kind, _, function, *__):
        known = kind != sqlite3.SQLITE_FUNCTION or function.lower() in SQL_FUNCTIONS
        allowed = known and (not kinds or kind in kinds) and time.thread_time() < end
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    database.set_authorizer(authorize)
    database.set_progress_handler(lambda: time.thread_time() > end, 100)


def rows_of(database, query):
    """Yields the rows of one query, numbers equal to 12 digits made equal. It reads tables only."""
    limit_next(database, SQL_KINDS)
    cursor = database.execute(query if len(query) <= SQL_TEXT else "")
    if cursor.description is None:
        raise ValueError("no query, or too long")
    for row in cursor:
        yield tuple(float(f"{value:.12g}") if type(value) is float else value for value in row)


HEURISTICS = {
    "drop_f1": drop_f1,
    "coqa_f1": coqa_f1,
    "exact_match": exact_match,
    "number_match": number_match,
    "execution_match": execution_match,
}


def scored(heuristic, predicted, gold, context=""):
    """(exact match, score), also of a heuristic that returns the score alone."""
    score = heuristic(predicted, gold, context)
    return score if isinstance(score, tuple) else (exact_match(predicted, gold)[0], float(score))


def heuristic_check(pairs, heuristic, tolerance):
    """How far a heuristic can be trusted: (false wins, tried, false losses, tried).

    False wins: gold answers of other turns of the dialogue that score above the tolerance. False
    losses: gold answers that do not when they stand in a short sentence.
    """

    def wins(answer, pair):
        return scored(heuristic, answer, pair.target, pair.context)[1] > tolerance

    others = []
    for group in dialogues(pairs):
        answers = {pairs[i].target for i in group[:20]}
        others += [(answer, pairs[i]) for i in group for answer in answers - {pairs[i].target}]
    false_losses = sum(not wins(f"The answer is {pair.target}.", pair) for pair in pairs)
    return sum(wins(*other) for other in others), len(others), false_losses, len(pairs)


def action_metrics(gold, predicted):
    """How well the actions agree, as fractions; CLARIFY is the positive class of the binary ones.

    F1 over an action that nobody took is 0; the means are over the actions that occur
    (scikit-learn's f1_score with zero_division=0). Every value is None where there is nothing to
    compare.
    """
    hits = Counter(a for a, b in zip(gold, predicted, strict=True) if a == b)
    count = max(1, len(gold))
    support, taken = Counter(gold), Counter(predicted)
    f1 = {each: 2 * hits[each] / (support[each] + taken[each]) for each in support | taken}
    values = {
        "Accuracy": hits.total() / count,
        "Weighted F1": sum(f1[action] * support[action] for action in f1) / count,
        "Macro F1": sum(f1.values()) / max(1, len(f1)),
        "Binary F1": f1.get(CLARIFY, 0.0),
        "Binary Recall": hits[CLARIFY] / max(1, support[CLARIFY]),
        "Binary Precision": hits[CLARIFY] / max(1, taken[CLARIFY]),
    }
    return values if gold else dict.fromkeys(values)


def mean_or_none(values):
    """The mean, or None for no values: a figure over nothing is not a number to report."""
    values = list(values)
    return sum(values) / len(values) if values else None


# --------------------------------------------------------------------------------------------------
# Rules
# The helpers that need no model: they know the gold trajectory, and work offline on any dataset.

NOTHING_TO_ADD = "I have nothing to add."
COMMON_WORDS = set(
    """a amount an and any are ask asking about be by can could did do does exactly
    for from how i in interested is it kind know like looking mean me more of on one or please
    precisely referring s say sort specific specifically talking that the there they thing this to
    type value want was were what which who whose would you your""".split()
)
ENGLISH = set(
    "the of to and is you for it that what are with your which can this have be by".split()
)
SLOTS = {  # words that ask for the same kind of thing
    **dict.fromkeys("date day fiscal month period quarter time when year".split(), "time"),
    **dict.fromkeys("area country place region where".split(), "place"),
}
MARKER = re.compile(r"<[/|]?\w+\s*[/|]?>|\[/?INST\]|&\w+;")  # "</s>", "<|im_end|>", "&nbsp;"
NOT_SAID = re.compile(r"""(?isx)```.*?(?:```|\Z)|`[^`\n]*`|(?:https?://|www\.)\S*\w|<think.*?
    (?:</think|\Z)|[?？؟](?=["'”’»」』]\s*(?-i:[a-z,;]))""")  # and what is quoted within a sentence
QUERY = re.compile(r"""(?isx)\s*(?:(?:--[^\n]*\n|/\*(?:(?!\*/).)*\*/)\s*)*  # its quotes ask nobody
    (?:select\b.*\b(?:from|select|where)\b
    | with\s+(?:recursive\s+)?\w+\s*(?:\([^)]*\)\s*)?as\s*\()""")
SENTENCE_END = re.compile(r"""(?<=[.?؟…])["'”’»)\]*_]*\s+|(?<=[。？])(?![」』”"])|\n""")
MARK = re.compile("[?？؟]")
QUESTION_END = re.compile(r"(?:(?<![=<>(,|&])(?<![=<>(,|&] )[?？؟]|か。)(?:[^\w.。]|_)*\Z")
REQUEST = re.compile(r"""(?ix)\b(?:please|just|could\ you|can\ you)\b.{0,20}\b(?:tell|give|send)
    \ (?:me|us)\b(?!\ a\ moment) | \blet\ (?:me|us)\ know\ (?:wh|the\b|your\b)
    | \b(?:please|kindly)\ (?:(?:specify|clarify|(?:confirm|indicate)\ wh\w+)\b
    |(?:provide|share|state)\ (?:(?:me|us)\ (?:with\ )?)?(?:wh\w+|(?:the\ \w+\ of\ )?your)\b)
    | \b(?:I|we)(?:['’](?:d|ll)|\ will)?\ need\ (?:to\ know\ wh|your\b) | 教えてください
    | (?:\A|!\s)(?:(?:could|can|would)\ you\b|(?:what|which)\ (?!a\ )[\w\ ]{1,40}\Z)""")
OFFER = re.compile(r"""(?ix)\A(?!.*\b(?:or|wh\w+|how)\b).*\b(?:(?:shall|should|may)\ I|also
    |can\ I\ (?:help|do|assist)|(?:want|like)\ (?:me\ )?to|(?:does|did|was)\ (?:that|this|it))\b""")
CLOSING = re.compile(r"(?i)\banything else\b|\balgo más\b|\bsonst noch\b|(?:ほか|他)に")  # an offer
OPEN = re.compile(r"""(?ix).*\n\Z  # nothing follows; choices; or the user is asked, and a remark
    | (?!\W*(?:how|why)\b).*\n\s*(?:[-*•]|\(?\w{1,2}[.)])(?:\s|\Z) | (?=.*(?:\b(?:your?|or|which
    |oder|ou|o|или|welche[rns]?|quelle?|cuál)\b|どちら|どれ)).*\n(?!\W*(?:yes|no|because)\b)""")


def is_question(text):
    """Does a reply ask for what it needs to know: by a question, or by a request in English?"""
    text = SQL_QUOTED.sub("''", text) if QUERY.match(text) else text
    said = MARKER.sub(" ", NOT_SAID.sub("code", text))
    sentences = [each for each in SENTENCE_END.split(said) if re.search(r"[\w?？؟]", each)]
    for i, (sentence, after) in enumerate(pairwise([*sentences, ""])):
        asked = QUESTION_END.search(sentence[-40:])
        if not asked and REQUEST.search(sentence):
            return True
        offered = CLOSING.search(sentence) or (i and OFFER.search(sentence))
        if asked and not offered and OPEN.match(f"{sentence}\n{after}"):
            return True
    return False


def rule_actions(replies):
    return [CLARIFY if is_question(reply) else ANSWER for reply in replies]


def content_words(text):
    """What a text is about: its words in the singular, no common ones; "time" for year or month."""
    words = re.findall(r"[^\W_]+", text.lower())
    words = {re.sub(r"(?<=...)(?<!s)s\Z", "", word) for word in words}
    return {SLOTS.get(word, word) for word in words - COMMON_WORDS}


def same_question(asked, gold, topic):
    """How much a question asks for what the gold one asks, 0 to 1; topic: the user turn of both.

    For a time or a place, the other words do not matter. Else the share of the words that both
    have, where those that the question only repeats from the user do not count against it.
    """
    asked, wanted, slots = content_words(asked), content_words(gold), set(SLOTS.values())
    if slots & (asked | wanted):
        return float(bool(slots & asked & wanted))
    if not wanted:  # "Which one?" is met by any question
        return 1.0
    return len(wanted & asked) / len(wanted | (asked - content_words(topic)))


def rule_users(requests, nothing=NOTHING_TO_ADD):
    """The user's gold reply to the gold question that is asked, if half of it is; else `nothing`.

    requests: [(Pair, trajectory that ends in a question, intent)]; the rule knows no intent.
    """
    answers = []
    for pair, trajectory, _ in requests:
        best, answer = 0.0, nothing
        for (_, question), (role, reply) in pairwise(pair.gold):
            match = same_question(trajectory[-1][1], question, pair.history[-1][1])
            if role == "user" and match >= 0.5 and match > best:
                best = match
                answer = reply
        answers.append(answer)
    return answers


def rule_intents(pairs):
    """The gold trajectory itself, without its final answer, as the summary of what is wanted."""
    return [format_messages(pair.gold[:-1]).strip() for pair in pairs]


def rule_questions(requests):
    """For each (Pair, examples) the question of its first example; without one, the user's last
    line asked back, in whatever language it is."""
    return [
        examples[0].chosen[0][1] if examples else
        pair.history[-1][1].strip().split("\n")[-1].rstrip(" .!?") + "?"
        for pair, examples in requests
    ]  # fmt: skip


def fold(text):
    """The text on one line: line breaks, and the spaces around them, become one space."""
    return " ".join(filter(None, map(str.strip, re.split("[\r\n]", text))))


# --------------------------------------------------------------------------------------------------
# Converters
# Published datasets -> conversations. A new one is a function that takes an item, and a row of
# CONVERTERS.


def exchange(question, answer, clarify=False):
    """A user turn with the gold action of its reply, and that reply."""
    return [
        {"role": "user", "content": question.strip(), "requires_clarification": clarify},
        {"role": "model", "content": answer.strip()},
    ]


def convert_pacific(item):
    """An item of PACIFIC's JSON, {"table", "paragraphs", "questions"} -> messages.

    Their context: the paragraphs, one a line, then the rows of the table as "name : cell | cell".
    """
    lines = [fold(paragraph["text"]) for paragraph in item["paragraphs"]]
    for row in item["table"]["table"]:
        name, *cells = map(fold, row)
        lines.append(f"{name} : {' | '.join(cells)}")
    messages = [{"role": "system", "content": "\n".join(lines)}]
    for question in item["questions"]:
        answer, derivation = question["answer"], question["derivation"].strip()
        if isinstance(answer, list):  # spans
            answer = ", ".join(str(span).strip() for span in answer)
        elif question["answer_type"] == "arithmetic" and derivation:
            answer = f"{derivation} = {answer}"  # "2+6 = 8"
        messages += exchange(question["question"], str(answer), question["req_clari"])
    return messages


def convert_abg_coqa(item):
    """An item of Abg-CoQA's JSON -> messages.

    Of an ambiguous turn the first question, with its first reading and that reading's first answer,
    is gold.
    """
    messages = [{"role": "system", "content": item["story"].strip()}]
    for turn in item["history_turns"]:
        messages += exchange(turn["question"], turn["answer"])
    target, asked = item["target_turn"], item["clarification_turn"]
    if item["ambiguity"] == "non_ambiguous":
        return messages + exchange(target["question"], target["answer"])
    reading = asked["answers"][0]
    messages += exchange(target["question"], asked["question"], clarify=True)
    return messages + exchange(reading["clr_ans"], reading["org_ans"])


def convert_spider(item, databases):
    """An item of Spider's JSON -> messages: the script of its database, a question and the query.

    Spider has no clarifying questions: mixed with data that has, it shows when not to ask.
    """
    script = script_of(Path(databases, item["db_id"], f"{item['db_id']}.sqlite"))
    execution_match(item["query"], item["query"], script)  # raises InputError where it fails
    return [{"role": "system", "content": script}, *exchange(item["question"], item["query"])]


@cache
def script_of(path):
    """An SQL script of the tables in a file of sqlite's, with the first three rows of each."""
    lines, count = [], Counter()
    try:
        with closing(open_database(f"{path.resolve().as_uri()}?mode=ro")) as database:
            database.text_factory = lambda raw: raw.decode("utf-8", "replace")
            limit_next(database, seconds=60)
            for statement in database.iterdump():
                table = statement.partition(" VALUES(")[0]
                count[table] += 1
                made = table.startswith(("CREATE TABLE", "INSERT INTO")) and "sqlite_" not in table
                if made and count[table] <= 3:
                    lines.append(statement)
    except SQL_ERRORS as error:
        raise InputError(f"{path}: cannot be read as a database ({error})") from None
    return "\n".join(lines)


CONVERTERS = {"pacific": convert_pacific, "abg_coqa": convert_abg_coqa, "spider": convert_spider}


def convert_file(name, source, *more):
    """Writes the conversations of a published file, the last of the paths. Raises InputError."""
    *more, target = more
    content, at, conversations = parse_json(read_bytes(source), source), "the file", []
    try:
        for i, item in enumerate(content["data"] if isinstance(content, dict) else content):
            at = f"item {i}"
            row = {"messages": CONVERTERS[name](item, *more)}
            parse_conversation(row, "its conversation", [])
            conversations.append(row)
    except InputError as error:
        raise InputError(f"{source}: {at}: {error}") from None
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise InputError(
            f"{source}: {at} is not as {name} is published ({type(error).__name__}: {error})"
        ) from None
    if not conversations:
        raise InputError(f"{source}: holds no item, expected at least one")
    write_jsonl(target, conversations)


# --------------------------------------------------------------------------------------------------
# JSON
# Reading with an address in every error, writing so that a reader never sees half a file.

KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a string",
         list: "a list", dict: "an object", type(None): "null"}  # fmt: skip


def expect(value, where, *types):
    """`value` itself if it is of one of these JSON types, else an InputError at `where`."""
    if type(value) not in types:
        wanted = " or ".join(dict.fromkeys(KINDS[each] for each in types))
        raise InputError(f"{where} is {KINDS.get(type(value), value)}, expected {wanted}")
    return value


def require(owner, key, where, *types):
    """`owner[key]`, checked. where: the owner's address, "a.jsonl:7: " or "a.jsonl:7: turns[3]"."""
    expect(owner, where.rstrip(": "), dict)
    address = where + key if where.endswith(" ") else f"{where}.{key}"
    if key not in owner:
        raise InputError(f"{address} is missing")
    return expect(owner[key], address, *types)


def read_bytes(path):
    """What a file holds, without a byte order mark. Raises InputError."""
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
    """The value in UTF-8 bytes that begin at this line (from 1) of the file. Raises InputError."""
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique_keys)
        if "\\ud" in text.lower():  # the only way to half a character in valid UTF-8
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        problem = f"invalid JSON at column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        problem = f"no JSON in UTF-8 ({error})"
    raise InputError(f"{path}:{line}: {problem}")


def read_json(path):
    """The JSON object in a file. Raises InputError."""
    return expect(parse_json(read_bytes(path), path), f"{path}: the file", dict)


def parse_lines(path, parse, raw=None, shown=20):
    """([(line number from 1, parse(object, "path:line", odd))], lines about what was odd).

    Of every line that is not blank. raw: the file's bytes, where they have been read already. odd:
    a list that takes texts; a line for which parse raises LeftOut is odd and gives no result.
    Raises InputError: a line for each that is bad. Lines end at "\n" alone: U+2028 and its like may
    stand inside a JSON string.
    """
    parsed, errors, found = [], [], defaultdict(list)
    raw = read_bytes(path) if raw is None else raw
    if raw.lstrip().startswith(b"["):
        raise InputError(
            f"{path}: begins with '[', expected JSON Lines, an object a line "
            "(jq -c '.[]' makes them)"
        )
    for number, text in enumerate(raw.split(b"\n"), start=1):
        if not text.strip():
            continue
        where, odd = f"{path}:{number}", []
        try:
            row = expect(parse_json(text, path, number), f"{where}: the line", dict)
            parsed.append((number, parse(row, where, odd)))
        except LeftOut as error:
            odd = [f"lines with {error} are left out"]
        except InputError as error:
            errors.append(str(error))
        for what in odd:
            found[what].append(number)
    if errors[shown:]:
        errors[shown:] = [f"{path}: and {len(errors) - shown} more bad lines"]
    lines = noted(path, found)
    if not parsed:
        errors = errors or [*lines, f"{path}: holds nothing to use, expected a line of JSON"]
    if errors:
        raise InputError("\n".join(errors))
    return parsed, lines


def write_text(path, parts):
    """Writes beside the target and renames: `path` is either the old file or the whole new one."""
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


def json_line(row):
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path, rows):
    """One object a line."""
    write_text(path, map(json_line, rows))


def append_jsonl(path, rows):
    """Adds lines to a file, which need not be there."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(map(json_line, rows))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


# --------------------------------------------------------------------------------------------------
# Command line


def speak_plainly():
    """A terminal that lacks a character shows its code: no message must end a program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


COMMANDS = {"check": 1, **dict.fromkeys(CONVERTERS, 2), "spider": 3, "vertex_preferences": 2,
            "trl_preferences": 2}  # how many files each takes  # fmt: skip


def main(arguments=None):
    speak_plainly()
    command, *files = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if len(files) != COMMANDS.get(command):
        print("expected" + __doc__[__doc__.index("\n    python") :], file=sys.stderr)
        return 2
    target = files[-1]
    *sources, written = map(os.path.realpath, files)  # a link stays one
    try:
        if written in sources:
            raise InputError(f"{target}: is read, expected another file to write")
        if command in CONVERTERS:
            convert_file(command, *files[:-1], written)
        if command in ("check", *CONVERTERS):
            lines = check_file(target)
        else:
            pairs, lines = read_preferences(files[0])
            write_preferences(written, pairs, command.removesuffix("_preferences"))
            lines += [f"{target}: {len(pairs)} pairs of {len(dialogues(pairs))} conversations"]
        print("\n".join(lines), flush=True)
    except (InputError, OSError) as error:  # of print: a full disk, a reader that is gone
        print(f"data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os._exit(main())  # not sys.exit, which would write again what could not be written
