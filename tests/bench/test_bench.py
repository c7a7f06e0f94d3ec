"""The benchmark measures what it says; how long things take is no matter of tests."""

import json

import jax
import optax
import pytest

from celo2_harness import harness
from celo2_harness.bench import MODEL_SHAPES, interleave, measure_newton_schulz, measure_updates, median_ratio
from celo2_harness.bench.models import gpt2_tree, matrix_blocks
from celo2_harness.cli.main import main


def test_calls_alternate_and_the_first_round_is_not_timed():
    order, ticks = [], map(float, range(100))
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = interleave(calls, 2, clock=lambda: next(ticks))
    assert order == ["a", "b"] * 3
    assert seconds == {"a": (1, 1), "b": (1, 1)}


def test_ratios_are_taken_within_rounds():
    assert median_ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


@pytest.mark.parametrize(
    ("name", "leaves", "parameters"),
    [
        ("blocks", 16, 12_582_912),
        ("gpt2-12", 148, 124_439_808),
        ("gpt2-48", 580, 379_603_200),
        ("blocks-100m", 32, 100_663_296),
    ],
)
def test_trees_have_the_sizes_that_they_are_named_for(name, leaves, parameters):
    shapes = jax.tree.leaves(MODEL_SHAPES[name]())
    assert len(shapes) == leaves
    assert sum(x.size for x in shapes) == parameters


def test_routing_sends_the_blocks_to_the_hidden_group():
    report = str(harness.describe(matrix_blocks(8, 1), "celo2_ortho"))
    assert report.count("hidden") >= 4 and "vector" not in report.split("total")[0]


def test_costs_of_adamw_by_hand():
    shapes = matrix_blocks(8, 1)
    cost = measure_updates({"adamw": optax.adamw(1e-3)}, shapes, rounds=2)["adamw"]
    assert len(cost.seconds) == 2 and min(cost.seconds) > 0
    assert cost.parameter_bytes == 4 * 12 * 64
    assert cost.state_bytes == 2 * cost.parameter_bytes + 4  # two moments and a count


def test_compiling_alone_times_nothing():
    cost = measure_updates({"sgd": optax.sgd(1e-3)}, gpt2_tree(1, 8, 16, 4), rounds=0)["sgd"]
    assert cost.seconds == () and cost.compile_seconds > 0


def test_temporaries_of_the_learned_rule_stay_near_the_parameters():
    # XLA plans them at compile time; the published code takes 64 times the parameters.
    cost = measure_updates({"base": harness.build("celo2_base", 1e-3)}, matrix_blocks(256, 2), rounds=0)["base"]
    assert cost.temporary_bytes <= 1.5 * cost.parameter_bytes
    assert cost.state_bytes <= 4.05 * cost.parameter_bytes


def test_newton_schulz_agrees_with_optax():
    cost = measure_newton_schulz((16, 64), rounds=1)
    assert cost.difference < 1e-5


def test_the_command_writes_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODEL_SHAPES, "blocks", lambda: matrix_blocks(8, 1))
    path = tmp_path / "bench.json"
    assert main(["bench", "step", "--preset", "adamw", "--rounds", "2", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "optax.contrib.muon" in out and "ms per update" in out
    written = json.loads(path.read_text())
    assert set(written["figures"]) == {"optax.adamw", "optax.contrib.muon", "adamw"}
    assert len(written["figures"]["adamw"]["seconds"]) == 2
    assert {"versions", "device", "cores", "config"} <= set(written["header"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "gpt9"], ["model = 'gpt9'", "gpt2-12"]),
        (["--rounds", "0"], ["rounds = 0"]),
        (["--preset", "celo3"], ["celo3"]),
        (["--state-dtype", "int7"], ["state_dtype = 'int7'", "bfloat16"]),
        (["--json", "nowhere/at/all.json"], ["json", "nowhere/at"]),
    ],
)
def test_wrong_options_get_one_line(options, words, capsys):
    assert main(["bench", "step", "--compile-only", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
