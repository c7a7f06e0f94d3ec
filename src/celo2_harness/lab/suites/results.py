"""Results as tables need them: records sorted by task, and reduced to a row per optimizer at its best trial."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites.record import FAILURES, Curve, Record
from celo2_harness.lab.training.settings import first_difference, settings_key

# What has no say in which optimizer it is: the search, and the length that the task has too.
_SEARCHED = ("learning_rate", "weight_decay", "total_steps")


@dataclass(frozen=True)
class Row:
    """A row of a table: one optimizer at its best trial.

    Attributes:
        name: The optimizer.
        learning_rate: The learning rate of the trial with the lowest mean final loss.
        weight_decay: The weight decay of that trial; None where the records do not say.
        runs: The runs of that trial that are shown.
        trials: The number of pairs of learning rate and weight decay that were tried.
        incomplete: The number of trials that have fewer seeds than others, and therefore cannot be chosen.
        failures: The number of its runs that ended in each of the ways in `FAILURES`.
    """

    name: str
    learning_rate: float
    weight_decay: float | None
    runs: tuple[Record, ...]
    trials: int
    incomplete: int
    failures: Mapping[str, int]

    @property
    def finals(self) -> dict[int, float]:
        """The final loss by seed, infinite where there is none."""
        return {run.seed: run.final_loss for run in self.runs}

    @property
    def loss(self) -> float:
        """The final loss as the mean over seeds, infinite if one of them has none."""
        return statistics.fmean(self.finals.values())

    @property
    def spread(self) -> float | None:
        """The standard deviation of the final loss over seeds; None for a single seed, or without a loss."""
        several = len(self.runs) > 1 and math.isfinite(self.loss)
        return statistics.stdev(self.finals.values()) if several else None

    @property
    def points(self) -> list[tuple[int, list[float]]]:
        """The held-out loss of all seeds, by step; it ends where one of them has no finite loss."""
        return common_points([run.validation for run in self.runs])

    @property
    def curve(self) -> list[tuple[int, float]]:
        """The held-out loss, as the mean over seeds."""
        return [(step, statistics.fmean(losses)) for step, losses in self.points]

    @property
    def step_milliseconds(self) -> float | None:
        """The median over seeds; None where the records do not say."""
        times = [run.step_milliseconds for run in self.runs if run.step_milliseconds is not None]
        return statistics.median(times) if times else None

    def steps_to(self, loss: float) -> int | None:
        """Returns the first evaluation at which the mean curve is at or below a loss; None if that never happens."""
        return next((step for step, mean in self.curve if mean <= loss), None) if math.isfinite(loss) else None


@dataclass(frozen=True)
class TaskResults:
    """The runs of one task.

    Attributes:
        title: The name of the task in titles.
        records: The runs, each with the label of its row for a name.
        rows: One row for each optimizer, in the order in which they first ran.
    """

    title: str
    records: tuple[Record, ...]
    rows: tuple[Row, ...]

    @property
    def unit(self) -> str:
        """The unit of the loss."""
        return self.records[0].unit

    @property
    def steps(self) -> int:
        """The length of the runs."""
        return self.records[0].steps

    @property
    def baseline(self) -> Row | None:
        """The optimizer that others are timed to, if it is among them."""
        return next((row for row in self.rows if row.name == self.records[0].baseline), None)

    @property
    def reference(self) -> Row | None:
        """The optimizer that differences are taken to, if it is among them."""
        return next((row for row in self.rows if row.name == self.records[0].reference), None)

    def searched(self) -> list[Record]:
        """Returns the runs of the search: those of the report would favour the trials that they are of."""
        return [record for record in self.records if record.seed in (record.selection_seeds or [record.seed])]


def results_by_task(records: Sequence[Record]) -> list[TaskResults]:
    """Sorts records of training runs by task, and reduces those of each task to rows.

    Runs belong to one task if all of their settings but the optimizer, the seed and the intervals are the same, and to
    one row if the optimizer is the same but for learning rate and weight decay. What differs under one name is put
    behind it.

    Args:
        records: The records.

    Returns:
        The results of each task, in the order of the records.

    Raises:
        InputError: If records of one optimizer on one task come from different selections.
    """
    tasks: dict[str, list[Record]] = {}
    for record in records:
        tasks.setdefault(settings_key(_task_settings(record)), []).append(record)
    groups = list(tasks.values())
    titles = _told_apart([(group[0].task, _task_settings(group[0])) for group in groups])
    return [_results(title, group) for title, group in zip(titles, groups, strict=True)]


def _results(title: str, records: Sequence[Record]) -> TaskResults:
    optimizers = {settings_key(_optimizer(record)): _optimizer(record) for record in records}
    labels = _told_apart([(_name(optimizer), optimizer) for optimizer in optimizers.values()])
    label_of = dict(zip(optimizers, labels, strict=True))
    named = [dataclasses.replace(r, name=label_of[settings_key(_optimizer(r))]) for r in records]
    groups: dict[str, list[Record]] = {}
    for record in named:
        groups.setdefault(record.name, []).append(record)
    try:
        return TaskResults(title, tuple(named), tuple(best_row(group) for group in groups.values()))
    except InputError as error:
        raise InputError(f"{title}: {error}") from None


def best_row(records: Sequence[Record]) -> Row:
    """Reduces the runs of one optimizer on one task to its row.

    The best trial is the pair of learning rate and weight decay whose final loss is lowest in the mean over the seeds
    of the selection; a seed that diverged counts as infinite. The row is then about the other seeds, if that trial has
    some. Runs that name no selection are selected and shown on all their seeds.

    Args:
        records: The runs.

    Returns:
        The row.

    Raises:
        InputError: If the runs come from different selections, or none of them has a seed of the selection.
    """
    name = records[0].name
    selections = {_selection(record) for record in records}
    if len(selections) > 1:
        raise InputError(
            f"runs of {name} come from suites with different seeds for the selection; "
            "give them different labels, or report them one by one"
        )
    (selection,) = selections
    trials: dict[tuple[float, float | None], list[Record]] = {}
    for record in records:
        trials.setdefault((record.learning_rate, record.weight_decay), []).append(record)

    def selected(runs: Sequence[Record]) -> list[Record]:
        return [run for run in runs if selection is None or run.seed in selection]

    # A mean over fewer seeds is no match for one over all of them.
    most = max(len(selected(runs)) for runs in trials.values())
    if not most:
        raise InputError(f"{name}: none of its runs has a seed of the selection, {list(selection or ())}")
    complete = [runs for runs in trials.values() if len(selected(runs)) == most]
    best = min(complete, key=lambda runs: statistics.fmean(run.final_loss for run in selected(runs)))
    shown = best
    if selection is not None:
        shown = [run for run in best if run.seed not in selection] or best
    return Row(
        name=name,
        learning_rate=best[0].learning_rate,
        weight_decay=best[0].weight_decay,
        runs=tuple(shown),
        trials=len(trials),
        incomplete=len(trials) - len(complete),
        failures={status: sum(record.status == status for record in records) for status in FAILURES},
    )


def common_points(curves: Sequence[Curve]) -> list[tuple[int, list[float]]]:
    """Returns the steps that all curves have, with their values, up to the first that is no number in one of them."""
    if not curves:
        return []
    by_step = [dict(curve) for curve in curves]
    points = []
    for step in sorted(set(by_step[0]).intersection(*by_step[1:])):
        values = [curve[step] for curve in by_step]
        if None in values:
            break
        points.append((step, [float(value) for value in values if value is not None]))
    return points


def _selection(record: Record) -> tuple[int, ...] | None:
    """The seeds that chose the best trial, if others show it."""
    split = set(record.selection_seeds) != set(record.report_seeds)
    return record.selection_seeds if split else None


def _task_settings(record: Record) -> dict[str, Any]:
    settings = {name: value for name, value in record.settings.items() if name != "optimizer"}
    return settings | {"run": {"steps": record.steps}}


def _optimizer(record: Record) -> dict[str, Any]:
    """Returns what makes the optimizer of a record, but for the search."""
    settings = record.settings["optimizer"]
    return {"name": record.name} | {name: value for name, value in settings.items() if name not in _SEARCHED}


def _name(optimizer: Mapping[str, Any]) -> str:
    """The name of an optimizer, with weights that come from a file behind it."""
    name, weights = optimizer["name"], optimizer.get("weights")
    if weights and name == optimizer.get("preset") and ("/" in weights or "." in weights):
        return f"{name} ({_short(weights)})"
    return name


def _told_apart(things: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The names of things, each followed by the settings in which it differs from others of its name."""
    labels = []
    for index, (name, mine) in enumerate(things):
        parts = []
        for other, (same, settings) in enumerate(things):
            difference = first_difference(mine, settings) if same == name and other != index else None
            if difference is not None:
                key, value, _ = difference
                parts.append(f"{key.rpartition('.')[2]} {'default' if value == 'absent' else _short(value)}")
        labels.append(name + (f" ({', '.join(dict.fromkeys(parts))})" if parts else ""))
    return labels


def _short(value: Any) -> str:
    """A path by the name of its file, or of its folder where the file is called as all others are."""
    text = str(value)
    if "/" not in text and not text.endswith((".celo2", ".state")):
        return text[:12] if len(text) > 24 else text
    path = Path(text)
    return path.parent.name if path.stem == "weights" and path.parent.name else path.stem
