"""Momentum of the applied steps: the last link of a chain, off at the end of the run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int

from celo2_harness._types import Params, ScalarOrSchedule, Updates
from celo2_harness.blocks.views import zeros_like_params


class LookAheadState(NamedTuple):
    """Step count, and the average of the applied steps, float32, like the parameters."""

    count: Int[Array, ""]
    mu: Updates


def look_ahead(
    strength: ScalarOrSchedule = 0.3,
    decay: ArrayLike | None = None,
    start: ArrayLike = 0.15,
    stop: ArrayLike = 0.75,
    *,
    total_steps: int,
    horizon: ArrayLike = 0.03,
) -> optax.GradientTransformation:
    """Adds a multiple of the average of the last applied steps to every step.

    u <- u + b e;  e <- c e + (1 - c) u

    The average e is that of the steps as applied, those of the look-ahead included: a steady u grows to u / (1 - b).
    Placed last, after learning rate and weight decay. Before `start` and from `stop` on b is zero and steps are what
    they would be without it.

    Args:
        strength: The strength b, a number or a schedule of the step count. With a learning rate that
            changes, b in proportion to it is usual: `schedules.scaled(0.3, schedules.warmup_cosine(total_steps))`.
        decay: The decay c; None is 1 - 1 / (horizon total_steps), at least zero.
        start: The part of the run after which steps are added to.
        stop: The part of the run after which they no longer are.
        total_steps: The number of steps of the run.
        horizon: The part of the run that the average reaches back.

    Returns:
        An `optax.GradientTransformation` whose state is the parameters once, float32. Updates keep their dtype. Where
        an entry of an update is not finite, the average stays as it is and the update is zero.

    Raises:
        ValueError: If `total_steps` is below one.

    Example:
        >>> tx = optax.chain(optax.sgd(0.1), look_ahead(0.5, 0.5, 0.0, 1.0, total_steps=10))
        >>> params = {"w": jnp.ones(1)}
        >>> state = tx.init(params)
        >>> first, state = tx.update({"w": jnp.ones(1)}, state)
        >>> second, state = tx.update({"w": jnp.ones(1)}, state)
        >>> [round(float(u["w"][0]), 4) for u in (first, second)]
        [-0.1, -0.125]

    References:
        EMA-Nesterov, arXiv 2605.25395.
    """
    if total_steps < 1:
        raise ValueError(f"look_ahead: total_steps = {total_steps!r}, expected at least one.")
    kept = jnp.maximum(1.0 - 1.0 / jnp.maximum(horizon * total_steps, 1.0), 0.0) if decay is None else decay

    def init_fn(params: Params) -> LookAheadState:
        return LookAheadState(jnp.zeros([], jnp.int32), zeros_like_params(params))

    def update_fn(
        updates: Updates, state: LookAheadState, params: Params | None = None
    ) -> tuple[Updates, LookAheadState]:
        del params
        active = (state.count >= start * total_steps) & (state.count < stop * total_steps)
        strong = jnp.where(active, strength(state.count) if callable(strength) else strength, 0.0)

        def step(u: jax.Array, e: Any) -> tuple[jax.Array, Any]:
            if not u.size:
                return u, e
            finite = jnp.isfinite(u)
            ahead = jnp.where(finite, u.astype(jnp.float32) + strong * e, 0.0).astype(u.dtype)
            return ahead, jnp.where(finite, kept * e + (1.0 - kept) * ahead.astype(jnp.float32), e)

        leaves, treedef = jax.tree.flatten(updates)
        steps = [step(u, e) for u, e in zip(leaves, treedef.flatten_up_to(state.mu), strict=True)]
        count = jnp.asarray(optax.safe_increment(state.count))
        return treedef.unflatten([u for u, _ in steps]), LookAheadState(count, treedef.unflatten([e for _, e in steps]))

    return optax.GradientTransformation(init_fn, update_fn)  # type: ignore[arg-type]
