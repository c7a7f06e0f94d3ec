"""What every optimizer of `harness.build` is wrapped in: float32 arithmetic, and errors that name the leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from celo2_harness._trees import require_like_params, tree_difference
from celo2_harness._types import Params, PyTree, Updates


def wide_dtype(dtype: Any) -> Any:
    """The dtype of state and arithmetic: at least float32; other kinds of numbers stay."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.dtype(jnp.float32) if narrow else dtype


def in_float32(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """State and arithmetic do not follow the parameters down to bfloat16; updates have the parameters' dtype."""

    def widened(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x if x.dtype == wide_dtype(x.dtype) else x.astype(wide_dtype(x.dtype)), tree)

    def like(update: Any, parameter: Any) -> Any:
        # What is no floating-point array is frozen, whatever its gradient is.
        floating = jnp.issubdtype(parameter.dtype, jnp.floating)
        return update.astype(parameter.dtype) if floating else jnp.zeros_like(parameter)

    def init_fn(params: Params) -> optax.OptState:
        return tx.init(widened(params))

    def update_fn(updates: Updates, state: Any, params: Any = None, **extra_args: Any) -> tuple[Updates, Any]:
        updates, state = tx.update(widened(updates), state, widened(params), **extra_args)
        return jax.tree.map(like, updates, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


# What JAX and Optax raise for a tree or an array that does not fit.
_TREE_ERRORS = (ValueError, TypeError, AttributeError, KeyError, IndexError)


def explained(name: str, tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with messages that name the leaf where parameters, updates and state do not belong together."""

    def update_fn(updates: Updates, state: Any, params: Any = None, **extra_args: Any) -> tuple[Updates, Any]:
        if params is None:
            raise ValueError(
                f"{name}: update(updates, state, params) was called without params. The update depends on the"
                " parameters; pass the tree that you will apply the updates to."
            )
        require_like_params(name, updates, params)
        try:
            return tx.update(updates, state, params, **extra_args)
        except _TREE_ERRORS as error:
            difference = state_difference(state, params)
            if difference is None:
                raise
            raise ValueError(
                f"{name}: the state is not one that init makes for these parameters: {difference} Make it with init of"
                " this optimizer, built with the same options, on the tree that is passed as params."
            ) from error

    def state_difference(state: Any, params: Params) -> str | None:
        try:
            wanted = jax.eval_shape(tx.init, params)
        except _TREE_ERRORS:
            return None  # the parameters themselves are refused
        return tree_difference(state, wanted, dtypes=True)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)  # type: ignore[arg-type]
