"""What data.py promises. Everything is made up here, in the published structures; the scorer's verdicts are in golden/."""

import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
from data import ANSWER, CLARIFY, ACTDataset, InputError, drop_f1, read_preferences, read_vertex_jsonl

HERE = Path(__file__).resolve().parent


def write(tmp_path, *lines, name="train.jsonl"):
    path = tmp_path / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def user(text, clarify=None):
    return {"role": "user", "content": text} | ({} if clarify is None else {"requires_clarification": clarify})


def model(text):
    return {"role": "model", "content": text}


def conversation(*messages, system=None):
    return {"messages": ([] if system is None else [{"role": "system", "content": system}]) + list(messages)}


SALES = conversation(
    user("What were sales?", True), model("Which year?"), user("2019", True), model("Net or gross?"), user("Net", False), model("12"),
    user("And costs?", False), model("7"), system="Sales and costs.\nTable follows.")
STAFF = conversation(
    user("How many staff?", True), model("In which country?"), user("Peru", False), model("40"), user("Thanks", False), model("Welcome."))
HEAD = f"{data.INSTRUCTION}\n[context]\nSales and costs.\nTable follows.\n[conversation]\n"


# --- Vertex JSONL

def test_both_vertex_forms_give_the_same_conversation(tmp_path):
    parts = lambda *texts: {"parts": [{"text": text} for text in texts]}  # noqa: E731
    contents = [{"role": "user"} | parts("How ", "many?") | {"requires_clarification": True}, {"role": "model"} | parts("4")]
    want = [conversation(user("How many?", True), model("4"), system="ctx")]
    assert read_vertex_jsonl(write(tmp_path, want[0])) == want
    for key in ("systemInstruction", "system_instruction"):
        assert read_vertex_jsonl(write(tmp_path, {key: parts("c", "tx"), "contents": contents})) == want
    assistant = conversation(user("How many?", True), {"role": "assistant", "content": "4"}, system="ctx")
    assert read_vertex_jsonl(write(tmp_path, assistant)) == want


def test_reader_takes_bom_blank_lines_crlf_and_line_separators_inside_text(tmp_path):
    path = tmp_path / "train.jsonl"
    line = json.dumps(conversation(user("a\u2028b\x85c")), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf\r\n\n" + line.encode() + b"\r\n  \n" + line.encode().replace(b": ", b":\r"))
    assert read_vertex_jsonl(path) == [conversation(user("a\u2028b\x85c"))] * 2


GOOD = json.dumps(conversation(user("Hi")))
BAD_LINES = [
    ('{"contents": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "bot", "parts": []}]}',
     "contents[1] has role 'bot', expected 'user' or 'model'"),
    (json.dumps(conversation(user("Hi"), {"role": "system", "content": "x"})),
     "messages[1] has role 'system', expected 'user' or 'model' (system only comes first)"),
    ('{"contents": [{"role": "system", "parts": [{"text": "Hi"}]}]}',
     "contents[0] has role 'system', expected 'user' or 'model' (system only comes first)"),
    ('{"messages": [{"role": "user", "content": null}]}', "messages[0].content is null, expected a string"),
    ('{"messages": [{"role": "user"}]}', "messages[0].content is missing"),
    ('{"messages": [{"content": "Hi"}]}', "messages[0].role is missing"),
    ('{"messages": ["Hi"]}', "messages[0] is a string, expected an object"),
    ('{"messages": "Hi"}', "messages is a string, expected a list"),
    ('{"messages": []}', "messages has no user turn, expected at least one"),
    ('{"messages": [{"role": "user", "content": " \\n"}]}', "messages[0] is a user turn without text"),
    ('{"contents": [{"role": "user", "parts": []}]}', "contents[0] is a user turn without text"),
    ('{"contents": [{"role": "user", "parts": [{"text": "a"}, {"fileData": {"fileUri": "gs://x"}}]}]}',
     "contents[0].parts[1] has 'fileData', expected 'text' alone (only text is supported)"),
    ('{"contents": [{"role": "user", "parts": [{}]}]}', "contents[0].parts[0].text is missing"),
    ('{"messages": [{"role": "user", "content": "Hi", "requires_clarification": 1}]}',
     "messages[0].requires_clarification is a number, expected true or false"),
    ('{"messages": [{"role": "user", "content": "Hi"}, {"role": "model", "content": "a", "requires_clarification": true}]}',
     "messages[1] has requires_clarification and role 'model', expected it on user turns only"),
    ("{}", "has neither messages nor contents, expected either messages or contents"),
    ('{"messages": [], "contents": []}', "has messages and contents, expected either messages or contents"),
    ('{"input_text": "x"}', "has neither messages nor contents, expected either messages or contents "
                            "(a preference file? then set training_config.is_preference)"),
    ('{"messages": [], "messages": []}', "invalid JSON: the key 'messages' stands twice in one object"),
    ("[1]", "the line is a list, expected an object"),
    ('{"messages": [', "invalid JSON at column 15: Expecting value"),
    ("[" * 100000, "invalid JSON: nested too deeply"),
    ('{"messages": [{"role": "user", "content": "\\uD83D!"}]}',
     "an escape \\ud800 to \\udfff without its other half, expected whole characters"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line_is_refused_with_file_line_and_key(tmp_path, line, message):
    path = write(tmp_path, GOOD, "", line, GOOD)
    with pytest.raises(InputError) as error:
        read_vertex_jsonl(path)
    text = str(error.value).removeprefix(f"{path}:3: ")
    assert text == message


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
    with pytest.raises(InputError, match=r"train\.jsonl: holds no preference record"):
        read_preferences(write(tmp_path))


def test_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write(tmp_path, {"a": 1})
    with pytest.raises(TypeError):
        data.write_jsonl(path, [{"a": 2}, {"a": object()}])
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]
    assert list(data.read_jsonl(path)) == [(1, {"a": 1})]
    data.write_jsonl(path, [{"a": "é\u2028"}])
    assert path.read_text(encoding="utf-8") == '{"a": "é\u2028"}\n'


# --- Text format

def test_prompt_text_is_as_documented():
    text = data.format_prompt("line 1\nline 2", [("user", " Hi\n\n there "), ("model", "Yes?\r\n"), ("user", "No")])
    assert text == f"{data.INSTRUCTION}\n[context]\nline 1\nline 2\n[conversation]\nUser: Hi there\nAssistant: Yes?\nUser: No\n"
    assert data.format_reply([("model", "Which?"), ("user", "2"), ("model", "4")]) == "Assistant: Which?\nUser: 2\nAssistant: 4\n"


def test_splitting_is_the_inverse_of_formatting():
    rng = random.Random(0)
    lines = ["", "User: x", "Assistant: y", "[context]", "[conversation]", "[data]", "a b", " : | ", "\u2028", data.INSTRUCTION]
    words = ["", "User:", "Assistant: ", "User: hi", "[conversation]", "a  b", "c\u2028d", "?", ":", "[context]"]
    for _ in range(2000):
        context = "\n".join(rng.choices(lines, k=rng.randrange(5)))
        texts = [data.fold(" ".join(rng.choices(words, k=rng.randrange(4)))) for _ in range(rng.randrange(1, 5))]
        messages = list(zip(itertools.cycle(("user", "model")), texts, strict=False))
        assert data.split_dialogue(data.format_prompt(context, messages)) == (data.INSTRUCTION, context, messages)
        assert data.split_reply(data.format_reply(messages)) == messages


def test_texts_of_the_published_research_code_can_be_split():
    # its instruction, its PACIFIC context with [data], a reply whose line break was kept, a reply without prefix
    text = "You are an Assistant.\nBe brief.\n\n[context]\nparagraph\n[data]\nrow : 1 | 2\n\n[conversation]\n"
    text += "User: Q\nAssistant: one\ntwo\nUser: R\n"
    assert data.split_dialogue(text) == (
        "You are an Assistant.\nBe brief.\n", "paragraph\n[data]\nrow : 1 | 2\n", [("user", "Q"), ("model", "one two"), ("user", "R")])
    assert data.split_reply("Which year?") == [("model", "Which year?")]
    assert data.split_reply("One\n two\nUser: x\n") == [("model", "One two"), ("user", "x")]
    assert data.first_reply("User: x\nAssistant: y\nAssistant: z") == "y"
    assert data.split_reply("\n") == [] and data.first_reply("User: x") == ""


def test_dialogue_without_conversation_line_is_refused():
    with pytest.raises(InputError, match=r"no line '\[conversation\]'"):
        data.split_dialogue("Do this.\n[context]\nUser: Hi\n")
    with pytest.raises(InputError, match="neither 'User: ' nor 'Assistant: '"):
        data.split_dialogue("Do this.\n[context]\n\n[conversation]\nHi\n")


@pytest.mark.parametrize(("text", "asks"), [
    ("Which year?", True), ("Which year? ", True), ('He said "which year?"', True), ("(which one?)", True), ("**Which?**", True),
    ("哪一年？", True), ("أي سنة؟", True), ("Which year?" + "\n" * 99, True), ("Why? Because.", False), ("12", False), ("", False),
    ("Is it? Yes", False), ("a?b", False)])
def test_question_rule_looks_at_the_end_of_the_last_sentence(text, asks):
    assert data.is_question(text) is asks


# --- Pairs

def test_clarify_turn_is_paired_with_answering_at_once():
    records = ACTDataset([SALES], CLARIFY, 1).prepare_datasets()
    assert len(records) == 4
    chosen = "Assistant: Which year?\nUser: 2019\nAssistant: Net or gross?\nUser: Net\nAssistant: 12\n"
    prompt = f"{HEAD}User: What were sales?\n"
    assert records[0] == {
        "input_text": prompt, "output_text": chosen, "dialogue_policy": CLARIFY, "gold_target": "Assistant: 12\n",
        "gold_trajectory": prompt + chosen, "chosen_policy": CLARIFY, "rejected_policy": ANSWER,
        "chosen": chosen, "rejected": "Assistant: 12\n"}


def test_history_holds_every_message_once():
    records = ACTDataset([SALES], CLARIFY, 1).prepare_datasets()
    history = "User: What were sales?\nAssistant: Which year?\nUser: 2019\nAssistant: Net or gross?\nUser: Net\nAssistant: 12\n"
    assert records[3]["input_text"] == f"{HEAD}{history}User: And costs?\n"
    assert records[1]["chosen"] == "Assistant: Net or gross?\nUser: Net\nAssistant: 12\n"
    assert [r["dialogue_policy"] for r in records] == [CLARIFY, CLARIFY, ANSWER, ANSWER]


def test_answer_turn_is_paired_with_a_question_of_another_dialogue():
    records = ACTDataset([SALES, STAFF], CLARIFY, 1).prepare_datasets()
    answer = records[3]
    assert (answer["chosen"], answer["output_text"], answer["gold_target"]) == ("Assistant: 7\n",) * 3
    assert (answer["chosen_policy"], answer["rejected_policy"], answer["dialogue_policy"]) == (ANSWER, CLARIFY, ANSWER)
    assert answer["rejected"] == "Assistant: In which country?\n"
    assert answer["gold_trajectory"] == answer["input_text"] + "Assistant: 7\n"
    assert {r["rejected"] for r in records[5:]} <= {"Assistant: Which year?\n", "Assistant: Net or gross?\n"}


def test_whether_a_reply_asks_comes_from_the_label_not_from_its_text():
    row = conversation(user("How big?", True), model("Tell me which"), user("Lima", False), model("Ten, right?"))
    record = ACTDataset([row], CLARIFY, 1).prepare_datasets()[0]
    assert record["chosen"] == "Assistant: Tell me which\nUser: Lima\nAssistant: Ten, right?\n"
    assert record["rejected"] == "Assistant: Ten, right?\n"


def test_missing_labels_are_filled_by_one_call_and_given_ones_are_kept():
    calls = []

    def classify(replies):
        calls.append(replies)
        return [CLARIFY if "which" in reply else ANSWER for reply in replies]

    row = conversation(user("a", False), model("which now?"), user("b"), model("say which"), user("c"), model("1"), user("d"))
    dataset = ACTDataset([row], CLARIFY, 1, action_model=classify)
    records = dataset.prepare_datasets()
    assert calls == [["say which", "1"]]
    assert [r["dialogue_policy"] for r in records] == [ANSWER, CLARIFY, ANSWER]
    assert (dataset.labelled, dataset.skipped) == (2, 1)
    assert "requires_clarification" not in row["messages"][2]  # the caller's conversations stay as they were
    by_rule = ACTDataset([row], CLARIFY, 1)
    assert [r["dialogue_policy"] for r in by_rule.prepare_datasets()] == [ANSWER, ANSWER, ANSWER]


@pytest.mark.parametrize("cut", [
    conversation(user("early", False), model("ok"), user("Q", True)),
    conversation(user("early", False), model("ok"), user("Q", True), model("Which?")),
    conversation(user("early", False), model("ok"), user("Q", True), model(" "), user("r", False), model("x"))])
def test_turn_whose_target_is_missing_is_skipped_and_counted_but_stays_in_the_history(cut):
    dataset = ACTDataset([cut], CLARIFY, 1)
    records = dataset.prepare_datasets()
    assert dataset.skipped == 1
    assert all(not r["input_text"].endswith("User: Q\n") for r in records)
    assert len(records) == 1 or "User: Q\n" in records[-1]["input_text"]


def test_clarify_turn_that_ends_after_the_users_reply_is_skipped_with_it():
    dataset = ACTDataset([conversation(user("Q", True), model("Which?"), user("r", False)), STAFF], CLARIFY, 1)
    records = dataset.prepare_datasets()
    assert (len(records), dataset.skipped) == (3, 2)


def test_preference_model_sees_shots_of_other_dialogues_and_the_prompt():
    seen = []

    def preference(requests):
        seen.extend(requests)
        return ["Really which?"] * len(requests)

    records = ACTDataset([SALES, STAFF], CLARIFY, 3, preference_model=preference).prepare_datasets()
    assert [request["record"] for request in seen] == [r for r in records if r["dialogue_policy"] == ANSWER]
    assert all(request["record"]["rejected"] == "Assistant: Really which?\n" for request in seen)
    first = seen[0]
    assert first["shots"][0] is records[4]  # the only one of another dialogue comes first, then the own ones fill up
    assert sorted(id(shot) for shot in first["shots"]) == sorted(id(records[i]) for i in (0, 1, 4))
    staff = f"{data.INSTRUCTION}\n[context]\n\n[conversation]\nUser: How many staff?\n"
    assert first["prompt"].startswith(f"{staff}Assistant (asks a clarifying question): In which country?\n\n")
    assert first["prompt"].endswith(f"{records[2]['input_text']}Assistant (asks a clarifying question):")


def test_shots_depend_on_seed_and_index_alone():
    many = [conversation(user(f"q{i}", True), model(f"which {i}?"), user("x", False), model("y")) for i in range(30)]

    def rejected(**options):
        return [r["rejected"] for r in ACTDataset(many, CLARIFY, **options).prepare_datasets() if r["dialogue_policy"] == ANSWER]

    assert rejected(icl_examples=1) == rejected(icl_examples=1)
    assert rejected(icl_examples=1, seed=1) != rejected(icl_examples=1)
    assert len(set(rejected(icl_examples=1))) > 5  # not always the same question
    assert all(f"which {i}?" not in text for i, text in enumerate(rejected(icl_examples=1)))


@pytest.mark.parametrize("written", ["", "Assistant: \n", "7", "Assistant: 7\n"])
def test_useless_text_of_the_preference_model_is_replaced_by_a_real_question(written):
    records = ACTDataset([SALES, STAFF], CLARIFY, 1, preference_model=lambda requests: [written] * len(requests)).prepare_datasets()
    assert records[3]["rejected"] == "Assistant: In which country?\n"


def test_nothing_is_appended_to_what_the_preference_model_wrote():
    records = ACTDataset([SALES], CLARIFY, 1, preference_model=lambda r: ["Assistant: Say which\nUser: 1"] * len(r)).prepare_datasets()
    assert records[3]["rejected"] == "Assistant: Say which\n"


def test_data_without_any_question_get_a_fixed_one():
    records = ACTDataset([conversation(user("a", False), model("b"))], CLARIFY, 2).prepare_datasets()
    assert records[0]["rejected"] == f"Assistant: {data.FALLBACK_QUESTION}\n"


def test_at_least_one_example_is_shown():
    assert ACTDataset([SALES, STAFF], CLARIFY, 0).prepare_datasets()[3]["rejected"] == "Assistant: In which country?\n"


def test_class_balance_draws_multiples_and_keeps_dialogues_together():
    rows = [conversation(user(f"q{i}", True), model("which?"), user("x", False), model("y")) for i in range(20)]
    dataset = ACTDataset(rows, CLARIFY, 1, class_balance={CLARIFY: 2, ANSWER: 0.5}, seed=3)
    records = dataset.prepare_datasets()
    assert sum(r["dialogue_policy"] == CLARIFY for r in records) == 40
    assert sum(r["dialogue_policy"] == ANSWER for r in records) == 10
    order = [r["input_text"] for r in ACTDataset(rows, CLARIFY, 1).prepare_datasets()]
    positions = [order.index(r["input_text"]) for r in records]
    assert positions == sorted(positions) and len(set(positions)) < len(positions)
    assert records == ACTDataset(rows, CLARIFY, 1, class_balance={ANSWER: 0.5, CLARIFY: 2}, seed=3).prepare_datasets()
    only = ACTDataset(rows, CLARIFY, 1, class_balance={CLARIFY: 0}).prepare_datasets()
    assert [r["dialogue_policy"] for r in only] == [ANSWER] * 20


@pytest.mark.parametrize("options", [
    {"target_label": ANSWER}, {"target_label": "clarify"}, {"icl_examples": -1}, {"icl_examples": True}, {"icl_examples": 1.5},
    {"class_balance": {"ASK": 1}}, {"class_balance": {CLARIFY: -1}}, {"class_balance": {CLARIFY: "2"}},
    {"class_balance": {CLARIFY: math.nan}}, {"class_balance": {CLARIFY: True}}, {"class_balance": [1]}])
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        ACTDataset(**{"dataset": [SALES], "target_label": CLARIFY, "icl_examples": 1} | options)


def test_dialogues_groups_consecutive_turns_of_one_conversation():
    records = ACTDataset([SALES, STAFF, SALES], CLARIFY, 1).prepare_datasets()
    assert data.dialogues(records) == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10]]
    assert data.dialogues([records[0], records[0], records[3], records[4]]) == [[0, 1, 2], [3]]
    assert data.dialogues([]) == []


# --- Preference files

def test_records_survive_a_file(tmp_path):
    records = ACTDataset([SALES, STAFF], CLARIFY, 1).prepare_datasets()
    data.write_jsonl(tmp_path / "p.jsonl", records)
    assert read_preferences(tmp_path / "p.jsonl") == records
    assert ACTDataset(records, CLARIFY, 1, is_preference=True).prepare_datasets() == records


@pytest.mark.parametrize(("change", "message"), [
    ({"rejected": None}, "rejected is null, expected a string"), ({"chosen": ...}, "chosen is missing"),
    ({"chosen_policy": "ASK"}, "chosen_policy is 'ASK', expected 'CLARIFY' or 'ANSWER'"),
    ({"input_text": "User: Hi\n"}, "input_text has no line '[conversation]'")])
def test_broken_record_is_refused_with_file_and_line(tmp_path, change, message):
    good = ACTDataset([STAFF], CLARIFY, 1).prepare_datasets()[0]
    bad = {key: value for key, value in (good | change).items() if value is not ...}
    path = write(tmp_path, good | {"extra": 1}, bad)
    with pytest.raises(InputError) as error:
        read_preferences(path)
    assert str(error.value) == f"{path}:2: {message}"
    with pytest.raises(InputError) as error:
        ACTDataset([good, bad], CLARIFY, 1, is_preference=True).prepare_datasets()
    assert str(error.value) == f"record 1: {message}"


def test_vertex_preference_form_keeps_the_first_reply_of_each_side(tmp_path):
    records = ACTDataset([SALES], CLARIFY, 1, preference_model=lambda r: ["Which ones?"] * len(r)).prepare_datasets()
    path = tmp_path / "v.jsonl"
    data.write_vertex_preferences(path, records)
    (_, first), (_, second) = list(data.read_jsonl(path))[:2]
    assert first == {
        "systemInstruction": {"parts": [{"text": f"{data.INSTRUCTION}\nSales and costs.\nTable follows."}]},
        "contents": [{"role": "user", "parts": [{"text": "What were sales?"}]}],
        "completions": [{"score": 1, "completion": {"role": "model", "parts": [{"text": "Which year?"}]}},
                        {"score": 0, "completion": {"role": "model", "parts": [{"text": "12"}]}}]}
    assert [turn["role"] for turn in second["contents"]] == ["user", "model", "user"]
    back = read_preferences(path)
    for got, record in zip(back, records, strict=True):
        assert got["input_text"] == record["input_text"]
        assert got["chosen"] == f"Assistant: {data.first_reply(record['chosen'])}\n" and got["rejected"] == record["rejected"]
        assert {k: got[k] for k in got if k.endswith("policy")} == {k: record[k] for k in got if k.endswith("policy")}
        assert got["gold_target"] == record["gold_target"]  # the rejected answer where the chosen side asks


def completions(*scored, contents=None):
    rows = [{"score": score, "completion": {"role": "model", "parts": [{"text": text}]}} for score, text in scored]
    return {"contents": contents or [{"role": "user", "parts": [{"text": "Hi"}]}], "completions": rows}


def test_vertex_completions_may_come_in_either_order(tmp_path):
    record, = read_preferences(write(tmp_path, completions((0, "Which?"), (1.0, "Four"))))
    assert (record["chosen"], record["rejected"]) == ("Assistant: Four\n", "Assistant: Which?\n")
    assert record["gold_target"] == "Assistant: Four\n"
    assert record["input_text"] == f"{data.INSTRUCTION}\n[context]\n\n[conversation]\nUser: Hi\n"


@pytest.mark.parametrize(("row", "message"), [
    (completions((1, "a")), "completions has 1 entries, expected 2"),
    (completions((1, "a"), (1, "b")), "completions[1].score is 1, expected 1 for one completion and 0 for the other"),
    (completions((0.5, "a"), (1, "b")), "completions[0].score is 0.5, expected 1 for one completion and 0 for the other"),
    (completions((True, "a"), (0, "b")), "completions[0].score is true or false, expected a number"),
    (completions((1, ""), (0, "b")), "completions[0].completion has role 'model' and text '', expected a text by 'model'"),
    (completions((1, "a"), (0, "b"), contents=[{"role": r, "parts": [{"text": "x"}]} for r in ("user", "model")]),
     "the conversation ends with role 'model', expected 'user'"),
    (completions((1, "a")) | {"completions": {}}, "completions is an object, expected a list"),
])
def test_broken_completions_are_refused(tmp_path, row, message):
    path = write(tmp_path, row)
    with pytest.raises(InputError) as error:
        read_preferences(path)
    assert str(error.value) == f"{path}:1: {message}"


def test_config_gives_training_and_validation_records(tmp_path, capsys):
    path = write(tmp_path, SALES, conversation(user("alone", False)))
    training = SimpleNamespace(target_label=CLARIFY, icl_examples=1, class_balance={CLARIFY: 3}, is_preference=False, seed=0,
                               action_labels="gold")
    config = SimpleNamespace(data_config=SimpleNamespace(train_path=str(path), validation_path=str(path)), training_config=training)
    train, validation = data.get_datasets_from_config(config)
    assert (len(train), len(validation)) == (8, 4)  # only the training records are balanced
    assert capsys.readouterr().out.splitlines() == [f"{path}: 1 user turns without an answer in the data were skipped"] * 2
    data.write_jsonl(tmp_path / "p.jsonl", validation)
    training.is_preference, training.class_balance = True, None
    config.data_config.train_path, config.data_config.validation_path = None, tmp_path / "p.jsonl"
    assert data.get_datasets_from_config(config) == ([], validation)


def test_training_actions_come_from_the_file_the_classifier_or_a_coin(tmp_path):
    """30 conversations whose labels contradict the classifier, which takes every reply with a question mark for a question."""
    odd = [conversation(user(f"sales {i}", False), model("Which year?"), user("2010"), model("5")) for i in range(30)]
    path = write(tmp_path, SALES, *odd)
    training = SimpleNamespace(target_label=CLARIFY, icl_examples=1, class_balance=None, is_preference=False, seed=0,
                               action_labels="gold")
    config = SimpleNamespace(data_config=SimpleNamespace(train_path=str(path), validation_path=str(path)), training_config=training)
    gold, validation = data.get_datasets_from_config(config)
    assert gold == validation and sum(record["dialogue_policy"] == CLARIFY for record in gold) == 2
    training.action_labels = "classifier"
    classified, unchanged = data.get_datasets_from_config(config)
    assert unchanged == validation and sum(record["dialogue_policy"] == CLARIFY for record in classified) == 32
    assert all(record["dialogue_policy"] == data.rule_actions([data.first_reply(record["output_text"])])[0] for record in classified)
    training.action_labels = "random"
    coined, unchanged = data.get_datasets_from_config(config)
    assert unchanged == validation and coined == data.get_datasets_from_config(config)[0]
    swapped = [a["dialogue_policy"] != b["dialogue_policy"] for a, b in zip(coined, gold, strict=True)]
    assert 0.25 < sum(swapped) / len(swapped) < 0.75
    for swap, a, b in zip(swapped, coined, gold, strict=True):
        assert (a["chosen"], a["rejected"]) == ((b["rejected"], b["chosen"]) if swap else (b["chosen"], b["rejected"]))
        assert (a["chosen_policy"], a["rejected_policy"]) == (a["dialogue_policy"], CLARIFY if a["dialogue_policy"] == ANSWER else ANSWER)
        assert all(a[key] == b[key] for key in ("input_text", "output_text", "gold_target", "gold_trajectory"))
    training.seed = 1
    assert coined != data.get_datasets_from_config(config)[0]


# --- Metrics

def test_drop_f1_agrees_with_the_official_scorer():
    recorded = json.loads((HERE / "golden" / "drop_f1.json").read_text(encoding="utf-8"))["pairs"]
    assert len(recorded) >= 80 and {row["exact_match"] for row in recorded} == {0.0, 1.0}
    for row in recorded:
        assert drop_f1(row["predicted"], row["gold"]) == (row["exact_match"], row["f1"]), row


def test_drop_f1_by_hand():
    assert drop_f1("net sales", "sales of 2019") == (0.0, 0.4)  # precision 1/2, recall 1/3
    assert drop_f1("(5)", "-5") == (1.0, 1.0)
    assert drop_f1(["b", "a"], ["a", "b", "c"]) == (0.0, 0.67)
    assert drop_f1([], []) == (1.0, 1.0)
    assert drop_f1("9" * 5000 + "%", "9") == (0.0, 0.0)  # more digits than Python converts


def test_assignment_has_the_greatest_sum():
    rng = random.Random(1)
    for _ in range(300):
        rows = rng.randrange(1, 5)
        columns = rng.randrange(rows, 6)
        scores = [[rng.choice((0, 0.25, 0.5, 2 / 3, 1, rng.random())) for _ in range(columns)] for _ in range(rows)]
        found = data.assign(scores)
        assert sorted(found) == list(range(rows)) and len(set(found.values())) == rows
        best = max(sum(scores[i][j] for i, j in enumerate(order)) for order in itertools.permutations(range(columns), rows))
        assert sum(scores[i][j] for i, j in found.items()) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(("predicted", "gold", "want"), [
    ("The White House.", "white house", (1.0, 1.0)),
    ("white white", "white", (0.0, 2 / 3)),  # precision 1/2, recall 1: repeated words count
    ("red fox", ["a dog", "red fox ran"], (0.0, 0.8)),
    ("yes", ["no", "Yes!"], (1.0, 1.0)),
    ("", "the", (1.0, 1.0)), ("", "x", (0.0, 0.0)), ("x", "y", (0.0, 0.0)), ("x", [], (0.0, 0.0))])
def test_coqa_f1_by_hand(predicted, gold, want):
    assert data.coqa_f1(predicted, gold) == pytest.approx(want)


def test_exact_match_folds_case_and_spacing_only():
    assert data.exact_match(" Get  Revenue\nMar ", "get revenue mar") == (1.0, 1.0)
    assert data.exact_match("get revenue, mar", "get revenue mar") == (0.0, 0.0)
    assert data.HEURISTICS == {"drop_f1": drop_f1, "coqa_f1": data.coqa_f1, "exact_match": data.exact_match}


def test_action_metrics_by_hand():
    # CLARIFY: 3, of which 2 found, and 4 said, so F1 2*2/7; ANSWER: 5, of which 3 found, and 4 said, so F1 2*3/9
    gold = [CLARIFY] * 3 + [ANSWER] * 5
    predicted = [CLARIFY, CLARIFY, ANSWER, CLARIFY, CLARIFY] + [ANSWER] * 3
    assert data.action_metrics(gold, predicted) == pytest.approx({
        "Accuracy": 5 / 8, "Weighted F1": (3 * 4 / 7 + 5 * 2 / 3) / 8, "Macro F1": (4 / 7 + 2 / 3) / 2, "Binary F1": 4 / 7,
        "Binary Recall": 2 / 3, "Binary Precision": 2 / 4})


def test_action_metrics_without_a_class_or_without_turns():
    never = data.action_metrics([ANSWER, ANSWER], [ANSWER, ANSWER])
    assert never == {"Accuracy": 1.0, "Weighted F1": 1.0, "Macro F1": 1.0, "Binary F1": 0.0, "Binary Recall": 0.0, "Binary Precision": 0.0}
    silent = data.action_metrics([CLARIFY, ANSWER], [ANSWER, ANSWER])
    assert silent == pytest.approx({"Accuracy": 0.5, "Weighted F1": 1 / 3, "Macro F1": 1 / 3, "Binary F1": 0.0, "Binary Recall": 0.0,
                                    "Binary Precision": 0.0})
    assert set(data.action_metrics([], []).values()) == {None}
    with pytest.raises(ValueError):
        data.action_metrics([ANSWER], [])
    assert data.mean_or_none([]) is None and data.mean_or_none(iter([1, 2])) == 1.5


# --- Converters

def pacific(**changes):
    question = {"question": " What is the change? ", "original_question": "What is the change in cost?", "answer": -3.5,
                "derivation": "1.5-5 ", "answer_type": "arithmetic", "req_clari": False, "scale": "million"}
    asked = {"question": "And which cost?", "original_question": "x", "answer": ["Which year?"], "derivation": "",
             "answer_type": "question", "req_clari": True, "scale": ""}
    spans = asked | {"question": "2019", "answer": ["rent", "wages"], "answer_type": "multi-span", "req_clari": False}
    count = asked | {"question": "How many?", "answer": "2", "derivation": "rent##wages", "answer_type": "count", "req_clari": False}
    return {"paragraphs": [{"text": "Costs fell.\nThen rose."}, {"text": "See table."}],
            "table": {"table": [["", "2019"], ["Cost", "1.5", "5"]]}, "questions": [question | changes, asked, spans, count]}


def test_pacific_becomes_labelled_conversations():
    assert data.convert_pacific([pacific()]) == [conversation(
        user("What is the change?", False), model("1.5-5 = -3.5"), user("And which cost?", True), model("Which year?"),
        user("2019", False), model("rent, wages"), user("How many?", False), model("2"),
        system="Costs fell. Then rose.\nSee table.\n : 2019\nCost : 1.5 | 5")]


def abg(ambiguity="ambiguous"):
    readings = [{"clr_ans": "The first.", "org_ans": "Ann", "org_ans_2": "ann"}, {"clr_ans": "The second.", "org_ans": "Bo"}]
    return {"story": "Ann met Bo.\nThey left.", "history_turns": [{"turn_id": 1, "question": "Who met?", "answer": "Two people"}],
            "target_turn": {"turn_id": 2, "question": "Who?", "answer": "Ann"}, "ambiguity": ambiguity,
            "clarification_turn": {"question": "First or second", "answers": readings} if ambiguity == "ambiguous" else {}}


def test_abg_coqa_becomes_labelled_conversations():
    history = user("Who met?", False), model("Two people")
    assert data.convert_abg_coqa({"data": [abg(), abg("non_ambiguous")]}) == [
        conversation(*history, user("Who?", True), model("First or second"), user("The first.", False), model("Ann"),
                     system="Ann met Bo.\nThey left."),
        conversation(*history, user("Who?", False), model("Ann"), system="Ann met Bo.\nThey left.")]


def run(*arguments):
    return subprocess.run([sys.executable, HERE.parent / "data.py", *map(str, arguments)], capture_output=True, text=True)


def test_command_line_converts_and_counts(tmp_path):
    source, target = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps([pacific()]))
    done = run("pacific", source, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{target}: 1 conversations, 4 user turns, 1 CLARIFY turns\n"
    assert read_vertex_jsonl(target) == data.convert_pacific([pacific()])
    source.write_text(json.dumps({"data": [abg()]}))
    assert run("abg_coqa", source, target).stdout == f"{target}: 1 conversations, 3 user turns, 1 CLARIFY turns\n"
    data.write_jsonl(source, ACTDataset([SALES, STAFF], CLARIFY, 1).prepare_datasets())
    assert run("vertex_preferences", source, target).stdout == f"{target}: 2 conversations, 7 user turns, 3 CLARIFY turns\n"
    assert len(read_preferences(target)) == 7


@pytest.mark.parametrize(("converter", "content", "message"), [
    ("pacific", [pacific(), pacific(answer=None)], " [1].questions[0].answer is null, expected a string or a number or a list"),
    ("pacific", [pacific(answer=["a", {}])], " [0].questions[0].answer[1] is an object, expected a string or a number"),
    ("pacific", [pacific(req_clari="no")], " [0].questions[0].req_clari is a string, expected true or false"),
    ("pacific", [pacific(question=" ")], " [0].questions[0].question is empty, expected a text"),
    ("pacific", [pacific() | {"table": {"table": [["a", 1]]}}], " [0].table.table[0][1] is a number, expected a string"),
    ("pacific", {"data": []}, " the file is an object, expected a list"),
    ("pacific", [3], " [0] is a number, expected an object"),
    ("abg_coqa", [], " the file is a list, expected an object"),
    ("abg_coqa", {"data": [abg() | {"ambiguity": "both"}]}, " data[0].ambiguity is 'both', expected 'ambiguous' or 'non_ambiguous'"),
    ("abg_coqa", {"data": [abg(), abg("non_ambiguous") | {"ambiguity": "ambiguous"}]}, " data[1].clarification_turn.answers is missing"),
    ("vertex_preferences", {}, "1: input_text is missing"),
])
def test_command_line_refuses_bad_structure_in_one_line(tmp_path, capsys, converter, content, message):
    source, target = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps(content))
    assert data.main([converter, str(source), str(target)]) == 2
    assert capsys.readouterr().err == f"data.py: error: {source}:{message}\n"
    assert not target.exists()


def test_command_line_names_the_line_of_broken_json(tmp_path):
    source = tmp_path / "in.json"
    source.write_text('[\n{"paragraphs": \n]')
    done = run("pacific", source, tmp_path / "out.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"data.py: error: {source}:3: invalid JSON at column 1: Expecting value\n"
    source.write_bytes(b'[\n\n"\xe9"]')
    message = f"{source}:3: not UTF-8 (byte 0xe9), expected JSON in UTF-8"
    assert run("pacific", source, tmp_path / "out.jsonl").stderr == f"data.py: error: {message}\n"
    assert run("pacific", tmp_path / "none", "x").stderr == f"data.py: error: {tmp_path}/none: cannot be read (No such file or directory)\n"


def test_published_records_without_an_answer_are_skipped(tmp_path, capsys):
    record = dict.fromkeys(data.RECORD_KEYS, "Assistant: yes\n")
    record |= {"input_text": "i\n[context]\nc\n[conversation]\nUser: q\n", "dialogue_policy": "ANSWER", "chosen_policy": "ANSWER",
               "rejected_policy": "CLARIFY"}
    rows = [record, {**record, "chosen": ""}, {**record, "gold_target": "This question was not answered by the Assistant."}]
    data.write_jsonl(tmp_path / "p.jsonl", rows)
    assert data.read_preferences(tmp_path / "p.jsonl") == [record]
    assert "2 records without an answer" in capsys.readouterr().out
