"""Every program in examples/ runs, in this process, and its loss falls."""

import math
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
# Two run by default; each of the others compiles the learned rule once more.
DEFAULT = ("nnx_text", "plain_factors")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in DEFAULT)) for n in NAMES])
def test_an_example_trains(name):
    first, last = runpy.run_path(str(FOLDER / f"{name}.py"), run_name=name)["main"]()
    assert math.isfinite(last) and last < 0.98 * first, (first, last)
