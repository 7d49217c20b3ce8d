"""In and out of the ecosystem: transformers, TRL and the published research code's files. For a person: it needs both.

    pip install transformers trl protobuf sentencepiece
    python tests/proofs/ecosystem.py --python PATH/TO/THIS/PROJECTS/PYTHON [--conversations pacific.jsonl] [--model gemma-3-270m]

act.py runs in --python, everything else here; four minutes. The preference files come from --conversations (labelled
Vertex JSONL). One line a point; ends with status 1 when one of them fails. The research code is
google-research/learning_to_clarify; what stands here in its manner is written anew from what it reads and writes.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import datasets
import sentencepiece
import tokenizers
import torch
import transformers
import trl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import act  # noqa: E402
import data  # noqa: E402
from gemma import Gemma, GemmaConfig, Template, Tokenizer, generate  # noqa: E402

sys.path.insert(0, str(ROOT / "tests"))
from hostile import HOSTILE  # noqa: E402

TINY = ROOT / "configs" / "tiny"
LOGIT_LIMIT = 1e-4
NEW_TOKENS = 24
AUTO_MODEL = transformers.AutoModelForCausalLM
ODD = ["né  日本 \n\n 12,345.6%", " leading", "trailing ", "a\n[context]\nb", "\ttab\t\t x", " " * 40 + "x", "cafe\u0301",
       "\U0001f44b\U0001f3ff \U0001f469\u200d\U0001f469\u200d\U0001f467", "<b>bold</b>", "\n\n\n b", ""]  # fmt: skip


def run(args, *words):
    """act.py in the project's own Python."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "GOOGLE_API_KEY")}
    done = subprocess.run([args.python, "act.py", *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"act.py {' '.join(map(str, words))}: {done.stderr.strip()[-1500:]}"
    return done.stdout


def steps_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------- a trained model, elsewhere


def trained_model(args):
    """Two steps of ACT on the tiny world, then `model/` in transformers: the same logits and the same greedy text."""
    words = ["--config", "tiny.json", "--training_config.output_dir", args.folder / "run"]
    words += ["--data_config.validation_path", ""]
    run(args, *words, "--training_config.max_steps", 2, "--training_config.per_device_train_batch_size", 4)
    folder = args.folder / "run" / "model"
    options = {"dtype": torch.float32, "output_loading_info": True}
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ours, tokenizer = Gemma.from_pretrained(folder), Tokenizer(folder / "tokenizer.model")
    before = Gemma.from_pretrained(TINY / "sft").norm.weight
    assert not torch.equal(before, ours.norm.weight), "nothing was trained"
    turns = data.ACTDataset(data.read_vertex_jsonl(TINY / "validation.jsonl"), data.CLARIFY, 1).prepare_datasets()
    template = Template(tokenizer, "plain")
    prompts = [template.prompt(turn.context, turn.history, 448) for turn in turns[:4]]
    with torch.no_grad():
        pairs = [(ours(tokens), theirs(tokens).logits) for tokens in (torch.tensor([prompt]) for prompt in prompts)]
    difference = max((a - b).abs().max().item() for a, b in pairs)
    assert difference <= LOGIT_LIMIT, f"logits differ by {difference}"
    replies = generate(ours, prompts, NEW_TOKENS, temperature=0, stop_ids={tokenizer.eos_id})
    got = [tokenizer.decode(new) for new in replies]
    expected = [tokenizer.decode(greedy(theirs, prompt)) for prompt in prompts]
    assert got == expected and all(got), (got, expected)
    shown = got[0].strip().splitlines()[0]
    return f"logits differ by at most {difference:.1e}; greedy text of {len(prompts)} prompts equal, e.g. {shown!r}"


def greedy(model, prompt):
    """New tokens of transformers' generate beyond the line breaks that the directory says to stop at, to <eos> alone."""
    tokens = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "attention_mask": torch.ones_like(tokens)}
    options["eos_token_id"] = 1
    row = model.generate(tokens, **options)[0, len(prompt) :]
    ends = (row == 1).nonzero()
    return row[: int(ends[0])].tolist() if len(ends) else row.tolist()


def stops(args):
    """A model of each prompt format in AutoModelForCausalLM and AutoTokenizer: the same prompts, replies, ends."""
    words = ["--config", "tiny_sft.json", "--task", "sft", "--policy_model_config.model_path", TINY / "sft"]
    words += ["--data_config.prompt_format", "gemma", "--data_config.validation_path", ""]
    words += ["--training_config.max_steps", 20, "--training_config.warmup_steps", 0]
    run(args, *words, "--training_config.learning_rate", 2e-3, "--training_config.output_dir", args.folder / "chat")
    turns = data.ACTDataset(data.read_vertex_jsonl(TINY / "validation.jsonl"), data.CLARIFY, 1).prepare_datasets()[:8]
    for prompt_format, name in (("plain", "run"), ("gemma", "chat")):
        folder = args.folder / name / "model"
        theirs, read = (cls.from_pretrained(folder) for cls in (AUTO_MODEL, transformers.AutoTokenizer))
        ours, tokenizer = Gemma.from_pretrained(folder), Tokenizer(folder / "tokenizer.model")
        template = Template(tokenizer, prompt_format)
        for turn in turns:
            prompt = template.prompt(turn.context, turn.history, 448)
            tokens = read(tokenizer.decode(prompt[1:]), return_tensors="pt") if template.plain else chat_of(read, turn)
            assert tokens["input_ids"].tolist() == [prompt], (prompt, tokens)
            row = theirs.generate(**tokens, do_sample=False, max_new_tokens=200)[0].tolist()[len(prompt) :]
            [reply] = generate(ours, [prompt], 200, temperature=0, stop_ids=template.stop_ids)
            assert row == [*reply, template.end[0]] and reply, (row, reply)
            said = read.decode(row, skip_special_tokens=True).strip()
            assert said == template.text(reply), (said, reply)
    return f"{len(turns)} prompts in plain and in chat: as in training, replies equal, each ended by itself, e.g. {said!r}"


def chat_of(tokenizer, turn):
    messages = [("system", turn.context), *turn.history] if turn.context else turn.history
    messages = [{"role": {"model": "assistant"}.get(role, role), "content": text} for role, text in messages]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def configurations(args):
    """config.json and generation_config.json as transformers reads them."""
    folder = args.folder / "run" / "model"
    theirs, raw = (
        transformers.AutoConfig.from_pretrained(folder),
        json.loads((TINY / "sft" / "config.json").read_text()),
    )
    assert isinstance(theirs, transformers.Gemma2Config), type(theirs)
    others = ("architectures", "torch_dtype", "rope_theta", "rope_parameters", "eos_token_id")
    names = [name for name in raw if name not in others]
    wrong = [name for name in names if getattr(theirs, name) != raw[name]]
    assert not wrong and theirs.rope_parameters["rope_theta"] == raw["rope_theta"], wrong
    generation = transformers.GenerationConfig.from_pretrained(folder)
    ids = generation.bos_token_id, generation.eos_token_id, generation.pad_token_id
    assert ids == (2, [1, 6], 0), ids  # 6: a line break, with which a "plain" reply ends
    return f"{len(names) + 1} fields of config.json and the 3 of generation_config.json read as written"


def turns_of(chat):
    raw = json.dumps(chat).encode()
    return data.ACTDataset(data.read_vertex_jsonl("chat", raw), data.CLARIFY, 1).prepare_datasets()


def tokenizers_as_here(args):
    """AutoTokenizer gives the ids of training for what act.py saves: a unigram, a BPE like Gemma's, a real Gemma's.

    Of texts without control tokens. One kind differs: a text that spells a byte piece, "<0x41>", is that byte there.
    """
    copied = args.folder / "run" / "model" / "tokenizer.model"
    assert copied.read_bytes() == (TINY / "sft" / "tokenizer.model").read_bytes(), "tokenizer.model was changed"
    model = io.BytesIO()
    texts = [message["content"] for row in data.read_vertex_jsonl(TINY / "train.jsonl") for message in row["messages"]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=600, hard_vocab_limit=False,
        byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", split_digits=True, control_symbols=["<start_of_turn>", "<end_of_turn>"],
        user_defined_symbols=["\n"], normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (args.folder / "bpe.model").write_bytes(model.getvalue())
    sources = {"unigram": TINY / "tokenizer.model", "bpe": args.folder / "bpe.model"}
    sources |= {"Gemma": args.model / "tokenizer.model"} if args.model else {}
    texts = [message["content"] for chat in HOSTILE for message in chat["messages"]] + texts[:50] + ODD
    pairs = [pair for chat in HOSTILE for pair in turns_of(chat)]
    for name, path in sources.items():
        folder, ours = args.folder / name, Tokenizer(path)
        folder.mkdir()
        shutil.copy(TINY / "sft" / "config.json", folder)
        template, config = Template(ours, "gemma"), GemmaConfig.from_json(folder / "config.json")
        template.mark_stops(config)
        act.save_tokenizer(template, folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in texts:
            tokens = ours.encode(text, bos=True)
            assert theirs(text).input_ids == tokens or ours._control.search(text), (name, text)
            assert theirs.decode(tokens, skip_special_tokens=True) == ours.decode(tokens[1:]), (name, text)
        for pair in pairs:
            said = "".join([pair.context, *(text for _, text in pair.history)])
            same = chat_of(theirs, pair)["input_ids"].tolist() == [template.prompt(pair.context, pair.history, 10**9)]
            assert same or ours._control.search(said), (name, pair)
    return f"{len(texts)} texts, {len(pairs)} chats: the same ids for {', '.join(sources)}"


# ------------------------------------------------------------------------------------------------ preference files, out


def preferences(args):
    """A file of --task generate_preference has the published keys, all of them text, and is read back as it is."""
    folder = args.folder / "preferences"
    words = ["--config", "tiny.json", "--task", "generate_preference", "--training_config.output_dir", folder]
    run(args, *words, "--data_config.train_path", args.conversations, "--data_config.validation_path", "")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = """input_text output_text dialogue_policy gold_target gold_trajectory chosen_policy rejected_policy
        chosen rejected""".split()
    assert all(list(row) == keys for row in rows), list(rows[0])
    table = datasets.Dataset.from_list(rows)  # what the published code does with a file whose is_preference is set
    assert all(feature.dtype == "string" for feature in table.features.values()) and table.to_list() == rows
    pairs, _ = data.read_preferences(folder / "train.jsonl")
    assert [data.make_record(pair) for pair in pairs] == rows
    asked = sum(pair.action == data.CLARIFY for pair in pairs)
    return f"{len(rows)} records of {args.conversations.name}, {asked} of them {data.CLARIFY}, with the published keys"


def trl_preferences(args):
    """TRL's form says the same as the records, as far as the rule for actions agrees with the labels."""
    paths = [args.folder / "preferences" / name for name in ("train.jsonl", "train.trl.jsonl")]
    ours, theirs = (
        [dataclasses.replace(pair, path="", messages=pair.history) for pair in data.read_preferences(path)[0]]
        for path in paths
    )
    agreed = [data.rule_actions([pair.chosen[0][1]]) == [pair.action] for pair in ours]
    assert len(ours) == len(theirs)
    assert all(a == b for a, b, same in zip(ours, theirs, agreed, strict=True) if same)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.history, a.chosen, a.rejected) == (b.history, b.chosen, b.rejected)
    table = datasets.Dataset.from_json(str(paths[1]), cache_dir=str(args.folder / "cache"))
    assert set(table.column_names) == {"prompt", "chosen", "rejected"}
    assert all(map(trl.is_conversational, table))
    others = f", the other {len(ours) - sum(agreed)} but for their actions" if not all(agreed) else ""
    return f"{len(ours)} pairs, {sum(agreed)} of them equal to the records'{others}"


def trl_step(args):
    """Both files load in TRL's DPOTrainer, records after a renaming; the first loss is ln 2: policy is reference."""
    found, cache = [], str(args.folder / "cache")
    for name, renamed in (("train.jsonl", {"input_text": "prompt"}), ("train.trl.jsonl", {})):
        table = datasets.Dataset.from_json(str(args.folder / "preferences" / name), cache_dir=cache)
        found.append(trl_row(args, table.rename_columns(renamed).select_columns(["prompt", "chosen", "rejected"])))
    losses = ", ".join(f"loss {row['loss']:.4f}, gradient norm {row['grad_norm']:.2f}" for row in found)
    return f"trl {trl.__version__}, {len(table)} rows, 1 step of the records and 1 of TRL's own form: {losses}"


def trl_row(args, table):
    """What DPOTrainer logs of one step on a table, with a vocabulary of the table's words and random weights."""
    words = sorted({word for row in table for word in re.findall(r"[^\s\"']+", json.dumps(row, ensure_ascii=False))})
    pieces = ["<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]
    vocabulary = {word: i for i, word in enumerate([*pieces, *words])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)
    turns = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant> {% endif %}"
    config = transformers.AutoConfig.from_pretrained(TINY / "sft")
    config.vocab_size = len(vocabulary)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(args.folder / "random")
    options = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    options |= {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": None}
    trainer = trl.DPOTrainer(
        str(args.folder / "random"),  # of which it makes the reference, too
        args=trl.DPOConfig(str(args.folder / "trl"), **options),
        train_dataset=table,
        processing_class=tokenizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    before = trainer.model.model.norm.weight.clone()
    trainer.train()
    row = trainer.state.log_history[0]
    assert abs(row["loss"] - math.log(2)) < 1e-3 and row["grad_norm"] > 0, row
    assert not torch.equal(before, trainer.model.model.norm.weight), "nothing was trained"
    return row


# --------------------------------------------------------------------------------------- the published code's files, in

MANNER = """Reply to questions about the text and the table below.
Where a question leaves something open, you may ask about it first."""
CONTEXT = "The group sold 12 units in Lima.\nAll figures in thousands.\n[data]\nSales : 2019 | 2018\nLima : 12 | 9\n"
CHAT = [
    {"role": "system", "content": f"[context]\n{CONTEXT}"},
    *data.exchange("What were the sales?", "Which year are you asking about?", clarify=True),
    *data.exchange("2018", "9"),
    *data.exchange("And by how much did they rise?", "12 - 9 = 3\nThat is in thousands."),
]


def published_text(turns):
    """Messages as the published code writes them: one after the other, as they are."""
    return "".join(f"{data.SPEAKERS[turn['role']]}: {turn['content']}\n" for turn in turns)


def published_records(messages):
    """The records of one conversation in the published code's manner, which differs from ours in three ways.

    The context brings its own headings and a blank line on both sides; after a question the history holds its whole
    trajectory and then the user's reply to it once more, as the next turn; a question that the preference model wrote
    has no "Assistant: " before it.
    """
    text, turns, records = f"{MANNER}\n\n{messages[0]['content']}\n[conversation]\n", messages[1:], []
    for i, turn in enumerate(turns):
        if turn["role"] == "model":
            continue
        text += f"User: {turn['content']}\n"
        asks = turn["requires_clarification"]
        reply = published_text(turns[i + 1 : i + (4 if asks else 2)])
        answer = published_text(turns[i + (3 if asks else 1) :][:1])
        actions = ("CLARIFY", "ANSWER") if asks else ("ANSWER", "CLARIFY")
        record = {"input_text": text, "output_text": reply, "dialogue_policy": actions[0], "gold_target": answer}
        record |= {"gold_trajectory": text + reply, "chosen_policy": actions[0], "rejected_policy": actions[1]}
        records.append(record | {"chosen": reply, "rejected": answer if asks else "Which city do you mean?"})
        text += reply
    return records


def conversations_of(args):
    """Messages of the given conversations that end in an answer, contexts under the published code's heading."""
    chats = [row["messages"] for row in data.read_vertex_jsonl(args.conversations)]
    chats = [chat for chat in chats if chat[0]["role"] == "system"]
    chats = [chat for chat in chats if chat[-1]["role"] == "model" and not chat[-2]["requires_clarification"]]
    return [[{"role": "system", "content": f"[context]\n{chat[0]['content']}\n"}, *chat[1:]] for chat in chats]


def published_preferences(args):
    """Such a file is read message by message as its text says, and trains one step of DPO."""
    path, chats = args.folder / "train_preference.jsonl", [CHAT, *conversations_of(args)]
    path.write_text("".join(json.dumps(record) + "\n" for chat in chats for record in published_records(chat)))
    pairs, _ = data.read_preferences(path)
    texts = [message["content"] for chat in chats for message in chat[1:]]
    assert [(pair.history[-1], pair.chosen[0], pair.gold[0]) for pair in pairs] == [
        (("user", said), ("model", reply), ("model", reply))
        for said, reply in zip(texts[::2], texts[1::2], strict=True)
    ]
    asked, again, last = pairs[:3]
    question, reply, answer = ("model", "Which year are you asking about?"), ("user", "2018"), ("model", "9")
    assert asked.context == again.context == CONTEXT, asked.context
    assert asked.instruction.rstrip() == MANNER, asked.instruction
    assert asked.history == [("user", "What were the sales?")], asked.history
    assert (asked.chosen, asked.rejected) == ([question, reply, answer], [answer])
    assert again.history == [*asked.history, question, reply, answer, reply], again.history
    assert (again.chosen, again.rejected, again.target) == ([answer], [("model", "Which city do you mean?")], "9")
    assert last.history == [*again.history, answer, ("user", "And by how much did they rise?")], last.history
    assert last.target == "12 - 9 = 3\nThat is in thousands.", last.target
    words = ["--config", "tiny.json", "--task", "dpo", "--training_config.is_preference", "true"]
    words += ["--training_config.max_steps", 1]
    words += ["--training_config.per_device_train_batch_size", 3, "--training_config.rpo_alpha", 0]
    words += ["--training_config.output_dir", args.folder / "dpo"]
    run(args, *words, "--data_config.train_path", path, "--data_config.validation_path", "")
    [row] = steps_of(args.folder / "dpo")
    assert abs(row["loss"] - math.log(2)) < 1e-3 and row["grad_norm"] > 0, row
    figures = f"1 step of dpo: loss {row['loss']:.4f}, gradient norm {row['grad_norm']:.2f}"
    return f"{len(pairs)} records of {len(chats)} conversations read as written, repeated turns included; {figures}"


PUBLISHED_CONFIGS = {  # the sections and keys of its three example files, with values of the same types
    "demo_config": {
        "policy_model_config": {"model_id": "google/gemma-2-2b-it", "token": ""},
        **{role: {"model_id": "gemini-2.0-flash-001"} for role in act.ROLES},
        "data_config": {"train_path": "", "validation_path": "", "preference_batch_generation": "False"},
        "training_config": {
            "project_id": "", "location": "us-central1", "staging_bucket": "", "icl_examples": 2,
            "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
        },
    },
    "sft_demo_config": {
        "policy_model_config": {"model_id": "google/gemma-2-9b-it", "token": ""},
        "preference_model_config": {"model_id": "gemini-2.0-flash-001"},
        "data_config": {"train_path": "", "validation_path": "", "preference_batch_generation": "False"},
        "training_config": {
            "project_id": "", "location": "us-central1", "output_dir": "", "staging_bucket": "",
            "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "packing": True, "learning_rate": 1e-5,
        },
    },
    "generate_pacific_derivation_preference_config": {
        "policy_model_config": {"model_id": "an/older-model"},
        **{role: {"model_id": "gemini-ultra"} for role in act.ROLES},
        "data_config": {"train_path": "gs://bucket/train.jsonl", "validation_path": "gs://bucket/validation.jsonl"},
        "training_config": {
            "project_id": "a-project", "location": "us-central1", "staging_bucket": "gs://bucket", "icl_examples": 10,
            "is_preference": False, "output_dir": "gs://bucket/out",
        },
    },
}  # fmt: skip


def published_configs(args):
    """Of its example configurations those keys have to go that nothing here reads; errors name them. The first trains."""
    files = {"policy_model_config.model_path": "gemma", "data_config.train_path": "train.jsonl"}
    files |= {"data_config.validation_path": "", "training_config.output_dir": "out"}  # not in a bucket
    gone = set()
    for name, raw in PUBLISHED_CONFIGS.items():
        path = args.folder / f"{name}.json"
        while True:
            path.write_text(json.dumps(raw))
            try:
                config = act.load_config(path, files)
                break
            except data.InputError as error:
                section, key = re.search(r"json: (\w+)\.(\w+): unknown key", str(error)).groups()
                del raw[section][key]
                gone.add(key)
        assert all(
            act.backend_of(getattr(config, role)) == ("gemini" if role in raw else "rule") for role in act.ROLES
        ), config
        read = {key: getattr(config.training_config, key) for key in raw["training_config"] if key != "output_dir"}
        assert read == {key: raw["training_config"][key] for key in read} and len(read) >= 2, read
    words = ["--config", args.folder / "demo_config.json", "--policy_model_config.model_path", TINY / "sft"]
    words += ["--task", "dpo", "--training_config.is_preference", "true", "--training_config.max_steps", 1]
    for role in act.ROLES:  # its helpers are Gemini, which wants a key
        words += [f"--{role}.backend", "rule"]
    words += ["--data_config.train_path", args.folder / "train_preference.jsonl"]
    run(args, *words, "--training_config.output_dir", args.folder / "theirs")
    loss = steps_of(args.folder / "theirs")[0]["loss"]
    assert abs(loss - math.log(2)) < 1e-3, loss
    names = ", ".join(PUBLISHED_CONFIGS)
    return f"{names} load without {', '.join(sorted(gone))}; the first trains 1 step of dpo on the records above: loss {loss:.4f}"


def own_chats(args):
    """A file without labels, its contexts and all, runs through sft and then act, unchanged."""
    rows = [json.loads(line) for line in args.conversations.read_text(encoding="utf-8").splitlines()[:8]]
    for row in rows:
        for message in row["messages"]:
            message.pop("requires_clarification", None)
    path = args.folder / "chats.jsonl"
    data.write_jsonl(path, rows)
    words = ["--config", "tiny.json", "--data_config.train_path", path, "--data_config.validation_path", ""]
    words += ["--training_config.max_steps", 1, "--training_config.per_device_train_batch_size", 4]
    run(args, *words, "--task", "sft", "--training_config.output_dir", args.folder / "chats_sft")
    words += ["--policy_model_config.model_path", args.folder / "chats_sft" / "model"]
    run(args, *words, "--training_config.output_dir", args.folder / "chats_act")
    losses = [steps_of(args.folder / name)[0]["loss"] for name in ("chats_sft", "chats_act")]
    assert all(math.isfinite(loss) for loss in losses), losses
    return f"8 conversations: sft, then act from its model, a step each: losses {losses[0]:.3f} and {losses[1]:.3f}"


POINTS = {
    "the trained model in transformers": trained_model,
    "config.json, generation_config.json": configurations,
    "it stops, in both prompt formats": stops,
    "AutoTokenizer": tokenizers_as_here,
    "preference file written here": preferences,
    "preference file in TRL's form": trl_preferences,
    "both files in TRL": trl_step,
    "preference file of the published code": published_preferences,
    "configs of the published code": published_configs,
    "somebody's chats without labels": own_chats,
}


def main():
    parser = argparse.ArgumentParser(
        description="Show that models and files go in and out of transformers, TRL and the published code."
    )
    parser.add_argument("--python", default=sys.executable, help="the Python that runs act.py")
    parser.add_argument(
        "--conversations", type=Path, default=TINY / "train.jsonl", help="labelled conversations, Vertex JSONL"
    )
    parser.add_argument("--model", type=Path, help="a real Gemma's directory, whose tokenizer.model is compared, too")
    args = parser.parse_args()
    args.conversations = args.conversations.resolve()
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    print(f"transformers {transformers.__version__}, trl {trl.__version__}, torch {torch.__version__}")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for title, point in POINTS.items():
            try:
                print(f"{title:38} ok      {point(args)}", flush=True)
            except Exception as error:  # the other points are still of interest
                failed += 1
                print(f"{title:38} FAILED  {type(error).__name__}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
