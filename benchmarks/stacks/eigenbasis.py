"""A basis for every matrix, as in SOAP: eigenvectors of the running covariance of its gradients, on its short side.

Matrices come in stacks (count, rows, columns), and everything here sees them oriented: (count, short, long).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

# Columns of the power step have length one, so these count relative to one.
FIRST_RIDGE = 3e-5
SECOND_RIDGE = 1e-6

_precise = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def orient(x: Float[Array, "count rows columns"]) -> Float[Array, "count short long"]:
    """The matrices with their short side first; applied to a matrix of its own shape, the inverse is the same."""
    return x if x.shape[-2] <= x.shape[-1] else jnp.swapaxes(x, -1, -2)


def rotate(basis: Float[Array, "count short short"], x: Float[Array, "count short long"]) -> Array:
    """The matrices as seen in the basis."""
    return jnp.swapaxes(basis, -1, -2) @ x


def init_bases(shapes: Sequence[tuple[int, int, int]]) -> list[Array]:
    """Identities, one stack per shape (count, short, long)."""
    return [jnp.broadcast_to(jnp.eye(short), (count, short, short)) for count, short, _ in shapes]


def orthonormalize(x: Float[Array, "*batch size size"]) -> Float[Array, "*batch size size"]:
    """The orthogonal factor of a QR decomposition, from Cholesky factors of Gram matrices.

    One pass squares the condition number, so there are two, the first one with a shift; a Newton-Schulz step takes away
    what rounding leaves. Columns are scaled to length one before, which removes most of the condition number where they
    are nearly orthogonal already.
    """
    x = x / (jnp.linalg.norm(x, axis=-2, keepdims=True) + 1e-30)
    eye = jnp.eye(x.shape[-1])
    for ridge in (FIRST_RIDGE, SECOND_RIDGE):
        factor = jnp.linalg.cholesky(_precise(jnp.swapaxes(x, -1, -2), x) + ridge * eye)
        x = jnp.swapaxes(
            jax.lax.linalg.triangular_solve(factor, jnp.swapaxes(x, -1, -2), left_side=True, lower=True), -1, -2
        )
    return _precise(x, 1.5 * eye - 0.5 * _precise(jnp.swapaxes(x, -1, -2), x))


def refresh_bases(
    covariances: Sequence[Float[Array, "count short short"]], bases: Sequence[Float[Array, "count short short"]]
) -> tuple[list[Array], list[Array]]:
    """One power step for every matrix, in the order of its eigenvalues.

    Stacks with the same short side are worked on together.

    Returns:
        The new bases; and the order in which each takes the old columns, which whatever is kept per column follows.
    """
    sizes = sorted({basis.shape[-1] for basis in bases})
    new: list[Any] = [None] * len(bases)
    orders: list[Any] = [None] * len(bases)
    for size in sizes:
        members = [i for i, basis in enumerate(bases) if basis.shape[-1] == size]
        covariance = jnp.concatenate([covariances[i] for i in members])
        basis = jnp.concatenate([bases[i] for i in members])
        image = _precise(covariance, basis)
        eigenvalues = jnp.sum(basis * image, axis=-2)
        order = jnp.argsort(-eigenvalues, axis=-1)
        # Where the covariance is zero the basis stays.
        ridge = 1e-6 * jnp.max(eigenvalues, axis=-1)[:, None, None] + 1e-30
        image = jnp.take_along_axis(image + ridge * basis, order[:, None, :], axis=-1)
        moved = orthonormalize(image)
        fine = jnp.all(jnp.isfinite(moved), axis=(-2, -1), keepdims=True)
        moved = jnp.where(fine, moved, basis)
        order = jnp.where(fine[..., 0], order, jnp.arange(size))
        start = 0
        for i in members:
            stop = start + bases[i].shape[0]
            new[i], orders[i] = moved[start:stop], order[start:stop]
            start = stop
    return new, orders


def follow(order: Float[Array, "count short"], x: Float[Array, "count short ..."]) -> Array:
    """Rows of each matrix in the new order."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
