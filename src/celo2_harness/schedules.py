"""Learning-rate schedules by name, as shapes in [0, 1] that multiply the peak learning rate.

Each function takes the number of steps of the run and the warm-up and returns an Optax schedule. `warmup` below one is
a fraction of the run; from one on it counts steps. Warm-up rises linearly from zero.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from celo2_harness._types import ScalarOrSchedule

COOLDOWN_FRACTION = 0.2
FLAT_FRACTION = 0.3
POWER = 1.2


def warmup_steps(total_steps: int, warmup: float | int) -> int:
    """Warm-up in steps; at least one step of the run is left after it.

    >>> warmup_steps(1000, 0.05), warmup_steps(1000, 30)
    (50, 30)
    """
    return min(int(warmup) if warmup >= 1 else round(warmup * total_steps), total_steps - 1)


def constant(total_steps: int, warmup: float | int = 0.0) -> optax.Schedule:
    """One throughout, without warm-up."""
    del total_steps, warmup
    return optax.constant_schedule(1.0)


def warmup_constant(total_steps: int, warmup: float | int = 0.05) -> optax.Schedule:
    """Warm-up, then one: for what averages the parameters instead of lowering the learning rate.

    >>> schedule = warmup_constant(100, 0.1)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 100)]
    [0.0, 0.5, 1.0, 1.0]
    """
    return _after_warmup(optax.constant_schedule(1.0), warmup_steps(total_steps, warmup))


def linear(total_steps: int, warmup: float | int = 0.05) -> optax.Schedule:
    """Warm-up, then a straight line to zero at the end.

    >>> schedule = linear(100, 0.1)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    steps = warmup_steps(total_steps, warmup)
    return _after_warmup(optax.linear_schedule(1.0, 0.0, total_steps - steps), steps)


def warmup_cosine(total_steps: int, warmup: float | int = 0.05) -> optax.Schedule:
    """Warm-up, then half a cosine to zero at the end.

    >>> schedule = warmup_cosine(100, 0.1)
    >>> [round(float(schedule(step)), 3) for step in (0, 10, 55, 100)]
    [0.0, 1.0, 0.5, 0.0]
    """
    steps = warmup_steps(total_steps, warmup)
    return _after_warmup(optax.cosine_decay_schedule(1.0, total_steps - steps), steps)


def warmup_stable_decay(total_steps: int, warmup: float | int = 0.05) -> optax.Schedule:
    """Warm-up, one, then 1 - sqrt(t) to zero over the last fifth (arXiv 2405.18392).

    >>> schedule = warmup_stable_decay(100, 0.1)
    >>> [round(float(schedule(step)), 3) for step in (5, 50, 80, 85, 100)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    steps = warmup_steps(total_steps, warmup)
    cooldown = max(1, min(round(COOLDOWN_FRACTION * total_steps), total_steps - steps))
    fall = lambda count: 1.0 - jnp.sqrt(jnp.clip(count / cooldown, 0.0, 1.0))
    stable = optax.join_schedules([optax.constant_schedule(1.0), fall], [total_steps - cooldown - steps])
    return _after_warmup(stable, steps)


def inverse_sqrt(total_steps: int, warmup: float | int = 0.05) -> optax.Schedule:
    """Warm-up over w steps, then sqrt(w / step); does not depend on the end (arXiv 1706.03762).

    >>> schedule = inverse_sqrt(1000, 100)
    >>> [round(float(schedule(step)), 3) for step in (50, 100, 400)]
    [0.5, 1.0, 0.5]
    """
    steps = max(1, warmup_steps(total_steps, warmup))
    return _after_warmup(lambda count: jnp.sqrt(steps / (steps + jnp.maximum(count, 0))), steps)


def power(total_steps: int, warmup: float | int = 0.05) -> optax.Schedule:
    """Warm-up, then (1 - t)^1.2 to zero at the end: a straight line that bends a little before it gets there.

    >>> schedule = power(100, 0.1)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.435, 0.0]
    """
    steps = warmup_steps(total_steps, warmup)
    # Clipped after the subtraction: a base that rounding makes negative has no power.
    return _after_warmup(lambda count: jnp.clip(1.0 - count / (total_steps - steps), 0.0, 1.0) ** POWER, steps)


def flat_then_linear(total_steps: int, warmup: float | int = 0.05) -> optax.Schedule:
    """Warm-up, one until 30% of the run, then a straight line to zero at the end.

    >>> schedule = flat_then_linear(100, 0.1)
    >>> [round(float(schedule(step)), 3) for step in (5, 10, 30, 65, 100)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    steps = warmup_steps(total_steps, warmup)
    flat = max(0, min(round(FLAT_FRACTION * total_steps), total_steps - 1) - steps)
    return _after_warmup(optax.linear_schedule(1.0, 0.0, total_steps - steps - flat, flat), steps)


SCHEDULES: dict[str, Callable[[int, float], optax.Schedule]] = {
    "constant": constant,
    "warmup_constant": warmup_constant,
    "linear": linear,
    "warmup_cosine": warmup_cosine,
    "warmup_stable_decay": warmup_stable_decay,
    "inverse_sqrt": inverse_sqrt,
    "power": power,
    "flat_then_linear": flat_then_linear,
}


def _after_warmup(schedule: Callable[[Any], Any], steps: int) -> optax.Schedule:
    if steps == 0:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, steps), schedule], [steps])


def scaled(factor: ScalarOrSchedule, schedule: ScalarOrSchedule) -> ScalarOrSchedule:
    """The product of two numbers, traced numbers or functions of the step count.

    Example:
        >>> scaled(2.0, lambda count: count + 1)(3)
        8.0
    """
    if callable(factor) or callable(schedule):

        def value(x: Any, count: Any) -> Any:
            return x(count) if callable(x) else x

        return lambda count: value(factor, count) * value(schedule, count)
    return factor * schedule
