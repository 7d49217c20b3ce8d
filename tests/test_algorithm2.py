"""Algorithm 2 against an oracle on random scripts, its outcomes in words, its batches, and the policy's samples."""

import copy
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from common import FORMATS, a_pair, random_model, run_of, training_of

import act
import data
from act import BAD_OUTCOME, CUT_OFF, GOOD_OUTCOME, HELPER_FAILED, NO_ANSWER, SAME_TEXT, WRONG_ACTION, Sampler, Template
from data import ANSWER, CLARIFY
from gemma import generate


def play_out(conversation, **answers):
    """One conversation by callables of one request; None where any of them gives None."""
    one = {what: lambda rows, requests, answer=answer: [answer(requests[0])] for what, answer in answers.items()}
    [found] = act.in_lockstep([conversation], one)
    return found


def play(pair, replies, users=(), score=0.0, max_turns=3, tolerance=0.5, simulate_user=True):
    """act_pair with scripted replies: one that ends in "?" asks, one in "..." is cut off.

    Returns (pair, outcome, number of replies used).
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
    return *play_out(conversation, respond=respond, score=judge, **actions), len(said)


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
    results, batches = lockstep(conversations, script)
    found = [result or (pair, HELPER_FAILED) for result, pair in zip(results, pairs, strict=True)]
    for (new, outcome), wanted, old in zip(found, expected, pairs, strict=True):
        assert (new.chosen, new.rejected, new.cut, outcome) == wanted
        assert replace(new, chosen=old.chosen, rejected=old.rejected, cut=False) == old
    assert script.asked == oracle_script.asked
    assert_batches_hold_the_waiting(batches, script.asked, len(pairs))
    never = set() if simulated else {NO_ANSWER}
    assert {outcome for _, outcome in found} == set(act.OUTCOMES) - never
    assert min(Counter(outcome for _, outcome in found).values()) > 5


def oracle_of_evaluation(i, script, max_turns, said=(), actions=()):
    """The rest of an evaluated conversation, by recursion: what is kept of it, or None for a failure."""
    response = script.policy(i, list(said))
    action = script.classifier(i, response[0]) if response else None
    if action is None:
        return None
    said, actions = [*said, ("model", response[0])], [*actions, action]
    if action == ANSWER or not response[1] or len(actions) == max_turns:
        answer = response[0] if response[1] and action == ANSWER else None
        score = 0.0 if answer is None else script.heuristic(answer, f"gold {i}")
        return {"trajectory": said, "inferred_action": actions[0], "questions": actions.count(CLARIFY),
                "final_answer": answer, "exact_match": 0.0, "f1": score}  # fmt: skip
    reply = script.user(i, said)
    return None if reply is None else oracle_of_evaluation(i, script, max_turns, [*said, ("user", reply)], actions)


@pytest.mark.parametrize("max_turns", [1, 2, 3])
def test_evaluated_conversations_equal_the_oracle(max_turns):
    pairs, oracle_script, script = random_pairs(1000, 0), Script(f"e{max_turns}"), Script(f"e{max_turns}")
    expected = [oracle_of_evaluation(i, oracle_script, max_turns) for i in range(len(pairs))]
    results, batches = lockstep([act.play_turn(pair, max_turns) for pair in pairs], script)
    assert results == expected
    assert script.asked == oracle_script.asked
    assert_batches_hold_the_waiting(batches, script.asked, len(pairs))
    assert {len(result["trajectory"]) // 2 + 1 for result in results if result} == set(range(1, max_turns + 1))
    assert None in results and {result["final_answer"] is None for result in results if result} == {True, False}


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
    batch, model = pairs[:9], random_model()
    if prompt_format == "gemma":
        model.norm.weight.data.normal_(-1, 1)  # else its greedy replies are newlines only, which are no end here
    turns = [1, 4, 2, 3, 1, 4, 2, 1, 3]  # responses of each row until one is taken for an answer
    noise = None if greedy else act.noise_generators(5, 7, range(len(batch)))
    sampler, called, flags = Sampler(model, template, batch, training, noise), [], {}

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


def test_a_later_turn_computes_only_what_was_said_since(plain, pairs, monkeypatch):
    """Each row goes on from its own cache: not a token of its prompt is read again."""
    read, advance = [], act.KVCache.advance

    def recorded(cache, model, new, room=1):
        if room > 1:  # what begins a reply
            read.append([list(tail) for tail in new])
        return advance(cache, model, new, room)

    monkeypatch.setattr(act.KVCache, "advance", recorded)
    sampler = Sampler(random_model(), plain, pairs[:9], training_of())
    said = {row: [(role, "rome.") for role in ("model", "user")] for row in range(9)}
    sampler(range(9), [[] for _ in range(9)])
    for rows in ([1, 4, 5, 8], [4, 8]):  # those that finish leave the batch
        sampler(rows, [said[row] for row in rows])
        for row, tail in zip(rows, read.pop(), strict=True):
            assert 0 < len(tail) <= len(plain.following(said[row]))
        for row in rows:
            said[row] = said[row] * 2


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_a_batch_without_the_memory_is_halved_and_says_the_same(plain, pairs, monkeypatch, capsys, limit):
    """In the first turn or in a later one, with the same noise; a batch of one raises."""
    def talk(limits):
        sampler = Sampler(random_model(), plain, pairs[:9], training_of(temperature=1.3), act.noise_generators(1, 1, range(9)))
        said = {row: [] for row in range(9)}
        for rows, most in zip((range(9), [1, 2, 4, 5, 8], [2, 8]), limits, strict=True):
            def bounded(model, prompts, *args, most=most, **options):
                tokens = generate(model, prompts, *args, **options)  # the noise is drawn before memory ends
                if len(prompts) > most:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return tokens

            monkeypatch.setattr(act, "generate", bounded)
            for row, (text, ended) in zip(rows, sampler(rows, [said[row] for row in rows]), strict=True):
                said[row] += [("model", text), ("user", f"{row} {ended}")]
        return said

    expected = talk([9, 9, 9])
    assert capsys.readouterr().out == ""
    assert talk([limit, 9, 9]) == talk([9, limit, limit]) == talk([limit] * 3) == expected
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "no memory to continue 9 conversations at once: going on with 4"
    with pytest.raises(torch.OutOfMemoryError):
        talk([0, 9, 9])


def test_noise_is_keyed_by_seed_step_and_position():
    def draw(generators):
        return [torch.rand(1, generator=generator).item() for generator in generators]

    base = draw(act.noise_generators(1, 2, range(4)))
    assert draw(act.noise_generators(1, 2, range(2, 4))) == base[2:], "a rank's part is the part of the whole"
    others = draw(act.noise_generators(2, 2, range(4))) + draw(act.noise_generators(1, 3, range(4)))
    assert len({*base, *others}) == 12


@pytest.mark.parametrize("simulated", [True, False], ids=["simulated", "alone"])
def test_a_batch_on_policy_equals_each_example_alone(world, mesh, plain, pairs, simulated):
    """on_policy's pairs and counts, against the oracle played by the same model from scratch, an example at a time."""
    training = training_of(temperature=0.7, max_turns=2, max_new_tokens=4, seed=3, simulate_user=simulated)
    config = act.Config(data_config=act.DataConfig(tolerance=0.0), training_config=training)
    run = run_of(act.build_model(world / "model", mesh, torch.float32), None, plain, training)
    run.config, run.helpers = config, act.build_helpers(config)
    batch, positions, model = pairs[:24], range(100, 124), random_model()
    found, counts, samples = act.on_policy(run, batch, 5, positions)
    assert [new for *_, new, _ in samples] == found and [pair for pair, *_ in samples] == batch

    class Played(Script):
        def policy(self, i, said):
            prompt = plain.prompt(batch[i].context, batch[i].history + said, 10**6)
            if not said:
                [self.noise] = act.noise_generators(3, 5, [positions[i]])
            options = {"stop_ids": plain.stop_ids, "generator": [self.noise], "temperature": 0.7}
            [tokens] = generate(model, [prompt], 4, **options)
            return plain.text(tokens), len(tokens) < 4

        def classifier(self, i, text):
            return data.rule_actions([text])[0]

        def user(self, i, said):
            return data.rule_users([(batch[i], said, "")])[0]

        def heuristic(self, text, target):
            return data.drop_f1(text, target)[1]

    outcomes = Counter()
    for i, (pair, new) in enumerate(zip(batch, found, strict=True)):
        chosen, rejected, cut, outcome = oracle_of_training(i, pair, Played(0), 0.0, 2, simulated)
        assert (new.chosen, new.rejected, new.cut) == (chosen, rejected, cut)
        outcomes[outcome] += 1
    assert counts == {f"act/{outcome}": outcomes[outcome] for outcome in act.OUTCOMES}
    assert outcomes[CUT_OFF] and len(outcomes) > 2
