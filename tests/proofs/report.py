"""A report in a real browser: does it open, quickly and without an error, and do its filters and its search work?

    python tests/proofs/report.py                        5,000 made turns with hostile texts, before and after
    python tests/proofs/report.py runs/tiny/report.html  the report of a run
    python tests/proofs/report.py --pictures FOLDER      screenshots of wide and narrow windows, light and dark, go there

Needs Chromium or Chrome, found by name; it runs without a window and is driven through a pair of pipes
(--remote-debugging-pipe), so that nothing but Python's own library is needed. Each check prints a line; status 1 if one fails.
"""

import argparse
import base64
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import act  # noqa: E402
import data  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOSTILE = [
    "</script><script>window.broken = 1</script>", "<!-- <script>", "<img src=x onerror='window.broken = 1'>", "]]>",
    "&lt;b&gt; &amp;", "line\u2028separator\u2029s", "\"quotes\" 'of' `all` ${kinds} \\n \\u003c", "{{7*7}} <%= x %>", "",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4", "\u202eright to left\u202c", "\u05e9\u05dc\u05d5\u05dd",
    "nul\x00 and bell\x07", "W" * 400, "a\n\n\n  b\tc",
]  # fmt: skip


def made_report(folder, turns=5000, rollouts=5000, seed=0):
    """A folder as a run leaves it, with so many turns evaluated before and after and so many samples; its report.html."""
    rng = random.Random(seed)
    names = [f"{place} {kind}" for place in ("Bergen", "Porto", "Quito", "Oslo") for kind in ("revenue", "costs", "debt")]

    def text(words):
        said = " ".join(rng.choice(names) for _ in range(words // 2))
        return f"{said} {rng.choice(HOSTILE)}" if rng.random() < 0.3 else said

    contexts = [f"Table {i}\n" + "\n".join(f"{text(8)} | {rng.random():.4f}" for _ in range(30)) for i in range(turns // 10)]

    def turn(i):
        history = [["user" if k % 2 == 0 else "model", text(8)] for k in range(1 + 2 * (i % 10))]
        history[-1][1] += f" Turn number {i}?"
        return {"where": f"validation.jsonl:{i // 10 + 1}", "context": contexts[i // 10 % len(contexts)], "history": history}

    def trajectory(asked):
        return [["model", text(6) + "?"], ["user", text(4)], ["model", text(6)]] if asked else [["model", text(6)]]

    def sample(i, step, skill):
        gold, done = golds[i], rng.random()
        asked = (gold == data.CLARIFY) == (rng.random() < skill)
        score = rng.choice([0.0, round(rng.random(), 3), 1.0, 1.0])
        said = trajectory(asked)
        inferred = None if done < 0.01 else data.CLARIFY if asked else data.ANSWER
        return {
            "step": step, **all_turns[i], "trajectory": said, "gold": gold_said[i], "gold_target": gold_said[i][-1][1],
            "final_answer": said[-1][1] if done < 0.95 else None, "inferred_action": inferred, "target_action": gold,
            "questions": int(asked), "gold_questions": int(gold == data.CLARIFY),
            "turn_exact_match": float(score == 1), "turn_f1": score, "exact_match": float(score == 1), "f1": score,
        }  # fmt: skip

    all_turns = [turn(i) for i in range(turns)]
    golds = [rng.choice([data.CLARIFY, data.ANSWER]) for _ in range(turns)]
    gold_said = [trajectory(gold == data.CLARIFY) for gold in golds]
    evaluated = {step: [sample(i, step, skill) for i in range(turns)] for step, skill in ((0, 0.6), (500, 0.85))}
    metrics = []
    for step in range(501):
        if step in evaluated:
            metrics.append({"step": step, **{f"eval/{k}": v for k, v in act.summarize(evaluated[step]).items()}})
        counts = [rng.random() * (1 + (k == 1) * step / 100) for k in range(len(act.OUTCOMES))]
        outcomes = {f"act/{name}": round(32 * n / sum(counts)) for name, n in zip(act.OUTCOMES, counts, strict=True)}
        loss = 0.7 * 0.995**step + 0.1 * rng.random()
        rewards = {"margins": 3 - 4 * loss + rng.random(), "chosen": 1 - loss, "rejected": 3 * loss - 2}
        row = {"loss": None if step == 7 else loss, **{f"rewards/{k}": v for k, v in rewards.items()}}
        metrics.append({"step": step + 1, **outcomes, **row, "grad_norm": rng.random(), "tokens": 900})
    sampled = [
        {"step": 1 + i // 10, **all_turns[i % turns], "trajectory": trajectory(rng.random() < 0.5), "target": text(4),
         "action": rng.choice([data.CLARIFY, data.ANSWER]), "outcome": rng.choice(act.OUTCOMES),
         "score": rng.choice([None, rng.random()]), "replaced": rng.choice(["chosen", "rejected", None])}
        for i in range(rollouts)
    ]  # fmt: skip
    config = {"task": "act", "policy_model_config": {"model_path": "model"}, "training_config": {"output_dir": HOSTILE[0]}}
    data.write_json(folder / "config.json", config)
    data.write_json(folder / "eval_metrics.json", act.summarize(evaluated[500]))
    data.write_jsonl(folder / "metrics.jsonl", metrics)
    data.write_jsonl(folder / "eval_samples.jsonl", [row for rows in evaluated.values() for row in rows])
    data.write_jsonl(folder / "rollouts.jsonl", sampled)
    began = time.perf_counter()
    act.write_report(folder)
    size = (folder / "report.html").stat().st_size
    print(f"written in {time.perf_counter() - began:.1f} s: {turns} turns before and after, {rollouts} samples, {size / 1e6:.1f} MB")
    return folder / "report.html"


def small_reports(folder, of):
    """Reports of runs with little in them, made from the files of another; their paths."""
    rows = {name: act.logged_rows(of / f"{name}.jsonl") for name in ("metrics", "eval_samples")}
    first = [row for row in rows["eval_samples"] if row["step"] == 0][:30]
    kinds = {
        "nothing": {},
        "before the first step": {"metrics": rows["metrics"][:1], "eval_samples": first},
        "task evaluate": {"eval_samples": [{k: v for k, v in row.items() if k != "step"} for row in first]},
        "task sft": {"metrics": [{"step": 1, "loss": 1.0, "tokens": 3}]},
        "nulls": {"metrics": [dict.fromkeys(row) | {"step": i} for i, row in enumerate(rows["metrics"][:3])]},
        "a helper that always fails": {"eval_samples": [{**row, "step": i // 15, "inferred_action": None,
                                                         "where": f"line {i % 15}"} for i, row in enumerate(first)]},
    }  # fmt: skip
    for name, files in kinds.items():
        path = folder / name
        path.mkdir()
        if files:
            shutil.copy(of / "config.json", path)
        if name == "task evaluate":
            shutil.copy(of / "eval_metrics.json", path)
        for file, lines in files.items():
            data.write_jsonl(path / f"{file}.jsonl", lines)
        act.write_report(path)
        yield path / "report.html"


class Browser:
    """Chromium without a window, and its DevTools protocol: JSON messages that end in a zero byte, on descriptors 3 and 4."""

    def __init__(self, profile):
        program = next(filter(None, map(shutil.which, BROWSERS)), None)
        if not program:
            sys.exit(f"none of {', '.join(BROWSERS)} is installed")
        (to_read, self.write), (self.read, to_write) = os.pipe(), os.pipe()
        to_read, to_write = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write))  # out of the way of 3 and 4
        words = [program, "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run", "--disable-gpu"]
        words += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root otherwise

        def place():
            os.dup2(to_read, 3)
            os.dup2(to_write, 4)

        self.process = subprocess.Popen(words, stderr=subprocess.DEVNULL, preexec_fn=place, pass_fds=(3, 4))
        os.close(to_read), os.close(to_write)
        self.number, self.rest, self.events = 0, b"", []
        self.session = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                received = os.read(self.read, 1 << 20)
                if not received:
                    sys.exit("the browser has ended")
                self.rest += received
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def evaluate(self, script):
        """The value of a JavaScript expression; what it promises is awaited."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, script, seconds=20):
        end = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            if time.monotonic() > end:
                sys.exit(f"not within {seconds} s: {script}")
            time.sleep(0.05)
        return value

    def window(self, width, height=900, dark=False):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def picture(self, path):
        """The page from its top to its end, at most 4000 pixels of it."""
        height = min(4000, self.evaluate("document.documentElement.scrollHeight"))
        clip = {"x": 0, "y": 0, "width": self.evaluate("innerWidth"), "height": height, "scale": 1}
        time.sleep(0.3)
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]))
        print(f"     {path}")

    def problems(self):
        """What the console said in anger, and requests for anything but the page itself."""
        found = []
        for event in self.events:
            what, said = event.get("method"), event.get("params", {})
            if what == "Runtime.exceptionThrown" or what == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
                found.append(json.dumps(said)[:300])
            elif what == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(said["args"])[:300])
            elif what == "Network.requestWillBeSent" and not said["request"]["url"].startswith(("file:", "data:", "about:")):
                found.append(f"asked for {said['request']['url'][:200]}")
        return found

    def close(self):
        try:
            self.session = None
            self("Browser.close")
        except SystemExit:
            pass
        self.process.wait(20)


FAILED = []


def check(name, holds, seen=""):
    print(f"{'ok  ' if holds else 'FAIL'} {name}" + (f": {seen}" if seen != "" else ""))
    if not holds:
        FAILED.append(name)


def try_browser_of(browser, section):
    """Every filter of a list shows as many rows as its chip says, and a search finds what was typed."""
    box = f"document.querySelector('#browse-{section}')"
    if not browser.evaluate(f"Boolean({box})"):
        return print(f"     no list of {section} in this report")
    listed = f"{box}.querySelector('[role=status]').textContent"
    chips = browser.evaluate(f"[...{box}.querySelectorAll('[data-filter]')].map((chip) => chip.dataset.filter)")
    whole, said = browser.evaluate(listed), []
    for name in chips[1:] + chips[:1]:
        chip = f"{box}.querySelector('[data-filter={name}]')"
        browser.evaluate(f"{chip}.click()")
        shown, counted = browser.evaluate(listed), browser.evaluate(f"{chip}.querySelector('.count').textContent")
        said.append(shown.split(" of ")[0])
        if shown.split(" of ")[0] != counted:
            check(f"{section}: filter {name}", False, f"{counted} on its chip, {shown} listed")
    check(f"{section}: filters change what is listed", len(set(said)) > 1 and browser.evaluate(listed) == whole,
          ", ".join(f"{name} {number}" for name, number in zip(chips[1:] + chips[:1], said, strict=True)))  # fmt: skip

    built = browser.evaluate(f"{box}.querySelectorAll('.turn').length")
    check(f"{section}: only a part is built", built <= 200, f"{built} rows at first")
    browser.evaluate(f"{box}.querySelector('.more').scrollIntoView()")
    if built < int(whole.split(" of ")[0].replace(",", "")):
        check(f"{section}: more as one scrolls", browser.wait(f"{box}.querySelectorAll('.turn').length > {built}"))
    word = browser.evaluate(f"{box}.querySelectorAll('.turn .said')[5]?.textContent.trim().split(/\\s+/).slice(-2).join(' ') || ''")
    began = time.perf_counter()
    typing = f"((text) => {{ const field = {box}.querySelector('[type=search]'); field.value = text; "
    typing += "field.dispatchEvent(new Event('input')) })"
    browser.evaluate(f"{typing}({json.dumps(word)})")
    browser.wait(f"{listed} !== {json.dumps(whole)}")
    took = time.perf_counter() - began
    found = browser.evaluate(listed)
    check(f"{section}: a search finds fewer, but some", not found.startswith("0 "), f"{word!r}: {found} in {took:.2f} s")
    first = f"{box}.querySelector('.turn')"
    browser.evaluate(f"{first}.querySelector('summary').click()")
    browser.wait(f"{first}.querySelector('.body .bubble') !== null")
    check(f"{section}: hits are marked", browser.evaluate(f"{first}.querySelectorAll('mark').length") > 0)
    browser.evaluate(f"{typing}('')")
    browser.wait(f"{listed} === {json.dumps(whole)}")


def main():
    parser = argparse.ArgumentParser(description="A report in a real browser.")
    parser.add_argument("report", nargs="?", help="report.html of a run; without it one is made")
    parser.add_argument("--pictures", help="where screenshots go")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        page = Path(given.report).resolve() if given.report else made_report(Path(made))
        browser = Browser(Path(made) / "profile")
        try:
            browser.window(1400)
            browser("Page.navigate", url=page.as_uri())
            took = int(browser.wait("document.documentElement?.dataset.ready"))
            check("opens in less than 2 s", took < 2000, f"{took} ms")
            for section in ("turns", "rollouts"):
                try_browser_of(browser, section)
            bars = "[...document.querySelectorAll('.plot')].find((plot) => plot.ariaLabel.includes('Enter'))"
            if browser.evaluate(f"Boolean({bars})"):
                for key in ("Home", "Enter"):
                    browser.evaluate(f"{bars}.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))")
                found = browser.evaluate("document.querySelector('#browse-rollouts [role=status]').textContent")
                check("a bar of outcomes lists its steps' samples", not found.startswith("0 "), found)
            keys = "document.querySelector('.plot')"
            if browser.evaluate(f"Boolean({keys})"):
                browser.evaluate(f"{keys}.focus(); {keys}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowRight'}}))")
                check("a curve read with the keyboard", "step" in browser.evaluate(f"{keys}.querySelector('.tip').textContent"))
                browser.evaluate("document.activeElement.blur()")
            for width, dark in ((1400, False), (1400, True), (420, False), (420, True)):
                browser.window(width, dark=dark)
                browser.evaluate("scrollTo(0, 0); new Promise((done) => setTimeout(done, 300))")
                wide = browser.evaluate("document.documentElement.scrollWidth")
                check(f"nothing is wider than {width} pixels", wide <= width, f"{wide}")
                if given.pictures:
                    Path(given.pictures).mkdir(parents=True, exist_ok=True)
                    browser.picture(Path(given.pictures) / f"{width}-{'dark' if dark else 'light'}.png")
            for small in [] if given.report else small_reports(Path(made), page.parent):
                browser("Page.navigate", url=small.as_uri())
                browser.wait("document.documentElement?.dataset.ready")
                titles = browser.evaluate("[...document.querySelectorAll('h2')].map((title) => title.textContent).join(', ')")
                check(f"opens: {small.parent.name}", not browser.problems(), titles)
                if given.pictures:
                    browser.picture(Path(given.pictures) / f"{small.parent.name.replace(' ', '-')}.png")
            check("no text became markup", browser.evaluate("window.broken === undefined"))
            check("no error in the console, no request", not browser.problems(), "; ".join(browser.problems()))
        finally:
            browser.close()
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
