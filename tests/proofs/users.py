"""How well the rule that plays the user tells a right question from one about something else, on real conversations.

    python tests/proofs/users.py pacific.jsonl                      conversations as `data.py pacific` writes them
    python tests/proofs/users.py pacific.jsonl --labelled Q.jsonl   and questions that somebody has labelled

For each turn that calls for a question: the gold question, which must get the gold reply, and the gold questions of other
turns that are about something else (other content words), which must not. Q.jsonl: {"where", "user", "gold", "asked",
"right": true | false} a line, a question that a model asked on such a turn and whether it asks for what was left open.
"""

import argparse
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402


def replied(pair, question):
    [reply] = data.rule_users([(pair, [("model", question)], None)])
    return reply != data.NOTHING_TO_ADD


def share(hits):
    return f"{sum(hits)} of {len(hits)} ({100 * sum(hits) / max(1, len(hits)):.1f} %)"


def main():
    parser = argparse.ArgumentParser(description="The rule that plays the user, measured.")
    parser.add_argument("conversations")
    parser.add_argument("--labelled")
    given = parser.parse_args()
    pairs = data.ACTDataset(data.read_vertex_jsonl(given.conversations), data.CLARIFY, 1).prepare_datasets()
    pairs = [pair for pair in pairs if pair.action == data.CLARIFY]
    questions = [pair.gold[0][1] for pair in pairs]
    about = [data.content_words(question) for question in questions]
    print("the gold question gets its reply:", share([replied(p, q) for p, q in zip(pairs, questions, strict=True)]))
    for name, here in (("of the same dialogue", True), ("of other dialogues", False)):
        rng, given_away = random.Random(0), []
        for i, pair in enumerate(pairs):
            others = [k for k, p in enumerate(pairs) if k != i and (p.where == pair.where) == here]
            others = [k for k in others if about[k] != about[i]]
            for k in others if here else rng.sample(others, min(20, len(others))):
                given_away.append(replied(pair, questions[k]))
        print(f"questions {name} about something else get it:", share(given_away))
    if given.labelled:
        rows = [row for _, row in data.read_jsonl(given.labelled)]
        for right in (True, False):
            hits = []
            for row in rows:
                if row["right"] is right:
                    pair = next(p for p in pairs if p.where.endswith(row["where"]) and p.history[-1][1] == row["user"])
                    hits.append(replied(pair, row["asked"]))
            print(f"sampled questions labelled {'right' if right else 'wrong'} get it:", share(hits))


if __name__ == "__main__":
    main()
