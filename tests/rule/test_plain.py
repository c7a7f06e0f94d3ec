"""The fast path against the plain float64 program, on random shapes and on matrix views."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from helpers import random_theta, relative_error
from hypothesis import given, settings, strategies as st

import celo2_harness as c2
from celo2_harness.rule import CELO2_CONFIG, default_view, init_moments, leaf_direction, view_from_axes

# Rounding in float32; the plain program differs from the published numbers by at most 5e-6, the fast path by 1e-5.
TOLERANCE = 2e-5
THETA = random_theta(30, 3)  # three hidden units compile faster than eight and take the same path


@functools.partial(jax.jit, static_argnums=0)
def fast(view, gradient, parameter, moments):
    return leaf_direction(THETA, CELO2_CONFIG, view, gradient, parameter, moments)[:2]


def compare(view, to_view, shape, seed, axes=None, steps=2):
    """`to_view` is NumPy arithmetic that brings a leaf into its view; nothing of the package's view is used there."""
    rng = np.random.default_rng(seed)
    p = rng.normal(size=shape).astype(np.float32)
    moments, state = init_moments(CELO2_CONFIG, view), plain.init(to_view(p).shape, axes)
    for _ in range(steps):
        g = (rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 1, size=shape)).astype(np.float32)
        got, moments = fast(view, jnp.asarray(g), jnp.asarray(p), moments)
        wanted, state = plain.direction(THETA, to_view(g), to_view(p), state, axes)
        assert relative_error(np.asarray(got).reshape(wanted.shape), wanted) <= TOLERANCE
    for ours, theirs in zip(moments.row or (), state.row, strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE


@settings(max_examples=12)
@given(shape=st.lists(st.integers(1, 7), max_size=5).map(tuple), seed=st.integers(0, 1000))
def test_random_shapes(shape, seed):
    compare(default_view(shape), lambda x: x, shape, seed)


# Each view written out in NumPy. d1 and d0 are the smaller and the larger matrix axis, later first among equals.
VIEWS = {
    "heads as output": ((6, 2, 4), ((0,), (1, 2)), lambda x: x.reshape(6, 8), (0, 1)),
    "per head": ((6, 2, 4), ((0,), (2,)), lambda x: x.transpose(1, 0, 2), (2, 1)),
    "output projection per head": ((2, 4, 6), ((1,), (2,)), lambda x: x, (1, 2)),
    "convolution": ((3, 3, 2, 4), ((0, 1, 2), (3,)), lambda x: x.reshape(18, 4), (1, 0)),
    "stacked, transposed": ((5, 4, 3), ((2,), (1,)), lambda x: x.transpose(0, 2, 1), (1, 2)),
    "square": ((4, 4), ((1,), (0,)), lambda x: x.T, (0, 1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_matrix_views(name):
    shape, (rows, columns), to_view, axes = VIEWS[name]
    view = view_from_axes(shape, rows, columns)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(view.apply(jnp.asarray(x)), to_view(x))
    np.testing.assert_array_equal(view.invert(view.apply(jnp.asarray(x))), x)
    # For more than two axes the plain program factors over the matrix axes, as the view says.
    batch = to_view(x).ndim - 2
    axes = axes if batch == 0 else tuple(batch + axis - 1 if max(axes) > 1 else batch + axis for axis in axes)
    compare(view, to_view, shape, 3, axes, steps=1)


def test_stacked_vectors_are_vectors():
    view = view_from_axes((3, 5), (), 1)
    rng = np.random.default_rng(0)
    g, p = (rng.normal(size=(3, 5)).astype(np.float32) for _ in range(2))
    got, moments = fast(view, jnp.asarray(g), jnp.asarray(p), init_moments(CELO2_CONFIG, view))
    for k in range(3):
        wanted, _ = plain.direction(THETA, g[k], p[k], plain.init((5,)))
        assert relative_error(got[k], wanted) <= TOLERANCE
    assert moments.row is None and moments.diag[0].shape == (3, 5)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((6, 6), (0, 1)), ((5, 5, 5), (1, 2)), ((16, 4, 6), (2, 0)), ((4, 4, 9), (1, 2)), ((1, 5), (0, 1))],
)
def test_factored_axes_are_the_two_largest_later_ones_first(shape, axes):
    assert default_view(shape).factored == axes == plain.factored_axes(shape)


@pytest.mark.parametrize(
    ("rows", "columns", "fault"),
    [((0,), (2,), "axes 0 to 1"), ((0,), (0,), "each axis once"), ((0, 1), (), "at least one output axis")],
)
def test_impossible_views_are_refused_by_name(rows, columns, fault):
    with pytest.raises(ValueError, match=f"kernel of shape.*{fault}"):
        view_from_axes((3, 4), rows, columns, name="kernel")


def test_negative_axes_count_from_the_end():
    assert view_from_axes((2, 3, 4), -2, -1) == view_from_axes((2, 3, 4), 1, 2)


def test_another_configuration_changes_the_shapes():
    config = c2.RuleConfig(momentum_decays=(0.5,), factored_decays=(0.5, 0.9), features=("momentum", "row_moment"))
    moments = init_moments(config, default_view((2, 3)))
    assert [x.shape for x in moments.mu] == [(2, 3)]
    assert [x.shape for x in moments.row] == [(2,)] * 2 and [x.shape for x in moments.col] == [(3,)] * 2
