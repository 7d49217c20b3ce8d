"""Trie scoring: log-probabilities and gradients of a Forest, against one row per sequence; Forests written out."""

import copy
import random

import pytest
import torch
from common import (
    FORMATS,
    VOCABULARY,
    WINDOW,
    assert_same_gradients,
    both_sides,
    gradients_of,
    oracle_logps,
    prompted,
    run_of,
    training_of,
    words,
)  # fmt: skip
from torch.utils._python_dispatch import TorchDispatchMode

import act
import gemma
from gemma import Forest, Gemma, Template


def forest_of(sequences):
    """Of (tokens, mask)."""
    return Forest(*zip(*sequences, strict=True))


def scored_reply(prompt, reply, mask):
    """(tokens, mask) of a prompt and a reply with its own mask."""
    return prompt + reply, [0] * len(prompt) + mask


def weighted_gradients(model, logps):
    """Of a sum with a weight for each sequence, so that no two of them can be taken for each other."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return gradients_of(model)


def assert_scored_exactly(model, sequences):
    forest = forest_of(sequences)
    logps, expected = model.logps(forest), oracle_logps(model, sequences)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(weighted_gradients(model, logps), weighted_gradients(model, expected))
    assert forest.counts == [sum(mask) for *_, mask in sequences]
    return forest


@pytest.mark.parametrize("prompt_format", FORMATS)
def test_pairs_on_one_prompt_score_as_separate_rows(model, tokenizer, pairs, prompt_format):
    template = Template(tokenizer, prompt_format)
    sequences = both_sides([pairs[0], pairs[9]], template, training_of())
    assert min(mask.index(1) for _, mask in sequences) > 2 * WINDOW, "a long prompt"
    forest = assert_scored_exactly(model, sequences)
    alone = sum(len(tokens) for tokens, _ in sequences)
    assert forest.used < alone - 2 * WINDOW, "the prompts are not shared"


def test_all_turns_of_whole_dialogues_score_as_separate_rows(model, plain, pairs):
    sequences = both_sides(pairs, plain, training_of())
    forest = assert_scored_exactly(model, sequences)
    assert 5 * forest.used < sum(len(tokens) for tokens, _ in sequences)


def test_user_tokens_count_with_loss_on_all_and_only_then(model, plain, pairs):
    [pair] = prompted([pair for pair in pairs if len(pair.chosen) == 3][:1], plain)
    everything, assistant = (
        act.sequence(pair, pair.chosen, True, plain, training_of(loss_on=on)) for on in ("all", "assistant")
    )
    assert everything[0] == assistant[0]
    reply = len(everything[0]) - len(pair.prompt)
    assert everything[1] == [0] * len(pair.prompt) + [1] * reply and 0 < sum(assistant[1]) < reply
    assert_scored_exactly(model, [everything, assistant])


ODD_BATCHES = {
    "nothing shared": [(words(i, 12 + i), words(10 + i, 3 + i), [1] * (3 + i)) for i in range(4)],
    "one a prefix of another": [
        (words(0, 12), words(1, 9), [1] * 9), (words(0, 12), words(1, 9)[:4], [1] * 4), (words(2, 3), [9], [1])
    ],
    "identical": [(words(0, 12), words(1, 5), [1] * 5)] * 3,
    "identical tokens, different masks": [
        (words(0, 12), words(1, 5), mask) for mask in ([1, 0, 1, 0, 1], [0, 1, 1, 1, 0])
    ],
    "prompt of one token": [([2], words(1, 11), [1] * 11), ([2], words(3, 4), [1] * 4)],
    "reply of one": [([2, 9], [7], [1]), ([3], [7], [1])],
    "prompt cut elsewhere": [
        (words(0, 12), words(1, 5), [1] * 5), (words(0, 12) + words(1, 5)[:2], words(1, 5)[2:], [1] * 3)
    ],
}  # fmt: skip


@pytest.mark.parametrize("sequences", ODD_BATCHES.values(), ids=ODD_BATCHES)
def test_odd_batches_score_as_separate_rows(model, sequences):
    assert_scored_exactly(model, [scored_reply(*sequence) for sequence in sequences])


def test_a_reply_without_a_scored_token_counts_nothing(model):
    """A cut response of nothing but blanks has none."""
    forest = forest_of([scored_reply(words(0, 12), words(1, 5), [1] * 5), scored_reply(words(0, 12), [], [])])
    assert forest.counts == [5, 0]
    logps = model.logps(forest)
    assert logps[0].item() != 0 and logps[1].item() == 0


def test_the_order_of_sequences_only_permutes_their_logps(model, plain, pairs):
    sequences = both_sides(pairs[:5], plain, training_of())
    order = random.Random(0).sample(range(len(sequences)), len(sequences))
    with torch.no_grad():
        logps, shuffled = (model.logps(forest_of(rows)) for rows in (sequences, [sequences[i] for i in order]))
    torch.testing.assert_close(shuffled, logps[order], rtol=1e-5, atol=1e-5)


def test_forest_of_a_written_out_batch():
    """5 6 7 is shared by three; 5 6 7 8 is the beginning of another; 9 9 9 9 has a row's remainder to itself."""
    forest = Forest([[5, 6, 7, 8, 1], [5, 6, 7, 4, 4], [9, 9, 9, 9], [5, 6, 7, 8]])
    # sorted: 5 6 7 4 4 | 5 6 7 8 | 5 6 7 8 1 | 9 9 9 9
    assert forest.tokens.tolist() == [[5, 6, 7, 4, 4, 8, 1], [9, 9, 9, 9, 0, 0, 0]]
    assert forest.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4], [0, 1, 2, 3, 0, 0, 0]]
    assert forest.ends.tolist() == [[7, 7, 7, 5, 5, 7, 7], [4, 4, 4, 4, 5, 6, 7]]
    assert forest.paths == [(0, [0, 1, 2, 5, 6]), (0, [0, 1, 2, 3, 4]), (1, [0, 1, 2, 3]), (0, [0, 1, 2, 5])]
    assert forest.padding == pytest.approx(3 / 14) and forest.used == 11


def test_scored_tokens_of_a_written_out_batch():
    """Each is predicted one token before it, on its own branch; the same slot may predict several."""
    sequences = [[5, 6, 7, 8, 1], [5, 6, 7, 4, 4], [9, 9, 9, 9], [5, 6, 7, 8]]
    forest = Forest(sequences, [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]])
    assert forest.counts == [2, 1, 0, 2]
    assert forest.rows.tolist() == [0] * 5
    assert forest.slots.tolist() == [2, 5, 2, 0, 2]
    assert forest.targets.tolist() == [8, 1, 4, 6, 8]


def test_rows_are_longer_than_the_longest_trie_where_that_leaves_less_empty():
    """Sizes 6, 5, 3, 2: rows of 6 would be three, a ninth of them empty; two rows of 8 hold 6 + 2 and 5 + 3."""
    forest = Forest([[size] * size for size in (6, 5, 3, 2)])
    assert forest.tokens.tolist() == [[6] * 6 + [2] * 2, [5] * 5 + [3] * 3]
    assert forest.padding == 0
    assert Forest([[1] * 6, [2] * 4]).tokens.shape == (2, 6), "a row of 10 is more than half longer"
    rows = Forest([[9 + i] * size for i, size in enumerate((32, 30, 3, 3))])
    assert rows.tokens.shape == (2, 35), "rows end where the fullest one does"


def test_small_tries_share_a_row():
    forest = Forest([[5, 6, 7, 8, 9], [1, 2], [3, 4, 4]])
    assert forest.tokens.tolist() == [[5, 6, 7, 8, 9], [3, 4, 4, 1, 2]]
    assert forest.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert forest.ends.tolist() == [[5] * 5, [3, 3, 3, 5, 5]]
    assert forest.paths == [(0, [0, 1, 2, 3, 4]), (1, [3, 4]), (1, [0, 1, 2])]
    assert forest.padding == 0


def test_many_sequences_that_share_half_are_several_tries():
    """Attention over each other's slots would cost the square of all of them."""
    half = list(range(2, 62))
    sequences = [[*half, *(1000 * i + j for j in range(40))] for i in range(1, 41)]
    tries = Forest._tries(sequences)
    assert 1 < len(tries) < 10 and max(len(tokens) for tokens, *_ in tries) <= 4 * 100 + 40
    assert sum(len(tokens) for tokens, *_ in tries) < 0.6 * sum(map(len, sequences)), "what they share is shared"
    assert len(Forest._tries([[*half, i] for i in range(100, 400)])) < 3, "nothing is lost where little differs"


def test_every_sequence_is_found_along_its_path(plain, pairs):
    sequences = [tokens for tokens, _ in both_sides(pairs, plain, training_of())]
    forest = Forest(sequences)
    for sequence, (row, slots) in zip(sequences, forest.paths, strict=True):
        assert forest.tokens[row, slots].tolist() == sequence
        assert forest.positions[row, slots].tolist() == list(range(len(sequence)))
        assert (forest.ends[row, slots] > slots[-1]).all(), "each token is seen by all that come after it"


def test_an_empty_sequence_is_refused():
    with pytest.raises(gemma.InputError, match="empty"):
        Forest([[1], []])


def small_parts(monkeypatch, entries):
    """Let the head hold no more logits than this at a time."""
    monkeypatch.setattr(gemma, "LOGITS_HELD", {"cpu": entries})


@pytest.mark.parametrize("width", [1, 100])
def test_parts_of_the_vocabulary_change_nothing(monkeypatch, model, width):
    sequences = [scored_reply(*sequence) for sequence in ODD_BATCHES["nothing shared"]]
    once = model.logps(forest_of(sequences))
    expected = weighted_gradients(model, once)
    small_parts(monkeypatch, width * sum(sum(mask) for *_, mask in sequences))
    parted = model.logps(forest_of(sequences))
    torch.testing.assert_close(parted, once, rtol=1e-5, atol=1e-5)
    assert_same_gradients(weighted_gradients(model, parted), expected)


class MostLogits(TorchDispatchMode):
    """The most columns of a matrix with a row for each scored token."""

    def __init__(self, scored):
        super().__init__()
        self.scored, self.columns = scored, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor) and x.ndim == 2 and x.shape[0] == self.scored:
                self.columns = max(self.columns, x.shape[1])
        return result


def test_a_training_step_never_holds_the_logits_of_all_tokens(monkeypatch, model, plain, pairs):
    monkeypatch.setattr(Gemma, "logits", lambda *_: pytest.fail("the logits of every token"))
    run = run_of(copy.deepcopy(model), model, plain, training_of())
    scored = sum(sum(mask) for *_, mask in both_sides(pairs[:6], plain, training_of()))
    small_parts(monkeypatch, 100 * scored)
    with MostLogits(scored) as most:
        act.preference_step(run, prompted(pairs[:6], plain), 1.0)
    assert most.columns == 100 < VOCABULARY
