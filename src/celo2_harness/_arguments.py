"""Checks of arguments: numbers, schedules, the length of a run, names out of a table."""

import difflib
import math
import numbers
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# Kinds of numbers, of NumPy too; to static checkers these classes have no arithmetic.
REAL: Any = numbers.Real
WHOLE: Any = numbers.Integral


def number(name: str, value: Any, *, schedule: bool = True) -> Any:
    """A number that may be asked for, as the arithmetic takes it.

    Args:
        name: What the message calls it.
        value: A real number of Python, NumPy or JAX, a traced one too; or a schedule.
        schedule: Whether a function of the step count will do.

    Returns:
        A Python number for those of NumPy; JAX arrays, traced numbers and schedules as they are.

    Raises:
        ValueError: If the value is negative, not finite, not real, or has axes.

    Example:
        >>> number("weight_decay", np.float32(0.5))
        0.5
    """
    if callable(value):
        if schedule:
            return value
    elif isinstance(value, jax.Array):
        real = jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
        # The value of a traced number is not known yet.
        if value.ndim == 0 and real and (isinstance(value, Tracer) or 0.0 <= float(value) < math.inf):
            return value
    else:
        if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
            value = value.item()
        # Not float(value): there are whole numbers that no float can hold.
        if isinstance(value, REAL) and not isinstance(value, bool) and 0.0 <= value <= sys.float_info.max:
            return value
    shape = f" of shape {np.shape(value)}" if isinstance(value, (np.ndarray, jax.Array)) and np.ndim(value) else ""
    choices = "a finite number >= 0 (or a schedule)" if schedule else "a finite number >= 0"
    raise ValueError(f"{name} = {value!r}{shape}: expected {choices}.")


def run_length(total_steps: Any) -> int:
    """The length of a run as a Python number.

    Raises:
        ValueError: If it is no whole number of at least 1 and below 2^31.
    """
    _refuse_traced(total_steps)
    whole = isinstance(total_steps, WHOLE) or (np.ndim(total_steps) == 0 and _is_whole_array(total_steps))
    # Steps are counted in int32.
    if not whole or isinstance(total_steps, bool) or not 1 <= total_steps < 2**31:
        raise ValueError(f"total_steps = {total_steps!r}: expected a whole number of steps >= 1 (below 2^31), or None.")
    return int(total_steps)


def warmup_length(warmup: Any, total_steps: int) -> Any:
    """The warm-up as a Python number.

    Raises:
        ValueError: If it is neither a fraction of the run below 1 nor a number of steps below its length.
    """
    _refuse_traced(warmup)
    if isinstance(warmup, (np.generic, np.ndarray)) and warmup.ndim == 0:
        warmup = warmup.item()
    if not isinstance(warmup, REAL) or isinstance(warmup, bool) or not 0 <= warmup < total_steps:
        raise ValueError(
            f"warmup = {warmup!r}: expected a fraction of the run below 1, or steps below total_steps = {total_steps}."
        )
    return warmup


def choose(name: str, choices: Mapping[str, Any], argument: str) -> Any:
    """The choice of that name.

    Raises:
        ValueError: If there is none; the message names the nearest.
    """
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{argument} = {name!r}: expected one of {', '.join(choices)}{hint}")
    return choices[name]


def _is_whole_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer)


def _refuse_traced(value: Any) -> None:
    if isinstance(value, jax.Array):
        raise ValueError(
            "total_steps and warmup must be Python numbers; with optax.inject_hyperparams pass"
            " static_args=harness.STATIC_ARGS."
        )
