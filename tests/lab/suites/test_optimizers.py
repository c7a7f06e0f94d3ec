"""Optimizers that suites name: all of them descend, and decay the same leaves in the same way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo2_harness.lab.suites import OPTIMIZERS, make_optax

RATE, DECAY = 0.5, 0.25


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_descent_and_decay(name):
    params = {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "bias": jnp.linspace(0.5, 1.0, 4)}
    grads = {"kernel": jnp.cos(jnp.arange(12.0)).reshape(3, 4), "bias": jnp.sin(jnp.arange(1.0, 5.0))}
    updates = []
    for decay in (0.0, DECAY):
        tx = make_optax(name, lambda step: RATE, decay, lambda tree: {"kernel": True, "bias": False}, {})
        updates.append(tx.update(grads, tx.init(params), params)[0])
    for leaf in params:
        assert float(jnp.sum(updates[0][leaf] * grads[leaf])) < 0
    difference = jax.tree.map(lambda one, two: np.asarray(two - one), *updates)
    # p <- p - rate (direction + decay p), whatever the direction. Rounding of updates of order one: 1e-6.
    np.testing.assert_allclose(difference["kernel"], -RATE * DECAY * params["kernel"], atol=1e-6)
    np.testing.assert_array_equal(difference["bias"], 0)


def test_sgd_by_hand():
    """Momentum 0.9: the second trace of a constant gradient is 1.9 times it."""
    tx = make_optax("sgd", lambda step: 0.1, 0.0, lambda tree: True, {})
    params, grads = jnp.ones(2), jnp.array([1.0, -2.0])
    _, state = tx.update(grads, tx.init(params), params)
    updates, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(updates, [-0.19, 0.38], rtol=1e-6)
