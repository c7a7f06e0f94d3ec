"""Persistent evolution strategies on tasks so small that the estimate can be written down.

Letters as in the module: eps the perturbation of a truncation, xi the sum of them since the unroll began, l+ and l-
the losses of the antithetic pair.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import META_CONFIG as CONFIG
from helpers import META_IMAGES, META_LABELS, assert_trees_close, assert_trees_equal

from celo2_harness.metatrain import MetaTrainConfig, init_metatrain, metatrain_step, pes
from celo2_harness.metatrain.inner import Clock, Unroll
from celo2_harness.rule import Theta
from celo2_harness.tasks.images import ImageSets

DATA = ImageSets(
    images=jnp.asarray(META_IMAGES.reshape(20, 64)),
    labels=jnp.asarray(META_LABELS, jnp.int32),
    starts=jnp.array([0, 10], jnp.int32),
    sizes=jnp.array([10, 10], jnp.int32),
)


def single(value):
    """A theta of one number per field."""
    return Theta(*(jnp.full((1,) * n, value) for n in (2, 1, 2, 1, 2, 1)))


@pytest.fixture
def line(monkeypatch):
    """Tasks without a network: state x, a step is x <- x + b0, the loss x before the step, unrolls as long as asked."""

    def fresh_unroll(config, key):
        del key
        return Unroll((), (jnp.zeros([]),), jnp.ones([])), Clock(
            jnp.zeros([], jnp.int32), jnp.asarray(config.shortest_unroll)
        )

    def inner_step(config, theta, unroll, images, labels):
        del config, images, labels
        (x,) = unroll.state
        return unroll._replace(state=(x + theta.b0[0],)), x

    monkeypatch.setattr(pes, "fresh_unroll", fresh_unroll)
    monkeypatch.setattr(pes, "inner_step", inner_step)
    return dataclasses.replace(CONFIG, tasks_per_set=1, truncation=4, shortest_unroll=6, longest_unroll=6)


def perturbation(config, theta, key, tasks):
    """eps of a truncation, drawn as the module draws it."""
    keys = jax.random.split(jax.random.split(key, 3)[0], len(theta))
    return Theta(*(config.sigma * jax.random.normal(k, (tasks, *x.shape)) for k, x in zip(keys, theta, strict=True)))


def test_accumulation_and_a_restart_inside_a_truncation(line):
    config, theta = line, single(0.3)
    one = DATA._replace(starts=DATA.starts[:1], sizes=DATA.sizes[:1])
    state = pes.init_pes(config, theta, 1, jax.random.key(0))
    state = state._replace(clocks=state.clocks._replace(step=jnp.zeros(1, jnp.int32)))
    keys = [jax.random.key(k) for k in (1, 2)]
    scale = 2 * config.sigma**2 * config.truncation
    (e1, e2) = (jax.tree.map(lambda x: x[0], perturbation(config, theta, k, 1)) for k in keys)

    # First truncation, steps 0 to 3: x+ - x- = 2 e1 t, and xi = e1.
    gradient, state, metrics = pes.pes_gradient(config, theta, state, one, keys[0])
    difference = 2 * e1.b0[0] * (0 + 1 + 2 + 3)
    assert_trees_close(gradient, jax.tree.map(lambda e: difference * e / scale, e1), 1e-5)
    assert_trees_close(jax.tree.map(lambda x: x[0], state.xi), e1, 1e-6)
    assert float(metrics.restarted) == 0 and int(state.clocks.step[0]) == 4

    # Second: steps 4 and 5 end the unroll of length 6, with weight xi = e1 + e2; x+ - x- starts at 8 e1. Then a fresh
    # task at zero makes two steps, with weight e2 alone.
    gradient, state, metrics = pes.pes_gradient(config, theta, state, one, keys[1])
    before = 8 * e1.b0[0] + (8 * e1.b0[0] + 2 * e2.b0[0])
    after = 0 + 2 * e2.b0[0]
    wanted = jax.tree.map(lambda a, b: (before * (a + b) + after * b) / scale, e1, e2)
    assert_trees_close(gradient, wanted, 1e-5)
    assert_trees_close(jax.tree.map(lambda x: x[0], state.xi), e2, 1e-6)
    assert float(metrics.restarted) == 1 and int(state.clocks.step[0]) == 2
    np.testing.assert_allclose(state.unrolls.state[0][0], 2 * (0.3 + e2.b0[0] * np.array([1, -1])), rtol=1e-5)


def test_a_restart_at_the_start_of_a_truncation_drops_the_past(line):
    config, theta = dataclasses.replace(line, shortest_unroll=4, longest_unroll=4), single(0.3)
    one = DATA._replace(starts=DATA.starts[:1], sizes=DATA.sizes[:1])
    state = pes.init_pes(config, theta, 1, jax.random.key(0))
    state = state._replace(clocks=Clock(jnp.array([4]), jnp.array([4])), xi=jax.tree.map(lambda x: x + 7.0, state.xi))
    gradient, state, _ = pes.pes_gradient(config, theta, state, one, jax.random.key(5))
    eps = jax.tree.map(lambda x: x[0], perturbation(config, theta, jax.random.key(5), 1))
    scale = 2 * config.sigma**2 * config.truncation
    assert_trees_close(gradient, jax.tree.map(lambda e: 12 * eps.b0[0] * e / scale, eps), 1e-5)
    assert_trees_close(jax.tree.map(lambda x: x[0], state.xi), eps, 1e-6)


def test_losses_that_are_not_finite_count_as_the_upper_end():
    top = 1.5 * math.log(10)
    got = pes.bounded_loss(jnp.array([-1.0, 0.0, 1.0, 3.4, 3.5, jnp.inf, -jnp.inf, jnp.nan]))
    np.testing.assert_allclose(got, [0, 0, 1, 3.4, top, top, 0, top], rtol=1e-6)


def test_a_diverged_pair_adds_nothing_and_stays_finite(line, monkeypatch):
    monkeypatch.setattr(
        pes, "inner_step", lambda config, theta, unroll, images, labels: (unroll, jnp.full([], jnp.nan))
    )
    state = pes.init_pes(line, single(0.0), 2, jax.random.key(0))
    gradient, _, metrics = pes.pes_gradient(line, single(0.0), state, DATA, jax.random.key(1))
    assert not any(np.any(g) for g in gradient)
    np.testing.assert_allclose(metrics.meta_loss, [pes.LARGEST_LOSS] * 2, rtol=1e-6)


def test_initial_state():
    state = init_metatrain(CONFIG, 2)
    assert [x.shape for x in state.theta] == [(2, 2), (2,), (2, 2), (2,), (2, 3), (3,)]
    assert [x.shape for x in state.pes.xi] == [(4, *x.shape) for x in state.theta]
    assert all(x.shape[:2] == (4, 2) for x in jax.tree.leaves(state.pes.unrolls))
    assert not any(np.any(x) for x in state.pes.xi) and not np.any(state.theta.b0)
    clocks = state.pes.clocks
    assert clocks.step.shape == (4,) and np.all((clocks.step >= 0) & (clocks.step < 20))
    assert np.all((clocks.length >= 5) & (clocks.length <= 20))
    first, second = (jax.tree.map(lambda x: x[:, sign], state.pes.unrolls) for sign in (0, 1))  # noqa: B023
    assert_trees_equal(first, second)
    paper = jax.eval_shape(lambda: init_metatrain(MetaTrainConfig(), 4))
    assert sum(x.size for x in paper.theta) == 347 and paper.pes.clocks.step.shape == (32,)


def test_a_swapped_pair_flips_the_estimate(line, monkeypatch):
    # Losses that only tell the members of a pair apart.
    monkeypatch.setattr(pes, "inner_step", lambda config, theta, unroll, images, labels: (unroll, unroll.state[0]))
    state = pes.init_pes(line, single(0.0), 2, jax.random.key(0))
    state = state._replace(clocks=Clock(jnp.zeros(2, jnp.int32), jnp.full(2, 6)))

    def estimate(losses):
        unrolls = state.unrolls._replace(state=(jnp.array(losses),))
        return pes.pes_gradient(line, single(0.0), state._replace(unrolls=unrolls), DATA, jax.random.key(1))[0]

    gradient = estimate([[1.0, 0.25], [0.5, 2.0]])
    assert all(np.any(g) for g in gradient)
    assert_trees_equal(estimate([[0.25, 1.0], [2.0, 0.5]]), jax.tree.map(jnp.negative, gradient))
    assert not any(np.any(g) for g in estimate([[1.0, 1.0], [2.0, 2.0]]))


def test_one_seed_one_theta():
    def run(config):
        state = init_metatrain(config, 2)
        for _ in range(3):
            state, metrics = metatrain_step(config, state, DATA)
        assert int(state.iteration) == 3 and float(metrics.gradient_norm) > 0
        return state.theta

    first = run(CONFIG)
    assert_trees_equal(run(CONFIG), first)
    assert np.any(np.asarray(first.w0) != np.asarray(init_metatrain(CONFIG, 2).theta.w0))
