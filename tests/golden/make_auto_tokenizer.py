"""Record what transformers' AutoTokenizer makes of the tokenizer files that act.py saves, in auto_tokenizer.json.

    pip install transformers sentencepiece protobuf jinja2 && python tests/golden/make_auto_tokenizer.py

Needs transformers and this project's packages; run it again when act.save_tokenizer or configs/chat_template.jinja changes.
The tokenizer is configs/tiny/tokenizer.model, saved for the prompt format "gemma". Recorded: the files beside it; [text, ids
with <bos>, the text that these are decoded to without control tokens]; {name in chat_template.json: ids of the prompt}; ids of
the prompt of a chat that the assistant opens, with words that no prompt of Gemma's has room for.
"""

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
TINY = HERE.parents[1] / "configs" / "tiny"
sys.path.insert(0, str(HERE.parents[1]))
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
TEXTS = [
    "get debt may berlin", "For which month?", "a\nb", "a\n\n\n b", "\n\n", "\r\nx", "two  spaces", "   three", " lead", "trail ",
    "\ttab\t\t x", " " * 40 + "x", "cafe\u0301 caf\u00e9", "\u1100\u1161\u11a8 \uac01", "\U0001f44b\U0001f3ff", FAMILY, "\u65e5\u672c\u8a9e",
    "$1,234.5 (12%)", "<b>bold</b>", "\uff1cend_of_turn\uff1e", "\u200b\ufeff\ufffd\u00a0", "\x07\x1b[0m", "",
]  # fmt: skip


def main():
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    import act
    from gemma import GemmaConfig, Template, Tokenizer

    tokenizer, config = Tokenizer(TINY / "tokenizer.model"), GemmaConfig.from_json(TINY / "sft" / "config.json")
    template = Template(tokenizer, "gemma")
    template.mark_stops(config)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        act.save_tokenizer(template, folder)
        files = {path.name: path.read_text() for path in folder.iterdir() if path.name != "tokenizer.model"}
        (folder / "config.json").write_text(json.dumps(config.to_json("float32")))
        theirs = AutoTokenizer.from_pretrained(folder)
    texts = [[text, ids := theirs(text).input_ids, theirs.decode(ids, skip_special_tokens=True)] for text in TEXTS]
    opened = [{"role": "system", "content": "tax"}, {"role": "assistant", "content": "get tax"}, {"role": "user", "content": "jan"}]
    opened, chats = theirs.apply_chat_template(opened, add_generation_prompt=True)["input_ids"], {}
    for row in json.loads((HERE / "chat_template.json").read_text())["conversations"]:
        said = [("system", row["system"])] * (row["system"] is not None) + row["messages"]
        messages = [{"role": role.replace("model", "assistant"), "content": text} for role, text in said]
        chats[row["name"]] = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    made = {"made_with": {package: version(package) for package in ("transformers", "tokenizers", "jinja2")}, "files": files}
    made["opened"] = opened
    lines = {"texts": ",\n".join(map(json.dumps, texts)), "chats": json.dumps(chats).replace("], ", "],\n")}
    text = f'{json.dumps(made, indent=1)[:-2]},\n "texts": [\n{lines["texts"]}\n],\n "chats": {lines["chats"]}}}\n'
    assert json.loads(text)["chats"] == chats and json.loads(text)["texts"] == texts
    (HERE / "auto_tokenizer.json").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
