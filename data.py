"""Conversations, preference pairs and metrics.

What is here, in reading order:
    JSON in and out      lines with an address in every error, files renamed into place
    Vertex JSONL         `read_vertex_jsonl`: what a conversation and a turn are
    Text format "plain"  `format_prompt`, `split_dialogue` and their like: conversation <-> text
    Preference pairs     `ACTDataset`: every user turn becomes a record (Algorithm 1 of the paper, arXiv 2406.00222)
    Preference files     `read_preferences`, `write_vertex_preferences`
    Metrics              DROP F1, CoQA F1, exact match, and how often the right action was taken
    Converters           published datasets -> Vertex JSONL

    python data.py pacific IN.json OUT.jsonl
    python data.py abg_coqa IN.json OUT.jsonl
    python data.py vertex_preferences IN.jsonl OUT.jsonl
"""

import argparse
import json
import math
import os
import random
import re
import string
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

CLARIFY = "CLARIFY"
ANSWER = "ANSWER"
ACTIONS = (CLARIFY, ANSWER)
INSTRUCTION = "Answer the user's question, or ask a clarifying question if it is ambiguous."
RECORD_KEYS = ("input_text", "output_text", "dialogue_policy", "gold_target", "gold_trajectory",
               "chosen_policy", "rejected_policy", "chosen", "rejected")


class InputError(ValueError):
    """Something the user gave is wrong: one line that says where, what was found and what was expected."""


# --- JSON in and out -------------------------------------------------------------------------------------------------

KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object",
         type(None): "null"}


def expect(value, where, *types):
    """`value` itself if it is of one of these JSON types, else an InputError that begins with its address `where`."""
    if type(value) not in types:
        wanted = " or ".join(dict.fromkeys(KINDS[t] for t in types))
        raise InputError(f"{where} is {KINDS.get(type(value), type(value).__name__)}, expected {wanted}")
    return value


def field(owner, key, where, *types):
    """`owner[key]`, checked. `where` is the owner's address: "train.jsonl:17: messages[3]", or "train.jsonl:17: " for the line."""
    expect(owner, where.rstrip(": ") or "the file", dict)
    address = where + key if where == "" or where.endswith(" ") else f"{where}.{key}"
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
    """The value that the UTF-8 bytes `raw` hold, which begin at this line (from 1) of the file."""
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique_keys)
        if "\\ud" in text.lower():  # an escape is the only way to half a character in valid UTF-8
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}), expected JSON in UTF-8") from None
    except UnicodeEncodeError:
        raise InputError(f"{path}:{line}: an escape \\ud800 to \\udfff without its other half, expected whole characters") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{line + error.lineno - 1}: invalid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{path}:{line}: invalid JSON: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path}:{line}: invalid JSON: {str(error).partition(';')[0]}") from None


def read_jsonl(path):
    """Yields (line number from 1, object) for every line that is not blank.

    Lines end at "\\n" alone: U+2028 and its like may stand inside a JSON string.
    """
    for number, raw in enumerate(read_bytes(path).split(b"\n"), start=1):
        if raw.strip():
            yield number, expect(parse_json(raw, path, number), f"{path}:{number}: the line", dict)


def write_jsonl(path, rows):
    """Writes one object a line, to a temporary file first: `path` is either the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path):
    """The JSON object that a file holds. Raises InputError when it is not there, not JSON or not an object."""
    try:
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def write_json(path, value):
    """Write beside the target and rename, so that a reader never sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


# --- Vertex JSONL ----------------------------------------------------------------------------------------------------

def read_vertex_jsonl(path):
    """Reads either of Vertex's two forms of conversation, one a line.

    Returns a list of {"messages": [{"role": "system" | "user" | "model", "content": str}, ...]}; system only comes first,
    and a user message has "requires_clarification": bool where the file says so. Texts are left as they are.
    """
    conversations = [parse_conversation(row, f"{path}:{number}: ") for number, row in read_jsonl(path)]
    if not conversations:
        raise InputError(f"{path}: holds no conversation, expected at least one line of JSON")
    return conversations


def parse_conversation(row, where):
    """One line of either form -> {"messages": [...]}. `where` begins every error, e.g. "train.jsonl:17: "."""
    forms = [key for key in ("messages", "contents") if key in row]
    if len(forms) != 1:
        hint = " (a preference file? then set training_config.is_preference)" if "completions" in row or "input_text" in row else ""
        raise InputError(f"{where}has {' and '.join(forms) or 'neither messages nor contents'}, expected either messages or contents{hint}")
    form = forms[0]
    system = [key for key in ("systemInstruction", "system_instruction") if key in row]
    if len(system) > 1:
        raise InputError(f"{where}has systemInstruction and system_instruction, expected one of them")
    messages = [{"role": "system", "content": parts_text(row[key], where + key)} for key in system]
    for i, turn in enumerate(field(row, form, where, list)):
        messages.append(parse_turn(turn, f"{where}{form}[{i}]", form, system_allowed=form == "messages" and i == 0 and not system))
    if all(message["role"] != "user" for message in messages):
        raise InputError(f"{where}{form} has no user turn, expected at least one")
    return {"messages": messages}


def parse_turn(turn, where, form, system_allowed):
    role = field(turn, "role", where, str)
    role = "model" if role == "assistant" else role
    if role not in ("user", "model") and not (role == "system" and system_allowed):
        found = f"{where} has role {role!r}"
        raise InputError(f"{found}, expected 'user' or 'model'{' (system only comes first)' if role == 'system' else ''}")
    text = field(turn, "content", where, str) if form == "messages" else parts_text(turn, where)
    if role == "user" and not text.strip():
        raise InputError(f"{where} is a user turn without text")
    message = {"role": role, "content": text}
    if "requires_clarification" in turn:
        if role != "user":
            raise InputError(f"{where} has requires_clarification and role {role!r}, expected it on user turns only")
        message["requires_clarification"] = field(turn, "requires_clarification", where, bool)
    return message


def parts_text(content, where):
    """The text of {"parts": [{"text": ...}, ...]}, joined without a separator, as Vertex does."""
    texts = []
    for i, part in enumerate(field(content, "parts", where, list)):
        other = sorted(set(expect(part, f"{where}.parts[{i}]", dict)) - {"text"})
        if other:
            raise InputError(f"{where}.parts[{i}] has {other[0]!r}, expected 'text' alone (only text is supported)")
        texts.append(field(part, "text", f"{where}.parts[{i}]", str))
    return "".join(texts)


# --- Text format "plain" ---------------------------------------------------------------------------------------------

SPEAKERS = {"user": "User", "model": "Assistant"}
ROLES = {name: role for role, name in SPEAKERS.items()}
SPEAKER_LINE = re.compile(r"(User|Assistant):(?: |$)(.*)", re.DOTALL)


def fold(text):
    """The text on one line: line breaks become one space, so that it can be told from the "User: " lines around it."""
    return " ".join(filter(None, (part.strip() for part in re.split("[\r\n]", text))))


def format_reply(messages):
    """[(role, text), ...] with role "user" or "model" -> "Assistant: text\\nUser: text\\n...", each message on one line."""
    return "".join(f"{SPEAKERS[role]}: {fold(text)}\n" for role, text in messages)


def format_prompt(context, messages):
    """The whole input_text: instruction, context (which keeps its lines) and conversation."""
    return f"{INSTRUCTION}\n[context]\n{context}\n[conversation]\n{format_reply(messages)}"


def split_reply(text):
    """The inverse of `format_reply`. Text before any prefix is the model's; a line without prefix continues the message."""
    messages = []
    for line in text.split("\n"):
        start = SPEAKER_LINE.match(line)
        if start:
            messages.append((ROLES[start[1]], start[2].strip()))
        elif line.strip():
            role, before = messages.pop() if messages else ("model", "")
            messages.append((role, f"{before} {line.strip()}".strip()))
    return messages


def split_dialogue(text):
    """The inverse of `format_prompt`: (instruction, context, [(role, text), ...]).

    The context lies between the first line "[context]" and the last line "[conversation]", whatever else it holds; the
    instruction is all that comes before, so the published research code's texts (with "[data]" too) can be split as well.
    """
    lines = text.split("\n")
    if "[conversation]" not in lines:
        raise InputError("input_text has no line '[conversation]'")
    conversation = len(lines) - 1 - lines[::-1].index("[conversation]")
    context = lines.index("[context]") if "[context]" in lines[:conversation] else conversation
    rest = "\n".join(lines[conversation + 1:])
    if rest.strip() and not SPEAKER_LINE.match(rest.lstrip()):
        raise InputError("input_text goes on after '[conversation]' with neither 'User: ' nor 'Assistant: '")
    return "\n".join(lines[:context]), "\n".join(lines[context + 1:conversation]), split_reply(rest)


def first_reply(text):
    """The first thing that the assistant says in a reply's text; "" where it says nothing."""
    return next((message for role, message in split_reply(text) if role == "model"), "")


# --- Preference pairs (Algorithm 1) ----------------------------------------------------------------------------------

FALLBACK_QUESTION = "Could you say more precisely what you would like to know?"
ASKING = "Assistant (asks a clarifying question):"
QUESTION_END = re.compile("[?？؟][\\s\"'”’»)\\]}*_」』]*\\Z")


def is_question(text):
    """The rule for a reply's action: does its last sentence end in a question mark (quotes and brackets may follow)?"""
    return QUESTION_END.search(text.rstrip()[-40:]) is not None


def rule_actions(replies):
    return [CLARIFY if is_question(reply) else ANSWER for reply in replies]


def rule_preferences(requests):
    """A clarifying question for each request without any model: that of its first shot."""
    return [first_reply(r["shots"][0]["chosen"]) if r["shots"] else FALLBACK_QUESTION for r in requests]


def label_actions(conversations, classify_actions):
    """Gives every user turn that has a reply and no label the action of that reply; returns how many.

    classify_actions: a list of reply texts -> a list of "CLARIFY" or "ANSWER", called once. Changes `conversations`.
    """
    turns, replies = [], []
    for conversation in conversations:
        messages = conversation["messages"]
        for turn, reply in zip(messages, messages[1:], strict=False):
            if turn["role"] == "user" and reply["role"] == "model" and "requires_clarification" not in turn:
                turns.append(turn)
                replies.append(reply["content"])
    actions = classify_actions(replies) if replies else []
    assert len(actions) == len(turns) and set(actions) <= set(ACTIONS), f"{len(actions)} actions for {len(turns)} replies: {set(actions)}"
    for turn, action in zip(turns, actions, strict=True):
        turn["requires_clarification"] = action == CLARIFY
    return len(turns)


def answer_index(messages, i):
    """Where the gold trajectory of the user turn `i` ends: its first reply that answers. None where the data stop before."""
    while i + 1 < len(messages) and messages[i]["role"] == "user" and messages[i + 1]["role"] == "model":
        if not messages[i + 1]["content"].strip():
            return None
        if not messages[i]["requires_clarification"]:
            return i + 1
        i += 2  # that reply asked; the user's answer to it comes next
    return None


def make_record(prompt, actions, chosen, rejected, target):
    """A preference record. actions: (chosen, rejected); target: the text that a good trajectory ends in."""
    return {"input_text": prompt, "output_text": chosen, "dialogue_policy": actions[0], "gold_target": target,
            "gold_trajectory": prompt + chosen, "chosen_policy": actions[0], "rejected_policy": actions[1],
            "chosen": chosen, "rejected": rejected}


def turn_records(conversation):
    """(records, skipped) of one labelled conversation: a record for every user turn that the data answer in the end.

    The `rejected` of an ANSWER turn is left empty: a preference model writes it.
    """
    messages, context = conversation["messages"], ""
    if messages[0]["role"] == "system":
        context, messages = messages[0]["content"], messages[1:]
    said = [(message["role"], message["content"]) for message in messages]
    records, skipped = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "user":
            continue
        end = answer_index(messages, i)
        if end is None:
            skipped += 1
            continue
        prompt = format_prompt(context, said[:i + 1])
        trajectory, answer = format_reply(said[i + 1:end + 1]), format_reply(said[end:end + 1])
        if message["requires_clarification"]:
            records.append(make_record(prompt, (CLARIFY, ANSWER), trajectory, answer, answer))
        else:
            records.append(make_record(prompt, (ANSWER, CLARIFY), trajectory, "", answer))
    return records, skipped


class ACTDataset:
    """Preference records, one for every user turn, from the conversations of `read_vertex_jsonl` (Algorithm 1).

    dataset            conversations; with is_preference the finished records, which are only checked and balanced
    target_label       "CLARIFY": the action that the preference model shows where answering is right
    icl_examples       how many examples of such questions the preference model sees (at least one)
    preference_model   list of requests -> list of questions; a request is {"record", "shots": [records], "prompt": str}.
                       None: the data's own questions (`rule_preferences`)
    class_balance      None, or {"CLARIFY": 2, "ANSWER": 1}: multiples to draw of each action's records
    action_model       list of replies -> list of actions, for turns without requires_clarification. None: `rule_actions`

    After `prepare_datasets`: `skipped` turns had no answer in the data, `labelled` turns got their action from action_model.
    """

    def __init__(self, dataset, target_label, icl_examples, preference_model=None, class_balance=None,
                 is_preference=False, action_model=None, seed=0):
        if target_label != CLARIFY:
            raise InputError(f"target_label is {target_label!r}, expected {CLARIFY!r}")
        if type(icl_examples) is not int or icl_examples < 0:
            raise InputError(f"icl_examples is {icl_examples!r}, expected a whole number from 0")
        for action, multiple in expect(class_balance or {}, "class_balance", dict).items():
            if action not in ACTIONS:
                raise InputError(f"class_balance names {action!r}, expected {CLARIFY!r} or {ANSWER!r}")
            if type(multiple) not in (int, float) or not math.isfinite(multiple) or multiple < 0:
                raise InputError(f"class_balance[{action!r}] is {multiple!r}, expected a number from 0")
        self.dataset, self.is_preference, self.seed = dataset, is_preference, seed
        self.target_label, self.icl_examples, self.class_balance = target_label, max(1, icl_examples), class_balance or {}
        self.preference_model, self.action_model = preference_model or rule_preferences, action_model or rule_actions
        self.skipped = self.labelled = 0

    def prepare_datasets(self):
        """The records, in the order of the data; the turns of a dialogue stay together."""
        if self.is_preference:
            return self.balance([check_record(record, f"record {i}: ") for i, record in enumerate(self.dataset)])
        conversations = [{"messages": [dict(message) for message in row["messages"]]} for row in self.dataset]
        self.labelled = label_actions(conversations, self.action_model)
        self.skipped = 0
        records, owners = [], []
        for owner, conversation in enumerate(conversations):
            made, skipped = turn_records(conversation)
            records += made
            owners += [owner] * len(made)
            self.skipped += skipped
        self.reject_questions(records, owners)
        return self.balance(records)

    def reject_questions(self, records, owners):
        """Where answering is right, a clarifying question becomes `rejected`. owners[i]: the conversation of records[i]."""
        pool = [i for i, record in enumerate(records) if record["dialogue_policy"] == self.target_label]
        pool_owners = [owners[i] for i in pool]  # ascending, so a conversation's examples are one range of the pool
        requests = []
        for i, record in enumerate(records):
            if record["dialogue_policy"] != self.target_label:
                own = bisect_left(pool_owners, owners[i]), bisect_right(pool_owners, owners[i])
                shots = [records[pool[k]] for k in self.draw_shots(len(pool), *own, random.Random(f"{self.seed}/{i}"))]
                shown = [f"{shot['input_text']}{ASKING} {first_reply(shot['chosen'])}\n\n" for shot in shots]
                requests.append({"record": record, "shots": shots, "prompt": "".join(shown) + record["input_text"] + ASKING})
        questions = self.preference_model(requests) if requests else []
        assert len(questions) == len(requests), f"the preference model wrote {len(questions)} texts for {len(requests)} requests"
        for request, question, rule in zip(requests, questions, rule_preferences(requests), strict=True):
            chosen = first_reply(request["record"]["chosen"])  # a pair of equal texts would teach nothing
            asked = next(text for text in (first_reply(question), rule, FALLBACK_QUESTION) if text and text != chosen)
            request["record"]["rejected"] = format_reply([("model", asked)])

    def draw_shots(self, size, start, stop, rng):
        """Positions in a pool of `size`, drawn without replacement; those from start to stop only where the others run out."""
        own = stop - start
        count = min(self.icl_examples, size - own)
        shots = [k if k < start else k + own for k in rng.sample(range(size - own), count)]
        return shots + rng.sample(range(start, stop), min(self.icl_examples - count, own))

    def balance(self, records):
        """Draws round(multiple * count) records of each action named in class_balance, with replacement; the order stays."""
        if not self.class_balance:
            return records
        kept = [i for i, record in enumerate(records) if record["dialogue_policy"] not in self.class_balance]
        for action, multiple in self.class_balance.items():
            indices = [i for i, record in enumerate(records) if record["dialogue_policy"] == action]
            rng = random.Random(f"{self.seed}/class_balance/{action}")
            kept += rng.choices(indices, k=round(multiple * len(indices))) if indices else []
        return [dict(records[i]) for i in sorted(kept)]


ACTION_LABELS = ("gold", "classifier", "random")


def random_actions(records, seed):
    """The records with a coin's action for each turn: where it is not the gold one, the two sides change places (the paper's ablation)."""
    swap = {"dialogue_policy": "rejected_policy", "chosen_policy": "rejected_policy", "rejected_policy": "chosen_policy",
            "chosen": "rejected", "rejected": "chosen"}
    coins = [random.Random(f"{seed}/random_actions/{i}").random() < 0.5 for i in range(len(records))]
    return [{**record, **{key: record[other] for key, other in swap.items()}} if coin else record
            for record, coin in zip(records, coins, strict=True)]


def get_datasets_from_config(config, preference_model=None, action_model=None):
    """(training records, validation records); [] for a path that is not set.

    Only the training records are balanced (`class_balance`) and take their actions from elsewhere (`action_labels`).
    """
    training = config.training_config

    def load(path, class_balance, action_labels):
        if not path:
            return []
        rows = read_preferences(path) if training.is_preference else read_vertex_jsonl(path)
        if action_labels == "classifier":
            for message in (message for row in rows for message in row["messages"]):
                message.pop("requires_clarification", None)
        dataset = ACTDataset(rows, training.target_label, training.icl_examples, preference_model, class_balance,
                             training.is_preference, action_model, training.seed)
        records = dataset.prepare_datasets()
        if dataset.skipped and os.environ.get("RANK", "0") == "0":  # said once, not by every process
            print(f"{path}: {dataset.skipped} user turns without an answer in the data were skipped", flush=True)
        return random_actions(records, training.seed) if action_labels == "random" else records

    train = load(config.data_config.train_path, training.class_balance, training.action_labels)
    return train, load(config.data_config.validation_path, None, "gold")


def dialogues(records):
    """Index lists of consecutive records of one dialogue: each input_text goes on where the one before it stopped."""
    groups = []
    for i, record in enumerate(records):
        if groups and record["input_text"].startswith(records[i - 1]["input_text"]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


# --- Preference files ------------------------------------------------------------------------------------------------

def check_record(record, where):
    """The record itself, if it has every key with a text, known actions, and an input_text that can be split."""
    expect(record, where.rstrip(": "), dict)
    for key in RECORD_KEYS:
        field(record, key, where, str)
        if key.endswith("_policy") and record[key] not in ACTIONS:
            raise InputError(f"{where}{key} is {record[key]!r}, expected {CLARIFY!r} or {ANSWER!r}")
    try:
        split_dialogue(record["input_text"])
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    return record


NO_ANSWER_TEXT = "This question was not answered by the Assistant."  # what the published code writes for a gold answer that is missing


def read_preferences(path):
    """Records from a JSONL of records, or of Vertex's preference-tuning form (a line with "completions").

    Records of the published research code for turns that nobody answered teach nothing; they are skipped, and that is said.
    """
    records, skipped = [], 0
    for number, row in read_jsonl(path):
        where = f"{path}:{number}: "
        record = parse_completions(row, where) if "completions" in row else check_record(row, where)
        if record["chosen"].strip() and NO_ANSWER_TEXT not in record["gold_target"]:
            records.append(record)
        else:
            skipped += 1
    if skipped and os.environ.get("RANK", "0") == "0":
        print(f"{path}: {skipped} records without an answer were skipped", flush=True)
    if not records:
        raise InputError(f"{path}: holds no preference record, expected at least one line of JSON")
    return records


def parse_completions(row, where):
    """One line of Vertex's preference-tuning form -> a record. Actions by `is_question`, since the form has none."""
    messages = parse_conversation({key: row[key] for key in row if key != "completions"}, where)["messages"]
    context = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    if messages[-1]["role"] != "user":
        raise InputError(f"{where}the conversation ends with role {messages[-1]['role']!r}, expected 'user'")
    replies = {}
    for i, row_completion in enumerate(field(row, "completions", where, list)):
        at = f"{where}completions[{i}]"
        score = field(row_completion, "score", at, int, float)
        turn = parse_turn(field(row_completion, "completion", at, dict), f"{at}.completion", "contents", system_allowed=False)
        if turn["role"] != "model" or not turn["content"].strip():
            raise InputError(f"{at}.completion has role {turn['role']!r} and text {turn['content']!r}, expected a text by 'model'")
        if score not in (0, 1) or score in replies:
            raise InputError(f"{at}.score is {score}, expected 1 for one completion and 0 for the other")
        replies[score] = turn["content"]
    if len(replies) != 2:
        raise InputError(f"{where}completions has {len(replies)} entries, expected 2")
    context = f"{context}\n".removeprefix(f"{INSTRUCTION}\n").removesuffix("\n")  # `vertex_preference` puts it there
    prompt = format_prompt(context, [(message["role"], message["content"]) for message in messages])
    chosen, rejected = format_reply([("model", replies[1])]), format_reply([("model", replies[0])])
    actions = tuple(rule_actions([replies[1], replies[0]]))
    target = rejected if actions == (CLARIFY, ANSWER) else chosen  # Algorithm 1 rejects answering at once
    return make_record(prompt, actions, chosen, rejected, target)


def vertex_preference(record):
    """A record in Vertex's preference-tuning form. Of a trajectory only its first reply remains: a tuned model writes one turn."""
    instruction, context, messages = split_dialogue(record["input_text"])
    scored = [(1, first_reply(record["chosen"])), (0, first_reply(record["rejected"]))]
    return {
        "systemInstruction": {"parts": [{"text": f"{instruction}\n{context}" if context else instruction}]},
        "contents": [{"role": role, "parts": [{"text": text}]} for role, text in messages],
        "completions": [{"score": score, "completion": {"role": "model", "parts": [{"text": text}]}} for score, text in scored],
    }


def write_vertex_preferences(path, records):
    write_jsonl(path, map(vertex_preference, records))


# --- Metrics ---------------------------------------------------------------------------------------------------------

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
        scaled = re.search(r"[\d.]+\s?[a-zA-Z]+", token)
        sign = -1 if re.search(r"\([\d.\s]+\)", token) else 1
        percent = 0.01 if re.search(r"[\d.\s]+%", token.strip()) else 1
        return str(round(number * (scale_of(scaled[0]) if scaled else 1) * sign * percent, 4))
    except (ValueError, OverflowError):  # no number, or thousands of digits (where the scorer itself breaks off)
        return None


def drop_words(text):
    """The text as DROP compares it: lower case, numbers in one spelling, no punctuation, articles or double spaces."""
    words = []
    for token in text.lower().split(" "):
        if number_text(token) is None:
            token = token.translate(PUNCTUATION)
        words += ARTICLES.sub(" ", number_text(token) or token).split()
    return " ".join(words)


def bag_f1(predicted, gold):
    """F1 of two sets of words; an empty set is precise, or complete, by definition."""
    common = len(predicted & gold)
    precision = common / len(predicted) if predicted else 1.0
    recall = common / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def assign(scores):
    """The column for each row of a matrix that is not taller than wide, such that the sum of the scores is greatest.

    Shortest augmenting paths (Jonker and Volgenant; Crouse 2016), each row added in turn. Ties go to a free column.
    """
    rows, columns = len(scores), len(scores[0]) if len(scores) else 0
    row_price, column_price, row_of = [0.0] * rows, [0.0] * columns, [None] * columns
    for first in range(rows):
        distance, parent, done, left = [math.inf] * columns, [first] * columns, [], list(range(columns))[::-1]
        row, reached = first, 0.0
        while row is not None:
            for j in left:
                through = reached - scores[row][j] - row_price[row] - column_price[j]
                if through < distance[j]:
                    distance[j], parent[j] = through, row
            reached = min(distance[j] for j in left)
            nearest = [k for k, j in enumerate(left) if distance[j] == reached]
            k = next((k for k in reversed(nearest) if row_of[left[k]] is None), nearest[0])
            column, left[k] = left[k], left[-1]
            left.pop()
            done.append(column)
            row = row_of[column]
        row_price[first] += reached
        for j in done:
            if row_of[j] is not None:
                row_price[row_of[j]] += reached - distance[j]
            column_price[j] -= reached - distance[j]
        back = {row_of[j]: j for j in done}
        while column is not None:  # turn the path round: its end, the free column, is taken by the row it was reached from
            row_of[column] = parent[column]
            column = back[parent[column]] if parent[column] != first else None
    return {row: j for j, row in enumerate(row_of) if row is not None}


def drop_f1(predicted, gold):
    """(exact match, F1) of answers, each a text or a list of texts, as PACIFIC's and TAT-QA's scorer counts them.

    Texts are aligned one to one so that the sum of their F1 is greatest; the mean is over the longer list and rounded to two
    decimals, as there. Two empty lists agree: (1.0, 1.0). Rules: github dengyang17/PACIFIC, tatqa_metric.py, get_metrics.
    """
    predicted, gold = [[drop_words(text) for text in ([side] if isinstance(side, str) else side)] for side in (predicted, gold)]
    if not predicted and not gold:
        return 1.0, 1.0
    exact = float(set(predicted) == set(gold) and len(predicted) == len(gold))
    scores = np.array([[bag_f1(set(p.split()), set(g.split())) for p in predicted] for g in gold]).reshape(len(gold), len(predicted))
    best = np.zeros(max(len(gold), len(predicted)))
    if len(gold) <= len(predicted):
        pairs = assign(scores.tolist()).items()
    else:
        pairs = [(g, p) for p, g in assign(scores.T.tolist()).items()]
    for g, p in pairs:
        best[g] = scores[g, p]
    return exact, float(np.round(best.mean(), 2))


def coqa_f1(predicted, gold):
    """(exact match, F1) of a text as CoQA counts them: repeated words count; gold may be a list, of which the best counts."""
    def words(text):
        return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()

    def score(said, wanted):
        common = sum((Counter(said) & Counter(wanted)).values())
        if not said or not wanted or not common:
            return float(said == wanted)
        precision, recall = common / len(said), common / len(wanted)
        return 2 * precision * recall / (precision + recall)

    said, golds = words(predicted), [words(text) for text in ([gold] if isinstance(gold, str) else gold)]
    return max((float(said == g) for g in golds), default=0.0), max((score(said, g) for g in golds), default=0.0)


def exact_match(predicted, gold):
    """(1.0, 1.0) where the texts are equal but for case and spacing, else (0.0, 0.0)."""
    same = float(predicted.casefold().split() == gold.casefold().split())
    return same, same


HEURISTICS = {"drop_f1": drop_f1, "coqa_f1": coqa_f1, "exact_match": exact_match}


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


# --- Converters ------------------------------------------------------------------------------------------------------

def items_of(owner, key, where, *types):
    """(address, entry) for every entry of the list owner[key], each of one of these types."""
    rows = field(owner, key, where, list)
    prefix = f"{where}.{key}" if where else key
    return [(f"{prefix}[{i}]", expect(row, f"{prefix}[{i}]", *types)) for i, row in enumerate(rows)]


def text_of(owner, key, where):
    """The text owner[key] without the spaces around it; an empty one is an error."""
    text = field(owner, key, where, str).strip()
    if not text:
        raise InputError(f"{where}.{key} is empty, expected a text")
    return text


def exchange(question, answer, clarify=False):
    """A user turn with the gold action of its reply, and that reply."""
    return [{"role": "user", "content": question, "requires_clarification": clarify}, {"role": "model", "content": answer}]


def convert_pacific(items):
    """PACIFIC's released JSON (a list of {"table", "paragraphs", "questions"}) -> conversations in the messages form."""
    conversations = []
    for i, item in enumerate(expect(items, "the file", list)):
        messages = [{"role": "system", "content": pacific_context(item, f"[{i}]")}]
        for where, question in items_of(item, "questions", f"[{i}]", dict):
            clarify = field(question, "req_clari", where, bool)
            messages += exchange(text_of(question, "question", where), pacific_answer(question, where), clarify)
        conversations.append({"messages": messages})
    return conversations


def pacific_context(item, where):
    """The paragraphs, one a line, then the rows of the table as "row name : cell | cell"."""
    lines = [fold(field(paragraph, "text", at, str)) for at, paragraph in items_of(item, "paragraphs", where, dict)]
    for at, row in items_of(field(item, "table", where, dict), "table", f"{where}.table", list):
        cells = [fold(expect(cell, f"{at}[{k}]", str)) for k, cell in enumerate(row)]
        lines.append(f"{cells[0]} : {' | '.join(cells[1:])}" if cells else "")
    return "\n".join(lines)


def pacific_answer(question, where):
    """The gold reply: several spans joined by commas; of an arithmetic answer the derivation too, "2+6 = 8"."""
    answer = field(question, "answer", where, str, int, float, list)
    if isinstance(answer, list):
        return ", ".join(str(span).strip() for _, span in items_of(question, "answer", where, str, int, float))
    derivation = field(question, "derivation", where, str).strip()
    if field(question, "answer_type", where, str) == "arithmetic" and derivation:
        return f"{derivation} = {answer}"
    return str(answer).strip()


def convert_abg_coqa(data):
    """Abg-CoQA's released JSON ({"data": [...]}) -> conversations in the messages form.

    Of an ambiguous turn the first question, with its first reading and that reading's first answer, is the gold trajectory.
    """
    conversations = []
    for where, item in items_of(data, "data", "", dict):
        messages = [{"role": "system", "content": field(item, "story", where, str).strip()}]
        for at, turn in items_of(item, "history_turns", where, dict):
            messages += exchange(text_of(turn, "question", at), text_of(turn, "answer", at))
        conversations.append({"messages": messages + abg_coqa_target(item, where)})
    return conversations


def abg_coqa_target(item, where):
    """The last exchange of an item, or where it is ambiguous the last two: question, first reading, its answer."""
    target, at = field(item, "target_turn", where, dict), f"{where}.target_turn"
    question, ambiguity = text_of(target, "question", at), field(item, "ambiguity", where, str)
    if ambiguity == "non_ambiguous":
        return exchange(question, text_of(target, "answer", at))
    if ambiguity != "ambiguous":
        raise InputError(f"{where}.ambiguity is {ambiguity!r}, expected 'ambiguous' or 'non_ambiguous'")
    turn, at = field(item, "clarification_turn", where, dict), f"{where}.clarification_turn"
    readings = items_of(turn, "answers", at, dict)
    if not readings:
        raise InputError(f"{at}.answers is empty, expected at least one")
    first_at, first = readings[0]
    asked = exchange(question, text_of(turn, "question", at), clarify=True)
    return asked + exchange(text_of(first, "clr_ans", first_at), text_of(first, "org_ans", first_at))


def convert_file(convert, source, target):
    data = parse_json(read_bytes(source), source)
    try:
        conversations = convert(data)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    write_jsonl(target, conversations)
    turns = [m["requires_clarification"] for row in conversations for m in row["messages"] if m["role"] == "user"]
    return f"{target}: {len(conversations)} conversations, {len(turns)} user turns, {sum(turns)} {CLARIFY} turns"


def convert_preferences(source, target):
    records = read_preferences(source)
    write_vertex_preferences(target, records)
    return f"{target}: {len(dialogues(records))} conversations, {len(records)} user turns, " \
           f"{sum(record['dialogue_policy'] == CLARIFY for record in records)} {CLARIFY} turns"


CONVERTERS = {"pacific": partial(convert_file, convert_pacific), "abg_coqa": partial(convert_file, convert_abg_coqa),
              "vertex_preferences": convert_preferences}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="data.py", description="Converts published datasets to Vertex JSONL.")
    parser.add_argument("converter", choices=CONVERTERS)
    parser.add_argument("source", help="the file to read")
    parser.add_argument("target", help="the JSONL file to write")
    given = parser.parse_args(arguments)
    try:
        print(CONVERTERS[given.converter](given.source, given.target))
    except (InputError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
