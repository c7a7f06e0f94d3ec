"""What a run survives: crashes at any write, damaged checkpoints, full disks, another machine."""

import dataclasses
import errno
import itertools
import json
import os
import stat
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import META_CONFIG, assert_trees_equal

import celo2_harness as c2
from celo2_harness.lab.metatrain import (
    Evaluation,
    RunError,
    card,
    checkpoints,
    load_portable,
    read_evaluations,
    run_metatrain,
    select_weights,
)
from celo2_harness.weights import files as _runs

CONFIG = dataclasses.replace(META_CONFIG, iterations=4)
EVERY = {"log_every": 1, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def theta(images, tmp_path_factory):
    """Of the run that nothing happened to."""
    return run_metatrain(CONFIG, images, tmp_path_factory.mktemp("runs") / "whole").theta


class Crash(BaseException):
    """The end of the process, as far as the code under test can tell."""


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_a_crash_at_any_write(moment, images, theta, tmp_path, monkeypatch):
    """The run crashes before, within or after its first write, is resumed and crashes at the next, and so on."""
    countdown = 0

    def crashing(source, target):
        nonlocal countdown
        countdown -= 1
        if countdown >= 0:
            return os.replace(source, target)
        if moment == "half":
            os.truncate(source, os.path.getsize(source) // 2)  # what is on the disk of a file that was not closed yet
        if moment == "after":
            os.replace(source, target)
        raise Crash

    crashes, weights = 0, None
    while weights is None:
        # One write more each time: else a run whose first write crashes would never get on.
        countdown = crashes % 5
        monkeypatch.setattr(_runs, "os", SimpleNamespace(**{**vars(os), "replace": crashing}))
        try:
            started = (tmp_path / "metrics.jsonl").exists()
            weights = run_metatrain(CONFIG, images, tmp_path, resume=started, **EVERY)
        except Crash:
            crashes += 1
        assert crashes < 40
    assert crashes >= 5
    assert_trees_equal(weights.theta, theta)
    assert_trees_equal(c2.load_weights(tmp_path / "weights.celo2").theta, theta)


def stopped_after(images, out, iterations):
    """A run that was stopped after some iterations, with a checkpoint of each."""
    done = []
    assert run_metatrain(CONFIG, images, out, on_log=done.append, stop=lambda: len(done) >= iterations, **EVERY) is None
    return sorted((out / "checkpoints").iterdir())


DAMAGE = {
    "cut short": lambda content: content[:-100],
    "one bit": lambda content: content[:-200] + bytes([content[-200] ^ 1]) + content[-199:],
    "empty": lambda content: b"",
    "something else": lambda content: b"{}",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(name, images, theta, tmp_path):
    before, newest = stopped_after(images, tmp_path, 3)
    newest.write_bytes(DAMAGE[name](newest.read_bytes()))
    warned, started = [], []
    weights = run_metatrain(CONFIG, images, tmp_path, resume=True, warn=warned.append, on_start=started.append, **EVERY)
    assert started == [2] and len(warned) == 1
    assert str(newest) in warned[0] and "00000003.msgpack.damaged" in warned[0]
    assert_trees_equal(weights.theta, theta)


def test_no_checkpoint_left(images, tmp_path):
    for path in stopped_after(images, tmp_path, 2):
        path.write_bytes(path.read_bytes()[:-1])
    with (
        pytest.warns(UserWarning, match="damaged or cut"),
        pytest.raises(RunError, match="none of 2 checkpoints"),
    ):
        run_metatrain(CONFIG, images, tmp_path, resume=True)
    with pytest.raises(RunError, match="nothing to resume .checkpoints/ holds no checkpoint"):
        run_metatrain(CONFIG, images, tmp_path, resume=True)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_leaves_the_last_checkpoint(failing, images, theta, tmp_path, monkeypatch):
    stopped_after(images, tmp_path, 2)
    calls = 0

    def full(descriptor):
        nonlocal calls
        calls += stat.S_ISREG(os.fstat(descriptor).st_mode)
        if calls >= failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    # The files of a resumed run: metrics, then a checkpoint and the portable form per iteration.
    safe = {1: 2, 2: 2, 3: 3}[failing]

    with monkeypatch.context() as patch:
        patch.setattr(_runs, "os", SimpleNamespace(**{**vars(os), "fsync": full}))
        with pytest.raises(RunError, match=f"cannot write .No space left.* safe up to iteration {safe} .checkpoints"):
            run_metatrain(CONFIG, images, tmp_path, resume=True, **EVERY)
    assert not list(tmp_path.rglob("*.partial"))
    assert_trees_equal(run_metatrain(CONFIG, images, tmp_path, resume=True, **EVERY).theta, theta)


def test_a_disk_that_fills_up(images, theta, small_disk):
    out = small_disk / "run"

    def fill(line):
        if line["iteration"] == 2:
            free = os.statvfs(small_disk)
            (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize))

    message = "cannot write .No space left on device.. The run is safe up to iteration 1 "
    with pytest.raises(RunError, match=message):
        run_metatrain(CONFIG, images, out, on_log=fill, **EVERY)
    with pytest.raises(RunError, match="cannot write"):
        run_metatrain(CONFIG, images, out, resume=True, **EVERY)
    (small_disk / "filler").unlink()
    assert_trees_equal(run_metatrain(CONFIG, images, out, resume=True, **EVERY).theta, theta)


def test_a_disk_that_can_only_be_read(images, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(RunError, match="cannot write .*Read-only file system"):
        run_metatrain(CONFIG, images, small_disk / "run")


def test_a_clock_that_runs_backwards(images, theta, tmp_path, monkeypatch):
    seconds = itertools.count(2e9, -3600.0)
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    assert_trees_equal(run_metatrain(CONFIG, images, tmp_path, **EVERY).theta, theta)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[1:]]
    assert all(line["seconds"] >= 0 for line in lines)


def test_a_changed_recipe_in_the_metrics_is_noticed(images, theta, tmp_path):
    """The metrics have no checksum; what the checkpoint says counts."""
    stopped_after(images, tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('"sigma": 0.01', '"sigma": 0.02'))
    assert path.read_text() != whole
    with pytest.raises(RunError, match="its header says config.sigma = 0.02, the checkpoint 0.01"):
        run_metatrain(dataclasses.replace(CONFIG, sigma=0.02), images, tmp_path, resume=True, **EVERY)
    path.write_text(whole)
    assert_trees_equal(run_metatrain(CONFIG, images, tmp_path, resume=True, **EVERY).theta, theta)


def test_a_kill_between_weights_and_card_leaves_nothing_out(images, theta, tmp_path, monkeypatch):
    def killed(path, weights):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(card, "save_rule", killed)
        with pytest.raises(Crash):
            run_metatrain(CONFIG, images, tmp_path, **EVERY)
    assert_trees_equal(run_metatrain(CONFIG, images, tmp_path, resume=True, **EVERY).theta, theta)
    assert (tmp_path / "weights.md").exists() and (tmp_path / "weights.celo2").exists()


def test_an_unwritable_folder(images, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*file/run \(Not a directory\).*give another folder"):
        run_metatrain(CONFIG, images, tmp_path / "file" / "run")


def test_the_portable_form_goes_on_elsewhere(images, theta, tmp_path):
    stopped_after(images, tmp_path / "first", 3)
    file = tmp_path / "elsewhere.msgpack"
    (tmp_path / "first" / "portable.msgpack").rename(file)
    assert file.stat().st_size < 20_000
    saved = load_portable(file)
    assert saved.config == CONFIG and saved.iteration == 3
    lines, started = [], []
    weights = run_metatrain(
        CONFIG, images, tmp_path / "second", continue_from=file, on_log=lines.append, on_start=started.append, **EVERY
    )
    assert started == [3] and [line["iteration"] for line in lines] == [4]
    # The optimizer's moments came along, so this is a step of its usual size from the saved theta, on other tasks.
    step = np.abs(weights.theta.w0 - saved.theta.w0)
    assert 0 < step.max() < 3 * CONFIG.outer_learning_rate
    assert np.any(weights.theta.w0 != theta.w0)
    assert weights.provenance["continue_from"] == str(file)
    # The new run needs the file no longer.
    file.unlink()
    again = run_metatrain(CONFIG, images, tmp_path / "second", resume=True)
    assert_trees_equal(again.theta, weights.theta)


def test_the_portable_form_is_checked(images, tmp_path):
    stopped_after(images, tmp_path / "run", 1)
    file = tmp_path / "run" / "portable.msgpack"
    go_on = lambda config, source=file: run_metatrain(config, images, tmp_path / "new", continue_from=source)
    with pytest.raises(RunError, match=r"theta.*w0.* is float32 \(2, 2\), this run has float32 \(2, 3\)|\(2, 3\)"):
        go_on(dataclasses.replace(CONFIG, hidden=3))
    with pytest.raises(RunError, match="its rule is RuleConfig"):
        go_on(dataclasses.replace(CONFIG, rule=dataclasses.replace(CONFIG.rule, second_moment_decay=0.9)))
    with pytest.raises(RunError, match="1 iterations are done, iterations = 1"):
        go_on(dataclasses.replace(CONFIG, iterations=1))
    content = checkpoints._unpack(file)
    other = tmp_path / "other.msgpack"
    other.write_bytes(checkpoints._pack(content | {"state": content["state"] | {"outer": {"0": {}}}}))
    with pytest.raises(RunError, match="other.msgpack: another structure than this run has"):
        go_on(CONFIG, other)
    header = json.loads(content["header"])
    header["config"]["speed"] = 1
    other.write_bytes(checkpoints._pack(content | {"header": json.dumps(header)}))
    with pytest.raises(RunError, match="other.msgpack: not a configuration of this version .*speed"):
        go_on(CONFIG, other)
    with pytest.raises(RunError, match="none: cannot be read .No such file"):
        go_on(CONFIG, tmp_path / "none")
    with pytest.raises(RunError, match="not a file of a meta-training run"):
        go_on(CONFIG, tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(RunError, match="exclude each other"):
        run_metatrain(CONFIG, images, tmp_path / "new", continue_from=file, start_from="celo2")
    assert not (tmp_path / "new" / "metrics.jsonl").exists()


def test_evaluations_and_selection(images, theta, tmp_path):
    """The score is the size of theta's first row, which anybody can compute again from the snapshots."""
    size = lambda weights: float(np.abs(weights.theta.w0[0]).sum())
    calls, records = [], []

    def score(weights):
        calls.append(weights.provenance["iterations"])
        return None if len(calls) == 2 else float("nan") if len(calls) == 4 else size(weights)

    evaluation = Evaluation(2, {"steps": 7}, score)
    options = {"evaluation": evaluation, "on_evaluation": records.append}
    assert run_metatrain(CONFIG, images, tmp_path, **options) is None  # stopped in its second evaluation
    weights = run_metatrain(CONFIG, images, tmp_path, resume=True, **options)
    assert calls == [0, 2, 2, 4]  # what was stopped is done again, and nothing else
    assert_trees_equal(weights.theta, theta)
    assert read_evaluations(tmp_path) == records
    assert [record["iteration"] for record in records] == [0, 2, 4] and records[2]["score"] is None
    sizes = [size(c2.load_weights(tmp_path / record["snapshot"])) for record in records]
    assert [record["score"] for record in records[:2]] == sizes[:2]

    selected = select_weights(tmp_path)
    best = int(np.argmin(sizes[:2]))
    assert selected.provenance["iterations"] == records[best]["iteration"]
    written = c2.load_weights(tmp_path / "weights.celo2")
    assert_trees_equal(written.theta, c2.load_weights(tmp_path / records[best]["snapshot"]).theta)
    assert written.provenance["selected"] == {"score": sizes[best], "of": 3, "evaluation": {"steps": 7}}
    card = (tmp_path / "weights.md").read_text()
    assert f"| theta of iteration {records[best]['iteration']} of 4" in card
    assert f"the best of 3 evaluated thetas, score {sizes[best]:.4f} (steps 7)" in card
    # Resuming a finished run does not undo the choice.
    assert_trees_equal(run_metatrain(CONFIG, images, tmp_path, resume=True).theta, written.theta)


def test_evaluations_are_of_one_kind(images, tmp_path):
    stopped_after(images, tmp_path / "run", 1)
    go_on = lambda **settings: run_metatrain(
        CONFIG, images, tmp_path / "run", resume=True, evaluation=Evaluation(1, settings, lambda weights: 1.0)
    )
    with pytest.raises(RunError, match="none with a score"):
        select_weights(tmp_path / "run")
    go_on(steps=7)
    (tmp_path / "run" / "weights.celo2").unlink()
    with pytest.raises(RunError, match="evaluated with steps = 7, asked for 8"):
        go_on(steps=8)
