"""Optimizers and schedules of theta, by name."""

from collections.abc import Callable

import optax

WARMUP = 0.02


def _warmup(peak: float, iterations: int) -> tuple[optax.Schedule, int]:
    steps = max(1, round(WARMUP * iterations))
    return optax.linear_schedule(0.0, peak, steps), steps


def _cosine(peak: float, iterations: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, round(WARMUP * iterations)), iterations)


def _linear(peak: float, iterations: int) -> optax.Schedule:
    rising, steps = _warmup(peak, iterations)
    return optax.join_schedules([rising, optax.linear_schedule(peak, 0.0, max(1, iterations - steps))], [steps])


# (peak learning rate, outer iterations) -> Optax schedule.
OUTER_SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda peak, iterations: optax.constant_schedule(peak),
    "cosine": _cosine,
    "linear": _linear,
}

# (schedule, weight decay) -> Optax optimizer, without clipping.
OUTER_OPTIMIZERS: dict[str, Callable[[optax.Schedule, float], optax.GradientTransformation]] = {
    "adamw": lambda rate, decay: optax.adamw(rate, b1=0.9, b2=0.999, weight_decay=decay),
    "adam": lambda rate, decay: optax.adam(rate, b1=0.9, b2=0.999),
    "nadamw": lambda rate, decay: optax.nadamw(rate, b1=0.9, b2=0.999, weight_decay=decay),
    "sgd": lambda rate, decay: optax.sgd(rate, momentum=0.9),
}
