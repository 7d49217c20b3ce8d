"""How well the rule that plays the user tells a right question from one about something else, on real conversations.

    python tests/proofs/users.py pacific.jsonl        conversations as `data.py pacific` writes them

For each turn that calls for a question: the gold question, which must get the gold reply, and the gold questions of other
turns that are about something else (other content words), which must not. Then tests/golden/asked.jsonl: 200 questions
that Gemma 3 270M asked on such turns of PACIFIC during and after training, labelled by reading, all but the first 33
before the rule's answers were seen: {"user": the turn, "gold": the gold question, "asked", "right": does it ask for what
was left open?}.
"""

import argparse
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402

ASKED = ROOT / "tests" / "golden" / "asked.jsonl"


def replied(pair, question):
    [reply] = data.rule_users([(pair, [("model", question)], None)])
    return reply != data.NOTHING_TO_ADD


def answered(row):
    """Does a labelled question get the gold reply?"""
    gold = [("model", row["gold"]), ("user", "that one"), ("model", "5")]
    return replied(data.Pair("", [("user", row["user"])], data.CLARIFY, gold, gold, gold, "5"), row["asked"])


def share(hits):
    return f"{sum(hits)} of {len(hits)} ({100 * sum(hits) / max(1, len(hits)):.1f} %)"


def main():
    parser = argparse.ArgumentParser(description="The rule that plays the user, measured.")
    parser.add_argument("conversations")
    given = parser.parse_args()
    pairs = data.ACTDataset(data.read_vertex_jsonl(given.conversations), data.CLARIFY, 1).prepare_datasets()
    pairs = [pair for pair in pairs if pair.action == data.CLARIFY]
    questions = [pair.gold[0][1] for pair in pairs]
    about = [data.content_words(question) for question in questions]
    print("the gold question gets its reply:", share([replied(p, q) for p, q in zip(pairs, questions, strict=True)]))
    for name, here in (("of the same dialogue", True), ("of other dialogues", False)):
        rng, given_away = random.Random(0), []
        for i, pair in enumerate(pairs):
            others = [k for k, p in enumerate(pairs) if k != i and (p.dialogue == pair.dialogue) == here]
            others = [k for k in others if about[k] != about[i]]
            for k in others if here else rng.sample(others, min(20, len(others))):
                given_away.append(replied(pair, questions[k]))
        print(f"questions {name} about something else get it:", share(given_away))
    rows = [json.loads(line) for line in ASKED.read_text(encoding="utf-8").splitlines()]
    for right in (True, False):
        hits = [answered(row) for row in rows if row["right"] is right]
        print(f"sampled questions labelled {'right' if right else 'wrong'} get it:", share(hits))


if __name__ == "__main__":
    main()
