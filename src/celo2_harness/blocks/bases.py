"""The sides of matrices that have a basis, and the next bases of all of them at once."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike

from celo2_harness.rule import MatrixView, usual_precision
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
    """One side of the matrices of a leaf: the axis of the viewed array (-2 rows, -1 columns), and its `Square`."""

    axis: int
    covariance: Array
    basis: Array


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


def turn(x: Array, sides: Sequence[Side], *, back: bool = False, precision: Any = None) -> Array:
    """A viewed array in the coordinates of the bases, Q^T x along the rows and x Q along the columns; or back."""
    precision = usual_precision(precision)
    for side in sides:
        basis = transposed(side.basis) if back else side.basis
        x = matmul(transposed(basis), x, precision) if side.axis == -2 else matmul(x, basis, precision)
    return x


def with_gradient(side: Side, gradient: Array, finite: Array, decay: ArrayLike) -> Side:
    """The side after L <- b L + (1 - b) G G^T, with G the viewed gradient; as it was where that is not finite."""
    x = gradient if side.axis == -2 else transposed(gradient)
    covariance = decay * side.covariance + (1.0 - decay) * matmul(x, transposed(x))
    return side._replace(covariance=jnp.where(finite, covariance, side.covariance))


def next_bases(
    sides: Sequence[Sequence[Side]], orthonormalize: Orthonormalize, mesh: Mesh | AbstractMesh | None
) -> list[list[Array]]:
    """The next basis of every side; squares of one size go together, whichever leaves they come from.

    Args:
        sides: The sides of every leaf.
        orthonormalize: See `next_basis`.
        mesh: The devices to share the work out among; None for one device.

    Returns:
        The bases, in the order of the sides.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    for i, of_leaf in enumerate(sides):
        for k, side in enumerate(of_leaf):
            groups.setdefault(side.basis.shape[-1], []).append((i, k))
    bases = [[side.basis for side in of_leaf] for of_leaf in sides]
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
