"""The look of all pictures of this package, and the picture of one training run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours: told apart with every kind of colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dv<>"
_GRID = {"color": "#dddddd", "linewidth": 0.8}


def new_figure(width: float, height: float) -> Any:
    """Returns an empty figure of a size in inches."""
    # A figure without pyplot needs no display, keeps no global state and is freed with its last reference.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(title: str, xlabel: str = "step", ylabel: str = "loss (nats per byte)") -> tuple[Any, Any]:
    """Returns a figure and its axes."""
    figure = new_figure(8.0, 5.0)
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    style_axes(axes, title)
    return figure, axes


def style_axes(axes: Any, title: str) -> None:
    """Gives axes a title and the look of all pictures."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(**_GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def line_style(index: int) -> tuple[str, str]:
    """Returns the colour and the marker of the line of an index; pairs repeat after 49."""
    return COLORS[index % len(COLORS)], _MARKERS[(index + index // len(COLORS)) % len(_MARKERS)]


def add_line(axes: Any, index: int, xs: Sequence[int | float], ys: Sequence[int | float], label: str) -> str:
    """Adds the line of an index, with a dozen markers along it; returns its colour."""
    color, marker = line_style(index)
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


def plot_run(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws the losses of one training run.

    Args:
        lines: The lines of its metrics.
        path: The PNG file.
        title: The title.
    """
    figure, axes = new_axes(title)
    for name, label, style in (
        ("loss", "training, mean since the line before", {"color": "#9db8cc", "linewidth": 1.2}),
        ("validation_loss", "held-out", {"color": COLORS[1], "linewidth": 2, "marker": "o", "markersize": 4}),
    ):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(path)
