"""The benchmark measures what it says; how long things take is no matter of tests."""

import json

import jax
import optax
import pytest
from helpers import random_velo

from celo2_harness import harness
from celo2_harness.lab.bench import (
    GRADIENT,
    MODEL_SHAPES,
    interleave,
    measure_newton_schulz,
    measure_training,
    measure_updates,
    median_ratio,
    plan_update,
)
from celo2_harness.lab.bench.models import gpt2_tree, matrix_blocks
from celo2_harness.lab.cli.bench import Config, _optimizers
from celo2_harness.lab.cli.main import main
from celo2_harness.lab.tasks import GPTConfig, LanguageModel, split_text
from celo2_harness.sharding import make_mesh
from celo2_harness.velo import velo


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


@pytest.mark.slow
def test_temporaries_of_the_learned_rule_stay_near_the_parameters():
    # XLA plans them at compile time; the published code takes 64 times the parameters. Leaf after leaf, what is needed
    # is a few planes of the largest leaf; it would be a plane of every leaf if they were not kept in order.
    optimizers = {name: harness.build(name, 1e-3) for name in ("celo2_base", "celo2_ortho")}
    costs = measure_updates(optimizers, matrix_blocks(256, 4), rounds=0)
    assert costs["celo2_base"].temporary_bytes <= 0.25 * costs["celo2_base"].parameter_bytes
    assert costs["celo2_ortho"].temporary_bytes <= 2.0 * costs["celo2_ortho"].parameter_bytes
    assert all(cost.state_bytes <= 4.05 * cost.parameter_bytes for cost in costs.values())


@pytest.mark.slow
def test_temporaries_of_velo_stay_near_the_parameters():
    # The LSTM's own weights count as well, so a narrow one; the planes are the same.
    weights = random_velo(lstm=4, bank=2)
    costs = measure_updates({"velo": velo(weights, num_steps=100)}, matrix_blocks(256, 4), rounds=0)
    assert costs["velo"].temporary_bytes <= 0.25 * costs["velo"].parameter_bytes
    assert costs["velo"].state_bytes <= 4.05 * costs["velo"].parameter_bytes


@pytest.mark.slow
def test_presets_that_need_weights_are_measured_with_random_ones():
    optimizers = _optimizers(Config(preset=("velo", "velo_s")))
    state = jax.eval_shape(optimizers["velo"].init, {"kernel": jax.ShapeDtypeStruct((8, 4), "float32")})
    assert {x.shape for x in jax.tree.leaves(optax.tree.get(state, "hidden"))} == {(512,)}


def test_leaves_of_one_shape_are_traced_once(monkeypatch):
    from celo2_harness.rule import direction

    calls = []
    original = direction.first_layer
    monkeypatch.setattr(direction, "first_layer", lambda *args: calls.append(args[1]) or original(*args))
    # A width that no other test has, since traces are kept; and matrices too large to share a batch.
    shapes = matrix_blocks(136, 3)
    tx = harness.build("celo2_base", 1e-3)
    state = jax.eval_shape(tx.init, shapes)
    for _ in range(2):
        jax.jit(tx.update).lower(shapes, state, shapes)
    assert len(calls) == len({view.viewed for view in calls}) == 4


def test_plan_by_hand():
    shapes = matrix_blocks(8, 1)  # 12 * 64 parameters, all axes even
    adam = plan_update(optax.adam(1e-3), shapes, make_mesh({"fsdp": 1}))
    assert adam.parameters == adam.gradients == 4 * 12 * 64 and adam.state == 2 * adam.parameters + 4
    assert adam.total == sum(adam[:3]) + adam.temporaries
    assert (adam.collectives, adam.sent) == (0, 0)


@pytest.mark.slow
def test_training_steps_are_timed_beside_the_gradient():
    task = LanguageModel(GPTConfig(8, 1, 2, context=4), split_text(b"abracadabra" * 9, "spell", 4), batch_size=3)
    times = measure_training(task, {"sgd": optax.sgd(1e-3)}, rounds=2)
    assert set(times) == {GRADIENT, "sgd"} and all(len(seconds) == 2 for seconds in times.values())


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


@pytest.mark.slow
def test_plan_and_training_print_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODEL_SHAPES, "blocks", lambda: matrix_blocks(8, 1))
    assert main(["bench", "plan", "--preset", "adamw", "--json", str(tmp_path / "plan.json")]) == 0
    assert "temporaries" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["figures"]["adamw"]["parameters"] == 4 * 12 * 64
    words = ["bench", "plan", "--estimate", "--preset", "celo2_ortho", "--mesh", "fsdp=8,data=100"]
    assert main([*words, "--json", str(tmp_path / "plan.json")]) == 0
    assert "matrices" in capsys.readouterr().out
    estimate = json.loads((tmp_path / "plan.json").read_text())["figures"]["celo2_ortho"]
    assert estimate["parameters"] == 4 * 12 * 64 // 8
    assert main(["bench", "training", "--model", "tiny", "--preset", "adamw", "--rounds", "1", "--batch", "1"]) == 0
    assert "optimizer's share" in capsys.readouterr().out
    assert main(["bench", "training", "--model", "blocks"]) == 2
    assert "model = 'blocks'" in capsys.readouterr().err
    for mesh in ("fsdp", "fsdp=0", "fsdp=2,fsdp=2", "a b=2", "model=2"):
        assert main(["bench", "plan", "--mesh", mesh]) == 2
        assert f"mesh = '{mesh}'" in capsys.readouterr().err
    assert main(["bench", "plan", "--mesh", "data=1000"]) == 2
    assert "mesh of 1000 devices: there are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "gpt9"], ["model = 'gpt9'", "gpt2-12"]),
        (["--rounds", "0"], ["rounds = 0"]),
        (["--preset", "celo3"], ["celo3"]),
        (["--state-dtype", "int7"], ["state_dtype = 'int7'", "bfloat16"]),
        (["--json", "nowhere/at/all.json"], ["json", "nowhere/at"]),
        (["--kernel", "cuda"], ["kernel = 'cuda'", "pallas"]),
    ],
)
def test_wrong_options_get_one_line(options, words, capsys):
    assert main(["bench", "step", "--compile-only", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
