"""Pictures of results: curves, learning rates, maps of the search, sizes of the parameters, returns of agents."""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from celo2_harness.lab.suites.results import Row, TaskResults, common_points
from celo2_harness.lab.suites.returns import WINDOW, ReturnCurve
from celo2_harness.lab.suites.tables import curves_by_game
from celo2_harness.lab.training.figures import add_legend, add_line, line_style, new_axes, new_figure, style_axes


class Picture(NamedTuple):
    """A picture in a file.

    Attributes:
        title: The title, which says what the picture shows.
        path: The PNG file.
    """

    title: str
    path: Path


def draw(results: TaskResults, folder: Path) -> list[Picture]:
    """Draws what there is to draw of a task.

    Args:
        results: The runs.
        folder: The folder of the PNG files, which must exist.

    Returns:
        The pictures.
    """
    stem = re.sub(r"[^a-z0-9]+", "-", f"{results.title} {results.steps}".lower()).strip("-")
    pictures = []
    for kind, (title, plot) in _KINDS.items():
        path = folder / f"{stem}-{kind}.png"
        if plot(results, path, f"{results.title}, {results.steps:,} steps"):
            pictures.append(Picture(f"{results.title}: {title}", path))
    return pictures


def plot_curves(results: TaskResults, path: Path, title: str) -> bool:
    """Draws the held-out loss of every optimizer at its best trial; the band is the range over seeds,
    and the dashed line is the final loss of the baseline."""
    if not any(row.points for row in results.rows):
        return False
    figure, axes = new_axes(title, ylabel=f"held-out loss ({results.unit})")
    tops, lows = [], []
    for index, row in enumerate(results.rows):
        if not row.points:
            continue
        steps, losses = zip(*row.curve, strict=True)
        label = f"{row.name}, learning rate {row.learning_rate:g}"
        if math.isinf(row.loss):
            label += " (diverged)"
        else:
            label += f": {row.loss:.3f}"
            lows.append(min(losses))
            # The fall from the start would squeeze the part where the curves differ into a stripe.
            tops.append(next((loss for step, loss in row.curve if step >= steps[-1] / 10), losses[0]))
        color = add_line(axes, index, steps, losses, label)
        low, high = ([end(of_seeds) for _, of_seeds in row.points] for end in (min, max))
        if low != high:
            axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        if row is results.baseline and math.isfinite(row.loss):
            axes.axhline(row.loss, color=color, linewidth=1, linestyle="--", zorder=1)
    if lows:
        margin = 0.05 * (max(tops) - min(lows)) or 0.1
        axes.set_ylim(min(lows) - margin, max(tops) + margin)
    add_legend(axes, outside=len(axes.lines) > 6)
    figure.savefig(path)
    return True


def plot_learning_rates(results: TaskResults, path: Path, title: str) -> bool:
    """Draws the final loss against the learning rate, at the best weight decay; the band is the range over seeds."""
    figure, axes = new_axes(title, "learning rate", f"final held-out loss ({results.unit})")
    axes.set_xscale("log")
    several, everything, dead = False, [], []
    for index, row in enumerate(results.rows):
        color, marker = line_style(index)
        points = []
        for rate, losses in sorted(_by_rate(results, row.name).items()):
            if math.isfinite(statistics.fmean(losses)):
                points.append((rate, statistics.fmean(losses), min(losses), max(losses)))
            else:
                dead.append((rate, color))
        several |= len(points) > 1
        if not points:
            continue
        rates, means, low, high = zip(*points, strict=True)
        everything += means
        axes.plot(rates, means, color=color, marker=marker, linewidth=1.8, markersize=6, label=row.name)
        axes.fill_between(rates, low, high, color=color, alpha=0.2, linewidth=0)
    if not several:
        return False
    # Trials that barely learned would squeeze the others into a stripe; they leave the picture at the top.
    best, worst = min(everything), max(everything)
    top = min(worst, best + 4 * (statistics.median(everything) - best) if len(everything) > 2 else worst)
    margin = 0.06 * (top - best) or 0.1
    axes.set_ylim(best - margin, top + margin)
    for number, (rate, color) in enumerate(dead):
        # Beside each other where several diverged at one learning rate.
        rate *= 1.08 ** [other for other, _ in dead[:number]].count(rate)
        axes.plot([rate], [top + margin], marker="x", color=color, markersize=9, markeredgewidth=2, clip_on=False)
    if dead:
        axes.plot([], [], marker="x", color="#555555", linestyle="none", label="diverged or failed")
    add_legend(axes, outside=True)
    figure.savefig(path)
    return True


def _by_rate(results: TaskResults, name: str) -> dict[float, list[float]]:
    """The final losses of each learning rate by seed, at the weight decay with the best mean."""
    trials: dict[float, dict[float | None, list[float]]] = {}
    for record in results.searched():
        if record.name == name:
            by_decay = trials.setdefault(record.learning_rate, {})
            by_decay.setdefault(record.weight_decay, []).append(record.final_loss)
    return {rate: min(by_decay.values(), key=statistics.fmean) for rate, by_decay in trials.items()}


def plot_maps(results: TaskResults, path: Path, title: str) -> bool:
    """Draws a map of learning rates and weight decays for each optimizer, on one scale of colours."""
    maps = [(row.name, *_map(results, row.name)) for row in results.rows]
    maps = [m for m in maps if len(m[1]) > 1 and len(m[2]) > 1]
    if not maps:
        return False
    finite = sorted(loss for *_, cells in maps for line in cells for loss in line if loss is not None)
    finite = [loss for loss in finite if math.isfinite(loss)] or [0.0]
    # The worst tenth shares a colour: runs that went wrong would otherwise take the whole scale.
    low, high = finite[0], finite[int(0.9 * (len(finite) - 1))]
    columns = min(3, len(maps))
    lines = -(-len(maps) // columns)
    widest, tallest = max(len(m[1]) for m in maps), max(len(m[2]) for m in maps)
    size = (columns * (0.62 * widest + 1.1) + 1, lines * (0.42 * tallest + 1.2) + 0.5)
    figure = new_figure(max(size[0], 6.0), max(size[1], 3.0))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    grid = figure.subplots(lines, columns, squeeze=False)
    image: Any = None
    for axes, (name, rates, decays, cells) in zip(grid.flat, maps, strict=False):
        shown = [[loss if loss is not None and math.isfinite(loss) else math.nan for loss in line] for line in cells]
        axes.set_facecolor("#bbbbbb")
        image = axes.imshow(shown, cmap="viridis_r", vmin=low, vmax=high, aspect="auto", origin="lower")
        for i, line in enumerate(cells):
            for j, loss in enumerate(line):
                text = "" if loss is None else "×" if not math.isfinite(loss) else f"{loss:.2f}"
                dark = loss is not None and math.isfinite(loss) and (loss - low) > 0.55 * (high - low)
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], fontsize=8, rotation=45)
        axes.set_yticks(range(len(decays)), [f"{decay:g}" for decay in decays], fontsize=8)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("learning rate", fontsize=9)
        axes.set_ylabel("weight decay", fontsize=9)
    for axes in list(grid.flat)[len(maps) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=grid, fraction=0.04, pad=0.02)
    bar.set_label(f"final loss ({results.unit})\n× diverged or failed", fontsize=9)
    figure.savefig(path)
    return True


def _map(results: TaskResults, name: str) -> tuple[list[float], list[float], list[list[float | None]]]:
    """Learning rates, weight decays, and mean final losses with one line per weight decay."""
    trials: dict[tuple[float, float], list[float]] = {}
    for record in results.searched():
        if record.name == name and record.weight_decay is not None:
            trials.setdefault((record.learning_rate, record.weight_decay), []).append(record.final_loss)
    rates, decays = sorted({rate for rate, _ in trials}), sorted({decay for _, decay in trials})
    means = {trial: statistics.fmean(losses) for trial, losses in trials.items()}
    return rates, decays, [[means.get((rate, decay)) for rate in rates] for decay in decays]


def plot_training(results: TaskResults, path: Path, title: str) -> bool:
    """Draws the training loss of every optimizer at its best trial, between evaluations: the mean, over seeds too, and
    as a thin line the largest loss of any step."""
    lines = []
    for index, row in enumerate(results.rows):
        runs = [run for run in row.runs if run.training_peak]
        means = common_points([run.training for run in runs])
        highest = dict(common_points([run.training_peak for run in runs]))
        # The first interval falls from the start and would squeeze the rest into a stripe.
        points = [(step, statistics.fmean(values), max(highest[step])) for step, values in means[1:] if step in highest]
        if len(points) > 1:
            lines.append((index, row, points))
    if not lines:
        return False
    figure, axes = new_axes(title, ylabel=f"training loss ({results.unit})")
    for index, row, points in lines:
        steps, means, high = zip(*points, strict=True)
        color = add_line(axes, index, steps, means, _label(row))
        axes.plot(steps, high, color=color, linewidth=0.8, alpha=0.6)  # bands of several would be one mud
    add_legend(axes, outside=True)
    figure.savefig(path)
    return True


def plot_parameter_rms(results: TaskResults, path: Path, title: str) -> bool:
    """Draws the root mean square of the parameters over the best trial of every optimizer."""
    curves = [common_points([run.parameter_rms for run in row.runs]) for row in results.rows]
    if not any(len(points) > 1 for points in curves):
        return False
    figure, axes = new_axes(title, ylabel="root mean square of the parameters")
    values: list[float] = []
    for index, (row, points) in enumerate(zip(results.rows, curves, strict=True)):
        if len(points) > 1:
            means = [statistics.fmean(of_seeds) for _, of_seeds in points]
            add_line(axes, index, [step for step, _ in points], means, _label(row))
            values += means
    if max(values) > 20 * min(values) > 0:
        axes.set_yscale("log")
    add_legend(axes, outside=True)
    figure.savefig(path)
    return True


def _label(row: Row) -> str:
    decay = "" if row.weight_decay is None else f", weight decay {row.weight_decay:g}"
    return f"{row.name}, learning rate {row.learning_rate:g}{decay}"


def plot_returns(curves: Sequence[ReturnCurve], path: Path) -> None:
    """Draws returns over agent steps: a panel per game, a line per optimizer, its confidence band, thin lines for runs.

    Args:
        curves: The curves, from `return_curves`.
        path: The PNG file.
    """
    games = curves_by_game(curves)
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


_Plot = Callable[[TaskResults, Path, str], bool]
# Name in the file -> title, and what draws it or returns False where there is nothing to draw.
_KINDS: dict[str, tuple[str, _Plot]] = {
    "curves": ("held-out loss", plot_curves),
    "learning-rates": ("final loss by learning rate", plot_learning_rates),
    "maps": ("final loss by learning rate and weight decay", plot_maps),
    "training": ("training loss", plot_training),
    "parameters": ("size of the parameters", plot_parameter_rms),
}
