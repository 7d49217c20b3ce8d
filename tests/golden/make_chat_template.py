"""Record the reference of the prompt format "gemma": token ids of `apply_chat_template` with Gemma 3's template, in chat_template.json.

    pip install transformers trl sentencepiece protobuf && python tests/golden/make_chat_template.py

Needs transformers and trl, which no test does; run it again only to change what is recorded. The template is the published
one, as trl ships it: the system text, untrimmed, and a blank line at the head of the first user turn; messages trimmed as Python's
str.strip does. The tokenizer is configs/tiny/tokenizer.model, a unigram model. transformers' GemmaTokenizer makes a BPE model of every
tokenizer.model and so splits these texts differently; recorded are the ids of transformers' SentencePieceBackend, which asks
sentencepiece itself, for the whole rendered text at once. That it agrees with sentencepiece on each text alone is asserted.

Control tokens spelt in a text become control ids here; no such text is recorded. What is recorded, one conversation a line:
  name, system (null: none), messages [[role, text], ...] which end with the user's, reply (the model's, after them),
  prompt_ids of system and messages with the generation prompt, full_ids of system, messages and reply without one
"""

import json
import unicodedata
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[1] / "configs/tiny/tokenizer.model"
CONTROL = ("<s>", "</s>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>")
ROLES = {"user": "user", "model": "assistant"}

CONTEXT = "items: sales, debt\nmonths: may, dec\nplaces: berlin, quito"
CODE = "```python\ndef total(rows):\n    # sum of a column\n\n    return sum(\n        row[1] for row in rows\n    )\n```"
TABLE = "| item | may |\n|------|----:|\n| debt |   5 |\n| tax  |  -7 |"
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
LONG = " ".join(f"{i}: get debt may quito, or sales dec berlin?" for i in range(60))[:2000]

# name: (system, the user's and the model's texts in turns)
CONVERSATIONS = {
    "plain": (None, "Can I see the debt at berlin?", "For which month?"),
    "system": (CONTEXT, "Can I see the debt at berlin?", "For which month?"),
    "several turns": (CONTEXT, "Can I see the debt?", "For which month?", "may.", "For which place?", "berlin", "get debt may berlin"),
    "several turns without system": (None, "sales?", "For which month?", "dec", "get sales dec quito"),
    "empty system": ("", "What is the tax?", "5"),
    "blank system": (" \t ", "What is the tax?", "5"),
    "system of one line break": ("\n", "What is the tax?", "5"),
    "system that ends in a line break": ("Tax: 5.\n", "What is the tax?", "5"),
    "system that ends in three line breaks": ("Tax: 5.\n\n\n", "What is the tax?", "5"),
    "system that begins with line breaks": ("\n\nTax: 5.", "What is the tax?", "5"),
    "system between spaces": ("  Tax: 5.  ", "  What is the tax?  ", "  5  "),
    "system with blank lines": ("Tax\n\n\n\nfive\n \n  six", "What is the tax?", "5"),
    "line breaks inside": (None, "Two questions:\nthe debt in may\nand the tax in dec?", "First:\n5\nSecond:\n7"),
    "blank lines inside": (CONTEXT, "the debt\n\nin may\n\n\nat quito", "one\n\n\n\ntwo"),
    "spaces before": (None, "   get debt", "    5"),
    "spaces after": (None, "get debt   ", "5    "),
    "line breaks before": (None, "\n\nget debt", "\n5"),
    "line breaks after": (None, "get debt\n\n", "5\n"),
    "blank lines at every boundary": (CONTEXT, "\n\n get debt \n\n", "\n\n For which month? \n\n", "\n\n may \n\n", "\n\n 5 \n\n"),
    "spaces and line breaks mixed": (None, " \n \t\n get debt\n\t \n", "\t\n5 \n "),
    "runs of spaces inside": (None, "debt  tax   sales     orders", "5          7"),
    "tabs": ("may\tdec\n5\t7", "\tdebt\t\ttax\t", "5\t7"),
    "carriage returns": ("Tax: 5.\r\nDebt: 7.\r\n", "the tax\r\nand\r\n\r\nthe debt?\r\n", "5\r\n7"),
    "lone carriage return": (None, "the tax\rand the debt\r", "\r5\r7"),
    "code block": (None, f"What is wrong here?\n\n{CODE}", "Nothing, I think."),
    "reply that is a code block": ("You write code.", "Sum the second column.", f"{CODE}\n"),
    "reply in a code block that asks": (None, "Repeat it.", '```\nprint("For which month?")\n```'),
    "JSON": ('{"months": ["may", "dec"], "tax": null}', '{\n  "item": "debt",\n  "month": ["may"]\n}', '{"value": 5.0, "unit": "\\u20ac"}'),
    "Markdown table": (TABLE, f"{TABLE}\n\nThe tax?", "| tax |\n|--|\n| -7 |"),
    "nested list": (None, "- debt\n  - may\n    1. berlin\n\n  - dec\n* tax", "1. 5\n   - a\n\n      b"),
    "Arabic": ("السياق: المبيعات والديون", "كم بلغت الديون في مايو؟", "في أي مدينة؟", "في برلين.", "خمسة"),
    "Japanese": ("文脈：売上と負債。\n", "五月の負債はいくらですか？", "　どの都市ですか？　", "ベルリン", "五"),
    "emoji": (f"{FAMILY} debt", f"{FAMILY}\u2764\ufe0f tax? \U0001f44d\U0001f3fd", "\U0001f1ee\U0001f1e9"),
    "combining characters": (None, unicodedata.normalize("NFD", "Où est la dette de l'été ?"), unicodedata.normalize("NFC", "À Québec.")),
    "compatibility characters": (None, "ﬁnd ① Ａ ½ ㎏ the debt", "５"),
    "Unicode spaces at the ends": (None, "\u00a0\u2003debt\u3000\u2028", "\u00855\u2029"),
    "zero-width characters at the ends": (None, "\u200bdebt\ufeff", "\u200e5\u200d"),
    "separators inside": (None, "debt\u2028tax\u2029sales\u0085orders\x0bdec\x0cmay", "5\u00a07"),
    "long": (CONTEXT, LONG, "get debt may quito"),
    "long reply": (None, "Say it all.", LONG),
    "roles as words": (None, "user\nmodel\nUser: debt\nAssistant: tax", "model\n5", "user", "model"),
    "angle brackets": (None, "<b>debt</b> <tax> a < b > c << 2", "<p>5</p>"),
    "one character": (None, "a", "s"),
    "empty reply": (None, "debt", "", "tax", "7"),
    "blank reply": (CONTEXT, "debt", " \n ", "tax", "\n"),
    "figures": (None, "2018: 1,234.50 (-7 %) = ?", "-0.5"),
    "what the words are made of": (None, "I see the figure at berlin , berlin. berlin? figures", "Answer the user's question"),
}


def make_tokenizer():
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = SentencePieceBackend(vocab_file=str(MODEL), **names, extra_special_tokens=["<start_of_turn>", "<end_of_turn>"])
    tokenizer.chat_template = (files("trl") / "chat_templates/gemma3.jinja").read_text(encoding="utf-8")
    return tokenizer


def record(tokenizer, processor, name, system, *texts):
    said = [[("user", "model")[i % 2], text] for i, text in enumerate(texts)]
    assert len(said) % 2 == 0 and not any(token in text for token in CONTROL for text in (system or "", *texts)), name
    for text in (system or "", *texts):
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text), (name, text)
    head = [] if system is None else [{"role": "system", "content": system}]
    messages = head + [{"role": ROLES[role], "content": text} for role, text in said]
    encode = {"tokenize": True, "return_dict": False}
    return {
        "name": name, "system": system, "messages": said[:-1], "reply": texts[-1],
        "prompt_ids": tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **encode),
        "full_ids": tokenizer.apply_chat_template(messages, add_generation_prompt=False, **encode),
    }  # fmt: skip


def main():
    tokenizer, processor = make_tokenizer(), sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    model = sentencepiece_model_pb2.ModelProto.FromString(MODEL.read_bytes())
    made = {
        "made_with": {package: version(package) for package in ("transformers", "trl", "sentencepiece", "jinja2")},
        "template": "trl/chat_templates/gemma3.jinja",
        "tokenizer": "configs/tiny/tokenizer.model through transformers' SentencePieceBackend",
        "normalizer": model.normalizer_spec.name,
    }
    rows = [record(tokenizer, processor, name, *texts) for name, texts in CONVERSATIONS.items()]
    lines = ",\n".join(json.dumps(row, ensure_ascii=True) for row in rows)
    text = f'{json.dumps(made, indent=1)[:-2]},\n "conversations": [\n{lines}\n]}}\n'
    assert json.loads(text)["conversations"] == rows
    (HERE / "chat_template.json").write_text(text, encoding="utf-8", newline="\n")
    print(f"chat_template.json: {len(rows)} conversations, {sum(len(row['full_ids']) for row in rows)} tokens")


if __name__ == "__main__":
    main()
