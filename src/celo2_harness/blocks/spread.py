"""Whole matrices for a function, out of leaves that are split over devices.

A function of matrices that is called on split ones makes XLA communicate inside it, for Newton-Schulz in every
iteration. Here the matrices of one shape are shared out instead: an all-to-all turns "a part of every matrix" into
"every part of some matrices", the function runs without communication, and a second all-to-all turns the results back.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from celo2_harness.blocks.views import split_axes
from celo2_harness.rule import MatrixView


class Cut(NamedTuple):
    """What leaves have in common whose matrices may share a batch.

    A unit is what one matrix is in the leaf: its axes in the leaf's order, all others moved to the front.

    Attributes:
        unit: Shape of the unit.
        to_matrix: Permutation of its axes, before the reshape to `matrix`.
        matrix: Rows and columns.
        splits: Per axis of the unit that is split: (mesh axes, the axis, counted with the batch axis in front).
        spread: Devices that a unit is split over.
        idle: Mesh axes over which the leaf is repeated.
        shared: Devices along them.
        dtype: The dtype of the leaf.
    """

    unit: tuple[int, ...]
    to_matrix: tuple[int, ...]
    matrix: tuple[int, int]
    splits: tuple[tuple[tuple[str, ...], int], ...]
    spread: int
    idle: tuple[str, ...]
    shared: int
    dtype: Any


class Segment(NamedTuple):
    """Some units of one leaf."""

    leaf: int
    start: int
    stop: int


class Round(NamedTuple):
    """Matrices that are shared out, worked on and brought back together."""

    cut: Cut
    segments: list[Segment]

    @property
    def per_device(self) -> int:
        """Matrices that each device has whole after the all-to-all."""
        return -(-sum(segment.stop - segment.start for segment in self.segments) // self.cut.spread)

    @property
    def divided(self) -> bool:
        """Whether devices that have the same matrices divide them."""
        return self.cut.shared > 1 and self.per_device > 1

    @property
    def sent(self) -> list[int]:
        """Bytes that a device puts into each collective."""
        matrix = math.prod(self.cut.matrix) * jnp.dtype(self.cut.dtype).itemsize
        exchanges = [self.per_device * matrix] * (2 * len(self.cut.splits))
        return exchanges + [-(-self.per_device // self.cut.shared) * matrix] * self.divided


def plan_rounds(
    leaves: Sequence[jax.Array | jax.ShapeDtypeStruct],
    views: Sequence[MatrixView],
    shardings: Sequence[NamedSharding],
    largest_batch: int,
) -> list[Round]:
    """How `spread_matrices` goes about it: leaves that are cut alike, a batch at a time."""
    groups: dict[Cut, list[Segment]] = {}
    for i, (leaf, view, place) in enumerate(zip(leaves, views, shardings, strict=True)):
        local = place.shard_shape(leaf.shape)
        units = math.prod(local[axis] for axis in _batch_axes(view))
        groups.setdefault(_cut(leaf, view, place), []).append(Segment(i, 0, units))
    rounds = []
    for cut, segments in groups.items():
        size = max(1, largest_batch // math.prod(cut.matrix)) * cut.spread * cut.shared
        rounds += [Round(cut, part) for part in _portions(segments, size)]
    return rounds


def spread_matrices(
    function: Callable[[jax.Array], jax.Array],
    leaves: Sequence[jax.Array],
    views: Sequence[MatrixView],
    shardings: Sequence[NamedSharding],
    largest_batch: int,
) -> list[jax.Array]:
    """Applies a function to all matrices of some leaves, each matrix on one device (or on several, none in parts).

    Matrices of one shape, cut alike over f devices and repeated on R, are taken n at a time. They are padded with zero
    matrices to a multiple of f, so that an all-to-all leaves every device with k = ceil(n / f) whole ones. If k > 1,
    these are padded to a multiple of R and shared out among the R devices that have the same ones; an all-gather
    collects their results. If k = 1, all R compute the same, which takes no longer and moves nothing. n is f R times
    the number of matrices that fit into `largest_batch` entries, at least one.

    Args:
        function: Takes (n, rows, columns) to the same shape, each matrix by itself; zero matrices must be harmless.
        leaves: Matrices, or batches of matrices, in their view.
        views: The views of the leaves.
        shardings: The shardings of the leaves, all on one mesh. Leaves that lie otherwise are moved there first.
        largest_batch: Entries of matrices that a device works on at once.

    Returns:
        The leaves after the function, with the same shardings.
    """
    if not leaves:
        return []
    rounds = plan_rounds(leaves, views, shardings, largest_batch)

    def local(*parts: jax.Array) -> tuple[jax.Array, ...]:
        units = [_units(part, view) for part, view in zip(parts, views, strict=True)]
        results: list[list[jax.Array]] = [[] for _ in units]
        for turn in rounds:
            stack = jnp.concatenate([units[leaf][start:stop] for leaf, start, stop in turn.segments])
            done = _whole(function, turn, stack)
            offset = 0
            for leaf, start, stop in turn.segments:
                results[leaf].append(done[offset : offset + stop - start])
                offset += stop - start
        return tuple(
            _from_units(jnp.concatenate(result), part.shape, view)
            for result, part, view in zip(results, parts, views, strict=True)
        )

    specs = tuple(place.spec for place in shardings)
    # What was gathered is the same on all idle devices, but a type system does not know.
    mapped = jax.shard_map(local, mesh=shardings[0].mesh, in_specs=specs, out_specs=specs, check_vma=False)
    return list(jax.jit(mapped)(*leaves))


def _batch_axes(view: MatrixView) -> tuple[int, ...]:
    return view.permutation[: len(view.viewed) - 2]


def _unit_axes(view: MatrixView) -> list[int]:
    return sorted(view.permutation[len(view.viewed) - 2 :])


def _cut(leaf: Any, view: MatrixView, place: NamedSharding) -> Cut:
    names = split_axes(place, len(leaf.shape))
    axes = _unit_axes(view)
    used = {name for group in names for name in group}
    idle = tuple(name for name in place.mesh.axis_names if name not in used)
    splits = tuple((names[axis], position) for position, axis in enumerate(axes, start=1) if names[axis])
    devices = lambda names: math.prod(place.mesh.shape[name] for name in names)
    return Cut(
        unit=tuple(leaf.shape[axis] for axis in axes),
        to_matrix=tuple(axes.index(axis) for axis in view.permutation[len(view.viewed) - 2 :]),
        matrix=(view.viewed[-2], view.viewed[-1]),
        splits=splits,
        spread=math.prod(devices(names) for names, _ in splits),
        idle=idle,
        shared=devices(idle),
        dtype=leaf.dtype,
    )


def _portions(segments: Sequence[Segment], size: int) -> list[list[Segment]]:
    """The units of all segments, in order, `size` at a time."""
    portions: list[list[Segment]] = []
    room = 0
    for leaf, start, stop in segments:
        while start < stop:
            if not room:
                portions.append([])
                room = size
            taken = min(room, stop - start)
            portions[-1].append(Segment(leaf, start, start + taken))
            room -= taken
            start += taken
    return portions


def _units(part: jax.Array, view: MatrixView) -> jax.Array:
    """A device's part of a leaf -> (units, ...)."""
    moved = jnp.transpose(part, (*_batch_axes(view), *_unit_axes(view)))
    return moved.reshape(-1, *moved.shape[len(view.viewed) - 2 :])


def _from_units(units: jax.Array, shape: tuple[int, ...], view: MatrixView) -> jax.Array:
    """The inverse of `_units`."""
    order = (*_batch_axes(view), *_unit_axes(view))
    return units.reshape([shape[axis] for axis in order]).transpose(sorted(range(len(order)), key=order.__getitem__))


def _whole(function: Callable[[jax.Array], jax.Array], turn: Round, stack: jax.Array) -> jax.Array:
    """The function on a stack of units of which this device has a part."""
    cut, count = turn.cut, len(stack)
    stack = _pad(stack, cut.spread)
    for axes, position in cut.splits:
        stack = jax.lax.all_to_all(stack, axes, 0, position, tiled=True)
    if turn.divided:
        stack = _pad(stack, cut.shared)
        size = len(stack) // cut.shared
        stack = jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index(cut.idle) * size, size)
    order = (0, *(axis + 1 for axis in cut.to_matrix))
    shape = [len(stack), *(cut.unit[axis] for axis in cut.to_matrix)]
    matrices = function(stack.transpose(order).reshape(-1, *cut.matrix))
    stack = matrices.reshape(shape).transpose(sorted(range(len(order)), key=order.__getitem__))
    if turn.divided:
        stack = jax.lax.all_gather(stack, cut.idle, axis=0, tiled=True)[: turn.per_device]
    for axes, position in reversed(cut.splits):
        stack = jax.lax.all_to_all(stack, axes, position, 0, tiled=True)
    return stack[:count]


def _pad(stack: jax.Array, multiple: int) -> jax.Array:
    """Zero matrices at the end, up to a multiple."""
    missing = -len(stack) % multiple
    return jnp.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1)) if missing else stack
