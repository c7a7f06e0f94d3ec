"""NaN, infinite, zero, denormal and huge gradients through every preset, bare and guarded; and the same bits twice."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import LOSS, PRESETS, SHAPES, assert_trees_equal, decaying, jitted, normal

import celo2_harness as c2

# What is put into the gradient of every leaf: one entry, or all of them.
KINDS = {
    "one NaN": (jnp.nan, False),
    "all NaN": (jnp.nan, True),
    "one inf": (jnp.inf, False),
    "one -inf": (-jnp.inf, False),
    "all inf": (jnp.inf, True),
    "all zero": (0.0, True),
    "one denormal": (1e-40, False),
    "all denormal": (1e-40, True),
    "one huge": (3e38, False),
    "all huge": (3e38, True),
}
LEARNED, OPTAX = ("layer", "kernel"), ("layer", "bias")
# What is not finite after the bad step or one of the two good ones that follow: Optax's AdamW and Muon take in what
# they are given. The learned rules never do.
NOT_FINITE = {
    "celo2": {OPTAX},
    "modern_muon": {OPTAX},
    "celo2_ortho": {OPTAX},
    "celo2_muon": {OPTAX},
    "celo2_base": set(),
    "velo": set(),
    "adamw": {LEARNED, OPTAX},
    "muon": {LEARNED, OPTAX},
}
SLOW = ("celo2", "celo2_muon", "celo2_base", "muon", "velo")
presets = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PRESETS]
)


def spoiled(gradients, kind):
    value, everywhere = KINDS[kind]
    return jax.tree.map(lambda g: jnp.full_like(g, value) if everywhere else g.at[(0,) * g.ndim].set(value), gradients)


def trees():
    params, gradients = (normal(jax.random.key(seed), SHAPES) for seed in (0, 1))
    return params, gradients


def leaf(tree, path):
    return tree[path[0]][path[1]]


@presets
def test_bad_gradients(name):
    """A good step, a bad one, and two good ones."""
    params, good = trees()
    step = jitted(decaying(name))
    _, start = step(good, decaying(name).init(params), params)
    bad_leaves = {path: set() for path in (LEARNED, OPTAX)}
    for kind in KINDS:
        state = start
        for gradients in (spoiled(good, kind), good, good):
            updates, state = step(gradients, state, params)
            for path, kinds in bad_leaves.items():
                if not np.all(np.isfinite(leaf(updates, path))):
                    kinds.add(kind)
        if not NOT_FINITE[name]:
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state)), kind
    for path, kinds in bad_leaves.items():
        if path not in NOT_FINITE[name]:
            assert not kinds, (path, kinds)
        else:
            # Newton-Schulz of Optax's Muon divides by the norm, which a huge entry makes infinite.
            lost = {kind for kind, (value, _) in KINDS.items() if not np.isfinite(value)}
            huge = {"one huge", "all huge"} if (name, path) == ("muon", LEARNED) else set()
            assert kinds == lost | huge, (path, kinds)


def test_a_huge_gradient_stops_adam_for_good():
    """Its square is infinite, and stays so: the entry takes no step any more. The guard's spike rule is for that."""
    params, good = trees()
    step = jitted(decaying("adamw"))
    state = decaying("adamw").init(params)
    for gradients in (spoiled(good, "one huge"), good, good):
        updates, state = step(gradients, state, params)
    assert leaf(updates, OPTAX)[0] == 0.0 and np.all(np.asarray(leaf(updates, OPTAX))[1:])


@presets
def test_zero_gradients_move_nothing_but_by_decay(name):
    params, good = trees()
    zero = jax.tree.map(jnp.zeros_like, good)
    updates, state = jitted(decaying(name))(zero, decaying(name).init(params), params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
    if name != "velo":  # whose leaves move by what the LSTM makes of the others
        np.testing.assert_allclose(leaf(updates, LEARNED), -0.01 * 0.1 * leaf(params, LEARNED), rtol=1e-5)
        assert not np.any(leaf(updates, OPTAX))


@presets
def test_the_guard_keeps_what_is_not_finite_out_of_every_preset(name):
    params, good = trees()
    inner = decaying(name)
    tx = c2.guard_updates(inner)
    step = jax.jit(lambda g, s, p: optax.with_extra_args_support(tx).update(g, s, p, value=LOSS))
    _, start = step(good, tx.init(params), params)
    for number, kind in enumerate(KINDS):
        updates, state = step(spoiled(good, kind), start, params)
        if np.isfinite(KINDS[kind][0]):
            assert int(state.nonfinite_count) == 0, kind
            continue
        assert not any(np.any(u) for u in jax.tree.leaves(updates)), kind
        assert_trees_equal(state.inner_state, start.inner_state)
        assert int(state.nonfinite_count) == 1
        if not number:
            assert_trees_equal(step(good, state, params)[0], step(good, start, params)[0])


@presets
def test_the_same_steps_give_the_same_bits(name):
    ends = []
    for _ in range(2):
        params, gradients = trees()
        state = decaying(name).init(params)
        for number in range(4):
            updates, state = jitted(decaying(name))(
                jax.tree.map(lambda g, n=number: g * (n - 1.5), gradients), state, params
            )
            params = optax.apply_updates(params, updates)
        ends.append((params, state))
    assert_trees_equal(*ends)


def test_every_preset_and_kind_is_in_the_table():
    assert set(NOT_FINITE) == set(PRESETS) and len(list(itertools.product(PRESETS, KINDS))) == 80
