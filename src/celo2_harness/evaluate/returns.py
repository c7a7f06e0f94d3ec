"""Returns of reinforcement-learning runs: curves over seeds, their confidence, one table, one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from celo2_harness.evaluate.errors import InputError
from celo2_harness.evaluate.plots import _COLORS, _GRID
from celo2_harness.evaluate.records import read_lines
from celo2_harness.evaluate.train import METRICS

POINTS = 50
"""How many points a curve has."""
WINDOW = 0.1
"""Which part of a run, up to a point, the episodes come from whose mean the curve has there."""
RESAMPLES = 2000


class ReturnRun(NamedTuple):
    """What a picture needs of a run.

    Attributes:
        game: The game.
        label: The optimizer and its learning rate: runs with the same label differ in nothing but their seed.
        settings: All settings but the seed.
        seed: The seed.
        total: Agent steps that the run was to have.
        status: "finished", "diverged" or "unfinished".
        steps: The agent step at which each episode was over.
        returns: Of each episode.
    """

    game: str
    label: str
    settings: dict[str, Any]
    seed: int
    total: int
    status: str
    steps: Int64[np.ndarray, " episodes"]
    returns: Float64[np.ndarray, " episodes"]


class ReturnCurve(NamedTuple):
    """The runs of an optimizer on a game.

    Attributes:
        game: The game.
        label: The optimizer.
        runs: How many runs (seeds).
        diverged: How many of them diverged; they count with what they had reached.
        steps: Agent steps.
        mean: At each of them, the mean over runs of the mean return of the episodes that ended in the window before it;
            NaN where a run had none yet.
        low: Lower end of the 95% confidence interval of that mean.
        high: Its upper end.
        final: The last value of each run.
    """

    game: str
    label: str
    runs: int
    diverged: int
    steps: Float64[np.ndarray, " points"]
    mean: Float64[np.ndarray, " points"]
    low: Float64[np.ndarray, " points"]
    high: Float64[np.ndarray, " points"]
    final: list[float]


def find_return_runs(folders: Sequence[Path]) -> list[ReturnRun]:
    """Reads all runs of `celo2 reinforce` in folders, at any depth.

    Args:
        folders: Where to look; a run's own folder will do as well.

    Returns:
        The runs, by path. Folders of other commands are passed over.

    Raises:
        InputError: if there is none, or a file is damaged.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"plot: there is no folder {folder}")
        for path in sorted(folder.rglob(METRICS)):
            lines = read_lines(path)
            settings = lines[0].get("settings", {}) if lines else {}
            if "ppo" in settings:
                runs.append(_read_run(path, lines))
    if not runs:
        raise InputError(f"plot: no run of celo2 reinforce in {', '.join(map(str, folders))}")
    return runs


def _read_run(path: Path, lines: list[dict[str, Any]]) -> ReturnRun:
    try:
        settings = dict(lines[0]["settings"])
        run = settings.pop("run")
        optimizer = settings["optimizer"]
        episodes = [(line["step"], line["return"]) for line in lines if line["kind"] == "episode"]
        steps, returns = zip(*episodes, strict=True) if episodes else ((), ())
        return ReturnRun(
            settings["environment"]["game"],
            f"{optimizer['preset']}, learning rate {optimizer['learning_rate']:g}",
            settings | {"steps": run["steps"]},
            run["seed"],
            run["steps"],
            lines[-1]["status"] if lines[-1]["kind"] == "end" else "unfinished",
            np.array(steps, np.int64),
            np.array(returns, np.float64),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def return_curves(runs: Sequence[ReturnRun]) -> list[ReturnCurve]:
    """Puts the seeds of each optimizer together.

    The interval is that of a percentile bootstrap over runs: of two runs it is their range, which holds the true mean
    about every second time, and of one run there is none. What differs is said by the label; where runs of one label
    differ in more than their seed (other weights, another schedule), labels are numbered.

    Args:
        runs: From `find_return_runs`.

    Returns:
        One curve for each game and optimizer, games and labels in alphabetical order.

    Raises:
        InputError: if a run is there twice (same settings, same seed).
    """
    groups: list[tuple[dict[str, Any], list[ReturnRun]]] = []
    for run in sorted(runs, key=lambda run: (run.game, run.label, run.seed)):
        members = next((members for settings, members in groups if settings == run.settings), None)
        if members is None:
            groups.append((run.settings, members := []))
        if any(other.seed == run.seed for other in members):
            raise InputError(f"plot: {run.game}, {run.label}, seed {run.seed} is there twice; name fewer folders")
        members.append(run)
    names = [(members[0].game, members[0].label) for _, members in groups]
    curves = []
    for index, (_, members) in enumerate(groups):
        same = [other for other, name in enumerate(names) if name == names[index]]
        label = names[index][1] + (f" ({same.index(index) + 1})" if len(same) > 1 else "")
        curves.append(_curve(members, label))
    return curves


def _curve(runs: Sequence[ReturnRun], label: str) -> ReturnCurve:
    total = runs[0].total
    steps = np.linspace(0.0, total, POINTS + 1)[1:]
    means = np.array([_windowed_means(run, steps, WINDOW * total) for run in runs])
    low, high = bootstrap_interval(means)
    # A run that is under way, or diverged, has its last value where it stopped.
    final = [float(row[np.isfinite(row)][-1]) for row in means if np.isfinite(row).any()]
    diverged = sum(run.status == "diverged" for run in runs)
    return ReturnCurve(runs[0].game, label, len(runs), diverged, steps, means.mean(axis=0), low, high, final)


def _windowed_means(run: ReturnRun, steps: np.ndarray, window: float) -> Float64[np.ndarray, " points"]:
    sums = np.concatenate([[0.0], np.cumsum(run.returns)])
    # Rounding to whole updates lets the last episodes end a little after the last point.
    upto = np.where(steps >= run.total, len(run.steps), np.searchsorted(run.steps, steps, side="right"))
    since = np.searchsorted(run.steps, steps - window, side="right")
    counts = upto - since
    # Beyond where a run stopped the window would thin out to its very last episodes.
    reached = run.total if run.status == "finished" else run.steps.max(initial=0)
    counts = np.where(steps < reached + steps[0], counts, 0)
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


def plot_returns(curves: Sequence[ReturnCurve], path: Path) -> None:
    """Draws returns over agent steps, one panel per game, one line per optimizer, with its confidence band.

    Args:
        curves: From `return_curves`.
        path: Where the PNG goes.
    """
    # A figure without pyplot needs no display, keeps no global state and is freed with its last reference.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    games = sorted({curve.game for curve in curves})
    labels = sorted({curve.label for curve in curves})
    figure = Figure(figsize=(1.5 + 5 * len(games), 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    handles = {}
    for index, game in enumerate(games):
        axes = figure.add_subplot(1, len(games), index + 1, xlabel="agent steps (thousands)")
        if index == 0:
            axes.set_ylabel("return of an episode, not clipped")
        axes.set_title(game, loc="left", fontsize=11)
        axes.grid(**_GRID)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for curve in (curve for curve in curves if curve.game == game):
            color = _COLORS[labels.index(curve.label) % len(_COLORS)]
            style = ("-", "--", ":")[labels.index(curve.label) // len(_COLORS) % 3]
            (line,) = axes.plot(curve.steps / 1000, curve.mean, color=color, linestyle=style, linewidth=1.8)
            handles.setdefault(curve.label, line)
            if curve.runs > 1:
                axes.fill_between(curve.steps / 1000, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
        axes.set_xlim(left=0)
    runs = sorted({curve.runs for curve in curves})
    seeds = " to ".join(dict.fromkeys([str(runs[0]), str(runs[-1])])) + (" seed" if runs == [1] else " seeds")
    band = "" if runs == [1] else "; bands: 95% bootstrap interval over seeds"
    figure.suptitle(f"PPO, mean return over the last {WINDOW:.0%} of the run, {seeds}{band}", fontsize=11)
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 1 + 2 * len(games)),
        frameon=False,
    )
    figure.savefig(path)
