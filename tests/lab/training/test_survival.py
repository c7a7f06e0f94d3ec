"""What `celo2 train` and `celo2 evaluate` survive: crashes at any write, full disks, clocks, other processes."""

import itertools
import json
import os
import subprocess
import time

import optax
import pytest

from celo2_harness.lab.suites import (
    Contender,
    InputError,
    Suite,
    TrainConfig,
    run_suite,
    train,
)
from celo2_harness.lab.suites.suite import Search, SuiteOptimizer, SuiteTask
from celo2_harness.lab.training.locks import lock_folder

CONFIG = TrainConfig(steps=12, seed=1, eval_every=4, log_every=1, checkpoint_every=3)
TX = optax.adamw(1e-2)
SEARCH = Search((0.01,), (0.0,), (0, 1), (0, 1))
SUITE = Suite(
    "short",
    "",
    (SuiteTask("spell", "language_model", "tiny", 8, 4),),
    SEARCH,
    (SuiteOptimizer("adamw", "optax", "adamw", (0.01,), (0.0,)),),
    checkpoint_every=3,
)
TIMES = ("seconds", "tokens_per_second", "step_milliseconds")


class Crash(BaseException):
    """The end of the process, as far as the code under test can tell."""


def lines(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def run_train(task, out, **arguments):
    return train(task, TX, CONFIG, out, settings={"model": 1}, **arguments)


def run_evaluate(task, out, **arguments):
    contender = Contender("adamw", 0.01, TX, {"name": "adamw"})
    return run_suite(SUITE, out, make_task=lambda _: task, make_contender=lambda *_: contender, **arguments)


def resume_train(task, out, **arguments):
    return run_train(task, out, resume=(out / "metrics.jsonl").exists(), **arguments)


# Command -> how to start it or go on, and what it has at its end.
COMMANDS = {
    "train": (resume_train, lambda out: lines(out / "metrics.jsonl")[1:]),
    "evaluate": (run_evaluate, lambda out: lines(out / "runs.jsonl")),
}
commands = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture(scope="module")
def wanted(task, tmp_path_factory):
    """Of the runs that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    found = {}
    for command, (run, result) in COMMANDS.items():
        assert run(task, folder / command)
        found[command] = result(folder / command)
    return found


def test_a_checkpoint_without_its_list_is_none(task, wanted, tmp_path):
    """A kill between the two leaves a checkpoint that Orbax takes for whole."""
    run_train(task, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))  # without the line of the end
    (tmp_path / "checkpoints" / "12" / "celo2-files.json").unlink()
    started = []
    assert run_train(task, tmp_path, resume=True, on_start=started.append).status == "finished"
    assert started == [9]
    assert lines(tmp_path / "metrics.jsonl")[1:] == wanted["train"]


@commands
def test_a_disk_that_fills_up(command, task, wanted, small_disk):
    run, result = COMMANDS[command]
    out, filler = small_disk / "run", small_disk / "filler"

    def fill(progress):
        if progress.state.step == 5 and not filler.exists():
            free = os.statvfs(small_disk)
            filler.write_bytes(bytes(free.f_bavail * free.f_frsize))

    for _ in range(2):  # the second time it is full from the start
        with pytest.raises(InputError, match="^out: cannot write to .*(No space left|os_error_code='28')"):
            run(task, out, on_progress=fill)
    filler.unlink()
    assert run(task, out)
    assert result(out) == wanted[command]


@commands
def test_a_disk_that_can_only_be_read(command, task, small_disk):
    run, _ = COMMANDS[command]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match="cannot write to .*(Read-only file system)"):
        run(task, small_disk / "run")


@commands
def test_a_clock_that_runs_backwards(command, task, wanted, tmp_path, monkeypatch):
    run, result = COMMANDS[command]
    seconds = itertools.count(2e9, -3600.0)
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    assert run(task, tmp_path)
    assert result(tmp_path) == wanted[command]
    for line in (tmp_path / ("metrics.jsonl" if command == "train" else "runs.jsonl")).read_text().splitlines():
        assert json.loads(line).get("seconds", 0.0) >= 0.0
    assert next(seconds) < 2e9


@commands
def test_the_same_run_twice(command, task, wanted, tmp_path):
    run, result = COMMANDS[command]
    assert run(task, tmp_path)
    assert result(tmp_path) == wanted[command]


def test_a_second_process_is_refused(task, tmp_path):
    """Suites share a folder by claims; a run of `celo2 train` has it alone."""
    run_train(task, tmp_path, should_stop=lambda: True)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with lock_folder(tmp_path), pytest.raises(InputError, match=f"another process works in .*{os.getpid()}"):
        run_train(task, tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert run_train(task, tmp_path, resume=True).status == "finished"


def test_a_picture_that_a_kill_left_out_is_drawn(task, tmp_path):
    run_train(task, tmp_path)
    (tmp_path / "curve.png").unlink()
    assert run_train(task, tmp_path, resume=True).status == "finished"
    assert (tmp_path / "curve.png").exists()
