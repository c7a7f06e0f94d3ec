"""From records to rows: which trial stands for an optimizer, and what a table says of it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

FAILURES = ("diverged", "failed")
"""How a run can end without a final loss: its held-out loss was no finite number, or it stopped with an error."""


class Row(NamedTuple):
    """What a table shows of one contender, at its best trial.

    Attributes:
        name: The contender.
        learning_rate: Of the trial with the lowest mean final loss.
        learning_rates: How many were tried.
        status: "finished", or "diverged" if a seed diverged or failed at every trial.
        validation_loss: The final one, as the mean over seeds, in the unit of the task; infinite if diverged.
        spread: The standard deviation over seeds; None for a single seed.
        steps_to_baseline: The first evaluation at which the mean curve is at or below the baseline's final loss; None
            if that never happens or the baseline is not among the runs.
        step_milliseconds: Median over the steps of all seeds, without compilation.
        state_bytes: Memory of the optimizer's state; 0 where all runs failed.
        parameter_bytes: Memory of the parameters; 0 where all runs failed.
        curve: Pairs of step and mean validation loss.
        low: The lowest seed's loss at each step of the curve.
        high: The highest seed's.
        weight_decay: Of the best trial; None where the records do not say.
        trials: How many pairs of learning rate and weight decay were tried.
        finals: Seed -> final loss at the best trial, infinite where it diverged.
        failures: Of all its runs, how many ended each way in `FAILURES`.
        parameter_rms: Pairs of step and root mean square of the parameters, as the mean over seeds; empty where the
            records do not say.
        incomplete: Trials that have fewer seeds than others, and therefore cannot be chosen.
    """

    name: str
    learning_rate: float
    learning_rates: int
    status: str
    validation_loss: float
    spread: float | None
    steps_to_baseline: int | None
    step_milliseconds: float | None
    state_bytes: int
    parameter_bytes: int
    curve: list[tuple[int, float]]
    low: list[float]
    high: list[float]
    weight_decay: float | None
    trials: int
    finals: dict[int, float]
    failures: dict[str, int]
    parameter_rms: list[tuple[int, float]]
    incomplete: int


def summarize(
    runs: Sequence[Mapping[str, Any]], baseline: str = "adamw", *, selection_seeds: Sequence[int] | None = None
) -> list[Row]:
    """Reduces the runs of one task to one row per contender.

    The best trial of a contender is the pair of learning rate and weight decay whose final loss is lowest in the mean
    over the seeds of the selection; a seed that diverged counts as infinite. The row then is about the other seeds, if
    that trial has some.

    Args:
        runs: Records from `compare` or `run_suite`, of one task.
        baseline: The contender whose final loss the others are timed to.
        selection_seeds: Seeds that choose the best trial. By default all of them do, and all of them are shown.

    Returns:
        The rows, in the order in which the contenders first ran.

    Raises:
        ValueError: if the selection has no runs of a contender.
    """
    groups: dict[str, dict[tuple[float, float | None], list[Mapping[str, Any]]]] = {}
    for record in runs:
        trial = record["learning_rate"], weight_decay(record)
        groups.setdefault(record["name"], {}).setdefault(trial, []).append(record)
    rows = [_contender_row(name, trials, selection_seeds) for name, trials in groups.items()]
    target = next((row.validation_loss for row in rows if row.name == baseline), -math.inf)
    if not math.isfinite(target):
        return rows
    return [row._replace(steps_to_baseline=first_at_or_below(row.curve, target)) for row in rows]


def first_at_or_below(curve: Sequence[tuple[int, float]], target: float) -> int | None:
    """Returns the first step of a curve whose loss is at or below a target, or None.

    >>> first_at_or_below([(0, 3.0), (10, 2.0), (20, 1.0)], 2.0)
    10
    """
    return next((step for step, loss in curve if loss <= target), None)


def weight_decay(record: Mapping[str, Any]) -> float | None:
    """Returns the weight decay that a record is of, or None where it does not say."""
    return record.get("settings", {}).get("optimizer", {}).get("weight_decay")


def final_loss(record: Mapping[str, Any]) -> float:
    """Returns the final loss of a run, infinite if it has none."""
    return math.inf if record["status"] in FAILURES else record["validation_loss"]


def mean_final_loss(records: Sequence[Mapping[str, Any]]) -> float:
    """Returns the mean over runs, infinite if one of them has no final loss."""
    return statistics.fmean(map(final_loss, records))


def _contender_row(
    name: str,
    trials: Mapping[tuple[float, float | None], list[Mapping[str, Any]]],
    selection_seeds: Sequence[int] | None,
) -> Row:
    def selected(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [record for record in records if selection_seeds is None or record["seed"] in selection_seeds]

    # A mean over fewer seeds is no match for one over all of them.
    most = max(len(selected(records)) for records in trials.values())
    if not most:
        raise ValueError(f"{name}: none of its runs has a seed of the selection, {list(selection_seeds or ())}")
    complete = [records for records in trials.values() if len(selected(records)) == most]
    best = min(complete, key=lambda records: mean_final_loss(selected(records)))
    shown = best
    if selection_seeds is not None:
        shown = [record for record in best if record["seed"] not in selection_seeds] or best
    everything = [record for records in trials.values() for record in records]
    return _row(shown)._replace(
        learning_rates=len({rate for rate, _ in trials}),
        trials=len(trials),
        failures={status: sum(record["status"] == status for record in everything) for status in FAILURES},
        incomplete=len(trials) - len(complete),
    )


def _row(records: Sequence[Mapping[str, Any]]) -> Row:
    first, loss = records[0], mean_final_loss(records)
    times = [t for record in records if (t := record.get("step_milliseconds")) is not None]
    # Where a seed diverged, the curve ends at the last evaluation that all of them reached in good health.
    points = common_points([record["validation"] for record in records])
    several = len(records) > 1 and math.isfinite(loss)
    return Row(
        name=first["name"],
        learning_rate=first["learning_rate"],
        learning_rates=1,
        status="finished" if math.isfinite(loss) else "diverged",
        validation_loss=loss,
        spread=statistics.stdev(map(final_loss, records)) if several else None,
        steps_to_baseline=None,
        step_milliseconds=statistics.median(times) if times else None,
        state_bytes=max(record.get("state_bytes", 0) for record in records),
        parameter_bytes=max(record.get("parameter_bytes", 0) for record in records),
        curve=[(step, statistics.fmean(losses)) for step, losses in points],
        low=[min(losses) for _, losses in points],
        high=[max(losses) for _, losses in points],
        weight_decay=weight_decay(first),
        trials=1,
        finals={record["seed"]: final_loss(record) for record in records},
        failures={},
        parameter_rms=[
            (step, statistics.fmean(values))
            for step, values in common_points([record.get("parameter_rms", []) for record in records])
        ],
        incomplete=0,
    )


def common_points(curves: Sequence[Sequence[Sequence[Any]]]) -> list[tuple[int, list[float]]]:
    """Returns the steps that all curves have, with their values, up to the first that is no number in one of them."""
    if not curves:
        return []
    by_step = [dict(map(tuple, curve)) for curve in curves]
    points = []
    for step in sorted(set(by_step[0]).intersection(*by_step[1:])):
        values = [curve[step] for curve in by_step]
        if None in values:
            break
        points.append((step, [float(value) for value in values]))
    return points
