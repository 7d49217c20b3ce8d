"""What data.py promises. All is made up here, in the published structures; the scorer's verdicts are in golden/."""

import io
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hostile import HOSTILE

import data
from data import ANSWER, CLARIFY, ACTDataset, InputError, Pair, drop_f1, read_vertex_jsonl

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "configs" / "tiny"


def write(tmp_path, *lines, name="train.jsonl"):
    path, texts = tmp_path / name, [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def user(text, clarify=None):
    return {"role": "user", "content": text} | ({} if clarify is None else {"requires_clarification": clarify})


def model(text):
    return {"role": "model", "content": text}


def conversation(*messages, system=None):
    return {"messages": ([] if system is None else [{"role": "system", "content": system}]) + list(messages)}


def pairs_of(*rows, **options):
    return ACTDataset(list(rows), CLARIFY, **{"icl_examples": 1, **options}).prepare_datasets()


def anywhere(pairs):
    """Pairs without their addresses and what follows their history, for comparison."""
    return [
        replace(pair, messages=pair.history, length=None, path="", line=0, turn=0, dialogue=0)
        for pair in pairs
    ]


def read_preferences(path):
    return data.read_preferences(path)[0]


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def told(*rows, folder, name="train.jsonl"):
    """What `data.read_conversations` says of a file of these rows, without the path, and its messages."""
    path = write(folder, *rows, name=name)
    conversations, lines = data.read_conversations(path)
    return [line.removeprefix(f"{path}: ") for line in lines], [row["messages"] for row in conversations]


def through(tmp_path, form, pairs):
    """Pairs written to a file of this form and read back."""
    path = tmp_path / f"{form}.jsonl"
    data.write_preferences(path, pairs, form)
    back = read_preferences(path)
    assert [pair.where for pair in back] == [f"{path}:{number}" for number in range(1, len(pairs) + 1)]
    return back


SALES = conversation(
    user("What were sales?", True), model("Which year?"), user("2019", True), model("Net or gross?"),
    user("Net", False), model("12"), user("And costs?", False), model("7"), system="Sales and costs.\nTable follows.",
)  # fmt: skip
STAFF = conversation(
    user("How many staff?", True), model("In which country?"), user("Peru", False), model("40"),
    user("Thanks", False), model("Welcome."),
)  # fmt: skip
HEAD = f"{data.INSTRUCTION}\n[context]\nSales and costs.\nTable follows.\n[conversation]\n"


# ----------------------------------------------------------------------------------------------------------------------
# Conversations


def parts(*texts):
    return {"parts": [{"text": text} for text in texts]}


def test_both_vertex_forms_give_the_same_conversation(tmp_path):
    first = {"role": "user", **parts("How ", "many?"), "requires_clarification": True}
    contents = [first, {"role": "model", **parts("4")}]
    want = conversation(user("How many?", True), model("4"), system="ctx")
    assistant = conversation(user("How many?", True), {"role": "assistant", "content": "4"}, system="ctx")
    systems = [{key: parts("c", "tx"), "contents": contents} for key in ("systemInstruction", "system_instruction")]
    path = write(tmp_path, want, "", assistant, *systems)
    found = [want | {"unread": [], "path": str(path), "line": number} for number in (1, 3, 4, 5)]
    assert read_vertex_jsonl(path) == found == data.read_conversations(path)[0]
    assert read_vertex_jsonl("not there", path.read_bytes()) == [row | {"path": "not there"} for row in found]


def test_hostile_texts_are_read_from_both_forms_as_they_are(tmp_path):
    rows = []
    for row in HOSTILE:
        turns = [{"parts": parts(m["content"])["parts"], **{k: m[k] for k in m if k != "content"}}
                 for m in row["messages"]]  # fmt: skip
        system = {"systemInstruction": {"parts": turns.pop(0)["parts"]}} if turns[0]["role"] == "system" else {}
        rows.append({**system, "contents": turns})
    data.write_jsonl(tmp_path / "messages.jsonl", HOSTILE)
    data.write_jsonl(tmp_path / "contents.jsonl", rows)
    for name in ("messages.jsonl", "contents.jsonl"):
        assert [row["messages"] for row in read_vertex_jsonl(tmp_path / name)] == [row["messages"] for row in HOSTILE]


def test_reader_takes_bom_blank_lines_crlf_and_line_separators_inside_text(tmp_path):
    path = tmp_path / "train.jsonl"
    line = json.dumps(conversation(user("a\u2028b\x85c")), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf\r\n\n" + line.encode() + b"\r\n  \n" + line.encode().replace(b": ", b":\r"))
    rows = read_vertex_jsonl(path)
    assert [(row["messages"], row["line"]) for row in rows] == [([user("a\u2028b\x85c")], number) for number in (3, 5)]


GOOD = json.dumps(conversation(user("Hi")))
KNOWN = "expected user, human, model, assistant, gpt, system, developer"
BAD_LINES = [
    ('{"contents": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "bot", "parts": []}]}',
     f"contents[1] has role 'bot', {KNOWN}"),
    (json.dumps(conversation(user("Hi"), {"role": "system", "content": "x"})),
     f"messages[1] has role 'system', {KNOWN} (system only comes first)"),
    (json.dumps({"systemInstruction": parts("x"), **conversation(user("Hi"), system="y")}),
     f"messages[0] has role 'system', {KNOWN} (system only comes first)"),
    ('{"systemInstruction": 5, "contents": []}', "systemInstruction is a number, expected an object or a string"),
    ('{"messages": [{"role": "user", "content": 5}]}', "messages[0].content is a number, expected a string or a list"),
    ('{"messages": [{"role": "user"}]}', "messages[0].content is missing"),
    ('{"messages": [{"content": "Hi"}]}', f"messages[0] has role None, {KNOWN}"),
    ('{"messages": [{"role": 3, "content": "Hi"}]}', f"messages[0] has role 3, {KNOWN}"),
    ('{"messages": ["Hi"]}', "messages[0] is a string, expected an object"),
    ('{"messages": [{"role": "user", "content": "Hi", "require_clarification": true}]}',
     "has 'require_clarification', expected 'requires_clarification'"),
    ('{"messages": "Hi"}', "messages is a string, expected a list"),
    ('{"messages": []}', "messages has no user turn, expected at least one"),
    ('{"messages": [{"role": "user", "content": " \\n"}]}', "messages has no user turn, expected at least one"),
    ('{"contents": [{"role": "user", "parts": []}]}', "contents has no user turn, expected at least one"),
    ('{"contents": [{"role": "user", "parts": [{}]}]}', "contents[0].parts[0].text is missing"),
    ('{"contents": [{"role": "user", "parts": [1]}]}', "contents[0].parts[0] is a number, expected an object"),
    ('{"contents": [{"role": "user", "parts": [{"text": 1}]}]}', "contents[0].parts[0].text is a number, expected a string"),
    ('{"messages": [{"role": "user", "content": "Hi", "requires_clarification": 1}]}',
     "messages[0].requires_clarification is a number, expected true or false"),
    (json.dumps(conversation(user("Hi"), model("a") | {"requires_clarification": True})),
     "messages[1] has requires_clarification, expected it on user turns alone"),
    ("{}", "has neither messages nor contents, expected either messages or contents"),
    ('{"messages": [], "contents": []}', "has messages and contents, expected either messages or contents"),
    *[(f'{{"{key}": "x"}}', "has neither messages nor contents, expected either messages or contents "
       "(a file of pairs? then set training_config.is_preference)") for key in ("input_text", "chosen", "preferred_output")],
    ('{"messages": [], "messages": []}', "no JSON in UTF-8 (the key 'messages' stands twice in one object)"),
    ("[1]", "the line is a list, expected an object"),
    ('{"messages": [', "invalid JSON at column 15: Expecting value"),
    ("[" * 100000, "no JSON in UTF-8 (maximum recursion depth exceeded"),
    ('{"messages": [{"role": "user", "content": "\\uD83D!"}]}', "no JSON in UTF-8 ('utf-8' codec can't encode character '\\ud83d'"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line_is_refused_with_file_line_and_key(tmp_path, line, message):
    path = write(tmp_path, GOOD, "", line, GOOD)
    with pytest.raises(InputError) as error:
        read_vertex_jsonl(path)
    assert str(error.value).startswith(f"{path}:3: {message}") and "\n" not in str(error.value)


def test_all_bad_lines_of_a_file_are_named_together(tmp_path):
    for reader, good in ((read_vertex_jsonl, SALES), (read_preferences, published())):
        path = write(tmp_path, good, "{", good, {"x": 1}, "[]")
        with pytest.raises(InputError) as error:
            reader(path)
        assert [line.partition(": ")[0] for line in str(error.value).split("\n")] == [f"{path}:{n}" for n in (2, 4, 5)]
        path = write(tmp_path, *["{"] * 20)
        with pytest.raises(InputError) as error:
            reader(path)
        assert str(error.value).count("\n") == 19 and f"{path}:20: " in str(error.value)
        path = write(tmp_path, *["{"] * 23)
        with pytest.raises(InputError) as error:
            reader(path)
        assert str(error.value).endswith(f"\n{path}: and 3 more bad lines") and f"{path}:21" not in str(error.value)


def test_bytes_that_are_not_utf8_name_the_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(InputError, match=r"train\.jsonl:2: no JSON in UTF-8 \(.*can't decode byte 0xff"):
        read_vertex_jsonl(path)


def test_empty_and_missing_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"train\.jsonl: holds nothing to use"):
        read_vertex_jsonl(write(tmp_path, "", " "))
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read \(No such file"):
        read_vertex_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"train\.jsonl: holds nothing to use"):
        read_preferences(write(tmp_path))


def test_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write(tmp_path, {"a": 1})
    with pytest.raises(TypeError):
        data.write_jsonl(path, [{"a": 2}, {"a": object()}])
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]
    assert rows_of(path) == [{"a": 1}]
    data.write_jsonl(path, [{"a": "é\u2028\r"}])
    assert path.read_bytes() == '{"a": "é\u2028\\r"}\n'.encode()


# ----------------------------------------------------------------------------------------------------------------------
# Round trips: conversations -> pairs -> each form of file -> pairs


def pacific_rows(folder):
    """The conversations of PACIFIC's published JSON, which the environment variable PACIFIC names."""
    data.convert_file("pacific", os.environ["PACIFIC"], folder / "pacific.jsonl")
    return read_vertex_jsonl(folder / "pacific.jsonl")


SOURCES = {
    "hostile": lambda folder: HOSTILE,
    **{name: lambda folder, name=name: read_vertex_jsonl(TINY / f"{name}.jsonl")
       for name in ("train", "validation", "test")},
    "pacific": pacific_rows,
}  # fmt: skip


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    """(name, the pairs of all conversations of this name)."""
    if request.param == "pacific" and not os.environ.get("PACIFIC"):
        pytest.skip("the environment variable PACIFIC does not name the published JSON file")
    pairs = pairs_of(*SOURCES[request.param](tmp_path))
    assert {pair.action for pair in pairs} == {CLARIFY, ANSWER} and len(pairs) > 80
    return request.param, pairs


def test_pairs_hold_the_texts_of_the_conversations(source, tmp_path):
    """Whatever stands in them, as the file says: prompts, gold trajectories and targets."""
    name, pairs = source
    found = iter(pairs)
    for row in SOURCES[name](tmp_path):
        messages = [(message["role"], message["content"]) for message in row["messages"]]
        context = messages.pop(0)[1] if messages[0][0] == "system" else ""
        for i in range(0, len(messages), 2):
            pair = next(found)
            assert (pair.context, pair.history) == (context, messages[: i + 1])
            assert pair.gold == pair.chosen == messages[i + 1 : i + 1 + len(pair.gold)]
            assert pair.target == pair.gold[-1][1] and len(pair.gold) % 2
            assert (len(pair.gold) > 1) == (pair.action == CLARIFY)
            assert pair.rejected == pair.gold[-1:] if pair.action == CLARIFY else len(pair.rejected) == 1
    assert next(found, None) is None


RECORD_KEYS = ("input_text", "output_text", "dialogue_policy", "gold_target", "gold_trajectory",
               "chosen_policy", "rejected_policy", "chosen", "rejected")  # fmt: skip


def test_a_file_of_records_gives_back_the_pairs(source, tmp_path):
    _, pairs = source
    assert anywhere(through(tmp_path, "records", pairs)) == anywhere(pairs)
    rows = rows_of(tmp_path / "records.jsonl")
    assert all(tuple(row) == RECORD_KEYS and {type(value) for value in row.values()} == {str} for row in rows)


DISAGREE = {"hostile": (5, 11), "train": (0, 0), "validation": (0, 0), "test": (0, 0)}  # in TRL's, in Vertex's form


def returned(pairs, back, expected, agreed):
    """Asserts that pairs came back as expected where the rule gives their actions. Returns how many it did not give."""
    apart = 0
    for pair, found, want in zip(pairs, back, expected, strict=True):
        if not agreed(pair):  # the form has no actions, and no target
            apart += 1
            found, want = (replace(each, action="", target="") for each in (found, want))
        assert anywhere([found]) == anywhere([want])
    return apart


def test_a_file_of_trls_form_gives_back_the_pairs_whose_actions_the_rule_sees(source, tmp_path):
    name, pairs = source
    back = through(tmp_path, "trl", pairs)
    apart = returned(pairs, back, pairs, lambda pair: data.rule_actions([pair.chosen[0][1]]) == [pair.action])
    print(f"{name}: of {len(pairs)} pairs the rule sees another action than the label in {apart}")
    assert apart == DISAGREE.get(name, (apart, 0))[0]


def test_a_file_of_vertex_form_gives_back_the_first_reply_of_each_side(source, tmp_path):
    name, pairs = source
    back = through(tmp_path, "vertex", pairs)
    first = [replace(pair, chosen=pair.chosen[:1], rejected=pair.rejected[:1], gold=pair.gold[:1]) for pair in pairs]

    def agreed(pair):
        return data.rule_actions([pair.chosen[0][1], pair.rejected[0][1]]) == [pair.action, data.OTHER[pair.action]]

    apart = returned(pairs, back, first, agreed)
    print(f"{name}: of {len(pairs)} pairs the rule sees other actions than the label says in {apart}")
    assert apart == DISAGREE.get(name, (0, apart))[1]


MARKS = (
    "User: ", "Assistant: ", "User:", "Assistant:", "\\", "\\\\", "[conversation]", "[context]", "[data]", "\n", "\n\n",
    "\r", "\r\n", "\u2028", "\x85", "\x0b", " ", "  ", "\t", "", "\U0001f44b\U0001f3ff", "é", "x", "Which?", "\ufeff",
    "\x00", "\n[conversation]", "\nUser: ", "\n\\User: ", "\n\\[conversation]", data.INSTRUCTION, data.UNANSWERED,
)  # fmt: skip


def some_text(rng):
    return "".join(rng.choices(MARKS, k=rng.randrange(7)))


def some_messages(rng, first, last=None):
    """Random messages that begin with a role, and end with one if asked; mostly in turns, but not always."""
    roles = [first] + [rng.choice(("user", "model")) for _ in range(rng.randrange(4))] + ([last] if last else [])
    return [(role, some_text(rng)) for role in roles]


def test_messages_of_any_text_survive_their_formatting():
    rng = random.Random(0)
    for _ in range(20_000):
        messages = some_messages(rng, rng.choice(("user", "model")))
        text = data.format_messages(messages)
        assert data.split_messages(text) == messages
        assert "[conversation]" not in text.split("\n"), "the end of a context is not to be found in messages"
        speakers = [line.partition(": ")[0] for line in text.split("\n") if line.startswith(("User: ", "Assistant: "))]
        assert speakers == [data.SPEAKERS[role] for role, _ in messages]


def test_pairs_of_any_text_survive_a_record():
    """Of an instruction it is asked that it has no line "[context]": there it ends."""
    rng = random.Random(1)
    for i in range(10_000):
        instruction = "\n".join(line for line in some_text(rng).split("\n") if line != "[context]")
        history = some_messages(rng, rng.choice(("user", "model")), "user")
        sides = [[("model", some_text(rng) + "x"), *some_messages(rng, "model")[1:]] for _ in range(3)]
        action = rng.choice((CLARIFY, ANSWER))
        pair = Pair(some_text(rng), history, action, *sides, some_text(rng) + "x", instruction)
        record = data.make_record(pair)
        assert json.loads(json.dumps(record)) == record
        if data.UNANSWERED not in pair.target:
            assert data.parse_record(record, f"{i}") == pair


def test_pairs_of_any_text_survive_the_other_forms(tmp_path):
    """What both can hold: texts that say something, in turns, actions as the rule sees them."""
    rng, pairs = random.Random(2), []
    while len(pairs) < 3000:
        history = [("user", some_text(rng)), ("model", some_text(rng)), ("user", some_text(rng))][rng.randrange(3) :]
        question, answer = [("model", some_text(rng) + "?")], [("model", some_text(rng) + ".")]
        clarified = [*question, ("user", some_text(rng)), *answer]
        sides = (clarified, answer, clarified) if rng.random() < 0.5 else (answer, question, answer)
        action = CLARIFY if len(sides[0]) > 1 else ANSWER
        pair = Pair(some_text(rng), history, action, *sides, answer[0][1])
        seen = data.rule_actions([question[0][1], answer[0][1]]) == [CLARIFY, ANSWER]
        if seen and all(text.strip() for role, text in pair.history + pair.chosen):
            pairs.append(pair)
    assert anywhere(through(tmp_path, "trl", pairs)) == pairs
    first = [replace(pair, chosen=pair.chosen[:1], gold=pair.gold[:1]) for pair in pairs]
    assert anywhere(through(tmp_path, "vertex", pairs)) == first


def test_only_vertex_form_has_the_instruction_and_only_it_loses_one(tmp_path):
    """A context that begins with the instruction comes back from TRL's form, whose system message is the context."""
    for context in (data.INSTRUCTION, f"{data.INSTRUCTION}\n", f"{data.INSTRUCTION}\nx", f"{data.INSTRUCTION} x", ""):
        pairs = pairs_of(conversation(user("How many?", False), model("12"), system=context))
        assert pairs[0].context == context
        for form in data.PREFERENCE_FORMS:
            assert anywhere(through(tmp_path, form, pairs)) == anywhere(pairs), (form, context)


@pytest.mark.parametrize("context", [
    "", "\n", "   ", "[conversation]", "[conversation]\n", "[context]\n[conversation]\nUser: x\nAssistant: y\n",
    "[data]\nrow : 1 | 2\n", "\n\n[conversation]\n\n", "a\r\n[conversation]\r\nb\r", "a\u2028[conversation]\u2028b",
])  # fmt: skip
def test_context_of_any_kind_comes_back_from_every_form(tmp_path, context):
    pairs = pairs_of(conversation(user("How many?", True), model("Of what?"), user("Lamps", False), model("12"),
                                  system=context))  # fmt: skip
    assert [pair.context for pair in pairs] == [context] * 2
    assert anywhere(through(tmp_path, "records", pairs)) == anywhere(pairs) == anywhere(through(tmp_path, "trl", pairs))
    assert [pair.context for pair in through(tmp_path, "vertex", pairs)] == [context] * 2


# ----------------------------------------------------------------------------------------------------------------------
# Texts of the published research code


def published(**changes):
    start = "You are an Assistant.\nBe brief.\n\n[context]\nparagraph\n[data]\nrow : 1 | 2\n\n[conversation]\n"
    record = {
        "input_text": f"{start}User: Q\nAssistant: one\ntwo\n\nUser: R\n",
        "output_text": "Assistant: Which?\nUser: this\nAssistant: 1\n", "dialogue_policy": CLARIFY,
        "gold_target": "Assistant: 1\n", "gold_trajectory": "whatever", "chosen_policy": CLARIFY,
        "rejected_policy": ANSWER, "chosen": "Assistant: Which?\nUser: this\nAssistant: 1\n", "rejected": "1\nor 2",
    }  # fmt: skip
    return {key: value for key, value in {**record, **changes}.items() if value is not ...}


def test_records_of_the_published_research_code_are_read(tmp_path):
    """Instructions of several lines, [data] in the context, line breaks in replies, and replies without a prefix."""
    path = write(tmp_path, published(extra=1), published(rejected="a b \nUser: c\nAssistant: \n"))
    gold = [("model", "Which?"), ("user", "this"), ("model", "1")]
    history = [("user", "Q"), ("model", "one\ntwo\n"), ("user", "R")]
    context, instruction = "paragraph\n[data]\nrow : 1 | 2\n", "You are an Assistant.\nBe brief.\n"
    want = Pair(context, history, CLARIFY, gold, [("model", "1\nor 2")], gold, "1", instruction, length=3,
                path=str(path), line=1, dialogue=1)  # fmt: skip
    other = replace(want, rejected=[("model", "a b "), ("user", "c"), ("model", "")], line=2)
    pairs, lines = data.read_preferences(path)
    assert pairs == [want, other] and lines == [f"{path}: 1 lines have 'extra', which nothing reads: 1"]
    bare = data.parse_record(published(input_text="Do it.\n[conversation]\n\nUser: Q\n", gold_target="1\n"), "x:1")
    assert (bare.instruction, bare.context, bare.history, bare.target) == ("Do it.", "", [("user", "Q")], "1")


def test_messages_without_a_prefix_are_the_models():
    assert data.split_messages("Which year?") == [("model", "Which year?")]
    assert data.split_messages("One\n two\nUser: x\n") == [("model", "One\n two"), ("user", "x")]
    assert data.split_messages("\n") == [] == data.split_messages("")


def test_what_cannot_teach_is_left_out_counted_and_named(tmp_path):
    """Records of turns that nobody answered, sides that say nothing, sides that are equal but for white space."""
    rows = [published(), published(chosen=""), published(gold_target=f"Assistant: {data.UNANSWERED}\n"),
            published(gold_target=" "), trl(rejected=[model(" ")]), trl() | {"chosen": []}, published(rejected="Assistant: \n"),
            trl(chosen=[model("5\n6 ")], rejected=[model("5 6")]), completions((1, ""), (0, "b"))]  # fmt: skip
    path = write(tmp_path, *rows)
    pairs, lines = data.read_preferences(path)
    assert [pair.where for pair in pairs] == [f"{path}:1"]
    assert lines == [
        f"{path}: 3 lines with no answer are left out: 2, 3, 4",
        f"{path}: 4 lines with a side that says nothing are left out: 5, 6, 7, 9",
        f"{path}: 1 lines with two equal sides, which teach nothing, are left out: 8",
    ]
    with pytest.raises(InputError) as error:
        data.read_preferences(write(tmp_path, *rows[1:3]))
    assert str(error.value) == (f"{path}: 2 lines with no answer are left out: 1, 2\n"
                                f"{path}: holds nothing to use, expected a line of JSON")  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [
    ({"rejected": None}, "rejected is missing"),
    ({"chosen": ...}, "chosen is missing"),
    ({"input_text": 3}, "input_text is a number, expected a string"),
    ({"dialogue_policy": "ASK"}, "dialogue_policy is 'ASK', expected CLARIFY or ANSWER"),
    ({"dialogue_policy": None}, "dialogue_policy is missing"),
    ({"input_text": "User: Hi\n"}, "input_text has no line '[conversation]' and 'User: ' after it"),
    ({"input_text": "i\n[context]\nUser: Hi [conversation]\n"}, "input_text has no line '[conversation]'"),
    *[({"input_text": f"i\n[context]\n\n[conversation]\n{text}"}, "input_text has no line '[conversation]' and 'User: '")
      for text in ("", "Hi\n", " User: x\n", "Hi\nUser: x\n", "User:\n", "\\User: x\n")],
    ({"input_text": "i\n[context]\n\n[conversation]\nUser: Hi\nAssistant: yes\n"},
     "has no prompt that ends with the user's text before the sides"),
    ({"rejected": "User: x\n"}, "a side does not begin with the assistant's text"),
    ({"output_text": "User: x\n"}, "a side does not begin with the assistant's text"),
])  # fmt: skip
def test_broken_record_is_refused_with_file_and_line(tmp_path, change, message):
    path = write(tmp_path, published(), published(**change))
    with pytest.raises(InputError) as error:
        read_preferences(path)
    assert str(error.value).startswith(f"{path}:2: {message}")


@pytest.mark.parametrize(("text", "asks"), [
    ("Which year?", True), ("Which year? ", True), ('He said "which year?"', True), ("(which one?)", True),
    ("**Which?**", True), ("哪一年？", True), ("أي سنة؟", True), ("Which year?" + "\n" * 99, True),
    ("Why? Because.", False), ("12", False), ("", False), ("Is it? Yes", False), ("a?b", False),
    ("Which one? 🙂", True), ("Which one do you mean? I can check both.", True), ("何名様ですか。", True),
    ("What colour?\n1. Red\n2. Blue", True), ("How does it work?\n1. Open it.", False), ("A or B? Both fit.", True),
    ("Please tell me the date.", True), ("Shall I book it?", True),
    ("Meinen Sie 2018 oder 2019? Dann rechne ich.", True), ("2018 ou 2019 ? Je calcule ensuite.", True),
    ("¿2018 o 2019? Luego lo calculo.", True), ("2018 или 2019? Тогда посмотрю.", True),
    ("It is open. Shall I book it?", False), ("It is open. Should I book two or three seats?", True),
    ("Sure! Shall I send it to your office?", True), ("Can you return it? Yes, you can.", False),
    ("Tap \"Lost your card?\" and follow the steps.", False), ("See https://a.org/b?c for which you ask", False),
    ("SELECT a FROM b WHERE c = ?", False), ("```\nask('Which?')\n```", False), ("Please give me a moment.", False),
])  # fmt: skip
def test_question_rule(text, asks):
    assert data.is_question(text) is asks


@pytest.mark.parametrize("marker", ["<end_of_turn>", "</s>", "<br>", "<br/>\n", "&nbsp;", "[/INST]", " <|im_end|>\n<|endoftext|>", "<eos>"])
def test_a_marker_after_a_question_mark_does_not_hide_the_question(marker):
    assert data.is_question(f"For which month?{marker}") and not data.is_question(f"For May.{marker}")


@pytest.mark.parametrize("text", [
    "SELECT name FROM items WHERE name = 'ok?'", "select 1 where 'a' = 'ok?'", 'SELECT a FROM t WHERE q LIKE "%?"',
    "<think>\nWhich month do they mean? May.\n</think>\n\nget stock may rome"])  # fmt: skip
def test_what_a_query_quotes_and_what_was_only_thought_is_no_question(text):
    assert not data.is_question(text)


def test_question_rule_on_labelled_replies():
    """200 replies as service chats have them, half of them asking; tests/proofs/questions.py shows the wrong ones.

    One reader wrote and labelled them ("does it ask the user for what is needed to go on?") before the rule was run on
    any. What the rule is held to is less than what it has, precision 0.99 and recall 0.96, since it was tuned on them.
    """
    rows = rows_of(HERE / "golden" / "replies.jsonl")
    assert len(rows) == 200 and sum(row["asks"] for row in rows) == 100
    gold = [CLARIFY if row["asks"] else ANSWER for row in rows]
    found = data.action_metrics(gold, data.rule_actions([row["text"] for row in rows]))
    assert found["Binary Precision"] >= 0.97 and found["Binary Recall"] >= 0.90, found


def test_user_rule_on_labelled_questions():
    """200 that a model asked on PACIFIC: 123 for what was left open, the others not; tests/proofs/users.py has more."""
    answered = {True: [], False: []}
    for row in rows_of(HERE / "golden" / "asked.jsonl"):
        gold = [("model", row["gold"]), ("user", "that one"), ("model", "5")]
        pair = Pair("", [("user", row["user"])], CLARIFY, gold, gold, gold, "5")
        answered[row["right"]] += data.rule_users([(pair, [("model", row["asked"])], None)])
    given = {right: replies.count("that one") for right, replies in answered.items()}
    assert len(answered[True]) == 123 and given[True] >= 114
    assert len(answered[False]) == 77 and given[False] <= 2


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_question_rule_gives_all_labels_of_the_tiny_world(name):
    pairs = pairs_of(*read_vertex_jsonl(TINY / f"{name}.jsonl"))
    assert data.rule_actions([pair.gold[0][1] for pair in pairs]) == [pair.action for pair in pairs]


@pytest.mark.parametrize("text", ["?" * 10**5, "? " * 10**5, "`" * 10**5, "please " * 10**5, '?"' * 10**5, ".\"" * 10**5,
                                  " " * 10**5, "```" * 10**5, "a_" * 10**5, ".*" * 10**5 + "x", "。" * 10**5, "<think>" * 10**5, "<a" * 10**5,
                                  "select * from t where " + "/*" * 10**5, "select * from [" + "['" * 10**5, "Yes.\n" * 10**5])  # fmt: skip
def test_question_rule_is_quick_on_any_text(text):
    began = time.process_time()
    data.is_question(text)
    assert time.process_time() - began < 2


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


def test_clarify_turn_is_paired_with_answering_at_once():
    pairs = pairs_of(SALES | {"path": "train.jsonl", "line": 17}, STAFF)
    said = [(message["role"], message["content"]) for message in SALES["messages"]]
    gold = said[2:7]
    assert len(pairs) == 7 and pairs[0] == Pair(
        "Sales and costs.\nTable follows.", said[1:], CLARIFY, gold, [("model", "12")], gold, "12", data.INSTRUCTION,
        False, 1, "train.jsonl", 17, 1, 1,
    )  # fmt: skip
    assert pairs[0].history == said[1:2] and pairs[0].where == "train.jsonl:17" and pairs[4].where == ""
    assert [(pair.turn, pair.dialogue) for pair in pairs] == [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (3, 2)]
    assert all(pair.messages is pairs[0].messages for pair in pairs[:4]), "one list for a dialogue"


def test_a_record_is_as_documented():
    trajectory = "Assistant: Which year?\nUser: 2019\nAssistant: Net or gross?\nUser: Net\nAssistant: 12\n"
    prompt = f"{HEAD}User: What were sales?\n"
    assert data.make_record(pairs_of(SALES)[0]) == {
        "input_text": prompt, "output_text": trajectory, "dialogue_policy": CLARIFY, "gold_target": "Assistant: 12\n",
        "gold_trajectory": prompt + trajectory, "chosen_policy": CLARIFY, "rejected_policy": ANSWER,
        "chosen": trajectory, "rejected": "Assistant: 12\n",
    }  # fmt: skip


def test_history_holds_every_message_once():
    pairs = pairs_of(SALES)
    said = [(message["role"], message["content"]) for message in SALES["messages"][1:]]
    assert pairs[3].history == said[:7] and pairs[1].chosen == said[3:6]
    assert [pair.action for pair in pairs] == [CLARIFY, CLARIFY, ANSWER, ANSWER]


def test_answer_turn_is_paired_with_a_question_of_another_dialogue():
    pairs = pairs_of(SALES, STAFF)
    assert pairs[3].chosen == pairs[3].gold == [("model", "7")] and (pairs[3].target, pairs[3].action) == ("7", ANSWER)
    assert pairs[3].rejected == [("model", "In which country?")]
    assert {text for pair in pairs[5:] for _, text in pair.rejected} <= {"Which year?", "Net or gross?"}


def test_whether_a_reply_asks_comes_from_the_label_not_from_its_text():
    row = conversation(user("How big?", True), model("Tell me which"), user("Lima", False), model("Ten, right?"))
    pair = pairs_of(row)[0]
    assert pair.chosen == [("model", "Tell me which"), ("user", "Lima"), ("model", "Ten, right?")]
    assert pair.rejected == [("model", "Ten, right?")]


def test_missing_labels_are_filled_by_one_call_and_given_ones_are_kept():
    calls = []

    def classify(replies):
        calls.append(replies)
        return [CLARIFY if "which" in reply else ANSWER for reply in replies]

    row = conversation(user("a", False), model("which now?"), user("b"), model("say which"), user("c"), model("1"),
                       user("d"))  # fmt: skip
    assert [pair.action for pair in pairs_of(row, action_model=classify)] == [ANSWER, CLARIFY, ANSWER]
    assert calls == [["say which", "1"]]
    assert "requires_clarification" not in row["messages"][2]  # the caller's conversations stay as they were
    assert [pair.action for pair in pairs_of(row)] == [ANSWER, ANSWER, ANSWER], "by rule"


def made(*rows):
    """(pairs, skipped) of rows that have all their labels."""
    return data.make_pairs([row | {"path": "chats.jsonl", "line": 8 + i} for i, row in enumerate(rows)])


@pytest.mark.parametrize("cut", [
    conversation(user("early", False), model("ok"), user("Q", True)),
    conversation(user("early", False), model("ok"), user("Q", True), model("Which?")),
    conversation(user("early", False), model("ok"), user("Q", True), model(" "), user("r", False), model("x")),
])  # fmt: skip
def test_turn_whose_target_is_missing_is_skipped_and_named_but_stays_in_the_history(cut):
    pairs, skipped = made(STAFF, cut)
    assert skipped == [(9, 2, "no answer follows")]
    pairs = pairs[3:]
    assert all(pair.history[-1] != ("user", "Q") for pair in pairs)
    assert len(pairs) == 1 or ("user", "Q") in pairs[-1].history


def test_clarify_turn_that_ends_after_the_users_reply_is_skipped_with_it():
    pairs, skipped = made(conversation(user("Q", True), model("Which?"), user("r", False)), STAFF)
    assert len(pairs) == 3 and [(line, turn) for line, turn, _ in skipped] == [(8, 1), (8, 2)]


def test_a_chat_of_100_000_turns_takes_memory_and_time_as_its_length():
    """One list of messages for all its pairs; a chat of questions alone has gold trajectories of bounded length."""
    began = time.process_time()
    for reply, asks in (("a", False), ("what?", True)):
        pairs, skipped = made(conversation(*[user("q", asks), model(reply)] * 50_000, user("q", False), model("a")))
        assert all(pair.messages is pairs[0].messages for pair in pairs) and len(pairs) + len(skipped) == 50_001
        assert max(len(pair.gold) for pair in pairs) <= data.LONGEST_GOLD
        assert len(skipped) == 0 or len(pairs) == data.LONGEST_GOLD // 2
    assert time.process_time() - began < 10


def test_preference_model_sees_examples_of_other_dialogues_first():
    seen = []

    def preference(requests):
        seen.extend(requests)
        return ["Really which?"] * len(requests)

    pairs = pairs_of(SALES, STAFF, icl_examples=3, preference_model=preference)
    answers = [pair for pair in pairs if pair.action == ANSWER]
    assert all(request[0] is pair for request, pair in zip(seen, answers, strict=True))
    assert all(pair.rejected == [("model", "Really which?")] for pair in answers)
    examples = seen[0][1]
    assert examples[0] is pairs[4]  # the only one of another dialogue comes first, then the own ones fill up
    assert sorted(map(id, examples)) == sorted(id(pairs[i]) for i in (0, 1, 4))


def test_examples_depend_on_seed_and_index_alone():
    many = [conversation(user(f"q{i}", True), model(f"which {i}?"), user("x", False), model("y")) for i in range(30)]

    def rejected(**options):
        return [pair.rejected[0][1] for pair in pairs_of(*many, **options) if pair.action == ANSWER]

    assert rejected() == rejected() and rejected(seed=1) != rejected()
    assert len(set(rejected())) > 5  # not always the same question
    assert all(text != f"which {i}?" for i, text in enumerate(rejected()))


@pytest.mark.parametrize("written", ["", None, " \n", "7", "7\n"])
def test_useless_text_of_the_preference_model_is_replaced_by_a_real_question(written):
    pairs = pairs_of(SALES, STAFF, preference_model=lambda requests: [written] * len(requests))
    assert pairs[3].rejected == [("model", "In which country?")]


def test_nothing_is_appended_to_what_the_preference_model_wrote():
    pairs = pairs_of(SALES, preference_model=lambda requests: ["Say which"] * len(requests))
    assert pairs[3].rejected == [("model", "Say which")]


@pytest.mark.parametrize("question", ["User: who?\nAssistant: me?", "Which?\nUser: this?", "\\User: x?", "  four?\n\n"])
def test_a_question_of_the_data_is_rejected_as_the_file_says_it(question):
    """The rule's question is a text like any other: what looks like a speaker or a mark in it is none."""
    asked = conversation(user("a", True), model(question), user("b", False), model("c"))
    pairs = pairs_of(asked, conversation(user("d", False), model("e")))
    assert pairs[2].rejected == [("model", question)]


@pytest.mark.parametrize(("said", "answer", "asked"), [
    ("Was kostet das?", "5 €", "Was kostet das?"),
    ("Guten Tag.\nIch suche eine Lampe. ", "b", "Ich suche eine Lampe?"),
    ("a", "a?", "??"),
    ("?", "b", "?"),
])  # fmt: skip
def test_data_without_any_question_ask_back_in_the_users_words(said, answer, asked):
    """No sentence of ours in a language that the data may not be in."""
    [pair] = pairs_of(conversation(user(said, False), model(answer)))
    assert pair.rejected == [("model", asked)] and data.rule_actions([asked]) == [CLARIFY]


def test_replies_in_another_language_are_said_where_the_rule_would_not_know_their_requests():
    german = ["Bitte nennen Sie mir die Nummer der Bestellung.", "Das kostet am Freitag genau sieben Euro und neunzig Cent."]
    english = ["You get the money back within thirty days.", "It is open on all days but Sunday."]
    other = "SELECT name, price, stock, colour, size FROM products WHERE stock > 5"

    def said(replies):
        return [line for line in checked(*(conversation(user("a", False), model(reply)) for reply in replies)) if "English" in line]

    assert said([*english, "5", "Berlin", other, *english]) == []
    assert said([*english * 2, german[0]]) == [], "a fifth of them may be names"
    [line] = said([*english, *german])
    assert line.startswith("2 of 4 longer replies do not look English; ") and "action_model_config" in line
    assert said(["5", "Berlin", "7,90 €"]) == [], "nothing to tell it by"


def test_at_least_one_example_is_shown():
    assert pairs_of(SALES, STAFF, icl_examples=0)[3].rejected == [("model", "In which country?")]


def test_class_balance_draws_multiples_and_keeps_dialogues_together():
    rows = [conversation(user(f"q{i}", True), model("which?"), user("x", False), model("y")) for i in range(20)]
    pairs = pairs_of(*rows, class_balance={CLARIFY: 2, ANSWER: 0.5}, seed=3)
    assert [sum(pair.action == action for pair in pairs) for action in (CLARIFY, ANSWER)] == [40, 10]
    order = [pair.history for pair in pairs_of(*rows)]
    positions = [order.index(pair.history) for pair in pairs]
    assert positions == sorted(positions) and len(set(positions)) < len(positions)
    assert pairs == pairs_of(*rows, class_balance={ANSWER: 0.5, CLARIFY: 2}, seed=3)
    assert [pair.action for pair in pairs_of(*rows, class_balance={CLARIFY: 0})] == [ANSWER] * 20


@pytest.mark.parametrize("options", [
    {"target_label": ANSWER}, {"target_label": "clarify"}, {"class_balance": {"ASK": 1}},
    {"class_balance": {CLARIFY: -1}}, {"class_balance": {CLARIFY: 1e9}}, {"class_balance": {CLARIFY: "2"}},
    {"class_balance": {CLARIFY: math.nan}}, {"class_balance": {CLARIFY: True}}, {"class_balance": [1]},
])  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        ACTDataset(**{"dataset": [SALES], "target_label": CLARIFY, "icl_examples": 1} | options).prepare_datasets()


def test_dialogues_groups_consecutive_turns_of_one_conversation():
    pairs = pairs_of(SALES, STAFF, SALES)
    assert data.dialogues(pairs) == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10]]
    assert data.dialogues([pairs[0], pairs[0], pairs[3], pairs[4]]) == [[0, 1, 2], [3]]
    assert data.dialogues([]) == []


def test_pairs_of_a_file_are_of_one_dialogue_where_the_history_goes_on(tmp_path):
    pairs = pairs_of(SALES, STAFF, SALES)
    back = through(tmp_path, "records", [pairs[0], pairs[2], pairs[1], pairs[4], pairs[5]])
    assert [pair.dialogue for pair in back] == [1, 1, 2, 3, 3] and {pair.turn for pair in back} == {0}
    assert back[0].messages is back[1].messages and back[0].history == pairs[0].history
    assert back[3].messages is back[4].messages and back[4].history == pairs[5].history


# ----------------------------------------------------------------------------------------------------------------------
# Files of pairs


def test_pairs_of_a_file_are_only_balanced():
    pairs = pairs_of(SALES, STAFF)
    assert pairs_of(*pairs, is_preference=True) == pairs
    assert len(pairs_of(*pairs, is_preference=True, class_balance={CLARIFY: 3})) == 9 + 4


def test_vertex_preference_line_is_as_documented(tmp_path):
    pairs = pairs_of(SALES, preference_model=lambda requests: ["Which ones?"] * len(requests))
    data.write_preferences(tmp_path / "v.jsonl", pairs, "vertex")
    first, second = rows_of(tmp_path / "v.jsonl")[:2]
    assert first == {
        "systemInstruction": parts(f"{data.INSTRUCTION}\nSales and costs.\nTable follows."),
        "contents": [{"role": "user", **parts("What were sales?")}],
        "completions": [{"score": 1, "completion": {"role": "model", **parts("Which year?")}},
                        {"score": 0, "completion": {"role": "model", **parts("12")}}],
    }  # fmt: skip
    assert [turn["role"] for turn in second["contents"]] == ["user", "model", "user"]


def test_trl_preference_line_is_as_documented():
    pairs = pairs_of(SALES, STAFF)
    assert data.trl_preference(pairs[0]) == {
        "prompt": [{"role": "system", "content": pairs[0].context}, {"role": "user", "content": "What were sales?"}],
        "chosen": [{"role": role.replace("model", "assistant"), "content": text} for role, text in pairs[0].chosen],
        "rejected": [{"role": "assistant", "content": "12"}],
    }
    assert data.trl_preference(pairs[4])["prompt"] == [user("How many staff?")], "no context, no system message"


def completions(*scored, contents=None):
    rows = [{"score": score, "completion": {"role": "model", **parts(text)}} for score, text in scored]
    return {"contents": contents or [{"role": "user", **parts("Hi")}], "completions": rows}


def test_vertex_completions_may_come_in_either_order(tmp_path):
    path = write(tmp_path, completions((0, "Which?"), (1.0, "Four")))
    sides = [("model", "Four")], [("model", "Which?")], [("model", "Four")]
    assert anywhere(read_preferences(path)) == [Pair("", [("user", "Hi")], ANSWER, *sides, "Four")]
    path = write(tmp_path, completions((0.2, "Which?"), (0.9, "Four")))
    assert anywhere(read_preferences(path)) == [Pair("", [("user", "Hi")], ANSWER, *sides, "Four")], "the higher wins"


def trl(prompt=None, chosen=None, rejected=None, **changes):
    def assistant(text):
        return [{"role": "assistant", "content": text}]

    row = {"prompt": prompt or [user("Hi")], "chosen": chosen or assistant("Which?")}
    row["rejected"] = rejected or assistant("4")
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


SCORES = "completions are no two of score and completion, with different scores"
NO_PROMPT = "has no prompt that ends with the user's text before the sides; known are input_text and more (the published"
UNKNOWN = "is no pair in a known form, expected input_text and more (the published code), contents and completions ("
BAD_PAIRS = [
    (completions((1, "a")), SCORES),
    (completions((1, "a"), (1, "b")), SCORES),
    (completions((1, "a"), (0, "b"), (0, "c")), SCORES),
    (completions(("1", "a"), (0, "b")), SCORES),
    (completions((1, "a"), (0, "b"), contents=[{"role": role, **parts("x")} for role in ("user", "model")]), NO_PROMPT),
    (completions((1, "a")) | {"completions": {}}, SCORES),
    (completions(("9", "a"), ("10", "b")), SCORES),
    (completions((1, "a")) | {"completions": [{"score": 1}]}, SCORES),
    (completions((1, "a")) | {"contents": ...},
     "has neither messages nor contents, expected either messages or contents"),
    (trl(prompt=3), "prompt is a number, expected a list"),
    (trl(chosen=[user("x"), model("y")]), "a side does not begin with the assistant's text"),
    (trl() | {"prompt": []}, NO_PROMPT),
    (trl(prompt=[user("x"), model("y")]), NO_PROMPT),
    (trl(prompt=[{"role": "system", "content": "x"}]), NO_PROMPT),
    (trl(prompt=[user("x"), {"role": "system", "content": "x"}]),
     f"prompt[1] has role 'system', {KNOWN} (system only comes first)"),
    (trl(chosen=[{"role": "assistant"}]), "chosen[0].content is missing"),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: a?", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, NO_PROMPT),
    (SALES, UNKNOWN),
    ({"a": 1}, UNKNOWN),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS)
def test_broken_pair_is_refused_with_file_and_line(tmp_path, row, message):
    path = write(tmp_path, trl(), {key: value for key, value in row.items() if value is not ...})
    with pytest.raises(InputError) as error:
        read_preferences(path)
    assert str(error.value).startswith(f"{path}:2: {message}") and "\n" not in str(error.value)


HI, WHICH, FOUR = user("Hi"), {"role": "assistant", "content": "Which?"}, {"role": "assistant", "content": "4"}
OTHER_FORMS = {
    "a text as prompt": {"prompt": "Hi", "chosen": [WHICH], "rejected": [FOUR]},
    "a text as prompt, sides that repeat it": {"prompt": "Hi", "chosen": [HI, WHICH], "rejected": [HI, FOUR]},
    "sides that repeat the prompt": {"prompt": [HI], "chosen": [HI, WHICH], "rejected": [HI, FOUR]},
    "sides alone": {"chosen": [HI, WHICH], "rejected": [HI, FOUR]},
    "a message alone": {"prompt": HI, "chosen": WHICH, "rejected": FOUR},
    "texts": {"prompt": "Hi", "chosen": "Which?", "rejected": "4"},
    "OpenAI's": {"input": {"messages": [HI]}, "preferred_output": [WHICH], "non_preferred_output": [FOUR]},
    "content as a list": {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
                          "chosen": [WHICH], "rejected": [FOUR]},
    "a user's message at the end": {"prompt": [HI], "chosen": [WHICH, user("This.")], "rejected": [FOUR]},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_pairs_in_the_other_forms_of_trl_and_in_openais_are_the_same_pair(tmp_path, name):
    pairs, lines = data.read_preferences(write(tmp_path, OTHER_FORMS[name]))
    chosen = [("model", "Which?")]
    assert anywhere(pairs) == [Pair("", [("user", "Hi")], CLARIFY, chosen, [("model", "4")], chosen, "4")]
    left_out = [line for line in lines if line.endswith(": 1 sides end with the user's message, which is left out: 1")]
    assert len(left_out) == (name == "a user's message at the end")


def test_neighbours_of_one_role_are_one_message_in_pairs_too(tmp_path):
    row = trl(prompt=[user("Hello"), user("Hi")], chosen=[model("Which?"), model("Red?")])
    [pair], lines = data.read_preferences(write(tmp_path, row))
    assert (pair.history, pair.chosen) == ([("user", "Hello\nHi")], [("model", "Which?\nRed?")])
    assert lines[0].endswith(": 2 messages are joined to the one before, of the same role: 1")


def test_keys_of_pairs_that_nothing_reads_are_named(tmp_path):
    rows = [trl() | {"score_chosen": 1, "score_rejected": 9}, trl(), completions((1, "a"), (0, "b")) | {"weight": 0},
            published(weight=1)]  # fmt: skip
    path = write(tmp_path, *rows)
    lines = [line.removeprefix(f"{path}: ") for line in data.read_preferences(path)[1]]
    assert lines[:3] == ["1 lines have 'score_chosen', which nothing reads: 1",
                         "1 lines have 'score_rejected', which nothing reads: 1",
                         "2 lines have 'weight', which nothing reads: 3, 4"]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Chats as they are exported


def test_neighbours_of_one_role_are_one_message(tmp_path):
    """A question in a second bubble stays a question; of two labels of one turn the later one counts."""
    split = conversation(user("Look it up."), model("One moment."), model("For which month?"), user("May."), model("5"))
    labelled = conversation(user("a", False), user("b", True), model("x?"), user("c", True), user("d"), model("e"))
    said, (first, second) = told(split, labelled, folder=tmp_path)
    assert said == ["3 messages are joined to the one before, of the same role: 1, 2"]
    assert first == [user("Look it up."), model("One moment.\nFor which month?"), user("May."), model("5")]
    assert second == [user("a\nb", True), model("x?"), user("c\nd", True), model("e")]
    assert [pair.action for pair in pairs_of({"messages": first})] == [CLARIFY, ANSWER]


def test_a_message_without_text_never_reaches_a_prompt(tmp_path):
    row = conversation(user("a"), model(" \n"), user("b"), model("c"), model(""), user(""))
    said, [messages] = told(row, folder=tmp_path)
    assert messages == [user("a\nb"), model("c")]
    assert said == ["3 messages without text are left out: 1", "1 messages are joined to the one before, of the same role: 1"]


def test_a_greeting_stays(tmp_path):
    said, [messages] = told(conversation(model("Hello."), user("a"), model("b")), folder=tmp_path)
    assert said == [] and messages[0] == model("Hello.")
    assert pairs_of({"messages": messages})[0].history == [("model", "Hello."), ("user", "a")]


def test_contents_without_a_role_are_the_users_then_in_turn(tmp_path):
    rows = [{"contents": [parts("a"), {"role": "", **parts("b")}, parts("c")]},
            {"contents": [{"role": "user", **parts("a")}, parts("b"), {"role": None, **parts("c")}]},
            {"systemInstruction": {"role": "system", **parts("x")}, "contents": [parts("a")]}]  # fmt: skip
    said, found = told(*rows, folder=tmp_path)
    assert said == [] and found[0] == found[1] == [user("a"), model("b"), user("c")]
    assert found[2] == [{"role": "system", "content": "x"}, user("a")]


def test_texts_in_parts_and_the_names_of_others_are_read(tmp_path):
    listed = [{"type": "text", "text": "Which"}, {"type": "text", "text": " one?"}]
    rows = [{"messages": [{"role": "Human", "content": "Hi"}, {"role": "ASSISTANT", "content": listed}]},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Which one?"}]}]  # fmt: skip
    assert told(*rows, folder=tmp_path) == ([], [[user("Hi"), model("Which one?")]] * 2)
    developer = {"messages": [{"role": "developer", "content": "x"}, user("Hi")]}
    assert told(developer, folder=tmp_path)[1] == [[{"role": "system", "content": "x"}, user("Hi")]]


NO_TEXTS = {
    "functionCall": {"contents": [{"role": "user", **parts("a")}, {"role": "model", "parts": [{"functionCall": {}}]}]},
    "fileData": {"contents": [{"role": "user", "parts": [{"text": "a"}, {"fileData": {"fileUri": "gs://x"}}]}]},
    "image_url": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "image": {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]},
    "tool calls": {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                                {"role": "tool", "content": "5"}, model("b")]},
}  # fmt: skip


@pytest.mark.parametrize("what", NO_TEXTS)
def test_a_line_with_what_is_no_text_is_left_out_and_counted(tmp_path, what):
    rows = [conversation(user("a"), model("b")), NO_TEXTS[what], NO_TEXTS[what], conversation(user("c"), model("d"))]
    said, found = told(*rows, folder=tmp_path)
    assert said == [f"2 lines with {what} are left out: 2, 3"] and len(found) == 2
    with pytest.raises(InputError, match=f": 1 lines with {what} are left out: 1\n.*: holds nothing to use"):
        read_vertex_jsonl(write(tmp_path, NO_TEXTS[what]))


@pytest.mark.parametrize("text", [
    "5<end_of_turn>", "<bos>x", "<|im_end|>", "[INST] x [/INST]", "5</s>", "<think>hm</think>5", "one<br>two", "one<br/>two", "<start_of_turn>user"])
def test_texts_that_spell_control_tokens_are_named(tmp_path, text):
    said, _ = told(conversation(user("a"), model("<b>b</b> 3 < 5")), conversation(user("a"), model(text)), folder=tmp_path)
    assert said == ["1 lines spell control tokens, thoughts, speakers or <br>: formatted already?: 2"]


def test_keys_that_nothing_reads_are_named(tmp_path):
    row = {"contents": [{"role": "user", **parts("a"), "mood": 1}, {"role": "model", **parts("b")}]}
    said, _ = told(row, conversation(user("a"), model("b")), row | {"id": 3}, folder=tmp_path)
    assert said == ["2 lines have 'mood', which nothing reads: 1, 3", "1 lines have 'id', which nothing reads: 3"]
    assert [row["unread"] for row in read_vertex_jsonl(tmp_path / "train.jsonl")] == [["mood"], [], ["id", "mood"]]


def test_a_list_of_lines_ends_after_ten(tmp_path):
    said, _ = told(*[conversation(user("a")) | {"id": 1}] * 12, folder=tmp_path)
    assert said == ["12 lines have 'id', which nothing reads: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 ... and 2 more"]


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def checked(*rows, actions=None):
    """What `data.check_conversations` says of labelled rows, without the path."""
    pairs, skipped = made(*rows)
    actions = data.rule_actions([pair.gold[0][1] for pair in pairs]) if actions is None else actions
    return [line.removeprefix("x: ") for line in data.check_conversations("x", pairs, skipped, 0, actions)]


@pytest.mark.parametrize(("messages", "turns"), [
    ([user("a", False)], ["8.1"]),
    ([user("a", True), model("b?")], ["8.1"]),
    ([user("a", True), model("b?"), user("c", False)], ["8.1", "8.2"]),
    ([user("a", False), user("b", False), model("c")], ["8.1"]),
    ([user("a", True), model("b?"), user("c", False), model(" ")], ["8.1", "8.2"]),
    ([user("a", True), model("b?"), model("c"), user("d", False), model("e")], ["8.1"]),
])  # fmt: skip
def test_turns_that_are_skipped_are_named(messages, turns):
    assert checked(conversation(*messages), actions=[]) == [
        f"{len(turns)} user turns are skipped, no answer follows: line.turn {', '.join(turns)}"]


def test_labels_that_the_classifier_contradicts_are_named():
    """From a tenth of the turns on it is said what that means."""
    right = [conversation(user("a", False), model("b"), user("c", False), model("d"))] * 9
    odd = conversation(user("a", True), model("Tell me."), user("b", False), model("Which?"), system="x")
    assert checked(*right) == [] == checked(*right, odd, actions=[]), "not asked"
    assert checked(*right, odd) == [
        "1 user turns are labelled CLARIFY, but the classifier says ANSWER: line.turn 17.1",
        "1 user turns are labelled ANSWER, but the classifier says CLARIFY: line.turn 17.2",
    ], "2 of 20 are not more than a tenth"
    said = checked(*right[1:], odd)
    assert len(said) == 3
    for part in ("labels and classifier disagree in 11% of turns", "training_config.action_labels",
                 "action_model_config", "can hardly win"):  # fmt: skip
        assert part in said[2]


# ----------------------------------------------------------------------------------------------------------------------
# Datasets of a configuration


@pytest.fixture
def configured():
    """What get_datasets_from_config reads of a configuration."""

    def make(train, validation="", split=0.0, **changes):
        fields = {"icl_examples": 1, "class_balance": None, "is_preference": False, "seed": 0}
        files = SimpleNamespace(train_path=str(train), validation_path=str(validation), validation_split=split)
        return SimpleNamespace(data_config=files, training_config=SimpleNamespace(**{**fields, **changes}))

    return make


def test_config_gives_training_and_validation_pairs(tmp_path, configured):
    path = write(tmp_path, SALES, conversation(user("alone", False)), STAFF)
    train, validation = data.get_datasets_from_config(configured(path, path, class_balance={CLARIFY: 3}))
    assert (len(train), len(validation)) == (13, 7)  # only the training pairs are balanced
    assert [pair.where for pair in validation] == [f"{path}:1"] * 4 + [f"{path}:3"] * 3
    data.write_preferences(tmp_path / "p.jsonl", validation, "records")
    none, again = data.get_datasets_from_config(configured("", tmp_path / "p.jsonl", is_preference=True))
    assert none == [] and anywhere(again) == anywhere(validation)


def test_a_share_of_the_conversations_is_held_out(tmp_path, configured):
    odd = [conversation(user(f"q{i}", True), model("which?"), user("x", False), model(f"y{i}")) for i in range(20)]
    path = write(tmp_path, *odd)
    train, held = data.get_datasets_from_config(configured(path, split=0.25))
    assert (len(train), len(held)) == (30, 10)
    names = [{pair.history[0][1] for pair in pairs} for pairs in (train, held)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 20, "whole conversations"
    assert data.get_datasets_from_config(configured(path, split=0.25)) == (train, held)
    other = data.get_datasets_from_config(configured(path, split=0.25, seed=1))[1]
    assert {pair.history[0][1] for pair in other} != names[1]
    both = data.get_datasets_from_config(configured(path, path, split=0.25))
    assert [len(pairs) for pairs in both] == [40, 40], "a file of its own comes first"
    rows, few = data.split_dialogues(train + held, 0.25, 0)
    assert (len(rows), len(few)) == (30, 10) and all(len(group) == 2 for group in data.dialogues(few))


def test_a_coin_takes_half_of_the_actions_and_swaps_the_sides():
    gold = pairs_of(*[conversation(user(f"q{i}", True), model("a?"), user("b", False), model("c")) for i in range(30)])
    coined = data.random_actions(gold, 0)
    assert coined == data.random_actions(gold, 0) != data.random_actions(gold, 1)
    swapped = [a.action != b.action for a, b in zip(coined, gold, strict=True)]
    assert 0.25 < sum(swapped) / len(swapped) < 0.75
    for swap, a, b in zip(swapped, coined, gold, strict=True):
        other = replace(b, action=data.OTHER[b.action], chosen=b.rejected, rejected=b.chosen)
        assert a == (other if swap else b)


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def test_drop_f1_agrees_with_the_official_scorer():
    recorded = json.loads((HERE / "golden" / "drop_f1.json").read_text(encoding="utf-8"))["pairs"]
    assert len(recorded) >= 80 and {row["exact_match"] for row in recorded} == {0.0, 1.0}
    for row in recorded:
        assert drop_f1(row["predicted"], row["gold"]) == (row["exact_match"], row["f1"]), row


def test_drop_f1_by_hand():
    assert drop_f1("net sales", "sales of 2019") == (0.0, 0.4)  # precision 1/2, recall 1/3
    assert drop_f1("(5)", "-5") == (1.0, 1.0)
    assert drop_f1("9" * 5000 + "%", "9") == (0.0, 0.0)  # more digits than Python converts


@pytest.mark.parametrize(("text", "word"), [
    ("1." + "1" * 40_000, "1.1111"), ("1." + "1" * 40_000 + "x", None), ("1.5\u00a0million" + "." * 40_000, "1500000.0"),
    ("1." + "1" * 40_000 + "%", "0.0111"), ("1.0" + "\u00a0" * 40_000 + "%", "0.01"), ("(" * 40_000, None),
])  # fmt: skip
def test_drop_f1_takes_no_longer_for_long_numbers(text, word):
    """Search from every digit to the end of the number was 38 s; this is milliseconds."""
    start = time.process_time()
    words = data.drop_words(text)
    assert time.process_time() - start < 1
    assert words == [word] if word else len(words) <= 1


@pytest.mark.parametrize("heuristic", [drop_f1, data.coqa_f1, data.exact_match])  # SQL's: test_sql.py
def test_no_text_breaks_a_heuristic(heuristic):
    words = ("5", "%", "(", ")", ".", "-", "\t", " ", "million", "1e999", "inf", "½", "٣", "_", "a")
    rng = random.Random(0)
    for _ in range(5000):
        said, gold = ("".join(rng.choices(words, k=rng.randrange(7))) for _ in range(2))
        for a, b in ((said, gold), (said, said)):
            exact, f1 = heuristic(a, b)
            assert exact in (0.0, 1.0) and 0.0 <= f1 <= 1.0 and f1 >= exact
        assert heuristic(said, said) == (1.0, 1.0)


@pytest.mark.parametrize(("predicted", "gold", "want"), [
    ("The White House.", "white house", (1.0, 1.0)),
    ("white white", "white", (0.0, 2 / 3)),  # precision 1/2, recall 1: repeated words count
    ("red fox", "red fox ran", (0.0, 0.8)),
    ("yes", "Yes!", (1.0, 1.0)),
    ("", "the", (1.0, 1.0)), ("", "x", (0.0, 0.0)), ("x", "y", (0.0, 0.0)), ("x", "", (0.0, 0.0)),
])  # fmt: skip
def test_coqa_f1_by_hand(predicted, gold, want):
    assert data.coqa_f1(predicted, gold) == pytest.approx(want)


def test_exact_match_folds_case_and_spacing_only():
    assert data.exact_match(" Get  Revenue\nMar ", "get revenue mar") == (1.0, 1.0)
    assert data.exact_match("get revenue, mar", "get revenue mar") == (0.0, 0.0)
    assert all(getattr(data, name) is heuristic for name, heuristic in data.HEURISTICS.items())


BINARY = ("Binary F1", "Binary Recall", "Binary Precision")


def test_action_metrics_by_hand():
    # CLARIFY: 3, of which 2 found, and 4 said, so F1 2*2/7; ANSWER: 5, of which 3 found, and 4 said, so F1 2*3/9
    gold = [CLARIFY] * 3 + [ANSWER] * 5
    predicted = [CLARIFY, CLARIFY, ANSWER, CLARIFY, CLARIFY] + [ANSWER] * 3
    assert data.action_metrics(gold, predicted) == pytest.approx({
        "Accuracy": 5 / 8, "Weighted F1": (3 * 4 / 7 + 5 * 2 / 3) / 8, "Macro F1": (4 / 7 + 2 / 3) / 2,
        **dict(zip(BINARY, (4 / 7, 2 / 3, 2 / 4), strict=True)),
    })  # fmt: skip


def test_action_metrics_without_a_class_or_without_turns():
    never = data.action_metrics([ANSWER, ANSWER], [ANSWER, ANSWER])
    assert never == {"Accuracy": 1.0, "Weighted F1": 1.0, "Macro F1": 1.0, **dict.fromkeys(BINARY, 0.0)}
    silent = data.action_metrics([CLARIFY, ANSWER], [ANSWER, ANSWER])
    want = {"Accuracy": 0.5, "Weighted F1": 1 / 3, "Macro F1": 1 / 3, **dict.fromkeys(BINARY, 0.0)}
    assert silent == pytest.approx(want)
    assert set(data.action_metrics([], []).values()) == {None}
    with pytest.raises(ValueError):
        data.action_metrics([ANSWER], [])
    assert data.mean_or_none([]) is None and data.mean_or_none(iter([1, 2])) == 1.5


# ----------------------------------------------------------------------------------------------------------------------
# Converters


def pacific(**changes):
    question = {
        "question": " What is the change? ",
        "original_question": "What is the change in cost?",
        "answer": -3.5,
        "derivation": "1.5-5 ",
        "answer_type": "arithmetic",
        "req_clari": False,
        "scale": "million",
    }
    asked = {
        "question": "And which cost?",
        "original_question": "x",
        "answer": ["Which year?"],
        "derivation": "",
        "answer_type": "question",
        "req_clari": True,
        "scale": "",
    }
    spans = {"question": "2019", "answer": ["rent", "wages"], "answer_type": "multi-span", "req_clari": False}
    count = {"question": "How many?", "answer": "2", "derivation": "rent##wages", "answer_type": "count"}
    return {"paragraphs": [{"text": "Costs fell.\nThen rose."}, {"text": "See table."}],
            "table": {"table": [["", "2019"], ["Cost", "1.5", "5"]]},
            "questions": [question | changes, asked, asked | spans, asked | spans | count]}  # fmt: skip


def test_pacific_becomes_labelled_conversations():
    assert {"messages": data.convert_pacific(pacific())} == conversation(
        user("What is the change?", False), model("1.5-5 = -3.5"), user("And which cost?", True), model("Which year?"),
        user("2019", False), model("rent, wages"), user("How many?", False), model("2"),
        system="Costs fell. Then rose.\nSee table.\n : 2019\nCost : 1.5 | 5",
    )  # fmt: skip


def abg(ambiguity="ambiguous"):
    readings = [{"clr_ans": "The first.", "org_ans": "Ann", "org_ans_2": "ann"},
                {"clr_ans": "The second.", "org_ans": "Bo"}]  # fmt: skip
    asked = {"question": "First or second", "answers": readings} if ambiguity == "ambiguous" else {}
    return {"story": "Ann met Bo.\nThey left.", "ambiguity": ambiguity, "clarification_turn": asked,
            "history_turns": [{"turn_id": 1, "question": "Who met?", "answer": "Two people"}],
            "target_turn": {"turn_id": 2, "question": "Who?", "answer": "Ann"}}  # fmt: skip


def test_abg_coqa_becomes_labelled_conversations():
    history, system = (user("Who met?", False), model("Two people")), "Ann met Bo.\nThey left."
    asked = user("Who?", True), model("First or second"), user("The first.", False), model("Ann")
    assert {"messages": data.convert_abg_coqa(abg())} == conversation(*history, *asked, system=system)
    plain = conversation(*history, user("Who?", False), model("Ann"), system=system)
    assert {"messages": data.convert_abg_coqa(abg("non_ambiguous"))} == plain


def run(*arguments):
    command = [sys.executable, HERE.parent / "data.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line_converts_and_counts(tmp_path):
    source, target = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps([pacific()]))
    done = run("pacific", source, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{target}: 1 conversations, 4 user turns: 1 CLARIFY, 3 ANSWER, 0 skipped\n"
    assert [row["messages"] for row in read_vertex_jsonl(target)] == [data.convert_pacific(pacific())]
    source.write_text(json.dumps({"data": [abg(), abg("non_ambiguous")]}))
    said = run("abg_coqa", source, target).stdout
    assert said.startswith(f"{target}: 2 conversations, 5 user turns: 1 CLARIFY, 4 ANSWER, 0 skipped\n")
    assert [len(row["messages"]) for row in read_vertex_jsonl(target)] == [7, 5]


def test_a_converter_need_not_give_labels(tmp_path, capsys, monkeypatch):
    """The classifier's then stand in what is said of the file."""
    monkeypatch.setitem(data.CONVERTERS, "pacific", lambda item: [user(item), model("Which?"), user("x"), model("y")])
    (tmp_path / "in.json").write_text('["a", "b"]')
    assert data.main(["pacific", str(tmp_path / "in.json"), str(tmp_path / "out.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "2 conversations, 4 user turns: 2 CLARIFY, 2 ANSWER, 0 skipped\n" in said and "labelled 4 turns" in said
    assert rows_of(tmp_path / "out.jsonl")[0]["messages"][0] == user("a")


@pytest.mark.parametrize("words", [
    ["pacific", "in", "in"], ["pacific", "in", "link"], ["vertex_preferences", "in", "./in"], ["spider", "in", "db", "in"]])
def test_a_converter_does_not_write_over_what_it_reads(tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    Path("in").write_text(json.dumps([pacific()]))
    Path("link").symlink_to("in")
    before = Path("in").read_bytes()
    assert data.main(words) == 2 and Path("in").read_bytes() == before and Path("link").is_symlink()
    assert capsys.readouterr().err == f"data.py: error: {words[-1]}: is read, expected another file to write\n"


def test_command_line_converts_between_files_of_pairs(tmp_path):
    pairs = pairs_of(SALES, STAFF)
    data.write_preferences(tmp_path / "in.jsonl", pairs, "records")
    for form in ("trl", "vertex"):
        target = tmp_path / f"{form}.out"
        done = run(f"{form}_preferences", tmp_path / "in.jsonl", target)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{target}: 7 pairs of 2 conversations\n")
        through(tmp_path, form, pairs)
        assert target.read_bytes() == (tmp_path / f"{form}.jsonl").read_bytes()


UNLIKE_PACIFIC, UNLIKE_ABG = "is not as pacific is published", "is not as abg_coqa is published"


@pytest.mark.parametrize(("converter", "content", "message"), [
    ("pacific", [pacific(), pacific(derivation=None)], f"item 1 {UNLIKE_PACIFIC} (AttributeError: "),
    ("pacific", [pacific(question=None)], f"item 0 {UNLIKE_PACIFIC} (AttributeError: "),
    ("pacific", [pacific(), {}], f"item 1 {UNLIKE_PACIFIC} (KeyError: 'paragraphs')"),
    ("pacific", [pacific() | {"table": {"table": [["a", 1]]}}], f"item 0 {UNLIKE_PACIFIC} (TypeError: "),
    ("pacific", [pacific() | {"table": {"table": [[]]}}], f"item 0 {UNLIKE_PACIFIC} (ValueError: "),
    ("pacific", [pacific() | {"paragraphs": None}], f"item 0 {UNLIKE_PACIFIC} (TypeError: "),
    ("pacific", {"data": []}, "holds no item, expected at least one"),
    ("pacific", {"rows": []}, f"the file {UNLIKE_PACIFIC} (KeyError: 'data')"),
    ("pacific", [3], f"item 0 {UNLIKE_PACIFIC} (TypeError: "),
    ("pacific", 3, f"the file {UNLIKE_PACIFIC} (TypeError: "),
    ("pacific", [pacific(req_clari="no")],
     "item 0: its conversation: messages[1].requires_clarification is a string, expected "),
    ("pacific", [pacific() | {"questions": []}],
     "item 0: its conversation: messages has no user turn, expected at least one"),
    ("abg_coqa", [], "holds no item, expected at least one"),
    ("abg_coqa", {}, f"the file {UNLIKE_ABG} (KeyError: 'data')"),
    ("abg_coqa", {"data": [abg(), abg("non_ambiguous") | {"ambiguity": "ambiguous"}]},
     f"item 1 {UNLIKE_ABG} (KeyError: "),
    ("abg_coqa", {"data": [abg() | {"clarification_turn": {"question": "x", "answers": []}}]},
     f"item 0 {UNLIKE_ABG} (IndexError: "),
    ("abg_coqa", {"data": [{"story": "x\ny"}]}, f"item 0 {UNLIKE_ABG} (KeyError: "),
])  # fmt: skip
def test_command_line_refuses_bad_structure_in_one_line(tmp_path, capsys, converter, content, message):
    source, target = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps(content))
    assert data.main([converter, str(source), str(target)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"data.py: error: {source}: {message}") and said.count("\n") == 1
    assert not target.exists()


@pytest.mark.parametrize("form", ["vertex", "trl"])
def test_command_line_refuses_a_file_that_holds_no_pairs(tmp_path, capsys, form):
    path = write(tmp_path, SALES)
    assert data.main([f"{form}_preferences", str(path), str(tmp_path / "out.jsonl")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"data.py: error: {path}:1: is no pair in a known form, expected ") and said.count("\n") == 1
    assert said.endswith("; for conversations training_config.is_preference is false\n")


def test_command_line_names_the_line_of_broken_json(tmp_path):
    source = tmp_path / "in.json"
    source.write_text('[\n{"paragraphs": \n]')
    done = run("pacific", source, tmp_path / "out.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"data.py: error: {source}:3: invalid JSON at column 1: Expecting value\n"
    source.write_bytes(b'[\n\n"\xe9"]')
    message = f"{source}:1: no JSON in UTF-8 ('utf-8' codec can't decode byte 0xe9 in position 4: invalid continuation byte)"
    assert run("pacific", source, tmp_path / "out.jsonl").stderr == f"data.py: error: {message}\n"
    missing = run("pacific", tmp_path / "none", "x").stderr
    assert missing == f"data.py: error: {tmp_path}/none: cannot be read (No such file or directory)\n"


def test_command_line_checks_a_file(tmp_path, capsys):
    path = write(tmp_path, SALES, conversation(user("a"), model("Please tell me the date.")), conversation(user("b")))
    assert data.main(["check", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 3 conversations, 6 user turns: 2 CLARIFY, 2 ANSWER, 2 skipped",
        f"{path}: the action classifier labelled 1 turns",
        f"{path}: 2 user turns are skipped, no answer follows: line.turn 2.1, 3.1",
    ]
    typo = {"role": "user", "content": "a", "require_clarification": True}
    assert data.main(["check", str(write(tmp_path, SALES, conversation(typo), "{"))]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert f"{path}:2: has 'require_clarification', expected 'requires_clarification'" in first
    assert second.startswith(f"{path}:3: ")


def test_an_array_is_not_json_lines(tmp_path):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([conversation(user("a"), model("b"))], indent=1))
    with pytest.raises(InputError) as error:
        read_vertex_jsonl(path)
    assert str(error.value) == f"{path}: begins with '[', expected JSON Lines, an object a line (jq -c '.[]' makes them)"


@pytest.mark.parametrize("words", [
    ["check"], ["check", "a", "b"], ["pacific", "a"], ["spider", "a", "b"], ["pacific", "a", "b", "c"], ["nothing", "a"],
    [], ["--help"]])  # fmt: skip
def test_command_line_shows_the_commands_where_it_knows_none(capsys, words):
    assert data.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("expected\n    python data.py check FILE.jsonl\n") and "spider IN.json DATABASES OUT" in said
    shown = {line.split()[2] for line in said.splitlines() if "data.py" in line}
    assert shown == set(data.COMMANDS) and set(data.CONVERTERS) < shown


@pytest.mark.parametrize(("reply", "asks"), [
    ("You're welcome 😊 Anything else I can do for you?", False), ("Is there anything else?", False),
    ("他に何かございますか？", False), ("Let me know your order number.", True), ("Let me know if it works.", False),
    ("I'd need your customer number to look that up.", True), ("Sure, just send me a photo of the tyre.", True),
    ("We will send you a photo.", False), ("Please provide your order number.", True), ("Please clarify which year.", True),
    ("Sure! Please provide me with the dates of your stay.", True), ("Kindly share the date of your booking.", True),
    ("Please confirm which year you mean.", True), ("Please confirm your booking by clicking the link.", False),
    ("With that date, what's the city you leave from?", True), ("With that in mind -- which of these do you want from us?", True),
    ("/* Which ones? */ SELECT n FROM t", False), ("WITH a AS (SELECT '?' AS q FROM t) SELECT q FROM a", False),
])  # fmt: skip
def test_closing_offers_are_no_questions_and_requests_are(reply, asks):
    assert data.is_question(reply) == asks


def test_a_terminal_without_a_character_shows_its_code(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with pytest.raises(UnicodeEncodeError):
        print("数")
    data.speak_plainly()
    print("数")
    assert raw.getvalue() == b"\\u6570\n"


def test_pairs_that_contradict_each_other_are_named(tmp_path):
    pairs, path = pairs_of(SALES, STAFF), tmp_path / "pairs.jsonl"
    data.write_preferences(path, pairs, "records")
    assert data.read_preferences(path)[1] == []
    turned = replace(pairs[0], chosen=pairs[0].rejected, rejected=pairs[0].chosen)
    data.write_preferences(path, [*pairs, turned], "trl")
    assert data.read_preferences(path)[1] == [f"{path}: 2 pairs reject what another pair of the same turn prefers: 1, 8"]


def test_pairs_without_the_users_reply_are_named(tmp_path):
    path = write(tmp_path, trl(), trl(chosen=[*trl()["chosen"], user("This."), *trl()["rejected"]]))
    problem = "1 clarifying turns lack the user's reply: a rule cannot play that user: 1"
    assert data.read_preferences(path)[1] == [f"{path}: {problem}"]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers, and how far a heuristic can be trusted


@pytest.mark.parametrize(("predicted", "gold", "same"), [
    ("44,85 €", "The parcel costs €44.85.", True), ("73,80 €", "44,85 €", False), ("44,85 EUR", "44.85 euros", True),
    ("44,85 $", "44,85 €", False), ("44,85", "44,85 €", False), ("1.299,00", "1 299", True), ("$1,250", "1250 dollars", True),
    ("$1,250", "$1.25", False), ("1.299.000", "1,299,000", True), ("0.125", "0,125", True), ("0.125", "125", False),
    ("10.0", "10", True), ("12.5.", "12.5", True), ("33.1\nSee above", "33.1", True), ("\u22125", "-5", True), ("5", "-5", False),
    ("3-4", "3 4", True), ("12 %", "12%", True), ("12 percent", "12 %", True), ("12", "12%", False), ("1\u202f299", "1'299", True),
    ("5 days", "5 weeks", False), ("in 5 Tagen", "5 days", True), ("5 Tage", "in 5 Tagen", True), ("5k", "5000", True),
    ("5k", "5", False), ("1.1 million euros", "€1,100,000", True), ("5 kg", "5 km", False), ("-$5", "$-5", True),
    ("-$5", "$5", False), ("US$ 5", "$5", True), ("room 12", "Room 12 on the left", True), ("2 of 3", "3 of 2", True),
    ("2 and 3", "2", False), ("no number", "5", False), ("", "5", False), ("USD 5", "$5", True), ("2019 300", "300 and 2019", True),
    ("01.05.2024", "01.05.1999", False), ("1.5.2024", "01.05.2024", True), ("3.2.1", "3.2.9", False), ("1,2,3", "1, 2, 3", True),
    ("1,23,456", "1,23,999", False), ("1,299,000.50", "1299000.5", True), ("10 - 12 days", "10-12 days", True),
    ("44.1 - 56.7 = -12.6", "44.1-56.7 = -12.6", True), ("- 5 \u20ac\n- 7 \u20ac", "5 \u20ac and 7 \u20ac", True),
    ("2 Gäste", "2", True), ("2 Gäste", "2 g", False), ("4 Männer", "4 Personen", True), ("EUR44.85", "€44.85", True),
    ("12\n150", "12, 150", True), ("$5bn", "$5", False), ("$5M", "$5 million", True), ("$5M", "5 m", False),
    ("$5B", "5 billion dollars", True), ("5 Mio. €", "5 Mrd. €", False), ("5 Mio. €", "€5,000,000", True),
])  # fmt: skip
def test_number_match_by_hand(predicted, gold, same):
    assert data.HEURISTICS["number_match"](predicted, gold) == (float(same), float(same))


def test_number_match_of_texts_without_numbers_is_drop_f1():
    assert data.number_match("net sales", "sales of may") == drop_f1("net sales", "sales of may") == (0.0, 0.4)


def test_how_far_a_heuristic_can_be_trusted():
    """Other answers of the dialogue that would win, and right answers that would lose in a sentence."""
    shop = conversation(user("Price?", False), model("44,85 €"), user("And the red one?", False), model("73,80 €"),
                        user("Both?", True), model("Which?"), user("Red and blue", False), model("118,65 €"))  # fmt: skip
    pairs = pairs_of(shop, conversation(user("a", False), model("b")))
    assert len(pairs) == 5
    wrong = data.heuristic_check(pairs, drop_f1, 0.3)
    assert wrong == (8, 8, 0, 5), "the currency alone is enough"
    assert data.heuristic_check(pairs, drop_f1, 0.9) == (0, 8, 5, 5)
    assert data.heuristic_check(pairs, data.number_match, 0.5) == (0, 8, 1, 5), "only the answer without a number loses"
    assert data.heuristic_check(pairs, lambda predicted, gold, context: 1, 0.5) == (8, 8, 0, 5)
    assert data.heuristic_check([], drop_f1, 0.3) == (0, 0, 0, 0)


def test_exports_with_null_plain_parts_thoughts_and_a_system_text_are_read(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None},
                      {"role": "assistant", "content": ["Hello", " there"]}]},
        {"systemInstruction": "c", "contents": [
            {"role": "user", "parts": [{"text": "Hi"}]},
            {"role": "model", "parts": [{"text": "They greet me.", "thought": True}, {"text": "Hello"}]}]},
    ]  # fmt: skip
    conversations, lines = data.read_conversations(write(tmp_path, *rows))
    said = [[(m["role"], m["content"]) for m in row["messages"]] for row in conversations]
    assert said == [[("user", "Hi"), ("model", "Hello there")], [("system", "c"), ("user", "Hi"), ("model", "Hello")]]
    assert [line.partition(": ")[2] for line in lines] == ["1 messages without text are left out: 1"]


def test_keys_that_are_null_or_empty_are_as_if_they_were_not_there(tmp_path):
    """As writers of tables give every line all keys."""
    nothing = {"requires_clarification": None, "tool_calls": None, "parts": None, "name": None}
    turns = [nothing | user("Hi"), nothing | {"role": "assistant", "content": "", "tool_calls": []}, nothing | model("Hello")]
    row = {"messages": turns, "contents": None, "systemInstruction": None, "system": "c", "id": None}
    [found], lines = data.read_conversations(write(tmp_path, row))
    assert data.messages_of(found["messages"]) == [("system", "c"), ("user", "Hi"), ("model", "Hello")]
    said = [line.partition(": ")[2] for line in lines]
    assert said == ["1 messages without text are left out: 1", "1 lines have 'tool_calls', which nothing reads: 1"]
    chats = {key: [user("Hi"), model(key)] for key in ("chosen", "rejected")}
    pairs, _ = data.read_preferences(write(tmp_path, {"prompt": None, **chats}))
    assert (pairs[0].history, pairs[0].chosen) == ([("user", "Hi")], [("model", "chosen")])


def test_a_system_text_beside_the_prompt_is_the_context_of_a_pair(tmp_path):
    row = {"system": "c", "prompt": "Hi", "chosen": "a", "rejected": "b"}
    [pair], _ = data.read_preferences(write(tmp_path, row))
    assert (pair.context, pair.history) == ("c", [("user", "Hi")])
    with pytest.raises(InputError, match=r"prompt\[0\] has role 'system', .* \(system only comes first\)"):
        data.read_preferences(write(tmp_path, row | {"prompt": [{"role": "system", "content": "d"}, user("Hi")]}))
    for key, system in (("systemInstruction", parts("c")), ("system_instruction", "c")):
        [pair], lines = data.read_preferences(write(tmp_path, {key: system, "prompt": "Hi", "chosen": "a", "rejected": "b"}))
        assert pair.context == "c" and not lines


@pytest.mark.parametrize("system", [{"system": "c"}, {}])
@pytest.mark.parametrize("said", ["c", ""])
@pytest.mark.parametrize("prompt", ["Hi", None])
def test_sides_may_repeat_the_prompt_with_a_system_message_before_it(tmp_path, system, said, prompt):
    """As intel/orca_dpo_pairs has them once a chat template's author has made messages of its columns."""
    sides = {key: [{"role": "system", "content": said}, user("Hi"), model(key)] for key in ("chosen", "rejected")}
    [pair], lines = data.read_preferences(write(tmp_path, {"prompt": prompt, **system, **sides}))
    assert (pair.context, pair.history) == ("c" if system else said, [("user", "Hi")]) and not lines
    assert (pair.chosen, pair.rejected) == ([("model", "chosen")], [("model", "rejected")])


def test_keys_beside_a_pair_that_nothing_reads_are_named(tmp_path):
    row = trl() | {"messages": [user("Hi")], "content": "x"}
    _, lines = data.read_preferences(write(tmp_path, row))
    assert [line.partition(": ")[2] for line in lines][:2] == [
        "1 lines have 'content', which nothing reads: 1", "1 lines have 'messages', which nothing reads: 1"]


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_what_a_table_of_pairs_does_not_have_is_as_if_it_were_not_there(tmp_path, nothing):
    """pandas and datasets write null or NaN into every column that a row lacks."""
    row = dict.fromkeys(("system", "completions", "preferred_output", "input_text", "context"), nothing)
    texts = {"prompt": "Hi", "chosen": "Which?", "rejected": "4"}
    pairs, lines = data.read_preferences(write(
        tmp_path, row | texts, row | texts | {"chosen": nothing}, row | texts | {"rejected": nothing}))
    assert [(pair.context, pair.chosen) for pair in pairs] == [("", [("model", "Which?")])]
    assert lines[0].endswith(": 2 lines with a side that says nothing are left out: 2, 3")


def test_a_score_that_is_no_number_decides_nothing(tmp_path):
    with pytest.raises(InputError, match=f":1: {SCORES}"):
        data.read_preferences(write(tmp_path, completions((float("nan"), "a"), (0, "b"))))


@pytest.mark.parametrize("row", [
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "a", "rejected": "b"},
    {"prompt": "Hi", "chosen": "[{'role': 'assistant', 'content': 'a'}]", "rejected": "b"},
])  # fmt: skip
def test_a_transcript_in_one_text_is_named(tmp_path, row):
    _, lines = data.read_preferences(write(tmp_path, row))
    assert [line.partition(": ")[2] for line in lines] == [f"1 {data.FORMATTED}: 1"]


def test_an_action_that_stands_beside_the_messages_is_refused(tmp_path):
    row = conversation(user("a"), model("b")) | {"requires_clarification": True}
    with pytest.raises(InputError, match=":1: has requires_clarification, expected it on user turns alone"):
        read_vertex_jsonl(write(tmp_path, row))


def test_pairs_of_vertex_read_as_conversations_are_noticed(tmp_path):
    contents = [{"role": role, **parts("x")} for role in ("user", "model", "user")]
    said, _ = told(completions((1, "a"), (0, "b"), contents=contents), folder=tmp_path)
    assert "1 lines have 'completions', which nothing reads: 1" in said
    for row in ({"instruction": "a", "input": "b", "output": "c"}, {"prompt": "a", "completion": "b"}):
        with pytest.raises(InputError, match="either messages or contents$"):
            read_vertex_jsonl(write(tmp_path, row))


def test_replies_with_a_question_mark_that_the_rule_takes_for_answers_are_listed(tmp_path):
    chats = [conversation(user("a"), model(text)) for text in ("5", "За какой год? Тогда я посмотрю.", "At http://x?y=1")]
    lines = data.check_file(write(tmp_path, *chats))
    assert lines[2].endswith(": 1 replies have a question mark, but the rule takes them for answers: line.turn 2.1")


def test_a_link_to_write_to_stays_a_link(tmp_path):
    pairs, target, link = write(tmp_path, trl()), tmp_path / "pairs.jsonl", tmp_path / "link.jsonl"
    target.write_text("old")
    link.symlink_to(target)
    assert data.main(["trl_preferences", str(pairs), str(link)]) == 0
    assert link.is_symlink() and len(data.read_preferences(target)[0]) == 1


def test_pairs_with_another_instruction_are_another_dialogue(tmp_path):
    """Prompts of a dialogue are made with one instruction for all of its turns."""
    pair = data.Pair("c", [("user", "a")], ANSWER, [("model", "b")], [("model", "b?")], [("model", "b")], "b")
    later = replace(pair, messages=[("user", "a"), ("model", "b"), ("user", "d")])
    for instruction, numbers in ((pair.instruction, [1, 1]), ("Other words.", [1, 2])):
        path = tmp_path / "pairs.jsonl"
        data.write_preferences(path, [pair, replace(later, instruction=instruction)], "records")
        pairs, _ = data.read_preferences(path)
        assert [each.dialogue for each in pairs] == numbers and pairs[1].instruction == instruction
