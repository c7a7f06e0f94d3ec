"""Matrices that turn together, their sides that have a basis, and the next bases of all of them at once."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike

from celo2_harness.blocks.small import replace_members, small_batches
from celo2_harness.rule import Batch, MatrixView, single_batch, usual_precision
from celo2_harness.rule.eigenbasis import Orthonormalize, matmul, next_basis, transposed

Sides = Literal["one", "both"]

# Which of the shorter and the longer side have a basis.
CHOSEN = {"one": (0,), "both": (0, 1)}


class Square(NamedTuple):
    """What is kept for one side of the matrices of a leaf: arrays (batch axes, n, n) for a side of length n.

    Fields, so that no path in a state ends like that of a parameter: a square is split over no mesh, even where the
    matrix is one, too.
    """

    covariance: Array
    basis: Array


class Side(NamedTuple):
    """One side of the matrices of a batch: the axis (-2 rows, -1 columns), and the `Square` of each matrix."""

    axis: int
    covariance: Array
    basis: Array


class Turning(NamedTuple):
    """Matrices that turn together: those of one leaf, or of several small ones.

    `gradient` is float32, and zero in matrices that are not `finite` (of its shape, with ones for the matrix).
    """

    batch: Batch
    sides: list[Side]
    gradient: Array
    finite: Array


def axes_with_basis(view: MatrixView, sides: Sides, max_size: int) -> tuple[int, ...]:
    """The axes of the viewed array that get a basis, the shorter one first; none for vectors.

    Example:
        >>> axes_with_basis(MatrixView((8, 4), (0,), (1,)), "both", 6)
        (-1,)
    """
    if not view.is_matrix:
        return ()
    rows, columns = view.viewed[-2:]
    by_length = (-2, -1) if rows <= columns else (-1, -2)
    return tuple(by_length[k] for k in CHOSEN[sides] if view.viewed[by_length[k]] <= max_size)


def squares_of(batch: Batch, side: int) -> Batch:
    """The squares of one side of every matrix of a batch, as a batch. A square does not turn with its matrix."""
    n = batch.matrix[side]
    views = (MatrixView((*axes, n, n), (len(axes),), (len(axes) + 1,)) for axes in (v.viewed[:-2] for v in batch.views))
    return Batch(batch.members, tuple(views), (n, n), tall=False)


def turning_together(
    views: Sequence[MatrixView],
    gradients: Sequence[Array],
    squares: Sequence[Sequence[Square]],
    axes_of: Callable[[MatrixView], Sequence[int]],
    places: Sequence[NamedSharding | None],
) -> list[Turning]:
    """Sorts the leaves that have bases: small ones of one shape turn together, every other one by itself.

    Args:
        views: The views of all leaves.
        gradients: The gradients, float32.
        squares: What is kept for every leaf.
        axes_of: The axes of a view that have a basis, in the order of the squares.
        places: How the leaves lie on a mesh; None of those that do not.

    Returns:
        The matrices, whose batches hold the positions of their leaves.
    """
    chosen = [i for i, of_leaf in enumerate(squares) if of_leaf]
    pick = lambda items: [items[i] for i in chosen]
    batches, alone = small_batches(pick(views), pick(gradients), pick(places), join_below=0)
    at = lambda positions: tuple(chosen[k] for k in positions)
    batches = [dataclasses.replace(batch, members=at(batch.members)) for batch in batches]
    found = []
    for batch in [*batches, *(single_batch(views[i], i) for i in at(alone))]:
        axes = axes_of(batch.view)
        kept = [squares[i] for i in batch.members]
        sides = [
            Side(axis, *map(squares_of(batch, axis).stack, zip(*(of_leaf[k] for of_leaf in kept), strict=True)))
            for k, axis in enumerate(axes)
        ]
        gradient = batch.stack([gradients[i] for i in batch.members])
        # A square that overflows would be as bad in the covariance as one that is not a number.
        finite = jnp.isfinite(jnp.sum(jnp.square(gradient), axis=(-2, -1), keepdims=True))
        found.append(Turning(batch, sides, jnp.where(finite, gradient, 0.0), finite))
    return found


def map_turning(
    function: Callable[..., Sequence[Array]], turning: Sequence[Turning], *arrays: Sequence[Any]
) -> list[list[Any]]:
    """Applies a function to all matrices that have bases.

    Args:
        function: Takes a `Turning` and, of every list, the batch; returns as many arrays of its shape.
        turning: The matrices.
        *arrays: Lists of one array for every leaf of the tree.

    Returns:
        As many lists; leaves without bases are in them as they were.
    """
    results = [list(leaves) for leaves in arrays]
    for matrices in turning:
        replace_members(matrices.batch, functools.partial(function, matrices), results)
    return results


def turn(x: Array, sides: Sequence[Side], *, back: bool = False, precision: Any = None) -> Array:
    """A batch in the coordinates of the bases, Q^T x along the rows and x Q along the columns; or back."""
    precision = usual_precision(precision)
    for side in sides:
        basis = transposed(side.basis) if back else side.basis
        x = matmul(transposed(basis), x, precision) if side.axis == -2 else matmul(x, basis, precision)
    return x


def with_gradient(matrices: Turning, decay: ArrayLike) -> Turning:
    """The matrices after L <- b L + (1 - b) G G^T on every side; L stays where G is not finite."""

    def after(side: Side) -> Side:
        x = matrices.gradient if side.axis == -2 else transposed(matrices.gradient)
        covariance = decay * side.covariance + (1.0 - decay) * matmul(x, transposed(x))
        return side._replace(covariance=jnp.where(matrices.finite, covariance, side.covariance))

    return matrices._replace(sides=[after(side) for side in matrices.sides])


def from_old_basis(matrices: Turning, bases: Sequence[Array]) -> Turning:
    """The matrices with bases that turn what has coordinates in the old ones to the new ones."""
    sides = [
        side._replace(basis=matmul(transposed(side.basis), new))
        for side, new in zip(matrices.sides, bases, strict=True)
    ]
    return matrices._replace(sides=sides)


def next_bases(
    turning: Sequence[Turning], orthonormalize: Orthonormalize, mesh: Mesh | AbstractMesh | None
) -> list[list[Array]]:
    """The next basis of every side; squares of one size go together, whichever leaves they come from.

    Args:
        turning: The matrices, with their new covariances.
        orthonormalize: See `next_basis`.
        mesh: The devices to share the work out among; None for one device.

    Returns:
        The bases, in the order of the sides.
    """
    sides = [matrices.sides for matrices in turning]
    groups: dict[int, list[tuple[int, int]]] = {}
    for i, own in enumerate(sides):
        for k, side in enumerate(own):
            groups.setdefault(side.basis.shape[-1], []).append((i, k))
    bases = [[side.basis for side in own] for own in sides]
    for n, members in groups.items():
        covariance = jnp.concatenate([sides[i][k].covariance.reshape(-1, n, n) for i, k in members])
        basis = jnp.concatenate([sides[i][k].basis.reshape(-1, n, n) for i, k in members])
        if mesh is None:
            found = next_basis(covariance, basis, orthonormalize)
        else:
            found = _shared_out(covariance, basis, orthonormalize, mesh)
        start = 0
        for i, k in members:
            shape = bases[i][k].shape
            count = math.prod(shape[:-2])
            bases[i][k] = found[start : start + count].reshape(shape)
            start += count
    return bases


def squares_by_leaf(
    count: int, turning: Sequence[Turning], bases: Sequence[Sequence[Array]]
) -> list[tuple[Square, ...]]:
    """What is kept for every leaf: the covariances of the matrices, and their new bases.

    Args:
        count: The number of leaves.
        turning: The matrices.
        bases: The new bases, in the order of the sides.
    """
    kept: list[list[Square]] = [[] for _ in range(count)]
    for matrices, new in zip(turning, bases, strict=True):
        for side, basis in zip(matrices.sides, new, strict=True):
            batch = squares_of(matrices.batch, side.axis)
            for i, *square in zip(batch.members, *map(batch.unstack, batch.cut([side.covariance, basis])), strict=True):
                kept[i].append(Square(*square))
    return [tuple(of_leaf) for of_leaf in kept]


def _shared_out(covariance: Array, basis: Array, orthonormalize: Orthonormalize, mesh: Mesh | AbstractMesh) -> Array:
    """`next_basis` of a stack of which every device does a part."""
    count = len(basis)
    # Up to a multiple of the devices by repetition: matrices of zeros would take the most passes.
    parts = jnp.arange(count + -count % mesh.size) % count
    spec = PartitionSpec(mesh.axis_names)
    function = lambda covariance, basis: next_basis(covariance, basis, orthonormalize)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    found = jax.jit(mapped)(covariance[parts], basis[parts])
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec()))[:count]
