"""When a difference between two optimizers counts."""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

CONFIDENCE = 0.95
RESOLUTION = 1e-4
"""Smaller differences count as none: they are rounding, or of no use."""
WEAK_BELOW = 5
"""With fewer seeds a difference is called weak evidence, whatever its size."""


class Difference(NamedTuple):
    """Final losses of an optimizer minus those of another one, seed by seed.

    Attributes:
        seeds: The number of seeds that both have.
        mean: The mean of the differences; infinite where one of the two diverged.
        standard_error: The standard deviation of the differences over the root of their number; None for one seed.
        half_width: Half the width of Student's two-sided interval at `CONFIDENCE`; None for one seed.
        verdict: "lower" or "higher" if the interval leaves zero out and the mean is beyond `RESOLUTION`, "open" if not;
            "one seed" if there is no interval, "diverged" if there is no difference.
    """

    seeds: int
    mean: float
    standard_error: float | None
    half_width: float | None
    verdict: str


def paired_difference(finals: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """Compares two optimizers on the seeds that both have: a seed gives both the same start and the same batches.

    Args:
        finals: The final loss by seed.
        others: The final loss by seed, of the other optimizer.

    Returns:
        The difference, or None if no seed is in both.

    Example:
        >>> paired_difference({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5})
        Difference(seeds=2, mean=-0.5, standard_error=0.0, half_width=0.0, verdict='lower')
    """
    from scipy.special import stdtrit  # comes with JAX

    pairs = [(finals[seed], others[seed]) for seed in finals if seed in others]
    if not pairs:
        return None
    if not all(math.isfinite(loss) for pair in pairs for loss in pair):
        return Difference(len(pairs), math.inf, None, None, "diverged")
    differences = [one - other for one, other in pairs]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return Difference(1, mean, None, None, "one seed")
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half_width = float(stdtrit(len(differences) - 1, 0.5 + CONFIDENCE / 2)) * error
    verdict = "open" if abs(mean) <= max(half_width, RESOLUTION) else "lower" if mean < 0 else "higher"
    return Difference(len(differences), mean, error, half_width, verdict)
