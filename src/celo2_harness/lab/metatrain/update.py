"""The optimizer under meta-training: the learned rule on some leaves, Adam on the others.

The same update as the public blocks make, as a function of theta, which changes from unroll to unroll.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from celo2_harness.rule import MatrixView, Moments, RuleConfig, Theta, init_moments, leaf_direction, newton_schulz

RMS_FLOOR = 1e-9
ROLLING_DECAY = 0.99
CLIP_THRESHOLD = 1.0
ADAM_DECAYS = (0.9, 0.95)
ADAM_FLOOR = 1e-8  # under the root, as the paper's inner Adam has it; no bias correction

Views = Sequence[MatrixView | None]


class LearnedState(NamedTuple):
    """Of a leaf under the learned rule: its accumulators, and the running mean square of "rolling" normalisation."""

    moments: Moments
    square: Float[Array, "..."] | None


class AdamState(NamedTuple):
    """Of a leaf under Adam: first and second moment."""

    mu: Float[Array, "..."]
    nu: Float[Array, "..."]


def init_update(rule: RuleConfig, views: Views, leaves: Sequence[Array]) -> tuple[LearnedState | AdamState, ...]:
    """Zero state per leaf; leaves without a view go to Adam."""

    def init(view: MatrixView | None, leaf: Array) -> LearnedState | AdamState:
        if view is None:
            return AdamState(jnp.zeros_like(leaf), jnp.zeros_like(leaf))
        square = None
        if rule.normalization == "rolling":
            square = jnp.zeros((*view.viewed[: -len(view.axes)], *[1] * len(view.axes)))
        return LearnedState(init_moments(rule, view), square)

    return tuple(init(view, leaf) for view, leaf in zip(views, leaves, strict=True))


def apply_update(
    rule: RuleConfig,
    views: Views,
    orthogonalize: bool,
    theta: Theta,
    leaves: Sequence[Array],
    gradients: Sequence[Array],
    state: Sequence[LearnedState | AdamState],
    count: Int[Array, ""],
    step_size: Float[Array, ""],
    adam_factor: float,
) -> tuple[list[Array], tuple[LearnedState | AdamState, ...]]:
    """One step on all leaves: p <- p - step_size * direction, or p - adam_factor * step_size * Adam's direction.

    Args:
      rule: features, decays and normalisation.
      views: of each leaf, None for Adam.
      orthogonalize: whether matrices of the rule go through Newton-Schulz.
      theta: the rule's numbers.
      leaves: parameters.
      gradients: of the loss.
      state: as `init_update` and this function return it.
      count: steps before this one.
      step_size: of the rule.
      adam_factor: step size of Adam over that of the rule.

    Returns:
      New parameters and state.
    """
    new_leaves, new_state = [], []
    for view, p, g, s in zip(views, leaves, gradients, state, strict=True):
        if isinstance(s, LearnedState):
            assert view is not None
            direction, moments, _ = leaf_direction(theta, rule, view, g, p, s.moments, network_kernel())
            direction = _computed_once(direction, moments.nu)
            if orthogonalize and view.is_matrix:
                direction = _orthogonalized(direction)
            direction, square = _normalized(rule.normalization, view, direction, s.square, count)
            new_leaves.append(p - step_size * view.invert(direction))
            new_state.append(LearnedState(moments, square))
        else:
            mu = ADAM_DECAYS[0] * s.mu + (1 - ADAM_DECAYS[0]) * g
            nu = ADAM_DECAYS[1] * s.nu + (1 - ADAM_DECAYS[1]) * jnp.square(g)
            new_leaves.append(p - step_size * adam_factor * mu / jnp.sqrt(nu + ADAM_FLOOR))
            new_state.append(AdamState(mu, nu))
    return new_leaves, tuple(new_state)


def network_kernel() -> str:
    """How the network is evaluated: on a GPU as one kernel, for which XLA would search minutes for what to fuse."""
    return "pallas" if jax.default_backend() == "gpu" else "xla"


def _orthogonalized(direction: Array) -> Array:
    """Newton-Schulz; on a GPU as one launch where the matrix is small, instead of some thirty."""
    if jax.default_backend() == "gpu" and direction.ndim == 2:
        # Imported where it is used: Pallas takes a good part of the package's import time.
        from celo2_harness.rule.newton_schulz_kernel import LARGEST, newton_schulz_in_registers

        if max(direction.shape) <= LARGEST:
            return newton_schulz_in_registers(direction)
    return newton_schulz(direction)


def _normalized(
    mode: str, view: MatrixView, direction: Array, running: Array | None, count: Array
) -> tuple[Array, Array | None]:
    """The direction scaled as `normalize_rms` scales it, and the running mean square."""
    if mode == "none":
        return direction, None
    square = jnp.mean(jnp.square(direction), axis=view.axes, keepdims=True)
    if mode == "clip":
        return direction / jnp.maximum(1.0, jnp.sqrt(square) / CLIP_THRESHOLD), None
    if mode == "rolling":
        assert running is not None
        running = jnp.where(jnp.isfinite(square), ROLLING_DECAY * running + (1.0 - ROLLING_DECAY) * square, running)
        square = running / (1.0 - ROLLING_DECAY ** (count.astype(jnp.float32) + 1.0))
    return direction / jnp.sqrt(square + RMS_FLOOR), running


@jax.custom_batching.custom_vmap
def _computed_once(x: Array, second_moment: Array) -> Array:
    """x, as an array in memory.

    Everything that reads a cheap-looking result gets a copy of the computation from XLA on CPU: the network would run
    once for the norm of its output and once more for the output itself. A conditional is not looked through; its
    condition always holds, but XLA cannot know that a second moment is not negative.
    """
    through_branch = lambda x, v: jax.lax.cond(v.reshape(-1)[0] >= 0.0, lambda x: x, jnp.zeros_like, x)
    return jax.lax.platform_dependent(x, second_moment, cpu=through_branch, default=lambda x, v: x)


@_computed_once.def_vmap
def _computed_once_batched(size: int, batched: Any, x: Array, second_moment: Array) -> tuple[Array, bool]:
    # The rule of a conditional under vmap is to compute both branches and select, which is what this must not be.
    del size, batched
    return _computed_once(x, second_moment), True
