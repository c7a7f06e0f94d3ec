"""Timing that a busy machine hits evenly: A B C A B C, and ratios within a round."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, tuple[float, ...]]:
    """Times every call once per round, in turn.

    Args:
        calls: What to time, by name; what they return is waited for.
        rounds: How often.
        clock: Seconds.
        on_round: Called with the number of rounds done.

    Returns:
        Seconds per round, by name. A first, untimed round warms caches and allocators.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            jax.block_until_ready(call())
            if done:
                seconds[name].append(clock() - start)
        on_round(done)
    return {name: tuple(values) for name, values in seconds.items()}


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
