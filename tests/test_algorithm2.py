"""Algorithm 2 against an oracle on random scripts, its outcomes in words, its batches, and the policy's samples."""

import copy
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from common import FORMATS, a_pair, model_config, prompted, random_model, run_of, training_of

import act
import data
from act import (
    BAD_OUTCOME,
    CUT_OFF,
    GOOD_OUTCOME,
    HELPER_FAILED,
    NO_ANSWER,
    SAME_TEXT,
    WRONG_ACTION,
)
from data import ANSWER, CLARIFY
from gemma import Template, generate


def play_out(conversation, **answers):
    """One conversation by callables of one request, which give None where they have no answer."""
    one = {what: lambda rows, requests, answer=answer: [answer(requests[0])] for what, answer in answers.items()}
    [found] = act.in_lockstep([conversation], one)
    return found


def play(pair, replies, users=(), score=0.0, max_turns=3, tolerance=0.5, simulate_user=True):
    """act_pair with scripted replies: one that ends in "?" asks, one in "..." is cut off.

    Returns (the new pair, outcome, number of replies used).
    """
    replies, users, said = list(replies), list(users), []

    def respond(trajectory):
        assert len(trajectory) == 2 * len(said)
        said.append(replies.pop(0))
        return said[-1].removesuffix("..."), not said[-1].endswith("...")

    def simulate(trajectory):
        assert trajectory[-1] == ("model", said[-1])
        return users.pop(0)

    def judge(trajectory):
        assert trajectory[-1] == ("model", said[-1])
        return 0.0, score

    conversation = act.act_pair(pair, tolerance, max_turns, simulate_user)
    actions = {"classify": lambda text: data.rule_actions([text])[0], "simulate": simulate}
    rollout = play_out(conversation, respond=respond, score=judge, **actions)
    assert rollout.before is pair and [text for role, text in rollout.trajectory if role == "model"] == [
        text.removesuffix("...") for text in said
    ]
    return rollout.pair, rollout.outcome, len(said)


# ----------------------------------------------------------------------------------------------------------------------
# Outcomes in words


def test_answering_where_it_should_ask_becomes_rejected():
    new, outcome, said = play(a_pair(CLARIFY), ["no idea"])
    assert (outcome, said) == ("wrong_action", 1)
    assert (new.chosen, new.rejected) == ([("model", "right?")], [("model", "no idea")])


def test_a_lucky_answer_on_a_clarify_turn_becomes_rejected():
    new, outcome, _ = play(a_pair(CLARIFY, target="gold"), ["gold"], score=1.0)
    assert outcome == "wrong_action" and new.rejected == [("model", "gold")] and new.chosen == [("model", "right?")]


def test_asking_where_it_should_answer_becomes_rejected():
    new, outcome, said = play(a_pair(ANSWER, chosen="gold", rejected="what?"), ["which?", "gold"], ["that"], score=1.0)
    assert (outcome, said) == ("wrong_action", 1)
    assert (new.chosen, new.rejected) == ([("model", "gold")], [("model", "which?")])


def test_a_good_answer_becomes_chosen():
    new, outcome, _ = play(a_pair(ANSWER, chosen="gold", rejected="what?"), ["so good"], score=0.6)
    assert outcome == "good_outcome"
    assert (new.chosen, new.rejected) == ([("model", "so good")], [("model", "what?")])


def test_a_score_of_just_the_tolerance_is_not_good():
    new, outcome, _ = play(a_pair(ANSWER, chosen="gold", rejected="what?"), ["meh"], score=0.5, tolerance=0.5)
    assert outcome == "bad_outcome"
    assert (new.chosen, new.rejected) == ([("model", "gold")], [("model", "meh")])


@pytest.mark.parametrize(("score", "outcome"), [(1.0, "good_outcome"), (0.0, "bad_outcome")])
def test_a_trajectory_with_two_questions_is_judged_by_its_answer(score, outcome):
    pair = a_pair(CLARIFY)
    new, found, said = play(pair, ["a?", "b?", "c"], ["u1", "u2"], score=score)
    trajectory = [("model", "a?"), ("user", "u1"), ("model", "b?"), ("user", "u2"), ("model", "c")]
    assert (found, said) == (outcome, 3)
    assert (new.chosen, new.rejected) == ((trajectory, pair.rejected) if score else (pair.chosen, trajectory))


@pytest.mark.parametrize("max_turns", [1, 2, 3])
def test_no_answer_within_max_turns_becomes_rejected(max_turns):
    pair = a_pair(CLARIFY)
    new, outcome, said = play(pair, ["a?", "b?", "c?", "d"], ["u1", "u2", "u3"], score=1.0, max_turns=max_turns)
    assert (outcome, said) == ("no_answer", max_turns)
    whole = [("model", "a?"), ("user", "u1"), ("model", "b?"), ("user", "u2"), ("model", "c?")]
    assert new.rejected == whole[: 2 * max_turns - 1] and new.chosen == pair.chosen and not new.cut


@pytest.mark.parametrize(("action", "response", "score", "outcome"), [
    (CLARIFY, "a?", 0.0, "good_outcome"), (CLARIFY, "no", 1.0, "wrong_action"), (ANSWER, "a?", 1.0, "wrong_action"),
    (ANSWER, "good", 1.0, "good_outcome"), (ANSWER, "bad", 0.0, "bad_outcome"), (CLARIFY, "a?...", 0.0, "cut_off"),
])  # fmt: skip
def test_without_simulation_a_question_wins_as_it_is_and_an_answer_is_judged(action, response, score, outcome):
    pair = a_pair(action, rejected="other")
    new, found, said = play(pair, [response], [], score=score, simulate_user=False)
    sides = (new.chosen, pair.rejected) if outcome == GOOD_OUTCOME else (new.rejected, pair.chosen)
    assert (found, said, sides[0]) == (outcome, 1, [("model", response.removesuffix("..."))])
    assert sides[1] == (new.rejected if outcome == GOOD_OUTCOME else new.chosen), "the other side stays"


@pytest.mark.parametrize(("action", "replies"), [
    (CLARIFY, ["what..."]), (CLARIFY, ["what?..."]), (ANSWER, ["gold..."]), (ANSWER, ["why?..."]),
    (CLARIFY, ["a?", "gold..."]), (CLARIFY, ["a?", "b?", "b?..."]),
])  # fmt: skip
def test_a_response_that_is_cut_off_loses_whatever_it_says(action, replies):
    pair = a_pair(action)
    new, outcome, said = play(pair, replies, ["u"] * 3, score=1.0)
    assert (outcome, said, new.cut) == ("cut_off", len(replies), True)
    assert new.chosen == pair.chosen and new.rejected[-1] == ("model", replies[-1].removesuffix("..."))


def test_a_response_of_nothing_loses_with_its_end_scored():
    """Line breaks until max_new_tokens: without its end it would be a side of no tokens."""
    new, outcome, _ = play(a_pair(CLARIFY), ["..."])
    assert (outcome, new.cut, new.rejected) == ("cut_off", False, [("model", "")])


def test_a_pair_whose_sides_become_equal_is_put_back():
    pair = a_pair(ANSWER, chosen="gold", rejected="what?")
    new, outcome, _ = play(pair, ["gold"], score=0.0)
    assert outcome == "same_text" and new is pair
    pair = a_pair(ANSWER, chosen="gold", rejected="good\nat last")
    new, outcome, _ = play(pair, [" good at  last"], score=1.0)
    assert outcome == "same_text" and new is pair, "spacing aside: some formats do not show it"
    new, outcome, _ = play(pair, ["Good at last"], score=1.0)
    assert outcome == "good_outcome" and new.chosen == [("model", "Good at last")]


def test_the_original_pair_is_left_as_it_was():
    pair = a_pair(CLARIFY)
    before = copy.deepcopy(pair)
    play(pair, ["no"])
    play(pair, ["a?", "b"], ["u"], score=1.0)
    play(pair, ["a..."])
    assert pair == before


# ----------------------------------------------------------------------------------------------------------------------
# Random scripts, against oracles that are told otherwise


class Script:
    """What policy, classifier, user and heuristic say: a function of the example and of what was said, and a log."""

    def __init__(self, seed):
        self.seed, self.asked = seed, {}  # what was asked for example i, in order

    def draw(self, *keys):
        return random.Random(f"{self.seed}/{keys}")

    def note(self, i, what):
        self.asked.setdefault(i, []).append(what)

    def policy(self, i, said):
        self.note(i, "respond")
        rng = self.draw("policy", i, said)
        text = rng.choice(("a", "a b", "a  b", "b\na", "x", "x?", "y?", "a b?", "a\tb?"))
        return None if rng.random() < 0.03 else (text, rng.random() > 0.12)

    def classifier(self, i, text):
        self.note(i, "classify")
        wrong, failed = self.draw("wrong", i, text).random() < 0.05, self.draw("failed", i, text).random() < 0.03
        return None if failed else CLARIFY if text.endswith("?") != wrong else ANSWER

    def user(self, i, said):
        self.note(i, "simulate")
        rng = self.draw("user", i, said)
        return None if rng.random() < 0.05 else rng.choice(("the first", "", "a\n\nb"))

    def heuristic(self, text, target):
        return self.draw("score", text, target).choice((0.0, 0.25, 0.5, 0.75, 1.0))


def oracle_of_training(i, pair, script, tolerance, max_turns, simulated):
    """Algorithm 2 in one loop over turns, told by what loses: (chosen, rejected, cut, outcome)."""
    said, verdict = [], NO_ANSWER
    for turn in range(max_turns):
        if turn > 0:
            reply = script.user(i, said)
            if reply is None:
                return pair.chosen, pair.rejected, False, HELPER_FAILED
            said = said + [("user", reply)]
        response = script.policy(i, said)
        action = script.classifier(i, response[0]) if response else None
        if action is None:
            return pair.chosen, pair.rejected, False, HELPER_FAILED
        said = said + [("model", response[0])]
        if not response[1]:
            verdict = CUT_OFF
        elif turn == 0 and action != pair.action:
            verdict = WRONG_ACTION
        elif action == CLARIFY and simulated:
            continue
        elif action == CLARIFY:
            verdict = GOOD_OUTCOME
        else:
            verdict = GOOD_OUTCOME if script.heuristic(response[0], pair.target) > tolerance else BAD_OUTCOME
        break
    new = {"chosen": pair.chosen, "rejected": pair.rejected}
    new["chosen" if verdict == GOOD_OUTCOME else "rejected"] = said
    lines = {side: " | ".join(f"{who} {' '.join(text.split())}" for who, text in new[side]) for side in new}
    if lines["chosen"] == lines["rejected"]:
        return pair.chosen, pair.rejected, False, SAME_TEXT
    return new["chosen"], new["rejected"], verdict == CUT_OFF, verdict


def random_pairs(count, seed):
    rng = random.Random(seed)
    texts = ("a", "a b", "x?", "x", "a b?")
    return [
        a_pair(rng.choice((CLARIFY, ANSWER)), rng.choice(texts), rng.choice(texts), target=f"gold {i}")
        for i in range(count)
    ]


def lockstep(conversations, script):
    """in_lockstep by a script. Returns its results and its batches [(what, rows)]."""
    batches = []

    def batched(what, one):
        def many(rows, requests):
            batches.append((what, list(rows)))
            return [one(row, list(x) if what != "classify" else x) for row, x in zip(rows, requests, strict=True)]

        return many

    def score(rows, requests):
        return [(0.0, script.heuristic(said[-1][1], f"gold {row}")) for row, said in zip(rows, requests, strict=True)]

    calls = {"respond": script.policy, "classify": script.classifier, "simulate": script.user}
    answers = {what: batched(what, one) for what, one in calls.items()}
    return act.in_lockstep(conversations, {**answers, "score": score}), batches


def assert_batches_hold_the_waiting(batches, asked, count):
    """Every n-th batch of a kind: exactly the rows that ask a n-th time, in order."""
    turns = max(len(asked[i]) for i in range(count)) // 3 + 1
    expected = [
        (what, rows)
        for n in range(turns)
        for what in ("respond", "classify", "simulate")
        if (rows := [i for i in range(count) if asked[i].count(what) > n])
    ]
    assert batches == expected


@pytest.mark.parametrize("simulated", [True, False], ids=["simulated", "alone"])
@pytest.mark.parametrize("max_turns", [1, 2, 3])
def test_lockstep_equals_the_oracle_in_every_outcome(max_turns, simulated):
    pairs, oracle_script, script = random_pairs(1000, max_turns), Script(max_turns), Script(max_turns)
    expected = [
        oracle_of_training(i, pair, oracle_script, 0.5, max_turns, simulated) for i, pair in enumerate(pairs)
    ]
    conversations = [act.act_pair(pair, 0.5, max_turns, simulated) for pair in pairs]
    found, batches = lockstep(conversations, script)
    for i, (rollout, wanted, old) in enumerate(zip(found, expected, pairs, strict=True)):
        new = rollout.pair
        assert (new.chosen, new.rejected, new.cut, rollout.outcome) == wanted
        assert replace(new, chosen=old.chosen, rejected=old.rejected, cut=False) == old and rollout.before is old
        sides = {"chosen": new.chosen, "rejected": new.rejected, None: rollout.trajectory}
        assert sides[rollout.replaced] == rollout.trajectory
        assert (rollout.replaced is None) == (rollout.outcome in (SAME_TEXT, HELPER_FAILED)) == (new is old)
        if rollout.score is not None:
            assert rollout.score == script.heuristic(rollout.trajectory[-1][1], f"gold {i}")
        assert (rollout.score is None) <= (rollout.outcome != BAD_OUTCOME), "who was judged knows the score"
    assert script.asked == oracle_script.asked
    assert_batches_hold_the_waiting(batches, script.asked, len(pairs))
    never = set() if simulated else {NO_ANSWER}
    counts = Counter(rollout.outcome for rollout in found)
    assert set(counts) == set(act.OUTCOMES) - never and min(counts.values()) > 5


def oracle_of_evaluation(i, script, max_turns, said=(), actions=()):
    """The rest of an evaluated conversation, by recursion: what is kept of it; of a failure what was said."""
    failed = {"inferred_action": None, "questions": 0, "final_answer": None, "exact_match": 0.0, "f1": 0.0, "ended": True}
    response = script.policy(i, list(said))
    if not response:
        return {"trajectory": list(said), **failed}
    said, action = [*said, ("model", response[0])], script.classifier(i, response[0])
    if action is None:
        return {"trajectory": said, **failed}
    actions = [*actions, action]
    if action == ANSWER or not response[1] or len(actions) == max_turns:
        answer = response[0] if response[1] and action == ANSWER else None
        score = 0.0 if answer is None else script.heuristic(answer, f"gold {i}")
        return {"trajectory": said, "inferred_action": actions[0], "questions": actions.count(CLARIFY),
                "final_answer": answer, "exact_match": 0.0, "f1": score, "ended": response[1]}  # fmt: skip
    reply = script.user(i, said)
    if reply is None:
        return {"trajectory": said, **failed}
    return oracle_of_evaluation(i, script, max_turns, [*said, ("user", reply)], actions)


@pytest.mark.parametrize("max_turns", [1, 2, 3])
def test_evaluated_conversations_equal_the_oracle(max_turns):
    pairs, oracle_script, script = random_pairs(1000, 0), Script(f"e{max_turns}"), Script(f"e{max_turns}")
    expected = [oracle_of_evaluation(i, oracle_script, max_turns) for i in range(len(pairs))]
    results, batches = lockstep([act.play_turn(pair, max_turns) for pair in pairs], script)
    assert [{key: result[key] for key in expected[0]} for result in results] == expected
    assert script.asked == oracle_script.asked
    assert_batches_hold_the_waiting(batches, script.asked, len(pairs))
    usable = [result for result in results if result["inferred_action"]]
    assert {len(result["trajectory"]) // 2 + 1 for result in usable} == set(range(1, max_turns + 1))
    assert len(usable) < len(results) and {result["final_answer"] is None for result in usable} == {True, False}


def test_an_evaluated_conversation_goes_on_after_a_needless_question():
    pairs = [a_pair(ANSWER), a_pair(ANSWER), a_pair(CLARIFY)]
    replies, seen = {0: ["a?", "b?", "c"], 1: ["d"], 2: ["e?", "f?", "g?"]}, []

    def respond(rows, trajectories):
        seen.append(rows)
        return [(replies[row][len(said) // 2], True) for row, said in zip(rows, trajectories, strict=True)]

    def classify(rows, texts):
        return data.rule_actions(texts)

    answers = {"respond": respond, "classify": classify, "simulate": lambda rows, _: [f"u{row}" for row in rows]}
    answers["score"] = lambda rows, _: [(1.0, 0.5)] * len(rows)
    found = act.in_lockstep([act.play_turn(pair, 3) for pair in pairs], answers)
    assert seen == [[0, 1, 2], [0, 2], [0, 2]]
    assert [text for _, text in found[0]["trajectory"]] == ["a?", "u0", "b?", "u0", "c"]
    kept = [(turn["inferred_action"], turn["questions"], turn["final_answer"], turn["f1"]) for turn in found]
    assert kept == [(CLARIFY, 2, "c", 0.5), (ANSWER, 0, "d", 0.5), (CLARIFY, 3, None, 0.0)]


def test_an_answer_list_of_another_length_is_an_error():
    """A helper that drops an answer must not shift those of the others."""
    conversations = [act.act_pair(a_pair(), 0.5, 3) for _ in range(3)]
    with pytest.raises(ValueError, match="shorter"):
        act.in_lockstep(conversations, {"respond": lambda rows, _: [("x", True)] * 2})


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("prompt_format", FORMATS)
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_batched_conversations_equal_generation_from_scratch(tokenizer, pairs, prompt_format, greedy):
    """A batch, its cache kept across turns, against each row alone, all its tokens computed anew each turn."""
    template = Template(tokenizer, prompt_format)
    training = training_of(temperature=1.3, top_k=60, top_p=0.95, max_turns=4)
    batch, model = prompted(pairs[:9], template), random_model()
    if prompt_format == "gemma":
        model.norm.weight.data.normal_(-1, 1)  # else its greedy replies are newlines only, which are no end here
    turns = [1, 4, 2, 3, 1, 4, 2, 1, 3]  # responses of each row until one is taken for an answer
    noise = None if greedy else act.noise_generators(5, 7, range(len(batch)))
    sampler, called, flags = act.sampler(model, template, batch, training, noise), [], {}

    def respond(rows, trajectories):
        called.append(len(rows))
        replies = sampler(rows, trajectories)
        for row, (_, ended) in zip(rows, replies, strict=True):
            flags.setdefault(row, []).append(ended)
        return [(text, True) for text, _ in replies]  # as if all had come to their end: every row plays on

    def classify(rows, texts):
        return [ANSWER if turns[row] == len(called) else CLARIFY for row in rows]

    def user(rows, trajectories):
        return [f"For {row} {said[-1][1][:3]}." for row, said in zip(rows, trajectories, strict=True)]

    answers = {"respond": respond, "classify": classify, "simulate": user}
    answers["score"] = lambda rows, _: [(0.0, 0.0)] * len(rows)
    found = act.in_lockstep([act.play_turn(pair, training.max_turns) for pair in batch], answers)
    assert called == [9, 6, 4, 2]

    sampling = {"temperature": 0.0} if greedy else {"temperature": 1.3, "top_k": 60, "top_p": 0.95}
    for row, pair in enumerate(batch):
        [generator], said, ended = act.noise_generators(5, 7, [row]), [], []
        for turn in range(turns[row]):
            said += [("user", *user([row], [said]))] if turn else []
            prompt = template.prompt(pair.context, pair.history + said, 10**6)
            options = {"stop_ids": template.stop_ids, "generator": [generator], **sampling}
            [tokens] = generate(model, [prompt], training.max_new_tokens, **options)
            said.append(("model", template.text(tokens)))
            ended.append(len(tokens) < training.max_new_tokens)
        assert found[row]["trajectory"] == said and flags[row] == ended
    spoken = {text for turn in found for role, text in turn["trajectory"] if role == "model"}
    assert len(spoken) > 3, "they should differ"


def test_a_later_turn_computes_only_what_was_said_since(plain, pairs):
    """Each row goes on from its own cache: not a token of its prompt is read again."""
    batch, model, widths = prompted(pairs[:9], plain), random_model(), []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    sampler = act.sampler(model, plain, batch, training_of())
    said = {row: [(role, "rome.") for role in ("model", "user")] for row in range(9)}
    sampler(range(9), [[] for _ in range(9)])
    assert widths[0] > 50
    for rows in ([1, 4, 5, 8], [4, 8]):  # those that finish leave the batch
        widths.clear()
        sampler(rows, [said[row] for row in rows])
        assert 0 < widths[0] <= max(len(plain.following(said[row])) for row in rows)
        for row in rows:
            said[row] = said[row] * 2


def test_noise_is_keyed_by_seed_step_and_position():
    def draw(generators):
        return [torch.rand(1, generator=generator).item() for generator in generators]

    base = draw(act.noise_generators(1, 2, range(4)))
    keys = [random.Random(f"1/2/{position}").getrandbits(62) for position in range(4)]
    assert base == draw([torch.Generator().manual_seed(key) for key in keys]), "the draws of all former runs"
    assert draw(act.noise_generators(1, 2, range(2, 4))) == base[2:], "a rank's part is the part of the whole"
    others = draw(act.noise_generators(2, 2, range(4))) + draw(act.noise_generators(1, 3, range(4)))
    assert len({*base, *others}) == 12
    several = draw(act.noise_generators(1, 2, range(4), samples=3))
    assert several[::3] == base and len(set(several)) == 12, "the first of several samples is that of one"


# ----------------------------------------------------------------------------------------------------------------------
# Several samples


def sampled(pair, outcome, text="new"):
    """A rollout of this outcome, made as Algorithm 2 makes it."""
    said = [("model", f"{text}?"), ("user", "u"), ("model", text)]
    if outcome in (SAME_TEXT, HELPER_FAILED):
        return act.Rollout(pair, pair, said, outcome)
    return act.contrast(pair, said, outcome, 0.5)


def test_of_several_samples_the_first_win_meets_the_first_loss():
    pair = a_pair()
    bad, cut, good, better, late = (
        sampled(pair, outcome, f"sample {i}")
        for i, outcome in enumerate((BAD_OUTCOME, CUT_OFF, GOOD_OUTCOME, GOOD_OUTCOME, BAD_OUTCOME))
    )
    for order, chosen, rejected in (
        ([bad, good], good, bad), ([good, bad], good, bad), ([better, late, good, bad, cut], better, late),
        ([cut, good, bad], good, cut), ([good, better], good, None), ([bad, late], None, bad),
    ):  # fmt: skip
        group = [replace(rollout) for rollout in order]
        new = act.best_contrast(group)
        assert new.chosen == (chosen.trajectory if chosen else pair.chosen)
        assert new.rejected == (rejected.trajectory if rejected else pair.rejected)
        assert new.cut == (rejected is cut), "the losing side breaks off where its sample does"
        taken = [rollout.trajectory for rollout in group if rollout.replaced]
        assert sorted(taken) == sorted(each.trajectory for each in (chosen, rejected) if each)


def test_of_samples_that_tell_nothing_the_pair_stays():
    pair = a_pair()
    same, failed = sampled(pair, SAME_TEXT), sampled(pair, HELPER_FAILED)
    assert act.best_contrast([same, failed]) is pair
    good, bad = sampled(pair, GOOD_OUTCOME, "it is"), sampled(pair, CUT_OFF, "it  is")
    assert act.best_contrast([good, bad]) is pair, "the same words on both sides: the loser was cut off, say"
    assert good.replaced is bad.replaced is None
    assert act.best_contrast([same, good := sampled(pair, GOOD_OUTCOME)]) == good.pair and good.replaced == "chosen"


def oracle_of_choice(group, pair):
    """The two sides told by outcomes: (chosen, rejected, cut, indices of the samples taken)."""
    wins = [i for i, rollout in enumerate(group) if rollout.outcome == GOOD_OUTCOME]
    lost = (WRONG_ACTION, BAD_OUTCOME, NO_ANSWER, CUT_OFF)
    losses = [i for i, rollout in enumerate(group) if rollout.outcome in lost]
    chosen = group[wins[0]].trajectory if wins else pair.chosen
    rejected = group[losses[0]].trajectory if losses else pair.rejected
    cut = bool(losses) and group[losses[0]].outcome == CUT_OFF
    if " ".join(f"{who} {text}" for who, text in chosen).split() == " ".join(f"{w} {t}" for w, t in rejected).split():
        return pair.chosen, pair.rejected, False, set()
    return chosen, rejected, cut, {*wins[:1], *losses[:1]}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_choosing_among_samples_equals_the_oracle(count):
    """One sample is Algorithm 2 itself; several are played side by side by the same script."""
    pairs = random_pairs(600, 7)
    examples = [pair for pair in pairs for _ in range(count)]
    rollouts, _ = lockstep([act.act_pair(pair, 0.5, 2) for pair in examples], Script(f"samples {count}"))
    seen = Counter()
    for i, pair in enumerate(pairs):
        group = rollouts[count * i : count * (i + 1)]
        before = [replace(rollout) for rollout in group]
        chosen, rejected, cut, taken = oracle_of_choice(group, pair)
        new = act.best_contrast(group)
        assert (new.chosen, new.rejected, new.cut) == (chosen, rejected, cut)
        assert replace(new, chosen=pair.chosen, rejected=pair.rejected, cut=False) == pair
        if count == 1:
            assert new == before[0].pair and group == before, "as before, to the bit"
        for k, (rollout, old) in enumerate(zip(group, before, strict=True)):
            assert rollout == replace(old, replaced=old.replaced if k in taken else None)
        seen[len(taken)] += 1
    assert set(seen) == set(range(min(count, 2) + 1)) and min(seen.values()) > 5


@pytest.mark.parametrize(
    ("simulated", "samples", "together"), [(True, 1, 24), (True, 1, 10), (False, 1, 24), (True, 3, 7)],
    ids=["simulated", "in parts", "alone", "three"],
)  # fmt: skip
def test_a_batch_on_policy_equals_each_example_alone(
    world, mesh, plain, pairs, monkeypatch, simulated, samples, together
):
    """on_policy's pairs, counts and log, against the oracle played by the same model from scratch, a sample at a time."""
    training = training_of(temperature=0.7, max_turns=2, max_new_tokens=4, seed=3, simulate_user=simulated,
                           num_generations=samples, per_device_eval_batch_size=together)  # fmt: skip
    sizes, inner = [], act.in_lockstep
    monkeypatch.setattr(act, "in_lockstep", lambda turns, *rest: sizes.append(len(turns)) or inner(turns, *rest))
    config = act.Config(data_config=act.DataConfig(tolerance=0.0), training_config=training)
    run = run_of(act.build_model(model_config(world), mesh), None, plain, training)
    run.config, run.helpers = config, act.Helpers(config, {})
    batch, positions, model = prompted(pairs[: 24 // samples], plain), range(100, 100 + 24 // samples), random_model()
    found, counts, rows = act.on_policy(run, batch, 5, positions)
    assert sum(sizes) == 24 and max(sizes) == together, "of memory for so many samples at once"

    class Played(Script):
        def policy(self, i, said):
            prompt = plain.prompt(batch[i].context, batch[i].history + said, 10**6)
            if not said:
                self.noise = act.noise_generators(3, 5, [positions[i]], samples)[self.seed]
            options = {"stop_ids": plain.stop_ids, "generator": [self.noise], "temperature": 0.7}
            [tokens] = generate(model, [prompt], 4, **options)
            return plain.text(tokens), len(tokens) < 4

        def classifier(self, i, text):
            return data.rule_actions([text])[0]

        def user(self, i, said):
            return data.rule_users([(batch[i], said, "")])[0]

        def heuristic(self, text, target):
            return data.drop_f1(text, target)[1]

    outcomes, both = Counter(), 0
    for i, (pair, new) in enumerate(zip(batch, found, strict=True)):
        group = []
        for n in range(samples):
            chosen, rejected, cut, outcome = oracle_of_training(i, pair, Played(n), 0.0, 2, simulated)
            told = rows[samples * i + n]
            assert (told["step"], told["where"], told["history"]) == (6, pair.where, pair.history)
            assert (told["action"], told["target"], told["outcome"]) == (pair.action, pair.target, outcome)
            sides = {GOOD_OUTCOME: chosen, SAME_TEXT: told["trajectory"]}
            assert told["trajectory"] == sides.get(outcome, rejected)
            assert (told["score"] is None) or data.drop_f1(told["trajectory"][-1][1], pair.target)[1] == told["score"]
            group.append(act.Rollout(pair, replace(pair, cut=cut), told["trajectory"], outcome))
            outcomes[outcome] += 1
        chosen, rejected, cut, taken = oracle_of_choice(group, pair)
        assert (new.chosen, new.rejected, new.cut) == (chosen, rejected, cut)
        sides = ["chosen" if rollout.outcome == GOOD_OUTCOME else "rejected" for rollout in group]
        replaced = [row["replaced"] for row in rows[samples * i : samples * (i + 1)]]
        assert replaced == [side if n in taken else None for n, side in enumerate(sides)]
        both += len(taken) == 2
    expected = {f"act/{outcome}": outcomes[outcome] for outcome in act.OUTCOMES}
    assert counts == expected | ({"act/both_sides_own": both} if samples > 1 else {})
    assert outcomes[CUT_OFF] and len(outcomes) > 2 and bool(both) == (samples > 1)


