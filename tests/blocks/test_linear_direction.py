"""The linear rule: by hand, against a plain float64 program, and whatever it is given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from helpers import TINY, assert_trees_close, assert_trees_equal, normal, relative_error
from optax.contrib import MuonDimensionNumbers

import celo2_harness as c2

LINEAR = c2.load_weights("celo2_linear", kind=c2.LinearWeights)
STEPS = 8


def run(tx, gradients, state=None):
    state = tx.init(gradients[0]) if state is None else state
    out, update = [], jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state)
        out.append(updates)
    return out, state


def trees(key, shapes, steps=STEPS):
    return [normal(jax.random.fold_in(key, i), shapes) for i in range(steps)]


def test_by_hand():
    """Under the root and without a floor, the first channels are signs: all moments are multiples of g and g^2."""
    config = c2.LinearConfig(momentum_decays=(0.5,), second_moment_decay=0.75, power=0.5, floor=1e-12)
    theta = c2.LinearTheta(np.array([0.25, 0.5], np.float32), np.array([0.0, 2.0], np.float32))
    tx = c2.linear_direction(c2.LinearWeights(theta, config), total_steps=2)
    gradients = [{"w": jnp.array([[3.0, -4.0]])}, {"w": jnp.array([[0.0, 2.0]])}]
    (first, second), state = run(tx, gradients)
    np.testing.assert_allclose(first["w"], (0.25 + 0.5 * np.exp(-1.0)) * np.array([[1.0, -1.0]]), rtol=1e-5)
    # At half of the run: m = (0.75, 0), v = (27 / 16, 4); c_0 = (0, 1), c_1 = (0.75 / sqrt(27 / 16), 0).
    np.testing.assert_allclose(second["w"], [[0.5 * np.sqrt(2), 0.25 * np.sqrt(2)]], rtol=1e-5)
    assert int(state.count) == 2


VIEWS = {
    "matrix": None,
    "conv": MuonDimensionNumbers((0, 1, 2), (3,)),
    "heads": MuonDimensionNumbers((0,), (2,)),
    "stack": None,
    "bias": None,
    "scalar": None,
}
SHAPES = {"matrix": (5, 8), "conv": (3, 3, 2, 4), "heads": (6, 2, 4), "stack": (3, 4, 6), "bias": (5,), "scalar": ()}
# Each leaf as a list of its matrices, and back.
MATRICES = {
    "heads": (lambda x: list(np.moveaxis(x, 1, 0)), lambda xs: np.moveaxis(np.stack(xs), 0, 1)),
    "stack": (list, np.stack),
}


@pytest.mark.parametrize("total_steps", [None, 6, 100])
def test_against_a_plain_program(key, total_steps):
    gradients = trees(key, SHAPES)
    got, state = run(c2.linear_direction(LINEAR, total_steps, weight_dimension_numbers=VIEWS), gradients)
    for name in SHAPES:
        apart, together = MATRICES.get(name, (lambda x: [x], lambda xs: xs[0]))
        shape = apart(np.zeros(SHAPES[name]))[0].shape
        m = {i: [np.zeros(shape)] * 2 for i in range(4)}
        v = {i: np.zeros(shape) for i in range(4)}
        for step, tree in enumerate(gradients):
            t = 1.0 if total_steps is None else min(step / total_steps, 1.0)
            directions = []
            for i, g in enumerate(apart(np.asarray(tree[name], np.float64))):
                u, m[i], v[i] = plain.linear(LINEAR.theta, LINEAR.config, g, m[i], v[i], t)
                directions.append(u)
            assert relative_error(got[step][name], together(directions)) <= 2e-5, (name, step)
        assert relative_error(state.nu[name], together([v[i] for i in range(len(directions))])) <= 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
def test_the_unit_of_the_loss_does_not_matter(key, scale):
    gradients = trees(key, {"w": (5, 8), "b": (5,)})
    wanted, _ = run(c2.linear_direction(total_steps=10), gradients)
    got, _ = run(c2.linear_direction(total_steps=10), [jax.tree.map(lambda g: scale * g, tree) for tree in gradients])
    for a, b in zip(got, wanted, strict=True):
        assert_trees_close(a, b, 1e-5)


def test_without_the_length_of_the_run_it_is_the_rule_of_its_end(key):
    gradients = trees(key, {"w": (5, 8)})
    tx = c2.linear_direction(total_steps=3)
    wanted, state = run(tx, gradients, tx.init(gradients[0])._replace(count=jnp.asarray(3)))
    got, _ = run(c2.linear_direction(), gradients)
    assert_trees_close(got, wanted, 1e-6)
    assert int(state.count) == 3 + STEPS


def test_zero_in_zero_out():
    zero = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3), "empty": jnp.zeros((0, 4))}
    updates, state = run(c2.linear_direction(), [zero] * 2)
    assert_trees_equal(updates[-1], zero)
    assert not any(np.any(x) for x in jax.tree.leaves((state.mu, state.nu)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_matrix_that_is_not_finite_is_skipped(key, bad):
    tx = c2.linear_direction(total_steps=10)
    gradients = trees(key, {"w": (2, 3, 4)}, 3)
    _, before = run(tx, gradients[:2])
    (wanted,), reference = run(tx, gradients[2:], before)
    broken = {"w": gradients[2]["w"].at[0, 1, 1].set(bad)}
    (updates,), after = run(tx, [broken], before)
    assert not np.any(updates["w"][0])
    np.testing.assert_array_equal(updates["w"][1], wanted["w"][1])
    for new, old, other in zip(*map(jax.tree.leaves, (after[1:], before[1:], reference[1:])), strict=True):
        np.testing.assert_array_equal(new[0], old[0])
        np.testing.assert_array_equal(new[1], other[1])


def test_dtypes(key):
    tx = c2.linear_direction(state_dtype="bfloat16")
    gradients = normal(key, {"w": (3, 4)}, dtype=jnp.float16)
    (updates,), state = run(tx, [gradients])
    assert updates["w"].dtype == jnp.float16
    assert {x.dtype for x in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype("bfloat16")}
    (wanted,), _ = run(c2.linear_direction(), [{"w": gradients["w"].astype(jnp.float32)}])
    assert relative_error(updates["w"], wanted["w"]) <= 1e-3


def test_decays_come_from_the_file(key):
    config = dataclasses.replace(LINEAR.config, momentum_decays=())
    theta = c2.LinearTheta(np.ones(1, np.float32), np.zeros(1, np.float32))
    (updates,), state = run(c2.linear_direction(c2.LinearWeights(theta, config)), trees(key, {"w": (3, 4)}, 1))
    assert state.mu == () and float(jnp.mean(updates["w"] ** 2)) == pytest.approx(1.0, rel=1e-5)


def test_what_does_not_fit_is_named():
    function = getattr(c2.linear_direction, "__wrapped__", c2.linear_direction)
    with pytest.raises(c2.WeightsError, match=r"celo2: Weights, expected LinearWeights.*celo2_direction"):
        function("celo2")
    with pytest.raises(c2.WeightsError, match="the given weights: Weights, expected LinearWeights"):
        function(TINY)
    with pytest.raises(c2.WeightsError, match=r"celo2_linear: LinearWeights, expected Weights.*linear_direction"):
        c2.celo2_direction("celo2_linear")
    with pytest.raises(ValueError, match="total_steps = 0: expected a whole number of steps >= 1"):
        function("celo2_linear", 0)
