"""How one leaf is seen as matrices: which axes are a batch, which are rows, which are columns.

A view is a transpose and a reshape, both static. Everything that needs matrices (feature normalisation, factored
moments, Newton-Schulz, RMS) works on the viewed array, whose last two axes are the matrix (the last one for vectors).
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Shaped


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """The view of one leaf: its input axes become rows, its output axes columns, all other axes a batch.

    A view without input axes is a batch of vectors, such as stacked biases. Views are hashable, and leaves of a tree.

    Attributes:
        shape: The leaf's shape.
        reduction_axis: The input axes, non-negative.
        output_axis: The output axes, non-negative.
        factored_over: The two axes of the viewed array that carry factored second moments, the reduced one last. By
            default rows and columns, the longer one last.
        whole: Whether features are normalised over all axes together instead of matrix by matrix.

    Example:
        >>> view = MatrixView((3, 3, 4, 8), (0, 1, 2), (3,))  # a convolution, (spatial x in, out)
        >>> view.viewed, view.factored
        ((36, 8), (1, 0))
    """

    shape: tuple[int, ...]
    reduction_axis: tuple[int, ...]
    output_axis: tuple[int, ...]
    factored_over: tuple[int, int] | None = None
    whole: bool = False

    @property
    def is_matrix(self) -> bool:
        return bool(self.reduction_axis)

    @functools.cached_property
    def batch_axis(self) -> tuple[int, ...]:
        """The axes of the leaf that are neither inputs nor outputs."""
        named = {*self.reduction_axis, *self.output_axis}
        return tuple(axis for axis in range(len(self.shape)) if axis not in named)

    @property
    def permutation(self) -> tuple[int, ...]:
        """The leaf's axes in the order batch, rows, columns."""
        return self.batch_axis + self.reduction_axis + self.output_axis

    @functools.cached_property
    def viewed(self) -> tuple[int, ...]:
        """The shape after transpose and reshape."""
        groups = (self.reduction_axis, self.output_axis) if self.is_matrix else (self.output_axis,)
        matrix = (math.prod(self.shape[axis] for axis in axes) for axes in groups)
        return (*(self.shape[axis] for axis in self.batch_axis), *matrix)

    @property
    def inputs(self) -> int:
        """The number of inputs of a matrix; the taps of a convolution's window do not count.

        Three or more input axes are a window and its channels. The channels are the axis that the outputs part from the
        window, or else the one next to the outputs.

        Example:
            >>> MatrixView((3, 3, 4, 8), (0, 1, 2), (3,)).inputs, MatrixView((8, 4, 3, 3), (1, 2, 3), (0,)).inputs
            (4, 4)
        """
        if len(self.reduction_axis) < 3:
            return math.prod(self.shape[axis] for axis in self.reduction_axis)
        output = self.output_axis[0]
        beside = lambda axis: sum((other < output) == (axis < output) for other in self.reduction_axis)
        return self.shape[min(self.reduction_axis, key=lambda axis: (beside(axis), abs(axis - output)))]

    @property
    def factored(self) -> tuple[int, int] | None:
        """The axes (d1, d0) of the viewed array that carry factored second moments, d0 the longer one.

        None for vectors, which keep a full (diagonal) second moment.
        """
        if not self.is_matrix or self.factored_over is not None:
            return self.factored_over
        rows, columns = len(self.viewed) - 2, len(self.viewed) - 1
        return (columns, rows) if self.viewed[rows] > self.viewed[columns] else (rows, columns)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the viewed array that are normalised together: of one matrix (or vector), or all."""
        if self.whole:
            return tuple(range(-len(self.viewed), 0))
        return (-2, -1) if self.is_matrix else (-1,)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The viewed shape without the longer factored axis."""
        assert self.factored is not None
        return tuple(n for axis, n in enumerate(self.viewed) if axis != self.factored[1])

    @property
    def column_shape(self) -> tuple[int, ...]:
        """The viewed shape without the shorter factored axis."""
        assert self.factored is not None
        return tuple(n for axis, n in enumerate(self.viewed) if axis != self.factored[0])

    def apply(self, x: Shaped[Array, "*leaf"]) -> Shaped[Array, "*viewed"]:
        """Takes the leaf to the viewed array."""
        return _reshaped(_transposed(x, self.permutation), self.viewed)

    def invert(self, x: Shaped[Array, "*viewed"]) -> Shaped[Array, "*leaf"]:
        """Takes the viewed array to the leaf."""
        inverse = tuple(sorted(range(len(self.permutation)), key=self.permutation.__getitem__))
        return _transposed(_reshaped(x, tuple(self.shape[axis] for axis in self.permutation)), inverse)


# An operation that does nothing takes as long to trace as any other.
def _transposed(x: jax.Array, permutation: tuple[int, ...]) -> jax.Array:
    return x if permutation == tuple(range(x.ndim)) else jax.lax.transpose(x, permutation)


def _reshaped(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return x if x.shape == shape else jax.lax.reshape(x, shape)


def default_view(shape: Sequence[int]) -> MatrixView:
    """The published behaviour: the last two axes are the matrix, the two longest axes are factored.

    Both choices coincide for matrices and differ on purpose for more axes. Ties go to the later axis.

    Args:
        shape: The leaf's shape.

    Returns:
        The view; that of a vector or a scalar has no input axes.

    Example:
        >>> default_view((16, 4, 6)).factored
        (2, 0)
        >>> default_view(()).viewed
        (1,)
    """
    shape, ndim = tuple(shape), len(shape)
    if ndim < 2:
        return MatrixView(shape, (), tuple(range(ndim)))
    order = sorted(range(ndim), key=shape.__getitem__)  # stable: of equal axes the later one comes last
    longest = None if ndim == 2 else (order[-2], order[-1])
    return MatrixView(shape, (ndim - 2,), (ndim - 1,), longest)


def view_from_axes(shape: Sequence[int], reduction_axis: Any, output_axis: Any, *, name: str = "leaf") -> MatrixView:
    """The view with the given input and output axes; axes in neither are batch axes.

    Args:
        shape: The leaf's shape.
        reduction_axis: An input axis or several, counted from the end if negative; none for vectors.
        output_axis: An output axis or several.
        name: What messages call the leaf.

    Returns:
        The view, with non-negative axes.

    Raises:
        ValueError: If an axis is out of range or named twice, or if there is no output axis.

    Example:
        >>> view_from_axes((3, 3, 4, 8), (0, 1, 2), -1).viewed
        (36, 8)
        >>> view_from_axes((12, 64), (), 1).is_matrix  # twelve stacked biases
        False
    """
    shape, ndim = tuple(shape), len(shape)
    groups = []
    for axes in (reduction_axis, output_axis):
        axes = (axes,) if isinstance(axes, numbers.Integral) else tuple(axes)
        if any(not isinstance(axis, numbers.Integral) or not -ndim <= int(axis) < ndim for axis in axes):
            raise ValueError(
                f"{name} of shape {shape}: the matrix view names axes {axes}, but the leaf has axes 0 to {ndim - 1}."
                " Correct its MuonDimensionNumbers(reduction_axis, output_axis)."
            )
        groups.append(tuple(int(axis) % ndim for axis in axes))
    rows, columns = groups
    if len(set(rows + columns)) != len(rows + columns) or not columns:
        raise ValueError(
            f"{name} of shape {shape}: reduction axes {rows} and output axes {columns} must name each axis once and"
            " at least one output axis. Correct its MuonDimensionNumbers(reduction_axis, output_axis)."
        )
    return MatrixView(shape, rows, columns)
