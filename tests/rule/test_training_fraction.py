"""The training fraction as a feature: what it does to an update, who needs the length of the run, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, TINY_CONFIG, assert_trees_close, assert_trees_equal, normal, random_theta

import celo2_harness as c2
from celo2_harness import harness
from celo2_harness.blocks import in_eigenbasis

SHAPES = {"w": (3, 4), "b": (5,), "s": ()}
# Among other features, so that the row of w0 has to be found.
CONFIG = c2.RuleConfig(
    features=("gradient", "momentum", "training_fraction", "row_moment"), momentum_decays=(0.9,), factored_decays=(0.9,)
)
WEIGHTS = c2.Weights(random_theta(4, 8), CONFIG)


def frozen(fraction):
    """The same rule at one time, as a rule that does not see it: the channel is a part of the bias."""
    theta = WEIGHTS.theta
    bias = theta.b0 + (2.0 * fraction - 1.0) * theta.w0[2]
    config = c2.RuleConfig(("gradient", "momentum", "row_moment"), (0.9,), factored_decays=(0.9,))
    return c2.Weights(theta._replace(w0=np.delete(theta.w0, 2, axis=0), b0=bias), config)


def test_every_step_is_that_of_the_rule_at_its_time(key):
    params = normal(key, SHAPES)
    timed = c2.celo2_direction(WEIGHTS, total_steps=4)
    state, accumulators = timed.init(params), c2.celo2_direction(frozen(0.0)).init(params)
    moved = []
    for k, fraction in enumerate((0.0, 0.25, 0.5, 0.75, 1.0, 1.0)):  # after the end it stays the end
        gradient = normal(jax.random.fold_in(key, k), SHAPES)
        got, state = timed.update(gradient, state, params)
        wanted, accumulators = c2.celo2_direction(frozen(fraction)).update(gradient, accumulators, params)
        assert_trees_close(got, wanted, 1e-6)
        moved.append(np.asarray(got["w"]))
    assert int(state.count) == 6
    assert_trees_equal(state.accumulators, accumulators)
    # It matters: at another time the first step is another one.
    first = normal(jax.random.fold_in(key, 0), SHAPES)
    other, _ = c2.celo2_direction(frozen(1.0)).update(first, timed.init(params).accumulators, params)
    assert np.abs(np.asarray(other["w"]) - moved[0]).max() > 1e-3


def test_other_rules_do_not_count_steps():
    state = c2.celo2_direction(TINY, total_steps=4).init({"w": jnp.ones((3, 4))})
    assert_trees_equal(state, c2.celo2_direction(TINY).init({"w": jnp.ones((3, 4))}))


def test_presets_pass_the_length_of_the_run_on(key):
    params = normal(key, {"layer": {"kernel": (4, 6), "bias": (6,)}})
    for preset in ("celo2_ortho", "celo2_base", "celo2_muon"):
        with pytest.raises(ValueError, match="total_steps is missing"):
            harness.build(preset, 0.1, weights=WEIGHTS)
        tx = harness.build(preset, 0.1, 4, weights=WEIGHTS)
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    with pytest.raises(ValueError, match="total_steps = 0: expected a whole number"):
        c2.celo2_direction(WEIGHTS, total_steps=0)


def test_in_the_eigenbasis(key):
    """The count is no moment of a matrix; the first step is that of the identity as a basis."""
    params = normal(key, {"w": (3, 4)})
    plain = c2.celo2_direction(WEIGHTS, total_steps=4)
    turned = in_eigenbasis(plain, mode="act")
    first, state = turned.update(params, turned.init(params), params)
    assert_trees_close(first, plain.update(params, plain.init(params), params)[0], 1e-5)
    _, state = turned.update(params, state, params)
    assert int(state.inner_state.count) == 2


def test_a_file_keeps_it(tmp_path):
    c2.save_weights(tmp_path / "timed.celo2", WEIGHTS)
    loaded = c2.load_weights(tmp_path / "timed.celo2")
    assert loaded == WEIGHTS and loaded.config.features == CONFIG.features
    with pytest.raises(ValueError, match="features"):
        c2.load_weights(tmp_path / "timed.celo2", expect=TINY_CONFIG)
