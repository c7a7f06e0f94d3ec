"""A downstream program passes pyright and mypy in strict mode, and runs, against the installed wheel."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "tests" / "downstream"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the program beside an environment with the wheel in it, and this one's libraries but not its source."""
    folder = tmp_path_factory.mktemp("downstream")
    shutil.copytree(PROJECT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    run = lambda *command: subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    run("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist"))
    run("-m", "venv", "--without-pip", str(folder / "venv"))
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (wheel,) = (folder / "dist").glob("*.whl")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(packages), str(wheel))
    # Folders named in a .pth file are searched, but their own .pth files (an editable install's) are not read.
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder


def run(project, *command, check=True):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")} | {
        "JAX_PLATFORMS": "cpu"
    }
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done.stdout


def python(project):
    return str(project / "venv" / "bin" / "python")


def test_it_runs(project):
    program = (
        "import celo2_harness, jax.numpy as jnp; from downstream import train as t; from pathlib import Path;"
        "print(celo2_harness.__file__); print(t.train(2)); print(t.report({'kernel': jnp.ones((4, 4))}));"
        "print(t.save(Path('w.state'), celo2_harness.load_weights('celo2'))); t.make_preset()"
    )
    out = run(project, python(project), "-c", program)
    assert out.splitlines()[0].startswith(str(project / "venv")), "not the wheel"


def test_pyright(project):
    checker = [sys.executable, "-m", "pyright", "--pythonpath", python(project), "--outputjson"]
    report = json.loads(run(project, *checker, "downstream/train.py", check=False))
    errors = [f"{d['file']}:{d['range']['start']['line'] + 1}: {d['message']}" for d in report["generalDiagnostics"]]
    assert not errors, "\n".join(errors)
    assert report["summary"]["filesAnalyzed"] == 1


def test_mypy(project):
    checker = [sys.executable, "-m", "mypy", "--python-executable", python(project)]
    assert "Success: no issues found in 1 source file" in run(project, *checker, "downstream/train.py")


def marked(project):
    lines = (project / "downstream" / "mistakes.py").read_text().splitlines()
    return {i for i, line in enumerate(lines, start=1) if line.endswith("# mistake")}


def test_pyright_finds_mistakes(project):
    checker = [sys.executable, "-m", "pyright", "--pythonpath", python(project), "--outputjson"]
    report = json.loads(run(project, *checker, "downstream/mistakes.py", check=False))
    assert {d["range"]["start"]["line"] + 1 for d in report["generalDiagnostics"]} == marked(project)


def test_mypy_finds_mistakes(project):
    checker = [sys.executable, "-m", "mypy", "--python-executable", python(project)]
    out = run(project, *checker, "downstream/mistakes.py", check=False)
    assert {int(line) for line in re.findall(r"mistakes\.py:(\d+): error", out)} == marked(project)
