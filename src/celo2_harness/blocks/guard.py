"""Protection of a training run: steps with non-finite or exploding gradients are skipped or clipped."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from celo2_harness._types import Params, Updates


class GuardState(NamedTuple):
    """The guarded state, the running level of the gradient norm, and counts of what the guard did."""

    inner_state: optax.OptState
    level: Float[Array, ""]
    count: Int[Array, ""]
    nonfinite_count: Int[Array, ""]
    spike_count: Int[Array, ""]


def guard_updates(
    inner: optax.GradientTransformation,
    *,
    spike_factor: float | int | None = None,
    spike_action: Literal["skip", "clip"] = "skip",
    decay: float = 0.99,
    warmup: int = 20,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that a bad gradient cannot harm it.

    A step whose gradients hold NaN or infinity gives zero updates and leaves the inner state as it was. With
    `spike_factor`, so does (or is clipped) a step whose global gradient norm exceeds `spike_factor` times its running
    level, an exponential average of accepted norms. A norm above the limit enters the level as the limit, so that a
    lasting change of scale is accepted after a while; a norm of zero does not enter it.

    The gradients of leaves that the inner optimizer does not look at, such as frozen ones, count for nothing.

    Args:
        inner: The optimizer to protect.
        spike_factor: The quotient of norm and level above which a step is a spike; None switches the rule off. 5 to 10
            is usual.
        spike_action: "skip" the step, or "clip" its gradients to the limit and go on.
        decay: The decay of the running level.
        warmup: The number of steps before the spike rule starts, while the level settles.

    Returns:
        An `optax.GradientTransformationExtraArgs` with state `GuardState`; `level`, `count` (steps seen),
        `nonfinite_count` and `spike_count` can be read from it with `optax.tree.get`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> tx = guard_updates(optax.adam(1e-3))
        >>> params = {"w": jnp.ones(2)}
        >>> updates, state = tx.update({"w": jnp.array([jnp.nan, 1.0])}, tx.init(params), params)
        >>> updates["w"].tolist(), int(state.nonfinite_count)
        ([0.0, 0.0], 1)
    """
    if spike_factor is not None and not spike_factor > 1.0:
        raise ValueError(f"guard_updates: spike_factor = {spike_factor!r}, expected a number above 1, or None.")
    if spike_action not in get_args(Literal["skip", "clip"]):
        raise ValueError(f"guard_updates: spike_action = {spike_action!r}, expected 'skip' or 'clip'.")
    if not 0.0 < decay < 1.0 or warmup < 0:
        raise ValueError(
            f"guard_updates: decay = {decay!r} and warmup = {warmup!r}, expected a decay in (0, 1) and a warmup >= 0."
        )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> GuardState:
        zero = lambda dtype: jnp.zeros([], dtype)
        return GuardState(inner.init(params), zero(jnp.float32), zero(jnp.int32), zero(jnp.int32), zero(jnp.int32))

    def update_fn(
        updates: Updates, state: GuardState, params: Params | None = None, **extra_args: object
    ) -> tuple[Updates, GuardState]:
        def apply(updates: Updates, inner_state: optax.OptState) -> tuple[Updates, optax.OptState]:
            return inner.update(updates, inner_state, params, **extra_args)

        read, shapes = _reads(apply, updates, state.inner_state)
        leaves = [_wide(x) for x, used in zip(jax.tree.leaves(updates), read, strict=True) if used and x.size]
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves], bool))
        norm = jnp.minimum(_norm(leaves, finite), jnp.finfo(jnp.float32).max).astype(jnp.float32)
        limit = jnp.inf if spike_factor is None else spike_factor * state.level
        settled = state.count - state.nonfinite_count >= max(warmup, 1)
        # A level of zero is none yet: no gradient so far was nonzero.
        first = state.level == 0
        spike = finite & settled & ~first & (norm > limit)
        if spike_action == "clip":
            factor = jnp.where(spike, limit / norm, 1.0)
            flat, treedef = jax.tree.flatten(updates)
            clipped = [x * factor.astype(x.dtype) if used else x for x, used in zip(flat, read, strict=True)]
            updates = treedef.unflatten(clipped)
            proceed = finite
        else:
            proceed = finite & ~spike

        def skip(_: Updates, inner_state: optax.OptState) -> tuple[Updates, optax.OptState]:
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), inner_state

        new_updates, inner_state = jax.lax.cond(proceed, apply, skip, updates, state.inner_state)
        seen = jnp.where(spike, limit, norm)
        level = jnp.where(first, seen, decay * state.level + (1.0 - decay) * seen)
        return new_updates, GuardState(
            inner_state=inner_state,
            level=jnp.where(finite & (norm > 0), level, state.level),
            count=jnp.asarray(optax.safe_increment(state.count)),
            nonfinite_count=state.nonfinite_count + ~finite,
            spike_count=state.spike_count + spike,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


def _reads(apply: Any, updates: Updates, inner_state: optax.OptState) -> tuple[list[bool], Any]:
    """Returns which leaves of the updates the inner optimizer looks at, and the shapes of the updates that it returns.

    What it does not look at, as the gradients of frozen leaves, cannot make a step bad.
    """
    traced, shapes = jax.make_jaxpr(apply, return_shape=True)(updates, inner_state)
    jaxpr = traced.jaxpr
    used = {id(x) for equation in jaxpr.eqns for x in equation.invars} | {id(x) for x in jaxpr.outvars}
    return [id(x) in used for x in jaxpr.invars[: len(jax.tree.leaves(updates))]], shapes[0]


def _wide(x: Array) -> Array:
    """At least float32: neither integers nor the small floats of accelerators have all of the arithmetic below."""
    floating = jnp.issubdtype(x.dtype, jnp.inexact) and jnp.dtype(x.dtype).itemsize >= 4
    return x if floating else x.astype(jnp.float32)


def _norm(leaves: Sequence[Array], finite: Array) -> Array:
    """The global norm; the largest magnitude comes out of the sum of squares, which would overflow at 1e19."""
    magnitudes = [jnp.abs(x) for x in leaves]
    largest = jnp.max(jnp.array([0.0, *(jnp.max(x) for x in magnitudes)]))
    unit = jnp.where(finite & (largest > 0), largest, 1.0)
    squares = (jnp.sum(jnp.square(x / unit.astype(x.dtype))) for x in magnitudes)
    return unit * jnp.sqrt(sum(squares, start=jnp.zeros([], jnp.float32)))
