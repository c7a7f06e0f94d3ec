"""Draws the held-out loss of the stacks over the run, from runs that are kept: the mean over the seeds of the report.

    python -m benchmarks.stacks.picture

Reads meta-training/linear/runs.jsonl, writes docs/images/stacks.png. A panel for every model and text; the fall of the
first half is left out, since the lines would lie on each other.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from celo2_harness.lab.training.figures import add_line, new_figure, style_axes

ROOT = Path(__file__).parents[2]
RUNS, PICTURE = ROOT / "meta-training" / "linear" / "runs.jsonl", ROOT / "docs" / "images" / "stacks.png"
EVAL_EVERY = 100
# Name in the runs -> in the picture; from the highest end to the lowest, in the mean over the panels.
STACKS = {
    "Muon": "Muon",
    "Muon, three numbers": "Muon, three numbers",
    "SOAP": "SOAP",
    "SOAP, three numbers": "SOAP, three numbers",
    "second search": "searched rule, acting in the basis",
}
PANELS = (("nano-64", "perl-doc.txt"), ("nano-64", "tinyshakespeare.txt"), ("nano", "perl-doc.txt"),
          ("nano", "tinyshakespeare.txt"))  # fmt: skip
WIDTHS = {"nano-64": 64, "nano": 128}
TEXTS = {"perl-doc.txt": "English documentation", "tinyshakespeare.txt": "tiny-Shakespeare"}


def mean_curve(runs: Sequence[dict[str, Any]], stack: str, model: str, text: str) -> tuple[list[int], list[float]]:
    """Steps, and the mean loss over the seeds."""
    wanted = ("report", stack, model, text)
    curves = [run["curve"] for run in runs if (run["phase"], run["stack"], run["model"], run["text"]) == wanted]
    assert len(curves) == 8, wanted
    return [EVAL_EVERY * (k + 1) for k in range(len(curves[0]))], np.mean(curves, axis=0).tolist()


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Heights for labels in falling order, moved so that neighbours are a gap apart and their mean stays."""
    found = list(values)
    for _ in range(100):
        for k in range(len(found) - 1):
            short = gap - (found[k] - found[k + 1])
            if short > 0:
                found[k] += short / 2
                found[k + 1] -= short / 2
    return found


def main() -> None:
    """Draws the picture."""
    runs = [json.loads(line) for line in RUNS.read_text().splitlines()]
    figure = new_figure(10.5, 9.0)
    for number, (model, text) in enumerate(PANELS):
        axes = figure.add_subplot(2, 2, number + 1)
        curves = {stack: mean_curve(runs, stack, model, text) for stack in STACKS}
        for index, (stack, label) in enumerate(STACKS.items()):
            add_line(axes, index, *curves[stack], label)
        style_axes(axes, f"{model} (width {WIDTHS[model]}), {TEXTS[text]}")
        axes.set_xlim(480, 1075)
        axes.set_xticks(range(500, 1001, 100))
        steps, muon = curves["Muon"]
        lowest, highest = min(min(losses) for _, losses in curves.values()), muon[steps.index(500)]
        span = highest - lowest
        axes.set_ylim(lowest - 0.05 * span, highest + 0.03 * span)
        ends = sorted(((losses[-1], axes.lines[k].get_color()) for k, (_, losses) in enumerate(curves.values())),
                      reverse=True)  # fmt: skip
        for (end, color), height in zip(ends, apart([end for end, _ in ends], 0.045 * span), strict=True):
            axes.text(1012, height, f"{end:.3f}", color=color, va="center", fontsize=9)
        if number % 2 == 0:
            axes.set_ylabel("held-out loss (nats per byte)")
        if number >= 2:
            axes.set_xlabel("step")
        if number == 0:
            axes.legend(frameon=False, loc="upper right")
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
