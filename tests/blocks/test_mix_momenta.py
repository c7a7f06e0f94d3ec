"""Momentum on several time scales: by hand, and as Optax's momenta."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close, normal, relative_error
from optax.contrib import MuonDimensionNumbers

import celo2_harness as c2


def run(tx, gradients, state=None):
    state = tx.init(gradients[0]) if state is None else state
    out = []
    for gradient in gradients:
        updates, state = tx.update(gradient, state)
        out.append(updates)
    return out, state


def test_by_hand():
    # g = 1 then 2; m(0.5) = 0.5, 1.25; m(0.75) = 0.25, 0.6875.
    gradients = [{"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}]
    (first, second), state = run(c2.mix_momenta((0.5, 0.75), (0.25, 0.75), nesterov=False), gradients)
    np.testing.assert_allclose(first["w"], 0.25 * 0.5 + 0.75 * 0.25)
    np.testing.assert_allclose(second["w"], 0.25 * 1.25 + 0.75 * 0.6875)
    np.testing.assert_allclose([m["w"][0] for m in state.mu], [1.25, 0.6875])
    assert int(state.count) == 2
    mean = 0.25 * 0.5 + 0.75 * 0.25
    (first, _), _ = run(c2.mix_momenta((0.5, 0.75), (0.25, 0.75), nesterov=0.5), gradients)
    np.testing.assert_allclose(first["w"], 0.5 + 0.5 * mean)
    (first, _), _ = run(c2.mix_momenta((0.5, 0.75), (0.25, 0.75)), gradients)
    ahead = 0.25 * 0.5 + 0.75 * 0.75
    np.testing.assert_allclose(first["w"], 1 - ahead + ahead * mean)
    (first, _), _ = run(c2.mix_momenta((0.5, 0.75), nesterov=False), gradients)
    np.testing.assert_allclose(first["w"], 0.375)


def test_schedules_follow_the_step_count():
    gradients = [{"w": jnp.ones(1)}] * 3
    tx = c2.mix_momenta((0.5,), (lambda count: 1.0 + count,), lambda count: 1.0 - 0.5 * count)
    got, _ = run(tx, gradients)
    # m = 0.5, 0.75, 0.875; weights 1, 2, 3; a = 1, 0.5, 0.
    np.testing.assert_allclose([u["w"][0] for u in got], [0.5, 0.5 + 0.5 * 2 * 0.75, 1.0])


@pytest.mark.parametrize("nesterov", [False, True])
def test_one_decay_is_the_momentum_of_optax(key, nesterov):
    gradients = [{"w": normal(key, (2, 3, 4)), "b": jnp.ones(3)}, {"w": jnp.ones((2, 3, 4)), "b": -jnp.ones(3)}] * 3
    ours, _ = run(c2.mix_momenta((0.9,), nesterov=nesterov), gradients)
    theirs, _ = run(optax.chain(optax.trace(0.9, nesterov=nesterov), optax.scale(0.1)), gradients)
    for got, wanted in zip(ours, theirs, strict=True):
        assert_trees_close(got, wanted, 1e-6)


def test_one_decay_is_the_momentum_of_muon(key):
    # Far from the start, where its bias correction is one, Optax's Muon without iterations is the normalised momentum.
    gradients = [{"w": normal(key, (3, 4))}, {"w": jnp.ones((3, 4))}]
    muon = optax.contrib.scale_by_muon(
        beta=0.95, ns_steps=0, weight_dimension_numbers={"w": MuonDimensionNumbers((0,), (1,))}
    )
    state = muon.init(gradients[0])._replace(count=jnp.asarray(10_000, jnp.int32))
    theirs, _ = run(muon, gradients, state)
    ours, _ = run(c2.mix_momenta((0.95,)), gradients)
    for got, wanted in zip(ours, theirs, strict=True):
        assert relative_error(got["w"] / jnp.linalg.norm(got["w"]), wanted["w"]) <= 1e-6


def test_entries_that_are_not_finite_leave_the_state_as_it_was():
    good = {"w": jnp.array([1.0, 2.0, 3.0])}
    bad = {"w": jnp.array([jnp.nan, jnp.inf, 3.0])}
    tx = c2.mix_momenta((0.9, 0.99))
    _, before = run(tx, [good])
    (updates,), after = run(tx, [bad], before)
    (wanted,), reference = run(tx, [good], before)
    np.testing.assert_array_equal(updates["w"][:2], 0.0)
    np.testing.assert_array_equal(updates["w"][2], wanted["w"][2])
    for k in range(2):
        np.testing.assert_array_equal(after.mu[k]["w"][:2], before.mu[k]["w"][:2])
        np.testing.assert_array_equal(after.mu[k]["w"][2], reference.mu[k]["w"][2])


def test_zero_stays_zero_and_the_state_has_its_dtype():
    tx = c2.mix_momenta((0.9, 0.99), state_dtype="bfloat16")
    (updates,), state = run(tx, [{"w": jnp.zeros(3, jnp.float16)}])
    assert updates["w"].dtype == jnp.float16 and not np.any(updates["w"])
    assert {m["w"].dtype for m in state.mu} == {jnp.dtype("bfloat16")}


def test_weights_have_to_fit():
    with pytest.raises(ValueError, match="2 decays and 1 weights"):
        c2.mix_momenta((0.9, 0.99), (1.0,))
    with pytest.raises(ValueError, match="0 decays"):
        c2.mix_momenta(())
