"""What is released: content and size of wheel and sdist, one version, files that go with them."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import celo2_harness as c2

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "celo2_harness"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_is_small_and_complete(built):
    wheel, _ = built
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as file:
        inside = {name for name in file.namelist() if name.startswith("celo2_harness/")}
        others = {name.split("/")[0] for name in file.namelist()} - {"celo2_harness"}
        metadata = file.read(next(name for name in file.namelist() if name.endswith("/METADATA"))).decode()
        scripts = file.read(next(name for name in file.namelist() if name.endswith("/entry_points.txt"))).decode()
    there = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert inside == {str(path.relative_to(PACKAGE.parent)) for path in there}
    assert {f"celo2_harness/weights/{name}.celo2" for name in c2.bundled_weights()} < inside
    assert "celo2_harness/py.typed" in inside
    assert others == {wheel.name.split("-py3")[0] + ".dist-info"}
    assert f"Version: {c2.__version__}\n" in metadata and "Classifier: Typing :: Typed" in metadata
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert set(required) == {"jax", "optax", "flax", "numpy", "jaxtyping", "beartype"}
    assert "celo2 = celo2_harness.lab.cli.main:main" in scripts


def test_the_sdist_can_be_built_and_tested_from(built):
    _, sdist = built
    assert sdist.stat().st_size < 3_000_000
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        left_out = {name for name in tracked.stdout.split("\n") if name and not name.startswith(".")} - names
        assert left_out == set()
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO"} <= names
    assert not any("__pycache__" in name or name.startswith(("runs/", ".venv")) for name in names)


def test_one_version():
    """It stands in _version.py; what else names it agrees."""
    version = c2.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(a|b|rc|dev)\d+)?", version)
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] in (version, "Unreleased")
    numbers = [path for path in PACKAGE.rglob("*.py") if re.search(r"^__version__ *=", path.read_text(), re.MULTILINE)]
    assert numbers == [PACKAGE / "_version.py"]


def test_the_public_workflow_runs_what_ci_runs():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: .ci/run" in workflow
    supported = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert supported and all(f'"{version}"' in workflow for version in supported)
