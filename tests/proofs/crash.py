# ruff: noqa: E402
"""Is nothing lost on a bad day? Kills at random moments and at every rename and removal, Ctrl-C, full disks, edited logs.

    python tests/proofs/crash.py [--out runs/crash] [--kills 20] [--processes 1 2]

A run of 4 steps of 32 examples in the tiny world, each with a checkpoint, on one process and on two, each of two threads
(else OMP_NUM_THREADS), with tensors so large that torch divides them between these. One process of it, by chance, is
killed (SIGKILL); `--resume` then goes on, and in the end its model must have the same bytes, and its metrics the same
values, as those of the run that nobody killed. Where an --overwrite was killed, what was there before must be
untouched, or must not come back: --resume starts again, or refuses and leaves it to another --overwrite. (On two
processes every third rename or removal is tried, which only the first of them does.)

    extended   a run that had ended goes on to 6 steps and is killed: its model/ is whole all the time, the old or the new
    log        a note is added to metrics.jsonl meanwhile: the run ends as ever, with the same model
    full disk  no file can grow from an evaluation on, as RLIMIT_FSIZE has it; with room again, --resume goes on
    Ctrl-C     as in `act.py 2>&1 | tee log`, where the reader dies first; without save_steps: the last step is saved

A case that is done is not done again: a second call goes on where the first was stopped.
"""

import argparse
import functools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # for the processes that the server makes
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on few cores, threads that wait must leave them to others

from common import SERVER, TINY, one_rank, rows_of
from safetensors.torch import load_file, save_file

import act

SAVED = 3  # the step whose save is killed: it prunes the checkpoint of step 2
LONGER = ("--training_config.max_steps", "6")


def kill_at_change(function, number, counted=""):
    """Kill this process before the rename or removal of this number in `act.function`; 0: count them in a file."""
    inner, changes = getattr(act, function), [0]
    names = ("rename", "replace", "unlink", "rmdir")

    def changing(change):
        def wrapped(*args, **options):
            changes[0] += 1
            if changes[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **options)

        return wrapped

    def armed(*args, **options):
        if function == "save_checkpoint" and args[1] != SAVED:
            return inner(*args, **options)
        before = {name: getattr(os, name) for name in names}
        for name, change in before.items():
            setattr(os, name, changing(change))
        result = inner(*args, **options)
        for name, change in before.items():
            setattr(os, name, change)
        if counted and act.is_main():
            Path(counted).write_text(str(changes[0]))
        return result

    setattr(act, function, armed)


def start(count, folder, *words, patch=None):
    """act.py on `count` processes: the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--config", str(folder / "run.json"), *words]
    (folder / "log").unlink(missing_ok=True)
    arguments = [(rank, count, port, folder / "log", words, patch) for rank in range(count)]
    ranks = [SERVER.Process(target=one_rank, args=each) for each in arguments]
    for process in ranks:
        process.start()
    return ranks


def statuses(ranks, seconds=240):
    """Their exit statuses; one that does not end is killed and has None."""
    for process in ranks:
        process.join(seconds)
    found = [process.exitcode for process in ranks]
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()
    return found


def write_config(count, folder, data):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = json.loads((ROOT / "configs" / "tiny.json").read_text(encoding="utf-8"))
    config["policy_model_config"]["model_path"] = str(TINY / "sft")
    config["data_config"] = {name + "_path": str(data / f"{name}.jsonl") for name in ("train", "validation")}
    steps = {"max_steps": 4, "save_steps": 1, "eval_steps": 3, "per_device_train_batch_size": 32 // count}
    config["training_config"] |= {"output_dir": str(folder / "out"), "temperature": 0.7, **steps}
    (folder / "run.json").write_text(json.dumps(config))


def result_of(folder):
    """What must be the same: the model's bytes and the metrics but for the clock's; None where one is missing."""
    weights, metrics = folder / "out" / "model" / "model.safetensors", folder / "out" / "metrics.jsonl"
    if not weights.exists() or not metrics.exists():
        return None
    rows = [{key: x for key, x in row.items() if not key.startswith("seconds/")} for row in rows_of(metrics)]
    return weights.read_bytes(), rows


def files_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def resume(count, folder, whole, *words):
    """How the run in `folder` goes on: in words, "same" being what is wanted."""
    found = statuses(start(count, folder, "--resume", *words))
    if found == [2] * count and "--overwrite" in (folder / "log").read_text():
        again = statuses(start(count, folder, "--overwrite"))
        return "refused, then same" if again == [0] * count and result_of(folder) == result_of(whole) else "LOST"
    if found != [0] * count:
        return f"FAILED {found}"
    return "same" if result_of(folder) == result_of(whole) else "OTHER"


def killed_at_random(count, folder, whole, seconds, rng):
    ranks = start(count, folder)
    time.sleep(rng.uniform(0, seconds))
    rng.choice(ranks).kill()
    statuses(ranks, 5)  # torchrun ends those that do not notice, as before they have met
    return resume(count, folder, whole)


def killed_at_save(count, folder, whole, number):
    statuses(start(count, folder, patch=functools.partial(kill_at_change, "save_checkpoint", number)))
    return resume(count, folder, whole)


def killed_at_overwrite(count, folder, whole, number):
    """Over a run of the same configuration, but with other weights in its checkpoint: what comes back is seen."""
    shutil.copytree(whole / "out", folder / "out")
    weights = next((folder / "out" / "checkpoints").glob("step-*")) / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(weights).items()}, weights)
    before = files_of(folder / "out")
    statuses(start(count, folder, "--overwrite", patch=functools.partial(kill_at_change, "clear_output", number)))
    return "untouched" if files_of(folder / "out") == before else resume(count, folder, whole)


def killed_while_extended(count, folder, whole, extended, seconds, rng):
    shutil.copytree(whole / "out", folder / "out")
    ranks = start(count, folder, "--resume", *LONGER)
    time.sleep(rng.uniform(0, seconds))
    rng.choice(ranks).kill()
    statuses(ranks, 5)
    left, models = result_of(folder), [result_of(each)[0] for each in (whole, extended)]
    if left is None or left[0] not in models:
        return "LOST its model"
    return resume(count, folder, extended, *LONGER)


def started(folder, finished):
    """Wait until a run has written its first evaluation."""
    while not (folder / "out" / "metrics.jsonl").exists() and not finished():
        time.sleep(0.02)


def with_a_note_in_its_log(count, folder, whole, seconds, rng):
    ranks, metrics = start(count, folder), folder / "out" / "metrics.jsonl"
    started(folder, lambda: not any(rank.is_alive() for rank in ranks))
    time.sleep(rng.uniform(0, seconds))
    with open(metrics, "a", encoding="utf-8") as file:
        file.write(rng.choice(["# a note\n", "[]\n", '{"step": 1}{"step": 2}\n']))
    found = statuses(ranks)
    if found != [0] * count:
        return f"FAILED {found}"
    model = folder / "out" / "model" / "model.safetensors"
    return "same" if model.read_bytes() == result_of(whole)[0] else "OTHER"


def no_room_from(number):
    """Evaluation of this number on, no file may be longer than 1,000 bytes."""
    inner, calls = act.evaluate_pairs, []

    def evaluate(*arguments):
        calls.append(1)
        if len(calls) == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return inner(*arguments)

    act.evaluate_pairs = evaluate


def with_a_full_disk(count, folder, whole, number):
    found = statuses(start(count, folder, patch=functools.partial(no_room_from, number)))
    if any(status not in (1, 2, -signal.SIGTERM) for status in found) or "Traceback" in (folder / "log").read_text():
        return f"FAILED {found}"
    return resume(count, folder, whole)


def interrupted_through_a_pipe(count, folder, whole, seconds, rng):
    reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    words = [sys.executable, ROOT / "act.py", "--config", folder / "run.json", "--training_config.save_steps", "0"]
    program = subprocess.Popen(words, stdout=reader.stdin, stderr=subprocess.STDOUT)
    reader.stdin.close()
    started(folder, lambda: program.poll() is not None)
    time.sleep(rng.uniform(0, seconds))
    for process in (reader, program):
        process.send_signal(signal.SIGINT)
        process.wait(60)
    steps = [row["step"] for row in rows_of(folder / "out" / "metrics.jsonl") if "loss" in row]
    saved = act.checkpoints(folder / "out")
    if program.returncode == 1 and steps and steps[-1] not in saved:
        return f"LOST step {steps[-1]}"
    return resume(count, folder, whole) if program.returncode in (0, 1) else f"FAILED {program.returncode}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/crash", help="where the runs are, and what was found so far")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=20, help="tries at random moments, of each kind")
    given = parser.parse_args()
    out = Path(given.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 20), ("validation", 1)):
        lines = (TINY / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (out / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    forkserver.ensure_running()
    results, found = out / "results.jsonl", {}
    if results.exists():
        found = {tuple(key): said for key, said in rows_of(results)}

    for count in given.processes:
        whole, cases, changes, every = out / f"whole-{count}", [], {}, 1 if count == 1 else 3
        write_config(count, whole, out)
        seconds = []
        for function in ("save_checkpoint", "clear_output"):  # two whole runs: the second has everything loaded
            began, counted = time.monotonic(), out / function
            patch = functools.partial(kill_at_change, function, 0, str(counted))
            assert statuses(start(count, whole, "--overwrite", patch=patch)) == [0] * count, (whole / "log").read_text()
            seconds.append(time.monotonic() - began)
            changes[function] = int(counted.read_text())
        extended = out / f"extended-{count}"
        write_config(count, extended, out)
        shutil.copytree(whole / "out", extended / "out")
        assert statuses(start(count, extended, "--resume", *LONGER)) == [0] * count, (extended / "log").read_text()
        tries = [(i, seconds[-1], random.Random(f"{count}/{i}")) for i in range(given.kills)]
        cases += [("at random", killed_at_random, i, timing) for i, *timing in tries]
        cases += [("while extended", killed_while_extended, i, (extended, *timing)) for i, *timing in tries]
        cases += [("log edited", with_a_note_in_its_log, i, timing) for i, *timing in tries[: given.kills // 4 + 1]]
        cases += [("full disk", with_a_full_disk, i, (i,)) for i in (1, 2, 3)]
        if count == 1:
            cases += [("Ctrl-C in a pipe", interrupted_through_a_pipe, i, timing) for i, *timing in tries]
        cases += [("in a save", killed_at_save, i + 1, (i + 1,)) for i in range(0, changes["save_checkpoint"], every)]
        cases += [("in --overwrite", killed_at_overwrite, i + 1, (i + 1,)) for i in range(0, changes["clear_output"], every)]
        for kind, kill, number, arguments in cases:
            key = (kind, count, number)
            if key in found:
                continue
            folder = out / "killed"
            write_config(count, folder, out)
            found[key] = kill(count, folder, whole, *arguments)
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps([key, found[key]]) + "\n")
            print(f"{kind}, {count} processes, {number}: {found[key]}", flush=True)

    print("\n| how | processes | cases | same bits in the end | untouched | refused, then same | lost |\n|---|---|---|---|---|---|---|")
    for kind, count in dict.fromkeys((kind, count) for kind, count, _ in found):
        said = Counter(words for key, words in found.items() if key[:2] == (kind, count))
        fine = [said.pop(words, 0) for words in ("same", "untouched", "refused, then same")]
        print(f"| {kind} | {count} | {sum(fine) + said.total()} | {' | '.join(map(str, fine))} | {said.total()} {dict(said) or ''} |")
    return any(words.startswith(("FAILED", "LOST", "OTHER")) for words in found.values())


if __name__ == "__main__":
    sys.exit(main())
