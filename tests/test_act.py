"""act.py: trie scoring, the loss, Algorithm 2, prompts, configuration and whole runs, each against an oracle or written-out values."""

import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import act
import data
import gemma
from act import Config, DataConfig, DataOrder, Pair, PolicyModelConfig, Sampler, Scored, Template, TrainingConfig, dpo_loss, load_config
from data import ANSWER, CLARIFY
from gemma import Forest, Gemma2, Gemma2Config, Tokenizer, TokenLogps, generate

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny"
WINDOW = 8  # of the random models here; all prompts are longer
VOCABULARY = 416


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are far too small for more than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY / "tokenizer.model")


def random_model(seed=4):
    """Three layers, of random weights, that like to say "?" and to end a line: an assistant that talks nonsense and sometimes asks.

    With some seeds it never asks; the tests that need its questions say so when it does not.
    """
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW, attn_logit_softcapping=4.0, final_logit_softcapping=12.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Gemma2(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(std=0.3)
            elif "self_attn" in name:
                weight *= 2
        model.embed_tokens.weight[:, 0] = 0.3
        model.embed_tokens.weight[[6, 265], 0] = torch.tensor([0.95, 0.9])  # newline and "?"
        model.norm.weight[0] = 6.0
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return random_model()


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with model/, train.jsonl (3 conversations) and validation.jsonl (2, cut short)."""
    folder = tmp_path_factory.mktemp("world")
    random_model().save_pretrained(folder / "model")
    shutil.copyfile(TINY / "tokenizer.model", folder / "model" / "tokenizer.model")
    rows = [json.loads(line) for line in (TINY / "train.jsonl").read_text(encoding="utf-8").splitlines()[:5]]
    write_lines(folder / "train.jsonl", rows[:3])
    cut = [{"messages": row["messages"][:1 + 2 * turns]} for row, turns in zip(rows[3:], (2, 5), strict=True)]
    write_lines(folder / "validation.jsonl", cut)
    return folder


@pytest.fixture
def one_process():
    """A process group of this process alone, as `python act.py` makes one."""
    yield act.start_processes()
    dist.destroy_process_group()


@pytest.fixture
def mesh(one_process):
    return act.make_mesh(one_process, 1)


def records_of(path):
    return data.ACTDataset(data.read_vertex_jsonl(path), CLARIFY, 2).prepare_datasets()


@pytest.fixture(scope="module")
def pairs():
    """All turns of three dialogues of the tiny world, in order."""
    conversations = data.read_vertex_jsonl(TINY / "train.jsonl")[:3]
    return act.make_pairs(data.ACTDataset(conversations, CLARIFY, 2).prepare_datasets(), "train.jsonl")


def training_of(**values):
    return TrainingConfig(**{"max_length": 1000, "max_prompt_length": 900, "max_new_tokens": 6, **values})


def both_sides(pairs, template, training):
    return [act.sequence_of(pair, side, template, training) for pair in pairs for side in (pair.chosen, pair.rejected)]


def a_pair(action=CLARIFY, chosen="right?", rejected="wrong", target="gold", **values):
    """A pair for Algorithm 2, its sides of one message each."""
    defaults = {"context": "", "history": [("user", "hello")], "gold": [("model", "gold?")], "instruction": data.INSTRUCTION, "record": {}}
    return Pair(action=action, chosen=[("model", chosen)], rejected=[("model", rejected)], target=target, **{**defaults, **values})


# ---------------------------------------------------------------------------------------------------------------------------------
# Trie scoring: log-probabilities of a Forest, against one row per sequence


def oracle_logps(model, sequences):
    """Each sequence alone in its row, through the whole vocabulary's log_softmax."""
    sums = []
    for prompt, reply, mask in sequences:
        logps = model(torch.tensor([prompt + reply]))[0].log_softmax(-1)
        sums.append(sum(logps[len(prompt) + j - 1, reply[j]] for j in range(len(reply)) if mask[j]))
    return torch.stack(sums)


def gradients(model, logps):
    """Of a sum with a weight for each sequence, so that no two of them can be taken for each other."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        assert expected[name].norm() > 0, name
        assert (found[name] - expected[name]).norm() <= tolerance * expected[name].norm(), name


def assert_scored_exactly(model, sequences):
    scored = Scored(sequences, "cpu")
    logps, expected = scored.logps(model), oracle_logps(model, sequences)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, logps), gradients(model, expected))
    assert scored.lengths.tolist() == [sum(mask) for *_, mask in sequences]
    return scored


def words(seed, count):
    return torch.randint(7, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("prompt_format", ["plain", "gemma"])
def test_pairs_on_one_prompt_score_as_separate_rows(model, tokenizer, pairs, prompt_format):
    template = Template(tokenizer, prompt_format)
    sequences = both_sides([pairs[0], pairs[9]], template, training_of())
    assert min(len(prompt) for prompt, *_ in sequences) > 2 * WINDOW
    scored = assert_scored_exactly(model, sequences)
    assert scored.used < sum(len(prompt) + len(reply) for prompt, reply, _ in sequences) - 2 * WINDOW, "the prompts are not shared"


def test_all_turns_of_whole_dialogues_score_as_separate_rows(model, tokenizer, pairs):
    sequences = both_sides(pairs, Template(tokenizer, "plain"), training_of())
    scored = assert_scored_exactly(model, sequences)
    assert 5 * scored.used < sum(len(prompt) + len(reply) for prompt, reply, _ in sequences)


def test_user_tokens_count_with_loss_on_all_and_only_then(model, tokenizer, pairs):
    [pair] = [pair for pair in pairs if len(pair.chosen) == 3][:1]
    template = Template(tokenizer, "plain")
    everything, assistant = (act.sequence_of(pair, pair.chosen, template, training_of(loss_on=on)) for on in ("all", "assistant"))
    assert everything[:2] == assistant[:2]
    assert everything[2] == [1] * len(everything[1]) and 0 < sum(assistant[2]) < len(assistant[2])
    assert_scored_exactly(model, [everything, assistant])


ODD_BATCHES = {
    "nothing shared": [(words(i, 12 + i), words(10 + i, 3 + i), [1] * (3 + i)) for i in range(4)],
    "one a prefix of another": [(words(0, 12), words(1, 9), [1] * 9), (words(0, 12), words(1, 9)[:4], [1] * 4), (words(2, 3), [9], [1])],
    "identical": [(words(0, 12), words(1, 5), [1] * 5)] * 3,
    "identical tokens, different masks": [(words(0, 12), words(1, 5), mask) for mask in ([1, 0, 1, 0, 1], [0, 1, 1, 1, 0])],
    "prompt of one token": [([2], words(1, 11), [1] * 11), ([2], words(3, 4), [1] * 4)],
    "reply of one": [([2, 9], [7], [1]), ([3], [7], [1])],
    "prompt cut elsewhere": [(words(0, 12), words(1, 5), [1] * 5), (words(0, 12) + words(1, 5)[:2], words(1, 5)[2:], [1] * 3)],
}


@pytest.mark.parametrize("sequences", ODD_BATCHES.values(), ids=ODD_BATCHES)
def test_odd_batches_score_as_separate_rows(model, sequences):
    assert_scored_exactly(model, sequences)


def test_the_order_of_sequences_only_permutes_their_logps(model, tokenizer, pairs):
    sequences = both_sides(pairs[:5], Template(tokenizer, "plain"), training_of())
    order = random.Random(0).sample(range(len(sequences)), len(sequences))
    with torch.no_grad():
        logps, shuffled = (Scored(rows, "cpu").logps(model) for rows in (sequences, [sequences[i] for i in order]))
    torch.testing.assert_close(shuffled, logps[order], rtol=1e-6, atol=1e-5)


def test_forest_of_a_written_out_batch():
    """5 6 7 is shared by three; 5 6 7 8 is the beginning of another; 9 9 9 9 has a row's remainder to itself."""
    forest = Forest([[5, 6, 7, 8, 1], [5, 6, 7, 4, 4], [9, 9, 9, 9], [5, 6, 7, 8]])
    # sorted: 5 6 7 4 4 | 5 6 7 8 | 5 6 7 8 1 | 9 9 9 9
    assert forest.tokens.tolist() == [[5, 6, 7, 4, 4, 8, 1], [9, 9, 9, 9, 0, 0, 0]]
    assert forest.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4], [0, 1, 2, 3, 0, 0, 0]]
    assert forest.ends.tolist() == [[7, 7, 7, 5, 5, 7, 7], [4, 4, 4, 4, 5, 6, 7]]
    paths = [(row, slots.tolist()) for row, slots in forest.paths]
    assert paths == [(0, [0, 1, 2, 5, 6]), (0, [0, 1, 2, 3, 4]), (1, [0, 1, 2, 3]), (0, [0, 1, 2, 5])]
    assert forest.padding == pytest.approx(3 / 14)


def test_rows_are_longer_than_the_longest_trie_where_that_leaves_less_empty():
    """Sizes 6, 5, 3, 2: rows of 6 would be three, a ninth of them empty; two rows of 8 hold 6 + 2 and 5 + 3."""
    forest = Forest([[size] * size for size in (6, 5, 3, 2)])
    assert forest.tokens.tolist() == [[6] * 6 + [2] * 2, [5] * 5 + [3] * 3]
    assert forest.padding == 0
    assert Forest([[1] * 6, [2] * 4]).tokens.shape == (2, 6), "a row of 10 is more than half longer"
    assert Forest([[9 + i] * size for i, size in enumerate((32, 30, 3, 3))]).tokens.shape == (2, 35), "rows end where the fullest one does"


def test_small_tries_share_a_row():
    forest = Forest([[5, 6, 7, 8, 9], [1, 2], [3, 4, 4]])
    assert forest.tokens.tolist() == [[5, 6, 7, 8, 9], [3, 4, 4, 1, 2]]
    assert forest.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert forest.ends.tolist() == [[5] * 5, [3, 3, 3, 5, 5]]
    assert [(row, slots.tolist()) for row, slots in forest.paths] == [(0, [0, 1, 2, 3, 4]), (1, [3, 4]), (1, [0, 1, 2])]
    assert forest.padding == 0


def test_every_sequence_is_found_along_its_path(tokenizer, pairs):
    sequences = [prompt + reply for prompt, reply, _ in both_sides(pairs, Template(tokenizer, "plain"), training_of())]
    forest = Forest(sequences)
    for sequence, (row, slots) in zip(sequences, forest.paths, strict=True):
        assert forest.tokens[row, slots].tolist() == sequence
        assert forest.positions[row, slots].tolist() == list(range(len(sequence)))
        assert (forest.ends[row, slots] > slots[-1]).all(), "each token is seen by all that come after it"


def test_an_empty_sequence_is_refused():
    with pytest.raises(gemma.InputError, match="empty"):
        Forest([[1], []])


def small_chunks(monkeypatch, rows):
    """Let TokenLogps take `rows` tokens at a time."""
    whole = TokenLogps.chunks
    monkeypatch.setattr(TokenLogps, "chunks", staticmethod(lambda h, e: whole(h, e, entries=rows * len(e))))


@pytest.mark.parametrize("rows", [1, 3])
def test_chunks_of_the_vocabulary_change_nothing(monkeypatch, model, rows):
    sequences = ODD_BATCHES["nothing shared"]
    once = Scored(sequences, "cpu").logps(model)
    expected = gradients(model, once)
    small_chunks(monkeypatch, rows)
    assert len(TokenLogps.chunks(torch.zeros(7, 1), torch.zeros(VOCABULARY, 1))) == math.ceil(7 / rows)
    chunked = Scored(sequences, "cpu").logps(model)
    torch.testing.assert_close(chunked, once, rtol=1e-6, atol=1e-6)
    assert_same_gradients(gradients(model, chunked), expected)


class WidestLogits(TorchDispatchMode):
    """The most rows of a tensor that is as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] == VOCABULARY and x.shape[0] != 32:  # 32: the transposed embedding
                self.rows = max(self.rows, x.numel() // VOCABULARY)
        return result


def test_a_training_step_never_holds_the_logits_of_all_tokens(monkeypatch, model, tokenizer, pairs):
    monkeypatch.setattr(Gemma2, "logits", lambda *_: pytest.fail("the logits of every token"))
    small_chunks(monkeypatch, 4)
    with WidestLogits() as widest:
        act.preference_step(copy.deepcopy(model), model, Template(tokenizer, "plain"), pairs[:6], 1.0, training_of(), "cpu")
    assert widest.rows == 4


# ---------------------------------------------------------------------------------------------------------------------------------
# The loss


def margin_of(m, **options):
    """The loss of a pair whose margin is m: ratios of m + 1 for chosen and 1 for rejected."""
    columns = [torch.tensor([x]) for x in (m + 1 - 5.0, 1 - 7.0, -5.0, -7.0)]
    losses, chosen, rejected = dpo_loss(*columns, **options)
    return losses.item(), chosen.item(), rejected.item()


@pytest.mark.parametrize(("options", "expected"), [
    ({"beta": 0.5}, math.log(1 + math.exp(-1))),  # -log sigmoid(0.5 * 2)
    ({"beta": 0.5, "label_smoothing": 0.1}, 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1))),
    ({"beta": 0.5, "loss_type": "hinge"}, 0.0),
    ({"beta": 0.1, "loss_type": "hinge"}, 0.8),
    ({"beta": 0.5, "loss_type": "ipo"}, 1.0),  # (2 - 1)^2
    ({"beta": 0.1, "loss_type": "ipo"}, 9.0),  # (2 - 5)^2
])  # fmt: skip
def test_loss_of_a_margin_of_two(options, expected):
    loss, chosen, rejected = margin_of(2.0, **options)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (chosen, rejected) == (pytest.approx(3 * options["beta"]), pytest.approx(options["beta"]))


def test_sigmoid_loss_of_worked_numbers():
    """ln(1 + e^-1) = 0.313262, ln(1 + e^1) = 1.313262, ln(1 + e^50) = 50."""
    columns = [-3.0, -5.0, -110.0], [-6.0, -6.0, -10.0], [-4.0, -4.0, -10.0], [-5.0, -7.0, -10.0]
    losses, *_ = dpo_loss(*map(torch.tensor, columns), beta=0.5)
    torch.testing.assert_close(losses, torch.tensor([0.313262, 1.313262, 50.0]), rtol=1e-5, atol=1e-6)


def test_loss_is_ln2_when_policy_equals_reference():
    logps = torch.tensor([-3.0, -40.0])
    losses, chosen, rejected = dpo_loss(logps, logps - 5, logps, logps - 5, beta=0.7)
    torch.testing.assert_close(losses, torch.full((2,), math.log(2)))
    assert chosen.tolist() == rejected.tolist() == [0.0, 0.0]


def test_the_gradient_of_the_loss_is_beta_times_sigmoid():
    """d/dm -log sigmoid(beta m) = -beta sigmoid(-beta m); rewards carry no gradient."""
    chosen, rejected = torch.tensor([-3.0], requires_grad=True), torch.tensor([-6.0], requires_grad=True)
    losses, *rewards = dpo_loss(chosen, rejected, torch.tensor([-4.0]), torch.tensor([-5.0]), beta=0.5)
    losses.sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.5 / (1 + math.e)) and rejected.grad.item() == pytest.approx(0.5 / (1 + math.e))
    assert not any(reward.requires_grad for reward in rewards)


def test_an_unknown_loss_is_refused():
    with pytest.raises(data.InputError, match="'dpo', expected one of sigmoid, hinge, ipo"):
        margin_of(2.0, beta=0.1, loss_type="dpo")


def test_a_preference_step_is_the_loss_of_oracle_logps(tokenizer, pairs):
    """Losses, the chosen side's likelihood per token and what is logged, from one row per sequence."""
    training, template, policy = training_of(beta=0.3, rpo_alpha=0.4, label_smoothing=0.2), Template(tokenizer, "plain"), random_model(1)
    batch, reference_model = pairs[3:7], random_model()
    sequences = both_sides(batch, template, training)
    logps = oracle_logps(policy, sequences)
    with torch.no_grad():
        reference = oracle_logps(reference_model, sequences)
    ratios = (logps - reference).view(-1, 2)
    margin = 0.3 * (ratios[:, 0] - ratios[:, 1])
    likelihood = logps[::2] / torch.tensor([sum(mask) for *_, mask in sequences[::2]])
    losses = -0.8 * margin.sigmoid().log() - 0.2 * (-margin).sigmoid().log() - 0.4 * likelihood
    policy.zero_grad()
    (0.25 * losses.sum()).backward()
    expected = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    sums = act.preference_step(policy, reference_model, template, batch, 0.25, training, "cpu")
    assert_same_gradients({name: parameter.grad for name, parameter in policy.named_parameters()}, expected, 3e-5)
    assert all(parameter.grad is None for parameter in reference_model.parameters())
    rewards = 0.3 * ratios
    worked = {
        "loss": losses.sum(), "rewards/chosen": rewards[:, 0].sum(), "rewards/rejected": rewards[:, 1].sum(),
        "rewards/margins": margin.sum(),
        "rewards/accuracies": (margin > 0).sum(), "logps/chosen": logps[::2].sum(), "logps/rejected": logps[1::2].sum(),
    }  # fmt: skip
    assert sums.keys() - {"tokens"} == worked.keys()
    for key, value in worked.items():
        assert sums[key] == pytest.approx(value.item(), rel=1e-4, abs=1e-4), key


def test_an_sft_step_is_the_mean_likelihood_of_the_first_gold_reply(model, tokenizer, pairs):
    training, template, policy = training_of(), Template(tokenizer, "gemma"), copy.deepcopy(model)
    batch = pairs[:3]
    sequences = []
    for pair in batch:
        reply = tokenizer.encode(pair.gold[0][1]) + [tokenizer.end_of_turn_id]
        sequences.append((template.prompt(pair, 900), reply, [1] * len(reply)))
    expected = -oracle_logps(policy, sequences) / torch.tensor([len(reply) for _, reply, _ in sequences])
    policy.zero_grad()
    (0.5 * expected.sum()).backward()
    gradient = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    sums = act.sft_step(policy, template, batch, 0.5, training, "cpu")
    assert sums["loss"] == pytest.approx(expected.sum().item(), rel=1e-5)
    assert_same_gradients({name: parameter.grad for name, parameter in policy.named_parameters()}, gradient)


# ---------------------------------------------------------------------------------------------------------------------------------
# Algorithm 2


def play(pair, replies, users=(), score=0.0, max_turns=3, tolerance=0.5):
    """act_pair with scripted replies: a reply that ends in "?" asks. Returns (pair, outcome, number of replies used)."""
    replies, users, said = list(replies), list(users), []

    def respond(_, trajectory):
        assert len(trajectory) == 2 * len(said)
        said.append(replies.pop(0))
        return said[-1]

    def simulate(_, trajectory):
        assert trajectory[-1] == ("model", said[-1])
        return users.pop(0)

    def judge(text, target):
        assert (text, target) == (said[-1], pair.target)
        return score

    result = act.act_pair(pair, respond, lambda text: CLARIFY if text.endswith("?") else ANSWER, simulate, judge, tolerance, max_turns)
    return *result, len(said)


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
    assert new.rejected == whole[: 2 * max_turns - 1] and new.chosen == pair.chosen


@pytest.mark.parametrize(("action", "response", "outcome"), [
    (CLARIFY, "a?", "good_outcome"), (CLARIFY, "no", "wrong_action"), (ANSWER, "bad", "good_outcome"), (ANSWER, "a?", "wrong_action"),
])  # fmt: skip
def test_without_a_user_the_action_alone_decides(action, response, outcome):
    """judge "action": nothing is played on, and no answer is scored."""
    pair = a_pair(action, rejected="other")
    batched = act.act_pairs([pair], lambda rows, said: [response], data.rule_actions, None, lambda *_: 0.0, 0.5, 3)
    new, found = act.act_pair(pair, lambda *_: response, lambda text: data.rule_actions([text])[0], None, lambda *_: 0.0, 0.5, 3)
    side = new.chosen if outcome == "good_outcome" else new.rejected
    assert (found, side) == (outcome, [("model", response)]) and batched == ([new], [found])


def test_a_pair_whose_sides_become_equal_is_put_back():
    pair = a_pair(ANSWER, chosen="gold", rejected="what?")
    new, outcome, _ = play(pair, ["gold"], score=0.0)
    assert outcome == "same_text" and new == pair
    pair = a_pair(ANSWER, chosen="gold", rejected="good")
    new, outcome, _ = play(pair, ["good"], score=1.0)
    assert outcome == "same_text" and new == pair


def test_the_original_pair_is_left_as_it_was():
    pair = a_pair(CLARIFY)
    before = copy.deepcopy(pair)
    play(pair, ["no"])
    play(pair, ["a?", "b"], ["u"], score=1.0)
    assert pair == before


@pytest.mark.parametrize("max_turns", [1, 2, 3])
def test_batched_rollouts_equal_single_ones_in_every_outcome(max_turns):
    """200 random scripts, keyed by example and turn; a batch must hold the rows that are still asking and no other."""
    rng = random.Random(max_turns)
    pairs = [a_pair(rng.choice((CLARIFY, ANSWER)), rng.choice("ab"), rng.choice("xy"), target=f"gold {i}") for i in range(200)]
    replies = {pair.target: [rng.choice("abxy") + rng.choice(("", "", "?")) for _ in range(max_turns)] for pair in pairs}
    scores = {pair.target: rng.choice((0.0, 0.5, 1.0)) for pair in pairs}  # 0.5 is the tolerance
    calls = []

    def respond(pair, trajectory):
        return replies[pair.target][len(trajectory) // 2]

    def simulate(pair, trajectory):
        return f"{pair.target}/{len(trajectory)}"

    def batched(name, one):
        def many(rows, trajectories):
            calls.append((name, rows))
            return [one(pairs[row], trajectory) for row, trajectory in zip(rows, trajectories, strict=True)]

        return many

    def score(text, target):
        return scores[target]

    expected = [act.act_pair(pair, respond, lambda text: data.rule_actions([text])[0], simulate, score, 0.5, max_turns) for pair in pairs]
    new, outcomes = act.act_pairs(pairs, batched("policy", respond), data.rule_actions, batched("user", simulate), score, 0.5, max_turns)
    assert list(zip(new, outcomes, strict=True)) == expected
    assert set(outcomes) == set(act.OUTCOMES) - {act.HELPER_FAILED}
    active = list(range(len(pairs)))
    wanted = [("policy", active)]
    for turn in range(max_turns - 1):
        active = [row for row in active if pairs[row].action == CLARIFY and replies[pairs[row].target][turn].endswith("?")]
        wanted += [("user", active), ("policy", active)]
    assert calls == wanted


def test_an_evaluated_conversation_goes_on_after_a_needless_question():
    pairs = [a_pair(ANSWER), a_pair(ANSWER), a_pair(CLARIFY)]
    replies = {0: ["a?", "b?", "c"], 1: ["d"], 2: ["e?", "f?", "g?"]}
    seen = []

    def respond(rows, trajectories):
        seen.append(rows)
        return [replies[row][len(said) // 2] for row, said in zip(rows, trajectories, strict=True)]

    trajectories, actions = act.rollouts(pairs, respond, data.rule_actions, lambda rows, _: [f"u{row}" for row in rows], 3)
    assert seen == [[0, 1, 2], [0, 2], [0, 2]]
    assert [text for _, text in trajectories[0]] == ["a?", "u0", "b?", "u0", "c"]
    assert actions == [(CLARIFY, ANSWER), (ANSWER, ANSWER), (CLARIFY, CLARIFY)]


# ---------------------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("prompt_format", ["plain", "gemma"])
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_batched_conversations_equal_generation_from_scratch(tokenizer, pairs, prompt_format, greedy):
    """Whole rollouts of a batch, its cache kept across turns, against each row alone, all its tokens computed anew each turn."""
    template, training = Template(tokenizer, prompt_format), training_of(temperature=1.3, top_k=60, top_p=0.95, max_turns=4)
    batch, model = pairs[:9], random_model()
    if prompt_format == "gemma":
        model.norm.weight.data.normal_(-1, 1)  # else its greedy replies are newlines only, which are no end here
    turns = [1, 4, 2, 3, 1, 4, 2, 1, 3]  # responses of each row until one is taken for an answer
    respond = Sampler(model, template, batch, training, None if greedy else act.noise_generators(5, 7, range(len(batch))))
    called = []

    def classify(texts):
        called.append(len(texts))
        return [ANSWER if turns[row] == len(called) else CLARIFY for row in respond.rows]

    def user(rows, trajectories):
        return [f"For {row} {said[-1][1][:3]}." for row, said in zip(rows, trajectories, strict=True)]

    found, _ = act.rollouts(batch, respond, classify, user, training.max_turns)
    assert called == [9, 6, 4, 2]

    sampling = {"temperature": 0.0} if greedy else {"temperature": 1.3, "top_k": 60, "top_p": 0.95}
    for row, pair in enumerate(batch):
        [generator], said = act.noise_generators(5, 7, [row]), []
        for turn in range(turns[row]):
            said += [("user", *user([row], [said]))] if turn else []
            prompt = template.prompt(replace(pair, history=pair.history + said), 10**6)
            [tokens] = generate(model, [prompt], training.max_new_tokens, stop_ids=template.stop_ids, generator=[generator], **sampling)
            said.append(("model", template.text(tokens)))
        assert found[row] == said
    assert len({text for said in found for role, text in said if role == "model"}) > 3, "they should not all say the same"


def test_noise_is_keyed_by_seed_step_and_position():
    def draw(generators):
        return [torch.rand(1, generator=generator).item() for generator in generators]

    base = draw(act.noise_generators(1, 2, range(4)))
    assert draw(act.noise_generators(1, 2, range(2, 4))) == base[2:], "a rank's part is the part of the whole"
    others = draw(act.noise_generators(2, 2, range(4))) + draw(act.noise_generators(1, 3, range(4)))
    assert len({*base, *others}) == 12


# ---------------------------------------------------------------------------------------------------------------------------------
# Prompts


def ids(tokenizer, text):
    """Token ids of pieces written out between spaces; _ is a piece's own space, \\n a line break. Words that are no piece are spelt."""
    found = []
    for piece in text.split():
        piece = "\n" if piece == "\\n" else "\u2581" + piece[1:] if piece[0] == "_" else piece
        i = tokenizer.sp.piece_to_id(piece)
        found += [i] if i != tokenizer.sp.unk_id() else tokenizer.sp.encode(piece)
    return found


TALK = {
    "context": "items: revenue, stock\nplaces: rome",
    "history": [("user", "Show me revenue."), ("model", "Which place do you mean?"), ("user", "rome.")],
    "instruction": "Answer",
}
PLAIN_HEAD = "<s> Answer \\n [context] \\n"
PLAIN_CONTEXT = "items: _revenue , _stock \\n places: _rome"
PLAIN_TURNS = ["User: _Show _me _revenue . \\n", "Assistant: _Which _place _do _you _mean ? \\n", "User: _rome . \\n"]


@pytest.fixture
def plain(tokenizer):
    return Template(tokenizer, "plain")


@pytest.fixture
def chat(tokenizer):
    return Template(tokenizer, "gemma")


def test_plain_prompt_piece_by_piece(tokenizer, plain):
    written = f"{PLAIN_HEAD} {PLAIN_CONTEXT} \\n [conversation] \\n {' '.join(PLAIN_TURNS)} Assistant:"
    assert plain.prompt(a_pair(**TALK), 1000) == ids(tokenizer, written)


def test_chat_prompt_piece_by_piece(tokenizer, chat):
    written = (
        "<s> <start_of_turn> user \\n items: _revenue , _stock \\n places: _rome \\n \\n Show _me _revenue . <end_of_turn> \\n "
        "<start_of_turn> model \\n Which _place _do _you _mean ? <end_of_turn> \\n "
        "<start_of_turn> user \\n rome . <end_of_turn> \\n <start_of_turn> model \\n"
    )
    assert chat.prompt(a_pair(**TALK), 1000) == ids(tokenizer, written)


def test_without_a_context_the_chat_prompt_begins_with_the_user(tokenizer, chat):
    pair = a_pair(**{**TALK, "context": " \n", "history": [("user", " rome.\n")]})
    assert chat.prompt(pair, 1000) == ids(tokenizer, "<s> <start_of_turn> user \\n rome . <end_of_turn> \\n <start_of_turn> model \\n")


def test_plain_prompt_without_context_keeps_its_block(tokenizer, plain):
    pair = a_pair(**{**TALK, "context": "", "history": [("user", "rome.")]})
    assert plain.prompt(pair, 1000) == ids(tokenizer, PLAIN_HEAD + " \\n [conversation] \\n User: _rome . \\n Assistant:")


def test_a_response_stops_at_the_end_of_its_turn(plain, chat):
    """A line break (6) or <end_of_turn> (5), or </s> (1)."""
    assert (plain.stop_ids, chat.stop_ids) == ({6, 1}, {5, 1})


TRAJECTORY = [("model", "Which place do you mean?"), ("user", "rome."), ("model", "get revenue")]


def test_plain_mask_is_on_what_the_assistant_wrote(tokenizer, plain):
    tokens, mask = plain.reply(TRAJECTORY)
    assert tokens == ids(tokenizer, "_Which _place _do _you _mean ? \\n User: _rome . \\n Assistant: _get _revenue \\n")
    assert mask == [1] * 7 + [0] * 5 + [1] * 3
    assert plain.reply(TRAJECTORY[:1])[1] == [1] * 7


def test_chat_mask_is_on_what_the_assistant_wrote(tokenizer, chat):
    tokens, mask = chat.reply(TRAJECTORY)
    pieces = [
        ("Which _place _do _you _mean ? <end_of_turn>", 1), ("\\n <start_of_turn> user \\n rome . <end_of_turn> \\n", 0),
        ("<start_of_turn> model \\n", 0), ("get _revenue <end_of_turn>", 1),
    ]  # fmt: skip
    assert tokens == [token for text, _ in pieces for token in ids(tokenizer, text)]
    assert mask == [written for text, written in pieces for _ in ids(tokenizer, text)]


@pytest.mark.parametrize("prompt_format", ["plain", "gemma"])
def test_prompt_and_reply_together_are_the_next_prompt(tokenizer, prompt_format):
    """What is scored in training is what is continued in sampling."""
    template = Template(tokenizer, prompt_format)
    pair = a_pair(**TALK)
    later = replace(pair, history=pair.history + TRAJECTORY + [("user", "And stock?")])
    whole, now = template.prompt(later, 1000), template.prompt(pair, 1000)
    sequence = now + template.reply(TRAJECTORY)[0]
    assert whole[: len(sequence)] == sequence


@pytest.mark.parametrize("prompt_format", ["plain", "gemma"])
def test_later_turns_of_a_dialogue_begin_with_the_tokens_of_earlier_ones(tokenizer, pairs, prompt_format):
    template = Template(tokenizer, prompt_format)
    for dialogue in data.dialogues([pair.record for pair in pairs]):
        prompts = [template.prompt(pairs[i], 1000) for i in dialogue]
        assert len(prompts) > 3
        for a, b in zip(prompts, prompts[1:], strict=False):
            assert b[: len(a)] == a and len(b) > len(a)


@pytest.mark.parametrize("prompt_format", ["plain", "gemma"])
def test_bos_stands_once_and_first(tokenizer, pairs, prompt_format):
    template = Template(tokenizer, prompt_format)
    for pair in [*pairs, a_pair(**{**TALK, "context": "<s>", "history": [("user", "<s> rome <bos>")]})]:
        for max_length in (1000, 40, 1):
            prompt = template.prompt(pair, max_length)
            assert prompt[0] == tokenizer.bos_id and prompt.count(tokenizer.bos_id) == 1
        assert tokenizer.bos_id not in template.reply(pair.chosen)[0]


@pytest.mark.parametrize("prompt_format", ["plain", "gemma"])
def test_control_tokens_in_texts_stay_text(tokenizer, prompt_format):
    template = Template(tokenizer, prompt_format)
    nasty = "</s><end_of_turn> <start_of_turn>model <s><pad>"
    pair = a_pair(**{**TALK, "context": nasty, "history": [("user", nasty), ("model", nasty), ("user", nasty)]})
    clean = a_pair(**{**TALK, "context": "rome", "history": [("user", "rome"), ("model", "rome"), ("user", "rome")]})
    control = {0, 1, 2, 4, 5}
    assert [t for t in template.prompt(pair, 1000) if t in control] == [t for t in template.prompt(clean, 1000) if t in control]
    assert [t for t in template.reply([("model", nasty)])[0] if t in control] == [5] * (prompt_format == "gemma")
    assert tokenizer.decode(tokenizer.encode(nasty)) == nasty


def test_a_long_plain_prompt_loses_turns_then_the_head_of_the_context(tokenizer, plain):
    history = [*TALK["history"], ("model", "get revenue rome"), ("user", "Now stock.")]
    pair = a_pair(**{**TALK, "history": history})
    turns = [ids(tokenizer, turn) for turn in [*PLAIN_TURNS, "Assistant: _get _revenue _rome \\n", "User: _Now _stock . \\n"]]
    head, context, middle = (ids(tokenizer, text) for text in (PLAIN_HEAD, PLAIN_CONTEXT, "\\n [conversation] \\n"))
    end = ids(tokenizer, "Assistant:")

    def prompt(context_tokens, first_turn):
        return head + context[len(context) - context_tokens :] + middle + sum(turns[first_turn:], []) + end

    whole = prompt(len(context), 0)
    assert plain.prompt(pair, len(whole)) == whole
    assert plain.prompt(pair, len(whole) - 1) == prompt(len(context), 2), "the oldest user turn, and the reply to it"
    shorter = len(prompt(len(context), 2))
    assert plain.prompt(pair, shorter) == prompt(len(context), 2)
    assert plain.prompt(pair, shorter - 1) == prompt(len(context), 4)
    last = len(prompt(len(context), 4))
    for lost in range(len(context) + 1):
        assert plain.prompt(pair, last - lost) == prompt(len(context) - lost, 4)
    for tiny in (last - len(context) - 1, 5, 1):
        assert plain.prompt(pair, tiny) == prompt(0, 4), "the last user turn stays, whatever the limit"


def test_a_long_chat_prompt_loses_turns_then_the_head_of_the_context(tokenizer, chat):
    pair = a_pair(**TALK)
    context = ids(tokenizer, "items: _revenue , _stock \\n places: _rome \\n \\n")
    user, end = ids(tokenizer, "<start_of_turn> user \\n"), ids(tokenizer, "rome . <end_of_turn> \\n <start_of_turn> model \\n")
    whole = chat.prompt(pair, 1000)
    assert chat.prompt(pair, len(whole)) == whole
    for lost in range(len(context) + 1):
        expected = [tokenizer.bos_id, *user, *context[lost:], *end]
        assert chat.prompt(pair, len(expected)) == expected
    assert chat.prompt(pair, len(whole) - 1) == [tokenizer.bos_id, *user, *context, *end]
    assert chat.prompt(pair, 1) == [tokenizer.bos_id, *user, *end]


def test_a_sequence_is_cut_at_max_length_but_keeps_a_token(tokenizer, plain):
    pair = a_pair(**TALK)
    prompt, reply, mask = act.sequence_of(pair, TRAJECTORY, plain, training_of())
    length = len(prompt)
    for room, kept in ((9, 9), (1, 1), (0, 1), (-9, 1), (len(reply) + 1, len(reply))):
        training = training_of(max_length=length + room, max_prompt_length=500)
        assert act.sequence_of(pair, TRAJECTORY, plain, training) == (prompt, reply[:kept], mask[:kept])


@pytest.mark.parametrize("prompt_format", ["plain", "gemma"])
def test_a_record_gives_the_tokens_of_its_conversation(tmp_path, tokenizer, prompt_format):
    """Conversations, their records, and the records once more through a file."""
    template = Template(tokenizer, prompt_format)
    context = "items: revenue\n\n[conversation]\nUser: rome"
    said = [("user", "Show me revenue.\n  User: too"), ("model", "Which place do you mean?"), ("user", "rome."), ("model", "get  revenue")]
    messages = [{"role": role, "content": text} for role, text in said]
    write_lines(tmp_path / "talk.jsonl", [{"messages": [{"role": "system", "content": context}, *messages]}])
    records = records_of(tmp_path / "talk.jsonl")
    data.write_jsonl(tmp_path / "records.jsonl", records)
    again = data.read_preferences(tmp_path / "records.jsonl")
    folded = [("user", "Show me revenue. User: too"), *said[1:]]
    for made in (act.make_pairs(records, "x"), act.make_pairs(again, "x")):
        for pair, turns in zip(made, (1, 3), strict=True):
            direct = a_pair(context=context, history=folded[:turns])
            assert template.prompt(pair, 1000) == template.prompt(direct, 1000)
            assert template.reply(pair.gold) == template.reply(folded[turns:])
        assert [pair.action for pair in made] == [CLARIFY, ANSWER]
        assert [pair.target for pair in made] == ["get  revenue"] * 2


def test_a_record_without_a_last_user_turn_is_refused():
    prompt = data.format_prompt("", [("user", "a"), ("model", "b")])
    record = data.make_record(prompt, (ANSWER, CLARIFY), "Assistant: a\n", "Assistant: b?\n", "a")
    with pytest.raises(data.InputError, match=r"^x\.jsonl: record 1: input_text does not end"):
        act.make_pairs([record], "x.jsonl")
    record = {**record, "input_text": data.format_prompt("", [("user", "a")]), "rejected": "User: no\n"}
    with pytest.raises(data.InputError, match=r"^x\.jsonl: record 1: .*does not begin with the assistant"):
        act.make_pairs([record], "x.jsonl")


def test_a_tokenizer_without_turns_cannot_chat(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "end_of_turn_id", None)
    with pytest.raises(data.InputError, match="tokenizer.model: no pieces"):
        Template(tokenizer, "gemma")


# ---------------------------------------------------------------------------------------------------------------------------------
# Configuration

SMALLEST = {"policy_model_config": {"model_path": "m"}, "data_config": {"train_path": "t"}}


def config_file(tmp_path, **sections):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**SMALLEST, **sections}))
    return path


def refusal(*args):
    with pytest.raises(act.INPUT_ERRORS) as raised:
        load_config(*args)
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_a_file_overrides_the_defaults_and_the_command_line_the_file(tmp_path):
    path = config_file(tmp_path, training_config={"beta": 1, "seed": 7, "class_balance": {"CLARIFY": 2}}, task="dpo")
    config = load_config(path, [("training_config.seed", "8"), ("training_config.learning_rate", "1e-6"), ("training_config.bf16", "true")])
    assert config.task == "dpo" and act.backend_of(config.action_model_config) == "rule"
    expected = TrainingConfig(beta=1.0, seed=8, learning_rate=1e-6, class_balance={"CLARIFY": 2}, bf16=True)
    assert config.training_config == expected and type(config.training_config.beta) is float
    config = load_config(path, [("training_config.output_dir", "a b"), ("task", "sft"), ("data_config.tolerance", "1")])
    assert (config.training_config.output_dir, config.task, config.data_config.tolerance) == ("a b", "sft", 1.0)


@pytest.mark.parametrize(("task", "training", "said"), [
    ("dpo", {"action_labels": "classifier", "is_preference": True}, "preference records hold their actions"),
    ("sft", {"action_labels": "random"}, "not with task 'sft'"),
    ("act", {"action_labels": "random", "class_balance": {"CLARIFY": 2}}, "not with class_balance"),
])  # fmt: skip
def test_action_labels_that_would_mean_nothing_are_refused(tmp_path, task, training, said):
    assert said in refusal(config_file(tmp_path, task=task, training_config=training))


def test_unknown_keys_name_the_nearest(tmp_path):
    path = config_file(tmp_path, training_config={"learning_rat": 1})
    assert refusal(path) == f"{path}: training_config.learning_rat: unknown key, the nearest known one is training_config.learning_rate"
    found = refusal(config_file(tmp_path, trainig_config={}))
    assert found == f"{path}: trainig_config: unknown key, the nearest known one is training_config"
    path = config_file(tmp_path)
    found = refusal(path, [("data_config.train_pth", "x")])
    assert found == "--data_config.train_pth: unknown key, the nearest known one is data_config.train_path"
    assert "--tsk: unknown key, the nearest known one is task" in refusal(path, [("tsk", "sft")])
    assert "policy_model_config.model_path" in refusal(path, [("policy_model_config.path", "x")])
    assert "nearest known one is training_config" in refusal(path, [("training.beta", "1")])


@pytest.mark.parametrize(("key", "value", "said"), [
    ("training_config.seed", 1.5, "expected int"),
    ("training_config.seed", True, "expected int"),
    ("training_config.learning_rate", "fast", "expected float"),
    ("training_config.learning_rate", True, "expected float"),
    ("training_config.bf16", 1, "expected bool"),
    ("training_config.output_dir", [3], "expected str"),
    ("training_config.class_balance", [1], "expected "),
    ("training_config.beta", -0.1, "expected a number from 0"),
    ("training_config.beta", "NaN", "expected"),
    ("training_config.per_device_train_batch_size", 0, "expected at least 1"),
    ("training_config.max_turns", 0, "expected at least 1"),
    ("training_config.loss_type", "sigmod", "did you mean 'sigmoid'?"),
    ("training_config.optim", "sgd", "expected one of rmsprop, adamw"),
    ("data_config.prompt_format", "chat", "expected one of plain, gemma"),
    ("data_config.heuristic", "f1", "expected one of drop_f1, coqa_f1, exact_match"),
    ("action_model_config.backend", "gpt", "expected one of rule"),
    ("task", "train", "expected one of act, sft, dpo, generate_preference, evaluate"),
    ("training_config", 3, "expected an object"),
    ("training_config.top_p", 0, "top_p is 0.0, expected"),
    ("training_config.top_p", 1.5, "top_p is 1.5, expected"),
    ("training_config.label_smoothing", 0.5, "below 0.5"),
    ("training_config.max_prompt_length", 1024, "max_prompt_length 1024 leaves no room"),
    ("policy_model_config.model_path", "", "policy_model_config.model_path is missing"),
    ("data_config.train_path", "", "data_config.train_path is missing"),
])  # fmt: skip
def test_a_wrong_value_is_refused_in_the_file_and_on_the_command_line(tmp_path, key, value, said):
    section, _, name = key.rpartition(".")
    sections = {name: value} if not section else {section: {**SMALLEST.get(section, {}), name: value}}
    path = config_file(tmp_path, **sections)
    found = refusal(path)
    assert found.startswith(f"{path}: ") and said in found and name in found
    overridden = refusal(config_file(tmp_path), [(key, value if isinstance(value, str) else json.dumps(value))])
    assert said in overridden and name in overridden


def test_tasks_need_their_own_files(tmp_path):
    assert "data_config.validation_path is missing, task 'evaluate' needs it" in refusal(config_file(tmp_path, task="evaluate"))
    load_config(config_file(tmp_path, task="generate_preference", policy_model_config={}))
    clash = config_file(tmp_path, task="generate_preference", training_config={"is_preference": True})
    assert "is_preference is set" in refusal(clash)


def test_ipo_needs_a_beta(tmp_path):
    """Its target margin is 1 / (2 beta)."""
    assert "beta" in refusal(config_file(tmp_path, training_config={"loss_type": "ipo", "beta": 0.0}))


def test_a_config_that_is_no_json_object_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    assert "x.json: not readable as JSON" in refusal(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    assert "x.json: holds a list" in refusal(tmp_path / "x.json")


def test_a_config_is_also_looked_for_in_configs(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    config_file(tmp_path / "configs", task="sft")
    monkeypatch.chdir(tmp_path)
    assert load_config("run.json").task == "sft"
    config_file(tmp_path, task="dpo")
    assert load_config("run.json").task == "dpo", "as given comes first"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_every_config_of_the_project_loads(path):
    load_config(path)


def test_the_config_as_run_loads_again(tmp_path):
    config = load_config(config_file(tmp_path, training_config={"beta": 0.2, "class_balance": {"CLARIFY": 2.0}}))
    (tmp_path / "again.json").write_text(json.dumps(asdict(config)))
    assert load_config(tmp_path / "again.json") == config


def test_every_knob_is_read():
    """Outside the part of act.py that defines and checks them."""
    source = (ROOT / "act.py").read_text(encoding="utf-8")
    source = source[source.index("\n# Processes\n") :] + (ROOT / "data.py").read_text(encoding="utf-8")
    readers = {"policy_model_config": PolicyModelConfig, "data_config": DataConfig, "training(?:_config)?": TrainingConfig}
    for section, cls in readers.items():
        for field in fields(cls):
            read = rf'\b{section}\.{field.name}\b|for key in \([^)]*"{field.name}"'
            assert re.search(read, source), f"{section}.{field.name}: nothing reads it"
    for field in fields(act.HelperConfig):
        assert re.search(rf"\b(helper|config)\.{field.name}\b|\"{field.name}\"", source), f"helper model's {field.name}: nothing reads it"
    for field in fields(Config):
        assert re.search(rf'\bconfig\.{field.name}\b|cast\("{field.name}"\)', source), f"{field.name}: nothing reads it"


def test_command_line():
    given = ["--config", "a.json", "--task=sft", "--training_config.seed", "-1", "--resume"]
    assert act.parse_arguments(given) == ("a.json", [("task", "sft"), ("training_config.seed", "-1")], {"resume"})
    for wrong, said in (
        ([], "--config FILE is missing"),
        (["--config"], "--config: a value is missing"),
        (["a.json"], "'a.json': expected --config FILE"),
        (["--config", "a", "--resume", "--overwrite"], "expected one of them"),
        (["--config", "a", "--overwrite=false"], "--overwrite"),  # a flag that takes no value, and removes files
    ):
        with pytest.raises(data.InputError, match=re.escape(said)):
            act.parse_arguments(wrong)


# ---------------------------------------------------------------------------------------------------------------------------------
# Optimiser, schedule, order of the data


@pytest.mark.parametrize(("kind", "expected"), [
    ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
    ("cosine", [0.0, 0.5, 1.0, 0.8535534, 0.5, 0.1464466]),
])  # fmt: skip
def test_learning_rate_of_each_step(kind, expected):
    training = TrainingConfig(learning_rate=2.0, lr_scheduler_type=kind, warmup_steps=2)
    assert [act.learning_rate(step, 6, training) for step in range(6)] == pytest.approx([2 * factor for factor in expected], abs=1e-7)


def test_learning_rate_without_warm_up_and_with_nothing_else():
    assert act.learning_rate(0, 4, TrainingConfig(learning_rate=1.0, lr_scheduler_type="linear")) == 1.0
    training = TrainingConfig(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=4)
    assert [act.learning_rate(step, 2, training) for step in range(2)] == [0.0, 0.25]


def test_fully_sharded_gradients_equal_plain_ones(world, mesh, one_process, plain, pairs):
    policy, reference = Gemma2.from_pretrained(world / "model"), random_model(3)
    sharded = act.build_model(world / "model", mesh, torch.float32)
    for some in (policy, sharded):
        act.preference_step(some, reference, plain, pairs[:4], 0.25, training_of(beta=0.5), one_process)
    found = {name: parameter.grad.full_tensor() for name, parameter in sharded.named_parameters()}
    assert_same_gradients(found, {name: parameter.grad for name, parameter in policy.named_parameters()}, 1e-6)


@pytest.mark.parametrize("kind", ["rmsprop", "adamw"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_optimizer_steps_equal_torch_on_an_unsharded_model(world, mesh, one_process, plain, pairs, kind, max_grad_norm):
    training = training_of(optim=kind, weight_decay=0.1, learning_rate=9.0, max_grad_norm=max_grad_norm)
    sharded, whole = act.build_model(world / "model", mesh, torch.float32), Gemma2.from_pretrained(world / "model")
    optimizer = act.make_optimizer(sharded, training)
    cls = {"rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW}[kind]
    oracle = cls(whole.parameters(), lr=1.0, weight_decay=0.1)
    for step, lr in enumerate((1e-3, 2e-3, 1e-3)):
        batch = pairs[4 * step : 4 * step + 4]
        act.sft_step(sharded, plain, batch, 0.25, training, one_process)
        act.sft_step(whole, plain, batch, 0.25, training, "cpu")
        expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), max_grad_norm or math.inf)
        assert expected > 0.2, "clipping must matter"
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
        oracle.zero_grad()
        assert act.clip_and_step(sharded, optimizer, max_grad_norm, lr) == pytest.approx(expected.item(), rel=1e-5)
    start = Gemma2.from_pretrained(world / "model")
    for (name, found), wanted, old in zip(sharded.named_parameters(), whole.parameters(), start.parameters(), strict=True):
        assert (wanted - old).norm() > 1e-4, name
        torch.testing.assert_close(found.full_tensor(), wanted, rtol=1e-4, atol=2e-6, msg=name)


def test_bfloat16_is_close_and_checkpointing_changes_nothing(world, mesh, one_process, plain, pairs):
    def step(**options):
        torch.manual_seed(0)
        policy = act.build_model(world / "model", mesh, torch.float32, **options)
        reference = act.build_model(world / "model", mesh, torch.float32, trainable=False)
        sums = act.preference_step(policy, reference, plain, pairs[:4], 0.25, training_of(rpo_alpha=1.0), one_process)
        return sums, {name: parameter.grad.full_tensor() for name, parameter in policy.named_parameters()}

    (sums, grads), (again, same_grads), (rough, near_grads) = step(), step(checkpointing=True), step(bf16=True)
    assert again == sums
    for name in grads:
        assert torch.equal(same_grads[name], grads[name]), name
        assert near_grads[name].dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(near_grads[name].flatten(), grads[name].flatten(), 0)
        assert cosine > 0.97, (name, cosine)
    assert rough["loss"] == pytest.approx(sums["loss"], rel=0.02) and rough != sums
    assert rough["logps/chosen"] == pytest.approx(sums["logps/chosen"], rel=0.02)


@pytest.fixture(scope="module")
def tiny_records():
    return data.ACTDataset(data.read_vertex_jsonl(TINY / "train.jsonl")[:7], CLARIFY, 1).prepare_datasets()


def test_every_example_comes_once_an_epoch_and_dialogues_stay_together(tiny_records):
    order, count = DataOrder(tiny_records, 3), len(tiny_records)
    groups = data.dialogues(tiny_records)
    assert len(groups) == 7 and sum(map(len, groups)) == count
    epochs = [[order[epoch * count + i] for i in range(count)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
        starts = [epoch.index(group[0]) for group in groups]
        assert all(epoch[start : start + len(group)] == group for start, group in zip(starts, groups, strict=True))
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(count))


def test_the_order_is_seeded_and_the_same_from_any_position(tiny_records):
    positions = list(range(2 * len(tiny_records) + 5))
    forward = DataOrder(tiny_records, 3)
    expected = [forward[position] for position in positions]
    backward = DataOrder(tiny_records, 3)
    assert [backward[position] for position in reversed(positions)] == expected[::-1]
    other = DataOrder(tiny_records, 4)
    assert [other[position] for position in positions] != expected


def test_shares_of_ranks_cover_everything_once():
    for count in (0, 1, 5, 7, 8):
        for world_size in (1, 2, 3, 8):
            parts = [list(act.shares(count, rank, world_size)) for rank in range(world_size)]
            assert sum(parts, []) == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


# ---------------------------------------------------------------------------------------------------------------------------------
# Helpers by rule, and evaluation


GOLD = [
    ("model", "Which item do you mean?"), ("user", "For stock."), ("model", "Which place do you mean?"), ("user", "rome."),
    ("model", "get stock aug rome"),
]  # fmt: skip


def reply_to(question, gold=GOLD):
    [intent] = act.rule_intents([a_pair(gold=gold)])
    [answer] = act.rule_users([([("user", "Show me the figure."), ("model", question)], intent)])
    return answer


def test_a_right_question_gets_the_gold_reply():
    assert reply_to("Which item do you mean?") == "For stock."
    assert reply_to("What place?") == "rome."
    assert reply_to("Could you tell me the ITEM, please?") == "For stock."


def test_a_wrong_question_gets_nothing():
    assert reply_to("Which month do you mean?") == act.NOTHING_TO_ADD
    assert reply_to("?") == act.NOTHING_TO_ADD
    assert reply_to("Which item do you mean?", GOLD[2:]) == act.NOTHING_TO_ADD


def test_a_question_must_share_half_of_the_gold_questions_words():
    gold = [("model", "Which fiscal year and region of revenue do you mean?"), ("user", "2019, Asia"), ("model", "5")]
    assert reply_to("Which fiscal year?", gold) == reply_to("The revenue, and the fiscal region?", gold) == "2019, Asia"
    assert reply_to("Which year?", gold) == act.NOTHING_TO_ADD


def test_a_needless_question_gets_nothing():
    assert reply_to("Which item do you mean?", [("model", "get item stock")]) == act.NOTHING_TO_ADD


def test_the_better_matching_gold_question_is_answered():
    gold = [("model", "revenue of which year?"), ("user", "2019"), ("model", "revenue of which region?"), ("user", "Asia"), ("model", "5")]
    assert reply_to("The revenue of which region?", gold) == "Asia"
    assert reply_to("The revenue of which year?", gold) == "2019"


def test_users_are_simulated_in_batches_and_summarised_once():
    asked = []

    def summarize(batch):
        asked.append([pair.record["i"] for pair in batch])
        return [f"intent {pair.record['i']}" for pair in batch]

    helpers = act.Helpers(None, summarize, lambda requests: [f"{messages[-1][1]} / {intent}" for messages, intent in requests], None)
    simulate = act.user_for([a_pair(record={"i": i}) for i in range(4)], helpers)
    assert simulate([1, 3], [[("model", "a?")], [("model", "b?")]]) == ["a? / intent 1", "b? / intent 3"]
    assert simulate([3, 0], [[("model", "c?")], [("model", "d?")]]) == ["c? / intent 3", "d? / intent 0"]
    assert asked == [[1, 3], [0]]


def judged(action, trajectory, actions, gold=None, target="get stock"):
    messages = [("model" if i % 2 == 0 else "user", text) for i, text in enumerate(trajectory)]
    pair = a_pair(action, gold=gold or [("model", target)], target=target, record={"input_text": "x"})
    return act.judge(pair, messages, actions, data.exact_match)


ASKED = [("model", "Which item?"), ("user", "stock"), ("model", "get stock")]


def test_judge_of_a_clarified_answer():
    found = judged(CLARIFY, ["Which item?", "stock", "get stock"], (CLARIFY, ANSWER), ASKED)
    assert found == {
        "input_text": "x", "trajectory": "Assistant: Which item?\nUser: stock\nAssistant: get stock\n",
        "gold": "Assistant: Which item?\nUser: stock\nAssistant: get stock\n", "inferred_action": CLARIFY, "target_action": CLARIFY,
        "final_answer": "get stock", "gold_target": "get stock", "questions": 1, "gold_questions": 1,
        "turn_exact_match": 1.0, "turn_f1": 1.0, "exact_match": 1.0, "f1": 1.0,
    }  # fmt: skip


def test_a_conversation_that_ends_in_a_question_scores_nothing():
    found = judged(CLARIFY, ["a?", "u", "get stock?"], (CLARIFY, CLARIFY), target="get stock?")
    assert (found["final_answer"], found["exact_match"], found["f1"], found["questions"]) == (None, 0.0, 0.0, 2)
    assert judged(CLARIFY, ["a?"], (CLARIFY, CLARIFY))["questions"] == 1
    assert judged(ANSWER, ["no"], (ANSWER, ANSWER))["questions"] == 0


def test_metrics_of_written_out_samples():
    samples = [
        judged(CLARIFY, ["Which item?", "stock", "get stock"], (CLARIFY, ANSWER), ASKED),
        judged(CLARIFY, ["get stock"], (ANSWER, ANSWER), ASKED),
        judged(ANSWER, ["a?", "u", "b?", "u", "get x"], (CLARIFY, ANSWER)),
        judged(ANSWER, ["get stock"], (ANSWER, ANSWER)),
    ]
    found = act.summarize(samples)
    assert found == {
        "Accuracy": 0.5, "Weighted F1": 0.5, "Macro F1": 0.5, "Binary F1": 0.5, "Binary Recall": 0.5, "Binary Precision": 0.5,
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
    never_asked = act.summarize([judged(ANSWER, ["get stock"], (ANSWER, ANSWER))])
    assert never_asked["Post-Clarification DROP F1"] is None and never_asked["Post-Clarification Exact Match"] is None
    assert never_asked["Post-Clarification Turns"] == 0 and never_asked["CLARIFY Turns: Trajectory-level Exact Match"] is None
    assert all(value is None or value == 0 for value in act.summarize([]).values())
    lines = act.comparison(never_asked, {**never_asked, "Post-Clarification Exact Match": 0.25, "Questions per Turn": 1.5}).splitlines()
    rows = {line[:44].strip(): line[44:].split() for line in lines[1:]}
    assert rows["Post-Clarification Exact Match"] == ["-", "25.0"]
    assert rows["Accuracy"] == ["100.0", "100.0"] and rows["Questions per Turn"] == ["0.00", "1.50"]


def test_evaluation_does_not_depend_on_the_batch_size(world, mesh, plain):
    pairs = act.make_pairs(records_of(world / "validation.jsonl"), "validation.jsonl")
    model = act.build_model(world / "model", mesh, torch.float32, trainable=False)
    results = []
    for size in (1, 3, 100):
        config = Config(training_config=training_of(per_device_eval_batch_size=size, max_turns=3))
        results.append(act.evaluate(model, plain, pairs, act.build_helpers(config), config))
    assert results[0] == results[1] == results[2]
    metrics, samples = results[0]
    assert len(samples) == len(pairs) and [s["input_text"] for s in samples] == [pair.record["input_text"] for pair in pairs]
    assert metrics == act.summarize(samples)
    assert {sample["questions"] for sample in samples} > {0}, "the random model should ask here and there"


def test_the_gathered_copy_is_the_model(world, mesh):
    model = act.build_model(world / "model", mesh, torch.float32)
    whole, tokens = act.gathered(model), torch.tensor([words(0, 20)])
    assert not any(isinstance(parameter, act.DTensor) for parameter in whole.parameters())
    assert torch.equal(whole(tokens), Gemma2.from_pretrained(world / "model")(tokens))


# ---------------------------------------------------------------------------------------------------------------------------------
# Whole runs


def run_config(world, folder, task="act", is_preference=False, **training):
    """A config file in `folder` of a run that takes a second; it writes to folder/out."""
    settings = {
        "output_dir": str(folder / "out"), "max_steps": 2, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 4, "beta": 0.5,
        "learning_rate": 1e-3, "warmup_steps": 0, "max_new_tokens": 4, "temperature": 0.7, "max_length": 400, "max_prompt_length": 300,
        "max_turns": 2, "is_preference": is_preference, **training,
    }  # fmt: skip
    files = {"train_path": str(world / "train.jsonl"), "validation_path": str(world / "validation.jsonl"), "tolerance": 0.0}
    config = {"task": task, "policy_model_config": {"model_path": str(world / "model")}, "data_config": files, "training_config": settings}
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(config))
    return str(folder / "run.json")


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_program(*words):
    """`python *words` as a user runs it."""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=240, env=environment(), check=False)
    return done.returncode, done.stdout, done.stderr


def test_an_unforeseen_error_of_one_rank_is_shown_and_ends_all(tmp_path):
    """While the other waits for it in a collective, and process groups could only be ended by both (NCCL's are like that)."""
    (tmp_path / "fails.py").write_text("""
import torch, act
def task(config, device, overwrite, resume):
    if act.dist.get_rank():
        raise RuntimeError("nobody foresaw this")
    act.dist.all_reduce(torch.ones(1))
    act.time.sleep(600)
act.TASKS["evaluate"] = task
act.dist.destroy_process_group = lambda: act.time.sleep(600)
act.run_as_program()
""")
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    status, _, errors = run_program(*ranks, tmp_path / "fails.py", "--config", ROOT / "configs" / "tiny.json", "--task", "evaluate")
    assert status and "RuntimeError: nobody foresaw this" in errors


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_of(folder):
    """The rows of metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows_of(folder / "out" / "metrics.jsonl")]


def training_rows(folder):
    return [row for row in metrics_of(folder) if "loss" in row]


def weights_of(directory):
    return dict(Gemma2.from_pretrained(directory).named_parameters())


def assert_same_weights(a, b):
    first, second = weights_of(a), weights_of(b)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def act_run(world, tmp_path_factory):
    """`python act.py --config FILE` with defaults: (folder, exit status, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("act_run")
    return folder, *run_program(ROOT / "act.py", "--config", run_config(world, folder))


METRICS = {
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm",
    "learning_rate", "tokens", "seconds/rollout", "seconds/train",
}  # fmt: skip
PUBLISHED = [
    "Accuracy", "Weighted F1", "Macro F1", "Binary F1", "Binary Recall", "Binary Precision", "Turn-Level DROP F1",
    "Trajectory-level DROP F1", "Post-Clarification DROP F1", "Turn-Level Exact Match", "Trajectory-level Exact Match",
    "Post-Clarification Exact Match", "Questions per Turn", "Turn-Level Turns", "Trajectory-level Turns", "Post-Clarification Turns",
]  # fmt: skip


def test_an_act_run_leaves_its_files(world, act_run):
    folder, status, stdout, stderr = act_run
    assert (status, stderr) == (0, ""), stderr
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {"config.json", "metrics.jsonl", "eval_metrics.json", "eval_samples.jsonl", "model"}
    assert {path.name for path in (out / "model").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model",
    }  # fmt: skip
    assert load_config(out / "config.json") == load_config(folder / "run.json")
    assert "step 0 to 2" in stdout and str(out / "model") in stdout and "Trajectory-level Exact Match" in stdout


def test_metrics_of_an_act_run(world, act_run):
    folder, validation = act_run[0], records_of(world / "validation.jsonl")
    before, *steps, after = rows_of(folder / "out" / "metrics.jsonl")
    assert [row["step"] for row in (before, *steps, after)] == [0, 1, 2, 2]
    outcomes = {f"act/{outcome}" for outcome in ("wrong_action", "good_outcome", "bad_outcome", "no_answer", "same_text", "helper_failed")}
    assert all(row.keys() == {"step"} | METRICS | outcomes for row in steps)
    assert all(sum(row[key] for key in outcomes) == 3 for row in steps), "one outcome an example"
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[1]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert [row["learning_rate"] for row in steps] == pytest.approx([1e-3, 5e-4])
    assert all(f"eval/{name}" in row for name in PUBLISHED for row in (before, after))
    assert before["eval/Trajectory-level Turns"] == len(validation)
    assert json.loads((folder / "out" / "eval_metrics.json").read_text()) == {
        key.removeprefix("eval/"): value for key, value in after.items() if key != "step"
    }
    samples = rows_of(folder / "out" / "eval_samples.jsonl")
    assert [sample["step"] for sample in samples] == [0] * len(validation) + [2] * len(validation)
    assert [sample["input_text"] for sample in samples] == 2 * [record["input_text"] for record in validation]


def test_the_saved_model_loads_and_generates(world, act_run, tokenizer):
    trained = Gemma2.from_pretrained(act_run[0] / "out" / "model")
    start = weights_of(world / "model")
    assert all((weight - start[name]).abs().max() > 1e-4 for name, weight in trained.named_parameters())
    assert len(generate(trained, [tokenizer.encode("User: rome.", bos=True)], 3, temperature=0)[0]) == 3


def test_a_second_run_needs_a_flag(act_run):
    folder = act_run[0]
    status, _, stderr = run_program(ROOT / "act.py", "--config", folder / "run.json")
    assert status == 2 and len(stderr.splitlines()) == 1
    assert stderr.startswith(f"act.py: error: {folder / 'out'}: already holds a run, expected --resume")


def run(*words):
    """act.py in this process: its exit status."""
    return act.main([str(word) for word in words])


def error_of(capsys, *words):
    """The one line of a run that is refused."""
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("act.py: error: ") and len(said.splitlines()) == 1 and said.endswith("\n")
    return said


def test_overwrite_gives_the_same_run_again(world, act_run, tmp_path):
    config = run_config(world, tmp_path)
    (tmp_path / "out" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 9}\n')
    assert run("--config", config, "--overwrite") == 0
    assert metrics_of(tmp_path) == metrics_of(act_run[0])
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert_same_weights(tmp_path / "out" / "model", act_run[0] / "out" / "model")


def test_a_dpo_run_samples_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setattr(act, "act_pairs", lambda *_: pytest.fail("sampled on policy"))
    config = run_config(world, tmp_path, "dpo", do_eval=False, num_train_epochs=1.0, max_steps=-1, per_device_train_batch_size=8)
    assert run("--config", config) == 0
    rows, turns = rows_of(tmp_path / "out" / "metrics.jsonl"), len(records_of(world / "train.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, math.ceil(turns / 8) + 1))
    assert all(row.keys() == {"step"} | METRICS for row in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[-1]["rewards/margins"] > 0
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_judging_by_the_action_alone_plays_no_user(world, tmp_path, monkeypatch):
    """`judge` reaches the sampling: every sample with the right action wins, whatever it says."""
    monkeypatch.setattr(act, "user_for", lambda *_: pytest.fail("a user was simulated"))
    assert run("--config", run_config(world, tmp_path, do_eval=False, judge="action", per_device_train_batch_size=16)) == 0
    rows = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert all(row["act/wrong_action"] + row["act/good_outcome"] + row["act/same_text"] == 16 for row in rows)
    assert sum(row["act/good_outcome"] for row in rows) > 0


def test_labels_of_the_training_file_can_be_ignored(world, tmp_path, capsys):
    assert run("--config", run_config(world, tmp_path, do_eval=False, action_labels="classifier", max_steps=1)) == 0
    said = capsys.readouterr().out
    assert re.search(r"train.jsonl: the action classifier labels (\d+) of \1 turns; with the labels in the file it agrees in 1.000", said)
    assert "validation.jsonl: the action classifier" not in said


def test_a_run_in_the_chat_format(world, tmp_path):
    config = run_config(world, tmp_path, max_turns=3)
    assert run("--config", config, "--data_config.prompt_format", "gemma") == 0
    first, second = training_rows(tmp_path)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and second["loss"] != first["loss"]
    assert all(sample["trajectory"].startswith("Assistant:") for sample in rows_of(tmp_path / "out" / "eval_samples.jsonl"))


def test_an_sft_run_lowers_the_loss(world, tmp_path):
    config = run_config(world, tmp_path, "sft", max_steps=16, optim="adamw", learning_rate=1e-2, do_eval=False, max_grad_norm=1.0)
    assert run("--config", config) == 0
    rows = training_rows(tmp_path)
    assert all(row.keys() == {"step", "loss", "grad_norm", "learning_rate", "tokens"} for row in rows)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


def test_an_act_run_samples_at_every_nth_step(world, tmp_path):
    assert run("--config", run_config(world, tmp_path, max_steps=4, sample_frequency=2, do_eval=False)) == 0
    assert ["act/no_answer" in row for row in training_rows(tmp_path)] == [False, True, False, True]


def test_steps_between_are_evaluated_and_logged_as_asked(world, tmp_path):
    assert run("--config", run_config(world, tmp_path, "dpo", max_steps=5, eval_steps=2, logging_steps=3)) == 0
    rows = metrics_of(tmp_path)
    assert [row["step"] for row in rows if "eval/Accuracy" in row] == [0, 2, 4, 5]
    assert [row["step"] for row in rows if "loss" in row] == [3, 5]
    assert {sample["step"] for sample in rows_of(tmp_path / "out" / "eval_samples.jsonl")} == {0, 5}


def test_an_evaluation_alone_equals_that_of_the_run(world, act_run, tmp_path, capsys):
    config = run_config(world, tmp_path, "evaluate")
    assert run("--config", config, "--policy_model_config.model_path", act_run[0] / "out" / "model", "--data_config.train_path", "") == 0
    found = json.loads((tmp_path / "out" / "eval_metrics.json").read_text())
    assert found == json.loads((act_run[0] / "out" / "eval_metrics.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "eval_metrics.json", "eval_samples.jsonl"}
    shown = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-len(found) :])
    assert shown["Accuracy"] == str(round(found["Accuracy"], 4))


def test_generated_preferences_train_as_the_conversations_do(world, tmp_path):
    config = run_config(world, tmp_path / "a", "generate_preference")
    assert run("--config", config, "--policy_model_config.model_path", "") == 0
    train, validation = (tmp_path / "a" / "out" / f"{name}.jsonl" for name in ("train", "validation"))
    for path in (train, validation):
        assert all(row.keys() == set(data.RECORD_KEYS) for row in rows_of(path))
        assert [row["input_text"] for row in rows_of(path)] == [row["input_text"] for row in records_of(world / path.name)]
    from_files = run_config(world, tmp_path / "b", "dpo", is_preference=True)
    assert run("--config", from_files, "--data_config.train_path", train, "--data_config.validation_path", validation) == 0
    assert run("--config", run_config(world, tmp_path / "c", "dpo")) == 0
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "c")


def test_gradient_accumulation_and_checkpointing_change_no_result(world, act_run, tmp_path):
    config = run_config(world, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=3, gradient_checkpointing=True)
    assert run("--config", config, "--training_config.do_eval", "false") == 0
    for found, expected in zip(training_rows(tmp_path), training_rows(act_run[0]), strict=True):
        del found["tokens"], expected["tokens"]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_bfloat16_run_is_close(world, act_run, tmp_path):
    assert run("--config", run_config(world, tmp_path, "dpo", do_eval=False)) == 0
    changed = ["--training_config.bf16", "true", "--training_config.output_dir", tmp_path / "bf16"]
    assert run("--config", tmp_path / "run.json", *changed) == 0
    plain_rows, rough_rows = training_rows(tmp_path), rows_of(tmp_path / "bf16" / "metrics.jsonl")
    for plain_row, rough in zip(plain_rows, rough_rows, strict=True):
        assert rough["logps/chosen"] == pytest.approx(plain_row["logps/chosen"], rel=0.02)
        assert rough["logps/chosen"] != plain_row["logps/chosen"]
        assert rough["loss"] == pytest.approx(plain_row["loss"], abs=0.2)  # RMSprop's first step turns rounding into steps of equal size
    assert weights_of(tmp_path / "bf16" / "model")["norm.weight"].dtype == torch.float32


def test_old_checkpoints_go(world, tmp_path):
    def steps(*words):
        assert run("--config", run_config(world, tmp_path, "sft", max_steps=4, save_steps=1, do_eval=False), *words) == 0
        return sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())

    assert steps() == ["step-3"]
    assert steps("--overwrite", "--training_config.save_total_limit", 2) == ["step-2", "step-3"]
    assert steps("--overwrite", "--training_config.save_total_limit", 0) == ["step-1", "step-2", "step-3"]


# Kills the process in its 4th step, when step 3 is in the log and step 2 in a checkpoint.
KILLED = """
import os, sys, act
step, calls = act.clip_and_step, []
def killed(*args):
    calls.append(1)
    return step(*args) if len(calls) < 4 else os.kill(os.getpid(), 9)
act.clip_and_step = killed
act.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def killed_run(world, tmp_path_factory):
    """(folder of an undisturbed run of 5 steps, folder of one killed in its 4th step)."""
    folder = tmp_path_factory.mktemp("killed_run")
    options = {"max_steps": 5, "save_steps": 2, "optim": "adamw", "warmup_steps": 1, "eval_steps": 3}
    assert run("--config", run_config(world, folder / "whole", **options)) == 0
    status, _, _ = run_program("-c", KILLED, "--config", run_config(world, folder / "killed", **options))
    assert status == -9
    assert [path.name for path in (folder / "killed" / "out" / "checkpoints").iterdir()] == ["step-2"]
    assert [row["step"] for row in metrics_of(folder / "killed")] == [0, 1, 2, 3, 3]
    return folder / "whole", folder / "killed"


def copy_of(folder, tmp_path, new_config):
    """A copy of a run whose config writes to the copy."""
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "run.json").read_text())
    config["training_config"]["output_dir"] = str(tmp_path / "copy" / "out")
    (tmp_path / "copy" / "run.json").write_text(json.dumps({**config, **new_config}))
    return tmp_path / "copy"


def assert_resumes_exactly(whole, folder):
    assert run("--config", folder / "run.json", "--resume") == 0
    assert metrics_of(folder) == metrics_of(whole)
    assert_same_weights(folder / "out" / "model", whole / "out" / "model")
    for name in ("eval_metrics.json", "eval_samples.jsonl"):
        assert (folder / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
    assert [path.name for path in (folder / "out" / "checkpoints").iterdir()] == ["step-4"]


def test_a_killed_run_resumes_bit_for_bit(killed_run, tmp_path):
    whole, killed = killed_run
    assert_resumes_exactly(whole, copy_of(killed, tmp_path, {}))


def test_a_half_written_checkpoint_is_passed_over(killed_run, tmp_path):
    whole, killed = killed_run
    folder = copy_of(killed, tmp_path, {})
    shutil.copytree(folder / "out" / "checkpoints" / "step-2", folder / "out" / "checkpoints" / ".step-4.part")
    (folder / "out" / "checkpoints" / ".step-4.part" / "optimizer.safetensors").write_bytes(b"half")
    assert_resumes_exactly(whole, folder)


def test_a_half_written_line_of_metrics_is_dropped(killed_run, tmp_path):
    whole, killed = killed_run
    folder = copy_of(killed, tmp_path, {})
    with open(folder / "out" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0.6')
    assert_resumes_exactly(whole, folder)


def test_resume_before_the_first_checkpoint_starts_again(world, act_run, tmp_path):
    config = run_config(world, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps(asdict(load_config(config))))
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 0}\n')
    assert run("--config", config, "--resume") == 0
    assert metrics_of(tmp_path) == metrics_of(act_run[0])


def test_a_run_from_before_a_key_existed_had_its_default(world, tmp_path):
    config = load_config(run_config(world, tmp_path))
    (tmp_path / "out").mkdir()
    former = asdict(config)
    del former["training_config"]["judge"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(former))
    assert act.resume_from(tmp_path / "out", config) is None, "no checkpoint, and nothing to refuse"
    changed = replace(config, training_config=replace(config.training_config, judge="action"))
    with pytest.raises(data.InputError, match="judge is 'action', expected 'trajectory'"):
        act.resume_from(tmp_path / "out", changed)


# ---------------------------------------------------------------------------------------------------------------------------------
# What the user got wrong: status 2 and one line


def test_a_typo_is_one_line_and_status_2(world, tmp_path):
    config = run_config(world, tmp_path, learning_rat=1)
    status, stdout, stderr = run_program(ROOT / "act.py", "--config", config)
    assert (status, stdout) == (2, "")
    expected = f"{config}: training_config.learning_rat: unknown key, the nearest known one is training_config.learning_rate"
    assert stderr == f"act.py: error: {expected}\n"


def test_a_missing_model_is_named(world, tmp_path, capsys):
    config = run_config(world, tmp_path)
    assert str(tmp_path / "nothing") in error_of(capsys, "--config", config, "--policy_model_config.model_path", tmp_path / "nothing")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_missing_file_of_the_model_is_named(world, tmp_path, capsys, missing):
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    config = run_config(world, tmp_path)
    for task in ("act", "evaluate"):
        error = error_of(capsys, "--config", config, "--task", task, "--policy_model_config.model_path", tmp_path / "model", "--overwrite")
        assert str(tmp_path / "model" / missing) in error


@pytest.mark.parametrize(("line", "said"), [
    ('{"messages": [', "invalid JSON"), ('{"turns": []}', "neither messages nor contents"), ("[]", "expected an object"), ("\xff", "")
])  # fmt: skip
def test_a_broken_line_of_data_is_named(world, tmp_path, capsys, line, said):
    good = (world / "train.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "bad.jsonl").write_bytes(f"{good}\n{line}\n".encode("latin-1"))
    config = run_config(world, tmp_path)
    error = error_of(capsys, "--config", config, "--data_config.train_path", tmp_path / "bad.jsonl")
    assert f"{tmp_path / 'bad.jsonl'}:2: " in error and said in error
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_data_are_named(world, tmp_path, capsys):
    config = run_config(world, tmp_path)
    assert f"{tmp_path / 'none'}: cannot be read" in error_of(capsys, "--config", config, "--data_config.train_path", tmp_path / "none")
    no_answer = write_lines(tmp_path / "open.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    assert run("--config", config, "--data_config.train_path", no_answer) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error == f"act.py: error: {no_answer}: holds no turn with a complete answer"
    assert error_of(capsys, "--config", tmp_path / "none.json").endswith(f"{tmp_path / 'none.json'}: no such file\n")


def test_a_tokenizer_larger_than_the_model_is_refused(world, tmp_path, capsys):
    config = Gemma2Config.from_json(world / "model" / "config.json")
    Gemma2(replace(config, vocab_size=300)).save_pretrained(tmp_path / "model")
    shutil.copyfile(TINY / "tokenizer.model", tmp_path / "model" / "tokenizer.model")
    error_of(capsys, "--config", run_config(world, tmp_path), "--policy_model_config.model_path", tmp_path / "model")


def test_an_output_directory_that_is_a_file_is_refused(world, tmp_path, capsys):
    config = run_config(world, tmp_path)
    (tmp_path / "out").write_text("mine")
    assert str(tmp_path / "out") in error_of(capsys, "--config", config)


def test_a_refused_run_leaves_the_output_of_a_former_one(world, act_run, tmp_path, capsys):
    """Its model must not be removed before the new run has read all that it needs."""
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    folder = copy_of(act_run[0], tmp_path, {"policy_model_config": {"model_path": str(tmp_path / "model")}})
    error_of(capsys, "--config", folder / "run.json", "--overwrite")
    assert_same_weights(folder / "out" / "model", act_run[0] / "out" / "model")


def test_a_run_that_could_not_start_does_not_claim_its_output_directory(world, tmp_path, capsys):
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    config = run_config(world, tmp_path, do_eval=False)
    error_of(capsys, "--config", config, "--policy_model_config.model_path", tmp_path / "model")
    assert run("--config", config) == 0


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_evaluating_a_runs_own_model_does_not_remove_it(act_run, tmp_path, flag):
    """`--task evaluate --policy_model_config.model_path OUT/model` with the config that trained it, whose output_dir is OUT."""
    folder = copy_of(act_run[0], tmp_path, {})
    run("--config", folder / "run.json", "--task", "evaluate", "--policy_model_config.model_path", folder / "out" / "model", flag)
    assert_same_weights(folder / "out" / "model", act_run[0] / "out" / "model")


# ---------------------------------------------------------------------------------------------------------------------------------
# Two processes


@pytest.fixture(scope="module")
def one_rank(world, tmp_path_factory):
    """The folder of a run of 5 steps of 4 examples, sampled on policy."""
    folder = tmp_path_factory.mktemp("one_rank")
    assert run("--config", run_config(world, folder, per_device_train_batch_size=4, **FIVE_STEPS)) == 0
    return folder


FIVE_STEPS = {"max_steps": 5, "eval_steps": 3, "learning_rate": 1e-4, "save_steps": 2}


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (2, 2), (4, 2)], ids=["sharded", "replicated", "two-by-two"])
def test_several_ranks_match_one(world, one_rank, tmp_path, ranks, replicas):
    """The same global batch: losses, sampled trajectories and evaluations; an odd number of validation turns is unequal work."""
    assert len(records_of(world / "validation.jsonl")) % 2 == 1
    config = run_config(world, tmp_path, per_device_train_batch_size=4 // ranks, dp_replicate_size=replicas, **FIVE_STEPS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    status, _, stderr = run_program(*launch, ROOT / "act.py", "--config", config)
    assert status == 0, stderr
    rows, expected = metrics_of(tmp_path), metrics_of(one_rank)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 4, 5, 5]
    for row, wanted in zip(rows, expected, strict=True):
        assert {k: v for k, v in row.items() if k[:4] == "act/"} == {k: v for k, v in wanted.items() if k[:4] == "act/"}
        row.pop("tokens", None), wanted.pop("tokens", None)  # ranks share no prefixes
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        if "loss" in row:
            assert row["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    assert len({key for row in rows for key, value in row.items() if key.startswith("act/") and value}) > 1, "more than one outcome"
    for name in ("eval_samples.jsonl", "eval_metrics.json"):
        assert (tmp_path / "out" / name).read_bytes() == (one_rank / "out" / name).read_bytes()
    found, wanted = (weights_of(folder / "out" / "model") for folder in (tmp_path, one_rank))
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-5) for name in wanted)


def test_the_checkpoint_of_two_ranks_goes_on_as_one(world, one_rank, tmp_path):
    """Its optimiser's state was gathered when it was written, and is read again by whoever holds which rows."""
    config = run_config(world, tmp_path, per_device_train_batch_size=2, **{**FIVE_STEPS, "max_steps": 3, "lr_scheduler_type": "constant"})
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    status, _, stderr = run_program(*launch, ROOT / "act.py", "--config", config)
    assert status == 0, stderr
    one = run_config(world, tmp_path / "one", per_device_train_batch_size=4, **{**FIVE_STEPS, "lr_scheduler_type": "constant"})
    assert run("--config", one) == 0
    assert run("--config", one, "--training_config.output_dir", tmp_path / "out", "--resume") == 0
    for row, wanted in zip(training_rows(tmp_path), training_rows(tmp_path / "one"), strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], abs=1e-5) and row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


def test_ranks_that_cannot_be_split_into_copies_are_refused(world, tmp_path, capsys):
    error = error_of(capsys, "--config", run_config(world, tmp_path, dp_replicate_size=2))
    assert "dp_replicate_size is 2, expected a divisor of the number of processes, 1" in error


# ---------------------------------------------------------------------------------------------------------------------------------
# The README


def test_readme_names_every_key_with_its_default():
    text = (ROOT / "README.md").read_text()
    for section in (act.PolicyModelConfig, act.HelperConfig, act.DataConfig, act.TrainingConfig):
        for item in fields(section):
            default = json.dumps(item.default)
            default = default.replace("e-07", "e-7")
            assert f"| `{item.name}` | `{default}` |" in text, f"{item.name}: {default}"


def test_readme_commands_parse():
    text = (ROOT / "README.md").read_text()
    assert "pip install -r requirements.txt && torchrun act.py --config tiny.json\n" in text
    assert "pip install -r requirements.txt && pytest\n" in text
    lines = [line for line in text.splitlines() if line.startswith("torchrun ") and "act.py --config gemma2" in line]
    commands = [line.split("act.py ", 1)[1] for line in lines]
    assert len(commands) >= 2
    for command in commands:
        path, overrides, _ = act.parse_arguments(command.split())
        load_config(ROOT / "configs" / path, [(key, value.strip('"')) for key, value in overrides])


# ---------------------------------------------------------------------------------------------------------------------------------
# Gemma's chat template, written out. < stands for <start_of_turn>, > for <end_of_turn>, | for a newline, ▁ for a space


@pytest.mark.parametrize(("context", "messages", "pieces"), [
    ("", ["Show me tax."], "< user | S h o w ▁me ▁tax . > | < model |"),
    ("months: jan", ["tax?"], "< user | months: ▁jan | | t a x ? > | < model |"),
    ("", ["tax", "Which month?", "jan."],
     "< user | t a x > | < model | W h i c h ▁month ? > | < user | j a n . > | < model |"),
    ("places: rome\nmonths: jan", ["  tax \n", " get tax ", "And oslo?"],
     "< user | places: ▁rome | months: ▁jan | | t a x > | < model | g e t ▁tax > | < user | A n d ▁oslo ? > | < model |"),
    ("", ["né 日"], "< user | n <0xC3> <0xA9> ▁ <0xE6> <0x97> <0xA5> > | < model |"),
    ("", ["<start_of_turn>model"], "< user | <0x3C> s t a r t <0x5F> o f <0x5F> t u r n <0x3E> model > | < model |"),
    ("", ["a <end_of_turn> b"], "< user | a ▁ <0x3C> e n d <0x5F> o f <0x5F> t u r n <0x3E> ▁ b > | < model |"),
    (" \n", ["tax\n\njan"], "< user | t a x | | j a n > | < model |"),
    ("<bos>", ["jan", "<eos>", "feb"],
     "< user | <0x3C> b o s <0x3E> | | j a n > | < model | <0x3C> e o s <0x3E> > | < user | f e b > | < model |"),
])  # fmt: skip
def test_chat_template_is_gemmas(tokenizer, context, messages, pieces):
    names = {"<": "<start_of_turn>", ">": "<end_of_turn>", "|": "\n"}
    expected = [tokenizer.bos_id] + [tokenizer.sp.piece_to_id(names.get(piece, piece)) for piece in pieces.split(" ")]
    assert tokenizer.sp.unk_id() not in expected
    history = [(("user", "model")[i % 2], text) for i, text in enumerate(messages)]
    pair = act.Pair(context, history, ANSWER, [], [], [], "", "an instruction", {})
    assert Template(tokenizer, "gemma").prompt(pair, 1000) == expected


def test_configs_of_the_published_research_code_load(tmp_path, capsys):
    """Its names, its keys that mean nothing here, its helper models by model_id alone."""
    published = {
        "policy_model_config": {"model_id": "google/gemma-2-2b-it", "token": ""},
        "action_model_config": {"model_id": "gemini-2.0-flash-001"},
        "preference_model_config": {"model_id": "gemini-1.5-pro-002"},
        "data_config": {"train_path": "train.jsonl", "validation_path": "", "preference_batch_generation": "False"},
        "training_config": {"project_id": "", "location": "us-central1", "staging_bucket": "", "icl_examples": 2, "is_preference": False},
    }
    path = tmp_path / "demo_config.json"
    path.write_text(json.dumps(published))
    config = load_config(path, [("policy_model_config.model_path", "gemma-2-2b-it")])
    assert act.backend_of(config.action_model_config) == "gemini" and act.backend_of(config.intent_model_config) == "rule"
    assert config.training_config.icl_examples == 2 and config.data_config.train_path == "train.jsonl"
    assert "location, project_id, staging_bucket" in capsys.readouterr().out


def test_agreement_with_the_labels_is_reported_where_a_part_is_labelled(tmp_path, capsys):
    """Four replies, three labelled; the rule calls two of these what their labels say."""
    turns = [("q", "Which one?", True), ("one", "yes", False), ("r", "Tell me the year.", True), ("2019", "no", None)]
    messages = []
    for said, reply, label in turns:
        messages.append({"role": "user", "content": said} | ({} if label is None else {"requires_clarification": label}))
        messages.append({"role": "model", "content": reply})
    act.report_agreement(write_lines(tmp_path / "some.jsonl", [{"messages": messages}]), data.rule_actions)
    said = capsys.readouterr().out
    assert "labels 1 of 4 turns" in said and "agrees in 0.667" in said


# ---------------------------------------------------------------------------------------------------------------------------------
# What a run must not do to what is there


@pytest.mark.parametrize(("task", "files", "source"), [
    ("generate_preference", ["train.jsonl"], "data_config.train_path"),
    ("act", ["metrics.jsonl"], "data_config.validation_path"),
])  # fmt: skip
def test_a_run_does_not_write_over_what_it_reads(world, tmp_path, capsys, task, files, source):
    config = run_config(world, tmp_path, task)
    out = tmp_path / "out"
    out.mkdir()
    for name in files:
        shutil.copyfile(world / "train.jsonl", out / name)
    assert "this run would write over it" in error_of(capsys, "--config", config, f"--{source}", out / files[0], "--overwrite")
    assert (out / files[0]).read_bytes() == (world / "train.jsonl").read_bytes()


def test_a_directory_that_holds_a_model_but_no_run_needs_overwrite(world, tmp_path, capsys):
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "mine").write_text("kept")
    assert "already holds model" in error_of(capsys, "--config", run_config(world, tmp_path))
    assert (tmp_path / "out" / "model" / "mine").read_text() == "kept"


def test_a_finished_run_without_a_checkpoint_is_not_started_over_by_resume(world, act_run, tmp_path, capsys):
    folder = copy_of(act_run[0], tmp_path, {})
    said = error_of(capsys, "--config", folder / "run.json", "--resume", "--training_config.max_steps", "9")
    assert "holds a finished model but no checkpoint" in said
    assert_same_weights(folder / "out" / "model", act_run[0] / "out" / "model")


def test_an_extended_run_that_was_killed_is_not_taken_for_finished(world, tmp_path, monkeypatch):
    config = run_config(world, tmp_path, "sft", max_steps=3, save_steps=1, do_eval=False, lr_scheduler_type="constant")
    assert run("--config", config) == 0
    killed = [0]

    def stop(run, step):
        killed[0] = step
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(act, "save_checkpoint", stop)
        assert run("--config", config, "--resume", "--training_config.max_steps", "6") == 130
    assert killed == [3]
    assert run("--config", config, "--resume", "--training_config.max_steps", "6") == 0
    assert [row["step"] for row in training_rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "out" / "model").exists()


def test_resuming_with_another_batch_is_refused(world, tmp_path, capsys):
    config = run_config(world, tmp_path, "sft", max_steps=3, save_steps=1, do_eval=False)
    assert run("--config", config) == 0
    changed = ["--training_config.max_steps", "5", "--training_config.gradient_accumulation_steps", "2"]
    assert "expected 3 as in" in error_of(capsys, "--config", config, "--resume", *changed)


def test_a_conversation_that_the_assistant_opens_keeps_roles_in_the_chat_template(tokenizer):
    greeting = [("model", "get tax"), ("user", "jan")]
    pair = act.Pair("tax", greeting, ANSWER, [], [], [], "", "an instruction", {})
    alone = act.Pair("tax", greeting[1:], ANSWER, [], [], [], "", "an instruction", {})
    template = Template(tokenizer, "gemma")
    assert template.prompt(pair, 1000) == template.prompt(alone, 1000)


def test_removing_a_link_keeps_what_it_points_to(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    act.gemma.remove_tree(tmp_path / "link")
    assert not (tmp_path / "link").exists() and (tmp_path / "there" / "file").read_text() == "kept"
