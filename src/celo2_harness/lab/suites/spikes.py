"""Loss spikes: does a run jump above its own running level?"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

SPIKE_FACTOR = 1.5
"""A training loss above so many times the running level is a spike."""


class Peak(NamedTuple):
    """The largest training loss between two evaluations.

    Attributes:
        step: The step of the later evaluation.
        ratio: The loss divided by the running level before; infinite where it was no finite number.
    """

    step: int
    ratio: float


def peaks(training: Sequence[Sequence[Any]], training_peak: Sequence[Sequence[Any]], decay: float = 0.5) -> list[Peak]:
    """Measures the largest losses of a run against its running level.

    The level before interval k is an exponential average of the mean losses of the intervals before,
    level <- decay level + (1 - decay) mean, starting with the first mean. A mean above `SPIKE_FACTOR` times the level
    enters as that, so that a spike hides no later one, but a loss that stays high becomes the level.

    Args:
        training: The pairs of step and mean training loss since the evaluation before, from a record.
        training_peak: The pairs of step and largest training loss since the evaluation before.
        decay: The decay of the level.

    Returns:
        One entry per interval but the first.

    Example:
        >>> peaks([[10, 2.0], [20, 2.0], [30, 1.0]], [[10, 5.0], [20, 3.0], [30, 3.5]])
        [Peak(step=20, ratio=1.5), Peak(step=30, ratio=1.75)]
    """
    found, level = [], None
    for (step, mean), (_, peak) in zip(training, training_peak, strict=True):
        if level is not None:
            found.append(Peak(step, math.inf if peak is None else peak / level))
        if mean is None:
            continue
        level = mean if level is None else decay * level + (1 - decay) * min(mean, SPIKE_FACTOR * level)
    return found
