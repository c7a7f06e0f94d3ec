"""Pictures of runs, made from their records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_GRID = {"color": "#dddddd", "linewidth": 0.8}
# Okabe and Ito's colours: told apart with every kind of colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dv<>"


def _axes(title: str) -> tuple[Any, Any]:
    # A figure without pyplot needs no display, keeps no global state and is freed with its last reference.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per byte)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(**_GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def plot_training(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the losses of one run.

    Args:
        lines: The records of its metrics file.
        path: Where the PNG goes.
    """
    settings = lines[0].get("settings", {}) if lines else {}
    figure, axes = _axes(str(settings.get("title", "Training")))
    for kind, color, width, marker in (("train", "#9db8cc", 1.2, None), ("validation", _COLORS[1], 2, "o")):
        points = [(line["step"], line["loss"]) for line in lines if line["kind"] == kind and line["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width, marker=marker, markersize=4, label=kind)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(path)
