"""The moving eigenbasis of a covariance: one power step at a time, orthonormalised by matrix products.

Newton-Schulz cannot do it: it finds the nearest orthonormal basis, and that of L Q = Q (Q^T L Q) is the old basis Q,
since Q^T L Q is positive. The triangular factor of a QR decomposition is what separates large eigenvalues from small
ones; Cholesky's factor of the Gram matrix is the same one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Added to the covariance, as a part of its mean eigenvalue: what float32 cannot tell from zero keeps its basis.
COVARIANCE_FLOOR = 1e-6
# Added to the diagonal of a Gram matrix, times the root of its size: Cholesky's decomposition then exists in float32.
GRAM_SHIFT = 2e-6
# Columns that are factored one after the other between two matrix products, on a CPU.
BLOCK = 32
# Passes of Cholesky QR at most, and how far from the identity a Gram matrix may be for the last, Newton-Schulz step.
MAX_PASSES = 5
NEARLY_ORTHONORMAL = 1e-3
_TINY = 1e-30

Orthonormalize = Callable[[Float[Array, "*batch n n"]], Float[Array, "*batch n n"]]


def cholesky_qr(y: Float[Array, "*batch rows columns"]) -> Float[Array, "*batch rows columns"]:
    """The orthonormal factor of the QR decomposition, by Cholesky decompositions and matrix products.

    Y <- columns of norm one;  R^T R = Y^T Y + s I,  Y <- Y R^-1, once or more often;  Y (3 I - Y^T Y) / 2.

    The shift s makes the decomposition safe for columns that are nearly dependent; the last step, one of
    Newton-Schulz, removes what the shift and rounding did. Columns that are nearly orthogonal already take one pass:
    on a small language model those of all matrices from the tenth step on, and two before. A batch takes as many
    passes as its worst matrix, five at most.

    Args:
        y: Matrices in the last two axes, at least as many rows as columns.

    Returns:
        An array of the same shape. The triangular factor that belongs to it has a positive diagonal, so that columns
        keep their signs.

    Example:
        >>> q = cholesky_qr(jnp.array([[2.0, 1.0], [0.0, 1.0]]))
        >>> bool(jnp.allclose(q, jnp.eye(2), atol=1e-5))
        True

    References:
        Shifted Cholesky QR, arXiv 1809.11085.
    """
    identity = jnp.expand_dims(jnp.eye(y.shape[-1], dtype=y.dtype), range(y.ndim - 2))
    gram = lambda q: matmul(transposed(q), q)

    def one_pass(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, q, squares = carry
        shifted = squares + GRAM_SHIFT * math.sqrt(y.shape[-1]) * identity
        q = jax.lax.platform_dependent(q, shifted, cpu=_over_factor_by_blocks, default=_over_factor)
        return count + 1, q, gram(q)

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        count, _, squares = carry
        return (count < MAX_PASSES) & (jnp.max(jnp.abs(squares - identity)) > NEARLY_ORTHONORMAL)

    q = y * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(y), axis=-2, keepdims=True), _TINY))
    carry = (jnp.zeros([], jnp.int32), q, gram(q))
    _, q, squares = jax.lax.while_loop(unfinished, one_pass, carry)
    return matmul(q, 1.5 * identity - 0.5 * squares)


def next_basis(
    covariance: Float[Array, "*batch n n"],
    basis: Float[Array, "*batch n n"],
    orthonormalize: Orthonormalize = cholesky_qr,
) -> Float[Array, "*batch n n"]:
    """One step of the power iteration with all columns: they turn towards the eigenvectors of the covariance.

    Y = (L + f I) Q;  columns in the order of their q^T L q, largest first, are orthonormalised;  each returns to its
    place.

    SOAP leaves the columns in that order, and permutes what is kept along them. Here a column keeps its place, so that
    what is kept along it, as second moments are, can stay where it is. The two differ in nothing else.

    Args:
        covariance: Symmetric and not negative; zero leaves the basis as it is.
        basis: Orthonormal columns.
        orthonormalize: Function of matrices in the last two axes, that makes their columns orthonormal from the first
            to the last, as `cholesky_qr` and the first output of `jax.numpy.linalg.qr` do.

    Returns:
        The new basis; the old one where the new one is not finite.

    References:
        SOAP, arXiv 2409.11321.
    """
    # A basis is a choice of coordinates; nobody wants the derivative of a loss with respect to it.
    covariance, basis = jax.lax.stop_gradient((covariance, basis))
    mean = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None] / covariance.shape[-1]
    # Multiplied in two steps, since the inverse of a small mean overflows.
    y = matmul(covariance / jnp.maximum(mean, _TINY), basis) + COVARIANCE_FLOOR * basis
    order = jnp.argsort(-jnp.sum(basis * y, axis=-2), axis=-1)
    function = orthonormalize if orthonormalize is cholesky_qr else functools.partial(_apart_on_cpus, orthonormalize)
    q = function(jnp.take_along_axis(y, order[..., None, :], axis=-1))
    q = jnp.take_along_axis(q, jnp.argsort(order, axis=-1)[..., None, :], axis=-1)
    return jnp.where(jnp.all(jnp.isfinite(q), axis=(-2, -1), keepdims=True), q, basis)


def _over_factor(y: Array, squares: Array) -> Array:
    """Y R^-1, with R the Cholesky factor of the squares, S = R^T R."""
    lower = jnp.linalg.cholesky(squares, symmetrize_input=False)
    return jax.lax.linalg.triangular_solve(lower, y, left_side=False, lower=True, transpose_a=True)


def _over_factor_by_blocks(y: Array, squares: Array) -> Array:
    """The same without LAPACK, whose library waits for threads of its own where XLA's are at work.

    The rows of S and those of Y become the rows of R^T and of Y R^-1 by the same arithmetic, so they are one array. Of
    every block of columns what the columns before it explain is taken away; then it is divided by its own factor.
    """
    n, block = squares.shape[-1], min(BLOCK, squares.shape[-1])
    missing = -n % block
    wide = [(0, 0)] * (y.ndim - 1) + [(0, missing)]
    # Columns of the identity, to fill the last block.
    fill = jnp.diag(jnp.pad(jnp.zeros(n, y.dtype), (0, missing), constant_values=1.0))
    squares = jnp.pad(squares, [*wide[:-2], (0, missing), (0, missing)])
    squares = squares + jnp.expand_dims(fill, range(y.ndim - 2))
    rows = jnp.concatenate([squares, jnp.pad(y, wide)], axis=-2)
    index = jax.lax.broadcasted_iota(jnp.int32, (*rows.shape[:-1], 1), rows.ndim - 2)

    def divide(k: Array, done: Array) -> Array:
        start = k * block
        explained = matmul(done, transposed(jax.lax.dynamic_slice_in_dim(done, start, block, axis=-2)))
        columns = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=-1) - explained
        inverse = _inverse_factor(jax.lax.dynamic_slice_in_dim(columns, start, block, axis=-2))
        columns = jnp.where(index >= start, matmul(columns, transposed(inverse)), 0.0)
        return jax.lax.dynamic_update_slice_in_dim(done, columns, start, axis=-1)

    done = jax.lax.fori_loop(0, (n + missing) // block, divide, jnp.zeros_like(rows))
    return done[..., n + missing :, :n]


def _inverse_factor(squares: Array) -> Array:
    """The inverse of the lower Cholesky factor, by elimination in [S, I]."""
    n = squares.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, (*squares.shape[:-1], 1), squares.ndim - 2)

    def eliminate(j: Array, both: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(both, j, axis=-2)
        column = jax.lax.dynamic_index_in_dim(both, j, axis=-1)
        root = jnp.sqrt(jax.lax.dynamic_index_in_dim(row, j, axis=-1))
        # The row itself is divided by the root, which is to take this part of it away.
        times = jnp.where(index > j, column / root, jnp.where(index == j, root - 1.0, 0.0))
        return both - times * (row / root)

    identity = jnp.broadcast_to(jnp.eye(n, dtype=squares.dtype), squares.shape)
    return jax.lax.fori_loop(0, n, eliminate, jnp.concatenate([squares, identity], axis=-1))[..., n:]


def _apart_on_cpus(function: Orthonormalize, x: Array) -> Array:
    """The function of a stack of matrices; on a CPU of one matrix after the other, for functions that call LAPACK.

    jaxlib 0.10 shares the matrices of one LAPACK call out among the threads that run the program, and waits for them on
    one of these. Calls at the same time, as for sides of two lengths on two cores, wait for each other for ever. A call
    with one matrix shares nothing out.
    """
    if math.prod(x.shape[:-2]) <= 1:
        return function(x)
    apart = lambda x: jax.lax.map(function, x.reshape(-1, *x.shape[-2:])).reshape(x.shape)
    return jax.lax.platform_dependent(x, cpu=apart, default=function)


def matmul(x: Array, y: Array, precision: Any = None) -> Array:
    """The matrix product, at the highest precision by default: TF32 makes a basis orthonormal to three digits only."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST if precision is None else precision)


def transposed(x: Array) -> Array:
    """The last two axes swapped."""
    return jnp.swapaxes(x, -1, -2)
