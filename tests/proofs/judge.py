"""How far a judge and DROP F1 agree about answers that say the same, or something else, in other words.

    python tests/proofs/judge.py pacific.jsonl                      conversations as `data.py pacific` writes them
    python tests/proofs/judge.py pacific.jsonl --base_url http://localhost:11434/v1 --model_id llama3.2 --turns 200

Each gold answer of the data is varied in ways of which it is known whether they stay right. The judge is asked over HTTP, as
in training; without --base_url by a server in this process that goes by a rule: right is what says all words of the reference
or, where it comes to a number, ends with the same number; what begins with "No, " is wrong. That rule was written with these
variants in mind: its own column tests the way to a judge and back, and tells nothing about how well a model judges. A verdict
is compared with DROP F1 above the tolerance of `data_config`.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import act  # noqa: E402
import data  # noqa: E402


def short(text):
    """An answer without its derivation: "2 + 6 = 8" -> "8"."""
    return text.rpartition(" = ")[2]


VARIANTS = {  # name -> ((gold answer, gold answer of another turn) -> answer, whether it is right)
    "gold itself": (lambda gold, other: gold, True),
    "gold in a sentence": (lambda gold, other: f"According to the report, it is {gold}.", True),
    "without its derivation": (lambda gold, other: short(gold), True),
    "without it, in a sentence": (lambda gold, other: f"The answer is {short(gold)}.", True),
    "another turn's answer": (lambda gold, other: other, False),
    '"No, " in front': (lambda gold, other: f"No, {gold}", False),
}


def words_of(text):
    return {word.rstrip(".") for word in re.findall(r"[\w.]+", text.lower().replace(",", ""))}


def numbers_of(text):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))]


def verdict(prompt):
    """RIGHT or WRONG, by rule, of the last example of the judge's prompt."""
    if "\nVerdict:" not in prompt:
        return "Yes."  # to the first call, which asks whether somebody is there
    gold, _, answer = prompt.rpartition("\nReference: ")[2].removesuffix("\nVerdict:").partition("\nAnswer: ")
    if answer.startswith("No, ") and not gold.startswith("No, "):
        return "WRONG"
    if len(words_of(short(gold))) == 1 and numbers_of(short(gold)):
        return "RIGHT" if numbers_of(answer)[-1:] == numbers_of(short(gold)) else "WRONG"
    return "RIGHT" if words_of(gold) <= words_of(answer) else "WRONG"


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": verdict(body["messages"][0]["content"])}
        reply = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(description="A judge beside DROP F1.")
    parser.add_argument("conversations")
    parser.add_argument("--base_url", default="")
    parser.add_argument("--model_id", default="by rule")
    parser.add_argument("--turns", type=int, default=0, help="how many turns to draw; 0: all")
    given = parser.parse_args()
    pairs = data.ACTDataset(data.read_vertex_jsonl(given.conversations), data.CLARIFY, 1).prepare_datasets()
    rng = random.Random(0)
    others = [rng.choice([each.target for each in pairs if each.target != pair.target]) for pair in pairs]
    drawn = rng.sample(range(len(pairs)), given.turns) if given.turns else range(len(pairs))
    base_url = given.base_url
    if not base_url:
        server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base_url = f"http://127.0.0.1:{server.server_port}"
    with tempfile.TemporaryDirectory() as folder:
        judge = act.HelperConfig("openai", model_id=given.model_id, base_url=base_url, cache_path=f"{folder}/cache")
        config = act.Config(judge_model_config=judge)
        prompt = (ROOT / "configs" / "prompts" / "judge.txt").read_bytes()
        act.start_processes()
        helpers = act.Helpers(config, {"judge_model_config.prompt_path": prompt})
        score = helpers.answers([pairs[i] for i in drawn], "judge")["score"]
        tolerance = config.data_config.tolerance
        print(f"{'':28} {'turns':>6} {'judge: right':>13} {'F1: right':>10} {'agree':>7} {'judge only':>11} {'F1 only':>8}")
        for name, (vary, right) in VARIANTS.items():
            answers = [vary(pairs[i].target, others[i]) for i in drawn]
            kept = [k for k, i in enumerate(drawn) if "without" not in name or short(pairs[i].target) != pairs[i].target]
            found = score(kept, [[("model", answers[k])] for k in kept])
            judged = [result and result[1] > tolerance for result in found]
            f1 = [data.drop_f1(answers[k], pairs[drawn[k]].target)[1] > tolerance for k in kept]
            both = list(zip(judged, f1, strict=True))
            shares = [sum(x is True for x in judged), sum(f1), sum(x is y for x, y in both),
                      sum(x is True and not y for x, y in both), sum(x is False and y for x, y in both)]  # fmt: skip
            cells = [f"{100 * share / max(1, len(kept)):.1f} %" for share in shares]
            print(f"{name:28} {len(kept):6} {cells[0]:>13} {cells[1]:>10} {cells[2]:>7} {cells[3]:>11} {cells[4]:>8}"
                  f"   should be {'right' if right else 'wrong'}")  # fmt: skip
        helpers.report("they count as neither")


if __name__ == "__main__":
    main()
