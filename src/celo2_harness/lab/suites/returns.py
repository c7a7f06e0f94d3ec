"""Returns of reinforcement-learning runs: a record per run, and curves over the runs of an optimizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites.records import read_lines

RETURNS = "returns"
"""The kind of a record that has the returns of a run."""
POINTS = 50
"""How many points a curve has."""
WINDOW = 0.1
"""Which part of a run, up to a point, the episodes come from whose mean the curve has there."""
RESAMPLES = 2000


class ReturnCurve(NamedTuple):
    """The runs of an optimizer on a game.

    Attributes:
        game: The game.
        label: The optimizer.
        seeds: Of each run.
        statuses: "finished", "diverged" or "unfinished", of each run; all count with what they had reached.
        steps: Agent steps.
        runs: At each of them, the mean return of the episodes that ended in the window before it, of each run; NaN
            where a run had none yet, or was not that far.
        mean: Over the runs; NaN where one of them is.
        low: Lower end of the 95% confidence interval of that mean.
        high: Its upper end.
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


def read_return_run(path: Path) -> dict[str, Any] | None:
    """Reads the metrics file of a run of `celo2 reinforce`, at its end or not.

    Args:
        path: The file.

    Returns:
        A record as `read_results` has them: the step at which each episode was over, and its return. None if the file
        is of another command.

    Raises:
        InputError: if the file is damaged.
    """
    lines = read_lines(path)
    header = lines[0] if lines else {}
    settings = header.get("settings")
    if not isinstance(settings, dict) or "ppo" not in settings:
        return None
    try:
        episodes = [line for line in lines if line["kind"] == "episode"]
        return {
            "kind": RETURNS,
            "name": settings["optimizer"]["preset"],
            "learning_rate": settings["optimizer"]["learning_rate"],
            "seed": settings["run"]["seed"],
            "status": lines[-1]["status"] if lines[-1]["kind"] == "end" else "unfinished",
            "reached": max((line["step"] for line in lines[1:]), default=0),
            "episode_steps": [line["step"] for line in episodes],
            "returns": [line["return"] for line in episodes],
            "settings": settings,
            **{name: header[name] for name in ("versions", "device", "commit") if name in header},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def return_curves(records: Sequence[Mapping[str, Any]]) -> list[ReturnCurve]:
    """Puts the seeds of each optimizer together.

    The interval is that of a percentile bootstrap over runs: of two runs it is their range, which holds the true mean
    about every second time, and of one run there is none. What differs is said by the label; where runs of one label
    differ in more than their seed (other weights, another schedule), labels are numbered.

    Args:
        records: Of runs, from `read_results` or `read_return_run`.

    Returns:
        One curve for each game and optimizer, games and labels in alphabetical order.
    """
    groups: list[tuple[dict[str, Any], list[Mapping[str, Any]]]] = []
    for record in sorted(records, key=lambda record: (*_name(record), record["seed"])):
        settings = record["settings"] | {"run": {"steps": record["settings"]["run"]["steps"]}}
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


def _name(record: Mapping[str, Any]) -> tuple[str, str]:
    return record["settings"]["environment"]["game"], f"{record['name']}, learning rate {record['learning_rate']:g}"


def _curve(records: Sequence[Mapping[str, Any]], game: str, label: str) -> ReturnCurve:
    total = records[0]["settings"]["run"]["steps"]
    steps = np.linspace(0.0, total, POINTS + 1)[1:]
    runs = np.array([_windowed_means(record, steps, WINDOW * total) for record in records])
    seeds, statuses = [record["seed"] for record in records], [record["status"] for record in records]
    return ReturnCurve(game, label, seeds, statuses, steps, runs, runs.mean(axis=0), *bootstrap_interval(runs))


def _windowed_means(record: Mapping[str, Any], steps: np.ndarray, window: float) -> Float64[np.ndarray, " points"]:
    ended = np.array(record["episode_steps"], np.int64)
    sums = np.concatenate([[0.0], np.cumsum(np.array(record["returns"], np.float64))])
    # Rounding to whole updates lets the last episodes end a little after the last point.
    upto = np.where(steps >= steps[-1], len(ended), np.searchsorted(ended, steps, side="right"))
    since = np.searchsorted(ended, steps - window, side="right")
    counts = upto - since
    # Beyond where a run stopped the window would thin out to its very last episodes.
    counts = np.where(steps <= record["reached"], counts, 0)
    return np.where(counts > 0, (sums[upto] - sums[since]) / np.maximum(counts, 1), np.nan)


def bootstrap_interval(
    values: Float64[np.ndarray, "runs points"], level: float = 0.95
) -> tuple[Float64[np.ndarray, " points"], Float64[np.ndarray, " points"]]:
    """The percentile-bootstrap interval of the mean over runs, at each point.

    Args:
        values: One row per run.
        level: Of confidence.

    Returns:
        Lower and upper ends; the values themselves where there is one run.

    >>> low, high = bootstrap_interval(np.array([[1.0], [3.0]]))  # of two runs, their range
    >>> low.tolist(), high.tolist()
    ([1.0], [3.0])
    """
    runs = len(values)
    # The same resamples each time, so that a picture can be made again.
    chosen = np.random.default_rng(0).integers(0, runs, (RESAMPLES, runs))
    means = values[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
