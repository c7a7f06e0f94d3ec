"""The LSTM of VeLO, one row per leaf: what it is told of a leaf, and the small network and step size that it answers.

The leaves exchange messages through an element-wise maximum, so every leaf's step depends on all others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from celo2_harness.rule import Theta
from celo2_harness.rule.channels import row_sums
from celo2_harness.velo.config import Affine, VeloConfig, VeloTheta, split_networks

PARAMETER_FLOOR = 1e-9  # under the mean square of the parameters
LOG_FLOOR = 1e-8
LOG_BOUND = 5.0
RANKS = 5
# Parts of the run at which the time features change sign.
TIMES = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)


class LeafSummary(NamedTuple):
    """Statistics of one leaf: the mean square of its parameters, and the 12 inputs of the LSTM that are its own."""

    mean_square: Float[Array, ""]
    inputs: Float[Array, " inputs"]


class Controls(NamedTuple):
    """Outputs of the LSTM, leading axis leaf: coefficients of the bank, the mixed networks, factors of the step."""

    coefficients: Float[Array, "leaves K"]
    networks: Theta
    step_multiplier: Float[Array, " leaves"]


def summarize_leaf(
    parameter: Float[Array, "*leaf"], momentum: Sequence[Float[Array, "*leaf"]], second_moment: Float[Array, "*leaf"]
) -> LeafSummary:
    """Means over the whole leaf of parameters and accumulators, as logarithms.

    With q = 1 / sqrt(max(mean(p^2), 1e-9)), m' = q m, v' = q v and l(x) = clip(log(1e-8 + |10 x|), -5, 5) / 2:
    l(mean v'), the one-hot number of axes longer than one, l(mean (m' - mean m')^2), and l(mean (v' - mean m')^2),
    centred on the mean momentum as published.

    Args:
        parameter: The leaf before the step.
        momentum: Before the step, one per decay.
        second_moment: Before the step.
    """
    planes = [second_moment.astype(jnp.float32), *(m.astype(jnp.float32) for m in momentum)]
    # All sums in one pass. Variances are those of the distance to the first entry: no cancellation, unless the leaf is
    # nearly constant and that entry far out.
    shifts = [plane[(0,) * plane.ndim] for plane in planes]
    apart = [plane - shift for plane, shift in zip(planes, shifts, strict=True)]
    square, *sums = _means([jnp.square(parameter.astype(jnp.float32)), *apart, *map(jnp.square, apart)])
    count = len(planes)
    means = [shift + mean for shift, mean in zip(shifts, sums[:count], strict=True)]
    variances = [s - jnp.square(mean) for s, mean in zip(sums[count:], sums[:count], strict=True)]
    (nu, *mu), (nu_variance, *mu_variance) = means, [jnp.maximum(x, 0.0) for x in variances]
    scale = jax.lax.rsqrt(jnp.maximum(square, PARAMETER_FLOOR))
    rank = sum(n > 1 for n in parameter.shape)
    inputs = [
        _logarithm(scale * nu)[None],
        (jnp.arange(RANKS) == rank).astype(jnp.float32),
        jnp.stack([_logarithm(jnp.square(scale) * x) for x in mu_variance]),
        # The mean of (v - m)^2 over v, m a number.
        jnp.stack([_logarithm(jnp.square(scale) * (nu_variance + jnp.square(nu - m))) for m in mu]),
    ]
    return LeafSummary(square, jnp.concatenate(inputs))


def lstm_inputs(
    summaries: Sequence[LeafSummary], losses: Float[Array, " features"], fraction: Float[Array, ""]
) -> Float[Array, "leaves inputs"]:
    """Nine numbers of the time, nine of the loss, twelve of each leaf. Numbers that are not finite become 0.

    Args:
        summaries: Per leaf.
        losses: The loss features.
        fraction: Steps before this one over the length of the run.
    """
    own = jnp.stack([summary.inputs for summary in summaries])
    common = jnp.concatenate([jnp.tanh(10.0 * (fraction - jnp.array(TIMES, jnp.float32))), losses])
    inputs = jnp.concatenate([jnp.broadcast_to(common[None], (len(own), common.size)), own], axis=1)
    # Through the maximum over leaves a NaN would spoil all of them, for good.
    return jnp.where(jnp.isfinite(inputs), inputs, 0.0)


def lstm_step(
    theta: VeloTheta,
    inputs: Float[Array, "leaves inputs"],
    hidden: Float[Array, "leaves H"],
    cell: Float[Array, "leaves H"],
) -> tuple[Float[Array, "leaves H"], Float[Array, "leaves H"]]:
    """New hidden and cell state.

    z = own(x) + max over leaves of relu(message(x)); i, g, f, o = gates([z, h]);
    c <- sigmoid(f + 1) c + sigmoid(i) tanh(g); h <- sigmoid(o) tanh(c).
    """
    messages = jax.nn.relu(_apply(theta.message, inputs))
    mixed = _apply(theta.own, inputs) + jnp.max(messages, axis=0, keepdims=True)
    i, g, f, o = jnp.split(_apply(theta.gates, jnp.concatenate([mixed, hidden], axis=1)), 4, axis=1)
    cell = jax.nn.sigmoid(f + 1.0) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def read_controls(config: VeloConfig, theta: VeloTheta, hidden: Float[Array, "leaves H"]) -> Controls:
    """The small network of every leaf, ff_mult mean_k(c_k bank_k), and its step multiplier, which may be negative."""
    coefficients = _apply(theta.controls, hidden)
    rows = jnp.matmul(coefficients, theta.bank, precision="highest") * (config.ff_mult / config.bank)
    return Controls(coefficients, split_networks(rows), _apply(theta.step_size, hidden)[:, 0])


def _apply(layer: Affine, x: Array) -> Array:
    return jnp.matmul(x, layer.w, precision="highest") + layer.b[None]


def _logarithm(x: Array) -> Array:
    return 0.5 * jnp.clip(jnp.log(LOG_FLOOR + jnp.abs(10.0 * x)), -LOG_BOUND, LOG_BOUND)


def _means(planes: Sequence[Array]) -> list[Array]:
    """Over all entries, in one pass. Rows first, then rows over rows, so that rounding does not add up."""
    rows = row_sums([jnp.atleast_1d(plane) for plane in planes])
    return [jnp.sum(sums) / planes[0].size for sums in rows]
