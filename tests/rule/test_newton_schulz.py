"""Newton-Schulz: both forms against float64, and what the coefficients promise."""

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from helpers import relative_error

from celo2_harness import newton_schulz
from celo2_harness.rule import COEFFICIENTS


def with_singular_values(values, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(rows, rows)))[0]
    v = np.linalg.qr(rng.normal(size=(columns, columns)))[0]
    count = min(rows, columns)
    return (u[:, :count] * np.asarray(values)) @ v[:, :count].T


def scalar_map(values, triples):
    """What the iteration does to singular values."""
    x = np.asarray(values, np.float64)
    for a, b, c in triples:
        x = a * x + b * x**3 + c * x**5
    return x


# The iteration stretches a rounding error by at most the product of its slopes at zero: 485 times 6e-8 is 3e-5.
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (4, 4), (1, 6), (6, 1), (3, 12), (12, 3), (2, 3, 8)])
def test_both_forms_agree_with_float64(name, shape, seed):
    x = np.random.default_rng(seed).normal(size=shape)
    got = newton_schulz(jnp.asarray(x, jnp.float32), name)
    assert relative_error(got, plain.newton_schulz(x, COEFFICIENTS[name])) <= 3e-5


def test_the_gram_form_keeps_small_singular_values(seed):
    values = np.geomspace(1, 1e-3, 4)
    x = with_singular_values(values, 4, 64, seed)
    got = np.linalg.svd(np.asarray(newton_schulz(jnp.asarray(x, jnp.float32)), np.float64), compute_uv=False)
    wanted = scalar_map(values / np.linalg.norm(values), COEFFICIENTS["quintic"])
    # Squaring in the Gram matrix costs half of the digits: 1e-3 relative to one is 1e-6 in the Gram matrix, against
    # a rounding of 6e-8, so 6% at the smallest value would be excusable and 1e-2 is asked.
    np.testing.assert_allclose(np.sort(got), np.sort(wanted), rtol=1e-2)


def test_polar_express_brings_singular_values_near_one():
    # The grid is the range that the coefficients were made for. Five steps leave [0.846, 1.124]; the paper goes on for
    # closer values, and so does appending its limit step.
    grid = np.geomspace(1e-3, 1.0, 20_001)
    five = scalar_map(grid, COEFFICIENTS["polar_express"])
    assert five.min() > 0.84 and five.max() < 1.13
    seven = scalar_map(five, [(1.875, -1.25, 0.375)] * 2)
    assert np.max(np.abs(seven - 1)) < 1e-3
    values = np.geomspace(1, 1e-2, 6)
    x = with_singular_values(values, 6, 9)
    got = np.linalg.svd(np.asarray(newton_schulz(jnp.asarray(x, jnp.float32), "polar_express")), compute_uv=False)
    wanted = scalar_map(values / np.linalg.norm(values), COEFFICIENTS["polar_express"])
    np.testing.assert_allclose(np.sort(got), np.sort(wanted), rtol=1e-4)


def test_quintic_keeps_singular_values_near_one():
    values = scalar_map(np.geomspace(1e-2, 1.0, 10_001), COEFFICIENTS["quintic"])
    assert values.min() > 0.65 and values.max() < 1.25


def test_singular_vectors_are_kept():
    x = with_singular_values([3.0, 2.0, 1.0], 3, 5)
    u, _, v = np.linalg.svd(x, full_matrices=False)
    got = np.asarray(newton_schulz(jnp.asarray(x, jnp.float32), [(1.5, -0.5, 0.0)] * 12))
    np.testing.assert_allclose(got, u @ v, atol=1e-5)


def test_a_batch_equals_one_by_one(key):
    x = jax.random.normal(key, (3, 4, 6))
    together = newton_schulz(x)
    for i in range(3):
        np.testing.assert_allclose(together[i], newton_schulz(x[i]), atol=2e-6)


def test_zero_and_scale():
    assert not np.any(newton_schulz(jnp.zeros((3, 4))))
    x = jnp.asarray(with_singular_values([2.0, 1.0, 0.5], 3, 4), jnp.float32)
    # The iteration sees x / ||x||; only the floor 1e-8 knows the scale.
    np.testing.assert_allclose(newton_schulz(x), newton_schulz(1024 * x), atol=1e-5)
    assert newton_schulz(jnp.zeros((0, 4))).shape == (0, 4)


def test_dtypes(key):
    x = jax.random.normal(key, (4, 5))
    exact = newton_schulz(x)
    assert newton_schulz(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    coarse = newton_schulz(x, dtype=jnp.bfloat16)
    assert coarse.dtype == jnp.float32
    # bfloat16 has 8 bits: 0.4% per product, and five iterations of three products.
    assert 1e-4 < relative_error(coarse, exact) < 0.1


def test_own_triples():
    x = jnp.asarray(with_singular_values([1.0, 0.5], 2, 2), jnp.float32)
    got = newton_schulz(x, [(1.5, -0.5, 0.0)] * 12)
    np.testing.assert_allclose(got @ got.T, np.eye(2), atol=1e-5)


@pytest.mark.parametrize("coefficients", ["quintics", [], [(1.0, 2.0)]])
def test_bad_coefficients_are_refused(coefficients):
    with pytest.raises(ValueError, match="coefficients"):
        newton_schulz(jnp.ones((2, 2)), coefficients)
