"""`build`, `describe` and the registry: what they refuse, and in which words."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, assert_trees_close, normal

import celo2_harness as c2
from celo2_harness import harness, presets
from celo2_harness.harness import Group, Preset

PARAMS = {
    "embedding": {"table": jnp.ones((7, 4))},
    "layer": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
    "attention": {"query": {"kernel": jnp.ones((4, 2, 3))}},
}

BAD = {
    "unknown preset": ({"preset": "celo2_orto"}, "preset = 'celo2_orto'.*did you mean 'celo2_ortho'"),
    "far from any preset": ({"preset": "zzz"}, "expected one of celo2, modern_muon, celo2_ortho"),
    "unknown schedule": ({"schedule": "warmup_cosin"}, "schedule = 'warmup_cosin'.*did you mean 'warmup_cosine'"),
    "negative rate": ({"learning_rate": -1e-3}, "learning_rate = -0.001: expected a finite number >= 0"),
    "rate not a number": ({"learning_rate": math.nan}, "learning_rate = nan"),
    "infinite rate": ({"learning_rate": math.inf}, "learning_rate = inf"),
    "rate with axes": ({"learning_rate": np.ones(2)}, "learning_rate"),
    "negative decay": ({"weight_decay": -0.1}, "weight_decay = -0.1"),
    "decay not a number": ({"rest_weight_decay": math.nan}, "rest_weight_decay = nan"),
    "negative factor": ({"rest_learning_rate_factor": -1.0}, "rest_learning_rate_factor = -1.0"),
    "no steps": ({"total_steps": 0}, "total_steps = 0: expected a whole number of steps >= 1"),
    "fractional steps": ({"total_steps": 10.0}, "total_steps = 10.0"),
    "steps by accident": ({"total_steps": True}, "total_steps = True"),
    "array of steps": ({"total_steps": jnp.asarray(3)}, "must be Python numbers.*STATIC_ARGS"),
    "warmup as long as the run": ({"total_steps": 10, "warmup": 10}, "warmup = 10.*below total_steps = 10"),
    "negative warmup": ({"total_steps": 10, "warmup": -0.1}, "warmup = -0.1"),
    "warmup not a number": ({"total_steps": 10, "warmup": math.nan}, "warmup = nan"),
    "warmup of words": ({"total_steps": 10, "warmup": "5%"}, "warmup = '5%'"),
    "weights of none": ({"preset": "adamw", "weights": "celo2"}, "weights = 'celo2': preset adamw has no learned rule"),
    "unknown weights": ({"weights": "celo3"}, "celo3: cannot be read.*bundled names.*celo2"),
}


@pytest.mark.parametrize("name", BAD)
def test_values_out_of_range_are_named(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        harness.build(**arguments)


WRONG_TYPES = {
    "preset": 3,
    "learning_rate": "fast",
    "weight_decay": "some",
    "schedule": 1,
    "weights": 1.0,
    "rules": 5,
    "strict": "yes",
    "per_head": 1,
}


@pytest.mark.parametrize("argument", WRONG_TYPES)
def test_wrong_types_are_named(argument):
    with pytest.raises(TypeError, match=argument):
        harness.build(**{argument: WRONG_TYPES[argument]})


def test_update_without_params_is_named():
    tx = harness.build("adamw")
    with pytest.raises(ValueError, match="adamw: .*without params"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_unused_checks_do_not_apply_without_a_run():
    harness.build("adamw", 1e-3, warmup=0.5)
    harness.build("adamw", lambda count: 1e-3, total_steps=10)  # a schedule is taken as it is


def test_strict_refuses_leaves_without_a_rule():
    odd = {"mystery": {"thing": jnp.ones((2, 3, 4, 5, 6))}}
    with pytest.raises(ValueError, match="mystery/thing"):
        harness.build("adamw", strict=True).init(odd)


def frozen_embedding(path, leaf):
    del leaf
    return "frozen" if path.startswith("embedding") else None


@pytest.mark.parametrize("rule", [("embedding", "frozen"), frozen_embedding])
def test_frozen_leaves_get_no_update_and_no_state(rule):
    tx = harness.build("adamw", 1.0, rules=[rule], rest_weight_decay=0.5)
    state = tx.init(PARAMS)
    updates, state = tx.update(PARAMS, state, PARAMS)
    assert not np.any(updates["embedding"]["table"]) and np.all(updates["layer"]["bias"] != 0)
    assert not any(x.shape == (7, 4) for x in jax.tree.leaves(state))


def test_rules_move_leaves_between_groups():
    count = lambda rules: len(jax.tree.leaves(harness.build("celo2_ortho", weights=TINY, rules=rules).init(PARAMS)))
    assert count([("embedding", "hidden")]) != count([])


def test_per_head_changes_views():
    shapes = lambda **options: {
        x.shape for x in jax.tree.leaves(harness.build("celo2_ortho", weights=TINY, **options).init(PARAMS))
    }
    # (4, 2, 3): one 4x6 matrix keeps rows (4,) and columns (6,); per head two 4x3 ones keep (2, 4) and (2, 3).
    assert (2, 4) not in shapes() and {(2, 4), (2, 3)} <= shapes(per_head=True)


def test_state_is_found_by_name():
    state = harness.build("celo2_ortho", weights=TINY).init(PARAMS)
    assert set(state.inner_states) == {"hidden", "rest", "frozen"}
    celo2 = optax.tree.get(state, "hidden").inner_state[0][0]
    assert isinstance(celo2, c2.Celo2State) and celo2.mu[0]["layer"]["kernel"].shape == (4, 6)


def test_the_learning_rate_follows_the_schedule(key):
    gradients = normal(key, {"layer": {"bias": (5,)}})
    tx = harness.build("adamw", 0.5, 10, schedule="linear", warmup=2, rest_learning_rate_factor=2.0)
    state, sizes = tx.init(gradients), []
    for _ in range(4):
        updates, state = tx.update(gradients, state, gradients)
        sizes.append(float(jnp.max(jnp.abs(updates["layer"]["bias"]))))
    # Adam's direction is the sign of a constant gradient; warm-up 0, 1/2, then down from 1 over eight steps.
    np.testing.assert_allclose(sizes, [0.0, 0.5, 1.0, 0.875], rtol=1e-4, atol=1e-7)


def test_weight_decay_shrinks_each_group_by_its_own_rate():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = harness.build("celo2_ortho", 0.1, weights=TINY, weight_decay=0.5, rest_weight_decay=0.25)
    updates, _ = jax.jit(tx.update)(zero, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["layer"]["bias"], -20 * 0.1 * 0.25, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ registry


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(presets, "_PRESETS", dict(presets._PRESETS))


SGD = Group("sgd", lambda settings: optax.identity())
OWN = Preset("own", "plain gradient descent", SGD, SGD, 0.5)


def test_registered_presets_can_be_built(registry):
    harness.register_preset(OWN)
    assert harness.presets()["own"] is OWN
    updates, _ = (tx := harness.build("own")).update(PARAMS, tx.init(PARAMS), PARAMS)
    assert_trees_close(updates, jax.tree.map(lambda p: -0.5 * p, PARAMS), 1e-6)
    with pytest.raises(ValueError, match="'own' exists already.*overwrite=True"):
        harness.register_preset(OWN)
    other = dataclasses.replace(OWN, learning_rate=0.25)
    harness.register_preset(other, overwrite=True)
    assert harness.presets()["own"] is other
    with pytest.raises(TypeError, match="preset"):
        harness.register_preset("own")


def test_a_preset_can_be_given_itself():
    tx = harness.build(OWN, 1.0)
    assert_trees_close(tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0], jax.tree.map(jnp.negative, PARAMS), 1e-6)


# ------------------------------------------------------------------------------------------------------------ describe


@pytest.mark.parametrize("name", ["celo2", "modern_muon", "celo2_ortho", "celo2_base", "celo2_muon", "muon", "adamw"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_describe_counts_the_bytes_of_the_real_state(name, state_dtype):
    state = jax.eval_shape(harness.build(name, state_dtype=state_dtype).init, PARAMS)
    # Left out: scalar counters, and the three coefficients that Optax's Muon keeps once for all leaves.
    arrays = [x for x in jax.tree.leaves(state) if x.shape not in ((), (3,))]
    wanted = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    total = c2.describe(PARAMS, name, state_dtype=state_dtype).splitlines()[-1]
    numbers = {int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", total)}
    assert wanted in numbers, (wanted, total)
    assert sum(p.size for p in jax.tree.leaves(PARAMS)) in numbers


def test_describe_shows_every_leaf():
    table = c2.describe(PARAMS, "celo2_ortho", weight_decay=0.1, rest_weight_decay=1, rules=[("embedding", "frozen")])
    lines = {line.split()[0]: line for line in table.splitlines() if line}
    assert "frozen" in lines["embedding/table"] and "none" in lines["embedding/table"]
    assert "adamw" in lines["layer/bias"] and "20" in lines["layer/bias"]
    assert "Newton-Schulz" in lines["layer/kernel"] and "0.1" in lines["layer/kernel"]
    shapes = jax.eval_shape(lambda: PARAMS)
    assert c2.describe(shapes) == c2.describe(PARAMS)
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        c2.describe(PARAMS, "adam")


def test_every_preset_says_what_it_is():
    for name, preset in harness.presets().items():
        assert preset.name == name and preset.description and "\n" not in preset.description
        assert preset.weights is None or preset.weights in c2.bundled_weights()
