"""Tables of what was measured: final losses, differences with intervals, steps to the baseline's final loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from celo2_harness.lab.suites.significance import paired_difference

Record = Mapping[str, Any]


def summarize(records: Sequence[Record], baseline: str, steps: int, eval_every: int) -> str:
    """A table per model and text, and one of the means over all of them.

    Args:
        records: Runs, of selection and report.
        baseline: The label that others are compared with.
        steps: Of every run.
        eval_every: Steps between the points of curves.

    Returns:
        The text to print.
    """
    report = [r for r in records if r["phase"] == "report"]
    tasks = list(dict.fromkeys((r["model"], r["text_name"]) for r in report))
    labels = list(dict.fromkeys(r["stack"] for r in report))
    of = lambda task, label: [r for r in report if (r["model"], r["text_name"]) == task and r["stack"] == label]
    lines: list[str] = []
    for task in tasks:
        lines += ["", f"{task[0]}, {task[1]}", HEADING]
        finals = {r["seed"]: r["final"] for r in of(task, baseline)}
        target = np.mean(list(finals.values())) if finals else np.nan
        for label in labels:
            if runs := of(task, label):
                lines.append(_line(label, runs, finals, float(target), steps, eval_every))
    complete = [label for label in labels if all(of(task, label) for task in tasks)]
    if len(tasks) > 1 and baseline in complete:
        lines += ["", f"mean over {len(tasks)} tasks", f"{'':42}{'mean':>8}{'difference':>22}"]
        means = {label: _mean_by_seed([of(task, label) for task in tasks]) for label in complete}
        for label in complete:
            mean = np.mean(list(means[label].values()))
            lines.append(f"{label:42}{mean:8.4f}{_difference(means[label], means[baseline]):>22}")
    return "\n".join(lines) + "\n"


HEADING = (
    f"{'':42}{'mean':>8}{'difference':>22}{'steps to it':>12}{'hidden':>10}{'rest':>9}{'averaged 25':>13}{'100':>8}"
    f"{'mixed':>8}{'s/run':>7}"
)


def _line(
    label: str, runs: Sequence[Record], finals: Mapping[int, float], target: float, steps: int, eval_every: int
) -> str:
    mean = np.mean([r["final"] for r in runs])
    own = {r["seed"]: r["final"] for r in runs}
    reached = _steps_to(np.mean([r["curve"] for r in runs], axis=0), target, eval_every) / steps
    endings = [
        float(np.mean([r["endings"][name] for r in runs])) for name in ("average_25", "average_100", "mixed_100")
    ]
    averaged = f"{endings[0]:13.4f}{endings[1]:8.4f}{endings[2]:8.4f}"
    rates = f"{runs[0]['hidden_rate']:10.2g}{runs[0]['rest_rate']:9.2g}"
    return (
        f"{label:42}{mean:8.4f}{_difference(own, finals):>22}{reached:12.0%}{rates}{averaged}"
        f"{runs[0]['portion_seconds']:7.1f}"
    )


def _difference(finals: Mapping[int, float], others: Mapping[int, float]) -> str:
    difference = paired_difference(finals, others)
    if difference is None:
        return ""
    width = "" if difference.half_width is None else f" +- {difference.half_width:.4f}"
    return f"{difference.mean:+.4f}{width}"


def _steps_to(curve: np.ndarray, target: float, eval_every: int) -> float:
    """Where the curve reaches the target, between two points along a straight line; infinite where it does not."""
    below = np.flatnonzero(curve <= target + 1e-4)  # curves are rounded
    if not len(below):
        return float("inf")
    k = int(below[0])
    if k == 0:
        return float(eval_every)
    part = (curve[k - 1] - target) / (curve[k - 1] - curve[k])
    return float(eval_every * (k + part))


def _mean_by_seed(groups: Sequence[Sequence[Record]]) -> dict[int, float]:
    by_seed: dict[int, list[float]] = {}
    for runs in groups:
        for r in runs:
            by_seed.setdefault(r["seed"], []).append(r["final"])
    return {seed: float(np.mean(finals)) for seed, finals in by_seed.items() if len(finals) == len(groups)}
