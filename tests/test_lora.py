"""LoRA: adapters beside frozen weights, against PEFT's recorded values, dense weights, other numbers of processes."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from common import (
    assert_nearly_same_weights,
    assert_same_rows,
    assert_same_weights,
    error_of,
    metrics_of,
    random_model,
    rows_of,
    run,
    run_config,
    run_on_ranks,
    training_rows,
    weights_of,
)  # fmt: skip
from safetensors.torch import load_file

import act
import gemma
from gemma import Gemma, LoraConfig

GOLDEN = Path(__file__).parent / "golden"
BOTH = gemma.PROJECTIONS


def golden_model():
    """PEFT's adapters on the golden Gemma 2, loaded as a run loads them."""
    model = Gemma.from_pretrained(GOLDEN / "gemma2")
    pefts = json.loads((GOLDEN / "lora/adapter_config.json").read_text())
    gemma.add_adapters(model, LoraConfig(pefts["r"], pefts["lora_alpha"], pefts["target_modules"]))
    gemma.load_safetensors(gemma.adapters(model), GOLDEN / "lora", "adapter_model")
    return model, load_file(GOLDEN / "lora.safetensors")


def randomised(model, seed=1):
    """B is zero at the start, where A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gemma.adapters(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# ----------------------------------------------------------------------------------------------------------------------
# What it computes


def test_logits_and_gradients_are_pefts():
    model, golden = golden_model()
    logits = model(golden["tokens"])
    torch.testing.assert_close(logits, golden["logits"], atol=2e-4, rtol=0)  # as without adapters (test_gemma.py)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), golden["tokens"][:, 1:].flatten())
    torch.testing.assert_close(loss, golden["loss"], atol=1e-4, rtol=0)
    loss.backward()
    found = gemma.adapters(model)
    recorded = [name.removeprefix("grad.") for name in golden if name.startswith("grad.")]
    assert len(recorded) == 4
    for name in recorded:
        wanted = golden[f"grad.{name}"]
        assert (found[name].grad - wanted).norm() <= 1e-4 * wanted.norm() > 0
    assert all(p.grad is None for p in gemma.base_weights(model).values()), "the base is frozen"


def test_merged_weights_give_pefts_logits():
    model, golden = golden_model()
    gemma.merge_adapters(model)
    plain = Gemma(model.config)
    plain.load_state_dict(gemma.base_weights(model))
    torch.testing.assert_close(plain(golden["tokens"]), golden["merged.logits"], atol=2e-4, rtol=0)


def test_merging_rounds_once():
    model = random_model()
    gemma.add_adapters(model.bfloat16(), LoraConfig(2, 3.0, BOTH))
    randomised(model)
    linear = model.layers[0].mlp.up_proj
    wanted = (linear.weight.double() + 1.5 * linear.lora_B.double() @ linear.lora_A.double()).bfloat16()
    gemma.merge_adapters(model)
    assert linear.weight.dtype == torch.bfloat16 and linear.lora_A.dtype == torch.float32
    assert (linear.weight != wanted).float().mean() < 0.002  # float32 before float64 at a tie


@pytest.mark.parametrize("targets", [BOTH, ["k_proj", "down_proj"]])
def test_gradients_are_those_of_a_dense_weight(targets):
    """By autograd through W + scale B A."""
    model = random_model()
    dense = random_model()
    gemma.add_adapters(model, LoraConfig(3, 6.0, targets))
    randomised(model)
    leaves, weights = {}, dict(dense.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, gemma.Linear) and module.lora_A is not None:
            A, B = (getattr(module, key).detach().clone().requires_grad_() for key in gemma.ADAPTERS)
            leaves[name] = A, B
            weights[f"{name}.weight"] = module.weight.detach() + 2.0 * B @ A
    tokens = torch.randint(7, 400, (2, 12), generator=torch.Generator().manual_seed(3))
    wanted = torch.func.functional_call(dense, weights, (tokens,))
    found = model(tokens)
    torch.testing.assert_close(found, wanted, atol=3e-4, rtol=0)  # logits up to 12
    slopes = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    (found * slopes).sum().backward()
    (wanted * slopes).sum().backward()
    assert len(leaves) == 3 * len(targets)
    for name, module in model.named_modules():
        for key, leaf in zip(gemma.ADAPTERS, leaves.get(name, ()), strict=False):
            grad = getattr(module, key).grad
            assert leaf.grad.norm() > 0 and (grad - leaf.grad).norm() <= 1e-4 * leaf.grad.norm(), (name, key)


def test_with_its_adapters_off_the_model_is_what_it_was():
    base, model = random_model(), random_model()
    gemma.add_adapters(model, LoraConfig(2, 4.0, BOTH))
    tokens = torch.arange(7, 19)[None]
    assert torch.equal(model(tokens), base(tokens)), "B is zero"
    randomised(model)
    changed = model(tokens)
    with pytest.raises(KeyError), gemma.adapters_off(model):
        assert torch.equal(model(tokens), base(tokens))
        raise KeyError
    assert torch.equal(model(tokens), changed) and not torch.allclose(changed, base(tokens))


def test_adapters_start_alike_for_a_seed():
    models = [random_model(seed=4) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        gemma.add_adapters(model, LoraConfig(2, 4.0, ["o_proj"]))
        gemma.init_adapters(model, seed)
    A = [model.layers[1].self_attn.o_proj.lora_A for model in models]
    assert torch.equal(A[0], A[1]) and not torch.equal(A[0], A[2])
    bound = A[0].shape[1] ** -0.5
    assert 0.8 * bound < A[0].abs().max() <= bound and models[0].layers[0].self_attn.o_proj.lora_B.abs().max() == 0
    assert not torch.equal(A[0], models[0].layers[0].self_attn.o_proj.lora_A)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_adapters_are_written_as_peft_writes_them(tmp_path):
    model, _ = golden_model()
    gemma.save_adapters(model, tmp_path, "gemma2")
    ours, pefts = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, GOLDEN / "lora"))
    assert ours.keys() == pefts.keys() and all(torch.equal(ours[name], pefts[name]) for name in ours)
    ours, pefts = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, GOLDEN / "lora"))
    assert sorted(ours.pop("target_modules")) == sorted(pefts.pop("target_modules"))
    assert ours == {key: pefts[key] for key in ours}


# ----------------------------------------------------------------------------------------------------------------------
# Runs

LORA = {"lora_r": 2, "lora_alpha": 4.0}
FIVE = {"max_steps": 5, "save_steps": 2, "save_total_limit": 0, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


def lora_config(world, folder, policy=LORA, **training):
    path = Path(run_config(world, folder, **{**FIVE, "per_device_train_batch_size": 4, **training}))
    config = json.loads(path.read_text())
    config["policy_model_config"] |= policy
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def lora_run(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    assert run("--config", lora_config(world, folder)) == 0
    return folder


def test_a_run_begins_at_ln_2_and_leaves_adapters_and_a_model(world, lora_run):
    rows = training_rows(lora_run)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[0]["rewards/margins"] == 0.0
    assert rows[-1]["rewards/margins"] != 0.0
    held = {path.name for path in (lora_run / "out/checkpoints/step-4").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.safetensors"} <= held and "model.safetensors" not in held
    before, after = weights_of(world / "model"), weights_of(lora_run / "out/model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.split(".")[-2] in gemma.PROJECTIONS}
    moments = load_file(lora_run / "out/checkpoints/step-4/optimizer.safetensors")
    assert all(".lora_" in name for name in moments)


def test_the_merged_model_evaluates_as_the_run_ended(world, lora_run, tmp_path, monkeypatch):
    """The config of the model alone has lora_r too, and no adapters: memory that nothing was loaded into must not count
    as some."""
    to_empty = torch.nn.Module.to_empty

    def poisoned(module, **options):
        for parameter in to_empty(module, **options).parameters():
            parameter.data.fill_(math.nan)
        return module

    monkeypatch.setattr(torch.nn.Module, "to_empty", poisoned)
    path = lora_config(world, tmp_path, {**LORA, "model_path": str(lora_run / "out/model")})
    assert run("--config", path, "--task", "evaluate") == 0
    metrics = json.loads((tmp_path / "out/eval_metrics.json").read_text())
    assert metrics == json.loads((lora_run / "out/eval_metrics.json").read_text())
    first = next(row for row in metrics_of(lora_run) if row["step"] == 0)
    assert {f"eval/{key}": value for key, value in metrics.items()}.items() != first.items()


def test_the_adapter_on_its_base_is_the_merged_model(world, lora_run):
    config = json.loads((lora_run / "out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world / "model")
    base = Gemma.from_pretrained(world / "model")
    gemma.add_adapters(base, LoraConfig(config["r"], config["lora_alpha"], config["target_modules"]))
    gemma.load_safetensors(gemma.adapters(base), lora_run / "out/adapter", "adapter_model")
    gemma.merge_adapters(base)
    merged = weights_of(lora_run / "out/model")
    assert all(torch.equal(weight, merged[name]) for name, weight in gemma.base_weights(base).items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stopped_run_resumes_bit_for_bit(world, lora_run, tmp_path, checkpointing):
    """With its checkpoint alone; recomputed activations change nothing."""
    folder = tmp_path / "copy"
    shutil.copytree(lora_run, folder)
    for name in ("model", "adapter", "checkpoints/step-4"):
        shutil.rmtree(folder / "out" / name)
    rows = rows_of(folder / "out/metrics.jsonl")
    lora_config(world, folder, gradient_checkpointing=checkpointing)
    assert run("--config", folder / "run.json", "--resume") == 0
    assert len(rows) == len(rows_of(folder / "out/metrics.jsonl"))
    assert_same_weights(folder / "out/model", lora_run / "out/model")
    ours, wanted = (load_file(at / "out/adapter/adapter_model.safetensors") for at in (folder, lora_run))
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_match_one(world, lora_run, tmp_path, dtype):
    """The adapters stay float32 beside a base that is not."""
    training = {"evaluated": False, "max_steps": 2, "bf16": dtype == "bfloat16"}
    policy = {**LORA, "dtype": dtype}
    assert run("--config", lora_config(world, tmp_path / "one", policy, **training)) == 0
    config = lora_config(world, tmp_path / "two", policy, per_device_train_batch_size=2, **training)
    statuses, said = run_on_ranks(2, tmp_path / "two", "--config", config)
    assert statuses == [0, 0], said
    found, wanted = (load_file(tmp_path / name / "out/adapter/adapter_model.safetensors") for name in ("two", "one"))
    for name in wanted:
        assert wanted[name].dtype == torch.float32
    if dtype == "float32":
        assert_same_rows(training_rows(tmp_path / "two"), training_rows(tmp_path / "one"))
        assert_nearly_same_weights(tmp_path / "two/out/model", tmp_path / "one/out/model")
    else:
        rows = zip(training_rows(tmp_path / "two"), training_rows(tmp_path / "one"), strict=True)
        for row, one in rows:
            assert row["loss"] == pytest.approx(one["loss"], abs=0.1)  # ln 2 without training


def test_an_sft_run_trains_adapters(world, tmp_path):
    training = {"per_device_train_batch_size": 16, "learning_rate": 3e-3, "max_steps": 8}
    assert run("--config", lora_config(world, tmp_path, task="sft", evaluated=False, **training)) == 0
    losses = [row["loss"] for row in training_rows(tmp_path)]
    assert max(losses[-2:]) < 0.9 * losses[0]  # 4.6 and 5.8


@pytest.mark.parametrize(("policy", "said"), [
    ({"lora_r": 2, "lora_target_modules": ["q_proj", "lm_head"]}, "lora_target_modules has ['q_proj', 'lm_head'], not of ['q_proj'"),
    ({"lora_r": -1}, "lora_r is -1"),
])  # fmt: skip
def test_lora_settings_that_cannot_be(world, tmp_path, capsys, policy, said):
    config = lora_config(world, tmp_path, policy)
    assert said in error_of(capsys, "--config", config)
    assert not (tmp_path / "out").exists()


def test_optimizer_state_is_of_the_adapters_alone(world):
    model = random_model()
    gemma.add_adapters(model, LoraConfig(2, 4.0, ["q_proj"]))
    optimizer = act.make_optimizer(model, act.TrainingConfig(optim="adamw"))
    assert len(optimizer.state) == 2 * 3
