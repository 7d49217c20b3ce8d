"""report.html: the data in the page is the run's, whatever its texts are, and the page needs nothing from elsewhere.

Without a browser; tests/proofs/report.py opens reports in one.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hostile import HOSTILE

import act
import data

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (ROOT / "configs" / "report.html").read_text("utf-8")
TEXTS = [
    "</script>", "</SCRIPT ><script>alert(1)</script>", "<!-- <script>", "-->", "]]>", "&lt;&amp;&quot;", "null", "",
    "\u2028 and \u2029", "\"'`\\ \\u003c ${x}", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u202eleft", "a\r\n\tb\x85c",
    "nul \x00 bell \x07",
]  # fmt: skip


def data_of(folder):
    """What a browser would find in the page's data block: it ends at the first </script, and so must the data."""
    page = (folder / "report.html").read_text("utf-8")
    [start] = re.finditer('<script type="application/json" id="data">', page)
    block = page[start.end() : re.search("</script", page[start.end() :], re.IGNORECASE).start() + start.end()]
    assert "<!--" not in block, "which would hide the end of the block from a parser"
    assert block.isascii() and page.replace(block, "null") == TEMPLATE, "the template, and nothing but the block is new"
    held = json.loads(block, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for row in held.get("eval_samples", []) + held.get("rollouts", []):
        row.update({key: held["texts"][row[key]] for key in ("context", "history", "gold") if key in row})
    return held


def sample(text, step=0, **more):
    texts = {"context": text, "history": [["user", text]], "trajectory": [["model", text]], "gold": [["model", text]] * 2}
    return {"step": step, "where": text, **texts, "f1": 0.5, "final_answer": None, **more}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_of_very_many_samples_the_page_has_the_newest(tmp_path):
    write_rows(tmp_path / "rollouts.jsonl", ({"step": step, "context": "c", "history": [], "gold": []} for step in range(5100)))
    act.write_report(tmp_path)
    assert [row["step"] for row in data_of(tmp_path)["rollouts"]] == list(range(100, 5100))


def test_the_data_in_the_page_are_the_rows_of_the_run(tmp_path):
    files = {
        "metrics": [{"step": 0, "eval/Accuracy": None, text: 1.5} for text in TEXTS],
        "eval_samples": [sample(text, step, odd={text: [text]}) for step in (0, 9) for text in TEXTS],
        "rollouts": [sample(text, 1) for text in TEXTS],
    }
    for name, rows in files.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    config = {"task": TEXTS[0], "training_config": {"output_dir": TEXTS[1]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    act.write_report(tmp_path)
    held = data_of(tmp_path)
    assert held.pop("config") == config and held.pop("texts")
    assert held == files


def test_hostile_conversations_come_back_as_they_were(tmp_path):
    rows = [
        sample(message["content"], history=[[m["role"], m["content"]] for m in conversation["messages"]])
        for conversation in HOSTILE
        for message in conversation["messages"]
    ]  # fmt: skip
    data.write_jsonl(tmp_path / "eval_samples.jsonl", rows)
    act.write_report(tmp_path)
    assert data_of(tmp_path)["eval_samples"] == rows


def test_a_text_that_rows_share_stands_in_the_page_once(tmp_path):
    rows = [sample(f"turn {i % 3}", step=i, context="a long table " * 50) for i in range(30)]
    write_rows(tmp_path / "eval_samples.jsonl", rows)
    write_rows(tmp_path / "rollouts.jsonl", rows)
    act.write_report(tmp_path)
    assert len(data_of(tmp_path)["texts"]) == 1 + 3 + 3, "a context, histories, gold trajectories"
    assert (tmp_path / "report.html").read_text().count("a long table " * 50) == 1


def test_nothing_in_the_template_comes_from_elsewhere():
    assert TEMPLATE.count('<script type="application/json" id="data">null</script>') == 1
    for word in ("http:", "https:", "@import", "url(", "src=", "fetch(", "XMLHttpRequest", "import(", "//cdn"):
        assert word not in TEMPLATE, word
    assert re.findall(r"\bhref=\"(.*?)\"", TEMPLATE) == ["data:,"]
    assert "default-src 'none'" in TEMPLATE, "and the browser would refuse it"


def test_no_text_of_a_run_can_become_markup():
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "srcdoc", "eval(", "Function("):
        assert word not in TEMPLATE, word


@pytest.mark.parametrize("files", [[], ["metrics.jsonl"], ["config.json"], ["rollouts.jsonl", "eval_samples.jsonl"]])
def test_a_folder_with_little_or_nothing_in_it(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("{}" if name == "config.json" else "")
    act.write_report(tmp_path)
    held = data_of(tmp_path)
    assert held.pop("texts") == [] and not any(held.values())


def test_half_a_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    act.write_report(tmp_path)
    assert data_of(tmp_path)["metrics"] == [{"step": 1, "loss": 0.5}]


def test_a_report_replaces_the_one_before(tmp_path):
    for step in range(2):
        write_rows(tmp_path / "metrics.jsonl", [{"step": step}])
        act.write_report(tmp_path)
    assert data_of(tmp_path)["metrics"] == [{"step": 1}]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "report.html"}


def test_without_its_template_a_run_goes_on_without_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(act, "HERE", tmp_path)
    act.write_report(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl", "config.json"])
def test_a_log_that_cannot_be_read_costs_the_report_alone(tmp_path, capsys, name):
    """A note, or a row glued to the one before by an editor: it is said, and the report before stays."""
    (tmp_path / "report.html").write_text("the one before")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / name).write_text("# a note\n")
    act.write_report(tmp_path)
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / name}:1: invalid JSON") and said.endswith("; report.html stays as it was\n")
    assert (tmp_path / "report.html").read_text() == "the one before"


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """run(out, key=value, ...): a short run of tiny.json into a folder of that name, which it returns."""
    folder = tmp_path_factory.mktemp("runs")
    for name, count in (("train", 4), ("validation", 1)):
        lines = (ROOT / "configs" / "tiny" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))

    def run(out, *flags, task="act", **training):
        words = ["--config", str(ROOT / "configs" / "tiny.json"), "--task", task, *flags]
        for name in ("train", "validation"):
            words += [f"--data_config.{name}_path", str(folder / f"{name}.jsonl")]
        training = {"output_dir": folder / out, "max_steps": 2, "per_device_train_batch_size": 12, "temperature": 2.0, **training}
        for key, value in training.items():
            words += [f"--training_config.{key}", str(value)]
        assert act.main(words) == 0
        return folder / out

    return run


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def run_of_act(runs):
    return runs("act")


def test_a_run_leaves_a_report_with_all_it_did(run_of_act):
    held = data_of(run_of_act)
    assert held["config"] == json.loads((run_of_act / "config.json").read_text())
    assert held["eval_metrics"] == json.loads((run_of_act / "eval_metrics.json").read_text())
    for name in ("metrics", "eval_samples", "rollouts"):
        assert held[name] == rows_of(run_of_act / f"{name}.jsonl")
    assert {row["step"] for row in held["eval_samples"]} == {0, 2}
    shown = set(re.findall(r"\b(\w+): \"var\(--c\d\)\"", TEMPLATE))
    assert shown == set(act.OUTCOMES), "every outcome has a colour"
    shown = re.search(r"const ROWS = (.*?)\];\n", TEMPLATE, re.DOTALL)[1]
    assert set(act.SHOWN) <= set(re.findall(r'\["([^"]+)"', shown)) <= set(held["eval_metrics"]), "and every metric its name"


def test_rollouts_are_what_the_outcomes_of_each_step_count(run_of_act):
    rows = rows_of(run_of_act / "rollouts.jsonl")
    assert [row["step"] for row in rows] == [step for step in (1, 2) for _ in range(12)]
    for metrics in rows_of(run_of_act / "metrics.jsonl"):
        if "loss" in metrics:
            found = Counter(row["outcome"] for row in rows if row["step"] == metrics["step"])
            assert found == Counter({name: metrics[f"act/{name}"] for name in act.OUTCOMES if metrics[f"act/{name}"]})
    assert len({row["outcome"] for row in rows}) > 2
    sides = {act.GOOD_OUTCOME: "chosen", act.SAME_TEXT: None, act.HELPER_FAILED: None}
    for row in rows:
        assert row["replaced"] == sides.get(row["outcome"], "rejected")
        said = row["trajectory"]
        assert [role for role, _ in said] == ["model", "user"] * (len(said) // 2) + ["model"]
        answers = row["outcome"] in (act.GOOD_OUTCOME, act.BAD_OUTCOME)
        assert row["score"] == (data.drop_f1(said[-1][1], row["target"])[1] if answers else None)
        assert row["outcome"] != act.GOOD_OUTCOME or row["score"] > 0.9


def test_a_question_that_wins_as_it_is_has_no_score(runs):
    rows = rows_of(runs("alone", simulate_user="false") / "rollouts.jsonl")
    asked = [row for row in rows if row["outcome"] == act.GOOD_OUTCOME and row["action"] == data.CLARIFY]
    assert asked and all(row["score"] is None and len(row["trajectory"]) == 1 for row in asked)
    assert all(row["score"] > 0.9 for row in rows if row["outcome"] == act.GOOD_OUTCOME and row["action"] == data.ANSWER)


def test_a_resumed_run_keeps_the_rollouts_up_to_its_checkpoint(runs, run_of_act):
    options = {"save_steps": 1, "save_total_limit": 0}
    folder = runs("resumed", **options)
    whole = (folder / "rollouts.jsonl").read_bytes()
    times = (folder / "checkpoints" / "step-1").stat().st_mtime_ns
    with open(folder / "rollouts.jsonl", "a") as file:
        file.write('{"step": 3, "wh')
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step-2")
    (folder / "report.html").unlink()
    runs("resumed", "--resume", **options)
    assert (folder / "rollouts.jsonl").read_bytes() == whole
    assert len(data_of(folder)["rollouts"]) == 24
    assert (folder / "checkpoints" / "step-1").stat().st_mtime_ns == times, "it went on from there"


def test_a_run_that_starts_anew_or_samples_nothing_leaves_no_rollouts(runs):
    folder = runs("anew", sample_frequency=2)
    assert {row["step"] for row in rows_of(folder / "rollouts.jsonl")} == {2}
    runs("anew", "--overwrite", task="dpo", max_steps=1)
    assert not (folder / "rollouts.jsonl").exists() and data_of(folder)["rollouts"] == []


def test_an_evaluation_leaves_a_report(runs):
    folder = runs("evaluated", task="evaluate")
    held = data_of(folder)
    assert held["eval_metrics"]["Accuracy"] is not None and held["eval_samples"] and held["metrics"] == []
