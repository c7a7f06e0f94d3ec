"""The guard by hand: steps with bad gradients leave no trace but in the counters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, assert_trees_equal, jitted

import celo2_harness as c2

PARAMS = {"w": jnp.zeros(2)}
ZERO = {"w": jnp.zeros(2)}


def gradient(norm):
    return {"w": jnp.array([0.6, -0.8]) * norm}


def run(tx, norms, state=None):
    state = tx.init(PARAMS) if state is None else state
    for norm in norms:
        updates, state = jitted(tx)(gradient(norm), state, PARAMS)
    return updates, state


def counters(state):
    return int(state.count), int(state.nonfinite_count), int(state.spike_count)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("inner", [optax.adam(0.1), c2.scale_by_celo2(TINY)], ids=["adam", "celo2"])
def test_a_step_with_a_bad_entry_changes_nothing(inner, bad):
    tx = c2.guard_updates(inner, spike_factor=5.0)
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    state = jitted(tx)(params, tx.init(params), params)[1]
    updates, after = jitted(tx)(params | {"b": params["b"].at[1].set(bad)}, state, params)
    assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert_trees_equal(after.inner_state, state.inner_state)
    assert_trees_equal(after.level, state.level)
    assert counters(after) == (2, 1, 0)
    # The next good step is the one that would have come without the bad one.
    assert_trees_equal(jitted(tx)(params, after, params)[0], jitted(tx)(params, state, params)[0])


def test_good_steps_are_those_of_the_inner_optimizer():
    inner = optax.adam(0.1)
    tx = c2.guard_updates(inner, spike_factor=5.0)
    updates, state = run(tx, [1.0, 2.0, 3.0])
    wanted, inner_state = None, inner.init(PARAMS)
    for norm in (1.0, 2.0, 3.0):
        wanted, inner_state = jitted(inner)(gradient(norm), inner_state, PARAMS)
    np.testing.assert_allclose(updates["w"], wanted["w"], rtol=1e-6)
    assert counters(state) == (3, 0, 0)


def guard(action, **options):
    options = {"spike_factor": 4.0, "decay": 0.5, "warmup": 2} | options
    return c2.guard_updates(optax.identity(), spike_action=action, **options)


def test_skip_by_hand():
    tx = guard("skip")
    updates, state = run(tx, [1.0, 3.0])  # level 1, then 0.5 x 1 + 0.5 x 3 = 2; limit 8
    np.testing.assert_allclose(state.level, 2.0, rtol=1e-6)
    updates, after = run(tx, [7.9], state)
    np.testing.assert_allclose(updates["w"], gradient(7.9)["w"])
    assert counters(after) == (3, 0, 0)
    updates, after = run(tx, [100.0], state)
    assert_trees_equal(updates, ZERO)
    assert counters(after) == (3, 0, 1)
    np.testing.assert_allclose(after.level, 5.0, rtol=1e-6)  # the spike enters as the limit: (2 + 8) / 2


def test_clip_by_hand():
    updates, state = run(guard("clip"), [1.0, 3.0, 100.0])
    np.testing.assert_allclose(updates["w"], gradient(8.0)["w"], rtol=1e-6)
    assert counters(state) == (3, 0, 1)
    np.testing.assert_allclose(state.level, 5.0, rtol=1e-6)


def test_no_spikes_before_the_warmup_nor_without_a_factor():
    updates, state = run(guard("skip", warmup=3), [1.0, 1.0, 100.0])
    np.testing.assert_allclose(updates["w"], gradient(100.0)["w"])
    updates, state = run(guard("skip", spike_factor=None), [1.0] * 5 + [1e6])
    np.testing.assert_allclose(updates["w"], gradient(1e6)["w"])
    assert counters(state) == (6, 0, 0)


def test_a_lasting_change_of_scale_is_accepted():
    tx = guard("skip", decay=0.9, warmup=1)
    _, state = run(tx, [1.0] * 3)
    # The limit grows by 0.9 + 0.1 x 4 = 1.3 per skipped step: above 1000 / 4 after 22 of them.
    _, after = run(tx, [1000.0] * 30, state)
    updates, final = run(tx, [1000.0], after)
    np.testing.assert_allclose(updates["w"], gradient(1000.0)["w"])
    assert counters(after)[2] == 22 == counters(final)[2]


def test_zero_gradients_at_the_start_are_no_level():
    updates, state = run(guard("skip"), [0.0] * 5 + [1.0])
    np.testing.assert_allclose(updates["w"], gradient(1.0)["w"])
    np.testing.assert_allclose(state.level, 1.0, rtol=1e-6)
    updates, state = run(guard("skip"), [1.0, 1.0] + [0.0] * 20 + [1.0])
    np.testing.assert_allclose(updates["w"], gradient(1.0)["w"])
    assert counters(state) == (23, 0, 0)


def test_norms_that_squares_cannot_hold():
    updates, state = run(guard("skip"), [1e25, 1e25])
    np.testing.assert_allclose(state.level, 1e25, rtol=1e-6)
    np.testing.assert_allclose(updates["w"], gradient(1e25)["w"])
    _, state = run(guard("skip"), [1e-30, 1e-30])
    np.testing.assert_allclose(state.level, 1e-30, rtol=1e-6)


def test_extra_arguments_reach_the_inner_optimizer():
    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda u, s, p=None, *, factor, **_: (jax.tree.map(lambda x: factor * x, u), s),
    )
    tx = c2.guard_updates(inner)
    updates, _ = tx.update(gradient(1.0), tx.init(PARAMS), PARAMS, factor=2.0, other=None)
    np.testing.assert_allclose(updates["w"], gradient(2.0)["w"])


@pytest.mark.parametrize(
    "bad", [{"spike_factor": 1.0}, {"spike_factor": float("nan")}, {"decay": 1.0}, {"decay": 0.0}, {"warmup": -1}]
)
def test_arguments_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=f"guard_updates: .*{next(iter(bad))}"):
        c2.guard_updates(optax.identity(), **bad)


def test_an_unknown_action_is_named():
    function = getattr(c2.guard_updates, "__wrapped__", c2.guard_updates)
    with pytest.raises(ValueError, match="spike_action = 'stop', expected 'skip' or 'clip'"):
        function(optax.identity(), spike_action="stop")


DTYPES = ["bfloat16", "float16", "float32", "float8_e4m3fn", "complex64"]
BAD_ENTRIES = {"nan": np.nan, "inf": np.inf, "nan in the imaginary part": complex(1.0, np.nan), "none": 1.0}


@pytest.mark.parametrize("entry", BAD_ENTRIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_finite_agrees_with_optax(dtype, entry):
    value = BAD_ENTRIES[entry]
    if isinstance(value, complex) and dtype != "complex64" or dtype == "float8_e4m3fn" and value == np.inf:
        pytest.skip("the dtype has no such number")
    updates = {"w": jnp.asarray([1.0, value]).astype(dtype), "count": jnp.arange(3)}
    inner = optax.stateless(lambda updates, _: jax.tree.map(lambda x: x * jnp.ones((), x.dtype), updates))
    theirs, ours = optax.apply_if_finite(inner, 5), c2.guard_updates(inner)
    wanted, _ = theirs.update(updates, theirs.init(updates))
    found, state = ours.update(updates, ours.init(updates))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.complex64), np.asarray(y, np.complex64))
    assert int(state.nonfinite_count) == (entry != "none") and np.isfinite(state.level)


def test_magnitudes_of_complex_gradients_count():
    tx = c2.guard_updates(optax.identity(), warmup=0)
    _, state = tx.update({"w": jnp.asarray([3.0 + 4.0j])}, tx.init({"w": jnp.zeros(1)}))
    np.testing.assert_allclose(state.level, 5.0, rtol=1e-6)


@pytest.mark.parametrize("kind", ["partition", "masked", "frozen"])
@pytest.mark.parametrize("action", ["skip", "clip"])
def test_gradients_that_nobody_looks_at_count_for_nothing(kind, action):
    frozen = {"a": True, "b": False}
    inner = {
        "partition": optax.partition({True: optax.set_to_zero(), False: optax.sgd(1.0)}, frozen),
        "masked": optax.chain(optax.masked(optax.set_to_zero(), frozen), optax.sgd(1.0)),
        "frozen": c2.build("adamw", 1.0, rules=[("^a$", "frozen")]),
    }[kind]
    tx = c2.guard_updates(inner, spike_factor=2.0, spike_action=action, warmup=0)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = tx.init(params)
    for bad in (1.0, 1e9, np.nan):
        updates, state = tx.update({"a": jnp.full(2, bad), "b": jnp.ones(2)}, state, params)
        assert not np.any(updates["a"]) and np.all(updates["b"] < 0)
    assert state.nonfinite_count == 0 and state.spike_count == 0
    np.testing.assert_allclose(state.level, np.sqrt(2.0), rtol=1e-6)
