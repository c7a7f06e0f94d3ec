"""Small matrices of many leaves as a few batches, so that one computation serves them all.

What a compiler does per leaf, and what a launch costs, soon exceeds the arithmetic on a small one. Matrices of one
shape are stacked as they are. Those of other shapes join them, padded with zeros, where that costs less than a batch of
their own; tall ones are transposed to lie beside wide ones.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from celo2_harness._types import PyTree
from celo2_harness.rule.joining import cut, join, part
from celo2_harness.rule.padding import inside
from celo2_harness.rule.view import MatrixView

Shape = tuple[int, ...]
Stacked = Shaped[Array, "..."] | list[Shaped[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Leaves whose matrices (or vectors) are taken together.

    Attributes:
        members: The positions of the leaves.
        views: The views of the leaves.
        matrix: Rows and columns that hold each of their matrices, or the length that holds each vector.
        tall: Whether factored moments are reduced over the rows.
    """

    members: tuple[int, ...]
    views: tuple[MatrixView, ...]
    matrix: Shape
    tall: bool

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """Returns how many matrices each leaf has."""
        return tuple(map(_count, self.views))

    @functools.cached_property
    def view(self) -> MatrixView:
        """The view of the whole batch."""
        axes = self.views[0].viewed[: -len(self.matrix)] if self.alone else (sum(self.counts),)
        shape, n = (*axes, *self.matrix), len(axes)
        if len(self.matrix) == 1:
            return MatrixView(shape, (), (n,))
        return MatrixView(shape, (n,), (n + 1,), (n + 1, n) if self.tall else (n, n + 1))

    @property
    def alone(self) -> bool:
        """Whether it is one leaf, which keeps its batch axes: they may be split over devices."""
        return len(self.members) == 1

    @property
    def padded(self) -> bool:
        """Whether any matrix is smaller than those of the batch."""
        return self.lengths is not None

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, "matrices axes"] | None:
        """The true lengths of every matrix; None if nothing is padded."""
        own = [self._lengths(view) for view in self.views]
        return None if set(own) == {self.matrix} else np.repeat(np.array(own), self.counts, axis=0)

    def stack(self, leaves: Sequence[Shaped[Array, "..."]]) -> Shaped[Array, "..."]:
        """Makes one array of the leaves: matrices, rows, columns (or vectors, length)."""
        if self.alone:
            return self.views[0].apply(leaves[0])
        if self.lengths is None:
            parts = [
                jax.lax.reshape(self._turn(view, view.apply(leaf)), (count, math.prod(self.matrix)))
                for view, leaf, count in zip(self.views, leaves, self.counts, strict=True)
            ]
            return join(parts).reshape(-1, *self.matrix)
        flat = [view.apply(leaf).reshape(-1) for view, leaf in zip(self.views, leaves, strict=True)]
        rowwise = [(*_matrix(view)[1:], 1) for view in self.views]
        strides = [x[::-1] if self._turned(view) else x for view, x in zip(self.views, rowwise, strict=True)]
        strides = np.repeat(np.array(strides), self.counts, axis=0)
        return _gather(jnp.concatenate(flat), self.lengths, strides, self.matrix)

    def stack_thin(self, moments: Sequence[Shaped[Array, "..."]], axis: int) -> Shaped[Array, "..."]:
        """Makes one array of what leaves have along one axis of a matrix.

        Args:
            moments: Per leaf the batch axes, then that axis.
            axis: Which axis of a matrix of the batch.

        Returns:
            An array of matrices, length.
        """
        length = self.matrix[axis]
        if self.alone:
            return moments[0]
        if self.lengths is None:
            return join([jax.lax.reshape(x, (n, length)) for x, n in zip(moments, self.counts, strict=True)])
        lengths = self.lengths[:, [axis]]
        flat = jnp.concatenate([x.reshape(-1) for x in moments])
        return _gather(flat, lengths, np.ones_like(lengths), (length,))

    def cut(self, arrays: PyTree) -> PyTree:
        """Cuts what `stack` and `stack_thin` make into pieces, of which `unstack` and `unstack_thin` make leaves.

        Args:
            arrays: A tree of such arrays; together they take fewer operations than one by one.

        Returns:
            A tree like `arrays`, with a list of arrays for every array.
        """
        return jax.tree.map(lambda x: [x], arrays) if self.padded or self.alone else cut(arrays, self.counts)

    def unstack(self, x: Stacked) -> list[Shaped[Array, "..."]]:
        """Takes what `stack` makes, or the pieces of it, back to leaves."""
        parts = self._parts(x, [self._lengths(view) for view in self.views])
        return [
            view.invert(jax.lax.reshape(self._turn(view, part), view.viewed))
            for view, part in zip(self.views, parts, strict=True)
        ]

    def unstack_thin(self, x: Stacked, axis: int) -> list[Shaped[Array, "..."]]:
        """Takes what `stack_thin` makes, or the pieces of it, back to leaves."""
        lengths = [self._lengths(view)[axis] for view in self.views]
        parts = self._parts(x, [(length,) for length in lengths])
        shapes = [(*view.viewed[:-2], length) for view, length in zip(self.views, lengths, strict=True)]
        return [jax.lax.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]

    def _parts(self, x: Stacked, lengths: Sequence[Shape]) -> list[jax.Array]:
        """Each leaf's matrices, without padding."""
        pieces = x if isinstance(x, list) else self.cut(x)
        if self.alone:
            return pieces
        if not self.padded:
            return part(pieces, self.counts)
        starts = [end - count for end, count in zip(itertools.accumulate(self.counts), self.counts, strict=True)]
        return [
            jax.lax.slice(pieces[0], (start, *[0] * len(length)), (start + count, *length))
            for start, count, length in zip(starts, self.counts, lengths, strict=True)
        ]

    def _turned(self, view: MatrixView) -> bool:
        """Returns whether matrices of the leaf lie transposed in the batch."""
        return len(self.matrix) == 2 and _tall(_matrix(view)) != self.tall

    def _turn(self, view: MatrixView, x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, -1, -2) if self._turned(view) else x

    def _lengths(self, view: MatrixView) -> Shape:
        """The shape of a matrix of the leaf, as it lies in the batch."""
        return _matrix(view)[::-1] if self._turned(view) else _matrix(view)


def stackable(view: MatrixView) -> bool:
    """Returns whether the leaf is no more than matrices with rows and columns factored, or vectors."""
    return not view.whole and view.factored == dataclasses.replace(view, factored_over=None).factored


def plan_batches(
    views: Sequence[MatrixView],
    chosen: Iterable[int],
    key: Callable[[int], Hashable] = lambda position: None,
    *,
    cost: Callable[[Shape], float | int] = math.prod,
    join_below: float | int,
    largest: float | int,
) -> list[Batch]:
    """Sorts leaves into batches.

    Args:
        views: The views of all leaves.
        chosen: The positions of the leaves to sort, which must be `stackable`.
        key: A function from the position of a leaf to its key; leaves of different keys share no batch.
        cost: The cost of one matrix as a function of its lengths, the shorter first.
        join_below: The cost of padding up to which one shape joins others.
        largest: The cost of a batch, at most; a leaf that costs more has a batch of its own.

    Returns:
        The batches; members of one shape are in order of their positions.
    """
    kinds: dict[Hashable, dict[Shape, list[int]]] = {}
    for i in chosen:
        lengths = tuple(sorted(_matrix(views[i])))
        kinds.setdefault((len(lengths), key(i)), {}).setdefault(lengths, []).append(i)
    batches = []
    for shapes in kinds.values():
        for members in _joined_shapes(shapes, views, cost, join_below):
            batches += [_batch(views, part) for part in _portions(members, views, cost, largest)]
    return batches


def single_batch(view: MatrixView, position: int) -> Batch:
    """The batch of one leaf, of any view."""
    return dataclasses.replace(_batch([view], [0]), members=(position,))


def _joined_shapes(
    shapes: dict[Shape, list[int]],
    views: Sequence[MatrixView],
    cost: Callable[[Shape], float | int],
    join_below: float | int,
) -> list[list[int]]:
    """Leaves by shape, larger shapes first; each shape joins the one before it that it is cheapest to pad to."""
    groups: list[tuple[Shape, list[int]]] = []
    total = lambda lengths, members: cost(lengths) * sum(_count(views[i]) for i in members)
    for lengths in sorted(shapes, key=cost, reverse=True):
        members = shapes[lengths]
        found, best = None, join_below
        for k, (other, others) in enumerate(groups):
            union = tuple(map(max, other, lengths))
            waste = total(union, others + members) - total(other, others) - total(lengths, members)
            if waste <= best:
                found, best = k, waste
        if found is None:
            groups.append((lengths, members))
        else:
            other, others = groups[found]
            groups[found] = tuple(map(max, other, lengths)), others + members
    return [members for _, members in groups]


def _portions(
    members: Sequence[int], views: Sequence[MatrixView], cost: Callable[[Shape], float | int], largest: float | int
) -> list[list[int]]:
    """The members in order, as many at a time as cost less than `largest`."""
    portions: list[list[int]] = []
    room = 0.0
    for i in members:
        needed = cost(tuple(sorted(_matrix(views[i])))) * _count(views[i])
        if not portions or needed > room:
            portions.append([])
            room = largest
        portions[-1].append(i)
        room -= needed
    return portions


def _batch(views: Sequence[MatrixView], members: Sequence[int]) -> Batch:
    own = [_matrix(views[i]) for i in members]
    # As most of the members lie.
    tall = 2 * sum(map(_tall, own)) > len(own)
    shorter_first = tuple(map(max, zip(*map(sorted, own), strict=True)))
    matrix = shorter_first[::-1] if tall else shorter_first
    return Batch(tuple(members), tuple(views[i] for i in members), matrix, tall)


def _matrix(view: MatrixView) -> Shape:
    return view.viewed[-2:] if view.is_matrix else view.viewed[-1:]


def _tall(matrix: Shape) -> bool:
    return len(matrix) == 2 and matrix[0] > matrix[1]


def _count(view: MatrixView) -> int:
    return math.prod(view.viewed[: len(view.viewed) - len(_matrix(view))])


def _gather(
    flat: jax.Array, lengths: Int[np.ndarray, "matrices axes"], strides: Int[np.ndarray, "matrices axes"], shape: Shape
) -> jax.Array:
    """Matrices that lie one after the other, each with zeros up to a common shape.

    One gather with computed positions: padding each leaf by itself would be an operation per leaf, which a compiler
    makes code for.
    """
    sizes = np.prod(lengths, axis=1)
    start = np.cumsum(sizes) - sizes
    ones = [1] * len(shape)
    position = jnp.asarray(start.reshape(-1, *ones))
    for axis, length in enumerate(shape):
        along = jnp.arange(length).reshape([1, *(length if i == axis else 1 for i in range(len(shape)))])
        position = position + jnp.asarray(strides[:, axis].reshape(-1, *ones)) * along
    marks = inside((len(lengths), *shape), lengths)
    found = flat.at[jnp.where(marks, position, 0)].get(mode="promise_in_bounds")
    return jnp.where(marks, found, jnp.zeros([], flat.dtype))
