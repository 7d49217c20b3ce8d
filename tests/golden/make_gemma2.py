"""Record the reference values of tests/test_gemma.py: a small random Gemma 2 as Hugging Face transformers computes it.

    pip install transformers && python tests/golden/make_gemma2.py

Needs transformers, which no test does; run it again only to change what is recorded. It writes beside itself
  gemma2/               the model as `save_pretrained` leaves it: config.json, generation_config.json, model.safetensors
  gemma2.safetensors    tokens [3, 40], logits [3, 40, V] float32, loss [], grad.NAME (d loss / d weight NAME),
                        prompt.I [lengths 3, 11, 17, 29] and its greedy continuation.I [24], each prompt generated alone
The file's metadata says with what, from which seed, and how far the logits move when one feature of Gemma 2 is left out:
a port that forgets a feature must miss these values by far more than rounding. loss = mean cross-entropy of tokens 1.. given those before.
"""

import copy
import json
import os
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

HERE = os.path.dirname(os.path.abspath(__file__))
SEED = 19
NEW_TOKENS = 24
PROMPT_LENGTHS = (3, 11, 17, 29)
GRADIENTS = (
    "embed_tokens.weight",
    "layers.0.self_attn.q_proj.weight",  # a layer with the sliding window
    "layers.0.self_attn.k_proj.weight",
    "layers.1.self_attn.q_proj.weight",  # a layer without
    "layers.1.self_attn.k_proj.weight",
    "layers.2.mlp.down_proj.weight",
    "layers.3.post_attention_layernorm.weight",
)
# No two sizes are alike and nothing has its default, so that a swapped or forgotten field shows.
SHAPE = {
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 10,
    "sliding_window": 8,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 8.0,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}


def random_model(seed, **shape):
    """An eager float32 Gemma2ForCausalLM whose weights drive both soft-caps towards their limits and whose text varies."""
    config = Gemma2Config(**shape, pad_token_id=0, eos_token_id=1, bos_token_id=2, attn_implementation="eager")
    return randomised(Gemma2ForCausalLM(config), seed, 0.6 * config.final_logit_softcapping)


def randomised(model, seed, deviation):
    """The model with random weights, such that its logits have about this standard deviation; it never stops."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name == "embed_tokens.weight":
                weight.copy_(0.1 * noise)
            elif name == "norm.weight":  # scales of both signs, or else the tied head would just repeat the last token
                weight.copy_(10 * deviation / model.config.hidden_size**0.5 * noise - 1)
            elif "post_attention" in name:  # large, so that the text depends on all that came before
                weight.copy_(1.0 + 0.5 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.3 * noise)
            else:
                gain = 1.3 if "q_proj" in name or "k_proj" in name else 1.0
                weight.copy_(gain * noise / weight.shape[1] ** 0.5)
    model.generation_config.eos_token_id = None  # never stop: the length of a continuation is then known
    return model.eval()


def random_tokens(seed, shape, vocab_size):
    """Never id 0: transformers gives the padding row of the embedding no gradient where it is an input."""
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def next_token_loss(logits, tokens):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def greedy(model, prompt, new_tokens=NEW_TOKENS):
    """The continuation [new_tokens] of a prompt [T] and the smallest gap between its best and second best logit."""
    out = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], do_sample=False, max_new_tokens=new_tokens)
    best = model(out).logits[0, len(prompt) - 1 : -1].topk(2).values
    return out[0, len(prompt) :], (best[:, 0] - best[:, 1]).min().item()


@torch.no_grad()
def saturation(model, tokens):
    """The largest |tanh| of (any attention score, any logit): 1 is a score at its cap. Gemma 2 calls tanh nowhere else."""
    seen, tanh = [], torch.tanh
    torch.tanh = lambda x: seen.append(tanh(x).abs().max().item()) or tanh(x)
    try:
        model(tokens)
    finally:
        torch.tanh = tanh
    return max(seen[:-1]), seen[-1]


@torch.no_grad()
def without(model, tokens, change):
    """Logits of a copy of the model with the fields of `change` in its config."""
    changed = Gemma2ForCausalLM(Gemma2Config(**{**model.config.to_dict(), **change}, attn_implementation="eager")).eval()
    changed.load_state_dict(model.state_dict())
    return changed(tokens).logits


@torch.no_grad()
def effects(model, tokens, logits):
    """{feature: max |change of a logit| when it is altered}, the proof that each of them bites."""
    config = model.config
    changes = {
        "window one longer": {"sliding_window": config.sliding_window + 1},
        "no window": {"layer_types": ["full_attention"] * config.num_hidden_layers},
        "windows on odd layers": {"layer_types": config.layer_types[1:] + config.layer_types[:1]},
        "attention cap 50": {"attn_logit_softcapping": 50.0},
        "no attention cap": {"attn_logit_softcapping": None},
        "no final cap": {"final_logit_softcapping": None},
        "scale head_dim ** -0.5": {"query_pre_attn_scalar": config.head_dim},
        "eps 1e-6": {"rms_norm_eps": 1e-6},
        "theta 10000": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "exact gelu": {"hidden_activation": "gelu"},
    }
    moved = {name: (without(model, tokens, change) - logits).abs().max().item() for name, change in changes.items()}
    for kind in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"):
        changed = copy.deepcopy(model)
        for name, module in changed.named_modules():
            if name.endswith(kind) and isinstance(module, Gemma2RMSNorm):
                module.weight.zero_()
        moved[f"{kind} at zero"] = (changed(tokens).logits - logits).abs().max().item()
    return moved


def main():
    torch.set_num_threads(1)
    model = random_model(SEED, **SHAPE)
    tokens = random_tokens(SEED + 1, (3, 40), SHAPE["vocab_size"])
    logits = model(tokens).logits
    loss = next_token_loss(logits, tokens)
    loss.backward()
    record = {"tokens": tokens, "logits": logits.detach(), "loss": loss.detach()}
    weights = dict(model.model.named_parameters())
    record.update({f"grad.{name}": weights[name].grad for name in GRADIENTS})

    margins = []
    for i, length in enumerate(PROMPT_LENGTHS):
        record[f"prompt.{i}"] = random_tokens(SEED + 2 + i, (length,), SHAPE["vocab_size"])
        record[f"continuation.{i}"], margin = greedy(model, record[f"prompt.{i}"])
        margins.append(margin)
    attention, final = saturation(model, tokens)
    moved = effects(model, tokens, logits.detach())
    # Norms and softmax stay float32 in a float64 model of transformers, so this is a lower bound of float32's rounding.
    rounding = (copy.deepcopy(model).double()(tokens).logits - logits).abs().max().item()
    bf16 = (copy.deepcopy(model).bfloat16()(tokens).logits.float() - logits).abs().mean().item()
    facts = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seed": SEED,
        "smallest greedy margin": min(margins),
        "largest attention score / cap": attention,
        "largest logit / cap": final,
        "max |float64 - float32|": rounding,
        "mean |bfloat16 - float32|": bf16,
        "distinct tokens in continuations": [len(set(record[f"continuation.{i}"].tolist())) for i in range(len(PROMPT_LENGTHS))],
        "max |logit change|": moved,
    }
    print(json.dumps(facts, indent=2))
    if min(margins) < 1e-2 or min(attention, final) < 0.95 or min(moved.values()) < 2e-3:
        sys.exit("this seed makes a weak test (a near tie, an idle soft-cap or a feature without effect): change SEED")

    model.generation_config.eos_token_id = 1  # as in the published checkpoints
    model.save_pretrained(os.path.join(HERE, "gemma2"))
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    save_file({name: tensor.contiguous() for name, tensor in record.items()}, os.path.join(HERE, "gemma2.safetensors"), metadata=text)


if __name__ == "__main__":
    main()
