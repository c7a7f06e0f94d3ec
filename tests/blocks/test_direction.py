"""The learned direction as a block: zero in zero out, bad numbers, state layout and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, assert_trees_close, assert_trees_equal, jitted, normal
from optax.contrib import MuonDimensionNumbers

import celo2_harness as c2

SHAPES = {"w": (3, 4, 5), "b": (5,)}
TX = c2.scale_by_celo2(TINY)


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


@pytest.fixture
def params(key):
    return normal(key, SHAPES)


def test_zero_gradients_give_exactly_zero_until_the_first_nonzero_one(params, key):
    gradient = normal(jax.random.fold_in(key, 1), SHAPES)
    dead = {"w": gradient["w"].at[1].set(0.0), "b": zeros(gradient["b"])}
    state = TX.init(params)
    for _ in range(2):
        updates, state = jitted(TX)(dead, state, params)
        assert not np.any(updates["b"]) and not np.any(updates["w"][1])
        assert np.all(np.any(updates["w"][::2] != 0, axis=(1, 2)))
    # One nonzero entry wakes a slice, and a zero gradient later does not put it to sleep.
    alive = {"w": dead["w"].at[1, 0, 0].set(1e-3), "b": dead["b"].at[2].set(-1.0)}
    updates, state = jitted(TX)(alive, state, params)
    assert np.any(updates["b"]) and np.any(updates["w"][1])
    updates, state = jitted(TX)(zeros(dead), state, params)
    assert np.any(updates["b"]) and np.any(updates["w"][1])


def test_a_sleeping_slice_does_not_change_the_others(params, key):
    gradient = normal(jax.random.fold_in(key, 1), SHAPES)
    updates, _ = jitted(TX)(gradient, TX.init(params), params)
    sleeping, _ = jitted(TX)(gradient | {"b": zeros(gradient["b"])}, TX.init(params), params)
    np.testing.assert_array_equal(updates["w"], sleeping["w"])


@pytest.mark.parametrize(("bad", "counts_as"), [(jnp.nan, 0.0), (jnp.inf, 1000.0), (-jnp.inf, -1000.0), (1e30, 1000.0)])
def test_bad_entries_never_enter_the_state(bad, counts_as, params, key):
    gradient = normal(jax.random.fold_in(key, 1), SHAPES)
    put = lambda value: gradient | {"w": gradient["w"].at[0, 1, 2].set(value), "b": gradient["b"].at[0].set(value)}
    got = jitted(TX)(put(bad), TX.init(params), params)
    assert_trees_equal(got, jitted(TX)(put(counts_as), TX.init(params), params))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))


def test_a_dead_slice_along_the_largest_axis_gets_nothing(key):
    # In the published view the largest axis carries factored moments even where it is a batch axis.
    params = {"w": jax.random.normal(key, (9, 2, 3))}
    gradient = {"w": params["w"].at[4].set(0.0)}
    updates, _ = jitted(TX)(gradient, TX.init(params), params)
    assert not np.any(updates["w"][4]) and np.all(np.any(np.delete(updates["w"], 4, 0), axis=(1, 2)))


def test_gradients_whose_squares_vanish_count_as_gradients():
    params = {"w": jnp.ones((2, 3))}
    updates, _ = jitted(TX)({"w": jnp.full((2, 3), 1e-30)}, TX.init(params), params)
    assert np.any(updates["w"])


def test_all_nan_is_all_zero(params):
    nan = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    updates, state = jitted(TX)(nan, TX.init(params), params)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_state_fields(params):
    state = c2.celo2_direction(TINY).init(params | {"s": jnp.ones(()), "e": jnp.zeros((0, 3))})
    assert isinstance(state, c2.Celo2State)
    nothing = optax.MaskedNode()
    assert len(state.mu) == len(state.row) == len(state.col) == len(state.diag) == 1
    shape_of = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shape_of(state.mu[0]) == shape_of(state.nu) == SHAPES | {"s": (), "e": nothing}
    # (3, 4, 5): the two largest axes are 1 and 2; row averages over the largest.
    assert shape_of(state.row[0]) == {"w": (3, 4), "b": nothing, "s": nothing, "e": nothing}
    assert shape_of(state.col[0]) == {"w": (3, 5), "b": nothing, "s": nothing, "e": nothing}
    assert shape_of(state.diag[0]) == {"w": nothing, "b": (5,), "s": (), "e": nothing}
    assert not any(np.any(x) for x in jax.tree.leaves(state))
    assert optax.tree.get(state, "nu") is state.nu


def test_published_configuration_keeps_three_of_each():
    state = jax.eval_shape(c2.celo2_direction("celo2").init, {"w": jnp.ones((2, 3))})
    assert [len(field) for field in (state.mu, state.row, state.col, state.diag)] == [3, 3, 3, 3]


def test_bfloat16_state_halves_momenta_and_second_moment(params, key):
    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    half = c2.celo2_direction(TINY, state_dtype="bfloat16")
    full_state, half_state = c2.celo2_direction(TINY).init(params), half.init(params)
    for field in ("mu", "nu"):
        assert 2 * size(getattr(half_state, field)) == size(getattr(full_state, field))
    for field in ("row", "col", "diag"):
        assert size(getattr(half_state, field)) == size(getattr(full_state, field))
    gradient = normal(jax.random.fold_in(key, 1), SHAPES)
    updates, state = jitted(half)(gradient, half_state, params)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, half_state)
    exact, exact_state = jitted(c2.celo2_direction(TINY))(gradient, full_state, params)
    assert_trees_equal(updates, exact)  # the first step reads accumulators before they are rounded
    assert_trees_close(jax.tree.map(lambda x: x.astype(jnp.float32), state.mu), exact_state.mu, 2**-8)


def test_views_change_the_normalisation(key):
    # Two heads: as one matrix the RMS is shared, per head each has its own.
    params = normal(key, {"w": (4, 2, 3)})
    gradient = {"w": normal(jax.random.fold_in(key, 1), (4, 2, 3)) * jnp.array([1.0, 100.0])[None, :, None]}

    def rms(view, axes):
        tx = c2.scale_by_celo2(TINY, weight_dimension_numbers={"w": view})
        update = jax.jit(tx.update)(gradient, tx.init(params), params)[0]["w"]
        return np.sqrt(np.mean(np.square(update), axis=axes))

    np.testing.assert_allclose(rms(MuonDimensionNumbers((0,), (2,)), (0, 2)), 1.0, rtol=1e-4)
    np.testing.assert_allclose(rms(MuonDimensionNumbers((0,), (1, 2)), None), 1.0, rtol=1e-4)
    np.testing.assert_allclose(rms(None, (1, 2)), 1.0, rtol=1e-4)


def test_views_may_be_a_function_or_one_for_all(key):
    params = normal(key, {"w": (4, 2, 3)})
    view = MuonDimensionNumbers((0,), (1, 2))
    given = [view, {"w": view}, lambda updates: jax.tree.map(lambda _: view, updates)]
    states = [jax.eval_shape(c2.celo2_direction(TINY, weight_dimension_numbers=v).init, params) for v in given]
    assert [state.row[0]["w"].shape for state in states] == [(4,)] * 3


def test_faults_are_named():
    params = {"w": jnp.ones((2, 3))}
    tx = c2.celo2_direction(TINY)
    with pytest.raises(ValueError, match="celo2_direction.*without params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"\['w'\] of shape \(2, 3\).*axes 0 to 1"):
        c2.celo2_direction(TINY, weight_dimension_numbers=MuonDimensionNumbers((0,), (2,))).init(params)
    with pytest.raises(ValueError, match=r"\['w'\]: no entry in weight_dimension_numbers"):
        c2.celo2_direction(TINY, weight_dimension_numbers={"v": None}).init(params)
    with pytest.raises(c2.WeightsError, match="celo3"):
        c2.celo2_direction("celo3")


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_scale_by_celo2_is_the_chain_of_its_blocks(orthogonalize, params, key):
    blocks = [c2.celo2_direction(TINY), *[c2.orthogonalize()] * orthogonalize, c2.normalize_rms()]
    by_hand, tx = optax.chain(*blocks), c2.scale_by_celo2(TINY, orthogonalize=orthogonalize)
    gradient = normal(jax.random.fold_in(key, 1), SHAPES)
    assert_trees_equal(
        jitted(tx)(gradient, tx.init(params), params), jitted(by_hand)(gradient, by_hand.init(params), params)
    )


def test_scale_by_celo2_normalises_as_the_weights_were_trained(params):
    import dataclasses

    rolling = dataclasses.replace(TINY, config=dataclasses.replace(TINY.config, normalization="rolling"))
    assert isinstance(c2.scale_by_celo2(rolling).init(params)[-1], c2.NormalizeRmsState)
    assert not isinstance(c2.scale_by_celo2(rolling, normalization="clip").init(params)[-1], c2.NormalizeRmsState)
