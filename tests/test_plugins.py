"""A package of its own, installed into an empty folder: everything it adds works, and what is broken stays alone."""

import contextlib
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import celo2_harness as c2
from celo2_harness import harness, plugins
from celo2_harness.lab import suites as evaluate
from celo2_harness.lab import tasks

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
PARAMS = {"mixer_0": {"table": jnp.ones((2, 3, 5))}, "layer": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}


def file_on_page(name):
    """The code block that follows the file's name on the page."""
    match = re.search(rf"`{re.escape(name)}`.*?:\n+(?:<!--.*?-->\n)?```\w+\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert match, name
    return match[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where pip has installed the package of docs/guide/extending.md, made of the code on that page."""
    root = tmp_path_factory.mktemp("plugins")
    source = root / "source"
    (source / "celo2_signs").mkdir(parents=True)
    for name in ("pyproject.toml", "celo2_signs/__init__.py"):
        (source / name).write_text(file_on_page(name))
    with contextlib.chdir(source):
        exec(file_on_page("make_weights.py"), {})
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
    names = {kind: plugins.plugin_names(kind) for kind in plugins.KINDS}
    assert {kind for kind, found in names.items() if found} == set(plugins.KINDS)
    assert names["presets"] == ("signs",) and names["weights"] == ("quiet",)
    harness.build("adamw").init(PARAMS)  # built-in names do not import it either
    assert "celo2_signs" not in sys.modules


def test_presets(installed):
    assert harness.presets()["signs"].description.startswith("Signs")
    tx = harness.build("signs", 0.5)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["layer"]["kernel"], -0.5)
    assert "signs" in c2.describe(PARAMS, "signs")


def test_blocks(installed):
    tx = c2.make_block("sign_of_momentum", decay=0.5)
    updates, state = tx.update({"w": jnp.array([3.0, -2.0])}, tx.init({"w": jnp.zeros(2)}))
    assert updates["w"].tolist() == [1.0, -1.0] and state["w"].tolist() == [1.5, -1.0]
    assert isinstance(c2.make_block("normalize_rms", mode="clip"), optax.GradientTransformation)
    with pytest.raises(ValueError, match="'sign': expected one of celo2_direction, .*, sign_of_momentum"):
        c2.make_block("sign")


def test_routing_rules_apply_only_where_they_are_named(installed):
    plain, named = c2.route(PARAMS), c2.route(PARAMS, ["mixers"])
    assert plain["mixer_0"]["table"].label == "other" and not plain["mixer_0"]["table"].rule
    found = named["mixer_0"]["table"]
    assert found.label == "hidden" and found.view.reduction_axis == (2,) and "mixer" in found.rule
    assert named["layer"] == plain["layer"]
    first = c2.label_params(PARAMS, [("mixer", "frozen"), "mixers"])
    assert first["mixer_0"]["table"] == "frozen"
    shapes = {x.shape for x in jax.tree.leaves(jax.eval_shape(harness.build("muon", rules=["mixers"]).init, PARAMS))}
    assert (2, 3, 5) in shapes
    with pytest.raises(ValueError, match=r"rules\[0\] is 'mixer', .*by name: 'mixers'"):
        harness.build(rules=["mixer"])
    with pytest.raises(ValueError, match=r"write rules=\['mixers'\]"):
        c2.label_params(PARAMS, "mixers")


def test_tasks(installed):
    task = tasks.make_task("valley", "narrow", batch=2)
    assert isinstance(task, tasks.Task) and task.describe()["steepness"] == 30.0
    assert float(task.loss(task.init(jax.random.key(0)), task.batch(0, 0))) > 0
    suite = evaluate.read_suite(
        {
            "name": "added",
            "tasks": [{"name": "valley", "size": "narrow", "steps": 2}],
            "search": {"learning_rates": [0.1], "weight_decays": [0.0], "selection_seeds": [0]},
            "optimizers": [{"optax": "sgd"}],
        }
    )
    assert [found.label for found in suite.tasks] == ["valley narrow"]
    with pytest.raises(ValueError, match="valley comes as wide, narrow"):
        tasks.make_task("valley", "deep")
    with pytest.raises(ValueError, match="expected one of .*valley"):
        tasks.make_task("vally")


def test_weights(installed, tmp_path, monkeypatch):
    quiet = c2.load_weights("quiet")
    np.testing.assert_array_equal(quiet.theta.w1, 0.5 * c2.load_weights("celo2").theta.w1)
    assert quiet.provenance["made_by"].startswith("halving")
    harness.build("celo2_ortho", weights="quiet")
    with pytest.raises(c2.WeightsError, match="quite: .*bundled names celo2, celo2_base, quiet"):
        c2.load_weights("quite")
    # A file of that name was there before the package: it stays what the name means.
    monkeypatch.chdir(tmp_path)
    c2.save_weights("quiet", c2.load_weights("celo2_base"))
    assert c2.load_weights("quiet").provenance == c2.load_weights("celo2_base").provenance


# ------------------------------------------------------------------------------------------------------ what is broken

BROKEN = {
    "cannot be imported": ("raise ImportError('no module named gone')", "ImportError: no module named gone"),
    "a mistake": ("thing = 1 / 0", "ZeroDivisionError: division by zero"),
    "no syntax": ("def thing(:", "SyntaxError"),
    "ends the program": ("raise SystemExit(3)", "SystemExit: 3"),
    "no such name": ("", "AttributeError: .*thing"),
    "something else": ("thing = 5", "TypeError: got a int"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plug_in_is_named_and_harms_nothing(fault, site):
    code, cause = BROKEN[fault]
    add_package(
        site, "faulty", "".join(f"[celo2_harness.{kind}]\nbad = faulty:thing\n" for kind in plugins.KINDS), code
    )
    named = f"plug-in 'bad' .*faulty:thing of faulty: {cause}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "adamw" in harness.presets()
    (warning,) = caught
    assert "left out" in str(warning.message)
    with pytest.warns(UserWarning, match=named):
        harness.presets()
    # What does not ask for it is not even warned.
    harness.build("adamw").init(PARAMS)
    c2.load_weights("celo2")
    tasks.make_task("language_model")
    for ask in (
        lambda: c2.make_block("bad"),
        lambda: harness.build("adamw", rules=["bad"]),
        lambda: tasks.make_task("bad"),
        lambda: c2.load_weights("bad"),
    ):
        with pytest.raises(ValueError, match=named):
            ask()


def test_importing_the_package_looks_at_no_plug_in(site):
    """In a process of its own, with a plug-in that would end it."""
    add_package(site, "faulty", "[celo2_harness.presets]\nbad = faulty:thing\n", "raise SystemExit(3)")
    program = "import sys, celo2_harness as c2; c2.harness.build('adamw'); assert 'faulty' not in sys.modules"
    environment = {"PYTHONPATH": f"{site}:{Path(c2.__file__).parents[1]}", "PATH": "", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=environment)


@pytest.mark.parametrize("value", ["{'layer': 'hidden'}", "['mixers']", "[('(', 'hidden')]", "[('w', 'hiden')]"])
def test_rules_of_a_package_are_checked(value, site):
    add_package(site, "rulebook", "[celo2_harness.routing_rules]\nbook = rulebook:RULES\n", f"RULES = {value}")
    with pytest.raises(ValueError, match="plug-in 'book' is broken: .*rulebook:RULES of rulebook"):
        c2.label_params(PARAMS, ["book"])


def test_weights_of_a_package_are_checked(site):
    (site / "damaged.celo2").write_bytes(b"\x00" * 100)
    code = "from pathlib import Path\nFILE = Path(__file__).with_name('damaged.celo2')"
    add_package(site, "heavy", "[celo2_harness.weights]\nheavy = heavy:FILE\n", code)
    with pytest.raises(c2.WeightsError, match="plug-in 'heavy' is broken: .*not a weight file"):
        c2.load_weights("heavy")


def test_a_block_must_make_a_transformation(site):
    add_package(site, "blocky", "[celo2_harness.blocks]\nnothing = blocky:nothing\n", "def nothing(): return 3")
    with pytest.raises(ValueError, match="block 'nothing' made a int"):
        c2.make_block("nothing")


def test_of_two_packages_with_one_name_the_first_has_it(site):
    for name in ("one", "two"):
        add_package(site, name, f"[celo2_harness.weights]\nshared = {name}:FILE\n", "")
    assert plugins.plugin_names("weights") == ("shared",)
    with pytest.raises(ValueError, match="expected one of presets"):
        plugins.plugin_names("preset")
