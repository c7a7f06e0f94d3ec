"""A linear rule: a weighted sum of the gradient and its momenta, each whitened and normalised."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from celo2_harness.rule.accumulators import average
from celo2_harness.rule.padding import Lengths, mean_over
from celo2_harness.rule.view import MatrixView

# Smallest mean of the second moment, and smallest mean square of a channel relative to it, that are divided by.
_SMALLEST_MEAN = 1e-37
_SMALLEST_SQUARE = 1e-30


class LinearTheta(NamedTuple):
    """The numbers of a linear rule. Channels are the gradient, then one momentum per decay.

    `weights` are those in the middle of the run; at the end they are exp(slope) times as large as at its beginning.
    """

    weights: Float[jax.Array | np.ndarray, " channels"]
    slopes: Float[jax.Array | np.ndarray, " channels"]


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """The configuration that the numbers of a linear rule belong to.

    Attributes:
        momentum_decays: The decays of the momenta.
        second_moment_decay: The decay of the second moment.
        power: The power of the second moment that channels are divided by; 0.5 divides by the root mean square.
        floor: The part of its mean over the matrix that is added to the second moment.
    """

    momentum_decays: tuple[float, ...]
    second_moment_decay: float
    power: float
    floor: float


class LinearResult(NamedTuple):
    """The direction of a leaf and its new moments, float32."""

    direction: Float[Array, "*leaf"]
    mu: tuple[Float[Array, "*leaf"], ...]
    nu: Float[Array, "*leaf"]


def linear_leaf_direction(
    theta: LinearTheta,
    config: LinearConfig,
    view: MatrixView,
    gradient: Float[Array, "*leaf"],
    mu: Sequence[Float[Array, "*leaf"]],
    nu: Float[Array, "*leaf"],
    fraction: Float[Array, ""] | float,
    lengths: Lengths | None = None,
) -> LinearResult:
    """One step of a leaf, or of a batch of leaves.

    m_k <- b_k m_k + (1 - b_k) g,  v <- b v + (1 - b) g^2;
    c_0 = g / (v / mean(v) + floor)^power,  c_k = m_k / (v / mean(v) + floor)^power;
    u = sum over k of w_k exp(s_k (t - 1/2)) c_k / RMS(c_k),

    with means over one matrix (or vector). There is no bias correction: factors of a whole matrix cancel.

    Args:
        theta: The weights w and slopes s.
        config: The decays, the power and the floor.
        view: How the leaf is seen as matrices.
        gradient: The gradient g.
        mu: The momenta m, of any floating dtype.
        nu: The second moment v, likewise.
        fraction: The fraction t of the run, from 0 to 1.
        lengths: The true lengths of the matrices of a batch, if they are padded (see `padding`).

    Returns:
        The direction and the new moments. A matrix whose gradient (or its square) is not finite gets direction zero,
        and its moments stay. A matrix without any gradient so far gets direction zero.
    """
    # In the leaf's own axes, since nothing here is a product of matrices.
    own = range(gradient.ndim) if view.whole else view.reduction_axis + view.output_axis
    mean = lambda x: mean_over(x, [axis - gradient.ndim for axis in own], lengths)
    g = gradient.astype(jnp.float32)
    old_mu, old_nu = [m.astype(jnp.float32) for m in mu], nu.astype(jnp.float32)
    v = average(config.second_moment_decay, old_nu, jnp.square(g))
    mean_v = mean(v)
    # What is not finite in one entry makes the mean so.
    finite = jnp.isfinite(mean_v)
    new_mu = tuple(
        jnp.where(finite, average(decay, m, g), m) for decay, m in zip(config.momentum_decays, old_mu, strict=True)
    )
    # Relative to the mean, so that neither tiny nor huge gradients leave float32, and their unit does not matter.
    inverse_mean = 1.0 / jnp.maximum(jnp.where(finite, mean_v, 1.0), _SMALLEST_MEAN)
    inverse = jnp.exp(-config.power * jnp.log(v * inverse_mean + config.floor)) * jnp.sqrt(inverse_mean)
    channels = [x * inverse for x in (g, *new_mu)]
    now = jnp.asarray(theta.weights, jnp.float32) * jnp.exp(jnp.asarray(theta.slopes, jnp.float32) * (fraction - 0.5))
    direction = sum(
        w * jax.lax.rsqrt(jnp.maximum(mean(jnp.square(c)), _SMALLEST_SQUARE)) * c
        for w, c in zip(now, channels, strict=True)
    )
    return LinearResult(jnp.where(finite, direction, 0.0), new_mu, jnp.where(finite, v, old_nu))
