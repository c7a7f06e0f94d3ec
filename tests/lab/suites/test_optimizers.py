"""Optimizers that suites name: all of them descend, and decay the same leaves in the same way."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import celo2_harness as c2
from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites import OPTIMIZERS, Suite, make_optax, make_spec
from celo2_harness.lab.training.reading import read

RATE, DECAY = 0.5, 0.25


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_descent_and_decay(name):
    params = {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "bias": jnp.linspace(0.5, 1.0, 4)}
    grads = {"kernel": jnp.cos(jnp.arange(12.0)).reshape(3, 4), "bias": jnp.sin(jnp.arange(1.0, 5.0))}
    updates = []
    for decay in (0.0, DECAY):
        tx = make_optax(name, lambda step: RATE, decay, 10, lambda tree: {"kernel": True, "bias": False}, {})
        updates.append(tx.update(grads, tx.init(params), params)[0])
    for leaf in params:
        assert float(jnp.sum(updates[0][leaf] * grads[leaf])) < 0
    difference = jax.tree.map(lambda one, two: np.asarray(two - one), *updates)
    # p <- p - rate (direction + decay p), whatever the direction. Rounding of updates of order one: 1e-6.
    np.testing.assert_allclose(difference["kernel"], -RATE * DECAY * params["kernel"], atol=1e-6)
    np.testing.assert_array_equal(difference["bias"], 0)


def test_sgd_by_hand():
    """Momentum 0.9: the second trace of a constant gradient is 1.9 times it."""
    tx = make_optax("sgd", lambda step: 0.1, 0.0, 10, lambda tree: True, {})
    params, grads = jnp.ones(2), jnp.array([1.0, -2.0])
    _, state = tx.update(grads, tx.init(params), params)
    updates, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(updates, [-0.19, 0.38], rtol=1e-6)


def test_ademamix_by_hand():
    """A constant gradient of one: fast and second moments are one, the slow one grows by its own decay."""
    steps, b1, b3, alpha = 4, 0.5, 0.8, 3.0
    options = {"b1": b1, "b3": b3, "alpha": alpha, "eps": 0.0}
    tx = make_optax("ademamix", lambda step: 0.1, 0.0, steps, lambda tree: True, options)
    params, grads = jnp.ones(1), jnp.ones(1)
    state, slow = tx.init(params), 0.0
    for step in range(steps + 2):
        part = min(step / steps, 1.0)
        # The number of steps to a half goes in a straight line from that of b1 to that of b3.
        half = (1 - part) * math.log(0.5) / math.log(b1) + part * math.log(0.5) / math.log(b3)
        decay = 0.5 ** (1 / half)
        slow = decay * slow + (1 - decay)
        updates, state = tx.update(grads, state, params)
        np.testing.assert_allclose(updates, -0.1 * (1 + alpha * part * slow), rtol=1e-5)


def spec_of(optimizer, **suite):
    tasks = [{"name": "language_model", "size": "tiny", "steps": 8}]
    content = {"name": "s", "tasks": tasks, "search": {"learning_rates": [0.5]}, "optimizers": [optimizer], **suite}
    (found,) = (suite := read(Suite, content)).optimizers
    return make_spec(suite, found, 0.5, 0.0, 8)


def test_schedule_free_is_evaluated_at_its_average():
    """By hand, without momentum in the steps: z steps along the sign of the gradient, x is the mean of z."""
    spec = spec_of({"optax": "schedule_free_adamw", "guard": {}}, warmup=0.25)
    assert spec.settings["schedule"] == "warmup_constant" and "average_tail" not in spec.settings
    np.testing.assert_allclose([spec.schedule(step) for step in (0, 1, 2, 8)], [0, 0.25, 0.5, 0.5])
    params = {"w": jnp.zeros(1)}
    state, z, weights, x = spec.tx.init(params), 0.0, 0.0, 0.0
    for step in range(4):
        updates, state = spec.tx.update({"w": jnp.full(1, 3.0)}, state, params)
        params = optax.apply_updates(params, updates)
        z -= spec.schedule(step)  # the gradient over its own root mean square is one
        weight = max(spec.schedule(now + 1) for now in range(step + 1)) ** 2  # Optax counts its weights from one
        weights += weight
        x += weight / weights * (z - x)
        np.testing.assert_allclose(spec.eval_params(state, params)["w"], x, rtol=1e-5)
        np.testing.assert_allclose(params["w"], 0.9 * x + 0.1 * z, rtol=1e-5)


def test_any_other_optimizer_is_evaluated_at_the_average_of_its_last_parameters_if_asked():
    assert spec_of({"optax": "sgd"}).eval_params is None
    spec = spec_of({"optax": "sgd", "guard": {}, "average_tail": {"start": 0.0, "horizon": 1, "weight": 1.0}})
    assert spec.settings["average_tail"] == {"start": 0.0, "horizon": 1.0, "weight": 1.0} and "guard" in spec.settings
    params = {"w": jnp.zeros(1)}
    state, seen = spec.tx.init(params), []
    for _ in range(3):
        updates, state = spec.tx.update({"w": jnp.ones(1)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params["w"])
    np.testing.assert_allclose(spec.eval_params(state, params)["w"], np.mean(seen, axis=0), rtol=1e-6)
    assert c2.averaged_params(state, params)["w"] != params["w"]
    for wrong, message in (
        ({"optax": "schedule_free_adamw", "average_tail": {}}, "schedule_free_adamw is evaluated at an average of its"),
        ({"optax": "sgd", "average_tail": {"start": 2}}, "start = 2.0: expected a number from 0 to 1"),
        ({"optax": "sgd", "average_tail": {"steps": 2}}, "average_tail.steps: there is no such key"),
    ):
        with pytest.raises(InputError, match=message):
            spec_of(wrong)
