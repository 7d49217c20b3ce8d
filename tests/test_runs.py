"""Whole runs of act.py: what they leave, going on bit for bit, ranks, output directories, and what is refused."""

import ctypes
import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from common import (
    ROOT,
    TINY,
    assert_nearly_same_weights,
    assert_same_rows,
    assert_same_weights,
    environment,
    error_of,
    metrics_of,
    pairs_of,
    rows_of,
    run,
    run_config,
    run_on_ranks,
    run_program,
    training_rows,
    weights_of,
    write_lines,
)
from safetensors.torch import load_file, save_file

import act
import data
import gemma
from act import load_config
from gemma import Gemma, GemmaConfig, generate


@pytest.fixture(scope="module")
def act_run(world, tmp_path_factory):
    """`python act.py --config FILE` as a user starts it: (folder, exit status, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("act_run")
    return folder, *run_program(ROOT / "act.py", "--config", run_config(world, folder))


METRICS = {
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "grad_norm", "learning_rate", "tokens", "seconds/rollout", "seconds/train",
}  # fmt: skip
PUBLISHED = [
    "Accuracy", "Weighted F1", "Macro F1", "Binary F1", "Binary Recall", "Binary Precision", "Turn-Level DROP F1",
    "Trajectory-level DROP F1", "Post-Clarification DROP F1", "Turn-Level Exact Match", "Trajectory-level Exact Match",
    "Post-Clarification Exact Match", "Questions per Turn", "Turn-Level Turns", "Trajectory-level Turns",
    "Post-Clarification Turns",
]  # fmt: skip
DEFAULTS = act.TrainingConfig()
OUTCOMES = ("wrong_action", "good_outcome", "bad_outcome", "no_answer", "cut_off", "same_text", "helper_failed")
EVALUATION_FILES = {"eval_metrics.json", "eval_samples.jsonl", "report.html"}
MODEL_FILES = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json",
    "trainer_state.json", "chat_template.jinja",
}  # fmt: skip


def names_in(folder):
    return {path.name for path in folder.iterdir()} - {".lock"}


def files_of(folder):
    """{path: bytes} of all files in a folder but its lock."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_an_act_run_leaves_its_files(act_run):
    folder, status, stdout, stderr = act_run
    assert (status, stderr) == (0, ""), stderr
    out = folder / "out"
    assert names_in(out) == {"config.json", "metrics.jsonl", "rollouts.jsonl", *EVALUATION_FILES, "model"}
    assert names_in(out / "model") == MODEL_FILES
    for name in ("config.json", "generation_config.json"):  # whose readers stop where a reply of format "plain" ends
        assert json.loads((out / "model" / name).read_text())["eos_token_id"] == [1, 6]
    assert load_config(out / "config.json") == load_config(folder / "run.json")
    assert "step 0 to 2" in stdout and str(out / "model") in stdout and "Trajectory-level Exact Match" in stdout


def test_metrics_of_an_act_run(world, act_run):
    folder, validation = act_run[0], pairs_of(world / "validation.jsonl")
    before, *steps, after = rows_of(folder / "out" / "metrics.jsonl")
    assert [row["step"] for row in (before, *steps, after)] == [0, 1, 2, 2]
    outcomes = {f"act/{outcome}" for outcome in OUTCOMES}
    assert all(row.keys() == {"step"} | METRICS | outcomes for row in steps)
    assert all(sum(row[key] for key in outcomes) == 3 for row in steps), "one outcome an example"
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[1]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert [row["learning_rate"] for row in steps] == pytest.approx([1e-3, 5e-4])
    assert all(f"eval/{name}" in row for name in PUBLISHED for row in (before, after))
    assert before["eval/Trajectory-level Turns"] == len(validation)
    assert json.loads((folder / "out" / "eval_metrics.json").read_text()) == {
        key.removeprefix("eval/"): value for key, value in after.items() if key != "step"
    }


def test_evaluated_samples_hold_messages(world, act_run):
    samples, validation = rows_of(act_run[0] / "out" / "eval_samples.jsonl"), pairs_of(world / "validation.jsonl")
    assert [sample["step"] for sample in samples] == [0] * len(validation) + [2] * len(validation)
    for sample, pair in zip(samples, 2 * validation, strict=True):
        assert (sample["where"], sample["context"], sample["gold_target"]) == (pair.where, pair.context, pair.target)
        for key, messages in (("history", pair.history), ("gold", pair.gold)):
            assert sample[key] == [list(message) for message in messages]
        roles = [role for role, _ in sample["trajectory"]]
        assert roles == ["model", "user", "model"][: len(roles)] and len(roles) in (1, 3)
        assert all(type(text) is str for _, text in sample["trajectory"])
        if sample["final_answer"] is not None:
            assert sample["trajectory"][-1] == ["model", sample["final_answer"]]


def test_the_saved_model_loads_and_generates(world, act_run, tokenizer):
    trained = Gemma.from_pretrained(act_run[0] / "out" / "model")
    start = weights_of(world / "model")
    assert all((weight - start[name]).abs().max() > 1e-4 for name, weight in trained.named_parameters())
    assert len(generate(trained, [tokenizer.encode("User: rome.", bos=True)], 3, temperature=0)[0]) == 3


def test_training_is_a_function_to_call_from_python(world, act_run, tmp_path):
    """After load_config, without a command line; and once more in the same process."""
    config = load_config(run_config(world, tmp_path))
    before = signal.getsignal(signal.SIGINT)
    act.train(config)
    assert not dist.is_initialized() and not act.LOCK and signal.getsignal(signal.SIGINT) is before
    other = replace(config.training_config, output_dir=str(tmp_path / "again" / "out"))
    act.train(replace(config, training_config=other))
    assert metrics_of(tmp_path) == metrics_of(tmp_path / "again") == metrics_of(act_run[0])
    assert_same_weights(tmp_path / "out" / "model", act_run[0] / "out" / "model")


def test_overwrite_gives_the_same_run_again(world, act_run, tmp_path):
    config = run_config(world, tmp_path)
    (tmp_path / "out" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text(json.dumps(asdict(load_config(config))))
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 9}\n')
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert run("--config", config, "--overwrite") == 0
    assert metrics_of(tmp_path) == metrics_of(act_run[0])
    assert names_in(tmp_path / "out" / "checkpoints") == set()
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine", "what no run writes stays"


# ----------------------------------------------------------------------------------------------------------------------
# Tasks and keys


def test_a_dpo_run_samples_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setattr(act, "on_policy", lambda *_: pytest.fail("sampled on policy"))
    epoch = {"num_train_epochs": 1.0, "max_steps": -1, "per_device_train_batch_size": 8}
    assert run("--config", run_config(world, tmp_path, "dpo", evaluated=False, **epoch)) == 0
    rows, turns = rows_of(tmp_path / "out" / "metrics.jsonl"), len(pairs_of(world / "train.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, math.ceil(turns / 8) + 1))
    assert all(row.keys() == {"step"} | METRICS for row in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[-1]["rewards/margins"] > 0
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_without_simulation_no_user_is_simulated(world, tmp_path):
    """`simulate_user` reaches the sampling: a question where one is called for wins, an answer is judged."""
    options = {"simulate_user": False, "per_device_train_batch_size": 16, "max_new_tokens": 12}
    assert run("--config", run_config(world, tmp_path, evaluated=False, **options)) == 0
    rows = training_rows(tmp_path)
    assert all(sum(row[f"act/{outcome}"] for outcome in OUTCOMES) == 16 and row["act/no_answer"] == 0 for row in rows)
    assert sum(row["act/good_outcome"] for row in rows) > 0
    said = [row["trajectory"] for row in rows_of(tmp_path / "out" / "rollouts.jsonl")]
    assert len(said) == 32 and all([role for role, _ in trajectory] == ["model"] for trajectory in said)


def test_labels_of_the_training_file_can_be_ignored(world, tmp_path, capsys):
    assert run("--config", run_config(world, tmp_path, evaluated=True, action_labels="classifier", max_steps=1)) == 0
    said, turns = capsys.readouterr().out, len(pairs_of(world / "train.jsonl"))
    assert f"{world / 'train.jsonl'}: the action classifier labelled {turns} turns" in said
    assert "validation.jsonl: the action classifier" not in said


def test_a_run_in_the_chat_format(world, tmp_path):
    config = run_config(world, tmp_path, max_turns=3)
    assert run("--config", config, "--data_config.prompt_format", "gemma") == 0
    first, second = training_rows(tmp_path)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and second["loss"] != first["loss"]
    samples = rows_of(tmp_path / "out" / "eval_samples.jsonl")
    assert all(sample["trajectory"][0][0] == "model" for sample in samples)


def test_line_breaks_that_the_plain_format_folds_are_counted(world, tmp_path, capsys):
    rows = [
        {"role": "user", "content": "one\ntwo", "requires_clarification": False},
        {"role": "model", "content": "get tax"},
        {"role": "user", "content": "three\n", "requires_clarification": False},
        {"role": "model", "content": "a\n\nb"},
    ]
    lines = write_lines(tmp_path / "lines.jsonl", [{"messages": rows}])
    config = run_config(world, tmp_path, "sft", evaluated=False, max_steps=1, per_device_train_batch_size=1)
    for prompt_format, said in (("plain", True), ("gemma", False)):
        options = ["--data_config.train_path", lines, "--data_config.prompt_format", prompt_format, "--overwrite"]
        assert run("--config", config, *options) == 0
        line = f"{lines}: 2 turns have line breaks, which format 'plain' makes spaces: line.turn 1.1, 1.2\n"
        assert (line in capsys.readouterr().out) == said


def test_an_sft_run_lowers_the_loss(world, tmp_path):
    config = run_config(world, tmp_path, "sft", evaluated=False, max_steps=16, optim="adamw", learning_rate=1e-2)
    assert run("--config", config) == 0
    rows = training_rows(tmp_path)
    assert all(row.keys() == {"step", "loss", "grad_norm", "learning_rate", "tokens"} for row in rows)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


def test_an_act_run_samples_at_every_nth_step(world, tmp_path):
    assert run("--config", run_config(world, tmp_path, evaluated=False, max_steps=4, sample_frequency=2)) == 0
    assert ["act/no_answer" in row for row in training_rows(tmp_path)] == [False, True, False, True]


def test_steps_between_are_evaluated_and_logged_as_asked(world, tmp_path):
    assert run("--config", run_config(world, tmp_path, "dpo", max_steps=5, eval_steps=2, logging_steps=3)) == 0
    rows = metrics_of(tmp_path)
    assert [row["step"] for row in rows if "eval/Accuracy" in row] == [0, 2, 4, 5]
    assert [row["step"] for row in rows if "loss" in row] == [3, 5]
    assert {sample["step"] for sample in rows_of(tmp_path / "out" / "eval_samples.jsonl")} == {0, 5}


def test_gradient_accumulation_and_checkpointing_change_no_result(world, act_run, tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "gradient_checkpointing": True}
    assert run("--config", run_config(world, tmp_path, evaluated=False, **options)) == 0
    for found, expected in zip(training_rows(tmp_path), training_rows(act_run[0]), strict=True):
        del found["tokens"], expected["tokens"]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_bfloat16_run_is_close(world, tmp_path):
    assert run("--config", run_config(world, tmp_path, "dpo", evaluated=False)) == 0
    changed = ["--training_config.bf16", "true", "--training_config.output_dir", tmp_path / "bf16" / "out"]
    assert run("--config", tmp_path / "run.json", *changed) == 0
    for exact, rough in zip(training_rows(tmp_path), training_rows(tmp_path / "bf16"), strict=True):
        assert rough["logps/chosen"] == pytest.approx(exact["logps/chosen"], rel=0.02)
        assert rough["logps/chosen"] != exact["logps/chosen"]
        # RMSprop's first step turns rounding into steps of equal size
        assert rough["loss"] == pytest.approx(exact["loss"], abs=0.2)
    assert weights_of(tmp_path / "bf16" / "out" / "model")["norm.weight"].dtype == torch.float32


def test_an_evaluation_alone_equals_that_of_the_run(world, act_run, tmp_path, capsys):
    config = run_config(world, tmp_path, "evaluate")
    trained = ["--policy_model_config.model_path", act_run[0] / "out" / "model", "--data_config.train_path", ""]
    assert run("--config", config, *trained) == 0
    found = json.loads((tmp_path / "out" / "eval_metrics.json").read_text())
    assert found == json.loads((act_run[0] / "out" / "eval_metrics.json").read_text())
    assert names_in(tmp_path / "out") == {"config.json", *EVALUATION_FILES}
    last = [row for row in rows_of(act_run[0] / "out" / "eval_samples.jsonl") if row.pop("step") == 2]
    assert rows_of(tmp_path / "out" / "eval_samples.jsonl") == last
    shown = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-len(found) :])
    assert shown["Accuracy"] == f"{100 * found['Accuracy']:.1f}" and shown["Questions per Turn"] == f"{found['Questions per Turn']:.2f}"


def test_evaluate_and_pairs_from_python_and_what_they_return(world, act_run, tmp_path):
    config = load_config(run_config(world, tmp_path, "evaluate"), {"policy_model_config.model_path": str(act_run[0] / "out" / "model")})
    assert act.evaluate(config) == json.loads((act_run[0] / "out" / "eval_metrics.json").read_text())
    assert not dist.is_initialized() and not act.LOCK


@pytest.mark.parametrize(("function", "task"), [
    ("evaluate", "act"), ("check", "sft"), ("generate_preference", "evaluate"), ("train", "evaluate"), ("train", "check"),
])  # fmt: skip
def test_a_function_does_its_own_tasks_only(world, tmp_path, function, task):
    """An evaluation that took itself for a training run would remove that run's model."""
    config = load_config(run_config(world, tmp_path, task))
    with pytest.raises(data.InputError, match=rf"task is '{task}', expected one of .* for {function}\(\)"):
        getattr(act, function)(config)
    assert not (tmp_path / "out").exists()


def test_a_question_that_the_rule_does_not_know_is_run_as_no_query(world, tmp_path):
    """Of files of pairs that do not say the action."""
    chosen = ["Tell me which rows.", "All.", "SELECT a FROM t"]
    roles = "assistant", "user", "assistant"
    row = {"system": "CREATE TABLE t (a);", "prompt": "rows", "rejected": "SELECT 1",
           "chosen": [{"role": role, "content": text} for role, text in zip(roles, chosen, strict=True)]}  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    words = ["--validation_path", tmp_path / "pairs.jsonl", "--is_preference", True, "--heuristic", "execution_match"]
    assert run("--config", run_config(world, tmp_path, "evaluate"), *words) == 0


def test_a_run_that_stops_leaves_a_report_up_to_there(world, tmp_path, monkeypatch):
    step = act.clip_and_step
    monkeypatch.setattr(act, "clip_and_step", lambda *given: act.ASKED.append(signal.SIGTERM) or step(*given))
    assert run("--config", run_config(world, tmp_path, "dpo", evaluated=False)) == 1
    logged = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert logged and json.dumps(logged[-1]["loss"]) in (tmp_path / "out" / "report.html").read_text()


def test_what_a_step_held_is_let_go_before_the_save_that_follows_its_running_out_of_memory(world, tmp_path, monkeypatch):
    held, alive, save = [], [], act.save_checkpoint

    def runs_out(*_):
        activations = torch.zeros(1)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(act, "preference_step", runs_out)
    monkeypatch.setattr(act, "save_checkpoint", lambda *given: alive.append(held[0]() is not None) or save(*given))
    assert run("--config", run_config(world, tmp_path, "dpo", evaluated=False)) == 1
    assert alive == [False]


def test_a_metric_bears_the_name_of_its_heuristic(world, tmp_path, capsys):
    """As it is printed; in the files the published names stay."""
    words = ["--heuristic", "exact_match", "--training_config.output_dir", tmp_path / "out"]
    assert run("--config", run_config(world, tmp_path, "evaluate"), *words) == 0
    said = capsys.readouterr().out
    assert "Trajectory-level exact_match " in said and "DROP F1" not in said
    assert "Trajectory-level DROP F1" in json.loads((tmp_path / "out" / "eval_metrics.json").read_text())


def test_turns_that_end_in_a_cut_reply_are_counted(world, tmp_path, capsys):
    assert run("--config", run_config(world, tmp_path, "evaluate", max_new_tokens=1)) == 0
    unended = sum(not row["ended"] for row in rows_of(tmp_path / "out" / "eval_samples.jsonl"))
    assert unended and f"\n{unended} of 5 turns end in a reply that is cut at max_new_tokens\n" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Keys of the redesign


def test_the_check_says_what_becomes_of_the_data_and_writes_nothing(world, tmp_path, capsys):
    rows = [{"messages": [*data.exchange("How many?", "5"), {"role": "user", "content": "And now?"}]}]
    path = write_lines(tmp_path / "open.jsonl", rows)
    before = {name: name.stat().st_mtime_ns for name in tmp_path.rglob("*")}
    config = run_config(world, tmp_path, "check")
    assert run("--config", config, "--train_path", path) == 0
    said = capsys.readouterr().out
    assert f"{path}: 1 user turns are skipped, no answer follows: line.turn 1.2\n" in said
    assert "\ntraining: 1 turns, 1 ANSWER and 0 CLARIFY\nvalidation: 5 turns, 3 ANSWER and 2 CLARIFY, which are " in said
    assert not (tmp_path / "out").exists() and before.keys() | {tmp_path / "run.json"} == set(tmp_path.rglob("*"))
    assert run("--config", config, "--train_path", path, "--policy_model_config.model_path", "") == 0, "no model is needed"
    assert run("--config", config, "--overwrite") == 2
    assert "--overwrite: task 'check' has nothing to overwrite" in capsys.readouterr().err


def test_lines_about_held_out_conversations_say_so(world, tmp_path, capsys):
    """Both parts of a file that is split are checked under its name."""
    open_end = {"messages": [*data.exchange("How many?", "5"), {"role": "user", "content": "And now?"}]}
    path = write_lines(tmp_path / "open.jsonl", [open_end] * 4)
    words = ["--train_path", path, "--data_config.validation_path", "", "--validation_split", "0.5"]
    assert run("--config", run_config(world, tmp_path, "check"), *words) == 0
    said = capsys.readouterr().out
    assert said.count(f"{path}: 2 user turns are skipped") == said.count(f"{path} (held out): 2 user turns are skipped") == 1


def trained_on(world, tmp_path, half, *words):
    """Lines of the file whose turns a run of some epochs was trained on."""
    options = {"num_train_epochs": 1.0, "max_steps": -1, "per_device_train_batch_size": 4, "evaluated": False}
    config = run_config(world, tmp_path / (half or "both"), **options)
    assert run("--config", config, "--half", half, *words) == 0
    return {row["where"] for row in rows_of(tmp_path / (half or "both") / "out" / "rollouts.jsonl")}


def test_a_run_can_be_trained_on_half_of_the_conversations(world, tmp_path, capsys):
    """SFT on the first, ACT on the second: contrasts on what SFT knows by heart teach nothing."""
    lines = [f"{world / 'train.jsonl'}:{i}" for i in (1, 2, 3)]
    assert trained_on(world, tmp_path, "first") == {lines[0], lines[2]}
    assert f"{world / 'train.jsonl'}: of these the first half is trained on, 2\n" in capsys.readouterr().out
    assert trained_on(world, tmp_path, "second") == {lines[1]}


def test_the_prompt_format_is_that_of_the_checkpoint(world, tmp_path, capsys):
    """Unless it is set; a resumed run keeps what it had."""
    for chat, name in ((True, "gemma"), (False, "plain")):
        model = tmp_path / name
        shutil.copytree(world / "model", model)
        if chat:
            (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "<start_of_turn>"}))
        config = run_config(world, tmp_path / f"run_{name}", "sft", evaluated=False, max_steps=1)
        assert run("--config", config, "--policy_model_config.model_path", model) == 0
        assert f"{model}: its files speak for prompt_format '{name}'\n" in capsys.readouterr().out
        assert run("--config", config, "--policy_model_config.model_path", model, "--overwrite", "--prompt_format", "plain") == 0
        assert "speak for prompt_format" not in capsys.readouterr().out


def test_what_is_trained_is_float32_whatever_the_type_of_the_frozen(world, tmp_path, monkeypatch):
    """bfloat16 parameters at a small learning rate hardly move; the reference may be rounded."""
    built, inner = {}, act.build_model

    def watched(config, mesh, trained=True):
        built[trained] = inner(config, mesh, trained)
        return built[trained]

    monkeypatch.setattr(act, "build_model", watched)
    options = {"evaluated": False, "learning_rate": 1e-6, "optim": "adamw"}
    assert run("--config", run_config(world, tmp_path, "dpo", **options), "--policy_model_config.dtype", "bfloat16") == 0
    types = {name: {p.dtype for p in model.parameters() if p.ndim > 1} for name, model in built.items()}
    assert types == {True: {torch.float32}, False: {torch.bfloat16}}
    start = weights_of(world / "model")
    for name, weight in weights_of(tmp_path / "out" / "model").items():
        assert weight.dtype == torch.float32 and (weight != start[name]).float().mean() > 0.5, name


def test_ranks_share_one_number_a_phase_of_a_step(world, tmp_path, monkeypatch):
    """With the sums goes whether anybody wants to stop; objects are shared only where all sample."""
    shared = []
    for name in ("all_reduce", "all_gather_object"):
        inner = getattr(dist, name)
        monkeypatch.setattr(dist, name, lambda *a, inner=inner, name=name, **k: shared.append(name) or inner(*a, **k))
    for name in ("preference_step", "on_policy"):
        inner = getattr(act, name)
        monkeypatch.setattr(act, name, lambda *a, inner=inner, name=name: shared.append(name) or inner(*a))
    config = run_config(world, tmp_path, evaluated=False, max_steps=3, sample_frequency=2)
    assert run("--config", config) == 0
    start = shared.index("preference_step")
    assert shared[start : start + 8] == [
        "preference_step", "all_reduce",
        "on_policy", "all_gather_object", "preference_step", "all_reduce",
        "preference_step", "all_reduce",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Files of pairs


@pytest.fixture(scope="module")
def generated(world, tmp_path_factory):
    """The output directory of a run that writes pairs; no model is needed for it."""
    folder = tmp_path_factory.mktemp("generated")
    config = run_config(world, folder, "generate_preference")
    assert run("--config", config, "--policy_model_config.model_path", "") == 0
    return folder / "out"


def test_pairs_are_written_in_three_forms(world, generated):
    names = {f"{name}{end}" for name in ("train", "validation") for end in (".jsonl", ".vertex.jsonl", ".trl.jsonl")}
    assert names_in(generated) == {"config.json", *names}
    for name in ("train", "validation"):
        pairs = pairs_of(world / f"{name}.jsonl", DEFAULTS.icl_examples, DEFAULTS.seed)
        records = rows_of(generated / f"{name}.jsonl")
        assert records == [data.make_record(pair) for pair in pairs]
        for form in ("vertex", "trl"):
            rows = rows_of(generated / f"{name}.{form}.jsonl")
            assert rows == [data.PREFERENCE_FORMS[form](pair) for pair in pairs]


@pytest.fixture(scope="module")
def from_conversations(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("from_conversations")
    assert run("--config", run_config(world, folder, "dpo")) == 0
    return metrics_of(folder)


@pytest.mark.parametrize("ending", [".jsonl", ".trl.jsonl"])
def test_generated_pairs_train_and_evaluate_as_the_conversations_do(
    world, generated, from_conversations, tmp_path, ending
):
    config = run_config(world, tmp_path, "dpo", is_preference=True)
    train, validation = (generated / f"{name}{ending}" for name in ("train", "validation"))
    assert run("--config", config, "--data_config.train_path", train, "--data_config.validation_path", validation) == 0
    assert metrics_of(tmp_path) == from_conversations


def test_generated_pairs_in_vertex_form_train_as_their_first_replies_do(world, generated, tmp_path):
    pairs = pairs_of(world / "train.jsonl", DEFAULTS.icl_examples, DEFAULTS.seed)
    assert max(len(pair.chosen) for pair in pairs) > 1
    first = [replace(pair, chosen=pair.chosen[:1], rejected=pair.rejected[:1]) for pair in pairs]
    data.write_preferences(tmp_path / "first.jsonl", first, "records")
    files = {"vertex": generated / "train.vertex.jsonl", "first": tmp_path / "first.jsonl"}
    for name, path in files.items():
        config = run_config(world, tmp_path / name, "dpo", evaluated=False, is_preference=True)
        assert run("--config", config, "--data_config.train_path", path) == 0
    assert metrics_of(tmp_path / "vertex") == metrics_of(tmp_path / "first")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints, and going on


def test_old_checkpoints_go(world, tmp_path):
    config = run_config(world, tmp_path, "sft", evaluated=False, max_steps=4, save_steps=1)

    def steps(*words):
        assert run("--config", config, *words) == 0
        return names_in(tmp_path / "out" / "checkpoints")

    assert steps() == {"step-4"}, "the last step too: a finished run can be extended"
    assert steps("--overwrite", "--save_total_limit", 2) == {"step-3", "step-4"}
    assert steps("--overwrite", "--save_total_limit", 0, "--save_steps", 3) == {"step-3", "step-4"}


def kill_in_the_fourth_step():
    """When step 3 is in the log and step 2 in a checkpoint."""
    step, calls = act.clip_and_step, []

    def killed(*args):
        calls.append(1)
        return step(*args) if len(calls) < 4 else os.kill(os.getpid(), 9)

    act.clip_and_step = killed


@pytest.fixture(scope="module")
def killed_run(world, tmp_path_factory):
    """(folder of an undisturbed run of 5 steps, folder of one killed in its 4th step)."""
    folder = tmp_path_factory.mktemp("killed_run")
    options = {"max_steps": 5, "save_steps": 2, "optim": "adamw", "warmup_steps": 1, "eval_steps": 3}
    assert run("--config", run_config(world, folder / "whole", **options)) == 0
    config = run_config(world, folder / "killed", **options)
    assert run_on_ranks(1, folder, "--config", config, patch=kill_in_the_fourth_step)[0] == [-9]
    assert names_in(folder / "killed" / "out" / "checkpoints") == {"step-2"}
    assert [row["step"] for row in metrics_of(folder / "killed")] == [0, 1, 2, 3, 3]
    return folder / "whole", folder / "killed"


def copy_of(folder, tmp_path, new_config=None):
    """A copy of a run whose config writes to the copy."""
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "run.json").read_text())
    config["training_config"]["output_dir"] = str(tmp_path / "copy" / "out")
    (tmp_path / "copy" / "run.json").write_text(json.dumps({**config, **(new_config or {})}))
    return tmp_path / "copy"


def assert_resumes_exactly(whole, folder):
    assert run("--config", folder / "run.json", "--resume") == 0
    assert metrics_of(folder) == metrics_of(whole)
    assert_same_weights(folder / "out" / "model", whole / "out" / "model")
    for name in ("eval_metrics.json", "eval_samples.jsonl", "rollouts.jsonl"):
        assert (folder / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
    assert names_in(folder / "out" / "checkpoints") == {"step-5"}
    assert not [name for name in names_in(folder / "out") if name.startswith(".")]


def test_a_killed_run_resumes_bit_for_bit(killed_run, tmp_path):
    whole, killed = killed_run
    assert_resumes_exactly(whole, copy_of(killed, tmp_path))


def test_what_a_killed_run_left_half_written_is_passed_over(killed_run, tmp_path):
    """Half a checkpoint, half a line of metrics, and one that ends within a character."""
    whole, killed = killed_run
    folder = copy_of(killed, tmp_path)
    checkpoints = folder / "out" / "checkpoints"
    shutil.copytree(checkpoints / "step-2", checkpoints / ".act-part")
    (checkpoints / ".act-part" / "optimizer.safetensors").write_bytes(b"half")
    for name in ("out/checkpoints/.act-old", "out/.act-part"):
        (folder / name).mkdir()
        (folder / name / "half").write_bytes(b"half")
    with open(folder / "out" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0.6')
    with open(folder / "out" / "rollouts.jsonl", "ab") as file:
        file.write('{"step": 4, "context": "é'.encode()[:-1])
    act.write_report(folder / "out")
    assert_resumes_exactly(whole, folder)


def test_resume_before_the_first_checkpoint_starts_again(world, act_run, tmp_path):
    config = run_config(world, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps(asdict(load_config(config))))
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 0}\n')
    assert run("--config", config, "--resume") == 0
    assert metrics_of(tmp_path) == metrics_of(act_run[0])


def changed_state(folder, change):
    """Let the checkpoint of a killed run be that of a version whose keys were others."""
    path = folder / "out" / "checkpoints" / "step-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


def test_a_run_from_before_a_key_existed_had_its_default(killed_run, tmp_path, capsys):
    folder = copy_of(killed_run[1], tmp_path)
    changed_state(folder, lambda state: state.pop("training_config.simulate_user"))
    said = error_of(capsys, "--config", folder / "run.json", "--resume", "--simulate_user", "false")
    assert "--resume: training_config.simulate_user is False, expected True as in" in said
    assert_resumes_exactly(killed_run[0], folder)


def test_a_checkpoint_that_is_passed_over_is_said(killed_run, tmp_path, capsys):
    folder = copy_of(killed_run[1], tmp_path)
    newer = folder / "out" / "checkpoints" / "step-3"
    newer.mkdir()
    assert run("--config", folder / "run.json", "--resume") == 0
    assert f"{newer}: passed over, it has no trainer_state.json" in capsys.readouterr().out.splitlines()
    assert metrics_of(folder) == metrics_of(killed_run[0])


@pytest.mark.parametrize("key", ["training_config.judge", "data_config.colour", "shape"])
def test_a_run_with_a_key_that_this_version_lacks_is_not_resumed(killed_run, tmp_path, capsys, key):
    folder = copy_of(killed_run[1], tmp_path)
    changed_state(folder, lambda state: state.update({key: "x"}))
    found = error_of(capsys, "--config", folder / "run.json", "--resume")
    assert f"--resume: {key} is None, expected x as in {folder}" in found
    assert names_in(folder / "out" / "checkpoints") == {"step-2"}


def test_resuming_with_what_would_learn_otherwise_is_refused(killed_run, tmp_path, capsys):
    folder = copy_of(killed_run[1], tmp_path)
    for key, value, said in (
        ("training_config.beta", 0.25, "training_config.beta is 0.25, expected 0.5 as in"),
        ("data_config.prompt_format", "gemma", "data_config.prompt_format is gemma, expected auto as in"),
        ("training_config.gradient_accumulation_steps", 2, "examples_per_step is 6, expected 3 as in"),
        ("task", "dpo", "holds a run of task 'act', expected another output_dir"),
    ):
        assert said in error_of(capsys, "--config", folder / "run.json", "--resume", f"--{key}", value)
    assert [row["step"] for row in metrics_of(folder)] == [0, 1, 2, 3, 3], "untouched"


def test_a_finished_run_has_nothing_to_resume(killed_run, act_run, tmp_path, capsys):
    whole = copy_of(killed_run[0], tmp_path)
    assert run("--config", whole / "run.json", "--resume") == 0
    assert "this run is finished, nothing to resume" in capsys.readouterr().out
    assert metrics_of(whole) == metrics_of(killed_run[0])


def test_a_finished_run_without_a_checkpoint_is_not_started_over_by_resume(act_run, tmp_path, capsys):
    folder = copy_of(act_run[0], tmp_path)
    said = error_of(capsys, "--config", folder / "run.json", "--resume", "--training_config.max_steps", "9")
    assert "holds a model but no checkpoint" in said
    assert_same_weights(folder / "out" / "model", act_run[0] / "out" / "model")


def finished_run(world, tmp_path):
    """(config file, bytes of its model) of a run of 3 steps that ended."""
    config = run_config(world, tmp_path, "sft", evaluated=False, max_steps=3, save_steps=2)
    assert run("--config", config) == 0
    assert names_in(tmp_path / "out" / "checkpoints") == {"step-3"}
    return config, (tmp_path / "out" / "model" / "model.safetensors").read_bytes()


def test_a_finished_run_is_extended_from_its_last_step(world, tmp_path, capsys):
    config, old = finished_run(world, tmp_path)
    assert run("--config", config, "--resume", "--max_steps", 5) == 0
    jump = "--resume: 3 steps were planned; the learning rate jumps to that of step 3 of 5\n"
    assert jump in capsys.readouterr().out
    rows = training_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and rows[3]["learning_rate"] == pytest.approx(1e-3 * act.learning_rate(3, 5, DEFAULTS) / DEFAULTS.learning_rate)
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() != old
    assert names_in(tmp_path / "out" / "checkpoints") == {"step-5"}


def test_a_model_stays_until_that_of_the_extended_run_is_complete(world, tmp_path, monkeypatch):
    """Whenever that is killed; and it is not taken for finished."""
    config, old = finished_run(world, tmp_path)
    model = tmp_path / "out" / "model" / "model.safetensors"
    last = act.take_place

    def killed(*arguments):
        if arguments[2].name == "model":
            assert model.read_bytes() == old, "even while the new one is written"
            raise KeyboardInterrupt
        return last(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(act, "save_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("--config", config, "--resume", "--max_steps", 6) == 130
    assert model.read_bytes() == old
    with monkeypatch.context() as patch:
        patch.setattr(act, "take_place", killed)
        assert run("--config", config, "--resume", "--max_steps", 6) == 130
    assert model.read_bytes() == old
    assert run("--config", config, "--resume", "--max_steps", 6) == 0
    assert [row["step"] for row in training_rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert model.read_bytes() != old and not [name for name in names_in(tmp_path / "out") if name.endswith(("part", "old"))]


def test_fewer_steps_than_are_done_are_refused_before_anything_is_touched(world, tmp_path, capsys):
    config, _ = finished_run(world, tmp_path)
    before = files_of(tmp_path / "out")
    said = error_of(capsys, "--config", config, "--resume", "--max_steps", 2)
    assert f"{tmp_path / 'out' / 'checkpoints' / 'step-3'} is beyond the 2 steps of this run" in said
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    assert "holds a model but no checkpoint" in error_of(capsys, "--config", config, "--resume", "--max_steps", 2)
    assert files_of(tmp_path / "out").items() <= before.items()


# ----------------------------------------------------------------------------------------------------------------------
# Output directories: what a run must not do to what is there


def test_a_second_run_needs_a_flag(act_run, capsys):
    folder = act_run[0]
    found = error_of(capsys, "--config", folder / "run.json")
    assert found.startswith(f"act.py: error: {folder / 'out'}: already holds a run, expected --resume")


@pytest.mark.parametrize("task", ["evaluate", "generate_preference"])
def test_evaluation_and_pairs_replace_what_they_left_before(world, tmp_path, task):
    """Without a flag; files of a split that is no longer written go, others stay."""
    config = run_config(world, tmp_path, task)
    assert run("--config", config) == 0
    first = files_of(tmp_path / "out")
    for path in first:
        if path.name != "config.json":
            path.write_text("of an earlier run\n")
    notes = tmp_path / "out" / "notes.txt"
    notes.write_text("mine")
    assert run("--config", config) == 0
    assert files_of(tmp_path / "out") == {**first, notes: b"mine"}
    if task == "generate_preference":
        assert run("--config", config, "--data_config.validation_path", "") == 0
        assert not [name for name in names_in(tmp_path / "out") if name.startswith("validation")]


def test_an_evaluation_that_fails_leaves_the_last_one(world, tmp_path, monkeypatch):
    config = run_config(world, tmp_path, "evaluate")
    assert run("--config", config) == 0
    first = files_of(tmp_path / "out")

    def fails(*_):
        raise act.RunStopped("a helper is gone")

    monkeypatch.setattr(act, "evaluate_pairs", fails)
    assert run("--config", config) == 1
    assert files_of(tmp_path / "out") == first


@pytest.mark.parametrize("task", ["evaluate", "generate_preference"])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_results_stay_where_the_disk_has_no_room_for_new_ones(world, tmp_path, monkeypatch, capsys, task, written):
    """Whichever file of the new ones finds no room: all are the former ones; and the next call is not in its way."""
    config, write, calls = run_config(world, tmp_path, task), data.write_text, []

    def fills(path, parts):
        calls.append(path)
        return write(path, parts) if len(calls) <= written else full()

    def with_a_full_disk(*words):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(data, "write_text", fills)
            assert "No space left on device" in error_of(capsys, "--config", config, *words)

    with_a_full_disk()
    assert not (tmp_path / "out").exists()
    assert run("--config", config) == 0
    first = files_of(tmp_path / "out")
    changes = ["--training_config.max_new_tokens", 3, "--seed", 9]
    with_a_full_disk(*changes)
    assert files_of(tmp_path / "out") == first
    assert run("--config", config, *changes) == 0
    assert files_of(tmp_path / "out").keys() == first.keys()


@pytest.mark.parametrize("flag", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("task", ["evaluate", "generate_preference"])
def test_a_directory_with_another_tasks_run_is_refused(act_run, generated, tmp_path, capsys, task, flag):
    """Even with --overwrite: the run's model and metrics are not this task's to remove."""
    other = generated.parent if task == "evaluate" else None
    for i, source in enumerate(filter(None, (act_run[0], other))):
        (tmp_path / str(i)).mkdir()
        folder = copy_of(source, tmp_path / str(i))
        before = files_of(folder / "out")
        found = error_of(capsys, "--config", folder / "run.json", "--task", task, *flag)
        held = "act" if source == act_run[0] else "generate_preference"
        assert f"{folder / 'out'}: holds a run of task {held!r}, expected another output_dir" in found
        assert files_of(folder / "out") == before


def test_files_of_nobodys_run_are_not_replaced(world, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval_metrics.json").write_text("mine")
    found = error_of(capsys, "--config", run_config(world, tmp_path, "evaluate"))
    assert "holds eval_metrics.json of no run, expected another output_dir" in found
    assert (tmp_path / "out" / "eval_metrics.json").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_evaluating_a_runs_own_model_does_not_remove_it(act_run, tmp_path, capsys, flag):
    """With the config that trained it, which writes to OUT, and OUT/model as the model to evaluate."""
    folder = copy_of(act_run[0], tmp_path)
    words = ["--task", "evaluate", "--policy_model_config.model_path", folder / "out" / "model", flag]
    error_of(capsys, "--config", folder / "run.json", *words)
    assert_same_weights(folder / "out" / "model", act_run[0] / "out" / "model")


@pytest.mark.parametrize(("task", "name", "source"), [
    ("generate_preference", "train.jsonl", "data_config.train_path"),
    ("act", "metrics.jsonl", "data_config.validation_path"),
    ("sft", "model", "policy_model_config.model_path"),
    ("act", "checkpoints/step-1", "policy_model_config.model_path"),
])  # fmt: skip
def test_a_run_does_not_write_over_what_it_reads(world, tmp_path, capsys, task, name, source):
    config = run_config(world, tmp_path, task)
    at = tmp_path / "out" / name
    at.parent.mkdir(parents=True)
    if source.endswith("model_path"):
        shutil.copytree(world / "model", at)
    else:
        shutil.copyfile(world / "train.jsonl", at)
    found = error_of(capsys, "--config", config, f"--{source}", at, "--overwrite")
    assert f"{source} {at}: this run would write over it" in found
    assert at.exists() and not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("config", ['{"a": 1}', "[]", "{", "of another program", None])
@pytest.mark.parametrize("flag", [[], ["--resume"], ["--overwrite"]], ids=["", "resume", "overwrite"])
def test_a_directory_that_is_no_run_is_nobodys_to_change(world, tmp_path, capsys, config, flag):
    """Whatever its config.json is; not even --overwrite removes what no run wrote."""
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "metrics.jsonl").write_text("mine")
    if config:
        (tmp_path / "out" / "config.json").write_text(config)
    before = files_of(tmp_path / "out")
    said = error_of(capsys, "--config", run_config(world, tmp_path), *flag)
    assert f"{tmp_path / 'out'}: holds " in said and "of no run, expected another output_dir" in said
    assert files_of(tmp_path / "out") == before and (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("name", ["model/thesis.txt", "model/sub/x", "adapter/mine", "checkpoints/step-1/notes", "checkpoints/step-1/.git/HEAD"])
def test_what_no_run_wrote_among_what_would_go_is_refused(world, tmp_path, capsys, name):
    config = run_config(world, tmp_path)
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    (tmp_path / "out" / "config.json").write_text(json.dumps(asdict(load_config(config))))
    for flag in ("--overwrite", "--resume"):
        said = error_of(capsys, "--config", config, flag)
        assert "of no run, expected another output_dir, or this elsewhere" in said and str(tmp_path / "out" / name.split("/")[0]) in said
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(("task", "flag"), [("evaluate", None), ("generate_preference", None), ("sft", "--overwrite")])
def test_other_entries_of_checkpoints_stay(world, tmp_path, task, flag):
    """A task that does not train removed .git and .env there, without a flag."""
    config = run_config(world, tmp_path, task, evaluated=task == "evaluate", max_steps=1, save_steps=1)
    checkpoints = tmp_path / "out" / "checkpoints"
    for name in (".git/HEAD", ".env", "notes.txt", "step-\u00b2/x", "step-one/x", ".step-1.old/x", ".model.part/x"):
        (checkpoints / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoints / name).write_text(name)
    if flag:
        (tmp_path / "out" / "config.json").write_text(json.dumps(asdict(load_config(config))))
    before = files_of(checkpoints)
    assert run("--config", config, *filter(None, [flag])) == 0
    assert before.items() <= files_of(checkpoints).items()


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_links_are_not_followed_to_remove(killed_run, tmp_path, flag):
    """checkpoints/ on another disk, which holds much else, hidden too; --resume goes on from there."""
    folder, disk = copy_of(killed_run[1], tmp_path), tmp_path / "disk"
    (folder / "out" / "checkpoints").rename(disk)
    (folder / "out" / "checkpoints").symlink_to(disk)
    (folder / "out" / "model").symlink_to(disk / "elsewhere")  # of nothing
    for name in (".ssh", ".git", "photos"):
        (disk / name).mkdir()
        (disk / name / "mine").write_text("mine")
    assert run("--config", folder / "run.json", flag) == 0
    assert all((disk / name / "mine").exists() for name in (".ssh", ".git", "photos"))
    assert ("step-2" in names_in(disk)) == (flag == "--overwrite")
    assert metrics_of(folder) == metrics_of(killed_run[0])


def test_a_foreign_lock_is_neither_emptied_nor_followed_nor_removed(world, tmp_path, capsys):
    config, lock = run_config(world, tmp_path, "sft", evaluated=False, max_steps=1), tmp_path / "out" / ".lock"
    (tmp_path / "precious.txt").write_text("precious")
    (tmp_path / "out").mkdir()
    lock.symlink_to(tmp_path / "precious.txt")
    assert f"'{lock}', expected a directory that can have a file .lock" in error_of(capsys, "--config", config)
    assert (tmp_path / "precious.txt").read_text() == "precious"
    lock.unlink()
    lock.write_text("mine")
    error_of(capsys, "--config", config, "--train_path", tmp_path / "nothing")
    assert lock.read_text() == "mine", "even where a run is refused"
    assert run("--config", config) == 0 and lock.read_text() == "mine"


def test_a_refused_run_removes_the_directory_only_if_it_made_it(world, tmp_path, capsys):
    config, bad = run_config(world, tmp_path), tmp_path / "bad.jsonl"
    bad.write_text("[]\n")
    error_of(capsys, "--config", config, "--train_path", bad)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    error_of(capsys, "--config", config, "--train_path", bad)
    assert (tmp_path / "out").exists()


def test_links_to_nothing_and_in_a_circle_are_one_line(world, killed_run, tmp_path, capsys):
    config = run_config(world, tmp_path)
    (tmp_path / "out").symlink_to(tmp_path / "out")
    assert str(tmp_path / "out") in error_of(capsys, "--config", config)
    folder = copy_of(killed_run[1], tmp_path)
    shutil.rmtree(folder / "out" / "checkpoints")
    (folder / "out" / "checkpoints").symlink_to(tmp_path / "unplugged")
    before = files_of(folder / "out")
    said = error_of(capsys, "--config", folder / "run.json", "--resume")
    assert f"No such file or directory: '{folder / 'out' / 'checkpoints'}'" in said, "not: no checkpoint yet"
    assert files_of(folder / "out") == before


def without_rights():
    """Root may read what nobody may; from here on this process may not."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert os.geteuid() or ctypes.CDLL(None).capset(header, nothing) == 0


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-2", "checkpoints/step-2/trainer_state.json", "metrics.jsonl"])
def test_what_cannot_be_read_is_an_error_and_not_a_beginning(killed_run, tmp_path, name):
    folder = copy_of(killed_run[1], tmp_path)
    before = files_of(folder / "out")
    (folder / "out" / name).chmod(0)
    statuses, said = run_on_ranks(1, tmp_path, "--config", folder / "run.json", "--resume", patch=without_rights)
    (folder / "out" / name).chmod(0o755)
    assert statuses == [2] and str(folder / "out" / name) in said and "ermission denied" in said and "Traceback" not in said
    assert files_of(folder / "out") == before


def test_files_have_the_rights_that_the_umask_leaves(world, tmp_path):
    """Not those of a temporary file, which nobody else may read."""
    old = os.umask(0o027)
    try:
        assert run("--config", run_config(world, tmp_path, save_steps=1)) == 0
    finally:
        os.umask(old)
    paths = list((tmp_path / "out").rglob("*"))
    assert len(paths) > 15
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_an_output_directory_that_is_a_file_is_refused(world, tmp_path, capsys):
    config = run_config(world, tmp_path)
    (tmp_path / "out").write_text("mine")
    assert str(tmp_path / "out") in error_of(capsys, "--config", config)


def test_a_refused_run_leaves_the_output_of_a_former_one(world, act_run, tmp_path, capsys):
    """Its model must not be removed before the new run has read all that it needs."""
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    folder = copy_of(act_run[0], tmp_path, {"policy_model_config": {"model_path": str(tmp_path / "model")}})
    error_of(capsys, "--config", folder / "run.json", "--overwrite")
    assert_same_weights(folder / "out" / "model", act_run[0] / "out" / "model")


def test_a_run_that_could_not_start_does_not_claim_its_output_directory(world, tmp_path, capsys):
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    config = run_config(world, tmp_path, evaluated=False)
    error_of(capsys, "--config", config, "--policy_model_config.model_path", tmp_path / "model")
    assert run("--config", config) == 0


# ----------------------------------------------------------------------------------------------------------------------
# What the user got wrong: status 2 and one line


def test_a_typo_is_one_line_and_status_2(world, tmp_path, capsys):
    config = run_config(world, tmp_path, learning_rat=1)
    nearest = "unknown key, the nearest known one is training_config.learning_rate"
    assert error_of(capsys, "--config", config) == f"act.py: error: {config}: training_config.learning_rat: {nearest}\n"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("variables", "said"), [
    ({"RANK": "0"}, "variable WORLD_SIZE expected"),
    ({"RANK": "abc", "WORLD_SIZE": "1", "MASTER_PORT": "1"}, "'abc'"),
    ({"RANK": "0", "WORLD_SIZE": "1"}, "variable MASTER_ADDR expected"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, "variable MASTER_PORT expected"),
    ({"RANK": "0", "WORLD_SIZE": "-1", "MASTER_PORT": "0", "MASTER_ADDR": "127.0.0.1"}, "RANK is 0, expected less than WORLD_SIZE -1"),
    ({"RANK": "3", "WORLD_SIZE": "2", "MASTER_PORT": "1", "MASTER_ADDR": "127.0.0.1"}, "RANK is 3, expected less than WORLD_SIZE 2"),
])  # fmt: skip
def test_half_a_description_of_the_processes_is_refused(world, tmp_path, monkeypatch, capsys, variables, said):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(act.time, "sleep", lambda seconds: None)  # other ranks let the first speak
    found = error_of(capsys, "--config", run_config(world, tmp_path))
    assert found.startswith("act.py: error: expected RANK and what else torchrun sets: ") and said in found
    assert not (tmp_path / "out").exists()


def test_what_would_learn_nothing_is_refused_once_the_steps_are_known(world, tmp_path, capsys):
    config = run_config(world, tmp_path, "sft", warmup_steps=2)
    assert "warmup_steps is 2, expected fewer than the run's 2 steps" in error_of(capsys, "--config", config)
    answers = [{"messages": data.exchange("How many?", "5")}]
    path = write_lines(tmp_path / "answers.jsonl", answers)
    best = {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 1}
    metric = "CLARIFY Turns: Trajectory-level Exact Match"
    config = run_config(world, tmp_path, "sft", metric_for_best_model=metric, **best)
    said = error_of(capsys, "--config", config, "--validation_path", path)
    assert "metric_for_best_model: no validation turn has the action CLARIFY, expected another metric or some" in said
    assert not (tmp_path / "out").exists()
    assert run("--config", config, "--validation_path", path, "--metric_for_best_model", metric.replace("CLARIFY", "ANSWER")) == 0


def test_data_may_come_through_a_pipe(world, act_run, tmp_path):
    """What is hashed is what is parsed: a file is read once."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=((world / "train.jsonl").read_bytes(),), daemon=True)
    writer.start()
    assert run("--config", run_config(world, tmp_path), "--train_path", pipe) == 0
    writer.join(5)
    found, expected = metrics_of(tmp_path), metrics_of(act_run[0])
    assert found == expected


def test_a_missing_model_is_named(world, tmp_path, capsys):
    missing = tmp_path / "nothing"
    found = error_of(capsys, "--config", run_config(world, tmp_path), "--policy_model_config.model_path", missing)
    assert str(missing) in found


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_missing_file_of_the_model_is_named(world, tmp_path, capsys, missing):
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    config = run_config(world, tmp_path)
    for task in ("act", "evaluate"):
        words = ["--task", task, "--policy_model_config.model_path", tmp_path / "model", "--overwrite"]
        assert str(tmp_path / "model" / missing) in error_of(capsys, "--config", config, *words)


@pytest.mark.parametrize(("line", "said"), [
    ('{"messages": [', "invalid JSON"), ('{"turns": []}', "neither messages nor contents"),
    ("[]", "expected an object"), ("\xff", "UTF-8"),
])  # fmt: skip
def test_a_broken_line_of_data_is_named(world, tmp_path, capsys, line, said):
    good = (world / "train.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "bad.jsonl").write_bytes(f"{good}\n{line}\n".encode("latin-1"))
    config = run_config(world, tmp_path)
    error = error_of(capsys, "--config", config, "--data_config.train_path", tmp_path / "bad.jsonl")
    assert f"{tmp_path / 'bad.jsonl'}:2: " in error and said in error
    assert not (tmp_path / "out").exists()


def test_turns_that_do_not_fit_are_left_out_and_cut_prompts_said(world, tmp_path, capsys):
    """Of the training turns; a validation turn is played whatever the length of its gold reply."""
    long, asked = "sales " * 500, {"role": "user", "content": "How many?", "requires_clarification": False}
    rows = [{"messages": [asked, {"role": "model", "content": reply}] * 2} for reply in ("5", long)]
    path = write_lines(tmp_path / "long.jsonl", rows)
    config = run_config(world, tmp_path, "sft", max_steps=1)
    files = ["--data_config.train_path", path, "--data_config.validation_path", path]
    assert run("--config", config, *files) == 0
    said = capsys.readouterr().out.splitlines()
    cut = [line for line in said if re.fullmatch(rf"{path}: 1 prompts lose tokens to max_prompt_length: line.turn 2.2 \(\d+\)", line)]
    assert len(cut) == 2
    assert said.count(f"{path}: 2 turns whose reply does not fit into max_length are left out: line.turn 2.1, 2.2") == 1
    assert any(line.startswith("sft: 2 training turns, 4 for validation") for line in said)


def test_a_good_side_that_is_cut_is_left_out_and_a_losing_one_said(world, tmp_path, capsys):
    """Cut before its answer, a clarifying trajectory and another that asks the same would be equal: nothing to learn."""
    prompt, asks, replies = ({"role": role, "content": text} for role, text in (
        ("user", "How many?"), ("assistant", "Which month?"), ("user", "may")))  # fmt: skip
    short, long = ({"role": "assistant", "content": text} for text in ("sales may", "sales " * 500))
    sides = ([asks, replies, long], [asks, replies, short]), ([asks, replies, short], [short]), ([short], [long])
    rows = [{"prompt": [prompt], "chosen": chosen, "rejected": rejected} for chosen, rejected in sides]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    config = run_config(world, tmp_path, "dpo", evaluated=False, max_steps=1, is_preference=True)
    assert run("--config", config, "--data_config.train_path", path) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"{path}: 1 turns whose reply does not fit into max_length are left out: 1" in said
    assert f"{path}: 1 turns have a losing side that max_length cuts: 3" in said
    assert any(line.startswith("dpo: 2 training turns") for line in said)


@pytest.mark.parametrize("prompt_format", ["plain", "gemma"])
def test_a_greeting_that_is_left_out_is_said(world, tmp_path, capsys, prompt_format):
    turns = data.exchange("How many?", "5")
    rows = [{"messages": turns}, {"messages": [{"role": "model", "content": "Hello!"}, *turns]}]
    path = write_lines(tmp_path / "greeting.jsonl", rows)
    config = run_config(world, tmp_path, "check")
    assert run("--config", config, "--data_config.train_path", path, "--prompt_format", prompt_format) == 0
    line = f"{path}: 1 greetings come first, which format 'gemma' leaves out: 2"
    assert (line in capsys.readouterr().out.splitlines()) == (prompt_format == "gemma")


def test_weights_that_hold_the_tied_head_once_more_are_trained(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    weights = load_file(world / "model" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = run_config(world, tmp_path, "dpo", evaluated=False, max_steps=1)
    assert run("--config", config, "--policy_model_config.model_path", tmp_path / "model") == 0


def test_a_classifier_that_costs_is_not_asked_about_labels(world, tmp_path, capsys, one_process):
    """With the rule labels are compared at the start of every run; a model would be asked about each turn."""
    rows = [{"messages": data.exchange("How many?", "Which year?")}]  # labelled as an answer
    path, asked = write_lines(tmp_path / "odd.jsonl", rows), []
    config = load_config(run_config(world, tmp_path))
    model = replace(config, action_model_config=act.HelperConfig(backend="openai", model_id="m"))
    for each, classify, said in (
        (config, data.rule_actions, True), (model, lambda replies: asked.extend(replies) or [], False)
    ):  # fmt: skip
        helpers = SimpleNamespace(roles={"action_model_config": classify})
        act.make_pairs(path, data.read_vertex_jsonl(path), each, helpers, trained_on=False)
        assert ("labelled ANSWER, but the classifier says CLARIFY" in capsys.readouterr().out) == said
    assert not asked


def test_progress_says_how_long_it_will_take(monkeypatch, capsys):
    """From the pace since the first call, so that neither what is compiled then nor steps before a resume count."""
    clock = [0.0]
    monkeypatch.setattr(act.time, "monotonic", lambda: clock[0])
    progress = act.meter("step", 100)
    for now, done in ((30, 60), (50, 70), (60, 100)):
        clock[0] = now
        progress(done, "loss 1")
    progress = act.meter("step", 1000)
    for now, done in ((70, 1), (72, 2), (80, 2)):
        clock[0] = now
        progress(done)
    assert capsys.readouterr().out.splitlines() == [
        "step 60/100  30 s  loss 1", "step 70/100  50 s, 60 s left  loss 1", "step 100/100  60 s  loss 1",
        "step 1/1000  10 s", "step 2/1000  20 s, 9980 s left",
    ]  # fmt: skip


def test_missing_and_empty_data_are_named(world, tmp_path, capsys):
    config, missing = run_config(world, tmp_path), tmp_path / "none"
    assert f"{missing}: cannot be read" in error_of(capsys, "--config", config, "--data_config.train_path", missing)
    nobody = write_lines(tmp_path / "open.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    found = error_of(capsys, "--config", config, "--data_config.train_path", nobody)
    assert found.startswith(f"act.py: error: {nobody}: no turn to train on, expected complete answers")
    for task, key in (("evaluate", "validation_path"), ("generate_preference", "train_path")):
        words = ("--config", config, "--task", task, f"--data_config.{key}", nobody)
        words += ("--data_config.validation_path", "") if task != "evaluate" else ()
        assert f"{nobody}: holds no turn with a complete answer" in error_of(capsys, *words)
    found = error_of(capsys, "--config", tmp_path / "none.json")
    assert found.startswith(f"act.py: error: {tmp_path / 'none.json'}: cannot be read")


def test_a_tokenizer_larger_than_the_model_is_refused(world, tmp_path, capsys):
    config = GemmaConfig.from_json(world / "model" / "config.json")
    Gemma(replace(config, vocab_size=300)).save_pretrained(tmp_path / "model")
    shutil.copyfile(TINY / "tokenizer.model", tmp_path / "model" / "tokenizer.model")
    words = ["--policy_model_config.model_path", tmp_path / "model"]
    assert "vocab_size 300" in error_of(capsys, "--config", run_config(world, tmp_path), *words)


def test_ranks_that_cannot_be_split_into_copies_are_refused(world, tmp_path, capsys):
    error = error_of(capsys, "--config", run_config(world, tmp_path, dp_replicate_size=2))
    assert "dp_replicate_size is 2, expected a divisor of 1 processes" in error


# ----------------------------------------------------------------------------------------------------------------------
# Several processes

FIVE_STEPS = {
    "max_steps": 5, "eval_steps": 3, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "save_steps": 2,
    "save_total_limit": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def one_rank_run(world, tmp_path_factory):
    """The folder of a run of 5 steps of 4 examples, sampled on policy."""
    folder = tmp_path_factory.mktemp("one_rank")
    assert run("--config", run_config(world, folder, per_device_train_batch_size=4, **FIVE_STEPS)) == 0
    return folder


@pytest.fixture(scope="module")
def two_rank_run(world, tmp_path_factory):
    """The same on two ranks."""
    folder = tmp_path_factory.mktemp("two_ranks")
    config = run_config(world, folder, per_device_train_batch_size=2, **FIVE_STEPS)
    statuses, said = run_on_ranks(2, folder, "--config", config)
    assert statuses == [0, 0], said
    return folder


def assert_as_one_rank(folder, one):
    assert [row["step"] for row in metrics_of(folder)] == [0, 1, 2, 3, 3, 4, 5, 5]
    assert_same_rows(metrics_of(folder), metrics_of(one))
    for name in ("eval_samples.jsonl", "eval_metrics.json", "rollouts.jsonl"):
        assert (folder / "out" / name).read_bytes() == (one / "out" / name).read_bytes()
    assert_nearly_same_weights(folder / "out" / "model", one / "out" / "model")


def test_two_ranks_match_one(world, one_rank_run, two_rank_run):
    assert len(pairs_of(world / "validation.jsonl")) % 2 == 1, "unequal work"
    assert_as_one_rank(two_rank_run, one_rank_run)


@pytest.mark.parametrize("ranks", [2, 4], ids=["replicated", "two-by-two"])
def test_ranks_with_copies_match_one(world, one_rank_run, tmp_path, ranks):
    """The first two of the five steps."""
    options = {"per_device_train_batch_size": 4 // ranks, "dp_replicate_size": 2, **FIVE_STEPS, "max_steps": 2}
    config = run_config(world, tmp_path, evaluated=False, **options)
    statuses, said = run_on_ranks(ranks, tmp_path, "--config", config)
    assert statuses == [0] * ranks, said
    assert said.count("The model is in") == 1, "one rank speaks"
    assert_same_rows(metrics_of(tmp_path), training_rows(one_rank_run)[:2])
    assert_nearly_same_weights(tmp_path / "out" / "model", one_rank_run / "out" / "checkpoints" / "step-2")


def test_the_checkpoint_of_two_ranks_goes_on_as_one(world, one_rank_run, two_rank_run, tmp_path):
    """Its optimiser's state was gathered when it was written, and is read again by whoever holds which rows."""
    folder = copy_of(two_rank_run, tmp_path)
    for name in ("model", "checkpoints/step-5"):  # as if killed after step 4
        shutil.rmtree(folder / "out" / name)
    assert run("--config", folder / "run.json", "--resume", "--training_config.per_device_train_batch_size", 4) == 0
    assert_as_one_rank(folder, one_rank_run)


def test_an_unforeseen_error_of_one_rank_is_shown_and_ends_all(tmp_path):
    """While the other waits for it in a collective, and process groups could only be ended by both (as NCCL's)."""
    (tmp_path / "fails.py").write_text("""
import torch, act
def task(config):
    act.start_processes()
    if act.dist.get_rank():
        raise RuntimeError("nobody foresaw this")
    act.dist.all_reduce(torch.ones(1))
    act.time.sleep(600)
act.TASKS["evaluate"] = task
act.dist.destroy_process_group = lambda: act.time.sleep(600)
act.run_as_program()
""")
    words = ["--config", ROOT / "configs" / "tiny.json", "--task", "evaluate"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    status, _, errors = run_program(*torchrun, tmp_path / "fails.py", *words)
    assert status and "RuntimeError: nobody foresaw this" in errors


def test_a_gradient_that_is_no_number_stops_the_run_with_its_parameters_still_good(world, tmp_path, monkeypatch, capsys):
    """Before the optimiser's step: what is saved is the last good state, and --resume goes on from it."""
    step, calls = act.preference_step, []

    def poisoned(run, *rest):
        result = step(run, *rest)
        calls.append(1)
        if len(calls) == 3:
            run.policy.norm.weight.grad[0] = math.nan
        return result

    config = run_config(world, tmp_path, "dpo", max_steps=4, save_steps=2)
    monkeypatch.setattr(act, "preference_step", poisoned)
    assert run("--config", config) == 1
    said = capsys.readouterr().err
    lines = f"{world / 'train.jsonl'}:2, {world / 'train.jsonl'}:1"
    found = f"the gradient's norm is not a finite number in step 3, on {lines}"
    assert said == f"act.py: stopped: {found}, --resume goes on from step 2\n"
    assert not (tmp_path / "out" / "model").exists()
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "out" / "checkpoints" / "step-2").values())
    assert run("--config", config, "--resume") == 0
    assert [row["step"] for row in training_rows(tmp_path)] == [1, 2, 3, 4]


def counted(function, number, then):
    """act.`function`, but its call of this number (from 1) gives what `then(result of the function, *arguments)` does."""
    inner, calls = getattr(act, function), []

    def wrapped(*arguments, **options):
        calls.append(1)
        result = inner(*arguments, **options)
        return then(result, *arguments) if len(calls) == number else result

    return wrapped


def lines_of_json(path):
    """Its rows, read by a parser that knows no NaN."""
    refuse = lambda name: pytest.fail(f"{path.name} holds {name}")  # noqa: E731
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("key", ["loss", "logps/rejected"])
def test_a_loss_or_log_probability_that_is_no_number_stops_the_run_before_the_step(
    world, tmp_path, monkeypatch, capsys, key
):
    """Even where every gradient is a number. The lines are those of the step's pairs; nothing good is removed."""
    config = run_config(world, tmp_path, "dpo", evaluated=False, max_steps=4, save_steps=1)
    monkeypatch.setattr(act, "preference_step", counted("preference_step", 3, lambda sums, *_: sums | {key: math.inf}))
    assert run("--config", config) == 1
    lines = f"{world / 'train.jsonl'}:2, {world / 'train.jsonl'}:1"
    said = f"{key} is not a finite number in step 3, on {lines}, --resume goes on from step 2"
    assert capsys.readouterr().err == f"act.py: stopped: {said}\n"
    assert names_in(tmp_path / "out" / "checkpoints") == {"step-2"} and not (tmp_path / "out" / "model").exists()
    assert [row["step"] for row in lines_of_json(tmp_path / "out" / "metrics.jsonl")] == [1, 2]


def ruin(norm, policy, *_):
    """As an optimiser's step that overflows."""
    with torch.no_grad():
        policy.norm.weight[0] = math.nan
    return norm


@pytest.mark.parametrize("step", [3, 4], ids=["", "the last one"])
def test_parameters_that_are_no_numbers_are_never_saved_or_evaluated(world, tmp_path, monkeypatch, capsys, step):
    config = run_config(world, tmp_path, max_steps=4, save_steps=1, eval_steps=4)
    monkeypatch.setattr(act, "clip_and_step", counted("clip_and_step", step, ruin))
    assert run("--config", config) == 1
    said = capsys.readouterr().err
    assert said == (
        f"act.py: stopped: norm.weight is not a finite number; step {step} is not saved, since norm.weight is not a finite "
        f"number, --resume goes on from step {step - 1}\n"
    )
    assert names_in(tmp_path / "out" / "checkpoints") == {f"step-{step - 1}"}
    assert not (tmp_path / "out" / "model").exists()
    assert all("eval/Accuracy" not in row or row["step"] == 0 for row in lines_of_json(tmp_path / "out" / "metrics.jsonl"))
    monkeypatch.undo()
    assert run("--config", config, "--resume") == 0
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "out" / "model").values())


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


def test_a_run_that_is_out_of_memory_saves_and_says_what_to_lower(world, tmp_path, monkeypatch, capsys):
    config = run_config(world, tmp_path, "dpo", evaluated=False, max_steps=4, save_steps=4)
    monkeypatch.setattr(act, "preference_step", counted("preference_step", 3, out_of_memory))
    assert run("--config", config) == 1
    said = f"act.py: stopped: {act.OUT_OF_MEMORY}, --resume goes on from step 2\n"
    assert capsys.readouterr().err == said and names_in(tmp_path / "out" / "checkpoints") == {"step-2"}


def no_memory_on_rank_one():
    if os.environ["RANK"] == "1":
        act.preference_step = counted("preference_step", 2, out_of_memory)


def test_one_rank_out_of_memory_says_so_and_nobody_waits(world, tmp_path):
    """It can save nothing: the others are in the midst of a sum of gradients, or of layers that are gathered."""
    config = run_config(world, tmp_path, "dpo", evaluated=False, max_steps=3, save_steps=1, per_device_train_batch_size=2)
    statuses, said = run_on_ranks(2, tmp_path, "--config", config, patch=no_memory_on_rank_one)
    assert statuses[1] == 2 and statuses[0] not in (0, None, -9) and "act.py: error: CUDA out of memory" in said, said
    assert names_in(tmp_path / "out" / "checkpoints") == {"step-1"}


def no_memory_to_sample_on_rank_one():
    if os.environ["RANK"] == "1":
        act.in_lockstep = counted("in_lockstep", 1, out_of_memory)


def test_one_rank_without_memory_for_its_rollout_stops_all_and_they_save(world, tmp_path):
    config = run_config(world, tmp_path, evaluated=False, max_steps=2, per_device_train_batch_size=2)
    statuses, said = run_on_ranks(2, tmp_path, "--config", config, patch=no_memory_to_sample_on_rank_one)
    assert statuses == [1, 1] and said.count(act.OUT_OF_MEMORY) == 1, said


@pytest.mark.parametrize("where", ["write_evaluation", "save_trained"])
def test_a_run_that_is_killed_at_its_end_ends_with_its_own_figures(world, tmp_path, monkeypatch, capsys, where):
    """Whether the last evaluation was in the log alone, or in its files too: --resume leaves both, and the table."""
    config, out = run_config(world, tmp_path, max_steps=2, save_steps=1), tmp_path / "out"

    def killed(*_):
        raise KeyboardInterrupt

    number = 2 if where == "write_evaluation" else 1
    monkeypatch.setattr(act, where, stopped_at(where, number, killed))
    assert run("--config", config) == 130
    monkeypatch.undo()
    assert run("--config", config, "--resume") == 0
    assert " before    after\n" in capsys.readouterr().out
    rows = [row for row in lines_of_json(out / "metrics.jsonl") if "eval/Accuracy" in row]
    assert [row["step"] for row in rows] == [0, 2]
    found = json.loads((out / "eval_metrics.json").read_text())
    assert found == {key.removeprefix("eval/"): value for key, value in rows[1].items() if key != "step"}
    assert {row["step"] for row in lines_of_json(out / "eval_samples.jsonl")} == {0, 2}


def stopped_at(function, number, then):
    """act.`function`, of which the call of this number (from 1) is `then` in its place."""
    inner, calls = getattr(act, function), []
    return lambda *given: calls.append(1) or (then if len(calls) == number else inner)(*given)


def test_in_a_notebook_an_interrupt_ends_one_run_only(world, tmp_path, monkeypatch):
    config = load_config(run_config(world, tmp_path, "dpo", evaluated=False, max_steps=2, save_steps=1))
    monkeypatch.setattr(act, "ASKED", [signal.SIGINT])
    act.train(config)
    assert names_in(tmp_path / "out" / "checkpoints") == {"step-2"}


def test_a_config_of_ones_own_in_the_output_directory_is_no_run(world, tmp_path, capsys):
    own = tmp_path / "out" / "config.json"
    own.parent.mkdir()
    row = json.loads(Path(run_config(world, tmp_path)).read_text())
    row.pop("task", None)
    own.write_text(json.dumps(row))
    assert f"{tmp_path / 'out'}: holds config.json of no run" in error_of(capsys, "--config", own)


def a_nan_on_rank_one():
    if os.environ["RANK"] == "1":
        act.preference_step = counted("preference_step", 2, lambda sums, *_: sums | {"loss": math.nan})


def test_a_number_that_is_none_on_one_rank_stops_all(world, tmp_path):
    config = run_config(world, tmp_path, "dpo", evaluated=False, max_steps=3, per_device_train_batch_size=2)
    statuses, said = run_on_ranks(2, tmp_path, "--config", config, patch=a_nan_on_rank_one)
    assert statuses == [1, 1] and said.count("loss is not a finite number in step 2") == 1, said
    assert names_in(tmp_path / "out" / "checkpoints") == {"step-1"}


def scored(monkeypatch, *scores):
    """Let evaluations find these trajectory scores, one after the other."""
    inner, found = act.evaluate_pairs, iter(scores)

    def evaluate(*arguments):
        metrics, samples = inner(*arguments)
        return metrics | {"Trajectory-level DROP F1": next(found)}, samples

    monkeypatch.setattr(act, "evaluate_pairs", evaluate)


@pytest.mark.parametrize("load_best", [False, True])
def test_the_best_checkpoint_is_kept_and_said_and_loaded_if_asked(world, tmp_path, monkeypatch, capsys, load_best):
    options = {"max_steps": 4, "save_steps": 1, "eval_steps": 1, "save_total_limit": 1}
    config = run_config(world, tmp_path, "dpo", load_best_model_at_end=load_best, **options)
    scored(monkeypatch, 0.5, 0.9, 0.3, 0.9, 0.2)
    copies = counted("save_checkpoint", 3, lambda _, run, step: shutil.copytree(tmp_path / "out", tmp_path / "then"))
    monkeypatch.setattr(act, "save_checkpoint", copies)
    assert run("--config", config) == 0
    assert names_in(tmp_path / "then" / "checkpoints") == {"step-1", "step-3"}, "the newest and the best"
    checkpoints = tmp_path / "out" / "checkpoints"
    assert names_in(checkpoints) == {"step-3", "step-4"}
    said = capsys.readouterr().out
    assert said.endswith(
        "\nTrajectory-level DROP F1, the best first: 90.0 after step 3, 90.0 after step 1, 50.0 after step 0, "
        "30.0 after step 2, 20.0 after step 4\n"
    )
    assert ("model/ is that of step 3" in said) == load_best
    model, best = weights_of(tmp_path / "out" / "model"), weights_of(checkpoints / "step-3")
    assert all(torch.equal(model[name], best[name]) for name in best) == load_best


def test_a_last_step_that_is_the_best_stays_the_model(world, tmp_path, monkeypatch, capsys):
    options = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "load_best_model_at_end": True}
    scored(monkeypatch, 0.5, 0.6, 0.7)
    assert run("--config", run_config(world, tmp_path, "dpo", **options)) == 0
    assert "load_best" not in capsys.readouterr().out
    model, first = weights_of(tmp_path / "out" / "model"), weights_of(tmp_path / "out" / "checkpoints" / "step-1")
    assert not all(torch.equal(model[name], first[name]) for name in first)


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C, one run at a time, disks that are full


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_saves_at_the_steps_end_and_the_run_goes_on_bit_for_bit(
    world, act_run, tmp_path, monkeypatch, capfd, number
):
    with monkeypatch.context() as patch:
        patch.setattr(act, "preference_step", counted("preference_step", 1, lambda sums, *_: os.kill(os.getpid(), number) or sums))
        assert run("--config", run_config(world, tmp_path)) == 1
    said = capfd.readouterr().err
    assert said.endswith("act.py: stopped: interrupted, --resume goes on from step 1\n")
    assert "act.py: saves a checkpoint at the end of this step; once more leaves at once\n" in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run("--config", tmp_path / "run.json", "--resume") == 0
    assert metrics_of(tmp_path) == metrics_of(act_run[0])
    assert_same_weights(tmp_path / "out" / "model", act_run[0] / "out" / "model")


def as_it_is(result):
    return result


def interrupt(result, *_):
    os.kill(os.getpid(), signal.SIGINT)
    return result


def test_a_second_signal_leaves_at_once(world, tmp_path, monkeypatch, capfd):
    both = counted("preference_step", 2, lambda *_: interrupt(interrupt(None)))
    monkeypatch.setattr(act, "preference_step", both)
    config = run_config(world, tmp_path, save_steps=1)
    assert run("--config", config) == 130
    assert capfd.readouterr().err.endswith("\nact.py: interrupted\n")
    assert names_in(tmp_path / "out" / "checkpoints") == {"step-1"}


def test_an_evaluation_that_is_interrupted_is_not_played_to_its_end(world, tmp_path, monkeypatch, capfd):
    inner, played = act.in_lockstep, []
    monkeypatch.setattr(act, "in_lockstep", lambda *turns: played.append(1) or interrupt(inner(*turns)))
    assert run("--config", run_config(world, tmp_path, per_device_eval_batch_size=1)) == 1
    assert len(played) == 1 and "stopped: interrupted, --resume goes on from step 0" in capfd.readouterr().err


def interrupt_rank_one():
    if os.environ["RANK"] == "1":
        act.preference_step = counted("preference_step", 1, interrupt)


def test_a_signal_to_one_rank_saves_on_all(world, tmp_path):
    config = run_config(world, tmp_path, "dpo", evaluated=False, max_steps=3, per_device_train_batch_size=2)
    statuses, said = run_on_ranks(2, tmp_path, "--config", config, patch=interrupt_rank_one)
    assert statuses == [1, 1] and said.count("stopped: interrupted, --resume goes on from step 1") == 1, said
    assert names_in(tmp_path / "out" / "checkpoints") == {"step-1"}


def test_a_directory_that_another_run_is_writing_to_is_refused(world, act_run, tmp_path, capsys):
    """By a lock that dies with its process; the file stays and means nothing."""
    folder = copy_of(act_run[0], tmp_path)
    with open(folder / "out" / ".lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for flag in ("--resume", "--overwrite"):
            said = error_of(capsys, "--config", folder / "run.json", flag)
            assert said == f"act.py: error: {folder / 'out'}: another run is writing to it, expected one at a time\n"
    assert metrics_of(folder) == metrics_of(act_run[0])
    assert run("--config", folder / "run.json", "--resume") == 0


def test_a_run_holds_its_lock_until_it_ends(world, tmp_path, monkeypatch):
    held = []

    def probe(*_):
        with open(tmp_path / "out" / ".lock", "a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(1)

    monkeypatch.setattr(act, "save_checkpoint", probe)
    assert run("--config", run_config(world, tmp_path, "sft", evaluated=False, save_steps=1)) == 0
    with open(tmp_path / "out" / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert held


def test_a_file_system_without_locks_is_said_and_no_obstacle(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    act.take_lock(tmp_path)
    act.LOCK.clear()
    assert "would not be noticed here (Function not implemented)" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [[], ["--resume"]], ids=["", "resume"])
def test_of_two_runs_that_start_at_once_the_second_is_refused(killed_run, world, tmp_path, monkeypatch, capsys, flag):
    """Even before the first has read its data: what it decided about the directory still holds when it writes."""
    folder, load, second = copy_of(killed_run[1], tmp_path), act.load_pairs, []
    if not flag:
        shutil.rmtree(folder / "out")

    def slow(*arguments):
        with open(folder / "out" / ".lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        second.append(1)
        return load(*arguments)

    monkeypatch.setattr(act, "load_pairs", slow)
    assert run("--config", folder / "run.json", *flag) == 0
    assert second == [1] and metrics_of(folder) == metrics_of(killed_run[0])


def test_a_run_whose_directory_was_removed_and_made_anew_stops(world, tmp_path, monkeypatch, capsys):
    """Another run is there now: nothing of it is removed, and no checkpoint is written into it."""
    out = tmp_path / "out"

    def replaced(result, *_):
        out.rename(tmp_path / "gone")
        (out / "checkpoints" / "step-1").mkdir(parents=True)
        (out / "checkpoints" / "step-1" / "trainer_state.json").write_text('{"step": 1}')
        (out / ".lock").touch()
        return result

    monkeypatch.setattr(act, "preference_step", counted("preference_step", 2, replaced))
    config = run_config(world, tmp_path, "dpo", evaluated=False, max_steps=9, save_steps=4)
    assert run("--config", config) == 1
    said = capsys.readouterr().err
    assert f"act.py: stopped: {out}: its .lock is not this run's any more, another may write there" in said
    assert len(said.splitlines()) == 1
    assert names_in(out / "checkpoints") == {"step-1"} and (out / ".lock").exists() and not (out / "model").exists()
    assert not (out / "metrics.jsonl").exists()


def test_a_run_that_ends_leaves_the_lock_of_another(world, tmp_path, monkeypatch, capsys):
    """Which has written nothing yet."""
    out, load = tmp_path / "out", act.load_pairs

    def replaced(*arguments):
        shutil.rmtree(out)
        out.mkdir()
        (out / ".lock").touch()
        raise data.InputError("refused")

    monkeypatch.setattr(act, "load_pairs", replaced)
    error_of(capsys, "--config", run_config(world, tmp_path))
    assert (out / ".lock").exists() and load


def a_reader_that_dies(then):
    """As in `act.py 2>&1 | tee log`, where Ctrl-C ends tee first."""

    def died(result, *_):
        reading, writing = os.pipe()
        for number in (1, 2):
            os.dup2(writing, number)
        os.close(reading)
        os.close(writing)
        return then(result)

    act.preference_step = counted("preference_step", 2, died)


def test_ctrl_c_through_a_pipe_whose_reader_died_saves(world, tmp_path):
    config = run_config(world, tmp_path, "dpo", max_steps=3)
    statuses, _ = run_on_ranks(1, tmp_path, "--config", config, patch=partial(a_reader_that_dies, interrupt))
    assert statuses == [1] and names_in(tmp_path / "out" / "checkpoints") == {"step-2"}


def test_a_run_whose_reader_died_goes_on_in_silence(world, tmp_path):
    config = run_config(world, tmp_path, "dpo", max_steps=3)
    statuses, _ = run_on_ranks(1, tmp_path, "--config", config, patch=partial(a_reader_that_dies, as_it_is))
    assert statuses == [0] and [row["step"] for row in metrics_of(tmp_path)] == [0, 1, 2, 3, 3]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_without_stdout_and_stderr_a_run_ends_as_with_them(world, act_run, tmp_path):
    """`>&- 2>&-`: what is opened next takes their place, and must not be written to."""
    interrupted = """
import os, signal, act
step = act.preference_step
def interrupt(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    act.preference_step = step
    return step(*arguments)
act.preference_step = interrupt
act.run_as_program()
"""
    config = run_config(world, tmp_path)
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh"]
    words = [sys.executable, "-c", interrupted, "--config", config]
    assert subprocess.run([*closed, *words], env=environment(), timeout=240, check=False).returncode == 1
    assert names_in(tmp_path / "out" / "checkpoints") == {"step-1"}
    assert (tmp_path / "out" / ".lock").read_bytes() == b""
    assert run("--config", config, "--resume") == 0
    assert metrics_of(tmp_path) == metrics_of(act_run[0])


@pytest.mark.parametrize("note", ["# a note\n", '{"step": 1}{"step": 2}\n', "[]\n"])
def test_a_note_in_a_log_costs_the_report_alone(world, act_run, tmp_path, monkeypatch, capsys, note):
    def noted(result, *_):
        with open(tmp_path / "out" / "metrics.jsonl", "a") as file:
            file.write(note)
        return result

    monkeypatch.setattr(act, "preference_step", counted("preference_step", 2, noted))
    assert run("--config", run_config(world, tmp_path)) == 0
    assert_same_weights(tmp_path / "out" / "model", act_run[0] / "out" / "model")
    assert note in (tmp_path / "out" / "metrics.jsonl").read_text(), "and it stays"


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["metrics", "weights", "rename"])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(world, tmp_path, monkeypatch, capsys, place):
    config = run_config(world, tmp_path, "dpo", evaluated=False, max_steps=4, save_steps=1)

    def fill(result, run, step):
        if place == "metrics":
            monkeypatch.setattr("builtins.open", lambda name, *mode, **more: full() if "metrics" in str(name) else opened(name, *mode, **more))
        elif place == "weights":
            message = "I/O error: No space left on device (os error 28)"
            monkeypatch.setattr(gemma, "save_file", lambda *_, **__: (_ for _ in ()).throw(gemma.SafetensorError(message)))
        else:
            monkeypatch.setattr(os, "replace", full)

    opened = open
    with monkeypatch.context() as patch:
        patch.setattr(act, "save_checkpoint", counted("save_checkpoint", 2, fill))
        assert run("--config", config) == (1 if place == "metrics" else 2)
        said = capsys.readouterr().err
        monkeypatch.undo()
    assert "No space left on device" in said and len(said.splitlines()) == 1
    checkpoints = tmp_path / "out" / "checkpoints"
    assert names_in(checkpoints) - {".act-part"} == {"step-4" if place == "metrics" else "step-2"}
    assert run("--config", config, "--resume") == 0
    assert [row["step"] for row in training_rows(tmp_path)] == ([1, 2] if place == "metrics" else [1, 2, 3, 4])
    assert names_in(checkpoints) == {"step-4"}, "nothing half written is left"


def test_a_full_disk_at_the_last_evaluation_costs_what_it_had_to_say_alone(world, act_run, tmp_path, monkeypatch, capsys):
    """The model comes first; what is missing is said."""
    inner, calls = act.write_evaluation, []
    monkeypatch.setattr(act, "write_evaluation", lambda *rows: calls.append(1) or (full() if len(calls) == 2 else inner(*rows)))
    assert run("--config", run_config(world, tmp_path)) == 0
    assert "Not all was written: [Errno 28] No space left on device" in capsys.readouterr().out
    assert_same_weights(tmp_path / "out" / "model", act_run[0] / "out" / "model")
    assert {row["step"] for row in rows_of(tmp_path / "out" / "eval_samples.jsonl")} == {0}, "those before are whole"


def a_full_disk_on_rank_zero():
    if os.environ["RANK"] == "0":
        act.data.append_jsonl = full


def test_a_full_disk_ends_all_ranks_without_a_traceback(world, tmp_path):
    config = run_config(world, tmp_path, "dpo", evaluated=False, max_steps=2, per_device_train_batch_size=2)
    statuses, said = run_on_ranks(2, tmp_path, "--config", config, patch=a_full_disk_on_rank_zero)
    assert statuses == [1, 1] and "No space left on device, --resume goes on from step" in said and "Traceback" not in said, said


def no_room_for_weights_on_rank_zero():
    def full(*_, **__):
        raise act.SafetensorError("No space left on device (os error 28)")

    if os.environ["RANK"] == "0":
        act.gemma.save_file = full


def test_weights_that_one_rank_cannot_write_end_all_ranks_without_a_traceback(world, tmp_path):
    config = run_config(world, tmp_path, "dpo", evaluated=False, max_steps=2, per_device_train_batch_size=2)
    statuses, said = run_on_ranks(2, tmp_path, "--config", config, patch=no_room_for_weights_on_rank_zero)
    assert statuses == [2, 2] and "model.safetensors: No space left on device" in said and "Traceback" not in said, said


# ----------------------------------------------------------------------------------------------------------------------
# Resume means the same run; what is half removed is not there


@pytest.mark.parametrize("name", ["train", "validation"])
def test_a_data_file_that_has_changed_is_refused(killed_run, world, tmp_path, capsys, name):
    folder = copy_of(killed_run[1], tmp_path)
    text = (world / f"{name}.jsonl").read_text()
    (tmp_path / f"{name}.jsonl").write_text(text)
    config = json.loads((folder / "run.json").read_text())
    config["data_config"][f"{name}_path"] = str(tmp_path / f"{name}.jsonl")
    for path in (folder / "run.json", folder / "out" / "config.json"):
        path.write_text(json.dumps(config))
    before = files_of(folder / "out")
    (tmp_path / f"{name}.jsonl").write_text(text.replace("?", "!", 1))
    said = error_of(capsys, "--config", folder / "run.json", "--resume")
    size = len(text.encode())
    assert f"--resume: data_config.{name}_path is {size} bytes, sha256 " in said
    assert f", expected {size} bytes, sha256 " in said and "trainer_state.json" in said
    assert files_of(folder / "out") == before
    (tmp_path / f"{name}.jsonl").write_text(text)
    assert run("--config", folder / "run.json", "--resume", "--max_steps", 3) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "config.json"])
def test_a_model_that_was_replaced_is_refused(killed_run, world, tmp_path, capsys, name):
    """It is DPO's reference, and LoRA's base: neither is in a checkpoint."""
    folder = copy_of(killed_run[1], tmp_path)
    shutil.copytree(world / "model", tmp_path / "model")
    for path in (folder / "run.json", folder / "out" / "config.json"):
        config = json.loads(path.read_text())
        config["policy_model_config"]["model_path"] = str(tmp_path / "model")
        path.write_text(json.dumps(config))
    changed, before = tmp_path / "model" / name, files_of(folder / "out")
    raw = changed.read_bytes()
    changed.write_bytes(raw.replace(b'"eos_token_id": 1', b'"eos_token_id": 2') if name == "config.json" else raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    said = error_of(capsys, "--config", folder / "run.json", "--resume")
    assert f"--resume: policy_model_config.model_path/{name} is {len(raw)} bytes, " in said and f", expected {len(raw)} bytes, " in said
    assert files_of(folder / "out") == before
    changed.write_bytes(raw)
    assert run("--config", folder / "run.json", "--resume", "--max_steps", 3) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "tokenizer.model"])
def test_a_checkpoint_that_is_damaged_or_of_another_step_is_refused(killed_run, tmp_path, capsys, name):
    """trainer_state.json names the files that belong to it."""
    folder = copy_of(killed_run[1], tmp_path)
    path = folder / "out" / "checkpoints" / "step-2" / name
    raw, other = path.read_bytes(), killed_run[0] / "out" / "checkpoints" / "step-5" / name
    for damaged in (raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], raw[:-4], other.read_bytes()):
        if damaged != raw:
            path.write_bytes(damaged)
            said = error_of(capsys, "--config", folder / "run.json", "--resume")
            assert f"--resume: {name} is {len(damaged)} bytes, " in said and f"expected {len(raw)} bytes, " in said
            assert f"as in {path.with_name('trainer_state.json')}" in said and said.count("bytes, blocks") == 2
    path.unlink()
    assert f"--resume: {name} is None, expected {len(raw)} bytes, " in error_of(capsys, "--config", folder / "run.json", "--resume")


def test_an_optimisers_state_that_is_no_number_is_refused_by_name(killed_run, tmp_path, capsys):
    """Where it was saved so."""
    folder = copy_of(killed_run[1], tmp_path)
    path = folder / "out" / "checkpoints" / "step-2" / "optimizer.safetensors"
    with gemma.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    tensors["exp_avg_sq.norm.weight"][0] = math.inf
    gemma.save_file(tensors, path)
    changed_state(folder, lambda state: state.update({path.name: act.fingerprint(path)}))
    said = error_of(capsys, "--config", folder / "run.json", "--resume")
    assert f"{path}: exp_avg_sq.norm.weight holds numbers that are not finite" in said


def another_learning_rate_on_rank_one():
    load = act.load_config
    if os.environ["RANK"] == "1":
        act.load_config = lambda path, given: load(path, {**given, "learning_rate": 0.5})


def other_data_on_rank_one():
    read = data.read_bytes
    if os.environ["RANK"] == "1":
        data.read_bytes = lambda path: read(path) + b"\n"


@pytest.mark.parametrize(("patch", "said"), [
    (another_learning_rate_on_rank_one, "rank 1: training_config.learning_rate is 0.5, expected 0.001 as on rank 0"),
    (other_data_on_rank_one, "rank 1: data_config.train_path is "),
])  # fmt: skip
def test_ranks_that_would_not_train_the_same_run_are_refused(world, tmp_path, patch, said):
    config = run_config(world, tmp_path, "sft", evaluated=False)
    statuses, found = run_on_ranks(2, tmp_path, "--config", config, patch=patch)
    assert statuses == [2, 2] and said in found and "as on rank 0" in found and "Traceback" not in found, found
    assert not (tmp_path / "out").exists()


def test_a_class_balance_that_was_removed_is_noticed(world, tmp_path, capsys):
    options = {"evaluated": False, "max_steps": 3, "save_steps": 1}
    config = run_config(world, tmp_path, "dpo", class_balance={"CLARIFY": 2}, **options)
    assert run("--config", config) == 0
    config = run_config(world, tmp_path, "dpo", **options)
    said = error_of(capsys, "--config", config, "--resume")
    assert "training_config.class_balance is None, expected {'CLARIFY': 2} as in" in said
    config = run_config(world, tmp_path, "dpo", class_balance={"CLARIFY": 3}, **options)
    assert "class_balance is {'CLARIFY': 3}, expected" in error_of(capsys, "--config", config, "--resume")


@pytest.mark.parametrize(("name", "text", "said"), [
    ("checkpoints/step-2/trainer_state.json", "{", "invalid JSON"),
    ("checkpoints/step-2/trainer_state.json", "[]", "the file is a list, expected an object"),
    ("checkpoints/step-2/trainer_state.json", '{"step": 3}', "step is 2, expected 3 as in"),
    ("metrics.jsonl", "{}\n", "step is missing"),
    ("rollouts.jsonl", "[]\n", ":1 is a list, expected an object"),
])  # fmt: skip
def test_a_broken_state_or_log_is_refused_before_anything_is_rewritten(killed_run, tmp_path, capsys, name, text, said):
    folder = copy_of(killed_run[1], tmp_path)
    shutil.copytree(killed_run[0] / "out" / "model", folder / "out" / "model")  # of a run that is extended
    (folder / "out" / name).write_text(text)
    before = files_of(folder / "out")
    words = ["--config", folder / "run.json", "--resume", "--training_config.max_steps", 7]
    assert f"{folder / 'out' / name}" in (found := error_of(capsys, *words)) and said in found
    assert files_of(folder / "out") == before


def test_a_score_that_is_no_number_is_one_line(killed_run, tmp_path, capsys):
    folder = copy_of(killed_run[1], tmp_path)
    path = folder / "out" / "metrics.jsonl"
    path.write_text(re.sub(r'("eval/Trajectory-level DROP F1": )[\d.]+', r'\1"x"', path.read_text()))
    error = error_of(capsys, "--config", folder / "run.json", "--resume")
    assert f"{path}: eval/Trajectory-level DROP F1 is a string, expected a number or null" in error


@pytest.mark.parametrize("change", [lambda rows: [{"step": 0}], lambda rows: rows[1:], lambda rows: [{**row, "f1": "x"} for row in rows]])
def test_samples_that_cannot_be_compared_cost_the_comparison_alone(killed_run, tmp_path, capsys, change):
    folder = copy_of(killed_run[1], tmp_path)
    path = folder / "out" / "eval_samples.jsonl"
    write_lines(path, change([json.loads(line) for line in path.read_text().splitlines()]))
    assert run("--config", folder / "run.json", "--resume") == 0
    assert "eval_samples.jsonl is not as a run wrote it: nothing is compared" in capsys.readouterr().out
    assert (folder / "out" / "model" / "config.json").exists() and metrics_of(folder) == metrics_of(killed_run[0])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("program", ["data.py", "gemma.py"])
def test_a_stdout_that_is_full_or_closed_is_no_traceback(world, program):
    words = {"data.py": ["check", world / "train.jsonl"], "gemma.py": [world / "model", "--prompt", "get"]}[program]
    command = shlex.join(map(str, [sys.executable, ROOT / program, *words]))
    started = [
        (status, subprocess.Popen(["bash", "-c", f"set -o pipefail; {command} {where}"], text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        for where, status in ((">/dev/full", 2), (">&-", 0), ("| true", 2))
    ]  # fmt: skip
    for status, process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode in (0, status) and said.count("\n") == bool(process.returncode), said


def test_a_checkpoint_counts_by_what_is_written_last(killed_run, tmp_path):
    """Half a checkpoint, as a kill while it was removed left it in earlier versions, is none."""
    folder = copy_of(killed_run[1], tmp_path)
    (folder / "out" / "checkpoints" / "step-4").mkdir()
    shutil.copyfile(folder / "out" / "checkpoints" / "step-2" / "config.json", folder / "out" / "checkpoints" / "step-4" / "config.json")
    assert list(act.checkpoints(folder / "out")) == [2]
    assert run("--config", folder / "run.json", "--resume") == 0
    assert list(act.checkpoints(folder / "out")) == [5], "and it is in nobody's way"


def test_what_is_removed_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    def killed(path):
        (path / "a").unlink()
        raise KeyboardInterrupt

    for name in ("a", "b"):
        (tmp_path / "step-3").mkdir(exist_ok=True)
        (tmp_path / "step-3" / name).write_text(name)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        act.remove(tmp_path / "step-3")
    assert names_in(tmp_path) == {".act-old"}
    (tmp_path / "step-3").mkdir()
    act.remove(tmp_path / "step-3")
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("removed", [1, 7])
def test_a_killed_overwrite_does_not_bring_the_old_run_back(killed_run, tmp_path, monkeypatch, removed):
    """Its checkpoints go first: the next start is one from the beginning."""
    folder, remove, calls = copy_of(killed_run[1], tmp_path), act.remove, []

    def killed(path):
        if path.parent == folder / "out":
            if len(calls) == removed:
                raise KeyboardInterrupt
            calls.append(path.name)
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(act, "remove", killed)
        assert run("--config", folder / "run.json", "--overwrite") == 130
    assert calls == list(act.TRAINING_FILES[:removed]) and calls[0] == "checkpoints"
    assert names_in(folder / "out" / "checkpoints") == set()
    assert run("--config", folder / "run.json", "--resume") == 0
    assert metrics_of(folder) == metrics_of(killed_run[0])


def test_a_step_that_is_saved_already_is_not_saved_again(world, tmp_path, monkeypatch, capsys):
    """A run that stops in the step after: between removing and renaming, all would be lost."""
    removed, remove = [], act.remove
    monkeypatch.setattr(act, "remove", lambda path: removed.append(path.name) or remove(path))
    monkeypatch.setattr(act, "sft_step", counted("sft_step", 2, lambda sums, *_: sums | {"loss": math.nan}))
    assert run("--config", run_config(world, tmp_path, "sft", evaluated=False, save_steps=1, max_steps=3)) == 1
    assert ", --resume goes on from step 1" in capsys.readouterr().err
    assert removed.count("step-1") == 1


def test_data_and_models_that_were_moved_are_the_same(killed_run, world, tmp_path):
    """They are known by their content; from another working directory their paths are others too."""
    folder = copy_of(killed_run[1], tmp_path)
    shutil.copytree(world, tmp_path / "moved")
    config = (folder / "run.json").read_text().replace(str(world), str(tmp_path / "moved"))
    (folder / "run.json").write_text(config)
    assert run("--config", folder / "run.json", "--resume") == 0
    assert_same_weights(folder / "out" / "model", killed_run[0] / "out" / "model")


def test_what_a_resumed_run_may_change(one_process):
    """How far, how often, how much at once and where helpers are: not what is learnt."""
    path = ROOT / "configs" / "tiny.json"
    config = act.learnt(load_config(path))
    free = {"max_steps": 7, "eval_steps": 1, "save_total_limit": 0, "per_device_eval_batch_size": 3, "gradient_checkpointing": True}
    assert act.learnt(load_config(path, free)) == config
    for key, value in {"seed": 1, "warmup_steps": 5, "tolerance": 0.1, "half": "first", "lora_r": 2}.items():
        assert act.learnt(load_config(path, {key: value})) != config, key
    assert act.learnt(load_config(path, {"gradient_accumulation_steps": 2})) != config
