"""The average of the parameters over the last part of a run: what to evaluate in place of the last ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int

from celo2_harness._trees import is_function, require_like_params
from celo2_harness._types import Params, ScalarOrSchedule, Updates
from celo2_harness.blocks.views import zeros_like_params


class AverageTailState(NamedTuple):
    """Step count, number of averaged steps, and the average of the parameters, float32."""

    count: Int[Array, ""]
    num_averaged: Int[Array, ""]
    average: Updates


def average_tail(
    start: ArrayLike = 0.7,
    horizon: ScalarOrSchedule = 0.05,
    *,
    total_steps: int,
    mask: Any | Callable[[Params], Any] | None = None,
) -> optax.GradientTransformation:
    """Averages the parameters from some step on, and leaves the updates as they are.

    A <- A + a (W - A) after every step, with a = max(1 / n, 1 / (horizon total_steps)) for the n-th averaged step: the
    plain mean at first, then an exponential average that reaches `horizon` of the run back. W are the parameters after
    the step, so this is the last link of a chain. `averaged_params` gives what to evaluate.

    For a learning rate that falls as (T - t)^p, the horizon (T - t) / p, in parts of the run, is the one whose average
    is about as old as the rate allows; the rate should not reach zero before the end, where the average has nothing to
    add.

    Args:
        start: Part of the run after which averaging begins.
        horizon: Part of the run that the average reaches back: a number, or a schedule of the step count.
        total_steps: Number of steps of the run.
        mask: A tree of booleans like the parameters (or a prefix of it), or a function of the parameters that returns
            one; True where parameters are averaged. Embeddings are usually left out.

    Returns:
        An `optax.GradientTransformation`; `update` needs `params`. Its state is the parameters once, float32. Entries
        that would not be finite do not enter the average.

    Raises:
        ValueError: If `total_steps` is below one; in `update`, if `params` is None or another tree than the updates.

    Example:
        >>> tx = optax.chain(optax.sgd(1.0), average_tail(0.5, 1.0, total_steps=4))
        >>> params = {"w": jnp.zeros(1)}
        >>> state = tx.init(params)
        >>> for _ in range(4):
        ...     updates, state = tx.update({"w": -jnp.ones(1)}, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> float(averaged_params(state, params, weight=1.0)["w"][0])  # the mean of 3 and 4
        3.5

    References:
        KellerJordan/modded-nanogpt (optimization track); Polyak averaging.
    """
    if total_steps < 1:
        raise ValueError(f"average_tail: total_steps = {total_steps!r}, expected at least one.")

    def init_fn(params: Params) -> AverageTailState:
        zero = lambda: jnp.zeros([], jnp.int32)  # each its own array: a state may be donated
        return AverageTailState(zero(), zero(), zeros_like_params(params))

    def update_fn(
        updates: Updates, state: AverageTailState, params: Params | None = None
    ) -> tuple[Updates, AverageTailState]:
        if params is None:
            raise ValueError(
                "average_tail: update(updates, state, params) was called without params. It averages the parameters;"
                " pass the tree that you will apply the updates to."
            )
        require_like_params("average_tail", updates, params)
        active = state.count >= start * total_steps
        number = state.num_averaged + active
        reach = horizon(state.count) if callable(horizon) else horizon
        part = jnp.maximum(1.0 / number, 1.0 / jnp.maximum(reach * total_steps, 1.0))

        def follow(average: Updates) -> Updates:
            def one(a: Any, w: jax.Array) -> Any:
                if not w.size:
                    return a
                w = w.astype(jnp.float32)
                return jnp.where(jnp.isfinite(w), a + part * (w - a), a)

            leaves, treedef = jax.tree.flatten(optax.apply_updates(params, updates))
            return treedef.unflatten([one(a, w) for a, w in zip(treedef.flatten_up_to(average), leaves, strict=True)])

        average = jax.lax.cond(active, follow, lambda average: average, state.average)
        return updates, AverageTailState(jnp.asarray(optax.safe_increment(state.count)), number, average)

    transformation = optax.GradientTransformation(init_fn, update_fn)  # type: ignore[arg-type]
    if mask is None:
        return transformation
    return optax.masked(transformation, mask if is_function(mask) else lambda _: mask)


def averaged_params(state: Any, params: Params, weight: ArrayLike = 0.6) -> Params:
    """The parameters to evaluate: (1 - weight) W + weight A, with A the average that `average_tail` keeps.

    Args:
        state: The state of an optimizer with an `average_tail` in it, at any depth, masked or in several partitions.
        params: W, the parameters now.
        weight: The weight of the average.

    Returns:
        A tree like `params`, with its dtypes; the parameters themselves where nothing has been averaged yet, or where
        the average leaves them out.

    Raises:
        ValueError: If there is no `average_tail` in the optimizer.

    Example:
        >>> tx = average_tail(total_steps=10)
        >>> averaged_params(tx.init({"w": jnp.ones(1)}), {"w": jnp.ones(1)})
        {'w': Array([1.], dtype=float32)}
    """
    is_average = lambda node: isinstance(node, AverageTailState)
    found = [node for node in jax.tree.leaves(state, is_leaf=is_average) if is_average(node)]
    if not found:
        raise ValueError(
            "averaged_params: the state has no average. Make the optimizer optax.chain(..., average_tail(...))."
        )
    averages = {
        path: (node.num_averaged, leaf)
        for node in found
        for path, leaf in jax.tree_util.tree_flatten_with_path(node.average)[0]
    }

    def mixed(path: Any, w: jax.Array) -> jax.Array:
        if path not in averages:
            return w
        number, average = averages[path]
        wide = w.astype(jnp.float32)
        return jnp.where(number > 0, wide + weight * (average - wide), wide).astype(w.dtype)

    return jax.tree_util.tree_map_with_path(mixed, params)
