"""Configuration and command line: what is refused, and how; what every key and command of the project does."""

import json
import re
import shlex
from dataclasses import asdict, fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from common import ROOT, config_file, error_of, pairs_of, run

import act
import data
from act import (
    ROLES,
    Config,
    DataConfig,
    HelperConfig,
    PolicyModelConfig,
    TrainingConfig,
    load_config,
)

SECTIONS = {
    "policy_model_config": PolicyModelConfig, **dict.fromkeys(("helper_config", *ROLES), HelperConfig),
    "data_config": DataConfig, "training_config": TrainingConfig,
}  # fmt: skip
KEYS = [(f"{section}.{name}", kind) for section, cls in SECTIONS.items()
        for name, kind in get_type_hints(cls, include_extras=True).items()]  # fmt: skip


def refusal(*args):
    with pytest.raises(data.InputError) as raised:
        load_config(*args)
    text = str(raised.value)
    assert "\n" not in text
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Values


def test_a_file_overrides_the_defaults_and_the_command_line_the_file(tmp_path):
    path = config_file(tmp_path, training_config={"beta": 1, "seed": 7, "class_balance": {"CLARIFY": 2}}, task="dpo")
    overrides = {"training_config.seed": "8", "training_config.learning_rate": "1e-6", "training_config.bf16": "true"}
    config = load_config(path, overrides)
    assert config.task == "dpo" and act.backend_of(config.action_model_config) == "rule"
    expected = TrainingConfig(beta=1.0, seed=8, learning_rate=1e-6, class_balance={"CLARIFY": 2}, bf16=True)
    assert config.training_config == expected and type(config.training_config.beta) is float
    config = load_config(path, {"training_config.output_dir": "a b", "task": "sft", "data_config.tolerance": "0"})
    assert (config.training_config.output_dir, config.task, config.data_config.tolerance) == ("a b", "sft", 0.0)


def test_overrides_from_python_are_values_not_texts(tmp_path):
    path = config_file(tmp_path)
    overrides = {"training_config.bf16": True, "training_config.class_balance": {"ANSWER": 0.5}, "task": "sft"}
    config = load_config(path, overrides)
    assert config.training_config == TrainingConfig(bf16=True, class_balance={"ANSWER": 0.5}) and config.task == "sft"
    assert load_config(path, {"training_config.output_dir": "7"}).training_config.output_dir == "7"
    assert "--training_config.bf16 is 1, expected" in refusal(path, {"training_config.bf16": 1})
    assert load_config(path, {"training_config.class_balance": "None"}).training_config.class_balance is None


@pytest.mark.parametrize(("task", "training", "said"), [
    ("dpo", {"action_labels": "classifier", "is_preference": True}, "files of pairs (is_preference) hold their actions"),
    ("sft", {"action_labels": "random"}, "nor with task 'sft'"),
    ("act", {"action_labels": "random", "class_balance": {"CLARIFY": 2}}, "not with class_balance"),
])  # fmt: skip
def test_action_labels_that_would_mean_nothing_are_refused(tmp_path, task, training, said):
    assert said in refusal(config_file(tmp_path, task=task, training_config=training))


def test_unknown_keys_name_the_nearest(tmp_path):
    path = config_file(tmp_path, training_config={"learning_rat": 1})
    unknown = "unknown key, the nearest known one is"
    assert refusal(path) == f"{path}: training_config.learning_rat: {unknown} training_config.learning_rate"
    assert refusal(config_file(tmp_path, trainig_config={})) == f"{path}: trainig_config: {unknown} training_config"
    path = config_file(tmp_path)
    found = refusal(path, {"data_config.train_pth": "x"})
    assert found == f"--data_config.train_pth: {unknown} data_config.train_path"
    assert f"--tsk: {unknown} task" in refusal(path, {"tsk": "sft"})
    assert "policy_model_config.model_path" in refusal(path, {"policy_model_config.path": "x"})
    assert f"{unknown} training_config" in refusal(path, {"training.beta": "1"})
    assert "--training_config: not a key but a section" in refusal(path, {"training_config": "1"})


def test_a_flag_may_leave_out_its_section_where_that_is_clear(tmp_path):
    path = config_file(tmp_path)
    config = load_config(path, {"beta": "0.1", "train_path": "elsewhere", "lora_r": "8", "task": "sft"})
    assert (config.training_config.beta, config.data_config.train_path, config.policy_model_config.lora_r) == (0.1, "elsewhere", 8)
    assert config.task == "sft"
    assert load_config(path, {"training_config.beta": "1", "beta": "2"}).training_config.beta == 2, "the last one counts"
    sections = ", --".join(f"{section}.base_url" for section in ("helper_config", *ROLES))
    assert refusal(path, {"base_url": "http://localhost"}) == f"--base_url: expected one of --{sections}"
    assert "expected one of --policy_model_config.model_path, --helper_config.model_path" in refusal(path, {"model_path": "m"})
    assert "--beta is -1, expected float from 1e-12" in refusal(path, {"beta": "-1"})


def test_in_a_file_a_key_stands_in_its_section(tmp_path):
    assert "beta: unknown key, the nearest known one is training_config.beta" in refusal(config_file(tmp_path, beta=0.1))


def test_helpers_inherit_a_section_that_is_theirs_alone(tmp_path):
    """Six flags for two roles were needed before."""
    helper = {"backend": "openai", "base_url": "http://localhost:1/v1", "model_id": "m"}
    own = {"model_id": "larger", "backend": "rule"}
    path = config_file(tmp_path, helper_config=helper, judge_model_config=own)
    config = load_config(path, {"helper_config.timeout": "7", "user_simulator_config.timeout": "9"})
    for role in ROLES:
        found = getattr(config, role)
        assert found.base_url == "http://localhost:1/v1" and found.timeout == (9 if role == "user_simulator_config" else 7)
        assert (found.model_id, found.backend) == (("larger", "rule") if role == "judge_model_config" else ("m", "openai"))
    assert "run.json: helper_config.timeout is 0, expected float from 1e-12" in refusal(config_file(tmp_path, helper_config={"timeout": 0}))


def test_overrides_that_are_no_dictionary_say_what_is_taken(tmp_path):
    for wrong in (["--training_config.beta", "1"], [("beta", 1)], "beta=1"):
        assert refusal(config_file(tmp_path), wrong) == f"overrides are {wrong!r}, expected a dictionary like {{'beta': 0.1}}"
    assert load_config(config_file(tmp_path)) == load_config(config_file(tmp_path), {})


@pytest.mark.parametrize(("key", "value", "said"), [
    ("training_config.seed", 1.5, "expected int"),
    ("training_config.seed", True, "expected int"),
    ("training_config.learning_rate", "fast", "expected float"),
    ("training_config.learning_rate", True, "expected float"),
    ("training_config.bf16", 1, "expected bool"),
    ("training_config.simulate_user", "no", "expected bool"),
    ("training_config.class_balance", [1], "expected "),
    ("training_config.beta", -0.1, "expected float from 1e-12"),
    ("training_config.beta", 0, "expected float from 1e-12"),
    ("training_config.learning_rate", 0.0, "expected float from 1e-12"),
    ("training_config.num_train_epochs", 0, "expected float from 1e-12"),
    ("policy_model_config.lora_alpha", 0, "expected float from 1e-12"),
    ("helper_config.timeout", 0, "expected float from 1e-12"),
    ("training_config.warmup_steps", -1, "expected int from 0"),
    ("training_config.max_steps", -2, "expected int from -1"),
    ("training_config.per_device_train_batch_size", 10**9, "expected int from 1 to 1048576"),
    ("training_config.per_device_eval_batch_size", 10**9, "expected int from 1 to 1048576"),
    ("training_config.gradient_accumulation_steps", 10**9, "expected int from 1 to 1048576"),
    ("training_config.max_new_tokens", 10**9, "expected int from 1 to 1048576"),
    ("training_config.max_length", 10**9, "expected int from 1 to 1048576"),
    ("training_config.num_generations", 10**9, "expected int from 1 to 1024"),
    ("policy_model_config.lora_r", 10**9, "expected int from 0 to 65536"),
    ("helper_config.max_new_tokens", 10**12, "expected int from 1 to 1048576"),
    ("helper_config.concurrency", 10**9, "expected int from 1 to 1048576"),
    ("training_config.class_balance", {"CLARIFY": 10**9}, "has 'CLARIFY': 1000000000, expected CLARIFY or ANSWER and 0 to 1000"),
    ("training_config.class_balance", {"ASK": 1}, "has 'ASK': 1, expected CLARIFY or ANSWER and 0 to 1000"),
    ("data_config.half", "third", "expected one of first, second"),
    ("training_config.metric_for_best_model", "Acuracy", "expected one of Accuracy, Macro F1"),
    ("training_config.metric_for_best_model", "Questions per Turn", "expected one of Accuracy, Macro F1"),
    ("training_config.beta", "NaN", "expected"),
    ("training_config.beta", 10**400, "expected float"),
    ("training_config.max_steps", 10**400, "expected int from -1 to 9007199254740992"),
    ("training_config.max_steps", -(10**400), "expected int from -1 to 9007199254740992"),
    ("training_config.top_k", 2**53, "expected int from 0 to 2147483648"),
    ("training_config.num_train_epochs", 1e300, "expected float from 1e-12 to 9007199254740992"),
    ("training_config.class_balance", {"CLARIFY": 10**400}, "class_balance has 'CLARIFY': 1000"),
    ("training_config.class_balance", {"CLARIFY": 1e300}, "class_balance has 'CLARIFY': 1e+300, expected CLARIFY or ANSWER"),
    ("training_config.class_balance", {"CLARIFY": "2"}, "class_balance['CLARIFY'] is a string, expected a number"),
    ("training_config.output_dir", "gs://bucket/run", "expected a path on this machine"),
    ("policy_model_config.model_path", "s3://bucket/model", "expected a path on this machine"),
    ("data_config.train_path", "a\0b", "train_path is 'a\\x00b', expected a path on this machine"),
    ("user_simulator_config.cache_path", "https://x", "expected a path on this machine"),
    ("user_simulator_config.model_id", "a\0b", "expected text in UTF-8"),
    ("training_config.per_device_train_batch_size", 0, "expected int from 1"),
    ("training_config.max_turns", 0, "expected int from 1"),
    ("training_config.loss_type", "sigmod", "expected one of sigmoid, hinge, ipo"),
    ("training_config.optim", "sgd", "expected one of rmsprop, adamw"),
    ("data_config.prompt_format", "chat", "expected one of auto, plain, gemma"),
    ("data_config.heuristic", "f1", "expected one of drop_f1, coqa_f1, exact_match"),
    ("action_model_config.backend", "gpt", "expected one of rule"),
    ("task", "train", "expected one of act, sft, dpo, generate_preference, evaluate"),
    ("training_config", 3, "expected an object"),
    ("training_config.top_p", 0, "top_p is 0, expected float from 1e-12 to 1"),
    ("training_config.top_p", 1.5, "top_p is 1.5, expected"),
    ("training_config.label_smoothing", 0.5, "expected float from 0 to 0.499"),
    ("training_config.max_prompt_length", 1024, "max_prompt_length 1024 leaves no room"),
    ("training_config.max_new_tokens", 10**6, "max_new_tokens 1000000 do not fit into max_length 1024"),
    ("policy_model_config.model_path", "", "policy_model_config.model_path is missing"),
    ("data_config.train_path", "", "data_config.train_path is missing"),
])  # fmt: skip
def test_a_wrong_value_is_refused_in_the_file_and_on_the_command_line(tmp_path, key, value, said):
    section, _, name = key.rpartition(".")
    path = config_file(tmp_path, **({section: {name: value}} if section else {name: value}))
    found = refusal(path)
    assert found.startswith(f"{path}: ") and said in found and name in found
    overridden = refusal(config_file(tmp_path), {key: value if isinstance(value, str) else json.dumps(value)})
    assert said in overridden and name in overridden


def test_half_a_character_from_the_command_line_is_refused(tmp_path):
    """A byte that is no UTF-8 comes as one."""
    for key in ("training_config.output_dir", "data_config.train_path", "user_simulator_config.model_id"):
        assert f"--{key} is 'a\\udcff', expected" in refusal(config_file(tmp_path), {key: "a\udcff"})


def test_null_is_a_path_that_is_not_set(tmp_path):
    path = config_file(tmp_path, data_config={"validation_path": None}, user_simulator_config={"cache_path": None})
    config = load_config(path, {"intent_model_config.prompt_path": None})
    assert config.data_config.validation_path == config.user_simulator_config.cache_path == ""
    assert config.intent_model_config.prompt_path == ""
    needs = "data_config.train_path is missing, task 'act' needs it"
    assert needs in refusal(config_file(tmp_path, data_config={"train_path": None}))
    assert "model_id is None, expected text" in refusal(config_file(tmp_path, judge_model_config={"model_id": None}))


@pytest.mark.parametrize(("save_steps", "eval_steps"), [(0, 0), (2, 0), (0, 1), (3, 2)])
def test_the_best_model_cannot_be_loaded_if_none_is_both_saved_and_evaluated(tmp_path, save_steps, eval_steps):
    asked = {"load_best_model_at_end": True, "save_steps": save_steps, "eval_steps": eval_steps}
    said = "load_best_model_at_end expects validation turns, and save_steps that are a multiple of eval_steps"
    assert said in refusal(config_file(tmp_path, training_config=asked))
    asked |= {"save_steps": 4, "eval_steps": 2}
    load_config(config_file(tmp_path, training_config=asked, data_config={"validation_split": 0.1}))
    assert said in refusal(config_file(tmp_path, training_config=asked))


def test_lora_settings_that_would_mean_something_else(tmp_path):
    policy = {"lora_target_modules": [["q_proj"]]}
    assert "lora_target_modules has [['q_proj']], not of" in refusal(config_file(tmp_path, policy_model_config=policy))


LITERALS = [("task", get_args(get_type_hints(Config)["task"]))]
LITERALS += [(key, get_args(kind)) for key, kind in KEYS if get_origin(kind) is Literal]


@pytest.mark.parametrize(("key", "choices"), LITERALS, ids=[key for key, _ in LITERALS])
def test_every_choice_is_accepted_and_no_other(tmp_path, key, choices):
    assert len(choices) > 1
    needed = {"data_config": {"validation_path": "v"}, "action_model_config": {"model_id": "m"}}
    path = config_file(tmp_path, **needed, judge_model_config={"model_id": "m"})
    for choice in choices:
        config = load_config(path, {key: choice})
        assert act.flat(asdict(config))[key] == choice
    found = refusal(path, {key: "neither"})
    assert found.startswith(f"--{key} is 'neither', expected one of {', '.join(filter(None, choices))}")


def test_tasks_need_their_own_files(tmp_path):
    needs = "data_config.validation_path is missing, task 'evaluate' needs it"
    assert needs in refusal(config_file(tmp_path, task="evaluate"))
    nothing = {"policy_model_config": {"model_path": ""}}
    load_config(config_file(tmp_path, task="generate_preference", **nothing))
    assert "model_path is missing, task 'sft'" in refusal(config_file(tmp_path, task="sft", **nothing))
    files = {"train_path": "", "validation_path": "v"}
    load_config(config_file(tmp_path, task="evaluate", data_config=files))
    split = {"train_path": "t", "validation_path": "", "validation_split": 0.5}
    load_config(config_file(tmp_path, task="evaluate", data_config=split))
    needs = "data_config.train_path is missing, task 'evaluate' needs it"
    assert needs in refusal(config_file(tmp_path, task="evaluate", data_config={**split, "train_path": ""}))


def test_a_config_that_is_no_json_object_is_refused(tmp_path):
    assert refusal(tmp_path / "none.json").startswith(f"{tmp_path / 'none.json'}: cannot be read")
    (tmp_path / "x.json").write_text("{")
    assert "x.json:1: invalid JSON at column 2" in refusal(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    assert "x.json: the file is a list, expected an object" in refusal(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"task": "sft", "task": "dpo"}')
    assert "the key 'task' stands twice" in refusal(tmp_path / "x.json")


# ----------------------------------------------------------------------------------------------------------------------
# Where files are


def test_a_config_is_looked_for_as_given_beside_act_py_and_in_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = load_config("tiny.json")
    assert shipped == load_config("configs/tiny.json") == load_config(ROOT / "configs" / "tiny.json")
    for path in (shipped.policy_model_config.model_path, shipped.data_config.train_path):
        assert path.startswith(str(ROOT / "configs" / "tiny")), "from any working directory"
    assert pairs_of(shipped.data_config.train_path)
    (tmp_path / "tiny.json").write_text(json.dumps({**asdict(shipped), "task": "dpo"}))
    assert load_config("tiny.json").task == "dpo", "as given comes first"


def test_a_path_that_is_there_stays_as_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "tiny").mkdir(parents=True)
    (tmp_path / "configs" / "tiny" / "train.jsonl").write_text("{}")
    config = load_config(config_file(tmp_path), {"data_config.train_path": "configs/tiny/train.jsonl"})
    assert config.data_config.train_path == "configs/tiny/train.jsonl", "one in the working directory comes first"
    config = load_config(config_file(tmp_path), {"data_config.validation_path": "configs/tiny/test.jsonl"})
    assert config.data_config.validation_path == str(ROOT / "configs/tiny/test.jsonl")
    config = load_config(config_file(tmp_path), {"data_config.validation_path": "nowhere.jsonl"})
    assert config.data_config.validation_path == "nowhere.jsonl"
    assert load_config(config_file(tmp_path)).training_config.output_dir == "output", "what is written is never moved"


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config_file(tmp_path)
    paths = {"policy_model_config.model_path": "~/m", "train_path": "~/t", "output_dir": "~/out", "helper_config.cache_path": "~/c"}
    config = load_config("~/run.json", paths)
    found = config.policy_model_config.model_path, config.data_config.train_path, config.training_config.output_dir
    assert found == tuple(str(tmp_path / name) for name in ("m", "t", "out"))
    assert config.judge_model_config.cache_path == str(tmp_path / "c")


def test_a_helpers_prompt_is_found_beside_act_py(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = {"user_simulator_config.prompt_path": "configs/prompts/user.txt"}
    found = load_config(config_file(tmp_path), prompt).user_simulator_config.prompt_path
    assert found == str(ROOT / "configs/prompts/user.txt")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_every_config_of_the_project_loads(path, capsys):
    load_config(path)
    assert capsys.readouterr().out == "", "nothing in it that is not read"


def test_the_config_as_run_loads_again(tmp_path):
    config = load_config(config_file(tmp_path, training_config={"beta": 0.2, "class_balance": {"CLARIFY": 2.0}}))
    (tmp_path / "again.json").write_text(json.dumps(asdict(config)))
    assert load_config(tmp_path / "again.json") == config


# ----------------------------------------------------------------------------------------------------------------------
# Every key


def test_every_knob_is_read():
    """Outside the room of act.py that defines and checks them."""
    source = (ROOT / "act.py").read_text(encoding="utf-8")
    start, stop = source.index("\n# Configuration\n"), source.index("\n# Processes\n")
    source = source[:start] + source[stop:] + (ROOT / "data.py").read_text(encoding="utf-8")
    readers = {
        PolicyModelConfig: "policy(_model_config)?", DataConfig: "(data_config|files)",
        TrainingConfig: "training(_config)?", HelperConfig: "(helper|config)",
    }  # fmt: skip
    for cls, names in readers.items():
        for key in fields(cls):
            found = re.search(rf'\b{names}\.{key.name}\b|"{key.name}"', source)
            assert found, f"{cls.__name__}.{key.name}: nothing reads it"
    for key in fields(Config):
        if key.name != "helper_config":  # what the others inherit
            assert re.search(rf'\bconfig\.{key.name}\b|"{key.name}"', source), f"{key.name}: nothing reads it"


def test_help_lists_every_task_flag_and_key_with_its_default(capsys):
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert "torchrun act.py --config tiny.json" in said
    for word in (*get_args(get_type_hints(Config)["task"]), "--resume", "--overwrite"):
        assert re.search(rf"^  {word} +\S", said, re.MULTILINE), word
    blocks = dict(zip(*[iter(re.split(r"^class (\w+):$", said, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert blocks.keys() == {kind.__name__ for kind in (Config, *SECTIONS.values())}
    for kind in (Config, *SECTIONS.values()):
        lines = re.findall(r"^    (\w+): .*? = (.*?)(?:  # (.+))?$", blocks[kind.__name__], re.MULTILINE)
        assert [name for name, *_ in lines] == [key.name for key in fields(kind)], "all of them, in order"
        for (name, default, about), key in zip(lines, fields(kind), strict=True):
            assert eval(default, vars(act)) == key.default, name
            named = kind is Config or name in ("optim", "lr_scheduler_type", "metric_for_best_model")
            assert about or named, f"{name}: not a word about it"


def test_command_line():
    given = ["--config", "a.json", "--task=sft", "--training_config.seed", "-1", "--resume"]
    path, overrides, flags = act.parse_arguments(given)
    assert (path, dict(overrides), flags) == ("a.json", {"task": "sft", "training_config.seed": "-1"}, {"resume"})
    for wrong in ([], ["--config"], ["a.json"], ["--config", "a", "--resume", "--overwrite"]):
        with pytest.raises(data.InputError, match="expected --config FILE .*--resume . --overwrite"):
            act.parse_arguments(wrong)


@pytest.mark.parametrize(("text", "number"), [
    (".001", 0.001), ("5.", 5.0), ("2e-5", 2e-5), ("+.5E1", 5.0), ("7", 7.0), ("1e-9", 1e-9), ("1" + "0" * 15, 1e15),
])  # fmt: skip
def test_numbers_as_people_write_them(tmp_path, text, number):
    """On the command line, and in a file as a text."""
    found = load_config(config_file(tmp_path), {"learning_rate": text}).training_config.learning_rate
    assert found == number and type(found) is float
    assert load_config(config_file(tmp_path, training_config={"learning_rate": text})).training_config.learning_rate == number


@pytest.mark.parametrize("text", ["1,5", "ten", "1e999", "Infinity", "--1", "e5", ".", ""])
def test_what_is_no_number_is_refused(tmp_path, text):
    assert "--learning_rate is " in refusal(config_file(tmp_path), {"learning_rate": text})


def test_a_value_may_look_like_another_type_on_the_command_line(tmp_path):
    path = config_file(tmp_path)
    overrides = {"training_config.output_dir": "2024", "data_config.train_path": "1.5", "training_config.beta": "1"}
    config = load_config(path, overrides)
    assert (config.training_config.output_dir, config.data_config.train_path) == ("2024", "1.5")
    assert config.training_config.beta == 1.0


@pytest.mark.parametrize("task", ["evaluate", "generate_preference"])
def test_resume_is_for_training_only(tmp_path, capsys, task):
    path = config_file(tmp_path, task=task, data_config={"validation_path": "v"})
    assert f"--resume: task '{task}' has nothing to resume" in error_of(capsys, "--config", path, "--resume")


# ----------------------------------------------------------------------------------------------------------------------
# The README


def readme_commands():
    """The words after act.py of every command in a block of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r"&&|;", line.partition(" #")[0])]
    return [shlex.split(part) for part in parts if re.match(r"\s*(torchrun|python3?)\b.*\bact\.py\b", part)]


def test_readme_has_the_two_commands_that_set_up():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -r requirements.txt" in text
    assert re.search(r"^.*torchrun act\.py --config tiny\.json\b", text, re.MULTILINE)
    assert re.search(r"^.*\bpytest\b", text, re.MULTILINE)


def test_readme_commands_parse():
    commands = readme_commands()
    assert commands
    for command in commands:
        words = command[command.index("act.py") + 1 :]
        if words == ["--help"]:
            continue
        path, overrides, _ = act.parse_arguments(words)
        shipped = any((ROOT / folder / path).exists() for folder in ("", "configs"))
        if not shipped:  # the user's own: its overrides must be keys all the same
            path = ROOT / "configs" / "tiny.json"
        try:
            load_config(path, overrides)
        except data.InputError as error:
            pytest.fail(f"{shlex.join(command)}: {error}")


@pytest.mark.parametrize(("words", "said"), [
    (["--overwritee"], "'--overwritee' without a value: expected --config FILE"),
    (["--resum"], "'--resum' without a value: expected --config FILE"),
    (["--task", "--resume"], "'--task' without a value: expected --config FILE"),
    (["--overwrite=false"], "--overwrite: unknown key"),  # a flag that takes no value, and removes files
])  # fmt: skip
def test_a_misspelt_flag_is_refused_with_what_is_expected(tmp_path, capsys, words, said):
    assert f"act.py: error: {said}" in error_of(capsys, "--config", config_file(tmp_path), *words)


@pytest.mark.parametrize(("key", "said"), [
    ("data_config.tolerance", "tolerance is 1, expected float from 0 to 0.999"),
    ("data_config.validation_split", "validation_split is 1, expected float from 0 to 0.999"),
])  # fmt: skip
def test_values_with_which_nothing_could_win_or_be_learnt_are_refused(tmp_path, key, said):
    assert said in refusal(config_file(tmp_path), {key: 1})


def test_a_rule_of_two_keys_names_the_file_and_the_flags(tmp_path):
    path = config_file(tmp_path, training_config={"max_prompt_length": 600})
    flags = {"training_config.max_length": "512", "training_config.seed": "1"}
    rule = "max_prompt_length 600 leaves no room below max_length 512 for a response"
    assert refusal(path, flags) == f"{path} with --training_config.max_length, --training_config.seed: {rule}"
    assert refusal(config_file(tmp_path, training_config={"max_length": 512, "max_prompt_length": 600})) == f"{path}: {rule}"


def test_a_key_that_the_loss_does_not_read_is_refused(tmp_path):
    smooth = {"training_config.label_smoothing": "0.1"}
    assert load_config(config_file(tmp_path), smooth).training_config.label_smoothing == 0.1
    for loss_type in ("hinge", "ipo"):
        found = refusal(config_file(tmp_path), {**smooth, "training_config.loss_type": loss_type})
        assert f"label_smoothing is set, which loss_type '{loss_type}' does not read" in found


def test_a_path_that_no_file_can_have_and_a_key_of_two_lines_are_one_line(tmp_path):
    for path in ("x" * 5000, "9" * 400):
        assert load_config(config_file(tmp_path, policy_model_config={"model_path": path})).policy_model_config.model_path == path
    found = refusal(config_file(tmp_path, data_config={"train_\npath": "t"}))
    assert r"data_config.train_\npath: unknown key" in found and len(found.splitlines()) == 1
