"""Several optimizers on one task from the same starting points and batches."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import optax

from celo2_harness.evaluate.errors import InputError
from celo2_harness.evaluate.loop import Progress, fit, init_state, tree_bytes
from celo2_harness.evaluate.records import (
    finite_or_none,
    prepare_folder,
    provenance,
    read_lines,
    write_line,
    write_lines,
)
from celo2_harness.tasks import Task

RUNS = "compare.jsonl"


@dataclass(frozen=True)
class CompareConfig:
    """What all runs of a comparison share.

    Attributes:
        steps: Training steps.
        seeds: Every contender runs once per seed; a seed fixes the initial parameters and the batches.
        eval_every: Steps between evaluations.
    """

    steps: int
    seeds: tuple[int, ...] = (0,)
    eval_every: int = 25

    def __post_init__(self):
        for name in ("steps", "eval_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds = {list(self.seeds)}: expected one or more different numbers")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise InputError(f"seed = {seed}: expected a number from 0 to {2**32 - 1}")


class Contender(NamedTuple):
    """An optimizer at a learning rate.

    Attributes:
        name: Runs are grouped by it; the best learning rate of a group stands for it.
        learning_rate: For the records; the optimizer has its own.
        tx: The optimizer.
        settings: What else determines it, as JSON can hold it: runs are told apart by this.
    """

    name: str
    learning_rate: float
    tx: optax.GradientTransformation
    settings: Mapping[str, Any]


class Comparison(NamedTuple):
    """The runs of a comparison.

    Attributes:
        runs: The records of the contenders' runs, as they are in the file.
        complete: False if it was stopped before the last run.
        found: How many of the runs were found in the folder, and not run again.
    """

    runs: list[dict[str, Any]]
    complete: bool
    found: int


def compare(
    task: Task,
    contenders: Sequence[Contender],
    config: CompareConfig,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    should_stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[Contender, int], None] = lambda contender, seed: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Comparison:
    """Runs every contender on every seed, and writes one line per run to `compare.jsonl`.

    Runs that are in the file already with the same settings are not repeated, so an interrupted comparison goes on
    where it was, and a finished one can be widened. A run that diverges is recorded as such and the others go on.

    Args:
        task: What to train.
        contenders: The optimizers.
        config: Length and seeds.
        folder: Made where missing.
        settings: What else determines the numbers (model, data), as JSON can hold it.
        should_stop: Asked after every step; once it says yes, the current run is given up.
        on_start: Called before each run that is not in the folder yet.
        on_progress: Called after every step.

    Returns:
        The runs of these contenders; those in the file with other settings are left out.

    Raises:
        InputError: if the folder cannot be written or its file is damaged.
    """
    prepare_folder(folder)
    path = folder / RUNS
    records = read_lines(path)
    # A last line cut short by a kill would run into the next one.
    write_lines(path, records)
    known = {_key(record["settings"]): record for record in records if "settings" in record}
    runs, found = [], 0
    for contender in contenders:
        for seed in config.seeds:
            run_settings = {
                **settings,
                "optimizer": dict(contender.settings),
                "run": {"steps": config.steps, "seed": seed, "eval_every": config.eval_every},
            }
            record = known.get(_key(run_settings))
            if record is not None:
                found += 1
            elif should_stop():
                return Comparison(runs, False, found)
            else:
                on_start(contender, seed)
                record = _run(task, contender, config, seed, should_stop, on_progress)
                if record is None:
                    return Comparison(runs, False, found)
                record |= {"settings": run_settings, **provenance()}
                write_line(path, record)
            runs.append(record)
    return Comparison(runs, True, found)


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _run(
    task: Task,
    contender: Contender,
    config: CompareConfig,
    seed: int,
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None],
) -> dict[str, Any] | None:
    state = init_state(task, contender.tx, seed)
    record = {
        "name": contender.name,
        "learning_rate": contender.learning_rate,
        "seed": seed,
        "parameter_bytes": tree_bytes(state.params),
        "state_bytes": tree_bytes(state.opt_state),
    }
    validation, step_seconds, status = [], [], "finished"
    for progress in fit(task, contender.tx, state, steps=config.steps, seed=seed, eval_every=config.eval_every):
        if progress.step_seconds is not None:
            step_seconds.append(progress.step_seconds)
        if progress.validation_loss is not None:
            validation.append([progress.state.step, finite_or_none(progress.validation_loss)])
            if not math.isfinite(progress.validation_loss):
                status = "diverged"
                break
        on_progress(progress)
        if should_stop() and progress.state.step < config.steps:
            return None
    return record | {
        "status": status,
        "validation_loss": validation[-1][1],
        "validation": validation,
        "step_milliseconds": round(1e3 * statistics.median(step_seconds), 3) if step_seconds else None,
    }


class Row(NamedTuple):
    """What a table shows of one contender, at its best learning rate.

    Attributes:
        name: The contender.
        learning_rate: The one with the lowest mean final loss.
        learning_rates: How many were tried.
        status: "finished", or "diverged" if a seed diverged at every learning rate.
        validation_loss: The final one, as the mean over seeds, in nats per byte; infinite if diverged.
        spread: The standard deviation over seeds; None for a single seed.
        steps_to_baseline: The first evaluation at which the mean curve is at or below the baseline's final loss; None
            if that never happens or the baseline is not among the runs.
        step_milliseconds: Median over the steps of all seeds, without compilation.
        state_bytes: Memory of the optimizer's state.
        parameter_bytes: Memory of the parameters.
        curve: Pairs of step and mean validation loss.
        low: The lowest seed's loss at each step of the curve.
        high: The highest seed's.
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


def summarize(runs: Sequence[Mapping[str, Any]], baseline: str = "adamw") -> list[Row]:
    """Reduces runs to one row per contender.

    Args:
        runs: Records from `compare`.
        baseline: The contender whose final loss the others are timed to.

    Returns:
        The rows, in the order in which the contenders first ran.
    """
    groups: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for record in runs:
        groups.setdefault(record["name"], {}).setdefault(record["learning_rate"], []).append(record)
    rows = []
    for by_rate in groups.values():
        best = min(by_rate.values(), key=_mean_final_loss)
        rows.append(_row(best, len(by_rate)))
    target = next((row.validation_loss for row in rows if row.name == baseline), -math.inf)
    if not math.isfinite(target):
        return rows
    return [
        row._replace(steps_to_baseline=next((step for step, loss in row.curve if loss <= target), None)) for row in rows
    ]


def _final_loss(record: Mapping[str, Any]) -> float:
    return math.inf if record["status"] == "diverged" else record["validation_loss"]


def _mean_final_loss(records: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(map(_final_loss, records))


def _row(records: Sequence[Mapping[str, Any]], learning_rates: int) -> Row:
    first, loss = records[0], _mean_final_loss(records)
    times = [record["step_milliseconds"] for record in records if record["step_milliseconds"] is not None]
    # Where a seed diverged, the curve ends at the last evaluation that all of them reached in good health.
    points = []
    for at_step in zip(*(record["validation"] for record in records), strict=False):
        losses = [value for _, value in at_step]
        if None in losses:
            break
        points.append((at_step[0][0], losses))
    several = len(records) > 1 and math.isfinite(loss)
    return Row(
        name=first["name"],
        learning_rate=first["learning_rate"],
        learning_rates=learning_rates,
        status="finished" if math.isfinite(loss) else "diverged",
        validation_loss=loss,
        spread=statistics.stdev(map(_final_loss, records)) if several else None,
        steps_to_baseline=None,
        step_milliseconds=statistics.median(times) if times else None,
        state_bytes=first["state_bytes"],
        parameter_bytes=first["parameter_bytes"],
        curve=[(step, statistics.fmean(losses)) for step, losses in points],
        low=[min(losses) for _, losses in points],
        high=[max(losses) for _, losses in points],
    )
