"""Returns of agents: curves over the runs of an optimizer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from celo2_harness.lab.suites.record import Record

POINTS = 50
"""How many points a curve has."""
WINDOW = 0.1
"""The part of a run, up to a point, whose episodes the curve has the mean of there."""
RESAMPLES = 2000


class ReturnCurve(NamedTuple):
    """The runs of an optimizer on a game.

    Attributes:
        game: The game.
        label: The optimizer.
        seeds: The seed of each run.
        statuses: "finished", "diverged" or "unfinished" for each run; all count with what they had reached.
        steps: The agent steps of the points.
        runs: The mean return of the episodes that ended in the window before each point, for each run; NaN where a run
            had none yet, or was not that far.
        mean: The mean over the runs; NaN where one of them is.
        low: The lower end of the 95% confidence interval of that mean.
        high: The upper end of that interval.
    """

    game: str
    label: str
    seeds: list[int]
    statuses: list[str]
    steps: Float64[np.ndarray, " points"]
    runs: Float64[np.ndarray, "runs points"]
    mean: Float64[np.ndarray, " points"]
    low: Float64[np.ndarray, " points"]
    high: Float64[np.ndarray, " points"]


def return_curves(records: Sequence[Record]) -> list[ReturnCurve]:
    """Puts the seeds of each optimizer together.

    The interval is that of a percentile bootstrap over runs: of two runs it is their range, which holds the true mean
    about every second time, and of one run there is none. What differs is said by the label; where runs of one label
    differ in more than their seed (other weights, another schedule), labels are numbered.

    Args:
        records: The records of agents.

    Returns:
        One curve for each game and optimizer, games and labels in alphabetical order.
    """
    groups: list[tuple[dict[str, Any], list[Record]]] = []
    for record in sorted(records, key=lambda record: (*_name(record), record.seed)):
        settings = {**record.settings, "run": {"steps": record.steps}}
        members = next((members for other, members in groups if other == settings), None)
        if members is None:
            groups.append((settings, members := []))
        members.append(record)
    names = [_name(members[0]) for _, members in groups]
    curves = []
    for index, (_, members) in enumerate(groups):
        same = [other for other, name in enumerate(names) if name == names[index]]
        game, label = names[index]
        curves.append(_curve(members, game, label + (f" ({same.index(index) + 1})" if len(same) > 1 else "")))
    return curves


def _name(record: Record) -> tuple[str, str]:
    return record.settings["environment"]["game"], f"{record.name}, learning rate {record.learning_rate:g}"


def _curve(records: Sequence[Record], game: str, label: str) -> ReturnCurve:
    total = records[0].steps
    steps = np.linspace(0.0, total, POINTS + 1)[1:]
    runs = np.array([_windowed_means(record, steps, WINDOW * total) for record in records])
    seeds, statuses = [record.seed for record in records], [record.status for record in records]
    return ReturnCurve(game, label, seeds, statuses, steps, runs, runs.mean(axis=0), *bootstrap_interval(runs))


def _windowed_means(record: Record, steps: np.ndarray, window: float) -> Float64[np.ndarray, " points"]:
    ended = np.array(record.episode_steps, np.int64)
    sums = np.concatenate([[0.0], np.cumsum(np.array(record.returns, np.float64))])
    # Rounding to whole updates lets the last episodes end a little after the last point.
    upto = np.where(steps >= steps[-1], len(ended), np.searchsorted(ended, steps, side="right"))
    since = np.searchsorted(ended, steps - window, side="right")
    counts = upto - since
    # Beyond where a run stopped the window would thin out to its very last episodes.
    counts = np.where(steps <= (record.reached or 0), counts, 0)
    return np.where(counts > 0, (sums[upto] - sums[since]) / np.maximum(counts, 1), np.nan)


def bootstrap_interval(
    values: Float64[np.ndarray, "runs points"], level: float = 0.95
) -> tuple[Float64[np.ndarray, " points"], Float64[np.ndarray, " points"]]:
    """Returns the percentile-bootstrap interval of the mean over runs, at each point.

    Args:
        values: One row per run.
        level: The level of confidence.

    Returns:
        The lower and upper ends; the values themselves where there is one run.

    Example:
        >>> low, high = bootstrap_interval(np.array([[1.0], [3.0]]))  # Of two runs, their range.
        >>> low.tolist(), high.tolist()
        ([1.0], [3.0])
    """
    runs = len(values)
    # The same resamples each time, so that a picture can be made again.
    chosen = np.random.default_rng(0).integers(0, runs, (RESAMPLES, runs))
    means = values[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
