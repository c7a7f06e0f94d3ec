"""Leaves that share a batch, padded or turned or neither, beside the same leaves one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_theta, relative_error

import celo2_harness as c2
from celo2_harness.rule import (
    CELO2_CONFIG,
    Batch,
    batch_direction,
    default_view,
    init_moments,
    leaf_direction,
    plan_batches,
    view_from_axes,
)

THETA = c2.Theta(*map(jnp.asarray, random_theta(30, 3)))
TREES = {
    "one shape": [default_view((3, 4))] * 3,
    "one shape, tall": [default_view((6, 4))] * 2,
    "turned only": [default_view((4, 6)), default_view((6, 4)), default_view((4, 6))],
    "several shapes": [default_view(shape) for shape in ((3, 7), (5, 5), (9, 2), (1, 8))],
    "mostly tall": [default_view(shape) for shape in ((7, 3), (9, 4), (4, 4), (3, 5))],
    "batches of matrices": [view_from_axes((2, 3, 5), 1, 2), view_from_axes((3, 3, 2, 4), (0, 1, 2), 3)],
    "vectors": [default_view((5,)), default_view((9,)), default_view(()), view_from_axes((3, 4), (), 1)],
}


def one_batch(views):
    (batch,) = plan_batches(views, range(len(views)), join_below=10**9, largest=10**9)
    return batch


def arrays(views, seed):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=view.shape), jnp.float32) for view in views]


@pytest.mark.parametrize("name", TREES)
def test_a_batch_comes_apart_as_it_was_put_together(name):
    batch = one_batch(TREES[name])
    leaves = arrays(batch.views, 0)
    for got, wanted in zip(batch.unstack(batch.stack(leaves)), leaves, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * ("tall" in name)) for name in TREES])
def test_directions_and_accumulators_are_those_of_single_leaves(name):
    batch = one_batch(TREES[name])
    parameters = arrays(batch.views, 1)
    moments = [init_moments(CELO2_CONFIG, view) for view in batch.views]
    alone = jax.jit(leaf_direction, static_argnums=(1, 2))
    together = jax.jit(batch_direction, static_argnums=(1, 2))
    for seed in (2, 3):
        gradients = arrays(batch.views, seed)
        gradients[1] *= 100.0
        results = [
            alone(THETA, CELO2_CONFIG, view, g, p, m)
            for view, g, p, m in zip(batch.views, gradients, parameters, moments, strict=True)
        ]
        got = together(THETA, CELO2_CONFIG, batch, gradients, parameters, moments)
        for view, direction, new, wanted in zip(batch.views, got.directions, got.moments, results, strict=True):
            assert relative_error(direction, view.invert(wanted.direction)) <= 1e-5
            assert jax.tree.structure(new) == jax.tree.structure(wanted.moments)
            assert max(jax.tree.leaves(jax.tree.map(relative_error, new, wanted.moments))) <= 2e-6
        moments = [result.moments for result in results]


def test_matrices_without_a_gradient_get_no_direction():
    batch = one_batch(TREES["several shapes"])
    gradients = arrays(batch.views, 2)
    gradients[2] = jnp.zeros_like(gradients[2])
    moments = [init_moments(CELO2_CONFIG, view) for view in batch.views]
    got = jax.jit(batch_direction, static_argnums=(1, 2))(
        THETA, CELO2_CONFIG, batch, gradients, arrays(batch.views, 1), moments
    )
    assert [bool(jnp.any(direction != 0.0)) for direction in got.directions] == [True, True, False, True]


def test_what_joins_what():
    views = [default_view(shape) for shape in ((64, 64), (60, 64), (4, 4), (4, 5), (8,))]

    def plan(join, largest=10**9):
        return [batch.members for batch in plan_batches(views, range(5), join_below=join, largest=largest)]

    assert plan(0) == [(0,), (1,), (3,), (2,), (4,)]
    assert plan(300) == [(0, 1), (3, 2), (4,)]  # 4 x 64 entries of padding, and 4
    assert plan(10**9) == [(0, 1, 3, 2), (4,)]
    assert plan(300, 64 * 64) == [(0,), (1,), (3, 2), (4,)]


def test_other_keys_and_orientations():
    views = [default_view(shape) for shape in ((4, 6), (6, 4), (6, 4))]
    (batch,) = plan_batches(views, range(3), join_below=0, largest=10**9)
    assert isinstance(batch, Batch) and batch.tall and batch.matrix == (6, 4) and batch.lengths is None
    apart = plan_batches(views, range(3), lambda i: i == 2, join_below=0, largest=10**9)
    assert [batch.members for batch in apart] == [(0, 1), (2,)]
