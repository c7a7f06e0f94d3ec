"""The average of the last parameters, by hand, and where it is found."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import celo2_harness as c2


def run(tx, steps, params, gradient=-1.0):
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(jax.tree.map(lambda p: jnp.full_like(p, gradient), params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


PARAMS = {"w": jnp.zeros((1, 2)), "b": jnp.zeros(3)}


def test_plain_mean_then_an_exponential_average():
    tx = optax.chain(optax.sgd(1.0), c2.average_tail(0.5, 0.2, total_steps=10))
    # After steps 6, 7, 8: the mean of 6 and 7, from then on halfway to the new parameters (a horizon of two steps).
    for steps, average in [(5, 5.0), (6, 6.0), (7, 6.5), (8, 7.25), (9, 8.125)]:
        params, state = run(tx, steps, PARAMS)
        got = c2.averaged_params(state, params, weight=1.0)
        np.testing.assert_allclose(got["w"], average)
        np.testing.assert_allclose(c2.averaged_params(state, params)["b"], 0.4 * steps + 0.6 * average, rtol=1e-6)


def test_the_horizon_may_be_a_schedule():
    tx = optax.chain(optax.sgd(1.0), c2.average_tail(0.0, lambda count: (4 - count) / 4, total_steps=4))
    # Horizons of 4, 3, 2 and 1 steps: 1, the mean of 1 and 2, halfway to 3, and at the end the last parameters.
    for steps, average in [(1, 1.0), (2, 1.5), (3, 2.25), (4, 4.0)]:
        params, state = run(tx, steps, PARAMS)
        np.testing.assert_allclose(c2.averaged_params(state, params, 1.0)["w"], average)


def test_updates_pass():
    tx = c2.average_tail(0.0, total_steps=4)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert updates is PARAMS


def test_the_average_is_finer_than_the_parameters():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    params, state = run(optax.chain(optax.sgd(1.0), c2.average_tail(0.0, 1.0, total_steps=2)), 2, params)
    assert jax.tree.leaves(state)[-1].dtype == jnp.float32
    got = c2.averaged_params(state, params, 1.0)["w"]
    assert got.dtype == jnp.bfloat16 and float(got[0, 0]) == 1.5


def test_masks_partitions_and_what_is_not_averaged():
    labels = {"w": "a", "b": "b"}
    masked = optax.chain(optax.sgd(1.0), c2.average_tail(0.0, 1.0, total_steps=2, mask={"w": True, "b": False}))
    in_one = optax.partition({"a": optax.chain(optax.sgd(1.0), c2.average_tail(0.0, 1.0, total_steps=2)),
                              "b": optax.sgd(1.0)}, labels)  # fmt: skip
    for tx in (masked, in_one):
        params, state = run(tx, 2, PARAMS)
        got = c2.averaged_params(state, params, 1.0)
        np.testing.assert_allclose(got["w"], 1.5)
        np.testing.assert_allclose(got["b"], 2.0)


def test_entries_that_are_not_finite_do_not_enter():
    tx = c2.average_tail(0.0, 1.0, total_steps=2)
    _, state = tx.update({"w": jnp.array([1.0, 1.0])}, tx.init({"w": jnp.zeros(2)}), {"w": jnp.zeros(2)})
    _, state = tx.update({"w": jnp.array([jnp.nan, 1.0])}, state, {"w": jnp.ones(2)})
    np.testing.assert_array_equal(state.average["w"], [1.0, 1.5])


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="the state has no average"):
        c2.averaged_params(optax.sgd(1.0).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="without params"):
        tx = c2.average_tail(total_steps=2)
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="total_steps = 0"):
        c2.average_tail(total_steps=0)
