"""Orthonormal columns from Cholesky decompositions, and bases that find eigenvectors."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo2_harness.rule.eigenbasis import cholesky_qr, next_basis


def conditioned(condition, n=24, seed=0):
    """Matrices with singular values from one down to 1 / condition."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(2, n, n)))[0] for _ in range(2))
    return u * np.geomspace(1, 1 / condition, n) @ v


# On a CPU, sides that are less and more than a block of columns, and no multiple of one.
@pytest.mark.parametrize("condition, n", [*((c, 24) for c in (1, 1e2, 1e4)), *((1e2, n) for n in (1, 31, 32, 33, 70))])
def test_cholesky_qr_is_qr_with_a_positive_diagonal(condition, n):
    x = conditioned(condition, n)
    q, r = np.linalg.qr(x)
    wanted = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    got = np.asarray(cholesky_qr(jnp.asarray(x, jnp.float32)), np.float64)
    np.testing.assert_allclose(got, wanted, atol=max(1e-3, 3e-7 * condition))
    np.testing.assert_allclose(np.swapaxes(got, -1, -2) @ got, np.broadcast_to(np.eye(n), x.shape), atol=3e-6)


def test_nearly_dependent_columns_are_orthonormal_all_the_same():
    got = np.asarray(cholesky_qr(jnp.asarray(conditioned(1e7), jnp.float32)), np.float64)
    np.testing.assert_allclose(np.swapaxes(got, -1, -2) @ got, np.broadcast_to(np.eye(24), got.shape), atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("orthonormalize, tolerance", [(cholesky_qr, 5e-4), (lambda y: jnp.linalg.qr(y)[0], 1e-6)])
def test_the_basis_finds_the_eigenvectors(orthonormalize, tolerance, seed):
    """To half the cosine at which Cholesky QR leaves two columns to a step that turns both alike, or to rounding."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    values = np.array([32.0, 16.0, 8.0, 4.0, 2.0, 1.0])
    covariance = jnp.asarray(vectors * values @ vectors.T, jnp.float32)
    basis = jnp.eye(6)
    for _ in range(40):
        basis = next_basis(covariance, basis, orthonormalize)
    turned = np.asarray(basis.T @ covariance @ basis)
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=tolerance * values.max())
    np.testing.assert_allclose(np.sort(np.diag(turned)), np.sort(values), rtol=1e-5)


def test_columns_keep_their_places():
    # Eigenvectors in the wrong order: nothing moves, where SOAP sorts.
    covariance = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
    np.testing.assert_allclose(next_basis(covariance, jnp.eye(3)), np.eye(3), atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_covariances_of_any_size(scale):
    basis = jnp.asarray(conditioned(1.0, 4)[0], jnp.float32)
    got = next_basis(scale * jnp.diag(jnp.arange(4.0)), basis)
    np.testing.assert_allclose(got.T @ got, np.eye(4), atol=1e-5)
    if scale == 0:
        np.testing.assert_allclose(got, basis, atol=1e-5)


def test_a_basis_that_cannot_be_made_is_not_taken():
    broken = lambda y: jnp.full_like(y, jnp.nan)
    np.testing.assert_array_equal(next_basis(jnp.eye(3), jnp.eye(3), broken), np.eye(3))


def test_no_derivative_goes_through_the_basis():
    loss = lambda x: jnp.sum(next_basis(x @ x.T, jnp.eye(3)) ** 3)
    np.testing.assert_array_equal(jax.grad(loss)(jnp.arange(9.0).reshape(3, 3)), 0.0)


def stacks_and_their_bases(orthonormalize):
    """Bases of stacks of two sizes, which are the stacks again, and the compiled program."""
    stacks = jnp.broadcast_to(jnp.eye(4), (3, 4, 4)), jnp.broadcast_to(jnp.eye(6), (2, 5, 6, 6))
    bases = jax.jit(lambda xs: [next_basis(x, x, orthonormalize) for x in xs])
    for got, wanted in zip(bases(stacks), stacks, strict=True):
        np.testing.assert_allclose(np.abs(got), wanted, atol=1e-5)
    return bases.lower(stacks).compile().as_text()


def test_lapack_functions_get_one_matrix_at_a_time_on_a_cpu():
    """Two calls with several matrices each, at the same time, may wait for each other for ever."""
    program = stacks_and_their_bases(lambda y: jnp.linalg.qr(y)[0])
    shapes = re.findall(r"f32\[([\d,]+)\]", " ".join(x for x in program.splitlines() if '"lapack_' in x))
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert sizes and max(sizes) <= 6 * 6


def test_cholesky_qr_does_without_lapack_on_a_cpu():
    """Its threads and those of XLA would wait for each other's cores."""
    assert '"lapack_' not in stacks_and_their_bases(cholesky_qr)
