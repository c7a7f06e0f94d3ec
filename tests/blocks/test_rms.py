"""RMS normalisation by hand on 2x3 arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal
from optax.contrib import MuonDimensionNumbers

import celo2_harness as c2

# Mean squares: 4 for the matrix (24 / 6), 9 for the vector, 4 for the scalar.
TREE = {"w": jnp.array([[2.0, -2.0, 2.0], [2.0, 2.0, -2.0]]), "b": jnp.array([3.0, -3.0]), "s": jnp.array(2.0)}


def run(tx, *trees):
    state, out = tx.init(trees[0]), []
    for tree in trees:
        updates, state = tx.update(tree, state)
        out.append(updates)
    return out, state


def assert_close(got, w, b, s):
    np.testing.assert_allclose(got["w"], np.asarray(TREE["w"]) / 2 * w, rtol=1e-6)
    np.testing.assert_allclose(got["b"], np.asarray(TREE["b"]) / 3 * b, rtol=1e-6)
    np.testing.assert_allclose(got["s"], s, rtol=1e-6)


def test_per_step():
    (got,), state = run(c2.normalize_rms(), TREE)
    assert_close(got, 1, 1, 1)
    assert not jax.tree.leaves(state)
    (got,), _ = run(c2.normalize_rms(eps=12.0), TREE)  # sqrt(4 + 12) = 4, sqrt(9 + 12)
    assert_close(got, 0.5, 3 / np.sqrt(21), 0.5)


def test_clip():
    (got,), state = run(c2.normalize_rms("clip"), TREE)
    assert_close(got, 1, 1, 1)
    (got,), _ = run(c2.normalize_rms("clip", threshold=2.5), TREE)  # only the vector's RMS of 3 is above
    assert_close(got, 2, 2.5, 2)
    assert not jax.tree.leaves(state)


def test_none():
    (got,), _ = run(c2.normalize_rms("none"), TREE)
    assert_trees_equal(got, TREE)


def test_rolling():
    # decay 0.5, mean squares 4 then 16: averages 2 and 9, corrected by 1/2 and 3/4: 4 and 12.
    tx = c2.normalize_rms("rolling", decay=0.5, eps=0.0)
    double = jax.tree.map(lambda x: 2 * x, TREE)
    (first, second), state = run(tx, TREE, double)
    assert_close(first, 1, 1, 1)
    assert_close(second, 4 / np.sqrt(12), 6 / np.sqrt(27), 4 / np.sqrt(12))
    assert int(state.count) == 2
    assert jax.tree.map(jnp.shape, state.nu) == {"w": (1, 1), "b": (1,), "s": (1,)}
    np.testing.assert_allclose(state.nu["w"], 9.0)


def test_rolling_state_is_not_poisoned():
    tx = c2.normalize_rms("rolling")
    bad = TREE | {"w": TREE["w"].at[0, 0].set(jnp.nan), "b": TREE["b"].at[0].set(jnp.inf)}
    _, good = run(tx, TREE)
    _, state = tx.update(bad, good)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    np.testing.assert_array_equal(state.nu["w"], good.nu["w"])


@pytest.mark.parametrize("mode", ["per_step", "rolling", "clip"])
def test_zero_stays_zero_and_every_matrix_counts_alone(mode):
    stack = jnp.stack([jnp.zeros((2, 3)), TREE["w"], 100 * TREE["w"]])
    (got,), _ = run(c2.normalize_rms(mode), stack)
    assert not np.any(got[0])
    np.testing.assert_allclose(got[1], got[2], rtol=1e-6)


def test_views():
    x = jnp.stack([TREE["w"], 3 * TREE["w"]], axis=1)  # (2, 2, 3): middle axis are heads
    (got,), _ = run(c2.normalize_rms(weight_dimension_numbers=MuonDimensionNumbers((0,), (2,))), x)
    np.testing.assert_allclose(np.abs(got), 1.0, rtol=1e-6)
    (got,), _ = run(c2.normalize_rms(weight_dimension_numbers=MuonDimensionNumbers((0,), (1, 2))), x)
    np.testing.assert_allclose(np.abs(got[:, 0]), 2 / np.sqrt(20), rtol=1e-6)  # mean square (4 + 36) / 2


def test_unknown_mode_is_named():
    function = getattr(c2.normalize_rms, "__wrapped__", c2.normalize_rms)
    with pytest.raises(ValueError, match="mode = 'per_stop', expected one of per_step, rolling, clip, none"):
        function("per_stop")
