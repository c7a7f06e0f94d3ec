"""Draws the two figures of the guide: the pipeline from gradient to step, and the network of the rule.

    python docs/figures.py

The background is transparent and every colour has enough contrast to a white and to a dark page.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import celo2_harness as c2
from celo2_harness.rule import channel_counts

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

IMAGES = Path(__file__).parent / "images"
INK = "#7d8596"  # text and arrows outside of boxes
STATE, NETWORK, MATRIX, PLAIN, REST = "#3f63b5", "#8a4fb0", "#b0553a", "#56708a", "#2f7f6d"
POSITIVE, NEGATIVE = "#4d7fe0", "#d9703f"


def box(axes: Axes, x: float, y: float, width: float, title: str, note: str, colour: str) -> None:
    """A rounded box with its centre at (x, y): a title, and what happens in it."""
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.31), width, 0.62, boxstyle="round,pad=0,rounding_size=0.09", color=colour, lw=0
    )
    axes.add_patch(shape)
    axes.text(x, y + 0.12, title, color="white", ha="center", va="center", fontsize=11, weight="bold")
    axes.text(x, y - 0.14, note, color="white", ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, lw=1.5, shrinkA=0, shrinkB=0)
    )


def bracket(axes: Axes, x: float, top: float, bottom: float, text: str) -> None:
    """A bracket left of the boxes from top to bottom, and the public block that does their work."""
    axes.plot([x + 0.1, x, x, x + 0.1], [top, top, bottom, bottom], color=INK, lw=1.2)
    axes.text(
        x - 0.1,
        (top + bottom) / 2,
        text,
        color=INK,
        ha="right",
        va="center",
        fontsize=9.5,
        family="monospace",
        weight="bold",
    )


HIDDEN_BOXES = [
    ("statistics", "momenta, squares, row and column means", STATE),
    ("30 channels", "products of these, each divided by its RMS", STATE),
    ("network", "30 → 8 → 8 → 1 for every entry", NETWORK),
    ("Newton-Schulz", "all singular values go to about one", MATRIX),
    ("RMS normalisation", "every matrix gets RMS one", MATRIX),
    ("weight decay", "+ w p", PLAIN),
    ("learning rate", "× −η", PLAIN),
]


def draw_pipeline(path: Path) -> None:
    """From a gradient to a step, as `celo2_ortho` goes it."""
    figure, axes = plt.subplots(figsize=(9.6, 8.0))
    left, right, middle, pitch = 4.75, 9.0, 6.8, 0.86
    wide, narrow = 4.5, 3.1
    first = 6.9
    heights = [first - i * pitch for i in range(len(HIDDEN_BOXES))]
    box(axes, middle, first + 2.1, wide, "gradient", "a tree of arrays, like the parameters", PLAIN)
    box(axes, middle, first + 1.24, wide, "routing", "names, shapes → label, matrix view", PLAIN)
    arrow(axes, (middle, first + 1.78), (middle, first + 1.57))
    for y, (title, note, colour) in zip(heights, HIDDEN_BOXES, strict=True):
        box(axes, left, y, wide, title, note, colour)
    for above, below in zip(heights, heights[1:], strict=False):
        arrow(axes, (left, above - 0.32), (left, below + 0.33))
    rest = [(heights[2], "AdamW", "moments of its own", REST)]
    rest += [(heights[5], "weight decay", "+ w′ p", PLAIN), (heights[6], "learning rate", "× −20 η", PLAIN)]
    for y, title, note, colour in rest:
        box(axes, right, y, narrow, title, note, colour)
    for (above, *_), (below, *_) in zip(rest, rest[1:], strict=False):
        arrow(axes, (right, above - 0.32), (right, below + 0.33))
    arrow(axes, (middle - 1.2, first + 0.92), (left + 0.3, first + 0.33))
    arrow(axes, (middle + 1.2, first + 0.92), (right, heights[2] + 0.33))
    axes.text(left - 0.75, first + 0.62, "hidden matrices", color=INK, ha="center", fontsize=10.5, weight="bold")
    text = "embeddings, heads,\nnorms and biases"
    axes.text(right + 0.75, first + 0.2, text, color=INK, ha="center", va="center", fontsize=10.5, weight="bold")
    end = heights[-1] - 1.05
    box(axes, middle, end, wide, "step", "added to the parameters", PLAIN)
    arrow(axes, (left + 0.3, heights[-1] - 0.32), (middle - 1.0, end + 0.33))
    arrow(axes, (right - 0.3, heights[-1] - 0.32), (middle + 1.0, end + 0.33))
    edge = left - wide / 2 - 0.15
    bracket(axes, edge, heights[0] + 0.27, heights[2] - 0.27, "celo2_direction")
    bracket(axes, edge, heights[3] + 0.27, heights[3] - 0.27, "orthogonalize")
    bracket(axes, edge, heights[4] + 0.27, heights[4] - 0.27, "normalize_rms")
    bracket(axes, edge, heights[5] + 0.27, heights[5] - 0.27, "add_decayed_weights")
    bracket(axes, edge, heights[6] + 0.27, heights[6] - 0.27, "scale_by_learning_rate")
    axes.set(xlim=(-0.3, 10.75), ylim=(end - 0.4, first + 2.5), aspect="equal")
    save(figure, axes, path)


# How the groups of channels are told in the figure.
LABELS = {
    "gradient": "gradient g",
    "clipped_gradient": "g clipped to ±0.1",
    "parameter": "parameter p",
    "momentum": "momenta m",
    "second_moment": "second moment v",
    "momentum_over_rms": "m / √v",
    "inverse_rms": "1 / √v",
    "factored_gradient": "g over factored root",
    "gradient_over_rms": "g / √v",
    "row_moment": "row moments r",
    "column_moment": "column moments c",
    "inverse_row_rms": "1 / √r",
    "inverse_column_rms": "1 / √c",
    "factored_momentum": "m over factored root",
}


def draw_network(path: Path) -> None:
    """The network with the bundled weights: lines are the numbers, thicker where larger."""
    weights = c2.load_weights("celo2")
    theta = weights.theta
    figure, axes = plt.subplots(figsize=(9.6, 6.2))
    columns = [3.0, 6.0, 8.4, 10.4]
    gap, heights = 0.34, []
    position = 0.0
    for count, feature in zip(channel_counts(weights.config), weights.config.features, strict=True):
        rows = [position + i * 0.25 for i in range(count)]
        heights += rows
        label = LABELS[feature] + (f"  × {count}" if count > 1 else "")
        axes.text(columns[0] - 0.25, -np.mean(rows), label, color=INK, ha="right", va="center", fontsize=9.5)
        if count > 1:
            axes.plot([columns[0] - 0.14] * 2, [-rows[0] + 0.08, -rows[-1] - 0.08], color=INK, lw=1.2)
        position = rows[-1] + gap
    centre = -np.mean([heights[0], heights[-1]])
    spread = lambda count, step: [centre + step * ((count - 1) / 2 - i) for i in range(count)]
    layers = [[-h for h in heights], spread(8, 0.95), spread(8, 0.95), [centre]]
    kernels = [np.asarray(theta.w0), np.asarray(theta.w1), np.asarray(theta.w2)[:, :1]]
    for i, kernel in enumerate(kernels):
        largest = np.abs(kernel).max()
        for j, k in np.ndindex(kernel.shape):
            size = abs(kernel[j, k]) / largest
            axes.plot(
                [columns[i], columns[i + 1]],
                [layers[i][j], layers[i + 1][k]],
                color=POSITIVE if kernel[j, k] > 0 else NEGATIVE,
                lw=0.25 + 2.2 * size,
                alpha=0.15 + 0.85 * size,
                solid_capstyle="round",
                zorder=1,
            )
    for column, places, colour, size in zip(
        columns, layers, (STATE, NETWORK, NETWORK, MATRIX), (34, 190, 190, 300), strict=True
    ):
        axes.scatter([column] * len(places), places, s=size, color=colour, zorder=2, linewidths=0)
    top = 0.75
    for column, text in zip(
        columns, (f"{len(heights)} channels\n÷ RMS", "8 units\nReLU", "8 units\nReLU", "direction"), strict=True
    ):
        height = top if text != "direction" else centre + 0.75
        axes.text(column, height, text, color=INK, ha="center", va="center", fontsize=10.5, weight="bold")
    used = sum(kernel.size for kernel in kernels) + 8 + 8 + 1
    stored = sum(np.asarray(x).size for x in theta)
    axes.text(
        columns[3],
        centre - 1.1,
        f"{used} numbers\nof {stored} in the file",
        color=INK,
        ha="center",
        va="center",
        fontsize=9.5,
    )
    for place, colour, text in ((-0.55, POSITIVE, "positive"), (-0.95, NEGATIVE, "negative")):
        x = columns[3] - 0.75
        axes.plot([x, x + 0.4], [layers[0][-1] - place - 0.9] * 2, color=colour, lw=2.4)
        axes.text(x + 0.5, layers[0][-1] - place - 0.9, text, color=INK, va="center", fontsize=9.5)
    axes.set(xlim=(0.2, 11.5), ylim=(-heights[-1] - 0.4, 1.15))
    save(figure, axes, path)


def save(figure: plt.Figure, axes: Axes, path: Path) -> None:
    axes.axis("off")
    figure.savefig(path, transparent=True, bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    matplotlib.rcParams.update({"svg.hashsalt": "celo2", "font.family": "DejaVu Sans"})
    draw_pipeline(IMAGES / "pipeline.svg")
    draw_network(IMAGES / "network.svg")
