"""The network of the learned rule, evaluated per parameter without ever holding its input planes.

Three facts make that possible. The normalisation of a channel is one number per matrix, so it folds into the first
layer's weights. All these numbers are sums, which one reduction with many outputs makes in a single pass. And the
layers are so small (eight units) that written out as sums of products they are elementwise arithmetic, which XLA fuses
into one loop over the parameters.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from celo2_harness.rule.config import RuleConfig, Theta
from celo2_harness.rule.features import FEATURES, Channel, LeafStatistics, channel_counts, square, value
from celo2_harness.rule.view import MatrixView

NORMALIZATION_FLOOR = 1e-9


def input_channels(config: RuleConfig, view: MatrixView, statistics: LeafStatistics) -> tuple[list[int], list[Channel]]:
    """The channels that this leaf has, and the rows of `w0` that they belong to."""
    rows: list[int] = []
    channels: list[Channel] = []
    start = 0
    for name, count in zip(config.features, channel_counts(config), strict=True):
        if view.is_matrix or FEATURES[name].for_vectors:
            rows.extend(range(start, start + count))
            channels.extend(FEATURES[name].compute(statistics))
        start += count
    return rows, channels


def _first_layer(weights: Sequence[Sequence[jax.Array]], bias: Any, channels: Sequence[jax.Array]) -> list[jax.Array]:
    """Pre-activations b_j + sum_i x_i w_ij; thin channels are summed among themselves first."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, channel in enumerate(channels):
        by_shape.setdefault(channel.shape, []).append(i)
    groups = sorted(by_shape.values(), key=lambda group: channels[group[0]].size)
    units = []
    for j in range(bias.shape[0]):
        total = bias[j]
        for group in groups:
            total = total + sum(channels[i] * weights[i][j] for i in group)
        units.append(total)
    return units


def _dense(weights: Any, bias: Any, inputs: Sequence[jax.Array], units: int) -> list[jax.Array]:
    return [bias[j] + sum(x * weights[i, j] for i, x in enumerate(inputs)) for j in range(units)]


def _product(factors: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(operator.mul, factors)


def input_scales(config: RuleConfig, view: MatrixView, statistics: LeafStatistics) -> list[Float[Array, "..."]]:
    """1 / sqrt(mean(x^2) + 1e-9) of every channel x, one number per matrix.

    Factors that are constant along a row leave its sum: sum_ij (r_i y_ij)^2 = sum_i r_i^2 sum_j y_ij^2. What is left
    inside is summed for all channels in one reduction, which reads every plane once.
    """
    columns = view.viewed[-1]
    means: list[jax.Array] = []
    inside: dict[int, jax.Array] = {}
    outside: dict[int, list[jax.Array]] = {}
    for i, factors in enumerate(input_channels(config, view, statistics)[1]):
        squares = list(map(square, factors))
        along_row = [x for x in squares if x.shape[-1] == columns]
        if along_row and jnp.broadcast_shapes(*(x.shape for x in along_row)) == view.viewed:
            inside[i] = _product(along_row)
            outside[i] = [x for x in squares if x.shape[-1] != columns]
            means.append(jnp.zeros([]))  # filled below
        else:
            means.append(jnp.mean(_product(squares), axis=view.axes, keepdims=True))
    zeros = (jnp.zeros([], jnp.float32),) * len(inside)
    add = lambda x, y: tuple(map(jnp.add, x, y))
    row_sums = jax.lax.reduce(tuple(inside.values()), zeros, add, (len(view.viewed) - 1,)) if inside else ()
    for i, row_sum in zip(inside, row_sums, strict=True):
        means[i] = jnp.mean(_product([row_sum[..., None] / columns, *outside[i]]), axis=view.axes, keepdims=True)
    return [jax.lax.rsqrt(mean + NORMALIZATION_FLOOR) for mean in means]


def evaluate(
    theta: Theta,
    config: RuleConfig,
    view: MatrixView,
    statistics: LeafStatistics,
    scales: Sequence[Float[Array, "..."]],
) -> Float[Array, "..."]:
    """The direction of every parameter of a leaf: network output 0, in the leaf's view.

    Three affine layers with ReLU between them, on the channels times their scales.

    Args:
      theta: the network's numbers.
      config: names the feature groups, in the order of the rows of `theta.w0`.
      view: the leaf's view.
      statistics: the leaf's statistics after this step's gradient.
      scales: what `input_scales` gives for them.

    Returns:
      float32 array of the viewed shape.

    Source: arXiv 2602.19142, section 3 and appendix; the published code for constants.
    """
    direction = network([jnp.asarray(x) for x in theta], config, view, statistics, scales)
    return jnp.broadcast_to(direction, view.viewed)


def network(
    numbers: Sequence[Any],
    config: RuleConfig,
    view: MatrixView,
    statistics: LeafStatistics,
    scales: Sequence[jax.Array],
) -> jax.Array:
    """The arithmetic of `evaluate`, on a whole leaf or any tile of it.

    `numbers` are the fields of theta, as arrays or as references to memory: they are read one by one.
    """
    w0, b0, w1, b1, w2, b2 = numbers
    rows, channels = input_channels(config, view, statistics)
    inputs = [_product(list(map(value, factors))) for factors in channels]
    folded = [[scale * w0[row, j] for j in range(b0.shape[0])] for row, scale in zip(rows, scales, strict=True)]
    hidden = [jax.nn.relu(x) for x in _first_layer(folded, b0, inputs)]
    hidden = [jax.nn.relu(x) for x in _dense(w1, b1, hidden, b1.shape[0])]
    # Of the three outputs only the first is the direction; the others are kept in the file for compatibility.
    (direction,) = _dense(w2, b2, hidden, 1)
    return direction
