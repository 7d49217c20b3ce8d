"""What data.py promises. All is made up here, in the published structures; the scorer's verdicts are in golden/."""

import io
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hostile import HOSTILE

import data
from data import ANSWER, CLARIFY, ACTDataset, InputError, Pair, drop_f1, read_preferences, read_vertex_jsonl

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
    """Pairs without their addresses, for comparison."""
    return [replace(pair, where="") for pair in pairs]


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
    assert read_vertex_jsonl(path) == [want | {"where": f"{path}:{number}"} for number in (1, 3, 4, 5)]


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
    assert rows == [conversation(user("a\u2028b\x85c")) | {"where": f"{path}:{number}"} for number in (3, 5)]


GOOD = json.dumps(conversation(user("Hi")))
BAD_LINES = [
    ('{"contents": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "bot", "parts": []}]}',
     "contents[1] has role 'bot', expected 'user' or 'model'"),
    (json.dumps(conversation(user("Hi"), {"role": "system", "content": "x"})),
     "messages[1] has role 'system', expected 'user' or 'model' (system only comes first)"),
    ('{"contents": [{"role": "system", "parts": [{"text": "Hi"}]}]}',
     "contents[0] has role 'system', expected 'user' or 'model' (system only comes first)"),
    (json.dumps({"systemInstruction": parts("x"), **conversation(user("Hi"), system="y")}),
     "messages[0] has role 'system', expected 'user' or 'model' (system only comes first)"),
    ('{"systemInstruction": {"parts": []}, "system_instruction": {"parts": []}, "contents": []}',
     "has systemInstruction and system_instruction, expected one of them"),
    ('{"systemInstruction": "x", "contents": []}', "systemInstruction is a string, expected an object"),
    ('{"messages": [{"role": "user", "content": null}]}', "messages[0].content is null, expected a string"),
    ('{"messages": [{"role": "user"}]}', "messages[0].content is missing"),
    ('{"messages": [{"content": "Hi"}]}', "messages[0].role is missing"),
    ('{"messages": ["Hi"]}', "messages[0] is a string, expected an object"),
    ('{"messages": [{"role": "user", "content": "Hi", "require_clarification": true}]}',
     "messages[0] has 'require_clarification', expected 'requires_clarification'"),
    ('{"messages": "Hi"}', "messages is a string, expected a list"),
    ('{"messages": []}', "messages has no user turn, expected at least one"),
    ('{"messages": [{"role": "user", "content": " \\n"}]}', "messages[0] is a user turn without text"),
    ('{"contents": [{"role": "user", "parts": []}]}', "contents[0] is a user turn without text"),
    ('{"contents": [{"role": "user", "parts": [{"text": "a"}, {"fileData": {"fileUri": "gs://x"}}]}]}',
     "contents[0].parts[1] has 'fileData', expected 'text' alone (text only is known)"),
    ('{"contents": [{"role": "user", "parts": [{}]}]}', "contents[0].parts[0].text is missing"),
    ('{"contents": [{"role": "user", "parts": [1]}]}', "contents[0].parts[0] is a number, expected an object"),
    ('{"contents": [{"role": "user"}]}', "contents[0].parts is missing"),
    ('{"messages": [{"role": "user", "content": "Hi", "requires_clarification": 1}]}',
     "messages[0].requires_clarification is a number, expected true or false"),
    (json.dumps(conversation(user("Hi"), model("a") | {"requires_clarification": True})),
     "messages[1] has requires_clarification and role 'model', expected it on user turns"),
    ("{}", "has neither messages nor contents, expected either messages or contents"),
    ('{"messages": [], "contents": []}', "has messages and contents, expected either messages or contents"),
    *[(f'{{"{key}": "x"}}', "has neither messages nor contents, expected either messages or contents "
       "(a file of pairs? then set training_config.is_preference)") for key in ("input_text", "chosen", "completions")],
    ('{"messages": [], "messages": []}', "invalid JSON: the key 'messages' stands twice in one object"),
    ("[1]", "the line is a list, expected an object"),
    ('{"messages": [', "invalid JSON at column 15: Expecting value"),
    ("[" * 100000, "invalid JSON: nested too deeply"),
    ('{"messages": [{"role": "user", "content": "\\uD83D!"}]}',
     "an escape \\ud800 to \\udfff without its other half, expected whole characters"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line_is_refused_with_file_line_and_key(tmp_path, line, message):
    path = write(tmp_path, GOOD, "", line, GOOD)
    with pytest.raises(InputError) as error:
        read_vertex_jsonl(path)
    assert str(error.value) == f"{path}:3: {message}"


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
    with pytest.raises(InputError, match=r"train\.jsonl:2: not UTF-8 \(byte 0xff\)"):
        read_vertex_jsonl(path)


def test_empty_and_missing_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"train\.jsonl: holds no conversation"):
        read_vertex_jsonl(write(tmp_path, "", " "))
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read \(No such file"):
        read_vertex_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"train\.jsonl: holds no preference pair"):
        read_preferences(write(tmp_path))


def test_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write(tmp_path, {"a": 1})
    with pytest.raises(TypeError):
        data.write_jsonl(path, [{"a": 2}, {"a": object()}])
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]
    assert list(data.read_jsonl(path)) == [(1, {"a": 1})]
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


def test_a_file_of_records_gives_back_the_pairs(source, tmp_path):
    _, pairs = source
    assert anywhere(through(tmp_path, "records", pairs)) == anywhere(pairs)
    rows = [row for _, row in data.read_jsonl(tmp_path / "records.jsonl")]
    assert all(tuple(row) == data.RECORD_KEYS and {type(value) for value in row.values()} == {str} for row in rows)


DISAGREE = {"hostile": (6, 13), "train": (0, 0), "validation": (0, 0), "test": (0, 0)}  # in TRL's, in Vertex's form


def returned(pairs, back, expected, agreed):
    """Asserts that pairs came back as expected where the rule gives their actions. Returns how many it did not give."""
    apart = 0
    for pair, found, want in zip(pairs, back, expected, strict=True):
        if not agreed(pair):  # the form has no actions, and no target
            apart += 1
            found, want = (replace(each, action="", target="") for each in (found, want))
        assert replace(found, where="") == replace(want, where="")
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
        sides = [some_messages(rng, "model") for _ in range(3)]
        action = rng.choice((CLARIFY, ANSWER))
        pair = Pair(some_text(rng), history, action, *sides, some_text(rng), instruction, f"{i}")
        record = data.make_record(pair)
        assert json.loads(json.dumps(record)) == record
        assert data.parse_record(record, f"{i}") == pair


def test_pairs_of_any_text_survive_the_other_forms(tmp_path):
    """What both can hold: texts that say something, actions as the rule sees them."""
    rng, pairs = random.Random(2), []
    while len(pairs) < 3000:
        history = [*some_messages(rng, rng.choice(("user", "model"))), ("user", some_text(rng))]
        question, answer = [("model", some_text(rng) + "?")], [("model", some_text(rng) + ".")]
        clarified = [*question, ("user", some_text(rng)), *answer]
        sides = (clarified, answer, clarified) if rng.random() < 0.5 else (answer, question, answer)
        action = CLARIFY if len(sides[0]) > 1 else ANSWER
        pair = Pair(some_text(rng), history, action, *sides, answer[0][1])
        seen = data.rule_actions([question[0][1], answer[0][1]]) == [CLARIFY, ANSWER]
        if seen and all(text.strip() for role, text in pair.history + pair.chosen if role == "user"):
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
    want = Pair(context, history, CLARIFY, gold, [("model", "1\nor 2")], gold, "1", instruction, f"{path}:1")
    other = replace(want, rejected=[("model", "a b "), ("user", "c"), ("model", "")], where=f"{path}:2")
    assert read_preferences(path) == [want, other]
    bare = data.parse_record(published(input_text="Do it.\n[conversation]\n\nUser: Q\n", gold_target="1\n"), "x:1")
    assert (bare.instruction, bare.context, bare.history, bare.target) == ("Do it.", "", [("user", "Q")], "1")


def test_messages_without_a_prefix_are_the_models():
    assert data.split_messages("Which year?") == [("model", "Which year?")]
    assert data.split_messages("One\n two\nUser: x\n") == [("model", "One\n two"), ("user", "x")]
    assert data.split_messages("\n") == [] == data.split_messages("")


def test_published_records_without_an_answer_are_skipped_and_said(tmp_path):
    said = []
    rows = [published(), published(chosen=""), published(gold_target=f"Assistant: {data.UNANSWERED}\n")]
    path = write(tmp_path, *rows)
    assert [pair.where for pair in read_preferences(path, said.append)] == [f"{path}:1"]
    assert said == [f"{path}: 2 records without an answer were skipped"]


@pytest.mark.parametrize(("change", "message"), [
    ({"rejected": None}, "rejected is null, expected a string"),
    ({"chosen": ...}, "chosen is missing"),
    ({"input_text": 3}, "input_text is a number, expected a string"),
    ({"chosen_policy": "ASK"}, "chosen_policy is 'ASK', expected 'CLARIFY' or 'ANSWER'"),
    ({"dialogue_policy": None}, "dialogue_policy is null, expected a string"),
    ({"input_text": "User: Hi\n"}, "input_text has no line '[conversation]'"),
    ({"input_text": "i\n[context]\nUser: Hi [conversation]\n"}, "input_text has no line '[conversation]'"),
    *[({"input_text": f"i\n[context]\n\n[conversation]\n{text}"},
       "input_text does not end with a line 'User: ' after '[conversation]'")
      for text in ("", "Hi\n", " User: x\n", "Hi\nUser: x\n", "User: Hi\nAssistant: yes\n", "User:\n", "\\User: x\n")],
    ({"chosen": "\n"}, "chosen does not begin with the assistant's text"),
    ({"rejected": "User: x\n"}, "rejected does not begin with the assistant's text"),
    ({"output_text": ""}, "output_text does not begin with the assistant's text"),
])  # fmt: skip
def test_broken_record_is_refused_with_file_and_line(tmp_path, change, message):
    path = write(tmp_path, published(), published(**change))
    with pytest.raises(InputError) as error:
        read_preferences(path)
    assert str(error.value) == f"{path}:2: {message}"


@pytest.mark.parametrize(("text", "asks"), [
    ("Which year?", True), ("Which year? ", True), ('He said "which year?"', True), ("(which one?)", True),
    ("**Which?**", True), ("哪一年？", True), ("أي سنة؟", True), ("Which year?" + "\n" * 99, True),
    ("Why? Because.", False), ("12", False), ("", False), ("Is it? Yes", False), ("a?b", False),
    ("Which one? 🙂", True), ("Which one do you mean? I can check both.", True), ("何名様ですか。", True),
    ("What colour?\n1. Red\n2. Blue", True), ("How does it work?\n1. Open it.", False), ("A or B? Both fit.", True),
    ("Please tell me the date.", True), ("Shall I book it?", True),
    ("It is open. Shall I book it?", False), ("It is open. Should I book two or three seats?", True),
    ("Sure! Shall I send it to your office?", True), ("Can you return it? Yes, you can.", False),
    ("Tap \"Lost your card?\" and follow the steps.", False), ("See https://a.org/b?c for which you ask", False),
    ("SELECT a FROM b WHERE c = ?", False), ("```\nask('Which?')\n```", False), ("Please give me a moment.", False),
])  # fmt: skip
def test_question_rule(text, asks):
    assert data.is_question(text) is asks


def test_question_rule_on_labelled_replies():
    """200 replies as service chats have them, half of them asking; tests/proofs/questions.py shows the wrong ones.

    One reader wrote and labelled them ("does it ask the user for what is needed to go on?") before the rule was run on
    any. Its errors on odd lines alone led to the present rule, which on even lines had then precision 1.00 and recall
    0.91; two of those errors (choices after a question) led to its last lines.
    """
    rows = [row for _, row in data.read_jsonl(HERE / "golden" / "replies.jsonl")]
    assert len(rows) == 200 and sum(row["asks"] for row in rows) == 100
    gold = [CLARIFY if row["asks"] else ANSWER for row in rows]
    found = data.action_metrics(gold, data.rule_actions([row["text"] for row in rows]))
    assert found["Binary Precision"] >= 0.98 and found["Binary Recall"] >= 0.95, found


def test_user_rule_on_labelled_questions():
    """200 that a model asked on PACIFIC: 123 for what was left open, the others not; tests/proofs/users.py has more."""
    answered = {True: [], False: []}
    for _, row in data.read_jsonl(HERE / "golden" / "asked.jsonl"):
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
                                  " " * 10**5, "```" * 10**5, "a_" * 10**5, ".*" * 10**5 + "x", "。" * 10**5])  # fmt: skip
def test_question_rule_is_quick_on_any_text(text):
    began = time.process_time()
    data.is_question(text)
    assert time.process_time() - began < 2


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


def test_clarify_turn_is_paired_with_answering_at_once():
    pairs = pairs_of(SALES | {"where": "train.jsonl:17"})
    said = [(message["role"], message["content"]) for message in SALES["messages"]]
    gold = said[2:7]
    assert len(pairs) == 4 and pairs[0] == Pair(
        "Sales and costs.\nTable follows.", said[1:2], CLARIFY, gold, [("model", "12")], gold, "12", data.INSTRUCTION,
        "train.jsonl:17", False,
    )  # fmt: skip


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
    dataset = ACTDataset([row | {"where": "x:1"}], CLARIFY, 1, action_model=classify)
    assert [pair.action for pair in dataset.prepare_datasets()] == [ANSWER, CLARIFY, ANSWER]
    assert calls == [["say which", "1"]]
    assert dataset.labelled == 2 and [address.partition(": ")[0] for address in dataset.skipped] == ["x:1"]
    assert "requires_clarification" not in row["messages"][2]  # the caller's conversations stay as they were
    assert [pair.action for pair in pairs_of(row)] == [ANSWER, ANSWER, ANSWER], "by rule"


@pytest.mark.parametrize("cut", [
    conversation(user("early", False), model("ok"), user("Q", True)),
    conversation(user("early", False), model("ok"), user("Q", True), model("Which?")),
    conversation(user("early", False), model("ok"), user("Q", True), model(" "), user("r", False), model("x")),
])  # fmt: skip
def test_turn_whose_target_is_missing_is_skipped_and_named_but_stays_in_the_history(cut):
    dataset = ACTDataset([STAFF, cut | {"where": "chats.jsonl:8"}], CLARIFY, 1)
    pairs = dataset.prepare_datasets()[3:]
    assert dataset.skipped == ["chats.jsonl:8: user turn 2"]
    assert all(pair.history[-1] != ("user", "Q") for pair in pairs)
    assert len(pairs) == 1 or ("user", "Q") in pairs[-1].history
    dataset.prepare_datasets()
    assert len(dataset.skipped) == 1, "not added up"


def test_clarify_turn_that_ends_after_the_users_reply_is_skipped_with_it():
    dataset = ACTDataset([conversation(user("Q", True), model("Which?"), user("r", False)), STAFF], CLARIFY, 1)
    assert len(dataset.prepare_datasets()) == 3
    assert dataset.skipped == ["conversation 1: user turn 1", "conversation 1: user turn 2"]


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


@pytest.mark.parametrize("answer", ["b", data.FALLBACK_QUESTION])
def test_data_without_any_question_get_a_fixed_one(answer):
    assert pairs_of(conversation(user("a", False), model(answer)))[0].rejected == [("model", data.FALLBACK_QUESTION)]


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
    {"target_label": ANSWER}, {"target_label": "clarify"}, {"icl_examples": -1}, {"icl_examples": True},
    {"icl_examples": 1.5}, {"class_balance": {"ASK": 1}}, {"class_balance": {CLARIFY: -1}},
    {"class_balance": {CLARIFY: "2"}}, {"class_balance": {CLARIFY: math.nan}}, {"class_balance": {CLARIFY: True}},
    {"class_balance": [1]},
])  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        ACTDataset(**{"dataset": [SALES], "target_label": CLARIFY, "icl_examples": 1} | options)


def test_dialogues_groups_consecutive_turns_of_one_conversation():
    pairs = pairs_of(SALES, STAFF, SALES)
    assert data.dialogues(pairs) == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10]]
    assert data.dialogues([pairs[0], pairs[0], pairs[3], pairs[4]]) == [[0, 1, 2], [3]]
    assert data.dialogues([]) == []


# ----------------------------------------------------------------------------------------------------------------------
# Files of pairs


def test_pairs_of_a_file_are_only_balanced():
    pairs = pairs_of(SALES, STAFF)
    assert pairs_of(*pairs, is_preference=True) == pairs
    assert len(pairs_of(*pairs, is_preference=True, class_balance={CLARIFY: 3})) == 9 + 4


def test_vertex_preference_line_is_as_documented(tmp_path):
    pairs = pairs_of(SALES, preference_model=lambda requests: ["Which ones?"] * len(requests))
    data.write_preferences(tmp_path / "v.jsonl", pairs, "vertex")
    (_, first), (_, second) = list(data.read_jsonl(tmp_path / "v.jsonl"))[:2]
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
    assert read_preferences(path) == [Pair("", [("user", "Hi")], ANSWER, *sides, "Four", where=f"{path}:1")]


def trl(prompt=None, chosen=None, rejected=None, **changes):
    def assistant(text):
        return [{"role": "assistant", "content": text}]

    row = {"prompt": prompt or [user("Hi")], "chosen": chosen or assistant("Which?")}
    row["rejected"] = rejected or assistant("4")
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


SCORES = "expected 1 for one completion and 0 for the other"
BAD_PAIRS = [
    (completions((1, "a")), "completions has 1 entries, expected 2"),
    (completions((1, "a"), (1, "b")), f"completions[1].score is 1, {SCORES}"),
    (completions((1, "a"), (0, "b"), (0, "c")), f"completions[2].score is 0, {SCORES}"),
    (completions((0.5, "a"), (1, "b")), f"completions[0].score is 0.5, {SCORES}"),
    (completions((True, "a"), (0, "b")), "completions[0].score is true or false, expected a number"),
    (completions((1, ""), (0, "b")),
     "completions[0].completion has role 'model' and text '', expected a text by 'model'"),
    (completions((1, "a"), (0, "b"), contents=[{"role": role, **parts("x")} for role in ("user", "model")]),
     "the conversation ends with role 'model', expected 'user'"),
    (completions((1, "a")) | {"completions": {}}, "completions is an object, expected a list"),
    (completions((1, "a")) | {"completions": [{"score": 1}]}, "completions[0].completion is missing"),
    (completions((1, "a")) | {"contents": ...},
     "has neither messages nor contents, expected either messages or contents"),
    (trl(prompt="Hi"), "prompt is a string, expected a list"),
    (trl(chosen=...), "chosen is missing"),
    (trl(rejected=None) | {"rejected": None}, "rejected is null, expected a list"),
    (trl() | {"chosen": []}, "chosen does not begin with a text by 'assistant'"),
    (trl(chosen=[user("x")]), "chosen does not begin with a text by 'assistant'"),
    (trl(rejected=[model(" ")]), "rejected does not begin with a text by 'assistant'"),
    (trl() | {"prompt": []}, "prompt does not begin with a text by 'assistant'"),
    (trl(prompt=[user("x"), model("y")]), "the conversation ends with role 'model', expected 'user'"),
    (trl(prompt=[{"role": "system", "content": "x"}]), "the conversation ends with role 'system', expected 'user'"),
    (trl(prompt=[user("x"), {"role": "system", "content": "x"}]),
     "prompt[1] has role 'system', expected 'user' or 'model' (system only comes first)"),
    (trl(chosen=[{"role": "system", "content": "x"}]),
     "chosen[0] has role 'system', expected 'user' or 'model' (system only comes first)"),
    (trl(chosen=[{"role": "assistant"}]), "chosen[0].content is missing"),
    ({"a": 1}, "input_text is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS)
def test_broken_pair_is_refused_with_file_and_line(tmp_path, row, message):
    path = write(tmp_path, trl(), {key: value for key, value in row.items() if value is not ...})
    with pytest.raises(InputError) as error:
        read_preferences(path)
    assert str(error.value) == f"{path}:2: {message}"


# ----------------------------------------------------------------------------------------------------------------------
# Datasets of a configuration


@pytest.fixture
def configured():
    """What get_datasets_from_config reads of a configuration; task dpo."""

    def make(train, validation="", task="dpo", split=0.0, **changes):
        fields = {"icl_examples": 1, "class_balance": None, "is_preference": False, "seed": 0, "action_labels": "gold"}
        files = SimpleNamespace(train_path=str(train), validation_path=str(validation), validation_split=split)
        return SimpleNamespace(task=task, data_config=files, training_config=SimpleNamespace(**{**fields, **changes}))

    return make


def test_config_gives_training_and_validation_pairs(tmp_path, configured):
    path, said = write(tmp_path, SALES, conversation(user("alone", False)), STAFF), []
    config = configured(path, path, class_balance={CLARIFY: 3})
    train, validation = data.get_datasets_from_config(config, report=said.append)
    assert (len(train), len(validation)) == (13, 7)  # only the training pairs are balanced
    assert [pair.where for pair in validation] == [f"{path}:1"] * 4 + [f"{path}:3"] * 3
    assert said == [f"{path}: 1 user turns are skipped, the conversation ends before an answer: 2.1"] * 2
    data.write_preferences(tmp_path / "p.jsonl", validation, "records")
    none, again = data.get_datasets_from_config(configured("", tmp_path / "p.jsonl", is_preference=True))
    assert none == [] and anywhere(again) == anywhere(validation)


def test_what_is_skipped_and_labelled_is_said_in_one_line_each(tmp_path, configured):
    path, said = write(tmp_path, *[conversation(user("alone"))] * 12, conversation(user("a"), model("b"))), []
    data.get_datasets_from_config(configured(path), report=said.append)
    assert said == [
        f"{path}: the action classifier labelled 1 turns",
        f"{path}: 12 user turns are skipped, the conversation ends before an answer: "
        "1.1, 2.1, 3.1, 4.1, 5.1, 6.1, 7.1, 8.1, 9.1, 10.1 ... and 2 more",
    ]
    said.clear()
    path = write(tmp_path, SALES, conversation(user("hm", True), model("Which?"), user("x", False), model("y")))
    data.get_datasets_from_config(configured(path, path), report=said.append)
    assert said == [], "only what is wrong is said"


@pytest.mark.parametrize(("messages", "turns", "why"), [
    ([user("a", False)], ["1.1"], "the conversation ends before an answer"),
    ([user("a", True), model("b?")], ["1.1"], "the conversation ends before an answer"),
    ([user("a", True), model("b?"), user("c", False)], ["1.1", "1.2"], "the conversation ends before an answer"),
    ([user("a", False), user("b", False), model("c")], ["1.1"], "another user turn follows"),
    ([user("a", True), model("b?"), user("c", False), model(" ")], ["1.1", "1.2"], "an empty reply follows"),
    ([user("a", True), model("b?"), model("c"), user("d", False), model("e")], ["1.1"], "two replies follow one another"),
])  # fmt: skip
def test_why_a_turn_is_skipped_is_said(tmp_path, configured, messages, turns, why):
    path, said = write(tmp_path, conversation(*messages)), []
    data.get_datasets_from_config(configured(path), report=said.append)
    assert said == [f"{path}: {len(turns)} user turns are skipped, {why}: {', '.join(turns)}"]


def test_labels_that_the_classifier_contradicts_are_named(tmp_path, configured):
    """Also in files that are fully labelled; from a tenth of the turns on it is said what that means."""
    right = [conversation(user("a", False), model("b"), user("c", False), model("d"))] * 9
    odd = conversation(user("a", True), model("Tell me."), user("b", False), model("Which?"), system="x")
    path, said = write(tmp_path, *right, odd), []
    data.get_datasets_from_config(configured(path), report=said.append)
    listed = [
        f"{path}: 1 user turns are labelled CLARIFY, but the classifier says ANSWER: 10.1",
        f"{path}: 1 user turns are labelled ANSWER, but the classifier says CLARIFY: 10.2",
    ]
    assert said == listed, "2 of 20 are not more than a tenth"
    path = write(tmp_path, *right[1:], odd)
    said.clear()
    data.get_datasets_from_config(configured(path, is_preference=False), report=said.append)
    assert [line.replace("9.", "10.") for line in said[:2]] == listed and len(said) == 3
    for part in (f"{path}: labels and classifier disagree in 11% of turns", "training_config.action_labels",
                 "action_model_config", "can hardly win"):  # fmt: skip
        assert part in said[2]
    said.clear()
    data.get_datasets_from_config(configured(path), report=said.append, compare=False)
    assert said == [], "a model that classifies is not asked"
    data.get_datasets_from_config(configured(path, action_labels="classifier"), report=said.append)
    assert said[0] == f"{path}: the action classifier labelled 18 turns" and "are labelled" not in "".join(said)


def test_keys_that_nothing_reads_are_named(tmp_path, configured):
    row = {"contents": [{"role": "user", "parts": [{"text": "a"}], "mood": 1}, {"role": "model", "parts": [{"text": "b"}]}]}
    path, said = write(tmp_path, row, conversation(user("a"), model("b")), row | {"id": 3}), []
    data.get_datasets_from_config(configured(path), report=said.append)
    assert said[1:] == [f"{path}: 'mood' is not read: lines 1, 3", f"{path}: 'id' is not read: lines 3"]
    said.clear()
    data.get_datasets_from_config(configured(path, split=0.4), report=said.append)
    told = [line for line in said if line.startswith(f"{path}: 'mood'")]
    assert sum(line.count(",") + 1 for line in told) == 2, "each line once, whichever part it went to"


@pytest.mark.parametrize(("task", "asked"), [
    ("act", 1), ("dpo", 1), ("sft", 0), ("evaluate", 0), ("generate_preference", 2)])  # fmt: skip
def test_losing_questions_are_asked_for_only_where_they_are_used(tmp_path, configured, task, asked):
    path, calls = write(tmp_path, SALES, STAFF), []

    def preference(requests):
        calls.append(len(requests))
        return ["So?"] * len(requests)

    train, validation = data.get_datasets_from_config(configured(path, path, task), preference, report=calls.append)
    assert calls == [4] * asked and len(validation) == 7 and len(train) == (0 if task == "evaluate" else 7)


def test_a_share_of_the_conversations_is_held_out_where_there_is_no_validation_file(tmp_path, configured):
    odd = [conversation(user(f"q{i}", True), model("which?"), user("x", False), model(f"y{i}")) for i in range(20)]
    path, said = write(tmp_path, *odd), []
    train, held = data.get_datasets_from_config(configured(path, split=0.25), report=said.append)
    assert (len(train), len(held)) == (30, 10) and any("5 of 20 are held out" in line for line in said)
    names = [{pair.history[0][1] for pair in pairs} for pairs in (train, held)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 20, "whole conversations"
    assert data.get_datasets_from_config(configured(path, split=0.25), report=said.append) == (train, held)
    evaluated = data.get_datasets_from_config(configured(path, task="evaluate", split=0.25), report=said.append)
    assert evaluated == ([], held), "the same part again, without the rest"
    other = data.get_datasets_from_config(configured(path, split=0.25, seed=1), report=said.append)[1]
    assert {pair.history[0][1] for pair in other} != names[1]
    both = data.get_datasets_from_config(configured(path, path, split=0.25), report=said.append)
    assert [len(pairs) for pairs in both] == [40, 40], "a file of its own comes first"
    data.write_preferences(tmp_path / "p.jsonl", train + held, "records")
    again = data.get_datasets_from_config(configured(tmp_path / "p.jsonl", split=0.25, is_preference=True), report=said.append)
    assert sorted(map(len, again)) == [10, 30] and all(len(group) == 2 for group in data.dialogues(again[1]))


def test_training_actions_come_from_the_file_the_classifier_or_a_coin(tmp_path, configured):
    """Labels contradict the classifier, which takes every reply with a question mark at its end for a question."""
    odd = [conversation(user(f"sales {i}", False), model("Which year?"), user("2010"), model("5")) for i in range(30)]
    path, said = write(tmp_path, SALES, *odd), []

    def load(**changes):
        return data.get_datasets_from_config(configured(path, path, **changes), report=said.append)

    gold, validation = load()
    assert gold == validation and sum(pair.action == CLARIFY for pair in gold) == 2
    classified, unchanged = load(action_labels="classifier")
    assert unchanged == validation and sum(pair.action == CLARIFY for pair in classified) == 32
    assert all([pair.action] == data.rule_actions([pair.gold[0][1]]) for pair in classified)
    coined, unchanged = load(action_labels="random")
    assert unchanged == validation and coined == load(action_labels="random")[0]
    swapped = [a.action != b.action for a, b in zip(coined, gold, strict=True)]
    assert 0.25 < sum(swapped) / len(swapped) < 0.75
    for swap, a, b in zip(swapped, coined, gold, strict=True):
        other = replace(b, action=data.OTHER[b.action], chosen=b.rejected, rejected=b.chosen)
        assert a == (other if swap else b)
    assert coined != load(action_labels="random", seed=1)[0]


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
    assert data.convert_pacific(pacific()) == conversation(
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
    assert data.convert_abg_coqa(abg()) == conversation(*history, *asked, system=system)
    plain = conversation(*history, user("Who?", False), model("Ann"), system=system)
    assert data.convert_abg_coqa(abg("non_ambiguous")) == plain


def run(*arguments):
    command = [sys.executable, HERE.parent / "data.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line_converts_and_counts(tmp_path):
    source, target = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps([pacific()]))
    done = run("pacific", source, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{target}: 1 conversations, 4 user turns, 1 CLARIFY turns\n"
    assert read_vertex_jsonl(target) == [data.convert_pacific(pacific()) | {"where": f"{target}:1"}]
    source.write_text(json.dumps({"data": [abg(), abg("non_ambiguous")]}))
    assert run("abg_coqa", source, target).stdout == f"{target}: 2 conversations, 5 user turns, 1 CLARIFY turns\n"
    assert [len(row["messages"]) for row in read_vertex_jsonl(target)] == [7, 5]


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
    ("pacific", {"data": []}, f"item 0 {UNLIKE_PACIFIC} (TypeError: "),
    ("pacific", [3], f"item 0 {UNLIKE_PACIFIC} (TypeError: "),
    ("pacific", 3, f"the file {UNLIKE_PACIFIC} (TypeError: "),
    ("pacific", [pacific(req_clari="no")], "item 0: messages[1].requires_clarification is a string, expected "),
    ("pacific", [pacific(question=" ")], "item 0: messages[1] is a user turn without text"),
    ("pacific", [pacific() | {"questions": []}], "item 0: messages has no user turn, expected at least one"),
    ("abg_coqa", [], f"the file {UNLIKE_ABG} (TypeError: "),
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
    assert capsys.readouterr().err == f"data.py: error: {path}:1: holds a conversation, expected a pair: is_preference is set\n"


def test_command_line_names_the_line_of_broken_json(tmp_path):
    source = tmp_path / "in.json"
    source.write_text('[\n{"paragraphs": \n]')
    done = run("pacific", source, tmp_path / "out.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"data.py: error: {source}:3: invalid JSON at column 1: Expecting value\n"
    source.write_bytes(b'[\n\n"\xe9"]')
    message = f"{source}:3: not UTF-8 (byte 0xe9), expected JSON in UTF-8"
    assert run("pacific", source, tmp_path / "out.jsonl").stderr == f"data.py: error: {message}\n"
    missing = run("pacific", tmp_path / "none", "x").stderr
    assert missing == f"data.py: error: {tmp_path}/none: cannot be read (No such file or directory)\n"


def test_command_line_checks_a_file(tmp_path, capsys):
    path = write(tmp_path, SALES, conversation(user("a"), model("Please tell me the date.")), conversation(user("b")))
    assert data.main(["check", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 3 conversations, 6 user turns: 2 CLARIFY, 2 ANSWER, 2 skipped",
        f"{path}: the action classifier labelled 1 turns",
        f"{path}: 2 user turns are skipped, the conversation ends before an answer: 2.1, 3.1",
    ]
    typo = {"role": "user", "content": "a", "require_clarification": True}
    assert data.main(["check", str(write(tmp_path, SALES, conversation(typo), "{"))]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "messages[0] has 'require_clarification', expected 'requires_clarification'" in first and f"{path}:3: " in second


def test_command_line_checks_lengths_with_a_config(tmp_path, capsys):
    """The tiny world's own: its tokenizer, and room for 448 tokens of prompt, 512 in all."""
    long = "sales " * 500
    path = write(tmp_path, SALES, conversation(user(long, False), model("5"), user("And?", False), model("6")),
                 conversation(user("a", False), model(long)), *(conversation(user("a", False), model("sales " * n)) for n in (16, 15)))  # fmt: skip
    assert data.main(["check", str(path), "--config", "tiny.json"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and said[0].endswith("9 user turns: 2 CLARIFY, 7 ANSWER, 0 skipped")
    assert re.fullmatch(rf"{path}: 2 prompts lose \d\d to 5\d\d tokens to max_prompt_length 448: 2\.1, 2\.2", said[1])
    assert said[2] == f"{path}: 1 turns whose reply does not fit into max_length 512 are left out: 3.1"
    assert said[3] == f"{path}: 1 turns have gold replies longer than max_new_tokens 16: 4.1"


def test_an_array_is_not_json_lines(tmp_path):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([conversation(user("a"), model("b"))], indent=1))
    with pytest.raises(InputError) as error:
        read_vertex_jsonl(path)
    assert str(error.value) == f"{path}: begins with '[', expected JSON Lines, an object a line (jq -c '.[]' makes them)"


def test_command_line_checks_labels_with_the_classifier_of_a_config(tmp_path, capsys, monkeypatch):
    """Who plays the user is not asked for, and needs no key."""
    import act

    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    config = json.loads((TINY.parent / "tiny.json").read_text(encoding="utf-8"))
    config |= {"user_simulator_config": {"model_id": "g"}}
    (tmp_path / "run.json").write_text(json.dumps(config))
    path = write(tmp_path, SALES)
    assert data.main(["check", str(path), "--config", str(tmp_path / "run.json")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    helpers = act.Helpers(lambda replies: [CLARIFY] * len(replies), None, None, None)
    monkeypatch.setattr(act, "build_helpers", lambda config: helpers)
    assert data.main(["check", str(path), "--config", str(tmp_path / "run.json")]) == 0
    said = capsys.readouterr().out
    assert f"{path}: 2 user turns are labelled ANSWER, but the classifier says CLARIFY: 1.3, 1.4\n" in said

    def gone(replies):
        raise act.HelperError("the server is gone")

    monkeypatch.setattr(act, "build_helpers", lambda config: replace(helpers, classify_actions=gone))
    assert data.main(["check", str(path), "--config", str(tmp_path / "run.json")]) == 2
    assert capsys.readouterr().err == "data.py: error: the server is gone\n"


def test_a_program_that_checks_with_a_bad_config_says_so_in_one_line(tmp_path):
    """data.py is then a program and what act.py imports: its errors must stay one class."""
    done = run("check", write(tmp_path, SALES), "--config", tmp_path / "none.json")
    assert done.returncode == 2 and done.stderr.startswith(f"data.py: error: {tmp_path / 'none.json'}: cannot be read")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [
    ["check", "a", "b"], ["pacific", "a"], ["spider", "a", "b"], ["pacific", "a", "b", "c"],
    ["pacific", "a", "b", "--config", "c"]])  # fmt: skip
def test_command_line_refuses_a_wrong_number_of_files(capsys, words):
    with pytest.raises(SystemExit) as ended:
        data.main(words)
    assert ended.value.code == 2 and "expected check FILE [--config CONFIG], spider IN" in capsys.readouterr().err


def test_a_dataset_has_a_length_and_its_pairs():
    """Made once, when first asked for, or by prepare_datasets."""
    made = []
    rows = data.read_vertex_jsonl(TINY / "test.jsonl")[:5]
    dataset = data.ACTDataset(rows, CLARIFY, 2, lambda requests: made.append(1) or data.rule_questions(requests))
    assert len(dataset) == len(list(dataset)) > 5 and dataset[0].action in (CLARIFY, ANSWER) and made == [1]
    assert dataset.prepare_datasets() == list(dataset) and made == [1, 1]


@pytest.mark.parametrize(("reply", "asks"), [
    ("You're welcome 😊 Anything else I can do for you?", False), ("Is there anything else?", False),
    ("他に何かございますか？", False), ("Let me know your order number.", True), ("Let me know if it works.", False),
    ("I'd need your customer number to look that up.", True), ("Sure, just send me a photo of the tyre.", True),
    ("We will send you a photo.", False),
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


def test_pairs_that_teach_nothing_or_contradict_each_other_are_counted(tmp_path):
    pairs = data.ACTDataset(data.read_vertex_jsonl(write(tmp_path, SALES, STAFF)), CLARIFY, 1).prepare_datasets()
    path, said = tmp_path / "pairs.jsonl", []
    data.write_preferences(path, pairs, "records")
    data.read_preferences(path, said.append)
    assert said == []
    turned = [replace(pairs[0], chosen=pairs[0].rejected, rejected=pairs[0].chosen), replace(pairs[1], rejected=pairs[1].chosen)]
    data.write_preferences(path, pairs + turned, "trl")
    data.read_preferences(path, said.append)
    assert said[:2] == [f"{path}: 1 pairs have two equal sides, which teach nothing",
                        f"{path}: 2 pairs reject what another pair of the same turn prefers"]  # fmt: skip
