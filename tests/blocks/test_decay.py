"""Weight decay by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_equal

import celo2_harness as c2

PARAMS = {"w": jnp.array([[1.0, -2.0, 4.0], [-1.0, 0.0, 2.0]]), "b": jnp.array([10.0, -10.0])}
UPDATES = {"w": jnp.array([[0.5, 0.5, -0.5], [-0.5, 0.5, 0.0]]), "b": jnp.array([1.0, 1.0])}


def apply(tx, updates=UPDATES, params=PARAMS):
    return tx.update(updates, tx.init(params), params)


def test_decoupled():
    got, _ = apply(c2.add_decayed_weights(0.1))
    np.testing.assert_allclose(got["w"], [[0.6, 0.3, -0.1], [-0.6, 0.5, 0.2]], atol=1e-7)
    np.testing.assert_allclose(got["b"], [2.0, 0.0], atol=1e-6)


def test_cautious_only_where_the_step_shrinks():
    got, _ = apply(c2.add_decayed_weights(0.1, "cautious"))
    np.testing.assert_allclose(got["w"], [[0.6, 0.5, -0.5], [-0.6, 0.5, 0.0]], atol=1e-7)
    np.testing.assert_allclose(got["b"], [2.0, 1.0], atol=1e-6)


def test_independent_of_the_learning_rate():
    for rate in (1e-3, 1.0):
        tx = optax.chain(optax.scale_by_learning_rate(rate), c2.add_decayed_weights(0.1, "independent"))
        got, _ = apply(tx)
        np.testing.assert_allclose(got["b"], [-rate - 1.0, -rate + 1.0], rtol=1e-6)


@pytest.mark.parametrize("mode", ["decoupled", "independent", "cautious"])
def test_mask(mode):
    plain, _ = apply(c2.add_decayed_weights(0.1, mode))
    for mask in ({"w": True, "b": False}, lambda params: {"w": True, "b": False}):
        got, _ = apply(c2.add_decayed_weights(0.1, mode, mask=mask))
        np.testing.assert_array_equal(got["w"], plain["w"])
        np.testing.assert_array_equal(got["b"], UPDATES["b"])


def test_schedule():
    tx = c2.add_decayed_weights(lambda count: 0.1 * count)
    first, state = apply(tx)
    assert_trees_equal(first, UPDATES)
    second, state = tx.update(UPDATES, state, PARAMS)
    assert_trees_equal(second, apply(c2.add_decayed_weights(0.1))[0])
    assert int(state.count) == 2


def test_bfloat16_updates_are_rounded_once():
    updates, params = {"w": jnp.ones(3, jnp.bfloat16)}, {"w": jnp.full(3, 3.0, jnp.bfloat16)}
    got, _ = apply(c2.add_decayed_weights(0.01), updates, params)
    assert got["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got["w"], jnp.asarray(1.03, jnp.bfloat16))


def test_faults_are_named():
    tx = c2.add_decayed_weights(0.1)
    with pytest.raises(ValueError, match="add_decayed_weights.*without params"):
        tx.update(UPDATES, tx.init(PARAMS))
    function = getattr(c2.add_decayed_weights, "__wrapped__", c2.add_decayed_weights)
    with pytest.raises(ValueError, match="mode = 'coupled', expected one of decoupled, independent, cautious"):
        function(0.1, "coupled")
