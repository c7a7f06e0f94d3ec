"""The picture of a meta-training run."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from celo2_harness.lab.training.figures import line_style, new_axes


def plot_meta_loss(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws the meta-loss of every data set over a run: each line of metrics faint, their running mean.

    A line of metrics averages over tasks of all ages and scales, so lines jump about; the means are over a twentieth of
    the run.

    Args:
        lines: The lines of a metrics file, of which those of kind "progress" are drawn.
        path: The PNG file.
        title: The heading.
    """
    figure, axes = new_axes(title, "outer iteration", "meta-loss (nats)")
    lines = [line for line in lines if line["kind"] == "progress"]
    iterations = [line["step"] for line in lines]
    window = max(1, len(lines) // 20)
    for index, name in enumerate(lines[0]["meta_loss"] if lines else ()):
        losses = [line["meta_loss"][name] for line in lines]
        color, _ = line_style(index)
        sums = [0.0, *itertools.accumulate(losses)]
        means = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(losses))]
        marker = "o" if len(lines) == 1 else None
        axes.plot(iterations, losses, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(iterations, means, color=color, linewidth=2, marker=marker, label=f"{name}: {means[-1]:.3f}")
    if lines:
        axes.axhline(math.log(10), color="#666666", linewidth=1, linestyle="--", zorder=1, label="chance: ln 10")
        axes.legend(frameon=False)
    figure.savefig(path)
