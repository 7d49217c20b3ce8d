"""gemma.py against values recorded from Hugging Face transformers (tests/golden), and what its readers and sampler promise."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from common import environment, random_model, run_program
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo import lookup_backend

import gemma
from gemma import Gemma, GemmaConfig, InputError, Tokenizer, generate

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "gemma2"
WINDOW = 8  # of the golden model; its prompts and continuations are longer

# config.json of google/gemma-2-2b as published with transformers 4
PUBLISHED_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}


@pytest.fixture(scope="module", params=["gemma2"])
def folder(request):
    """The golden model of a test: Gemma 2's, and Gemma 3's too where the test is marked with `both`."""
    return GOLDEN.parent / request.param


both = pytest.mark.parametrize("folder", ["gemma2", "gemma3"], indirect=True)
gemma3 = pytest.mark.parametrize("folder", ["gemma3"], indirect=True)


@pytest.fixture(scope="module")
def golden(folder):
    return load_file(folder.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def model(folder):
    return Gemma.from_pretrained(folder)


@pytest.fixture
def copied(folder, tmp_path):
    """The golden model's directory, free to be broken."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def edit_config(directory, drop=(), **changes):
    path = directory / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if key not in drop}))


def small_model(seed=0, **changes):
    """One local layer and twelve words unless told otherwise; weights large enough that tokens matter."""
    fields = {**PUBLISHED_2B, "vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    fields.update({"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 8, "sliding_window": 4}, **changes)
    model = Gemma(GemmaConfig(**{name: fields[name] for name in fields if name in GemmaConfig.__dataclass_fields__}))
    torch_generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=torch_generator))
    return model.eval()


def prompts_of(golden):
    return [golden[f"prompt.{i}"].tolist() for i in range(4)]


def continuations_of(golden):
    return [golden[f"continuation.{i}"].tolist() for i in range(4)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def message_of(raised):
    text = str(raised.value)
    assert "\n" not in text, "user errors are one line"
    return text


# ---------------------------------------------------------------------------------------------------------------------------------
# The same numbers as transformers


@both
@torch.no_grad()
def test_logits_match_transformers(model, golden):
    logits = model(golden["tokens"])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, golden["logits"], atol=2e-4, rtol=0)


@both
def test_gradients_match_transformers(model, golden):
    tokens = golden["tokens"]
    loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, golden["loss"], atol=1e-4, rtol=0)
    names = [name.removeprefix("grad.") for name in golden if name.startswith("grad.")]
    assert len(names) == 7
    weights = dict(model.named_parameters())
    for name, gradient in zip(names, torch.autograd.grad(loss, [weights[name] for name in names]), strict=True):
        expected = golden[f"grad.{name}"]
        assert (gradient - expected).abs().max() < 1e-4 * expected.abs().max(), name


@both
def test_greedy_matches_transformers_on_a_ragged_batch(model, golden):
    assert generate(model, prompts_of(golden), 24, temperature=0) == continuations_of(golden)


@both
def test_state_dict_has_the_names_of_the_checkpoint_without_model(folder, model):
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(model.state_dict()) == {name.removeprefix("model.") for name in file.keys()}


@both
@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_in_transformers(folder, golden):
    with safe_open(folder.with_suffix(".safetensors"), "pt") as file:
        theirs = float(file.metadata()["mean |bfloat16 - float32|"])
    logits = Gemma.from_pretrained(folder, dtype=torch.bfloat16)(golden["tokens"])
    assert logits.dtype == torch.float32
    assert (logits - golden["logits"]).abs().mean() < 1.5 * theirs


@torch.no_grad()
def test_embedding_scale_is_rounded_to_the_dtype(golden):
    model = Gemma.from_pretrained(GOLDEN, dtype=torch.bfloat16)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(golden["tokens"])
    scale = torch.tensor(6.9375, dtype=torch.bfloat16)  # sqrt(48) = 6.928, to the 8 bits of bfloat16
    assert torch.equal(seen[0].flatten(0, -2), (model.embed_tokens.weight[golden["tokens"]] * scale).flatten(0, -2))


# ---------------------------------------------------------------------------------------------------------------------------------
# Sliding window


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_local_layers_see_window_minus_one_tokens_back_each(layers, model_type):
    model = small_model(num_hidden_layers=layers, layer_types=["sliding_attention"] * layers, model_type=model_type)
    reach = layers * (4 - 1)
    tokens = torch.randint(12, (1, 20), generator=seeded(1))
    last = model(tokens)[0, -1]
    for distance, is_seen in ((reach, True), (reach + 1, False)):
        changed = tokens.clone()
        changed[0, -1 - distance] = (changed[0, -1 - distance] + 5) % 12
        assert torch.equal(model(changed)[0, -1], last) != is_seen, distance


@torch.no_grad()
def test_even_layers_are_local_and_odd_ones_global():
    tokens = torch.randint(12, (2, 20), generator=seeded(1))
    listed = {kind: small_model(num_hidden_layers=2, layer_types=list(kind))(tokens) for kind in (
        ("sliding_attention", "full_attention"), ("full_attention", "sliding_attention"), ("full_attention", "full_attention"))}
    default = small_model(num_hidden_layers=2)(tokens)
    assert [torch.equal(default, logits) for logits in listed.values()] == [True, False, False]


@both
@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits(model, golden):
    tokens = golden["tokens"].clone()
    tokens[:, 25:] = 7
    torch.testing.assert_close(model(tokens)[:, :25], golden["logits"][:, :25], atol=2e-4, rtol=0)


@both
def test_sequences_in_a_forest_are_scored_as_in_rows_of_their_own(model, golden):
    """Log-probabilities and gradients, of branches longer and shorter than the window, against log_softmax of each row's logits."""
    a, b = golden["tokens"][0].tolist(), golden["tokens"][1].tolist()
    sequences = [a, a[:30] + b[:9], a[:30] + b[:2] + a[:7], a[:24], b]
    masks = [[int(i == j) for j in range(len(sequence))] for sequence in sequences for i in range(1, len(sequence))]
    forest = gemma.Forest([sequence for sequence in sequences for _ in sequence[1:]], masks)
    assert forest.used < sum(map(len, sequences))
    found = model.logps(forest)  # each token's, one by one
    each = [model(torch.tensor([sequence]))[0, :-1].log_softmax(-1) for sequence in sequences]
    expected = torch.cat([logps.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0] for logps, ids in zip(each, sequences, strict=True)])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    weight = torch.randn(len(found), generator=seeded(7))
    gradients = [torch.autograd.grad((logps * weight).sum(), list(model.parameters())) for logps in (found, expected)]
    for (name, _), x, y in zip(model.named_parameters(), *gradients, strict=True):
        assert not x.is_sparse and (x - y).abs().max() < 1e-4 * y.abs().max(), name


@both
def test_the_gradient_of_an_embedding_used_twice_is_made_once(model, golden, monkeypatch):
    """What both uses wrote to is the gradient itself: autograd neither adds up nor copies."""
    add_rows, written = gemma.add_rows, []

    def watched(matrix, *rest):
        if matrix.shape == model.embed_tokens.weight.shape:  # the last layer's rows have their own
            written.append(matrix.data_ptr())
        return add_rows(matrix, *rest)

    monkeypatch.setattr(gemma, "add_rows", watched)
    tokens = golden["tokens"][0].tolist()
    model.zero_grad()
    model.logps(gemma.Forest([tokens], [[0] + [1] * (len(tokens) - 1)])).sum().backward()
    head, lookup = written
    assert head == lookup == model.embed_tokens.weight.grad.data_ptr()
    model.zero_grad()


def test_gradients_of_a_word_that_comes_often_are_added_up_before_they_are_rounded(monkeypatch):
    """A GPU would round the sum in bfloat16 after each value (CUDA's index_put_), as this double does."""
    index_add = torch.Tensor.index_add_

    def rounding(matrix, dim, rows, values):
        for row, value in zip(rows, values, strict=True):
            index_add(matrix, dim, row[None], value[None])

    monkeypatch.setattr(torch.Tensor, "index_add_", rounding)
    rows = torch.tensor([3, 1] * 1000)
    values = torch.rand(2000, 4, generator=seeded(0)).bfloat16()
    matrix = torch.zeros(5, 4, dtype=torch.bfloat16)
    gemma.add_rows(matrix, rows, values)
    exact = torch.stack([values[rows == row].double().sum(0) for row in range(5)])
    torch.testing.assert_close(matrix.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("held", [1, 40, 1000])
def test_logps_over_parts_of_the_vocabulary_are_those_over_the_whole(monkeypatch, held, softcap, dtype):
    """Values and gradients; with logits up to 200 and no cap an exponential without its maximum taken off would overflow."""
    monkeypatch.setitem(gemma.LOGITS_HELD, "cpu", held)
    hidden, embedding = (20 * torch.randn(5, 8, generator=seeded(1))).to(dtype), torch.randn(30, 8, generator=seeded(2)).to(dtype)
    targets, weight = torch.tensor([0, 29, 3, 3, 17]), torch.randn(5, generator=seeded(3))
    results = []
    for function in (lambda h, e, t, c: gemma.TokenLogps.apply(h, e, t, c, []), lambda h, e, t, c: gemma.soft_capped(h @ e.T, c).log_softmax(-1).gather(-1, t[:, None])[:, 0]):
        h, e = hidden.clone().requires_grad_(), embedding.clone().requires_grad_()
        logps = function(h, e, targets, softcap)
        assert logps.dtype == torch.float32 and logps.max() <= 0
        results.append([logps.detach(), *(x.float() for x in torch.autograd.grad((logps * weight).sum(), (h, e)))])
    assert softcap or results[0][0].min() < -100
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, atol=(1e-4 if dtype == torch.float32 else 4e-2) * float(y.abs().max()), rtol=0)


# ---------------------------------------------------------------------------------------------------------------------------------
# config.json


# config.json of google/gemma-3-270m as published, with transformers 4
PUBLISHED_270M = {
    "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "initializer_range": 0.02, "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
    "torch_dtype": "bfloat16", "transformers_version": "4.55.0.dev0", "use_bidirectional_attention": False, "use_cache": True,
    "vocab_size": 262144,
}  # fmt: skip


@pytest.mark.parametrize("drop", [(), ("layer_types",), ("layer_types", "_sliding_window_pattern"), ("rope_theta", "rope_local_base_freq"),
                                  ("attn_logit_softcapping", "final_logit_softcapping")])
def test_published_270m_config_loads_and_gives_the_published_size(tmp_path, drop):
    """Older files leave some keys to their defaults."""
    (tmp_path / "config.json").write_text(json.dumps({key: PUBLISHED_270M[key] for key in PUBLISHED_270M if key not in drop}))
    config = GemmaConfig.from_json(tmp_path / "config.json")
    assert (config.rope_theta, config.rope_local_base_freq, config.attn_logit_softcapping) == (1e6, 1e4, None)
    assert config.layer_types == PUBLISHED_270M["layer_types"]
    with torch.device("meta"):
        assert sum(weight.numel() for weight in Gemma(config).parameters()) == 268_098_176


@gemma3
@torch.no_grad()
def test_gemma3_in_the_dialect_of_transformers_4_is_the_same_model(copied, golden):
    for layers in ({"sliding_window_pattern": 6}, {"_sliding_window_pattern": 6}, {}):
        shutil.copy(GOLDEN.parent / "gemma3" / "config.json", copied)
        drop = ("rope_parameters", "layer_types", "_sliding_window_pattern")
        edit_config(copied, drop=drop, rope_theta=500.0, rope_local_base_freq=40.0, rope_scaling=None)
        edit_config(copied, **layers)
        torch.testing.assert_close(Gemma.from_pretrained(copied)(golden["tokens"]), golden["logits"], atol=2e-4, rtol=0)


@gemma3
def test_what_a_gemma3_saves_says_everything_in_both_dialects(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert (config["rope_theta"], config["rope_local_base_freq"], config["sliding_window_pattern"]) == (500.0, 40.0, 6)
    assert {kind: rope["rope_theta"] for kind, rope in config["rope_parameters"].items()} == {gemma.GLOBAL: 500.0, gemma.LOCAL: 40.0}
    assert config["attn_logit_softcapping"] is None and config["final_logit_softcapping"] is None


@gemma3
@pytest.mark.parametrize(("change", "said"), [
    ({"model_type": "gemma3"}, "gemma3_text"), ({"model_type": "gemma3n_text"}, "gemma3_text"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling"),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}}, "rope_parameters"),
    ({"rope_parameters": {"sliding_attention": 5}}, "rope_parameters"), ({"rope_parameters": 5}, "rope_parameters"),
    ({"rope_parameters": None, "rope_theta": "1e6"}, "rope_theta"),
    ({"rope_parameters": None, "rope_local_base_freq": 0}, "rope_local_base_freq"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"layer_types": None, "_sliding_window_pattern": "six"}, "pattern"),
])
def test_what_a_gemma3_cannot_be_is_said_with_the_file(copied, change, said):
    edit_config(copied, **change)
    with pytest.raises(InputError) as raised:
        Gemma.from_pretrained(copied)
    assert said in message_of(raised) and str(copied / "config.json") in message_of(raised)


def test_published_2b_config_loads_and_gives_the_published_size(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_2B))
    config = GemmaConfig.from_json(tmp_path / "config.json")
    with torch.device("meta"):
        assert sum(weight.numel() for weight in Gemma(config).parameters()) == 2_614_341_888


@torch.no_grad()
def test_rope_theta_at_the_top_level_and_no_layer_types_give_the_same_model(copied, golden):
    edit_config(copied, drop=("rope_parameters", "layer_types"), rope_theta=500.0)
    torch.testing.assert_close(Gemma.from_pretrained(copied)(golden["tokens"]), golden["logits"], atol=2e-4, rtol=0)


@torch.no_grad()
def test_layer_types_of_the_file_are_followed(copied, golden):
    edit_config(copied, sliding_window=1000)
    expected = Gemma.from_pretrained(copied)(golden["tokens"])
    edit_config(copied, sliding_window=WINDOW, layer_types=["full_attention"] * 4)
    everywhere = Gemma.from_pretrained(copied)(golden["tokens"])
    torch.testing.assert_close(everywhere, expected, atol=2e-4, rtol=0)
    assert (everywhere - golden["logits"]).abs().max() > 1


def test_eos_token_id_may_be_a_list(copied, tmp_path):
    edit_config(copied, eos_token_id=[1, 107])
    assert GemmaConfig.from_json(copied / "config.json").eos_token_id == [1, 107]
    Gemma.from_pretrained(copied).save_pretrained(tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text())["eos_token_id"] == [1, 107], name


def test_files_keep_what_their_source_said_beyond_our_fields(copied, tmp_path):
    edit_config(copied, brand_new_key={"a": [None, 1.5]}, dtype="bfloat16")
    source = {"top_k": 64, "do_sample": True, "eos_token_id": [1, 107], "pad_token_id": 0}
    (copied / "generation_config.json").write_text(json.dumps(source))
    config, saved = json.loads((copied / "config.json").read_text()), tmp_path / "again"
    for source_directory in (copied, saved):  # and what was saved is a source again
        Gemma.from_pretrained(source_directory).save_pretrained(saved)
        generation, again = (json.loads((saved / name).read_text()) for name in ("generation_config.json", "config.json"))
        assert generation == {**source, "bos_token_id": 2}
        assert {key: again[key] for key in config if key != "dtype"} == {**{key: config[key] for key in config if key != "dtype"}, "eos_token_id": [1, 107]}
        assert "dtype" not in again and again["torch_dtype"] == "float32"


def test_plain_weights_do_not_go_out_as_quantised_ones(copied, tmp_path):
    edit_config(copied, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    Gemma.from_pretrained(copied).save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_full_disk_names_the_file(model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise gemma.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(gemma, "save_file", full)
    with pytest.raises(gemma.InputError, match=rf"^{tmp_path}/model.safetensors: Error while .* No space left on device"):
        model.save_pretrained(tmp_path)


def test_saved_files_have_the_rights_that_the_users_umask_leaves(model, tmp_path):
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path, max_shard_bytes=60_000)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


@both
def test_unknown_config_keys_are_ignored(folder, copied):
    expected = GemmaConfig.from_json(folder / "config.json")
    edit_config(copied, brand_new_key={"a": 1})
    assert GemmaConfig.from_json(copied / "config.json") == expected


@pytest.mark.parametrize("key", [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "query_pre_attn_scalar", "sliding_window", "model_type", "attn_logit_softcapping", "final_logit_softcapping",
])
def test_missing_config_key_is_named_with_the_file(copied, key):
    edit_config(copied, drop=(key,))
    with pytest.raises(InputError) as raised:
        GemmaConfig.from_json(copied / "config.json")
    assert key in message_of(raised) and str(copied / "config.json") in message_of(raised)


@pytest.mark.parametrize(("key", "value"), [
    ("model_type", "gemma"), ("hidden_size", "48"), ("hidden_size", 48.5), ("vocab_size", None), ("vocab_size", True),
    ("num_key_value_heads", 3), ("num_key_value_heads", 0), ("sliding_window", 0), ("head_dim", 15), ("attn_logit_softcapping", "50"),
    ("layer_types", ["full_attention"]), ("layer_types", ["chunked_attention"] * 4), ("layer_types", 4), ("eos_token_id", "<eos>"),
    ("hidden_activation", "silu"), ("rope_parameters", {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}),
    ("rope_parameters", [500.0]),
])
def test_impossible_config_value_is_named_with_the_file(copied, key, value):
    edit_config(copied, **{key: value})
    with pytest.raises(InputError) as raised:
        Gemma.from_pretrained(copied)
    assert key in message_of(raised) and "config.json" in message_of(raised)


@pytest.mark.parametrize("content", [b"{\"vocab_size\": 200,", b"[1, 2]", b"\xff\xfe{}", b""])
def test_unreadable_config_names_the_file(copied, content):
    (copied / "config.json").write_bytes(content)
    with pytest.raises(InputError) as raised:
        GemmaConfig.from_json(copied / "config.json")
    assert str(copied / "config.json") in message_of(raised)


# ---------------------------------------------------------------------------------------------------------------------------------
# Reading and writing weights


@both
def test_every_parameter_holds_what_the_file_says(folder, model):
    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name.removeprefix("model.")], tensor) for name, tensor in stored.items())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_dtype_is_that_asked_for_whatever_the_file_holds(copied):
    stored = load_file(copied / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in stored.items()}, copied / "model.safetensors", {"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16):
        state = Gemma.from_pretrained(copied, dtype=dtype).state_dict()
        assert {tensor.dtype for tensor in state.values()} == {dtype}
        assert torch.equal(state["norm.weight"].float(), stored["model.norm.weight"].bfloat16().float())


def test_all_faults_of_a_weight_file_are_reported_together(copied):
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(80, 48)
    tensors["model.norm.weight"] = torch.zeros(47)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as raised:
        Gemma.from_pretrained(copied)
    message = message_of(raised)
    for part in ("layers.2.mlp.up_proj.weight", "layers.9.mlp.up_proj.weight", "norm.weight", "47", "48", "model.safetensors"):
        assert part in message, part


@pytest.mark.parametrize("kept", [0, 5, 1000, 300_000])
def test_truncated_weight_file_is_named(copied, kept):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError) as raised:
        Gemma.from_pretrained(copied)
    assert str(path) in message_of(raised)


def test_directory_without_weights_or_config_is_named(copied, tmp_path):
    (copied / "model.safetensors").unlink()
    with pytest.raises(InputError) as raised:
        Gemma.from_pretrained(copied)
    assert str(copied) in message_of(raised)
    with pytest.raises(InputError) as raised:
        Gemma.from_pretrained(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message_of(raised)


@both
@torch.no_grad()
@pytest.mark.parametrize("limit", [5_000_000_000, 60_000])
def test_saved_model_loads_bit_equal(model, golden, tmp_path, limit):
    model.save_pretrained(tmp_path, max_shard_bytes=limit)
    again = Gemma.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(again(golden["tokens"]), model(golden["tokens"]))
    assert not [name for name in os.listdir(tmp_path) if not name.endswith((".json", ".safetensors"))], "temporary files left"


@both
def test_saved_layout_is_that_of_transformers(folder, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors"]
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers refuses a file without it
    config = json.loads((tmp_path / "config.json").read_text())
    recorded = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == recorded["architectures"]
    assert {key: recorded[key] for key in config if key in recorded and "dtype" not in key} == {
        key: config[key] for key in config if key in recorded and "dtype" not in key}
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["pad_token_id"], generation["eos_token_id"], generation["bos_token_id"]) == (0, 1, 2)


def test_shards_stay_below_the_limit_and_the_index_adds_up(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)] and len(shards) > 5
    assert not (tmp_path / "model.safetensors").exists()
    total = 0
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert sorted(tensors) == sorted(name for name, file in index["weight_map"].items() if file == shard)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert 0 < size <= 60_000
        total += size
    assert index["metadata"]["total_size"] == total == sum(weight.nbytes for weight in model.parameters())
    assert index["weight_map"].keys() == load_file(GOLDEN / "model.safetensors").keys()


def test_a_tensor_above_the_limit_gets_its_own_shard(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=100)
    Gemma.from_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == len(list(model.parameters()))


@pytest.mark.parametrize(("first", "second"), [(60_000, 5_000_000_000), (5_000_000_000, 60_000), (60_000, 100_000)])
def test_the_later_of_two_saves_in_a_directory_is_the_one_that_loads(model, tmp_path, first, second):
    model.save_pretrained(tmp_path, max_shard_bytes=first)
    later = Gemma.from_pretrained(GOLDEN)
    with torch.no_grad():
        for weight in later.parameters():
            weight.add_(1)
    later.save_pretrained(tmp_path, max_shard_bytes=second)
    state = Gemma.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in later.state_dict().items())


def test_saving_leaves_other_files_of_the_directory_alone(model, tmp_path):
    (tmp_path / "notes").mkdir()
    for name in ("tokenizer.model", "notes/today.txt"):
        (tmp_path / name).write_text(name)
    for limit in (60_000, 5_000_000_000):
        model.save_pretrained(tmp_path, max_shard_bytes=limit)
        assert [(tmp_path / name).read_text() for name in ("tokenizer.model", "notes/today.txt")] == ["tokenizer.model", "notes/today.txt"]


def test_a_model_can_be_saved_into_the_working_directory(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(".")
    assert torch.equal(Gemma.from_pretrained(".").norm.weight, model.norm.weight)


def edit_tensors(directory, **changes):
    """Replace tensors, named with _ for the dots, by functions of them."""
    tensors = load_file(directory / "model.safetensors")
    for name, change in changes.items():
        name = f"model.{name.replace('_weight', '.weight')}"
        tensors[name] = change(tensors.get(name))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def make_shards(directory, norm_in="b.safetensors", copies=()):
    """a.safetensors and b.safetensors, the latter with norm.weight and copies of other tensors; the index says norm_in."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    shards = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: tensors[name] for name in tensors if shards[name] == file or file[0] == "b" and name in copies}, directory / file, {"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards | {"model.norm.weight": norm_in}}))


def fifo(directory, name):
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)


def twice_in_a_file(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "norm.weight": tensors["model.norm.weight"].clone()}, directory / "model.safetensors", {"format": "pt"})


def loop(directory, name):
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(name)


def two_models(directory):
    """As TRL's and PEFT's merges leave them: shards of the one, and another in one file."""
    whole = (directory / "model.safetensors").read_bytes()
    make_shards(directory)
    (directory / "model.safetensors").write_bytes(whole)


def generation(directory, text):
    (directory / "generation_config.json").write_text(text)


BROKEN = {  # name: (what is done to the directory, file named, what else is said)
    **{f"a shard called {name!r}": (lambda d, name=name: make_shards(d, name), "model.safetensors.index.json", repr(name))
       for name in ("../b.safetensors", "/dev/zero", "deeper/b.safetensors", ".")},
    **{f"a shard called {name!r}, a directory": (lambda d, name=name: make_shards(d, name), "", "not a file") for name in ("", "..")},
    "a tensor in two shards": (lambda d: make_shards(d, copies=["model.layers.1.mlp.up_proj.weight"]), "model.safetensors.index.json",
                               "layers.1.mlp.up_proj.weight stands in two places"),
    "a tensor with and without model.": (twice_in_a_file, "model.safetensors", "norm.weight stands in two places"),
    "a FIFO for a shard": (lambda d: (make_shards(d), fifo(d, "b.safetensors")), "b.safetensors", "not a file"),
    **{f"a FIFO for {name}": (lambda d, name=name: fifo(d, name), name, "not a file") for name in (
        "model.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json")},
    **{f"weights of {kind}": (lambda d, kind=kind: edit_tensors(d, norm_weight=lambda x: x.to(kind)), "model.safetensors", f"norm.weight is {name} [48], expected floats [48]")
       for kind, name in ((torch.int8, "I8"), (torch.bool, "BOOL"), (torch.complex64, "C64"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.int64, "I64"))},
    **{f"weights with {number}": (lambda d, number=number: edit_tensors(d, embed_tokens_weight=lambda x: x.index_fill(0, torch.tensor([7]), number)),
                                  "model.safetensors", "embed_tokens.weight holds numbers that are not finite")
       for number in (float("nan"), float("inf"), float("-inf"))},
    "weights too large for their type here": (lambda d: edit_tensors(d, norm_weight=lambda x: x.double() + 1e300), "model.safetensors", "norm.weight holds numbers"),
    **{f"{key} {str(value)[:9]}": (lambda d, key=key, value=value: edit_config(d, rope_parameters=None, **{key: value}), "config.json", key) for key, value in (
        ("num_hidden_layers", 10**18), ("num_hidden_layers", 1001), ("num_hidden_layers", 1e18), ("vocab_size", 10**400), ("rms_norm_eps", float("inf")),
        ("rope_theta", float("inf")), ("query_pre_attn_scalar", float("nan")), ("final_logit_softcapping", float("inf")),
        ("model_type", ["gemma2"]), ("model_type", {}), ("eos_token_id", [[1]]))},
    "sizes that only a data centre has": (lambda d: edit_config(d, vocab_size=2**31, hidden_size=2**31), "config.json", "a model of 17,"),
    **{f"{key} {value}, which the weights have not": (lambda d, key=key, value=value: edit_config(d, **{key: value}), "model.safetensors", f"{name} is F32")
       for key, value, name in (("vocab_size", 2**31, "embed_tokens.weight"), ("intermediate_size", 2**30, "layers.0.mlp.gate_proj.weight"))},
    "a link to itself for weights": (lambda d: loop(d, "model.safetensors"), "model.safetensors", "not readable"),
    "a link to itself for a config": (lambda d: loop(d, "config.json"), "config.json", "cannot be read"),
    "a link to itself for a tokenizer": (lambda d: loop(d, "tokenizer.model"), "tokenizer.model", "no such file"),
    "an index of other shards beside a whole model": (two_models, "model.safetensors.index.json", "other files than model.safetensors"),
    "weights of four bits": (lambda d: edit_tensors(d, **{"layers.0.mlp.up_proj.weight.absmax": lambda _: torch.zeros(3, dtype=torch.uint8)}),
                             "model.safetensors", "holds layers.0.mlp.up_proj.weight.absmax, expected weights that are not quantised"),
    **{f"generation_config.json {text}": (lambda d, text=text: generation(d, text), "config.json", said) for text, said in (
        ("{", "invalid JSON"), ("[]", "expected an object"), ('{"eos_token_id": "<eos>"}', "eos_token_id"), ('{"eos_token_id": [1, [2]]}', "eos_token_id"))},
    "tokenizer_config.json {": (lambda d: (d / "tokenizer_config.json").write_text("{"), "tokenizer_config.json", "invalid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_said_in_one_line_with_status_2(copied, tokenizer_path, capsys, monkeypatch, name):
    """By the command line, in this process; a FIFO that somebody waits for ends in an alarm."""
    shutil.copy(tokenizer_path, copied / "tokenizer.model")
    breaks, file, said = BROKEN[name]
    breaks(copied)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))

    def waited(*_):
        pytest.fail("it waits")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(20)
    try:
        assert gemma.main([str(copied), "--prompt", "rome"]) == 2
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    error = capsys.readouterr().err
    assert error.startswith(f"gemma.py: error: {copied / file if file not in ('config.json',) else copied}") and error.count("\n") == 1, error
    assert file in error and said in error, error


def test_a_rank_without_rows_of_a_tensor_loads_none(tmp_path):
    """As where there are more ranks than rows."""
    save_file({"norm.weight": torch.zeros(0)}, tmp_path / "model.safetensors")
    gemma.load_safetensors({"norm.weight": torch.zeros(0)}, tmp_path)


def test_missing_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=60_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError) as raised:
        Gemma.from_pretrained(tmp_path)
    assert shard.name in message_of(raised)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"model.norm.weight": 3}}'])
def test_broken_index_is_named(model, tmp_path, content):
    model.save_pretrained(tmp_path, max_shard_bytes=60_000)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError) as raised:
        Gemma.from_pretrained(tmp_path)
    assert "model.safetensors.index.json" in message_of(raised)


def test_tensor_that_the_index_leaves_out_is_missing(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=60_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"]["model.embed_tokens.weight"]  # and with it the few others of its shard
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard}
    path.write_text(json.dumps(index))
    with pytest.raises(InputError) as raised:
        Gemma.from_pretrained(tmp_path)
    assert "embed_tokens.weight" in message_of(raised)


def test_failed_save_leaves_the_earlier_model_whole(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    later = Gemma.from_pretrained(GOLDEN)
    with torch.no_grad():
        later.norm.weight.add_(1)
    def full(*_, **__):
        raise OSError("disk full")

    for name, place in (("save_file", gemma), ("replace", Path)):
        with monkeypatch.context() as patch, pytest.raises((OSError, gemma.InputError), match="disk full"):
            patch.setattr(place, name, full)
            later.save_pretrained(tmp_path)
    assert torch.equal(Gemma.from_pretrained(tmp_path).norm.weight, model.norm.weight)


# ---------------------------------------------------------------------------------------------------------------------------------
# Generation


@both
@torch.no_grad()
def test_cached_decode_matches_the_full_forward(model, golden):
    prompts = prompts_of(golden)
    for prompt, new in zip(prompts, generate(model, prompts, 4 * WINDOW, temperature=0), strict=True):
        assert len(new) == 4 * WINDOW
        best = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1].topk(2)
        assert (best.values[:, 0] - best.values[:, 1]).min() > 1e-4, "too close to a tie to be a test"
        assert best.indices[:, 0].tolist() == new


@both
def test_greedy_rows_do_not_depend_on_other_rows(model, golden):
    prompts = prompts_of(golden)
    together = generate(model, prompts, 12, temperature=0)
    assert together == [generate(model, [prompt], 12, temperature=0)[0] for prompt in prompts]
    assert together == generate(model, prompts[::-1], 12, temperature=0)[::-1]


def test_sampled_rows_with_their_own_generators_do_not_depend_on_other_rows(model, golden):
    prompts, seeds = prompts_of(golden), [5, 6, 7, 8]
    stops = [generate(model, prompts[:1], 12, generator=[seeded(seeds[0])])[0][3]]  # the first row is to leave the batch early
    together = generate(model, prompts, 12, stop_ids=stops, generator=[seeded(seed) for seed in seeds])
    assert len(together[0]) < 4 and len(together[1]) == len(together[2]) == 12
    for prompt, seed, row in zip(prompts, seeds, together, strict=True):
        assert generate(model, [prompt], 12, stop_ids=stops, generator=[seeded(seed)]) == [row]
    same_prompt = generate(model, [prompts[0]] * 4, 12, generator=[seeded(seed) for seed in seeds])
    assert len({tuple(row) for row in same_prompt}) == 4


def test_the_same_seed_gives_the_same_text_and_the_global_seed_counts_for_nothing(model, golden):
    rows = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        rows.append(generate(model, prompts_of(golden), 8, generator=seeded(3)))
        assert torch.equal(torch.get_rng_state(), before)
    assert rows[0] == rows[1] != generate(model, prompts_of(golden), 8, generator=seeded(4))


def test_rows_end_before_their_stop_token_and_others_go_on(model, golden):
    expected = continuations_of(golden)
    stops = {expected[0][5], expected[2][0]}
    cut = [next((i for i, token in enumerate(row) if token in stops), 24) for row in expected]
    assert cut[2] == 0 and 0 < cut[0] <= 5 and len(set(cut)) >= 3, "the rows should end at different times"
    got = generate(model, prompts_of(golden), 24, temperature=0, stop_ids=sorted(stops))
    assert got == [row[:length] for row, length in zip(expected, cut, strict=True)]


def test_a_row_is_as_long_as_asked_for_exactly_if_it_was_cut(model, golden):
    """Also where its next token would have been a stop token, which nobody has drawn."""
    prompt, expected = prompts_of(golden)[0], continuations_of(golden)[0]
    at = next(i for i in range(3, 24) if expected[i] not in expected[:i])
    for asked in (at, at + 1, at + 2):
        [row] = generate(model, [prompt], asked, temperature=0, stop_ids=[expected[at]])
        assert row == expected[:at] and (len(row) == asked) == (asked == at)


class RecordedOnCPU:
    """Stands for CUDA graphs: what was called while one recorded, its replay calls again with the same tensors, into the same result."""

    def __init__(self):
        self.calls, self.versions, self.rows = [], [], []
        self.extend = torch.compile(gemma.extend, fullgraph=True, backend=self.compile)

    def compile(self, graph, inputs):
        """What inductor is given, run as it is."""
        self.versions.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def __call__(self, *arguments):
        self.calls.append((arguments, self.extend(*arguments)))
        return self.calls[-1][1]

    def graph(self):
        graph = SimpleNamespace()
        recording = self.record(graph)
        graph.capture_begin = lambda **_: recording.__enter__()
        graph.capture_end = lambda: recording.__exit__(None, None, None)
        return graph

    @contextlib.contextmanager
    def record(self, graph):
        self.calls.clear()
        yield
        [((model, stores, *inputs, spans), result)] = self.calls
        self.calls.clear()
        self.rows.append(len(result))
        references = [[weakref.ref(x) for x in each] for each in (stores, inputs)]  # a graph keeps nothing alive

        def replay():
            stores, inputs = ([reference() for reference in each] for each in references)
            result.copy_(self.extend(model, stores, *inputs, spans))

        graph.replay = replay


@pytest.fixture
def gpu_steps(monkeypatch):
    """Decoding steps take the GPU's path."""
    torch._dynamo.reset()  # what it has seen of other models makes it compile twice
    recorded = RecordedOnCPU()
    monkeypatch.setattr(gemma, "compiled", lambda function, **_: {gemma.extend: recorded}[function])
    monkeypatch.setattr(gemma.KVCache, "_records", lambda cache: gemma.RECORDED not in gemma.FAILED)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", recorded.graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    return recorded


def two_turns(model, first, second, stops, cache):
    """Replies to `first`, and to `second` said after them by all but the first row, with seven tokens a reply at most."""
    def talk(prompts, rows):
        return generate(model, prompts, 7, stop_ids=stops, generator=[seeded(row) for row in rows], kv_cache=cache)

    replies, later = talk(first, range(len(first))), range(1, len(first))
    if cache is not None:
        cache.keep(list(later))
    return replies, talk([first[row] + replies[row] + second[row] for row in later], later)


@pytest.mark.parametrize(("folder", "path"), [("gemma2", "CPU"), ("gemma3", "CPU"), ("gemma2", "GPU")], indirect=["folder"])
def test_a_kept_cache_goes_on_as_if_everything_were_read_anew(path, folder, model, golden, request):
    """Second turns of different lengths, longer and shorter than the window, after replies that ended at different times."""
    first = [(prompt + prompts_of(golden)[2])[:n] for prompt, n in zip(prompts_of(golden) * 2, (30, 3, 12, 21, 5, 9, 17), strict=False)]
    second = [prompts_of(golden)[i % 4][: 1 + 3 * i] for i in range(len(first))]
    stops = range(0, 200, 8)
    expected = two_turns(model, first, second, stops, None)
    assert all(len(set(map(len, replies))) > 2 for replies in expected), "rows should end at different times"
    recorded = request.getfixturevalue("gpu_steps") if path == "GPU" else None
    assert two_turns(model, first, second, stops, gemma.KVCache()) == expected
    if recorded:  # once for all numbers of rows above one, all lengths, and another copy of the weights
        assert two_turns(Gemma.from_pretrained(folder), first[:3], second[:3], stops, gemma.KVCache())[0] == expected[0][:3]
        assert len(recorded.versions) == 1


def test_steps_on_a_gpu_are_recorded_for_few_numbers_of_rows(model, golden, gpu_steps, monkeypatch):
    """And again when the cache's tensors are others; rows that are done do no harm, and come to none when the cache is full."""
    gpu_steps.extend = gemma.extend
    monkeypatch.setattr(gemma.KVCache, "multiple", 1)
    prompts = [(prompts_of(golden)[i % 4] * 9)[i : i + 40 - i] for i in range(24)]
    cache, stops = gemma.KVCache(), range(0, 200, 8)
    replies = generate(model, prompts, 30, stop_ids=stops, kv_cache=cache)
    assert gpu_steps.rows == [24, 16, 4]
    cache.keep(kept := [3, 9, 11, 17])
    later = [prompts[row] + replies[row][:5] + [7] for row in kept]
    replies = generate(model, later, 6, generator=seeded(1), kv_cache=cache)
    assert gpu_steps.rows == [24, 16, 4, 4], "keep made new tensors; there was room, so nothing else did"
    full = gemma.KVCache()
    [[first], _] = generate(model, prompts[::17], 1, temperature=0, kv_cache=full)
    longer = [prompts[0] + [first], prompts[17]]
    assert len(longer[0]) == full.stores[0].shape[2]
    [stop] = generate(model, longer[:1], 1, temperature=0)[0]
    ended = generate(model, longer, 6, temperature=0, stop_ids=[stop], kv_cache=full)
    tight = gemma.KVCache()
    generate(model, prompts[:1], 1, kv_cache=tight)
    grown = generate(model, longer[:1], 6, temperature=0, kv_cache=tight)
    assert gpu_steps.rows == [24, 16, 4, 4, 2, 1], "a cache that must grow grows once a reply"
    longest = [longer[0] + grown[0] + [7] * 9]
    again = generate(model, longest, 6, temperature=0, kv_cache=tight)
    assert gpu_steps.rows == [24, 16, 4, 4, 2, 1, 1], "what was recorded with the old tensors is recorded anew"
    monkeypatch.undo()
    assert replies == generate(model, later, 6, generator=seeded(1))
    assert grown == generate(model, longer[:1], 6, temperature=0)
    assert again == generate(model, longest, 6, temperature=0)
    assert ended == generate(model, longer, 6, temperature=0, stop_ids=[stop]) and not ended[0] and ended[1]


def test_a_step_that_cannot_be_recorded_is_said_once_and_done_without(model, golden, gpu_steps, monkeypatch, capsys):
    monkeypatch.setattr(gemma, "FAILED", set())
    tried = []
    monkeypatch.setattr(gemma, "CapturedStep", lambda *_: tried.append(1) or 1 / 0)
    for _ in range(2):
        replies = generate(model, prompts_of(golden), 12, temperature=0)
    assert replies == [row[:12] for row in continuations_of(golden)] and tried == [1]
    assert capsys.readouterr().out == "a recorded step does not work on this machine, going on without it (ZeroDivisionError: division by zero)\n"


def test_what_memory_does_not_suffice_for_has_not_failed_for_good(monkeypatch):
    monkeypatch.setattr(gemma, "FAILED", set())
    with pytest.raises(torch.OutOfMemoryError), gemma.optional("a recorded step"):
        raise torch.OutOfMemoryError("20 MiB")
    assert not gemma.FAILED


def test_what_fails_is_said_on_rank_0_alone(monkeypatch, capsys):
    monkeypatch.setattr(gemma, "FAILED", set())
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with gemma.optional("it"):
            raise RuntimeError("too old\nand more")
    assert capsys.readouterr().out == "it does not work on this machine, going on without it (RuntimeError: too old)\n"
    assert gemma.FAILED == {"it"}


def test_a_fused_function_is_one_kernel_on_a_gpu_alone_and_where_kernels_compile(monkeypatch):
    monkeypatch.setattr(gemma, "compiled", lambda function, dynamic: lambda *args: ("kernel", *args))
    monkeypatch.setattr(gemma, "FAILED", set())
    function = gemma.fused(lambda x, y: ("lines", x, y))
    on_gpu, on_cpu = SimpleNamespace(is_cuda=True), torch.ones(1)
    assert function(on_gpu, 2) == ("kernel", on_gpu, 2) and function(on_cpu, 2) == ("lines", on_cpu, 2)
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert function(on_gpu, 2)[0] == "lines"
    gemma.FAILED.add(gemma.FLEX)
    assert function(on_gpu, 2)[0] == "lines"


def test_flex_attention_that_does_not_compile_is_said_once_and_blocks_take_its_place(model, golden, monkeypatch, capsys):
    """On a CPU it has no backward pass."""
    monkeypatch.setattr(gemma, "FAILED", set())
    gemma.flex_compiles.cache_clear()
    assert gemma.flex_compiles(2, 1, 16, None, torch.float32, "cpu") is False
    assert gemma.flex_compiles(4, 1, 16, None, torch.float32, "cpu") is False
    said = capsys.readouterr().out
    assert said.startswith("flex attention does not work on this machine, going on without it (") and said.count("\n") == 1
    gemma.flex_compiles.cache_clear()
    forest = gemma.Forest(prompts_of(golden))
    on_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(gemma, "flex_mask", lambda rule, positions: "flex")
    monkeypatch.setattr(gemma, "tree_blocks", lambda rule, positions: "blocks")
    monkeypatch.setattr(gemma, "flex_compiles", lambda heads, *_: heads == 4)
    kinds = (gemma.GLOBAL, gemma.LOCAL)
    assert gemma.tree_masks(on_gpu, forest.ends, model) == dict.fromkeys(kinds, "flex")
    assert gemma.tree_masks(forest.positions, forest.ends, model) == dict.fromkeys(kinds, "blocks")
    monkeypatch.setattr(gemma, "flex_compiles", lambda *_: False)
    assert gemma.tree_masks(on_gpu, forest.ends, model) == dict.fromkeys(kinds, "blocks")


@pytest.mark.parametrize(("head_dim", "memory", "blocks"), [(256, 99, 32), (256, 163, None), (256, 227, None), (128, 99, None)])
def test_heads_of_256_have_smaller_blocks_where_a_card_has_little_shared_memory(monkeypatch, head_dim, memory, blocks):
    card = SimpleNamespace(shared_memory_per_block_optin=memory * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    gemma.kernel_options.cache_clear()
    options = gemma.kernel_options("cuda", head_dim)
    gemma.kernel_options.cache_clear()
    assert options["FORCE_USE_FLEX_ATTENTION"] and options.get("bwd_BLOCK_M1") == blocks == options.get("bwd_BLOCK_N2")


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1000, 5000])
def test_a_distribution_is_inverted_by_blocks_as_by_one_sum(size):
    weights = torch.rand(400, size, generator=seeded(size)) ** 4
    weights *= torch.rand(400, size, generator=seeded(1)) < 0.5
    weights[:, size // 2] += 0.1
    u = torch.rand(400, generator=seeded(2), dtype=torch.float64)
    u[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    cumulative = weights.double().cumsum(-1)
    wanted = (cumulative > (u * cumulative[:, -1])[:, None]).int().argmax(-1)
    found = gemma.invert(weights, u)
    assert (weights.gather(1, found[:, None]) > 0).all() and found.dtype == torch.int64
    assert torch.equal(found[2:], wanted[2:]) and int(found[0]) == int(wanted[0])


def test_a_stop_token_in_the_prompt_stops_nothing(model, golden):
    prompt, expected = prompts_of(golden)[1], continuations_of(golden)[1]
    unused = next(token for token in prompt if token not in expected)
    assert generate(model, [prompt], 24, temperature=0, stop_ids=[unused]) == [expected]


def test_no_new_tokens_asked_for_gives_none(model):
    assert generate(model, [[5, 6], [7]], 0) == [[], []]


def test_no_prompts_give_no_rows(model):
    assert generate(model, [], 5) == []


@pytest.mark.parametrize("prompts", [[[]], [[5], []]])
def test_empty_prompt_is_an_error(model, prompts):
    with pytest.raises(ValueError, match="prompt"):
        generate(model, prompts, 5)


def test_generation_keeps_no_graph_and_leaves_training_mode_alone(golden):
    model = Gemma.from_pretrained(GOLDEN).train()
    with_gradients = []
    model.layers[0].register_forward_pre_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    assert generate(model, prompts_of(golden)[:1], 3, temperature=0) == [continuations_of(golden)[0][:3]]
    assert len(with_gradients) == 3 and not any(with_gradients) and torch.is_grad_enabled()
    assert model.training and all(weight.requires_grad for weight in model.parameters())


NARROW = [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}, {"temperature": 1e-4}, {"temperature": 1e-30}, {"temperature": 1e-37},
          {"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 1e-40, "top_p": 0.5}, {"temperature": 1e-40, "top_k": 4}]


@pytest.mark.parametrize("only", NARROW)
def test_narrow_sampling_is_greedy(model, golden, only):
    assert generate(model, prompts_of(golden), 10, generator=seeded(0), **only) == [row[:10] for row in continuations_of(golden)]


@pytest.mark.parametrize("only", [{"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-40}])
def test_of_equally_likely_tokens_narrow_sampling_takes_what_greedy_takes(only):
    model = small_model(vocab_size=3000)
    with torch.no_grad():
        model.embed_tokens.weight[3:] = model.embed_tokens.weight[3]
    assert generate(model, [[2, 3]], 4, generator=seeded(0), **only) == generate(model, [[2, 3]], 4, temperature=0)


def nucleus(probabilities, top_p):
    """The fewest most probable tokens that together reach top_p, renormalised."""
    kept, mass = torch.zeros_like(probabilities), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if mass < top_p:
            kept[token] = probabilities[token]
            mass += probabilities[token].item()
    return kept / mass


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 3}, {"top_k": 99}, {"top_p": 0.6},
                                      {"temperature": 1.5, "top_p": 0.8}, {"temperature": 0.7, "top_k": 4}])
def test_sampled_frequencies_are_the_probabilities(settings):
    model = small_model(seed=4)
    prompt, draws = [5, 6, 7], 4000
    expected = torch.softmax(model(torch.tensor([prompt]))[0, -1] / settings.get("temperature", 1.0), -1)
    expected = nucleus(expected, settings.get("top_p", 1.0))
    if "top_k" in settings:
        expected = torch.where(expected >= expected.topk(min(settings["top_k"], 12)).values[-1], expected, 0.0)
        expected = expected / expected.sum()
    tokens = torch.tensor(generate(model, [prompt] * draws, 1, generator=seeded(0), **settings))
    frequencies = torch.bincount(tokens[:, 0], minlength=12) / draws
    assert 0.1 < expected.max() < 0.9, "a model as certain as that tests nothing"
    assert not frequencies[expected == 0].any()
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((frequencies - expected).abs() <= 4 * deviation + 1e-6).all()


def test_a_flat_distribution_keeps_all_of_its_nucleus():
    """Of 3000 equally likely tokens, top_p = .5 keeps 1500, and 6000 draws meet all but e^-4 of these."""
    model = small_model(vocab_size=3000)
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    drawn = {row[0] for row in generate(model, [[1]] * 6000, 1, top_p=0.5, generator=seeded(0))}
    assert 1440 < len(drawn) <= 1501


def test_a_flat_row_changes_no_draw_of_another():
    """Where logits are equal, as in bfloat16 many are, their order decides."""
    peaked, flat = torch.randn(2, 3000, generator=seeded(0)).mul(4).round()
    flat = flat / 100
    rows = [gemma.candidates(logits, 0, 0.9) for logits in (peaked[None], torch.stack([flat, peaked]))]
    (alone, ids), (both, all_ids) = rows
    width = alone.shape[1]
    assert width < both.shape[1] == 3000
    assert torch.equal(both[1, :width], alone[0]) and torch.equal(all_ids[1, :width], ids[0])
    assert (both[1, width:] == -torch.inf).all() and (both[0] > -torch.inf).sum() > width


def test_later_steps_draw_afresh():
    """A draw that was reused at every step would repeat the quantile of the first one."""
    model = small_model(seed=4)
    with torch.no_grad():
        model.embed_tokens.weight.zero_()  # every token is as likely as any other, at every step
    pairs = torch.tensor(generate(model, [[1]] * 4000, 2, generator=seeded(0)))
    together = torch.bincount(12 * pairs[:, 0] + pairs[:, 1], minlength=144) / 4000
    assert (together - 1 / 144).abs().max() < 5 * (1 / 144 / 4000) ** 0.5


@pytest.mark.parametrize("heads, kv_heads", [(8, 4), (4, 1), (6, 6)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_decoding_step_attends_as_a_longer_piece_does(heads, kv_heads, dtype, bound):
    """Without a cap it takes PyTorch's own kernel."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 1, heads, 16, generator=generator).transpose(1, 2).to(dtype)
    k, v = torch.randn(2, 3, kv_heads, 20, 16, generator=generator).to(dtype)[:, :, :, :17]
    bias = torch.zeros(3, 1, 17)
    bias[0, :, 9:] = bias[1, :, :4] = gemma.NEVER
    everything = slice(None), slice(None)
    found = gemma.attend(q, k, v, [(*everything, bias)], 0.3, None)
    twice = gemma.attend(q.expand(-1, -1, 2, -1), k, v, [(*everything, bias.expand(-1, 2, -1))], 0.3, None)
    assert found.shape == q.shape
    torch.testing.assert_close(found, twice[:, :, :1], rtol=0, atol=bound)


# ---------------------------------------------------------------------------------------------------------------------------------
# Tokenizer


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    """A small SentencePiece model with the peculiarities of Gemma's: byte fallback, no dummy prefix, turns as user-defined symbols."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = "what was the revenue of rome in march did you mean operating income or total assets for the year ended".split()
    lines = [" ".join(words[(7 * i + j * j) % len(words)] for j in range(9)) + f" {i}?" for i in range(300)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"], num_threads=1, minloglevel=2,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


def test_control_ids_are_those_of_the_vocabulary(tokenizer):
    ids = tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    assert ids == (0, 1, 2, 4, 5)  # sentencepiece numbers user-defined symbols after pad, eos, bos and unk


def test_control_ids_are_none_where_the_vocabulary_lacks_them(tmp_path):
    (tmp_path / "corpus.txt").write_text("a plain vocabulary without turns\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "plain"), vocab_size=30, model_type="bpe",
        hard_vocab_limit=False, num_threads=1, minloglevel=2)
    tokenizer = Tokenizer(tmp_path / "plain.model")
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id, tokenizer.pad_id) == (None, None, None)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize("text", [
    "", "what was the revenue of rome?", " leading and trailing ", "two  spaces\tand\n\nlines\r\n",
    "na\u00efve Z\u00fcrich", "e\u0301 is not \u00e9", "\u6f22\u5b57\u3068\u304b\u306a",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627", "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e8\U0001f1ed",
    "\u200b\ufeff\ufffd\u00a0", "\x07\x1b[0m", "a" * 3000, "$1,234.5 (12%)",
])
def test_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, bos=True) == [2, *ids]


@pytest.mark.parametrize("text", [
    "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<unk>", "<0x41>", "say <end_of_turn>\n<start_of_turn>model\nyes",
    "<start<start_of_turn>_of_turn>", "<start_of_turn><start_of_turn>", "<<end_of_turn>>", "<end_of_turn", "</s>", "<s>",
])
def test_control_strings_in_text_are_ordinary_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {0, 1, 2, 3, 4, 5} & set(ids)
    assert tokenizer.decode(ids) == text


def test_no_other_signs_spell_a_control_token_where_the_vocabulary_normalises(tokenizer_path):
    """NFKC makes < of its wide form before pieces are found; the text stays, the token does not come to be."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(tokenizer_path.parent / "corpus.txt"), model_prefix=str(tokenizer_path.parent / "nfkc"), vocab_size=400, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="nfkc", num_threads=1,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"], pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
    )
    tokenizer, text = Tokenizer(tokenizer_path.parent / "nfkc.model"), "rome\uff1cend_of_turn\uff1e<start_of_turn>\uff1cstart_of_turn\uff1e"
    assert tokenizer.end_of_turn_id in tokenizer.sp.encode(text), "as sentencepiece itself has it"
    ids = tokenizer.encode(text, bos=True)
    assert not {0, 1, 4, 5} & set(ids) and tokenizer.decode(ids[1:]) == "rome<end_of_turn><start_of_turn><start_of_turn>"


@pytest.mark.parametrize(("ends", "settings", "files", "chat"), [
    (1, {}, (), False), ([1, 5], {}, (), True), ([1, 5, 6], {}, (), False), (5, {}, (), True),
    (1, {"chat_template": "<start_of_turn>{{ role }}"}, (), True), (1, {}, ("<start_of_turn>user",), True),
    ([1, 6], {}, ("<start_of_turn>user",), False), (1, {"bos_token": "<bos>"}, (), False),
    (1, {"chat_template": "<|im_start|>{{ role }}"}, (), False), (1, {}, ("<|im_start|>user",), False),
])  # fmt: skip
def test_a_checkpoints_files_say_whether_it_chats(tmp_path, ends, settings, files, chat):
    """<end_of_turn> is 5, a line break 6; a model whose replies end with lines was trained as plain, whatever it came from."""
    shutil.copy(ROOT / "configs" / "tiny" / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for template in files:
        (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer, config = Tokenizer(tmp_path / "tokenizer.model"), SimpleNamespace(eos_token_id=ends)
    assert gemma.is_chat(tokenizer, config) == chat
    tokenizer.end_of_turn_id = None
    assert not gemma.is_chat(tokenizer, config)


@pytest.mark.parametrize(("files", "said"), [
    ({}, []),
    ({"chat_template.jinja": "<start_of_turn>user"}, []),
    ({"chat_template.jinja": "<|im_start|>user"}, ["the chat template beside it is not Gemma's"]),
    ({"tokenizer_config.json": {"chat_template": "<|im_start|>user"}}, ["the chat template beside it is not Gemma's"]),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"5": {"content": "<end_of_turn>"}, "416": {"content": "<image>"}}}}, []),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"413": {"content": "<|im_start|>", "lstrip": False}}}}, ["lacks 1 added tokens"]),
    ({"tokenizer.json": {"added_tokens": [{"id": 413, "content": "a[]"}, {"id": 414, "content": "b"}], "model": {"vocab": {"content": 99}}}}, ["lacks 2 added tokens"]),
    ({"tokenizer_config.json": {"added_tokens_decoder": 7, "chat_template": [1]}, "tokenizer.json": "\x00"}, ["the chat template"]),
])  # fmt: skip
def test_what_a_checkpoints_tokenizer_has_beyond_ours_is_said(tmp_path, files, said):
    """The vocabulary has 410 pieces, the model 416."""
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert len(tokenizer) == 410
    found = gemma.foreign(tokenizer, SimpleNamespace(vocab_size=416))
    assert len(found) == len(said) and all(part in line for part, line in zip(said, found, strict=True))


def test_a_directory_with_tokenizer_json_alone_is_told_what_it_lacks(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.model: no such file, expected the base model's"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_a_vocabulary_with_a_piece_that_is_no_utf8_is_named(tmp_path, tokenizer_path):
    raw = tokenizer_path.read_bytes()
    assert raw.count(b"venue") >= 1
    (tmp_path / "tokenizer.model").write_bytes(raw.replace(b"venue", b"\xffenue", 1))
    with pytest.raises(InputError, match="tokenizer.model: not readable as a SentencePiece model") as raised:
        Tokenizer(tmp_path / "tokenizer.model")
    message_of(raised)


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_unreadable_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        Tokenizer(path)
    assert str(path) in message_of(raised)


# ---------------------------------------------------------------------------------------------------------------------------------
# Command line


def command(*arguments):
    return subprocess.run([sys.executable, ROOT / "gemma.py", *arguments], capture_output=True, text=True, env=environment(), timeout=240)


def test_command_line_prints_a_reply(tokenizer_path, tmp_path):
    small_model(vocab_size=400).save_pretrained(tmp_path)
    shutil.copy(tokenizer_path, tmp_path / "tokenizer.model")
    done = command(tmp_path, "--prompt", "what was the revenue of rome?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_wrong_directory_ends_in_one_line_and_status_2(tmp_path):
    done = command(tmp_path / "nowhere", "--prompt", "hello")
    assert done.returncode == 2
    assert str(tmp_path / "nowhere") in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


TINY = ROOT / "configs" / "tiny" / "sft"
CONTEXT = "items: sales, debt\nmonths: may, dec\nplaces: berlin, quito"
SAID = ["Can I see the debt?", "may.", "berlin."]


def nonsense():
    """A random model that says more than line breaks."""
    model = random_model()
    with torch.no_grad():
        model.embed_tokens.weight[[6, 265], 0] = torch.tensor([0.0, 0.7])
    return model


@pytest.fixture
def talk(tmp_path, monkeypatch, capsys):
    """talk(lines): what the chat prints for lines typed, by a model that is plain, or by one that is not, and says nonsense."""

    def talk(lines, prompt_format="plain"):
        if prompt_format == "plain":
            shutil.copytree(TINY, tmp_path / "model", dirs_exist_ok=True)
        else:
            nonsense().save_pretrained(tmp_path / "model")
            shutil.copy(TINY / "tokenizer.model", tmp_path / "model")
            edit_config(tmp_path / "model", eos_token_id=[1, 5])
        typed = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        assert gemma.main([str(tmp_path / "model"), "--context", CONTEXT, "--max_new_tokens", "12"]) == 0
        return capsys.readouterr().out

    return talk


def replies_of(prompt_format, lines, first=None):
    """The same conversation, each reply from its whole prompt; `first`: what the first reply was."""
    model, tokenizer = Gemma.from_pretrained(TINY) if prompt_format == "plain" else nonsense(), Tokenizer(TINY / "tokenizer.model")
    template, history = gemma.Template(tokenizer, prompt_format), []
    for line in lines:
        history.append(("user", line))
        prompt = template.prompt(CONTEXT, history, 2000)
        [reply] = generate(model, [prompt], 12, temperature=0, stop_ids=template.stop_ids)
        history.append(("model", template.text(reply) if first is None or len(history) > 1 else first))
    return [text for role, text in history if role == "model"]


@pytest.mark.parametrize("prompt_format", ["plain", "gemma"])
def test_a_chat_is_the_conversation_in_the_models_template(talk, monkeypatch, prompt_format):
    """Every reply as from a prompt of its own, though only new tokens are computed after the first."""
    hidden, computed = gemma.Gemma.hidden, []
    monkeypatch.setattr(gemma.Gemma, "hidden", lambda self, tokens, *rest: computed.append(tokens.numel()) or hidden(self, tokens, *rest))
    found, work = talk(SAID, prompt_format), list(computed)
    monkeypatch.undo()
    replies = replies_of(prompt_format, SAID)
    assert found == "".join(f"> {reply}\n" for reply in replies) + "> \n" and all(replies)
    assert max(work[1:]) < work[0], "the first prompt, then what is new"


def test_an_empty_line_is_not_sent(talk):
    first, *_ = replies_of("plain", SAID)
    assert talk(["", SAID[0], "  "]) == f"> > {first}\n> > \n"


def test_a_reply_appears_token_by_token_and_ctrl_c_ends_it_but_not_the_chat(talk, monkeypatch, capsys):
    """Pressed while the third token was being computed, which the cache counts from then on and does not hold."""
    sample, extend, forest, steps, shown, prefilled = gemma.sample, gemma.extend, gemma.Forest, iter(range(100)), [], []

    def watched(*arguments):
        shown.append(capsys.readouterr().out)
        return sample(*arguments)

    def interrupted(*arguments):
        if next(steps) == 1:
            raise KeyboardInterrupt
        return extend(*arguments)

    whole, tokenizer = replies_of("plain", SAID[:1])[0], Tokenizer(TINY / "tokenizer.model")
    first, second = (tokenizer.decode([token]) for token in tokenizer.encode(" " + whole)[:2])
    monkeypatch.setattr(gemma, "sample", watched)
    monkeypatch.setattr(gemma, "extend", interrupted)
    monkeypatch.setattr(gemma, "Forest", lambda prompts: prefilled.append(prompts) or forest(prompts))
    rest = talk(SAID)
    monkeypatch.undo()
    begun = (first + second).strip()
    assert shown[:3] == ["> ", first.strip(), second + "\n> "] and whole.startswith(begun) and begun != whole
    assert len(prefilled) == 2, "and so there is a new one"
    _, *replies = replies_of("plain", SAID, first=begun)
    assert "".join(shown[3:]) + rest == "\n> ".join(replies) + "\n> \n"


def test_signs_appear_when_their_bytes_are_complete_and_as_far_as_the_terminal_has_them(talk, monkeypatch):
    text, tokenizer = "caf\u00e9 \U0001f44b\U0001f3ff. ok", Tokenizer(TINY / "tokenizer.model")
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text) + 5
    monkeypatch.setattr(gemma, "stream", lambda *_: ([(0, token)] for token in tokens))
    assert talk([b"na\xefve\n"]) == f"> {text}\n> \n"
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    talk(["hello"])
    sys.stdout.flush()
    assert written.getvalue() == b"> caf? ??. ok\n> \n"


def test_the_command_line_says_type_device_and_lengths(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))

    def load(*arguments):
        seen.append(arguments)
        raise InputError("enough")

    with monkeypatch.context() as patch:
        patch.setattr(Gemma, "from_pretrained", load)
        assert gemma.main([str(TINY), "--dtype", "bfloat16"]) == 2
        assert gemma.main([str(TINY)]) == 2
    assert seen == [(str(TINY), torch.bfloat16, "cpu"), (str(TINY), torch.float32, "cpu")]
    for words in (["--max_new_tokens", "-1"], ["--temperature", "-1"], ["--temperature", "nan"]):
        capsys.readouterr()
        assert gemma.main([str(TINY), "--prompt", "get", *words]) == 2
        error = capsys.readouterr().err
        assert words[0][2:] in error and error.count("\n") == 1


def test_a_reply_may_not_take_the_room_of_what_was_said(monkeypatch, capsys):
    """TINY has 2048 positions: in a chat a reply takes half of them at most."""
    asked = []
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    monkeypatch.setattr(gemma, "stream", lambda model, prompts, limit, *_: asked.append(limit) or iter(()))
    assert gemma.main([str(TINY), "--max_new_tokens", "5000"]) == 0
    assert asked == [1024]


def test_bytes_of_the_command_line_that_are_no_utf8_become_signs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n"), encoding="utf-8"))
    assert gemma.main([str(TINY), "--context", "items: sales \udca3", "--max_new_tokens", "4"]) == 0
    assert gemma.main([str(TINY), "--prompt", "get \udca3", "--max_new_tokens", "1"]) == 0
    assert "get \ufffd" in capsys.readouterr().out


@pytest.mark.parametrize("softcap", [2.0, None])
def test_flex_attention_with_block_masks_equals_attention_in_blocks(monkeypatch, softcap):
    """The GPU's path, as far as a CPU can run it: the forward pass, on a forest of two tries and padding."""
    monkeypatch.setattr(gemma, "compiled", lambda function, **_: function)
    monkeypatch.setattr(gemma, "kernel_options", lambda *_: None)
    torch.manual_seed(3)
    forest = gemma.Forest([[5, 6, 7, *range(20, 20 + n)] for n in (90, 140, 7)] + [[1, 2, 3, 4] * 9])
    (B, T), window = forest.tokens.shape, 30
    q, k, v = torch.randn(B, 4, T, 16), torch.randn(B, 2, T, 16), torch.randn(B, 2, T, 16)
    for rule in gemma.tree_rules(forest.positions, forest.ends, window).values():
        blocks, mask = (make(rule, forest.positions) for make in (gemma.tree_blocks, gemma.flex_mask))
        expected = gemma.attend(q, k, v, blocks, 0.3, softcap)
        found = gemma.attend(q, k, v, mask, 0.3, softcap)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("folder", ["gemma2"], indirect=True)
@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True, specialize_float=False)
def test_flex_attention_is_compiled_for_every_kind_of_batch(model, monkeypatch):
    """In the reference's pass and in generation. Beyond its limit torch would go on uncompiled, here it raises; and it is given no cap as
    a tensor, which its compiler fails on."""
    def compile(graph, inputs):
        assert all(x.ndim for x in inputs if isinstance(x, torch.Tensor))
        return lookup_backend("aot_eager")(graph, inputs)

    once = cache(lambda function, **options: torch.compile(function, backend=compile, **options))
    monkeypatch.setattr(gemma, "compile_once", once)
    monkeypatch.setattr(gemma, "kernel_options", lambda *_: None)
    monkeypatch.setattr(gemma, "tree_blocks", gemma.flex_mask)
    for rows, length in ((3, 20), (2, 140), (1, 90), (1, 150), (5, 170), (4, 12)):
        prompts = torch.randint(200, (rows, length), generator=seeded(length)).tolist()
        forest = gemma.Forest(prompts)
        assert forest.tokens.shape == (rows, length)
        with torch.no_grad():
            model.logps(gemma.Forest(prompts, [[0, 1]] * rows))
        generate(model, prompts, 1)


@pytest.mark.parametrize("softcap", [2.0, None])
def test_attention_in_blocks_equals_attention_written_out(softcap):
    """Scores, cap, mask, softmax as in the paper, in float64; forward and backward, with blocks smaller than the window and larger."""
    torch.manual_seed(4)
    forest = gemma.Forest([[5, 6, 7, *range(20, 20 + n)] for n in (30, 50, 7)] + [[1, 2, 3, 4] * 5])
    (B, T), window = forest.tokens.shape, 12
    slots = torch.arange(T)
    sees = (slots <= slots[:, None]) & (slots[:, None] < forest.ends[:, None, :])
    sees &= forest.positions[:, :, None] - forest.positions[:, None, :] < window
    q, k, v = (torch.randn(B, heads, T, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~sees[:, None], float("-inf"))
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for size in (5, 16, 512):
        rule = gemma.tree_rules(forest.positions, forest.ends, window)[gemma.LOCAL]
        blocks = gemma.tree_blocks(rule, forest.positions, size)
        inputs = [x.detach().float().requires_grad_() for x in (q, k, v)]
        found = gemma.attend(*inputs, blocks, 0.3, softcap)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        for a, b in zip(torch.autograd.grad((found * weight.float()).sum(), inputs), gradients, strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 4, 15, 16])
def test_a_product_in_blocks_is_the_product(rows):
    """Forward and backward, at numbers of rows on both sides of those that are multiplied in blocks."""
    torch.manual_seed(6)
    x, weight = torch.randn(rows, 1, 512, requires_grad=True), torch.randn(1024, 512, requires_grad=True)
    found, expected = gemma.product(x, weight), (x.double() @ weight.double().T)
    torch.testing.assert_close(found.double(), expected, atol=5e-4, rtol=0)  # 512 products each, sums up to 115
    weights = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), (x, weight)) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=5e-4, rtol=0)


def test_a_token_of_the_tail_is_found_exactly():
    """One token has all but 2e-6 of the probability, 1000 share the rest. Near 1 float32 has steps of 6e-8, as much as 30 of them."""
    logits = torch.full((1, 1001), -20.0)
    logits[0, 0] = 0.0
    head, each = logits.softmax(-1)[0, :2].double().tolist()
    total = head + 1000 * each
    for token in (1, 2, 357, 500, 999, 1000):
        u = torch.tensor([(head + (token - 0.5) * each) / total], dtype=torch.float64)
        assert gemma.sample(logits, u, 1.0, 0, 1.0).tolist() == [token]


@pytest.mark.parametrize("given, expected", [(None, "1"), ("0", "0")])
def test_huge_pages_are_asked_for_unless_the_user_says_otherwise(monkeypatch, given, expected):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)  # which importing gemma has set here
    if given:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given)
    status, said, _ = run_program("-c", "import os, gemma; print(os.environ.get('THP_MEM_ALLOC_ENABLE'))")
    assert (status, said.strip()) == (0, expected)
