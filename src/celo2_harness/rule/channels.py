"""The channels that one leaf has, grouped by shape, and the root mean squares that normalise them.

A channel that depends on the row or the column alone stays thin: what the network needs of it is computed once per row
or column. All mean squares of the others come from one reduction with many outputs, in a single pass over the leaf.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from celo2_harness.rule.config import RuleConfig
from celo2_harness.rule.features import (
    FEATURES,
    Channel,
    Factor,
    Feature,
    InverseRoot,
    LeafStatistics,
    channel_counts,
    product,
    square,
)
from celo2_harness.rule.padding import count_inside, inside, mean_over
from celo2_harness.rule.view import MatrixView

NORMALIZATION_FLOOR = 1e-9


class ChannelGroup(NamedTuple):
    """Channels of one shape (the viewed shape, or with axes of length one) and their rows of `w0`."""

    shape: tuple[int, ...]
    rows: list[int]
    channels: list[Channel]


def channel_groups(
    config: RuleConfig, view: MatrixView, statistics: LeafStatistics, features: Mapping[str, Feature] = FEATURES
) -> list[ChannelGroup]:
    """The channels of a leaf, those at full size first.

    Shapes are joined with that of the scales (one number per matrix), so that a channel without the batch axes, times
    its scale, still has its group's shape.
    """
    per_matrix = view.viewed[: -len(view.axes)] + (1,) * len(view.axes)
    found: dict[tuple[int, ...], ChannelGroup] = {view.viewed: ChannelGroup(view.viewed, [], [])}
    row = 0
    for name, count in zip(config.features, channel_counts(config), strict=True):
        if view.is_matrix or features[name].for_vectors:
            for offset, factors in enumerate(features[name].compute(statistics)):
                shape = jnp.broadcast_shapes(per_matrix, *(_shape(factor) for factor in factors))
                group = found.setdefault(shape, ChannelGroup(shape, [], []))
                group.rows.append(row + offset)
                group.channels.append(factors)
        row += count
    return [group for group in found.values() if group.rows]


def input_scales(
    view: MatrixView,
    groups: Sequence[ChannelGroup],
    floor: float = NORMALIZATION_FLOOR,
    column_parts: int = 1,
    lengths: np.ndarray | None = None,
) -> list[Float[Array, "..."]]:
    """1 / sqrt(mean(x^2) + floor) of every channel x, one number per matrix.

    Factors that are constant along a row leave its sum: sum_ij (r_i y_ij)^2 = sum_i r_i^2 sum_j y_ij^2. What is left
    inside is summed for all channels in one reduction, which reads every plane once.

    Args:
        view: The leaf's view.
        groups: What `channel_groups` gives.
        floor: Added to the mean squares.
        column_parts: Equal parts of the last axis that are summed each by itself at first (see `leaf_direction`).
        lengths: The true lengths of padded matrices (see `rule.padding`), which are then not split into parts.

    Returns:
        Per group an array whose first axis is the channel, then the batch axes, then ones.
    """
    scales = []
    for group in groups:
        squares = [list(map(square, factors)) for factors in group.channels]
        if group.shape == view.viewed:
            sums = jnp.stack(_row_sums(view, squares, column_parts, lengths))
            if lengths is None:
                means = jnp.mean(sums / (view.viewed[-1] // column_parts), axis=view.axes, keepdims=True)
            else:
                count = count_inside(view.viewed, view.axes, lengths)
                means = jnp.sum(sums, axis=view.axes, keepdims=True) / count[None]
        else:
            thin = jnp.stack([jnp.broadcast_to(product(factors), group.shape) for factors in squares])
            means = mean_over(thin, view.axes, lengths)
        scales.append(jax.lax.rsqrt(means + floor))
    return scales


@jax.custom_jvp
def row_sums(planes: Sequence[Float[Array, "*shape"]]) -> Sequence[Float[Array, "..."]]:
    """The sums of float32 arrays of one shape along their last axis, in one pass over all of them."""
    zeros = (jnp.zeros([], jnp.float32),) * len(planes)
    return tuple(jax.lax.reduce(tuple(planes), zeros, lambda x, y: tuple(map(jnp.add, x, y)), (planes[0].ndim - 1,)))


@row_sums.defjvp
def _row_sums_jvp(primals: Any, tangents: Any) -> Any:
    # JAX's own rule fails where some of the arrays do not depend on what is differentiated.
    return row_sums(*primals), tuple(jnp.sum(tangent, axis=-1) for tangent in tangents[0])


def _row_sums(
    view: MatrixView, squares: Sequence[Sequence[jax.Array]], parts: int, lengths: np.ndarray | None
) -> list[jax.Array]:
    """The sum along the last axis of every product of squares; of that axis remain the sums of its parts."""
    columns = view.viewed[-1]
    summed = [product([x for x in factors if x.shape[-1] == columns]) for factors in squares]
    summed = [jnp.broadcast_to(x, view.viewed) for x in summed]
    if lengths is not None:
        marks = inside(view.viewed, lengths)
        summed = [jnp.where(marks, x, 0.0) for x in summed]
    if parts > 1:
        summed = [x.reshape(*view.viewed[:-1], parts, columns // parts) for x in summed]
    sums = row_sums(summed)
    if parts == 1:
        sums = [row[..., None] for row in sums]
    outside = [[x for x in factors if x.shape[-1] != columns] for factors in squares]
    return [product([row, *factors]) for row, factors in zip(sums, outside, strict=True)]


def _shape(factor: Factor) -> tuple[int, ...]:
    return (factor.of if isinstance(factor, InverseRoot) else factor).shape
