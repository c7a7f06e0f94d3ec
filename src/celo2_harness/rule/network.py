"""The network of the learned rule, evaluated per parameter without ever holding its input planes.

Two facts make that possible. The normalisation of a channel is one number per matrix, so it folds into the first
layer's weights. And the layers are so small (eight units) that written out as sums of products they are elementwise
arithmetic, which XLA fuses into one loop over the parameters.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from celo2_harness.rule.config import RuleConfig, Theta
from celo2_harness.rule.features import FEATURES, LeafStatistics, channel_counts
from celo2_harness.rule.view import MatrixView

NORMALIZATION_FLOOR = 1e-9


def input_channels(
    config: RuleConfig, view: MatrixView, statistics: LeafStatistics
) -> tuple[list[int], list[Float[Array, "..."]]]:
    """The channels that this leaf has, and the rows of `w0` that they belong to."""
    rows: list[int] = []
    channels: list[jax.Array] = []
    start = 0
    for name, count in zip(config.features, channel_counts(config), strict=True):
        if view.is_matrix or FEATURES[name].for_vectors:
            rows.extend(range(start, start + count))
            channels.extend(FEATURES[name].compute(statistics))
        start += count
    return rows, channels


def _first_layer(
    weights: Sequence[Sequence[jax.Array]], bias: jax.Array, channels: Sequence[jax.Array]
) -> list[jax.Array]:
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


def _dense(weights: jax.Array, bias: jax.Array, inputs: Sequence[jax.Array]) -> list[jax.Array]:
    return [bias[j] + sum(x * weights[i, j] for i, x in enumerate(inputs)) for j in range(bias.shape[0])]


def input_scales(config: RuleConfig, view: MatrixView, statistics: LeafStatistics) -> list[Float[Array, "..."]]:
    """1 / sqrt(mean(x^2) + 1e-9) of every channel x, one number per matrix."""
    _, channels = input_channels(config, view, statistics)
    return [
        jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=view.axes, keepdims=True) + NORMALIZATION_FLOOR) for x in channels
    ]


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
    w0, b0, w1, b1, w2, b2 = map(jnp.asarray, theta)
    rows, channels = input_channels(config, view, statistics)
    folded = [[scale * w0[row, j] for j in range(b0.shape[0])] for row, scale in zip(rows, scales, strict=True)]
    hidden = [jax.nn.relu(x) for x in _first_layer(folded, b0, channels)]
    hidden = [jax.nn.relu(x) for x in _dense(w1, b1, hidden)]
    # Of the three outputs only the first is the direction; the others are kept in the file for compatibility.
    (direction,) = _dense(w2[:, :1], b2[:1], hidden)
    return jnp.broadcast_to(direction, view.viewed)
