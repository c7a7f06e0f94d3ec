"""What a report says of reinforcement-learning runs: two tables, one picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from celo2_harness.lab.suites.pictures import Picture
from celo2_harness.lab.suites.plots import add_line, new_figure, style_axes
from celo2_harness.lab.suites.report import Section
from celo2_harness.lab.suites.returns import RETURNS, WINDOW, ReturnCurve, return_curves
from celo2_harness.lab.suites.tables import NONE, Table


def return_sections(records: Sequence[Mapping[str, Any]], folder: Path | None) -> list[Section]:
    """The section of reinforcement-learning runs; with a folder for it, its picture too."""
    curves = return_curves(records)
    pictures = []
    if folder is not None:
        pictures.append(Picture("returns over agent steps", folder / f"{RETURNS}.png"))
        plot_returns(curves, pictures[0].path)
    return [Section(RETURNS, [common_table(curves), runs_table(curves)], pictures)]


def common_table(curves: Sequence[ReturnCurve]) -> Table:
    """Returns the optimizers side by side, a line per game, as far as all runs of the game have come.

    Args:
        curves: From `return_curves`.
    """
    labels = sorted({curve.label for curve in curves})
    rows = []
    for game, here in _by_game(curves).items():
        reached = min(_end(curve, run)[0] for curve in here for run in curve.runs)
        cells = {curve.label: _all_seeds(curve, reached) for curve in here}
        rows.append([game, f"{reached:,.0f}", *(cells.get(label, NONE) for label in labels)])
    note = (
        "Mean return of the episodes in the tenth of the run before that agent step, the last that all runs of the "
        "game have come to: mean over seeds, and of each seed in brackets."
    )
    return Table("Returns, as far as all runs have come", ["game", "agent steps", *labels], rows, [note])


def runs_table(curves: Sequence[ReturnCurve]) -> Table:
    """Returns every run, with its return where it ended.

    Args:
        curves: From `return_curves`.
    """
    rows = []
    for curve in curves:
        for seed, status, run in zip(curve.seeds, curve.statuses, curve.runs, strict=True):
            step, final = _end(curve, run)
            rows.append([curve.game, curve.label, str(seed), status, f"{step:,.0f}", f"{final:.1f}" if step else NONE])
    headings = ["game", "optimizer", "seed", "run", "agent steps", "return"]
    note = "Mean return of the episodes in the tenth of the run before its end, or before where it is."
    return Table("Returns of every run", headings, rows, [note])


def plot_returns(curves: Sequence[ReturnCurve], path: Path) -> None:
    """Draws returns over agent steps: a panel per game, a line per optimizer, its confidence band, thin lines for runs.

    Args:
        curves: From `return_curves`.
        path: Where the PNG goes.
    """
    games = _by_game(curves)
    labels = sorted({curve.label for curve in curves})
    figure = new_figure(1.5 + 5.0 * len(games), 4.6)
    handles: dict[str, Any] = {}
    for index, (game, here) in enumerate(games.items()):
        axes = figure.add_subplot(1, len(games), index + 1, xlabel="agent steps (thousands)")
        if index == 0:
            axes.set_ylabel("return of an episode, not clipped")
        style_axes(axes, game)
        for curve in here:
            xs = curve.steps / 1000
            color = add_line(axes, labels.index(curve.label), xs.tolist(), curve.mean.tolist(), curve.label)
            handles[curve.label] = axes.lines[-1]
            if len(curve.runs) > 1:
                axes.plot(xs, curve.runs.T, color=color, linewidth=1, alpha=0.7)
                axes.fill_between(xs, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
        axes.set_xlim(0, max(curve.steps[-1] for curve in here) / 1000)
    fewest, most = min(len(curve.seeds) for curve in curves), max(len(curve.seeds) for curve in curves)
    seeds = f"{most} seed{'s' * (most > 1)}" if fewest == most else f"{fewest} to {most} seeds"
    band = " (thin lines), 95% bootstrap interval" if most > 1 else ""
    figure.suptitle(f"PPO, mean return over the last {WINDOW:.0%} of the run, {seeds}{band}", fontsize=11)
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 1 + 2 * len(games)),
        frameon=False,
    )
    figure.savefig(path)


def _by_game(curves: Sequence[ReturnCurve]) -> dict[str, list[ReturnCurve]]:
    games = sorted({curve.game for curve in curves})
    return {game: [curve for curve in curves if curve.game == game] for game in games}


def _end(curve: ReturnCurve, run: Float64[np.ndarray, " points"]) -> tuple[float, float]:
    """The last point of a run: agent step and return; step 0 where no episode has ended."""
    there = np.flatnonzero(np.isfinite(run))
    return (float(curve.steps[there[-1]]), float(run[there[-1]])) if len(there) else (0.0, math.nan)


def _all_seeds(curve: ReturnCurve, step: float) -> str:
    index = int(np.searchsorted(curve.steps, step, side="right")) - 1
    if index < 0 or math.isnan(curve.mean[index]):
        return NONE
    each = ", ".join(f"{value:.1f}" for value in curve.runs[:, index])
    return f"{curve.mean[index]:.1f}" + (f" ({each})" if len(curve.runs) > 1 else "")
