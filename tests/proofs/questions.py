"""How often the rule that says whether a reply asks (`data.is_question`) is right.

    python tests/proofs/questions.py [pacific.jsonl abg_coqa.jsonl ...] [--wrong]

On the 200 labelled replies of tests/golden/replies.jsonl, and on the labelled turns of each file of conversations. With
--wrong: also each reply about which it is wrong, `asks` or `tells` being its label.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from data import ANSWER, CLARIFY, action_metrics, fold, read_vertex_jsonl, rule_actions  # noqa: E402

REPLIES = ROOT / "tests" / "golden" / "replies.jsonl"


def labelled_replies(path):
    """[(reply, its action)] of the turns that have a label."""
    replies = []
    for conversation in read_vertex_jsonl(path):
        messages = conversation["messages"]
        for turn, reply in zip(messages, messages[1:], strict=False):
            if "requires_clarification" in turn and reply["role"] == "model":
                replies.append((reply["content"], CLARIFY if turn["requires_clarification"] else ANSWER))
    return replies


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", help="files of conversations with labels")
    parser.add_argument("--wrong", action="store_true", help="show the replies about which the rule is wrong")
    given = parser.parse_args(arguments)
    rows = map(json.loads, REPLIES.read_text(encoding="utf-8").splitlines())
    sources = {REPLIES: [(row["text"], CLARIFY if row["asks"] else ANSWER) for row in rows]}
    sources |= {path: labelled_replies(path) for path in given.paths}
    for path, replies in sources.items():
        texts, gold = zip(*replies, strict=True)
        found = rule_actions(texts)
        metrics = action_metrics(gold, found)
        print(f"{path}: {len(gold)} replies, {gold.count(CLARIFY)} ask: "
              f"precision {metrics['Binary Precision']:.3f}, recall {metrics['Binary Recall']:.3f}")  # fmt: skip
        for text, label, action in zip(texts, gold, found, strict=True):
            if given.wrong and label != action:
                print(f"  {'asks' if label == CLARIFY else 'tells'}: {fold(text)}")


if __name__ == "__main__":
    main()
