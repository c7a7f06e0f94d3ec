"""Schedules by hand at their key steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo2_harness.schedules import SCHEDULES, scaled, warmup_steps

HALF_COSINE = (1 + np.cos(np.pi / 4)) / 2
# name: (warm-up, {step of 100: value})
VALUES = {
    "constant": (0.1, {0: 1, 5: 1, 50: 1, 100: 1}),
    "warmup_constant": (0.1, {0: 0, 5: 0.5, 10: 1, 50: 1, 100: 1}),
    "linear": (0.1, {0: 0, 5: 0.5, 10: 1, 55: 0.5, 99: 1 / 90, 100: 0, 200: 0}),
    "warmup_cosine": (20, {0: 0, 10: 0.5, 20: 1, 40: HALF_COSINE, 60: 0.5, 100: 0, 200: 0}),
    "warmup_stable_decay": (0.1, {0: 0, 5: 0.5, 10: 1, 50: 1, 80: 1, 85: 0.5, 100: 0, 200: 0}),
    "inverse_sqrt": (25, {0: 0, 25: 1, 100: 0.5, 400: 0.25}),
    "power": (0.1, {0: 0, 5: 0.5, 10: 1, 55: 0.5**1.2, 100: 0, 200: 0}),
    "flat_then_linear": (0.1, {0: 0, 5: 0.5, 10: 1, 30: 1, 65: 0.5, 100: 0, 200: 0}),
}


def test_the_table_is_complete():
    assert set(VALUES) == set(SCHEDULES)


@pytest.mark.parametrize("name", VALUES)
def test_values_by_hand(name):
    warmup, values = VALUES[name]
    schedule = SCHEDULES[name](100, warmup)
    got = [float(schedule(step)) for step in values]
    np.testing.assert_allclose(got, list(values.values()), atol=1e-6)
    traced = jax.jit(jax.vmap(schedule))(jnp.array(list(values)))
    np.testing.assert_allclose(traced, list(values.values()), atol=1e-6)


@pytest.mark.parametrize("total", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("name", VALUES)
def test_short_runs_start_and_finish(name, warmup, total):
    values = np.array([float(SCHEDULES[name](total, warmup)(step)) for step in range(total + 3)])
    assert np.all((values >= 0) & (values <= 1))
    if name not in ("constant", "warmup_constant", "inverse_sqrt"):
        np.testing.assert_allclose(values[total:], 0, atol=1e-6)
    if warmup == 0.0 and name != "inverse_sqrt":  # which needs a warm-up of one step
        assert values[0] == 1


def test_warmup_is_a_fraction_below_one_and_steps_from_one_on():
    assert [warmup_steps(1000, w) for w in (0.0, 0.05, 0.999, 1, 30, 30.0)] == [0, 50, 999, 1, 30, 30]


def test_scaled():
    assert scaled(2.0, 3.0) == 6.0
    assert scaled(2.0, lambda count: count + 1)(4) == 10.0
    assert float(jax.jit(lambda rate: scaled(rate, optax.constant_schedule(0.5))(0))(4.0)) == 2.0
