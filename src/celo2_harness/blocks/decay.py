"""Weight decay beside the gradient: decoupled, independent of the learning rate, or cautious."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from celo2_harness._trees import is_function, require_like_params
from celo2_harness._types import Params, ScalarOrSchedule, Updates

Mode = Literal["decoupled", "independent", "cautious"]


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0,
    mode: Mode = "decoupled",
    *,
    mask: Any | Callable[[Params], Any] | None = None,
) -> optax.GradientTransformation:
    """Adds a multiple of the parameters to the updates.

    With w the weight decay, p the parameter before the step, u the update as it arrives:

    - `"decoupled"` (AdamW): u + w p, placed **before** the learning rate, so a step decays by learning rate x w;
    - `"cautious"`: u + w p only where u and p have the same sign, that is, where the step already shrinks p; placed
      before the learning rate too;
    - `"independent"`: u - w p, placed **after** the learning rate, so a step decays by w whatever the learning rate.

    Args:
        weight_decay: The decay w, a number or a schedule of the step count.
        mode: One of the three.
        mask: A tree of booleans like the parameters (or a prefix of it), or a function of the parameters returning one;
            True where decay applies.

    Returns:
        An `optax.GradientTransformation`; `update` needs `params`. Updates keep their dtype.

    Raises:
        ValueError: If the mode is unknown; in `update`, if `params` is None or another tree than the updates.

    Example:
        >>> tx = add_decayed_weights(0.1)
        >>> updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init({"w": jnp.ones(2)}), {"w": jnp.ones(2)})
        >>> [round(float(u), 6) for u in updates["w"]]
        [0.1, 0.1]

    References:
        arXiv 1711.05101 (decoupled, independent); arXiv 2510.12402 (cautious weight decay).
    """
    if mode not in get_args(Mode):
        raise ValueError(f"add_decayed_weights: mode = {mode!r}, expected one of {', '.join(get_args(Mode))}.")

    def decayed(update: jax.Array, parameter: jax.Array, rate: Any) -> jax.Array:
        rate = jnp.asarray(rate, jnp.float32)
        decay = rate * parameter.astype(jnp.float32)
        if mode == "independent":
            decay = -decay
        elif mode == "cautious":
            decay = jnp.where(update * parameter > 0, decay, 0.0)
        return (update.astype(jnp.float32) + decay).astype(update.dtype)

    def init_fn(params: Params) -> Any:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)) if callable(weight_decay) else optax.EmptyState()

    def update_fn(updates: Updates, state: Any, params: Params | None = None) -> tuple[Updates, Any]:
        if params is None:
            raise ValueError(
                "add_decayed_weights: update(updates, state, params) was called without params. Weight decay shrinks"
                " the parameters; pass the tree that you will apply the updates to."
            )
        require_like_params("add_decayed_weights", updates, params)
        rate = weight_decay
        if isinstance(rate, (int, float)) and rate == 0:
            return updates, state  # the parameters need not be read
        if callable(weight_decay):
            rate = weight_decay(state.count)
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        return jax.tree.map(lambda u, p: decayed(u, p, rate), updates, params), state

    transformation = optax.GradientTransformation(init_fn, update_fn)  # type: ignore[arg-type]
    if mask is None:
        return transformation
    return optax.masked(transformation, mask if is_function(mask) else lambda _: mask)
