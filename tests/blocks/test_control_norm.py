"""Norms of matrices: pinned, damped along the radius, or with a floor; against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal, relative_error
from optax.contrib import MuonDimensionNumbers

import celo2_harness as c2

SHAPES = {"w": (4, 6), "b": (5,)}


def apply(tx, updates, params):
    return tx.update(updates, tx.init(params), params)[0]


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def hyperball(u, w, rate):
    norm = np.linalg.norm(w)
    moved = w - rate * norm * u / np.linalg.norm(u)
    return moved * norm / np.linalg.norm(moved) - w


def test_hyperball(key):
    params, updates = normal(key, SHAPES), normal(jax.random.fold_in(key, 1), SHAPES)
    got = apply(c2.control_norm("hyperball", 0.3), updates, params)
    assert relative_error(got["w"], hyperball(wide(updates["w"]), wide(params["w"]), 0.3)) <= 1e-5
    np.testing.assert_allclose(got["b"], -0.3 * updates["b"], rtol=1e-6)  # vectors are left alone
    # The size of the direction does not matter, that of the matrix does: the rate is an angle.
    again = apply(c2.control_norm("hyperball", 0.3), {**updates, "w": 7 * updates["w"]}, params)
    np.testing.assert_allclose(again["w"], got["w"], rtol=1e-4, atol=1e-6)
    larger = apply(c2.control_norm("hyperball", 0.3), updates, {**params, "w": 7 * params["w"]})
    np.testing.assert_allclose(larger["w"], 7 * got["w"], rtol=1e-4, atol=1e-6)


def test_the_norm_is_that_of_the_start_in_bfloat16_too(key):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), normal(key, SHAPES))
    tx = c2.control_norm("hyperball", lambda count: 0.1)
    start, state, update = np.linalg.norm(wide(params["w"])), tx.init(params), jax.jit(tx.update)
    for step in range(50):
        updates, state = update(normal(jax.random.fold_in(key, step), SHAPES, dtype=jnp.bfloat16), state, params)
        params = optax.apply_updates(params, updates)
    assert abs(np.linalg.norm(wide(params["w"])) / start - 1) <= 3e-3
    assert int(state.count) == 50


def test_matrices_that_start_at_zero_are_left_alone():
    tx = c2.control_norm("hyperball", 0.1)
    params, updates = {"w": jnp.zeros((2, 3, 2)).at[1].set(1.0)}, {"w": jnp.ones((2, 3, 2)).at[1, 0].set(-1.0)}
    state = tx.init(params)
    for step in range(1, 4):
        got, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, got)
        np.testing.assert_allclose(params["w"][0], -0.1 * step, rtol=1e-6)
        np.testing.assert_allclose(jnp.linalg.norm(params["w"][1]), np.sqrt(6), rtol=1e-6)


def test_radial(key):
    params, updates = normal(key, SHAPES), normal(jax.random.fold_in(key, 1), SHAPES)
    u, w = wide(updates["w"]), wide(params["w"])
    for outward in (True, False):
        # Updates are subtracted: a step leads outward if the direction points inward.
        u = u - (np.sum(u * w) / np.sum(w * w) + (0.2 if outward else -0.2)) * w
        got = apply(c2.control_norm("radial", strength=0.25), {**updates, "w": jnp.asarray(u, jnp.float32)}, params)
        wanted = u + 0.25 * 0.2 * w if outward else u
        assert relative_error(got["w"], wanted) <= 1e-5
        np.testing.assert_array_equal(got["b"], updates["b"])
    zero = apply(c2.control_norm("radial"), updates, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_array_equal(zero["w"], updates["w"])


def test_rows():
    # Three output units that read two inputs each; norms of weights 5, 5, 0, of directions 1, 10, 1.
    params = {"w": jnp.array([[3.0, 5.0, 0.0], [4.0, 0.0, 0.0]]), "b": jnp.ones(3)}
    updates = {"w": jnp.array([[1.0, 0.0, 1.0], [0.0, 10.0, 0.0]]), "b": jnp.ones(3)}
    got = apply(c2.control_norm("rows", floor=0.4), updates, params)
    np.testing.assert_allclose(got["w"], [[2.0, 0.0, 1.0], [0.0, 10.0, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(got["b"], updates["b"])


@pytest.mark.parametrize("mode", ["hyperball", "radial", "rows"])
def test_every_matrix_of_a_view_counts_alone(key, mode):
    tx = lambda views: c2.control_norm(
        mode, 0.1 if mode == "hyperball" else None, weight_dimension_numbers=views and MuonDimensionNumbers(*views)
    )
    for shape, views, matrix in [
        ((3, 3, 2, 4), ((0, 1, 2), (3,)), lambda x: x.reshape(18, 4)),
        ((6, 2, 4), ((0,), (2,)), lambda x: x[:, 1]),
        ((2, 4, 6), None, lambda x: x[1]),
    ]:
        w, u = normal(key, shape), -normal(key, shape) + 0.1
        got = apply(tx(views), {"w": u}, {"w": w})["w"]
        alone = apply(tx(None), {"w": matrix(u)}, {"w": matrix(w)})["w"]
        np.testing.assert_allclose(matrix(got), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["hyperball", "radial", "rows"])
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_zero_and_broken_directions_give_no_update(key, mode, value):
    tx = c2.control_norm(mode, 0.1 if mode == "hyperball" else None)
    params = normal(key, {"w": (2, 3, 4), "b": (5,)})
    updates = {"w": jnp.ones((2, 3, 4)).at[0].multiply(0.0).at[0, 0, 0].set(value), "b": jnp.full(5, value)}
    got = apply(tx, updates, params)
    assert not np.any(got["w"][0]) and not np.any(got["b"])
    assert np.all(got["w"][1])


def test_modes_follow_each_other(key):
    params, updates = normal(key, SHAPES), normal(jax.random.fold_in(key, 1), SHAPES)
    tx = optax.chain(c2.control_norm("radial"), c2.control_norm("rows"), c2.control_norm("hyperball", 0.1))
    new = optax.apply_updates(params, apply(tx, updates, params))
    np.testing.assert_allclose(jnp.linalg.norm(new["w"]), jnp.linalg.norm(params["w"]), rtol=1e-5)


def test_options_that_do_not_go_together_are_named():
    function = getattr(c2.control_norm, "__wrapped__", c2.control_norm)
    with pytest.raises(ValueError, match="mode = 'ball', expected one of hyperball, radial, rows"):
        function("ball")
    with pytest.raises(ValueError, match="learning_rate = None in mode 'hyperball'; give the angle"):
        c2.control_norm()
    with pytest.raises(ValueError, match="learning_rate = 0.1 in mode 'radial'"):
        c2.control_norm("radial", 0.1)
    with pytest.raises(ValueError, match="without params"):
        c2.control_norm("rows").update({"w": jnp.ones((2, 2))}, optax.EmptyState())
