"""The loss of a margin, a step's gradient against oracles, optimiser, schedule, and which example comes when."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from common import (
    assert_nearly_same,
    assert_same_gradients,
    both_sides,
    gradients_of,
    model_config,
    oracle_logps,
    pairs_from,
    prompted,
    random_model,
    run_of,
    training_of,
    words,
)
from torch.distributed.tensor import DTensor

import act
import data
from act import DataOrder, TrainingConfig, dpo_loss
from gemma import Gemma


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
    assert chosen.grad.item() == pytest.approx(-0.5 / (1 + math.e))
    assert rejected.grad.item() == pytest.approx(0.5 / (1 + math.e))
    assert not any(reward.requires_grad for reward in rewards)


def test_an_unknown_loss_is_refused():
    with pytest.raises(data.InputError, match="'dpo', expected one of sigmoid, hinge, ipo"):
        margin_of(2.0, beta=0.1, loss_type="dpo")


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_a_preference_step_is_the_loss_of_oracle_logps(plain, pairs, loss_on):
    """Losses, the chosen side's likelihood per token and what is logged, from one row per sequence; one side is cut."""
    training = training_of(beta=0.3, rpo_alpha=0.4, label_smoothing=0.2, loss_on=loss_on)
    policy, reference_model = random_model(1), random_model()
    batch = [*pairs[3:6], replace(pairs[6], cut=True)]
    sequences = both_sides(batch, plain, training)
    logps = oracle_logps(policy, sequences)
    with torch.no_grad():
        reference = oracle_logps(reference_model, sequences)
    ratios = (logps - reference).view(-1, 2)
    margin = 0.3 * (ratios[:, 0] - ratios[:, 1])
    likelihood = logps[::2] / torch.tensor([sum(mask) for _, mask in sequences[::2]])
    losses = -0.8 * margin.sigmoid().log() - 0.2 * (-margin).sigmoid().log() - 0.4 * likelihood
    policy.zero_grad()
    (0.25 * losses.sum()).backward()
    expected = gradients_of(policy)
    policy.zero_grad()
    sums = act.preference_step(run_of(policy, reference_model, plain, training), prompted(batch, plain), 0.25)
    assert_same_gradients(gradients_of(policy), expected)
    assert all(parameter.grad is None for parameter in reference_model.parameters())
    rewards = 0.3 * ratios
    worked = {
        "loss": losses.sum(), "rewards/chosen": rewards[:, 0].sum(), "rewards/rejected": rewards[:, 1].sum(),
        "rewards/margins": margin.sum(), "rewards/accuracies": (margin > 0).sum(),
        "logps/chosen": logps[::2].sum(), "logps/rejected": logps[1::2].sum(),
    }  # fmt: skip
    assert sums.keys() - {"tokens"} == worked.keys()
    for key, value in worked.items():
        assert sums[key] == pytest.approx(value.item(), rel=1e-4, abs=1e-4), key


def test_a_pair_that_breaks_off_scores_one_token_less(plain, pairs):
    """The end token that the policy never wrote: its rejected side alone loses it."""
    whole, cut = (both_sides([replace(pairs[0], cut=cut)], plain, training_of()) for cut in (False, True))
    assert cut[0] == whole[0]
    assert cut[1] == tuple(part[:-1] for part in whole[1])


def test_an_sft_step_is_the_mean_likelihood_of_the_first_gold_reply(model, tokenizer, chat, pairs):
    policy, batch, sequences = copy.deepcopy(model), pairs[:3], []
    assert max(len(pair.gold) for pair in batch) > 1
    for pair in prompted(batch, chat):
        reply = tokenizer.encode(pair.gold[0][1]) + [tokenizer.end_of_turn_id]
        sequences.append((pair.prompt + reply, [0] * len(pair.prompt) + [1] * len(reply)))
    expected = -oracle_logps(policy, sequences) / torch.tensor([sum(mask) for _, mask in sequences])
    policy.zero_grad()
    (0.5 * expected.sum()).backward()
    gradient = gradients_of(policy)
    policy.zero_grad()
    sums = act.sft_step(run_of(policy, None, chat, training_of()), prompted(batch, chat), 0.5)
    assert sums["loss"] == pytest.approx(expected.sum().item(), rel=1e-5)
    assert_same_gradients(gradients_of(policy), gradient)


# ----------------------------------------------------------------------------------------------------------------------
# Sharded models, optimiser, schedule


SHARDED = pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "whole"])  # as of several ranks, or of one


def built(world, mesh, sharded, **options):
    model = act.build_model(model_config(world, **options), mesh)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters()), "one rank has all of it"
    if sharded:
        act.shard(model, mesh)
    return model


def whole_of(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_fully_sharded_gradients_equal_plain_ones(world, mesh, one_process, plain, pairs):
    policy, reference = Gemma.from_pretrained(world / "model"), random_model(3)
    sharded = built(world, mesh, True)
    for some in (policy, sharded):
        some_run = run_of(some, reference, plain, training_of(beta=0.5), one_process)
        act.preference_step(some_run, prompted(pairs[:4], plain), 0.25)
    found = {name: whole_of(parameter.grad) for name, parameter in sharded.named_parameters()}
    assert_same_gradients(found, gradients_of(policy))


@SHARDED
@pytest.mark.parametrize("kind", ["rmsprop", "adamw"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_optimizer_steps_equal_torch_on_a_whole_model(world, mesh, plain, pairs, kind, max_grad_norm, sharded):
    training = training_of(optim=kind, weight_decay=0.1, learning_rate=9.0, max_grad_norm=max_grad_norm)
    sharded, whole = built(world, mesh, sharded), Gemma.from_pretrained(world / "model")
    optimizer = act.make_optimizer(sharded, training)
    cls = {"rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW}[kind]
    oracle = cls(whole.parameters(), lr=1.0, weight_decay=0.1)
    for step, lr in enumerate((1e-3, 2e-3, 1e-3)):
        batch = prompted(pairs[4 * step : 4 * step + 4], plain)
        for some in (sharded, whole):
            act.sft_step(run_of(some, None, plain, training), batch, 0.25)
        expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), max_grad_norm or math.inf)
        assert expected > 0.2, "clipping must matter"
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
        oracle.zero_grad()
        assert act.clip_and_step(sharded, optimizer, max_grad_norm, lr) == pytest.approx(expected.item(), rel=1e-5)
        assert all(parameter.grad is None for parameter in sharded.parameters())
    start = Gemma.from_pretrained(world / "model")
    for (name, found), wanted, old in zip(
        sharded.named_parameters(), whole.parameters(), start.parameters(), strict=True
    ):
        assert (wanted - old).norm() > 1e-4, name
        assert_nearly_same(whole_of(found), wanted, name)


@SHARDED
def test_bfloat16_is_close_and_checkpointing_changes_nothing(world, mesh, plain, pairs, sharded):
    def step(checkpointing=False, bf16=False):
        torch.manual_seed(0)
        policy = built(world, mesh, sharded, bf16=bf16)
        policy.set_checkpointing(checkpointing)
        reference = act.build_model(model_config(world), mesh, trained=False)
        some_run = run_of(policy, reference, plain, training_of(rpo_alpha=1.0))
        sums = act.preference_step(some_run, prompted(pairs[:4], plain), 0.25)
        return sums, {name: whole_of(parameter.grad) for name, parameter in policy.named_parameters()}

    (sums, grads), (again, same_grads), (rough, near_grads) = step(), step(checkpointing=True), step(bf16=True)
    assert again == sums
    for name in grads:
        assert torch.equal(same_grads[name], grads[name]), name
        assert near_grads[name].dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(near_grads[name].flatten(), grads[name].flatten(), 0)
        assert cosine > 0.97, (name, cosine)
    assert rough["loss"] == pytest.approx(sums["loss"], rel=0.02) and rough != sums
    assert rough["logps/chosen"] == pytest.approx(sums["logps/chosen"], rel=0.02)


@pytest.mark.parametrize("bf16", [True, False])
def test_policy_and_reference_begin_as_one(world, mesh, plain, pairs, tmp_path, bf16):
    """Else no pair would begin at ln 2: a reference in bfloat16 must not round what the policy does not."""
    model = Gemma.from_pretrained(world / "model")
    draw = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, std=0.3, generator=draw)
    model.save_pretrained(tmp_path / "model")
    config = model_config(tmp_path, bf16=bf16)
    policy, reference = (act.build_model(config, mesh, trained) for trained in (True, False))
    batch = prompted(pairs[:4], plain)
    sums = act.preference_step(run_of(policy, reference, plain, training_of()), batch, 0.25)
    assert sums["loss"] == pytest.approx(4 * math.log(2), rel=1e-6) and sums["rewards/chosen"] == 0


def test_checkpointing_recomputes_every_layer(world, mesh, plain, pairs, monkeypatch):
    calls, forward = [], act.gemma.Layer._forward
    monkeypatch.setattr(act.gemma.Layer, "_forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    for checkpointing in (False, True):
        policy = act.build_model(model_config(world), mesh)
        policy.set_checkpointing(checkpointing)
        act.sft_step(run_of(policy, None, plain, training_of()), prompted(pairs[:1], plain), 1.0)
        assert len(calls) == (9 if checkpointing else 3)


@SHARDED
def test_the_unsharded_copy_is_the_model(world, mesh, sharded):
    model = built(world, mesh, sharded)
    whole, tokens = act.unsharded(model), torch.tensor([words(0, 20)])
    assert not any(isinstance(parameter, DTensor) for parameter in whole.parameters())
    assert torch.equal(whole(tokens), Gemma.from_pretrained(world / "model")(tokens))
    assert {parameter.dtype for parameter in act.unsharded(model, bf16=True).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("kind", "expected"), [
    ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
    ("cosine", [0.0, 0.5, 1.0, 0.8535534, 0.5, 0.1464466]),
])  # fmt: skip
def test_learning_rate_of_each_step(kind, expected):
    training = TrainingConfig(learning_rate=2.0, lr_scheduler_type=kind, warmup_steps=2)
    found = [act.learning_rate(step, 6, training) for step in range(6)]
    assert found == pytest.approx([2 * factor for factor in expected], abs=1e-7)


def test_learning_rate_without_warm_up_and_with_nothing_else():
    assert act.learning_rate(0, 4, TrainingConfig(learning_rate=1.0, lr_scheduler_type="linear")) == 1.0
    training = TrainingConfig(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=4)
    assert [act.learning_rate(step, 2, training) for step in range(2)] == [0.0, 0.25]


# ----------------------------------------------------------------------------------------------------------------------
# Which example comes when


@pytest.fixture(scope="module")
def seven_dialogues(tiny_rows):
    return pairs_from(*tiny_rows)


def test_every_example_comes_once_an_epoch_and_dialogues_stay_together(seven_dialogues):
    order, count = DataOrder(seven_dialogues, 3), len(seven_dialogues)
    groups = data.dialogues(seven_dialogues)
    assert len(groups) == 7 and sum(map(len, groups)) == count
    epochs = [[order[epoch * count + i] for i in range(count)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
        starts = [epoch.index(group[0]) for group in groups]
        together = [epoch[start : start + len(group)] for start, group in zip(starts, groups, strict=True)]
        assert together == groups
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(count))


def test_the_order_is_seeded_and_the_same_from_any_position(seven_dialogues):
    positions = list(range(2 * len(seven_dialogues) + 5))
    forward = DataOrder(seven_dialogues, 3)
    expected = [forward[position] for position in positions]
    backward = DataOrder(seven_dialogues, 3)
    assert [backward[position] for position in reversed(positions)] == expected[::-1]
    other = DataOrder(seven_dialogues, 4)
    assert [other[position] for position in positions] != expected


def test_shares_of_ranks_cover_everything_once(monkeypatch):
    for count in (0, 1, 5, 7, 8):
        for world_size in (1, 2, 3, 8):
            monkeypatch.setattr(act.dist, "get_world_size", lambda size=world_size: size)
            monkeypatch.setattr(act, "on_all", lambda work: [work()])
            parts = []
            for rank in range(world_size):
                monkeypatch.setattr(act.dist, "get_rank", lambda rank=rank: rank)
                parts.append(act.divided("", list, list(range(count)), size=3))
            assert sum(parts, []) == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
