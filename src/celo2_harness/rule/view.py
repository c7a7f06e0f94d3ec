"""How one leaf is seen as matrices: which axes are a batch, which are rows, which are columns.

A view is a transpose and a reshape, both static. Everything that needs matrices (feature normalisation, factored
moments, Newton-Schulz, RMS) works on the viewed array, whose last two axes are the matrix (the last one for vectors).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Shaped


class MatrixView(NamedTuple):
    """A static description of the view of one leaf.

    Attributes:
      shape: the leaf's shape.
      permutation: the leaf's axes in the order batch, rows, columns.
      viewed: shape after transpose and reshape.
      factored: (d1, d0), the axes of the viewed array that carry factored second moments, d0 the larger one;
        None for vectors, which keep a full (diagonal) second moment.
      whole: normalise over all axes together, instead of matrix by matrix.
    """

    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    viewed: tuple[int, ...]
    factored: tuple[int, int] | None
    whole: bool = False

    @property
    def is_matrix(self) -> bool:
        return self.factored is not None

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the viewed array that are normalised together: of one matrix (or vector), or all."""
        if self.whole:
            return tuple(range(-len(self.viewed), 0))
        return (-2, -1) if self.is_matrix else (-1,)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The viewed shape without the larger factored axis."""
        assert self.factored is not None
        return tuple(n for axis, n in enumerate(self.viewed) if axis != self.factored[1])

    @property
    def column_shape(self) -> tuple[int, ...]:
        """The viewed shape without the smaller factored axis."""
        assert self.factored is not None
        return tuple(n for axis, n in enumerate(self.viewed) if axis != self.factored[0])

    def apply(self, x: Shaped[Array, "*leaf"]) -> Shaped[Array, "*viewed"]:
        """Leaf -> viewed array."""
        return jnp.transpose(x, self.permutation).reshape(self.viewed)

    def invert(self, x: Shaped[Array, "*viewed"]) -> Shaped[Array, "*leaf"]:
        """Viewed array -> leaf."""
        inverse = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
        return x.reshape([self.shape[axis] for axis in self.permutation]).transpose(inverse)


def default_view(shape: Sequence[int]) -> MatrixView:
    """The published behaviour: the last two axes are the matrix, the two largest axes are factored.

    Both choices coincide for matrices and differ on purpose for more axes. Ties go to the later axis.

    >>> default_view((16, 4, 6)).factored
    (2, 0)
    >>> default_view(()).viewed
    (1,)
    """
    shape = tuple(shape)
    identity = tuple(range(len(shape)))
    if len(shape) < 2:
        return MatrixView(shape, identity, shape or (1,), None)
    order = sorted(identity, key=shape.__getitem__)  # stable: of equal axes the later one comes last
    return MatrixView(shape, identity, shape, (order[-2], order[-1]))


def view_from_axes(shape: Sequence[int], reduction_axis: Any, output_axis: Any, *, name: str = "leaf") -> MatrixView:
    """The view given by input and output axes; axes in neither are batch axes.

    Without input axes the leaf is a batch of vectors (stacked biases).

    >>> view_from_axes((3, 3, 4, 8), (0, 1, 2), 3).viewed  # a convolution, (spatial x in, out)
    (36, 8)
    >>> view_from_axes((12, 64), (), 1).is_matrix  # twelve stacked biases
    False

    Raises:
      ValueError: an axis is out of range or named twice.
    """
    shape, ndim = tuple(shape), len(shape)
    groups = []
    for axes in (reduction_axis, output_axis):
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        if any(not -ndim <= axis < ndim for axis in axes):
            raise ValueError(
                f"{name} of shape {shape}: the matrix view names axes {axes}, but the leaf has axes 0 to {ndim - 1}."
                " Correct its MuonDimensionNumbers(reduction_axis, output_axis)."
            )
        groups.append(tuple(axis % ndim for axis in axes))
    rows, columns = groups
    if len(set(rows + columns)) != len(rows + columns) or not columns:
        raise ValueError(
            f"{name} of shape {shape}: reduction axes {rows} and output axes {columns} must name each axis once and"
            " at least one output axis. Correct its MuonDimensionNumbers(reduction_axis, output_axis)."
        )
    batch = tuple(axis for axis in range(ndim) if axis not in rows + columns)
    permutation = batch + rows + columns
    size = math.prod
    viewed = tuple(shape[axis] for axis in batch)
    if not rows:
        return MatrixView(shape, permutation, (*viewed, size(shape[axis] for axis in columns)), None)
    matrix = size(shape[axis] for axis in rows), size(shape[axis] for axis in columns)
    first, last = len(batch), len(batch) + 1
    factored = (last, first) if matrix[0] > matrix[1] else (first, last)
    return MatrixView(shape, permutation, (*viewed, *matrix), factored)
