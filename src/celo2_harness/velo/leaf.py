"""One step of VeLO on one leaf, with the network that the LSTM has mixed for it: Celo2's parts, other constants."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from celo2_harness.rule import (
    FEATURES,
    KERNELS,
    Feature,
    LeafResult,
    MatrixView,
    Moments,
    Theta,
    default_view,
    kernel_here,
)
from celo2_harness.rule.accumulators import clip_gradient, update_moments
from celo2_harness.rule.channels import channel_groups, input_scales
from celo2_harness.rule.features import Channel, InverseRoot, LeafStatistics, leaf_statistics
from celo2_harness.rule.network import affine, first_layer
from celo2_harness.velo.config import RULE
from celo2_harness.velo.lstm import PARAMETER_FLOOR

STEP = 0.001
EXPONENT = 0.001
RMS_FLOOR = 1e-6  # under the inverse root of the second moment
NORMALIZATION_FLOOR = 1e-5


def _factored_momentum(s: LeafStatistics) -> tuple[Channel, ...]:
    """Momenta over factored roots; those of vectors have no floor, since the moment itself has one."""
    bare = lambda factor: factor._replace(floor=0.0) if isinstance(factor, InverseRoot) else factor
    pairs = zip(s.momentum, s.factored_inverse_rms, strict=True)
    return tuple((m, *map(bare, factors)) for m, factors in pairs)


# Celo2's features, all of them for vectors too.
VELO_FEATURES: dict[str, Feature] = {
    **{name: feature._replace(for_vectors=True) for name, feature in FEATURES.items()},
    "factored_momentum": FEATURES["factored_momentum"]._replace(for_vectors=True, compute=_factored_momentum),
}


def velo_view(shape: Sequence[int]) -> MatrixView:
    """The leaf as it is: its two largest axes are factored, its features normalised over all axes."""
    return dataclasses.replace(default_view(shape), whole=True)


def leaf_update(
    network: Theta,
    step_multiplier: Float[Array, ""],
    mean_square: Float[Array, ""],
    view: MatrixView,
    gradient: Float[Array, "*leaf"],
    parameter: Float[Array, "*leaf"],
    moments: Moments,
    kernel: str = "auto",
    after: Float[Array, ""] | float = 0.0,
) -> LeafResult:
    """Updates the accumulators with the gradient, then evaluates the leaf's network on them.

    u = -0.001 s sqrt(mean(p^2) + 1e-9) d exp(0.001 e), with d and e the first two outputs of the network.

    Args:
        network: The numbers of the leaf's network.
        step_multiplier: The step multiplier s.
        mean_square: The mean square of the parameters.
        view: As `velo_view` gives it.
        gradient: Any float dtype; clipped to [-1000, 1000], NaN entries count as zero.
        parameter: The leaf before this step.
        moments: Accumulators before this step.
        kernel: How the network is evaluated, see `rule.kernel_here`.
        after: `done` of the leaf that goes before this one (see `rule.leaf_direction`).

    Returns:
        A `LeafResult`; its direction is u, to be added to the parameters.
    """
    gradient = clip_gradient(jnp.where(after < 0.0, jnp.zeros_like(gradient), gradient))
    new = update_moments(RULE, view, gradient, moments)
    size = -STEP * step_multiplier * jnp.sqrt(mean_square + PARAMETER_FLOOR)

    def head(theta: Theta, units: Sequence[Array]) -> Array:
        direction, exponent = (affine(theta.w2, theta.b2, units, i) for i in range(2))
        return direction * jnp.exp(EXPONENT * exponent)

    def evaluate(gradient: jax.Array, parameter: jax.Array, new: Moments) -> tuple[jax.Array, jax.Array]:
        statistics = leaf_statistics(view, gradient, parameter, new, RMS_FLOOR)
        groups = channel_groups(RULE, view, statistics, VELO_FEATURES)
        scales = input_scales(view, groups, NORMALIZATION_FLOOR)
        raw = KERNELS[kernel_here(kernel)](view, network, first_layer(network, view, groups, scales), groups[0], head)
        return raw * size, jnp.max(scales[0][0])

    def nothing(*_: object) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(view.viewed, jnp.float32), jnp.zeros([], jnp.float32)

    # Always the first branch, but no compiler knows; it keeps XLA from fusing the accumulators into what reads them
    # (see `rule.leaf_direction`).
    update, done = jax.lax.cond(mean_square >= 0.0, evaluate, nothing, gradient, parameter, new)
    rounded = jax.tree.map(lambda n, old: n.astype(old.dtype), new, moments)
    return LeafResult(update, rounded, done)
