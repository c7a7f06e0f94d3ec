"""One step of the learned rule on one leaf: gradient in, direction and new accumulators out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from celo2_harness.rule.accumulators import Moments, clip_gradient, mean_square, update_moments
from celo2_harness.rule.channels import ChannelGroup, channel_groups, input_scales
from celo2_harness.rule.config import RuleConfig, Theta
from celo2_harness.rule.features import leaf_statistics
from celo2_harness.rule.network import FirstLayer, Head, first_layer, first_output, network
from celo2_harness.rule.view import MatrixView


def _network_in_tiles(
    view: MatrixView, theta: Theta, layer: FirstLayer, group: ChannelGroup, head: Head = first_output
) -> Float[Array, "..."]:
    # Imported where it is used: Pallas takes a good part of the package's import time.
    from celo2_harness.rule.kernel import network_in_tiles

    return network_in_tiles(view, theta, layer, group, head)


# How the network is evaluated: name -> function. All agree to rounding.
KERNELS = {"xla": network, "pallas": _network_in_tiles}


class LeafResult(NamedTuple):
    """The raw direction in the leaf's view (float32, to be subtracted), the new accumulators, and a number that exists
    only once the direction does (see `leaf_direction`)."""

    direction: Float[Array, "..."]
    moments: Moments
    done: Float[Array, ""]


def resolve_kernel(name: str) -> str:
    """The name, checked.

    Raises:
      ValueError: not in `KERNELS`.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel = {name!r}: expected one of {', '.join(KERNELS)}.")
    return name


def leaf_direction(
    theta: Theta,
    config: RuleConfig,
    view: MatrixView,
    gradient: Float[Array, "*leaf"],
    parameter: Float[Array, "*leaf"],
    moments: Moments,
    kernel: str = "xla",
    after: Float[Array, ""] | float = 0.0,
    column_parts: int = 1,
) -> LeafResult:
    """Updates the accumulators with the gradient, then evaluates the network on them.

    A matrix (or vector) of the leaf whose gradients have all been zero so far gets direction zero: the network would
    otherwise turn its biases and the parameter feature into an update.

    Leaves can be put in order: with the `done` of one leaf as the `after` of the next, a compiler has to finish the
    first before it starts the second, and their temporaries share memory. It changes no number.

    Args:
      theta: the network's numbers (float32 arrays, traced ones too).
      config: what theta was trained with.
      view: how the leaf is seen as matrices.
      gradient: any float dtype; clipped to [-1000, 1000], NaN entries count as zero.
      parameter: the leaf before this step.
      moments: accumulators before this step.
      kernel: how the network is evaluated, out of `KERNELS`.
      after: `done` of the leaf that goes before this one.
      column_parts: devices that the last axis of the view is split over. XLA communicates once per output of a
        reduction with many outputs, if it runs along a split axis; so the devices' parts are summed first.

    Returns:
      A `LeafResult`; its accumulators have the dtypes of `moments`.
    """
    # `done` is never negative, but no compiler knows.
    gradient = clip_gradient(jnp.where(after < 0.0, jnp.zeros_like(gradient), gradient))
    new = update_moments(config, view, gradient, moments)
    seen = _seen(config, view, gradient, new)

    def direction(gradient: jax.Array, parameter: jax.Array, new: Moments) -> tuple[jax.Array, jax.Array]:
        groups = channel_groups(config, view, leaf_statistics(view, gradient, parameter, new))
        scales = input_scales(view, groups, column_parts=column_parts)
        raw = KERNELS[kernel](view, theta, first_layer(theta, view, groups, scales), groups[0])
        return raw if seen.size == 1 else jnp.where(seen, raw, 0.0), jnp.max(scales[0][0])

    def nothing(*_: object) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(view.viewed, jnp.float32), jnp.zeros([], jnp.float32)

    # The branch also keeps XLA from fusing the accumulators into what reads them: then old and new ones would both be
    # needed, and on CPU the hidden units would become planes (docs/research/negative-results.md).
    raw, done = jax.lax.cond(jnp.any(seen), direction, nothing, gradient, parameter, new)
    rounded = jax.tree.map(lambda n, old: n.astype(old.dtype), new, moments)
    return LeafResult(raw, rounded, done)


def _seen(config: RuleConfig, view: MatrixView, gradient: Array, new: Moments) -> Array:
    """Whether each matrix (or vector) has had a gradient: one truth value per matrix."""

    def any_momentum(momentum: Array) -> Array:
        # A sum costs a third of jnp.any on a CPU.
        return jnp.sum(jnp.abs(view.apply(momentum)), axis=view.axes, keepdims=True) > 0.0

    # The slowest momentum is nonzero as soon as one gradient was; the factored moments have a floor and cannot tell.
    slowest = new.mu[max(range(len(new.mu)), key=config.momentum_decays.__getitem__)]
    if view.factored is None or view.factored[1] < len(view.viewed) - 2:
        return any_momentum(slowest)
    # Nearly always this step's gradient is enough, whose mean squares the factored moments have asked for already.
    now = jnp.sum(mean_square(view, gradient), axis=view.axes, keepdims=True) > 0.0
    return jax.lax.cond(jnp.all(now), lambda momentum: now, any_momentum, slowest)
