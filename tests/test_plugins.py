"""A package of its own, installed into an empty folder: everything it adds works, and what is broken stays alone."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import celo2_harness as c2
from celo2_harness import harness, plugins
from celo2_harness.lab import suites, tasks

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "extending.md"
PARAMS = {"layer": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where pip has installed the package that the guide writes."""
    root = tmp_path_factory.mktemp("plugins")
    source = root / "source"
    source.mkdir()
    code, _, package = PAGE.read_text().partition("## A package")
    (source / "celo2_signs.py").write_text("\n".join(re.findall(r"^```python\n(.*?)^```", code, re.M | re.S)))
    (source / "pyproject.toml").write_text(re.findall(r"^```toml\n(.*?)^```", package, re.M | re.S)[0])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(root / "installed"), str(source)], check=True)
    return root / "installed"


@pytest.fixture
def installed(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("celo2_signs", None)


def add_package(folder, name, entry_points, code=""):
    """A package as pip leaves it behind, written by hand."""
    (folder / f"{name}.py").write_text(textwrap.dedent(code))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


# ------------------------------------------------------------------------------------------------- what a package adds


def test_names_are_listed_without_importing_the_package(installed):
    assert plugins.plugin_names("presets") == ("signs",) and plugins.plugin_names("tasks") == ("valley",)
    harness.build("adamw").init(PARAMS)  # built-in names do not import it either
    assert "celo2_signs" not in sys.modules


def test_presets(installed):
    assert harness.presets()["signs"].description.startswith("Signs")
    tx = harness.build("signs", 0.5)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["layer"]["kernel"], -0.5)
    assert "signs" in c2.describe(PARAMS, "signs")


def test_tasks(installed, tmp_path):
    task = tasks.make_task("valley", "narrow", batch=2)
    assert isinstance(task, tasks.Task) and task.describe()["steepness"] == 30.0
    assert float(task.loss(task.init(jax.random.key(0)), task.batch(0, 0))) > 0
    file = tmp_path / "added.toml"
    file.write_text(
        'name = "added"\ntasks = [{name = "valley", size = "narrow", steps = 2}]\noptimizers = [{optax = "sgd"}]\n'
        "search = {learning_rates = [0.1], weight_decays = [0.0], selection_seeds = [0]}\n"
    )
    suite = suites.load_suite(file)
    assert [found.label for found in suite.tasks] == ["valley narrow"]
    with pytest.raises(ValueError, match="valley comes as wide, narrow"):
        tasks.make_task("valley", "deep")
    with pytest.raises(ValueError, match="expected one of .*valley"):
        tasks.make_task("vally")


# ------------------------------------------------------------------------------------------------------ what is broken

BROKEN = {
    "cannot be imported": ("raise ImportError('no module named gone')", "ImportError: no module named gone"),
    "a mistake": ("thing = 1 / 0", "ZeroDivisionError: division by zero"),
    "no syntax": ("def thing(:", "SyntaxError"),
    "ends the program": ("raise SystemExit(3)", "SystemExit: 3"),
    "no such name": ("", "AttributeError: .*thing"),
    "something else": ("thing = 5", "is a int, expected a (Preset|TaskKind)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plug_in_is_named_and_harms_nothing(fault, site):
    code, cause = BROKEN[fault]
    groups = "".join(f"[celo2_harness.{kind}]\nbad = faulty:thing\n" for kind in ("presets", "tasks"))
    add_package(site, "faulty", groups, code)
    named = rf"plug-in 'bad' \(faulty:thing of faulty\) .*{cause}"
    with pytest.warns(UserWarning, match="left out: " + named):
        assert "adamw" in harness.presets()
    # What does not ask for it is not even warned.
    harness.build("adamw").init(PARAMS)
    tasks.make_task("language_model")
    for ask in (lambda: harness.build("bad"), lambda: tasks.make_task("bad")):
        with pytest.raises(ValueError, match=named):
            ask()


def test_importing_the_package_looks_at_no_plug_in(site):
    """In a process of its own, with a plug-in that would end it."""
    add_package(site, "faulty", "[celo2_harness.presets]\nbad = faulty:thing\n", "raise SystemExit(3)")
    program = "import sys, celo2_harness as c2; c2.harness.build('adamw'); assert 'faulty' not in sys.modules"
    environment = {"PYTHONPATH": f"{site}:{Path(c2.__file__).parents[1]}", "PATH": "", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=environment)
