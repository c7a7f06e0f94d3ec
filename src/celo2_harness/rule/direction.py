"""One step of the learned rule on one leaf: gradient in, direction and new accumulators out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from celo2_harness.rule.accumulators import Moments, clip_gradient, update_moments
from celo2_harness.rule.config import RuleConfig, Theta
from celo2_harness.rule.features import leaf_statistics
from celo2_harness.rule.kernel import evaluate_in_tiles
from celo2_harness.rule.network import evaluate, input_scales
from celo2_harness.rule.view import MatrixView

# How the network is evaluated: name -> function. All agree to rounding.
KERNELS = {"xla": evaluate, "pallas": evaluate_in_tiles}


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
) -> tuple[Float[Array, "..."], Moments]:
    """Updates the accumulators with the gradient, then evaluates the network on them.

    A matrix (or vector) of the leaf whose gradients have all been zero so far gets direction zero: the network would
    otherwise turn its biases and the parameter feature into an update.

    Args:
      theta: the network's numbers (float32 arrays, traced ones too).
      config: what theta was trained with.
      view: how the leaf is seen as matrices.
      gradient: any float dtype; clipped to [-1000, 1000], NaN entries count as zero.
      parameter: the leaf before this step.
      moments: accumulators before this step.
      kernel: how the network is evaluated, out of `KERNELS`.

    Returns:
      The raw direction in the leaf's view (float32, to be subtracted), and the new accumulators in the dtypes of
      `moments`.
    """
    gradient = clip_gradient(gradient)
    new = update_moments(config, view, gradient, moments)
    # The slowest momentum is nonzero as soon as one gradient was; the factored moments have a floor and cannot tell.
    slowest = view.apply(new.mu[max(range(len(new.mu)), key=config.momentum_decays.__getitem__)])
    seen = jnp.any(slowest != 0.0, axis=view.axes, keepdims=True)

    def direction(gradient: jax.Array, parameter: jax.Array, new: Moments) -> jax.Array:
        statistics = leaf_statistics(view, gradient, parameter, new)
        raw = KERNELS[kernel](theta, config, view, statistics, input_scales(config, view, statistics))
        return jnp.where(seen, raw, 0.0)

    # The branch also keeps XLA from fusing the accumulators into what reads them: then old and new ones would both be
    # needed, and on CPU the hidden units would become planes (docs/negative-results.md).
    raw = jax.lax.cond(jnp.any(seen), direction, lambda *_: jnp.zeros(view.viewed), gradient, parameter, new)
    rounded = jax.tree.map(lambda n, old: n.astype(old.dtype), new, moments)
    return raw, rounded
