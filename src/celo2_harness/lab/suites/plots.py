"""Pictures of runs, made from their records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from celo2_harness.lab.suites.rows import Row

_GRID = {"color": "#dddddd", "linewidth": 0.8}
# Okabe and Ito's colours: told apart with every kind of colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dv<>"


def new_axes(title: str, xlabel: str = "step", ylabel: str = "loss (nats per byte)") -> tuple[Any, Any]:
    """Returns a figure and its axes, in the look of all pictures of this package."""
    figure = new_figure(8.0, 5.0)
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    style_axes(axes, title)
    return figure, axes


def new_figure(width: float, height: float) -> Any:
    """Returns an empty figure of a size in inches."""
    # A figure without pyplot needs no display, keeps no global state and is freed with its last reference.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Any, title: str) -> None:
    """Gives axes a title and the look of all pictures of this package."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(**_GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def look(index: int) -> tuple[str, str]:
    """Returns the colour and the marker of the nth line; pairs repeat after 49."""
    return _COLORS[index % len(_COLORS)], _MARKERS[(index + index // len(_COLORS)) % len(_MARKERS)]


def add_line(axes: Any, index: int, xs: Sequence[int | float], ys: Sequence[int | float], label: str) -> str:
    """Adds the nth line, with a dozen markers along it; returns its colour."""
    color, marker = look(index)
    every = max(1, len(xs) // 12)
    axes.plot(xs, ys, color=color, marker=marker, markevery=every, markersize=5, linewidth=1.8, label=label)
    return color


def add_legend(axes: Any, outside: bool) -> None:
    """Adds a legend, beside the axes where it would cover lines."""
    if outside:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
        axes.figure.set_figwidth(10.5)
    else:
        axes.legend(frameon=False)


def plot_training(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws the losses of one run.

    Args:
        lines: The records of its metrics file.
        path: Where the PNG goes.
        title: The heading.
    """
    figure, axes = new_axes(title)
    for kind, label, color, width, marker in (
        ("train", "training batch", "#9db8cc", 1.2, None),
        ("validation", "held-out text", _COLORS[1], 2, "o"),
    ):
        points = [(line["step"], line["loss"]) for line in lines if line["kind"] == kind and line["loss"] is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), color=color, linewidth=width, marker=marker, markersize=4, label=label
            )
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(path)


def plot_comparison(
    rows: Sequence[Row], path: Path, title: str, baseline: str = "adamw", unit: str = "nats per byte"
) -> None:
    """Draws the validation curves of several contenders, with the range over seeds as a band.

    Args:
        rows: What to draw, from `summarize`.
        path: Where the PNG goes.
        title: The heading.
        baseline: The contender whose final loss gets a dashed line.
        unit: Of the loss.
    """
    figure, axes = new_axes(title, ylabel=f"held-out loss ({unit})")
    tops, lows = [], []
    for index, row in enumerate(rows):
        if not row.curve:
            continue
        steps, losses = zip(*row.curve, strict=True)
        label = f"{row.name}, learning rate {row.learning_rate:g}"
        if row.status == "diverged":
            label += " (diverged)"
        else:
            label += f": {row.validation_loss:.3f}"
            lows.append(min(losses))
            # The fall from the start would squeeze the part where the curves differ into a stripe.
            tops.append(next((loss for step, loss in row.curve if step >= steps[-1] / 10), losses[0]))
        color = add_line(axes, index, steps, losses, label)
        if any(high > low for low, high in zip(row.low, row.high, strict=True)):
            axes.fill_between(steps, row.low, row.high, color=color, alpha=0.2, linewidth=0)
        if row.name == baseline and row.status == "finished":
            axes.axhline(row.validation_loss, color=color, linewidth=1, linestyle="--", zorder=1)
    if lows:
        margin = 0.05 * (max(tops) - min(lows)) or 0.1
        axes.set_ylim(min(lows) - margin, max(tops) + margin)
    if axes.lines:
        add_legend(axes, outside=len(axes.lines) > 6)
    figure.savefig(path)
