"""Every program in examples/ runs, in this process, and its loss falls."""

import math
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

import celo2_harness as c2

FOLDER = Path(__file__).parents[1] / "examples"
# The first runs by default; each of the others compiles the whole learned rule once more.
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
DEFAULT = ("plain_pytrees",)


@pytest.fixture
def quick_compilation():
    """Examples run few steps, so compiling well costs more than it saves."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in DEFAULT)) for n in NAMES])
def test_an_example_trains(name):
    if name == "orbax_train_state":
        pytest.importorskip("orbax.checkpoint")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="orbax")
        first, last = runpy.run_path(str(FOLDER / f"{name}.py"), run_name=name)["main"]()
    assert math.isfinite(last) and last < 0.98 * first, (first, last)


@pytest.mark.slow
def test_a_train_state_moves_to_another_mesh():
    """From two devices to four, in a process that has four."""
    pytest.importorskip("orbax.checkpoint")
    ours = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(c2.__file__).parents[1]),
    }
    program = [sys.executable, str(FOLDER / "orbax_train_state.py")]
    done = subprocess.run(program, env={**os.environ, **ours}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.findall(r"loss (\d+\.\d+)", done.stdout))
    assert last < first


def test_the_table_lists_every_example():
    listed = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == NAMES
