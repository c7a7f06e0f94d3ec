"""Momentum of the applied steps, by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import celo2_harness as c2
from celo2_harness import schedules


def run(tx, updates):
    state, out = tx.init(updates[0]), []
    for tree in updates:
        tree, state = tx.update(tree, state)
        out.append(tree)
    return out, state


def numbers(trees):
    return [float(tree["w"][0]) for tree in trees]


def test_by_hand_and_off_outside_of_its_part_of_the_run():
    updates = [{"w": jnp.array([1.0])}] * 4
    got, state = run(c2.look_ahead(0.5, 0.5, 0.25, 0.75, total_steps=4), updates)
    # e = 0.5; u = 1.25, e = 0.875; u = 1.4375, e = 1.15625; off.
    np.testing.assert_allclose(numbers(got), [1.0, 1.25, 1.4375, 1.0])
    np.testing.assert_allclose(state.mu["w"], 0.5 * 1.15625 + 0.5)


def test_a_steady_step_grows_to_its_limit():
    got, _ = run(c2.look_ahead(0.6, 0.5, 0.0, 1.0, total_steps=100), [{"w": jnp.array([1.0])}] * 100)
    np.testing.assert_allclose(numbers(got)[-1], 1 / (1 - 0.6), rtol=1e-5)


def test_the_horizon_is_a_part_of_the_run():
    updates = [{"w": jnp.array([1.0])}] * 3
    by_horizon, _ = run(c2.look_ahead(0.5, None, 0.0, total_steps=200, horizon=0.1), updates)
    by_decay, _ = run(c2.look_ahead(0.5, 1 - 1 / 20, 0.0, total_steps=200), updates)
    np.testing.assert_allclose(numbers(by_horizon), numbers(by_decay))


def test_strength_may_follow_the_learning_rate():
    strength = schedules.scaled(0.5, lambda count: count / 2)
    got, _ = run(c2.look_ahead(strength, 0.5, 0.0, 1.0, total_steps=4), [{"w": jnp.array([1.0])}] * 2)
    np.testing.assert_allclose(numbers(got), [1.0, 1.0 + 0.25 * 0.5])


def test_updates_that_are_not_finite():
    tx = c2.look_ahead(0.5, 0.5, 0.0, total_steps=4)
    _, before = run(tx, [{"w": jnp.array([1.0, 1.0])}])
    updates, after = tx.update({"w": jnp.array([jnp.nan, 1.0])}, before)
    np.testing.assert_array_equal(updates["w"], [0.0, 1.25])
    assert after.mu["w"][0] == before.mu["w"][0]


def test_it_is_the_last_link():
    tx = optax.chain(optax.sgd(0.1), c2.look_ahead(0.5, 0.5, 0.0, total_steps=4))
    got, _ = run(tx, [{"w": jnp.array([1.0])}] * 2)
    np.testing.assert_allclose(numbers(got), [-0.1, -0.125])


def test_the_length_of_the_run_is_checked():
    with pytest.raises(ValueError, match="total_steps = 0"):
        c2.look_ahead(total_steps=0)
