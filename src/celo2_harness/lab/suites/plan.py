"""Which runs a suite needs: first the whole search, then the winners on the seeds of the report."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from celo2_harness.lab.suites.suite import Suite


class Trial(NamedTuple):
    """A point of the search.

    Attributes:
        task: The label of the task.
        optimizer: The label of the optimizer.
        learning_rate: The peak learning rate.
        weight_decay: The weight decay of hidden matrices.
    """

    task: str
    optimizer: str
    learning_rate: float
    weight_decay: float


class Run(NamedTuple):
    """A trial with a seed."""

    trial: Trial
    seed: int


def grids(suite: Suite, only: str | None = None) -> list[list[Trial]]:
    """Returns the trials of every optimizer on every task, one list for each pair.

    Args:
        suite: The suite.
        only: A pattern that pairs must match: `TASK/OPTIMIZER` in labels, with * for anything, or any part of that.

    Returns:
        The trials.

    Example:
        >>> from celo2_harness.lab.suites import load_suite
        >>> [len(grid) for grid in grids(load_suite("stability"), only="adamw")]
        [24]
    """
    return [
        [Trial(task.label, o.label, rate, decay) for rate in o.learning_rates for decay in o.weight_decays]
        for task in suite.tasks
        for o in suite.optimizers
        if only is None or fnmatch.fnmatchcase(f"{task.label}/{o.label}", f"*{only}*")
    ]


def best_trial(grid: Sequence[Trial], seeds: Sequence[int], final: Mapping[Run, float]) -> Trial | None:
    """Chooses the trial with the lowest mean final loss.

    Args:
        grid: The trials, all of one optimizer on one task.
        seeds: The seeds of the selection.
        final: The final loss of each run, infinite for one that diverged or failed.

    Returns:
        The trial, the earlier one of equals; None while runs are missing, or if none has a finite mean.

    Example:
        >>> one, two = Trial("t", "adamw", 0.1, 0.0), Trial("t", "adamw", 0.2, 0.0)
        >>> best_trial([one, two], [0], {Run(one, 0): 2.0, Run(two, 0): 1.0}).learning_rate
        0.2
    """
    if any(Run(trial, seed) not in final for trial in grid for seed in seeds):
        return None
    means = {trial: sum(final[Run(trial, seed)] for seed in seeds) / len(seeds) for trial in grid}
    best = min(grid, key=lambda trial: means[trial])
    return best if means[best] < float("inf") else None


def plan(suite: Suite, final: Mapping[Run, float], only: str | None = None) -> list[Run]:
    """Returns the runs that are known to be needed, those that are done included, in the order to do them.

    Args:
        suite: The suite.
        final: The final loss of the runs that are done.
        only: A pattern; see `grids`.

    Returns:
        The runs. Those of the report come up once the search that they depend on is done.
    """
    selection, report = suite.search.selection_seeds, suite.search.report_seeds
    runs = []
    for grid in grids(suite, only):
        runs += [Run(trial, seed) for trial in grid for seed in selection]
        if set(report) != set(selection) and (best := best_trial(grid, selection, final)) is not None:
            runs += [Run(best, seed) for seed in report]
    return runs


def total_steps(suite: Suite, only: str | None = None) -> tuple[int, int]:
    """Returns how many runs a suite has, and how many steps they take together.

    Example:
        >>> from celo2_harness.lab.suites import load_suite
        >>> total_steps(load_suite("long"))
        (2, 40000)
    """
    selection, report = suite.search.selection_seeds, suite.search.report_seeds
    extra = 0 if set(report) == set(selection) else len(report)
    steps = {task.label: task.steps for task in suite.tasks}
    numbers = [(len(grid) * len(selection) + extra, steps[grid[0].task]) for grid in grids(suite, only)]
    return sum(number for number, _ in numbers), sum(number * steps for number, steps in numbers)
