"""Run folders: what is written, what a stop or a kill leaves, and what is refused."""

import errno
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.training.checkpoints import fit_to, read_checkpoint, write_checkpoint
from celo2_harness.lab.training.folder import Progress, open_run, read_header
from celo2_harness.lab.training.locks import Claims, append_line, lock_folder
from celo2_harness.lab.training.provenance import git_commit, provenance
from celo2_harness.lab.training.settings import first_difference
from celo2_harness.weights.files import replace_file

SETTINGS = {"model": {"width": 8}, "widths": (1, 2)}


def count(step, state):
    """A run whose state is twice its step."""
    while step < 10:
        step, state = step + 1, {"x": state["x"] + 2.0}
        yield Progress(step, state, ({"loss": float(state["x"][0])},), text=lambda: "fine")


def run(folder, resume=False, generator=count, **arguments):
    with open_run(folder, SETTINGS, options={"speed": 1}, resume=resume) as opened:
        step, state = opened.begin({"x": jnp.zeros(3)})
        return step, opened.follow(generator(step, state), steps=10, checkpoint_every=3, **arguments)


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def test_a_run_from_its_first_line_to_its_last(tmp_path):
    shown = []
    assert run(tmp_path, on_progress=lambda now: shown.append(now.text())) == (0, "finished")
    header, *body = lines(tmp_path)
    assert header["settings"] == {"model": {"width": 8}, "widths": [1, 2]} and header["options"] == {"speed": 1}
    assert {"versions", "device", "commit"} <= set(header) and read_header(tmp_path)["options"] == {"speed": 1}
    assert body[:2] == [{"kind": "progress", "step": step, "loss": 2.0 * step} for step in (1, 2)]
    assert body[-1] == {"kind": "end", "step": 10, "status": "finished"} and shown == ["fine"] * 10
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "00000009.checkpoint",
        "00000010.checkpoint",
    ]


@pytest.mark.parametrize("stop", [1, 3, 8])
def test_a_stopped_and_a_killed_run_go_on_to_the_same_numbers(tmp_path, stop):
    run(tmp_path / "whole")
    asked = iter(range(100))
    assert run(tmp_path / "part", should_stop=lambda: next(asked) == stop - 1) == (0, "interrupted")

    def killed(now):
        if now.step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", resume=True, on_progress=killed)
    with (tmp_path / "part" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "progr')  # As a kill would leave it.
    assert run(tmp_path / "part", resume=True) == (8 if stop == 8 else 6, "finished")
    assert lines(tmp_path / "part")[1:] == lines(tmp_path / "whole")[1:]


def test_a_run_that_diverges_ends_and_numbers_that_are_none_become_null(tmp_path):
    def diverging(step, state):
        yield Progress(1, state, ({"loss": {"a": float("nan"), "b": [float("inf"), 1.0]}},), diverged=True)

    assert run(tmp_path, generator=diverging) == (0, "diverged")
    assert lines(tmp_path)[1:] == [
        {"kind": "progress", "step": 1, "loss": {"a": None, "b": [None, 1.0]}},
        {"kind": "end", "step": 1, "status": "diverged"},
    ]


def test_what_is_refused_changes_nothing(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        run(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    run(tmp_path, should_stop=lambda: True)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        run(tmp_path)
    with (
        pytest.raises(InputError, match="model.width is 8 there and 16 here"),
        open_run(tmp_path, SETTINGS | {"model": {"width": 16}}, resume=True),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"checkpoint .* \['x'\] is float32\[3\] there and float32\[4\] here"),
        open_run(tmp_path, SETTINGS, resume=True) as opened,
    ):
        opened.begin({"x": jnp.zeros(4)})
    with lock_folder(tmp_path), pytest.raises(InputError, match=f"another process works in .*{os.getpid()}"):
        run(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    (tmp_path / "metrics.jsonl").write_bytes(before + b'{"kind": "progress"}\n')
    with pytest.raises(InputError, match="damaged: line 3 is no line of a run"):
        run(tmp_path, resume=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="does not start with the header"):
        run(tmp_path, resume=True)


def test_a_full_disk_says_what_is_safe(tmp_path, monkeypatch):
    real = os.fsync

    def full(descriptor):
        if (tmp_path / "checkpoints" / "00000003.checkpoint").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left on device; the run is safe up to step 3"):
            run(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
    assert run(tmp_path, resume=True) == (3, "finished")


def test_a_checkpoint_has_every_bit(tmp_path, key):
    tree = {
        "float32": jax.random.normal(key, (3, 4)),
        "bfloat16": jnp.array([1.5, jnp.nan], jnp.bfloat16),
        "scalar": jnp.array(7, jnp.int32),
        "empty": jnp.zeros((0, 2)),
        "key": key,
    }
    path = tmp_path / "a.checkpoint"
    write_checkpoint(path, tree, {"settings": 1})
    facts, arrays = read_checkpoint(path)
    restored = fit_to(jax.eval_shape(lambda: tree), arrays, "it")
    assert facts == {"settings": 1} and restored["key"] == tree.pop("key")
    for name, leaf in tree.items():
        assert restored[name].dtype == leaf.dtype
        assert np.asarray(restored[name]).tobytes() == np.asarray(leaf).tobytes()


@pytest.mark.parametrize("damage", ["cut", "changed", "header", "nothing"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "a.checkpoint"
    write_checkpoint(path, {"x": jnp.arange(100.0)}, {})
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 1
    if damage == "header":
        content[3] ^= 1
    path.write_bytes(content[: {"cut": -1, "nothing": 0}.get(damage, len(content))])
    with pytest.raises(InputError, match="checkpoint .*a.checkpoint cannot be read .*; remove it"):
        read_checkpoint(path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"old")
    replace_file(path, iter([b"ne", b"w"]))

    def failing():
        yield b"newer"
        raise OSError("No space left")

    with pytest.raises(OSError, match="No space left"):
        replace_file(path, failing())
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_locks_and_claims_are_of_a_process_and_end_with_it(tmp_path):
    code = (
        "import sys, pathlib\nfrom celo2_harness.lab.training.locks import Claims, lock_folder\n"
        "folder = pathlib.Path(sys.argv[1])\nclaims = Claims(folder / 'claims')\n"
        "with lock_folder(folder):\n    print(claims.take('run 1'), flush=True)\n    sys.stdin.read()"
    )
    claims = Claims(tmp_path / "claims")
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        with pytest.raises(InputError, match=f"process {process.pid}"), lock_folder(tmp_path):
            pass
        assert not claims.take("run 1") and claims.take("run 2")
        process.kill()
        process.wait()
    with lock_folder(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n" and claims.take("run 1")
    claims.close()


def test_a_line_of_another_process_is_not_run_into(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_line(path, '{"a": 1}')
    with path.open("a") as file:
        file.write('{"b": ')
    append_line(path, '{"c": 2}')
    assert path.read_text() == '{"a": 1}\n{"c": 2}\n'


def test_first_difference():
    assert first_difference({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [1]}}) is None
    assert first_difference({"b": {"c": [1]}}, {"b": {"c": [2]}}) == ("b.c", [1], [2])
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ("b", "absent", 2)
    assert first_difference({"a": {"x": 1}}, {}) == ("a", {"x": 1}, "absent")


def test_the_commit_is_that_of_the_files(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        try:
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        except OSError:
            pytest.skip("there is no git")

    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("1\n")
    assert git_commit(package) is None
    git("init", "-q")
    assert git_commit(package) is None  # Inside of a checkout, but not tracked by it.
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert git_commit(package) == commit and len(commit) == 40
    (package / "code.py").write_text("2\n")
    assert git_commit(package) == commit + "+changes"
    facts = provenance()
    assert facts["versions"]["jax"] and facts["versions"]["celo2_harness"] and "cpu" in facts["device"]
