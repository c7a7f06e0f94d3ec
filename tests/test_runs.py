"""What all run folders share: atomic files, the lock, comparisons by name, the commit."""

import errno
import os
import subprocess
import sys

import pytest

from celo2_harness._runs import InUseError, first_difference, git_commit, lock_folder, provenance, replace_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"newer")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_the_lock_is_of_the_process(tmp_path):
    """Another process holds it, names itself, is killed, and the lock is free."""
    code = (
        "import sys, pathlib\nfrom celo2_harness._runs import lock_folder\n"
        "with lock_folder(pathlib.Path(sys.argv[1])):\n    print('locked', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        with pytest.raises(InUseError, match=f"process {process.pid}"), lock_folder(tmp_path):
            pass
        process.kill()
        process.wait()
    with lock_folder(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


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
    assert git_commit(package) is None  # inside of a checkout, but not of it
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert git_commit(package) == commit and len(commit) == 40
    (tmp_path / "notes").write_text("elsewhere in the checkout")
    assert git_commit(package) == commit
    (package / "code.py").write_text("2\n")
    assert git_commit(package) == commit + "+changes"


def test_provenance_says_what_made_it():
    facts = provenance()
    assert facts["versions"]["jax"] and facts["versions"]["celo2_harness"] and "cpu" in facts["device"]
    assert facts["commit"] is None or len(facts["commit"].removesuffix("+changes")) == 40
