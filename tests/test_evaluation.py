"""Evaluation: the simulated user by rule, what a turn scores, the metrics of written-out samples, and their table."""

import pytest
from common import a_pair, model_config, pairs_of, prompted, run_of

import act
import data
from data import ANSWER, CLARIFY

GOLD = [
    ("model", "Which item do you mean?"), ("user", "For stock."), ("model", "Which place do you mean?"),
    ("user", "rome."), ("model", "get stock aug rome"),
]  # fmt: skip


def test_a_gold_question_that_the_rule_does_not_know_is_no_query():
    """Actions may come from labels or a model; SQL runs queries alone."""
    gold = [("model", "Tell me which column."), ("user", "a"), ("model", "SELECT a FROM t")]
    turn = act.play_turn(a_pair(CLARIFY, gold=gold), 3, data.execution_match)
    asked = next(turn)
    for answer in (("Tell me which  column.", True), CLARIFY, "a", ("SELECT a FROM t", True), ANSWER):
        asked = turn.send(answer)
    assert asked[0] == "score"
    with pytest.raises(StopIteration) as end:
        turn.send((1.0, 1.0))
    row = end.value.value
    assert (row["turn_exact_match"], row["turn_f1"], row["f1"], row["questions"]) == (1.0, 1.0, 1.0, 1)


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


def judged(action, trajectory, actions, gold=None, target="get stock", answered=True):
    """A turn that was played; `trajectory`: what model and user say in turns."""
    pair = a_pair(action, gold=gold or [("model", target)], target=target, context="a table", path="x", line=1)
    replies, users, taken = iter(trajectory[::2]), iter(trajectory[1::2]), iter(actions)
    answers = {
        "respond": lambda *_: [(next(replies), answered)], "simulate": lambda *_: [next(users)],
        "classify": lambda *_: [next(taken)], "score": lambda _, said: [data.exact_match(said[0][-1][1], target)],
    }  # fmt: skip
    [turn] = act.in_lockstep([act.play_turn(pair, len(actions), data.exact_match)], answers)
    assert not [*replies, *users, *taken], "all was said"
    return turn


def failed_turn():
    """One in which a helper gave no answer, to the policy's first reply."""
    conversation = act.play_turn(a_pair(CLARIFY), 3)
    [turn] = act.in_lockstep([conversation], {"respond": lambda *_: [("what", True)], "classify": lambda *_: [None]})
    return turn


ASKED = [("model", "Which item?"), ("user", "stock"), ("model", "get stock")]


def test_a_clarified_answer_written_out():
    found = judged(CLARIFY, ["Which item?", "stock", "get stock"], [CLARIFY, ANSWER], ASKED)
    assert found == {
        "where": "x:1", "context": "a table", "history": [("user", "hello")], "trajectory": ASKED, "gold": ASKED,
        "inferred_action": CLARIFY, "target_action": CLARIFY, "final_answer": "get stock", "gold_target": "get stock",
        "questions": 1, "gold_questions": 1, "turn_exact_match": 1.0, "turn_f1": 1.0, "exact_match": 1.0, "f1": 1.0,
        "ended": True,
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
    failed = failed_turn()
    assert failed["inferred_action"] is None and failed["trajectory"] == [("model", "what")] and failed["questions"] == 0
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


def test_a_mean_over_nothing_is_none():
    never_asked = act.summarize([judged(ANSWER, ["get stock"], [ANSWER])])
    assert never_asked["Post-Clarification DROP F1"] is never_asked["Post-Clarification Exact Match"] is None
    assert never_asked["Post-Clarification Turns"] == 0
    assert never_asked["CLARIFY Turns: Trajectory-level Exact Match"] is None
    assert all(value is None or value == 0 for value in act.summarize([]).values())


# ----------------------------------------------------------------------------------------------------------------------
# Before and after

WRONG = judged(CLARIFY, ["get x"], [ANSWER], ASKED)
RIGHT = judged(CLARIFY, ["Which\nitem?", "stock", "get stock"], [CLARIFY, ANSWER], ASKED)


def table_of(before, after, heuristic="drop_f1"):
    """{metric: [before, after]} of the comparison, as it is shown."""
    lines = act.comparison(before, after, heuristic)
    return {line[:46].strip(): line[46:].split() for line in lines[1 : lines.index("")]}


def test_metrics_are_shown_in_percent_and_what_is_a_mean_over_nothing_as_a_dash():
    table = table_of([WRONG, judged(ANSWER, ["get stock"], [ANSWER])], [RIGHT] * 2)
    assert table["Post-Clarification Exact Match"] == ["-", "100.0"]
    assert table["Accuracy"] == ["50.0", "100.0"] and table["Questions per Turn"] == ["0.00", "1.00"]


def test_a_metric_bears_the_name_of_the_heuristic():
    assert "Trajectory-level DROP F1" in table_of([WRONG], [RIGHT])
    names = set(table_of([WRONG], [RIGHT], "coqa_f1"))
    assert "Trajectory-level coqa_f1" in names and not [name for name in names if "DROP" in name]


def test_before_and_after_are_compared_over_the_turns_that_both_have():
    """A helper that fails in one of the two evaluations must not move the other's means."""
    failed = failed_turn()
    assert table_of([WRONG, RIGHT, RIGHT, failed], [RIGHT, RIGHT, failed, WRONG]) == table_of([WRONG, RIGHT], [RIGHT] * 2)
    assert table_of([WRONG, failed], [failed, RIGHT])["Accuracy"] == ["-", "-"]


def shown_turns(before, after):
    """What is shown below the table: the count, then a list of lines for each turn."""
    lines = act.comparison(before, after, "exact_match")
    turns = "\n".join(lines[lines.index("") + 1 :]).split("\n\n")
    return turns[0], [turn.splitlines() for turn in turns[1:]]


def test_conversations_that_changed_are_shown_on_a_line_each():
    shown = [
        "  User: hello",
        "    before | Assistant: get x",
        "    after  | Assistant: Which item?  User: stock  Assistant: get stock",
        "    gold   | get stock",
    ]  # fmt: skip
    assert shown_turns([WRONG, RIGHT], [RIGHT, RIGHT]) == ("1 turns got a better answer, 0 a worse one, of 2", [shown])
    back = [shown[0], shown[2].replace("after ", "before"), shown[1].replace("before", "after "), shown[3]]
    assert shown_turns([RIGHT, RIGHT], [WRONG, RIGHT]) == ("0 turns got a better answer, 1 a worse one, of 2", [back])


def test_a_lucky_guess_where_a_question_was_due_is_counted_but_not_shown():
    lucky = judged(CLARIFY, ["get stock"], [ANSWER], ASKED) | {"f1": 1.0}
    assert shown_turns([WRONG, WRONG], [lucky, WRONG]) == ("1 turns got a better answer, 0 a worse one, of 2", [])


def test_of_a_long_conversation_the_last_messages_are_shown():
    history = [("user", "a"), ("model", "b"), ("user", "c\nd"), ("model", "e"), ("user", "f")]
    _, [shown] = shown_turns([WRONG | {"history": history}], [RIGHT | {"history": history}])
    assert shown[0] == "  User: c d  Assistant: e  User: f"
    stock = "toaster " * 25
    _, [shown] = shown_turns([WRONG | {"history": [("user", stock)]}], [RIGHT | {"history": [("user", stock * 3)]}])
    assert shown[0].startswith(f"  User: {stock}toaster") and shown[0].endswith(" ...") and len(shown[0]) < 260


def test_two_conversations_that_got_better_and_one_that_got_worse_are_shown():
    """Those that became right, or wrong, first; a turn that a helper failed counts as neither."""
    half, failed = WRONG | {"f1": 0.5}, failed_turn()
    before = [WRONG, half, WRONG, WRONG, half, RIGHT, RIGHT]
    after = [half, RIGHT, RIGHT, RIGHT, WRONG, WRONG, failed]
    first, shown = shown_turns(before, after)
    assert first == "4 turns got a better answer, 2 a worse one, of 6" and len(shown) == 3
    assert "before | Assistant: Which item?" in shown[2][1], "right before"
    assert ["after  | Assistant: Which item?" in turn[2] for turn in shown] == [True, True, False]
    assert shown_turns([failed], [RIGHT]) == ("0 turns got a better answer, 0 a worse one, of 0", [])


# ----------------------------------------------------------------------------------------------------------------------
# A model on validation turns


@pytest.fixture
def validation(world, plain):
    return prompted(pairs_of(world / "validation.jsonl"), plain)


def evaluated(world, mesh, plain, pairs, **training):
    config = model_config(world, **training)
    run = run_of(act.build_model(config, mesh, trained=False), None, plain, None, validation=pairs)
    run.config, run.helpers = config, act.Helpers(config, {})
    return act.evaluate_pairs(run)


def test_evaluation_does_not_depend_on_the_batch_size(world, mesh, plain, validation):
    first, *others = (
        evaluated(world, mesh, plain, validation, per_device_eval_batch_size=size, max_turns=3) for size in (1, 3, 100)
    )
    assert others == [first, first]
    metrics, samples = first
    assert [sample["history"] for sample in samples] == [pair.history for pair in validation]
    assert metrics == act.summarize(samples)
    assert {sample["questions"] for sample in samples} > {0}, "the random model should ask here and there"


def test_a_response_cut_at_max_new_tokens_is_no_answer(world, mesh, plain, validation, capsys):
    """One token is never enough: whatever the model says is cut, or empty.

    A base model in Gemma's chat format with adapters may never learn to stop: it is said how many replies never end.
    """
    _, samples = evaluated(world, mesh, plain, validation, max_new_tokens=1, max_turns=3)
    spoken = [sample for sample in samples if sample["trajectory"][-1][1]]
    assert spoken
    cut = sum(not sample["ended"] for sample in samples)
    assert capsys.readouterr().out == f"{cut} of {len(samples)} turns end in a reply that is cut at max_new_tokens\n"
    for sample in spoken:
        assert len(sample["trajectory"]) == 1 and not sample["ended"], "nobody replies to half a question"
        assert (sample["final_answer"], sample["exact_match"], sample["f1"]) == (None, 0.0, 0.0)


def test_questions_that_the_simulated_user_refuses_are_counted(world, mesh, plain, validation, monkeypatch, capsys):
    """A user who refuses half of the good questions is the first thing to know."""
    asked = [pair for pair in validation if pair.action == CLARIFY][:2]
    said = {0: ["Huh?", "get"], 1: [asked[1].gold[0][1], "get"]}

    def scripted(model, template, pairs, training):
        return lambda rows, trajectories: [
            (said[row][len(trajectory) // 2], True) for row, trajectory in zip(rows, trajectories, strict=True)
        ]

    monkeypatch.setattr(act, "sampler", scripted)
    evaluated(world, mesh, plain, asked, max_turns=3)
    assert capsys.readouterr().out == "CLARIFY turns: the simulated user refused 1 of 2 questions (a rule that compares words; user_simulator_config casts a model)\n"
