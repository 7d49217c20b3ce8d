"""Record the reference of tests/test_lora.py: adapters on the golden Gemma 2 as PEFT computes and writes them.

    pip install transformers peft && python tests/golden/make_lora.py

Needs transformers and peft, which no test does; run it again only to change what is recorded. It writes beside itself
  lora/                 adapter_config.json and adapter_model.safetensors as PEFT's `save_pretrained` leaves them, B not zero
  lora.safetensors      tokens [2, 30], logits [2, 30, V] float32, merged.logits (after PEFT's own merge_and_unload), loss [],
                        grad.NAME of four adapters, NAME as in the adapter's file. loss as in make_gemma2.py
"""

import json
import os
import sys

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import Gemma2ForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
from make_gemma2 import next_token_loss, random_tokens  # noqa: E402

SEED = 23
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
RECORDED = (
    "layers.0.self_attn.q_proj.lora_A", "layers.1.self_attn.v_proj.lora_B", "layers.2.mlp.gate_proj.lora_A",
    "layers.3.mlp.down_proj.lora_B",
)  # fmt: skip


def main():
    torch.set_num_threads(1)
    base = Gemma2ForCausalLM.from_pretrained(os.path.join(HERE, "gemma2"), attn_implementation="eager").eval()
    tokens = random_tokens(SEED, (2, 30), base.config.vocab_size)
    plain = base(tokens).logits.detach()
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, task_type="CAUSAL_LM")).eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if "lora_A" in name else 0.1))
    logits = model(tokens).logits
    loss = next_token_loss(logits, tokens)
    loss.backward()
    record = {"tokens": tokens, "logits": logits.detach(), "loss": loss.detach()}
    for name, weight in model.named_parameters():
        short = name.removeprefix("base_model.model.model.").removesuffix(".default.weight")
        if short in RECORDED:
            record[f"grad.base_model.model.model.{short}.weight"] = weight.grad
    model.peft_config["default"].base_model_name_or_path = "gemma2"
    model.save_pretrained(os.path.join(HERE, "lora"), save_embedding_layers=False)
    readme = os.path.join(HERE, "lora", "README.md")
    if os.path.exists(readme):
        os.remove(readme)
    record["merged.logits"] = model.merge_and_unload()(tokens).logits.detach()
    moved = (record["logits"] - plain).abs().max().item()
    facts = {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__, "seed": SEED,
             "max |logit change| by the adapters": moved}  # fmt: skip
    print(json.dumps(facts, indent=2))
    if moved < 0.1 or len(record) != 4 + len(RECORDED):
        sys.exit("the adapters hardly change a logit, or a gradient is missing")
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    save_file({name: x.contiguous() for name, x in record.items()}, os.path.join(HERE, "lora.safetensors"), metadata=text)


if __name__ == "__main__":
    main()
