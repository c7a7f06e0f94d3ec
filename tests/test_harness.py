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


# ----------------------------------------------------------------------------------------- numbers of whatever library

SAME = {
    "NumPy steps": ({"total_steps": np.int64(40)}, {"total_steps": 40}),
    "a NumPy array of steps": ({"total_steps": np.array(40)}, {"total_steps": 40}),
    "NumPy warm-up in steps": ({"total_steps": 40, "warmup": np.int32(10)}, {"total_steps": 40, "warmup": 10}),
    "NumPy warm-up": ({"total_steps": 40, "warmup": np.float32(0.25)}, {"total_steps": 40, "warmup": 0.25}),
    "NumPy rate": ({"learning_rate": np.float32(0.5)}, {"learning_rate": 0.5}),
    "half rate": ({"learning_rate": np.float16(0.5)}, {"learning_rate": 0.5}),
    "JAX rate": ({"learning_rate": jnp.asarray(0.5)}, {"learning_rate": 0.5}),
    "whole rate": ({"learning_rate": jnp.asarray(2)}, {"learning_rate": 2.0}),
    "NumPy decay": ({"weight_decay": np.float64(0.5)}, {"weight_decay": 0.5}),
    "factor as a schedule": (
        {"rest_learning_rate_factor": lambda count: 3.0 - count},
        {"rest_learning_rate_factor": 3.0},
    ),
    "decay as a schedule": ({"rest_weight_decay": lambda count: 0.5 - count}, {"rest_weight_decay": 0.5}),
}


def two_updates(**arguments):
    tx = harness.build("adamw", **arguments)
    state, found = tx.init(PARAMS), []
    for _ in range(2):
        updates, state = tx.update(PARAMS, state, PARAMS)
        found.append(updates)
    return found


@pytest.mark.parametrize("name", SAME)
@pytest.mark.filterwarnings("error")
def test_numbers_may_be_of_any_library(name):
    given, plain = SAME[name]
    found, wanted = two_updates(**given), two_updates(**plain)
    assert_trees_close(found[0], wanted[0], 1e-6)
    c2.describe(PARAMS, "adamw", **given)


ASKED = [
    {"weight_decay": -0.1},
    {"weight_decay": {"embedding": math.nan}},
    {"weight_decay": {"embeddings": 0.1}},
    {"rest_weight_decay": jnp.ones(1)},
    {"rest_learning_rate_factor": -1.0},
    {"learning_rate": jnp.full((8,), 1e-3)},
    {"learning_rate": jnp.asarray(jnp.nan)},
    {"learning_rate": 1e-3 + 0j},
    {"learning_rate": True},
    {"learning_rate": np.array(["1"])},
    {"total_steps": np.float64(10.0)},
    {"total_steps": 10, "warmup": np.nan},
    {"rest": {"bias": 0.1}},
    {"rest": {"bias": harness.AdamW(b1=1.0)}},
    {"rest": {"hidden": harness.AdamW()}},
    {"preset": "celo2_base", "rest": {"bias": harness.AdamW(b1=0.5)}},
    {"weight_decay_mode": "cautios"},
    {"state_dtype": "float64"},
    {"kernel": "cuda"},
    {"momentum": 0.9},
]


@pytest.mark.parametrize("arguments", ASKED, ids=str)
def test_build_and_describe_answer_alike(arguments):
    name = list(arguments)[-1]
    for ask in (lambda: harness.build(**arguments), lambda: c2.describe(PARAMS, **arguments)):
        with pytest.raises((TypeError, ValueError), match=name):
            ask()


def test_the_schedule_to_log_is_the_one_that_is_used():
    rate = harness.learning_rate_schedule("adamw", 0.5, total_steps=np.int64(10), schedule="linear", warmup=2)
    assert [float(rate(step)) for step in (0, 1, 2, 6, 10)] == [0.0, 0.25, 0.5, 0.25, 0.0]
    for found, wanted in zip(
        two_updates(learning_rate=rate, total_steps=10),
        two_updates(learning_rate=0.5, total_steps=10, schedule="linear", warmup=2),
        strict=True,
    ):
        assert_trees_close(found, wanted, 1e-6)
    assert harness.learning_rate_schedule("muon")(7) == harness.presets()["muon"].learning_rate
    assert harness.learning_rate_schedule("velo", 0.1, total_steps=10)(3) == 0.1
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        harness.learning_rate_schedule("muon", schedule="liner")


# -------------------------------------------------------------------------------------------------------------- by role

ROLES = {
    "wte": {"embedding": jnp.ones((7, 4))},
    "layer": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
    "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    "lm_head": {"kernel": jnp.ones((4, 7))},
}


def one_update(gradients, **arguments):
    tx = harness.build("muon", 1.0, **arguments)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(ROLES), ROLES)
    return jax.tree.map(lambda x: float(x.ravel()[0]), updates)


ZERO = jax.tree.map(jnp.zeros_like, ROLES)


def test_weight_decay_of_all_matrices_and_of_nothing_else():
    found = one_update(ZERO, weight_decay=dict.fromkeys(harness.MATRICES, 0.25))
    assert found["layer"] == {"kernel": -0.25, "bias": 0.0} and found["norm"] == {"scale": 0.0, "bias": 0.0}
    assert found["wte"]["embedding"] == found["lm_head"]["kernel"] == -0.25


@pytest.mark.parametrize(("mode", "shrunk"), [("decoupled", 0.5 * 0.25), ("independent", 0.25), ("cautious", 0.0)])
def test_weight_decay_has_modes(mode, shrunk):
    """Cautious decay waits for a step that shrinks the parameter, which a zero gradient does not make."""
    tx = harness.build("adamw", 0.5, weight_decay=0.25, rest_weight_decay=0.25, weight_decay_mode=mode)
    updates, _ = tx.update(ZERO, tx.init(ROLES), ROLES)
    for x in jax.tree.leaves(updates):
        np.testing.assert_allclose(x, -shrunk, rtol=1e-6)


def test_roles_have_their_own_adamw():
    """Adam's first direction is the sign of the gradient; gains and biases are told apart."""
    rest = {
        "embedding": harness.AdamW(learning_rate_factor=3.0),
        "vector": harness.AdamW(learning_rate_factor=5.0, weight_decay=0.5),
        "gain": harness.AdamW(weight_decay=0.0),
    }
    found = one_update(ROLES, rest=rest, rest_learning_rate_factor={"head": 7.0, "embedding": 100.0})
    wanted = {"wte": {"embedding": -3.0}, "lm_head": {"kernel": -7.0}, "norm": {"scale": -5.0, "bias": -7.5}}
    for name, leaves in wanted.items():
        for leaf, value in leaves.items():
            np.testing.assert_allclose(found[name][leaf], value, rtol=1e-5)
    np.testing.assert_allclose(found["layer"]["bias"], -7.5, rtol=1e-5)


def test_roles_have_their_own_betas_and_the_report_says_so():
    rest = {"embedding": harness.AdamW(b1=0.5, b2=0.75)}
    tx = harness.build("celo2_ortho", 1.0, weights=TINY, rest=rest)
    _, state = tx.update(ROLES, tx.init(ROLES), ROLES)
    assert set(state.inner_states) == {"hidden", "rest", "embedding", "frozen"}
    adam = state.inner_states["embedding"].inner_state[0]
    np.testing.assert_allclose(adam.mu["wte"]["embedding"], 0.5)
    np.testing.assert_allclose(adam.nu["wte"]["embedding"], 0.25)
    np.testing.assert_allclose(state.inner_states["rest"].inner_state[0].nu["norm"]["bias"], 0.05, rtol=1e-6)
    lines = {line.split()[0]: line for line in c2.describe(ROLES, rest=rest, weights=TINY).splitlines() if line}
    assert "adamw (0.5, 0.75)" in lines["wte/embedding"] and "(0" not in lines["norm/bias"].split("vector")[1]


def test_a_preset_may_set_roles_apart():
    own = dataclasses.replace(harness.presets()["muon"], roles={"gain": harness.AdamW(learning_rate_factor=2.0)})
    tx = harness.build(own, 1.0, rest={"bias": harness.AdamW(learning_rate_factor=4.0)})
    updates, _ = tx.update(ROLES, tx.init(ROLES), ROLES)
    found = [
        float(updates["norm"]["scale"][0]),
        float(updates["norm"]["bias"][0]),
        float(updates["wte"]["embedding"][0, 0]),
    ]
    np.testing.assert_allclose(found, [-2.0, -4.0, -1.0], rtol=1e-5)


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
