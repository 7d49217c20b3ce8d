"""Evaluation: the simulated user by rule, what a turn scores, the metrics of written-out samples, and their table."""

import pytest
import torch
from common import a_pair, pairs_of, training_of

import act
import data
from act import Config
from data import ANSWER, CLARIFY

GOLD = [
    ("model", "Which item do you mean?"), ("user", "For stock."), ("model", "Which place do you mean?"),
    ("user", "rome."), ("model", "get stock aug rome"),
]  # fmt: skip


def reply_to(question, gold=GOLD):
    [answer] = data.rule_users([(a_pair(gold=gold), [("model", question)], "an intent")])
    return answer


def test_a_right_question_gets_the_gold_reply():
    assert reply_to("Which item do you mean?") == "For stock."
    assert reply_to("What place?") == "rome."
    assert reply_to("Could you tell me the ITEM, please?") == "For stock."


def test_a_wrong_question_gets_nothing():
    assert reply_to("Which month do you mean?") == data.NOTHING_TO_ADD
    assert reply_to("?") == data.NOTHING_TO_ADD
    assert reply_to("Which item do you mean?", GOLD[2:]) == data.NOTHING_TO_ADD


def test_a_time_or_a_place_is_asked_for_in_any_words_and_not_for_anything_else():
    gold = [("model", "Which year are you asking about?"), ("user", "2019"), ("model", "5")]
    for right in ("For which period?", "When?", "What fiscal year of the net sales do you mean?"):
        assert reply_to(right, gold) == "2019"
    for wrong in ("Which region?", "What kind of sales?", "Which unit?"):
        assert reply_to(wrong, gold) == data.NOTHING_TO_ADD, wrong


def test_a_question_must_share_half_of_the_words_of_both():
    gold = [("model", "What kind of deferred tax assets are you asking about?"), ("user", "Foreign ones"), ("model", "5")]
    for right in ("Which deferred tax asset?", "What type of tax assets do you mean?", "Which hello tax assets?"):
        assert reply_to(right, gold) == "Foreign ones", "hello is the user's own word"
    for wrong in ("What kind?", "What kind of dog is it?", "Which tax?", "Which tax rate, expense or income?"):
        assert reply_to(wrong, gold) == data.NOTHING_TO_ADD, wrong
    assert reply_to("Red or blue?", [("model", "Which one do you mean?"), ("user", "red"), ("model", "5")]) == "red"


def test_a_needless_question_gets_nothing():
    assert reply_to("Which item do you mean?", [("model", "get item stock")]) == data.NOTHING_TO_ADD


def test_the_better_matching_gold_question_is_answered():
    gold = [
        ("model", "revenue of which year?"), ("user", "2019"), ("model", "revenue of which region?"), ("user", "Asia"),
        ("model", "5"),
    ]  # fmt: skip
    assert reply_to("The revenue of which region?", gold) == "Asia"
    assert reply_to("The revenue of which year?", gold) == "2019"


def test_users_are_simulated_in_batches_and_summarised_once():
    asked, pairs = [], [a_pair(target=str(i)) for i in range(5)]

    def summarize(batch):
        asked.append([pair.target for pair in batch])
        return [None if pair.target == "4" else f"intent {pair.target}" for pair in batch]

    def reply(requests):
        assert all(pair.target in intent for pair, _, intent in requests)
        return [f"{said[-1][1]} / {intent}" for _, said, intent in requests]

    simulate = act.Helpers(None, summarize, reply, None).users_of(pairs)
    assert simulate([1, 3], [[("model", "a?")], [("model", "b?")]]) == ["a? / intent 1", "b? / intent 3"]
    assert simulate([3, 0], [[("model", "c?")], [("model", "d?")]]) == ["c? / intent 3", "d? / intent 0"]
    assert simulate([4, 1], [[("model", "e?")], [("model", "f?")]]) == [None, "f? / intent 1"]
    assert simulate([4], [[("model", "g?")]]) == [None]
    assert asked == [["1", "3"], ["0"], ["4"]]


def judged(action, trajectory, actions, gold=None, target="get stock", answered=True):
    """A scored turn; `trajectory`: what model and user say in turns."""
    messages = [("model" if i % 2 == 0 else "user", text) for i, text in enumerate(trajectory)]
    pair = a_pair(action, gold=gold or [("model", target)], target=target, context="a table", where="x:1")
    answer = trajectory[-1] if answered and actions[-1] == ANSWER else None
    exact, f1 = data.exact_match(answer, target) if answer is not None else (0.0, 0.0)
    turn = {"trajectory": messages, "final_answer": answer, "inferred_action": actions[0],
            "questions": actions.count(CLARIFY), "exact_match": exact, "f1": f1}  # fmt: skip
    return act.sample_of(pair, turn, "exact_match")


ASKED = [("model", "Which item?"), ("user", "stock"), ("model", "get stock")]


def test_a_clarified_answer_written_out():
    found = judged(CLARIFY, ["Which item?", "stock", "get stock"], [CLARIFY, ANSWER], ASKED)
    assert found == {
        "where": "x:1", "context": "a table", "history": [("user", "hello")], "trajectory": ASKED, "gold": ASKED,
        "inferred_action": CLARIFY, "target_action": CLARIFY, "final_answer": "get stock", "gold_target": "get stock",
        "questions": 1, "gold_questions": 1, "turn_exact_match": 1.0, "turn_f1": 1.0, "exact_match": 1.0, "f1": 1.0,
    }  # fmt: skip


def test_a_conversation_that_ends_in_a_question_scores_nothing():
    found = judged(CLARIFY, ["a?", "u", "get stock?"], [CLARIFY, CLARIFY], target="get stock?")
    assert (found["final_answer"], found["exact_match"], found["f1"], found["questions"]) == (None, 0.0, 0.0, 2)
    assert judged(CLARIFY, ["a?"], [CLARIFY])["questions"] == 1
    assert judged(ANSWER, ["no"], [ANSWER])["questions"] == 0


def test_a_cut_answer_scores_nothing_but_its_turn():
    """What was said is compared with the gold reply, the conversation has no answer."""
    found = judged(ANSWER, ["get stock"], [ANSWER], answered=False)
    assert (found["final_answer"], found["exact_match"], found["f1"]) == (None, 0.0, 0.0)
    assert found["turn_exact_match"] == 1.0


def test_a_failed_helper_leaves_its_turn_out_of_all_means_but_counts_it():
    failed = act.sample_of(a_pair(CLARIFY), None, "exact_match")
    assert failed["inferred_action"] is None and failed["trajectory"] == [] and failed["questions"] == 0
    good = judged(ANSWER, ["get stock"], [ANSWER])
    assert act.summarize([good, failed]) == {**act.summarize([good]), "Helper Failures": 1}


def test_metrics_of_written_out_samples():
    samples = [
        judged(CLARIFY, ["Which item?", "stock", "get stock"], [CLARIFY, ANSWER], ASKED),
        judged(CLARIFY, ["get stock"], [ANSWER], ASKED),
        judged(ANSWER, ["a?", "u", "b?", "u", "get x"], [CLARIFY, CLARIFY, ANSWER]),
        judged(ANSWER, ["get stock"], [ANSWER]),
    ]
    found = act.summarize(samples)
    assert found == {
        "Accuracy": 0.5, "Weighted F1": 0.5, "Macro F1": 0.5, "Binary F1": 0.5, "Binary Recall": 0.5,
        "Binary Precision": 0.5,
        "Turn-Level DROP F1": 0.5, "Turn-Level Exact Match": 0.5, "Turn-Level Turns": 4,
        "Trajectory-level DROP F1": 0.75, "Trajectory-level Exact Match": 0.75, "Trajectory-level Turns": 4,
        "Post-Clarification DROP F1": 0.5, "Post-Clarification Exact Match": 0.5, "Post-Clarification Turns": 2,
        "CLARIFY Turns: Trajectory-level DROP F1": 1.0, "CLARIFY Turns: Trajectory-level Exact Match": 1.0,
        "CLARIFY Turns: Trajectory-level Turns": 2,
        "ANSWER Turns: Trajectory-level DROP F1": 0.5, "ANSWER Turns: Trajectory-level Exact Match": 0.5,
        "ANSWER Turns: Trajectory-level Turns": 2,
        "Questions per Turn": 0.75, "Gold Questions per Turn": 0.5, "Helper Failures": 0,
    }  # fmt: skip


def test_a_mean_over_nothing_is_none_and_shown_as_a_dash():
    never_asked = act.summarize([judged(ANSWER, ["get stock"], [ANSWER])])
    assert never_asked["Post-Clarification DROP F1"] is never_asked["Post-Clarification Exact Match"] is None
    assert never_asked["Post-Clarification Turns"] == 0
    assert never_asked["CLARIFY Turns: Trajectory-level Exact Match"] is None
    assert all(value is None or value == 0 for value in act.summarize([]).values())
    after = {**never_asked, "Post-Clarification Exact Match": 0.25, "Questions per Turn": 1.5}
    lines = act.comparison(never_asked, after).splitlines()
    rows = {line[:44].strip(): line[44:].split() for line in lines[1:]}
    assert rows["Post-Clarification Exact Match"] == ["-", "25.0"]
    assert rows["Accuracy"] == ["100.0", "100.0"] and rows["Questions per Turn"] == ["0.00", "1.50"]


def test_conversations_that_changed_are_shown_on_a_line_each():
    wrong = judged(CLARIFY, ["get x"], [ANSWER], ASKED)
    right = judged(CLARIFY, ["Which\nitem?", "stock", "get stock"], [CLARIFY, ANSWER], ASKED)
    shown = [
        "", "  a table", "  User: hello",
        "    before | Assistant: get x",
        "    after  | Assistant: Which item?  User: stock  Assistant: get stock",
        "    gold   | get stock",
    ]  # fmt: skip
    found = act.changed_conversations([wrong, right], [right, right]).splitlines()
    assert found == ["1 turns got a better answer, 0 a worse one, of 2", *shown]
    back = [shown[4].replace("after ", "before"), shown[3].replace("before", "after ")]
    found = act.changed_conversations([right, right], [wrong, right]).splitlines()
    assert found == ["0 turns got a better answer, 1 a worse one, of 2", *shown[:3], *back, shown[5]]


def test_two_conversations_that_got_better_and_one_that_got_worse_are_shown():
    """Those that became right, or wrong, first; a turn that a helper failed counts as neither."""
    wrong, half = judged(CLARIFY, ["get x"], [ANSWER], ASKED), judged(CLARIFY, ["get x"], [ANSWER], ASKED) | {"f1": 0.5}
    right = judged(CLARIFY, ["Which?", "stock", "get stock"], [CLARIFY, ANSWER], ASKED)
    failed = right | act.FAILED_TURN
    before = [wrong, half, wrong, wrong, half, right, right]
    after = [half, right, right, right, wrong, wrong, failed]
    first, *shown = act.changed_conversations(before, after).split("\n\n")
    assert first == "4 turns got a better answer, 2 a worse one, of 6" and len(shown) == 3
    assert "before | Assistant: Which?" in shown[2], "right before"
    assert ["after  | Assistant: Which?" in text for text in shown] == [True, True, False]
    assert act.changed_conversations([failed], [right]) == "0 turns got a better answer, 0 a worse one, of 0"


@pytest.fixture
def validation(world):
    return pairs_of(world / "validation.jsonl")


def evaluated(world, mesh, plain, pairs, **training):
    model = act.build_model(world / "model", mesh, torch.float32, trainable=False)
    config = Config(training_config=training_of(**training))
    return act.evaluate_pairs(model, plain, pairs, act.build_helpers(config), config)


def test_evaluation_does_not_depend_on_the_batch_size(world, mesh, plain, validation):
    first, *others = (
        evaluated(world, mesh, plain, validation, per_device_eval_batch_size=size, max_turns=3) for size in (1, 3, 100)
    )
    assert others == [first, first]
    metrics, samples = first
    assert [sample["history"] for sample in samples] == [pair.history for pair in validation]
    assert metrics == act.summarize(samples)
    assert {sample["questions"] for sample in samples} > {0}, "the random model should ask here and there"


def test_a_response_cut_at_max_new_tokens_is_no_answer(world, mesh, plain, validation):
    """One token is never enough: whatever the model says is cut, or empty."""
    _, samples = evaluated(world, mesh, plain, validation, max_new_tokens=1, max_turns=3)
    spoken = [sample for sample in samples if sample["trajectory"][-1][1]]
    assert spoken
    for sample in spoken:
        assert len(sample["trajectory"]) == 1, "nobody replies to half a question"
        assert (sample["final_answer"], sample["exact_match"], sample["f1"]) == (None, 0.0, 0.0)
