"""Compare gemma.py with Hugging Face transformers on random models: for a person, not for pytest, since it needs transformers.

    pip install transformers && python tests/proofs/compare_transformers.py [MODEL_DIR]

For several shapes and seeds of Gemma 2 and of Gemma 3 it prints one line each: max |logit difference|, the largest difference of a
gradient relative to the largest entry of that gradient (over every weight), whether greedy continuations of four ragged prompts are
equal, and whether transformers loads what our `save_pretrained` wrote, in one file and in shards, back to its own logits.
A MODEL_DIR holds a real checkpoint (Gemma 3 270M, say) with its tokenizer.model: its logits on a text and its greedy continuations
are compared in float32. Ends with status 1 when any of these is over its limit. tests/golden/make_gemma2.py and make_gemma3.py hold
the random models.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]

import make_gemma2  # noqa: E402
import make_gemma3  # noqa: E402
from make_gemma2 import PROMPT_LENGTHS, greedy, next_token_loss, random_tokens  # noqa: E402

from gemma import GLOBAL, LOCAL, Gemma, Tokenizer, generate  # noqa: E402

LOGIT_LIMIT = 2e-4
GRADIENT_LIMIT = 1e-4
TIE = 1e-3  # where the best two logits are closer than this, rounding may choose
SEEDS = (0, 1, 2)
REAL_LIMIT = 1e-3  # of logits up to 120
GEMMA2 = {
    "as recorded": {},
    "one key head": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8},
    "no grouping": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32},
    "window of two": {"sliding_window": 2},
    "layers listed": {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
    "caps as published": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6},
    "long window": {"sliding_window": 100, "num_hidden_layers": 3, "intermediate_size": 200},
}
GEMMA3 = {
    "as recorded": {},
    "one key head": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
    "no grouping": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32},
    "window of two": {"sliding_window": 2},
    "layers listed": {"num_hidden_layers": 4, "layer_types": [GLOBAL, LOCAL, LOCAL, GLOBAL]},
    "thetas as published": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in ((LOCAL, 1e4), (GLOBAL, 1e6))},
        "rms_norm_eps": 1e-6,
    },
    "long window": {"sliding_window": 100, "num_hidden_layers": 13, "intermediate_size": 200},
}
TEXT = (
    "The company's revenue grew from $1,204.5 million in 2017 to $1,310.2 million in 2018, while operating income fell. "
    "Question: by how many percent did revenue grow? Answer:"
)


def gradients(model, logits, tokens):
    """{name without "model.": gradient of the next-token loss}, of every weight."""
    weights = dict(model.named_parameters())
    values = torch.autograd.grad(next_token_loss(logits, tokens), list(weights.values()))
    return {name.removeprefix("model."): value for name, value in zip(weights, values, strict=True)}


def gradient_difference(ours, theirs):
    """The largest |difference| of any gradient relative to the largest entry of that gradient, and whose it is."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max(((ours[name] - theirs[name]).abs().max().item() / theirs[name].abs().max().item(), name) for name in theirs)


def greedy_is_equal(ours, theirs, seed):
    """Equal continuations of four ragged prompts, ours in one batch; a prompt whose text passes a near tie is left out."""
    prompts = [random_tokens(100 * seed + i, (length,), theirs.config.vocab_size) for i, length in enumerate(PROMPT_LENGTHS)]
    expected = [greedy(theirs, prompt) for prompt in prompts]
    got = generate(ours, [prompt.tolist() for prompt in prompts], len(expected[0][0]), temperature=0)
    clear = [(text.tolist(), new) for (text, margin), new in zip(expected, got, strict=True) if margin > TIE]
    return all(text == new for text, new in clear), len(clear)


@torch.no_grad()
def loads_in_transformers(ours, theirs, tokens, logits, max_shard_bytes):
    """What our save_pretrained writes gives, in transformers, every weight bit for bit and the same logits."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder, max_shard_bytes=max_shard_bytes)
        options = {"attn_implementation": "eager", "output_loading_info": True}
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, **options)
        state, weights = loaded.state_dict(), theirs.state_dict()
        equal = state.keys() == weights.keys() and all(torch.equal(weights[name], state[name]) for name in weights)
        complete = not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return equal and complete and (loaded.eval()(tokens).logits - logits).abs().max().item() <= LOGIT_LIMIT


def compare(make, shape, seed):
    """One line of figures and whether all of them are within the limits."""
    theirs = make.random_model(seed, **{**make.SHAPE, **shape})
    tokens = random_tokens(seed + 1, (3, 40), make.SHAPE["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = Gemma.from_pretrained(folder)
    logits, expected = ours(tokens), theirs(tokens).logits
    difference = (logits - expected).abs().max().item()
    slope, name = gradient_difference(gradients(ours, logits, tokens), gradients(theirs, expected, tokens))
    same_text, clear = greedy_is_equal(ours, theirs, seed)
    loads = [loads_in_transformers(ours, theirs, tokens, expected, limit) for limit in (5_000_000_000, 60_000)]
    line = f"logits {difference:.1e}  gradients {slope:.1e} ({name})  greedy {'equal' if same_text else 'DIFFERENT'} ({clear} of 4 clear)"
    line += f"  loads back: single {loads[0]}, sharded {loads[1]}"
    return line, difference <= LOGIT_LIMIT and slope <= GRADIENT_LIMIT and same_text and all(loads)


@torch.no_grad()
def compare_real(directory):
    """The same for a real checkpoint: logits of a text repeated beyond the window, and greedy continuations."""
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    ours, tokenizer = Gemma.from_pretrained(directory), Tokenizer(Path(directory) / "tokenizer.model")
    text = tokenizer.encode(TEXT, bos=True)
    tokens = torch.tensor([(text * (600 // len(text) + 1))[:600]])
    expected = theirs(tokens).logits
    difference = (ours(tokens) - expected).abs().max().item()
    theirs.generation_config.eos_token_id = None
    same = []
    for prompt in (text, tokenizer.encode("The capital of France is", bos=True), tokens[0].tolist()):
        continuation, margin = greedy(theirs, torch.tensor(prompt), 40)
        [row] = generate(ours, [prompt], 40, temperature=0)
        same.append(row == continuation.tolist() or margin <= TIE)
    line = f"logits {difference:.1e} (largest {expected.abs().max():.0f})  greedy {'equal' if all(same) else 'DIFFERENT'}"
    return line + f"  {tokenizer.decode(row)!r}", difference <= REAL_LIMIT and all(same)


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    passed = []
    for make, shapes in ((make_gemma2, GEMMA2), (make_gemma3, GEMMA3)):
        for title, shape in shapes.items():
            for seed in SEEDS:
                line, good = compare(make, shape, seed)
                name = f"{make.__name__[-6:]}, {title}"
                print(f"{name:27} seed {seed}  {line}  {'ok' if good else 'OVER THE LIMIT'}", flush=True)
                passed.append(good)
    for directory in sys.argv[1:]:
        line, good = compare_real(directory)
        print(f"{directory}  {line}  {'ok' if good else 'OVER THE LIMIT'}", flush=True)
        passed.append(good)
    print(f"{sum(passed)} of {len(passed)} within limits: logits {LOGIT_LIMIT}, gradients {GRADIENT_LIMIT}")
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
