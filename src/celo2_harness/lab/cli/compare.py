"""`celo2 compare`: several optimizers on one task, one table and one picture."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from celo2_harness import harness
from celo2_harness.lab.cli._progress import Display
from celo2_harness.lab.cli._setup import default_learning_rate, input_errors, make_optimizer
from celo2_harness.lab.suites import (
    CompareConfig,
    Contender,
    InputError,
    Row,
    StopSignals,
    compare,
    plot_comparison,
    summarize,
)
from celo2_harness.lab.tasks import make_language_model


@dataclass(frozen=True)
class Config:
    """Train the same GPT with several optimizers and compare them.

    Results go to a folder as they come; runs that are there already are not repeated.
    """

    preset: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--presets"])] = ("celo2_ortho", "muon", "adamw")
    """Optimizers; `celo2 presets` lists them."""
    learning_rate: Annotated[tuple[float, ...], tyro.conf.arg(aliases=["--learning-rates"])] = ()
    """Peak learning rates; each preset is run at each of them and its best is shown. By default the preset's own."""
    seed: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seeds"])] = (0,)
    """Each run is repeated with each of these seeds."""
    text: Path | None = None
    """Text file to learn from, of any kind; by default the language reference that comes with Python."""
    model: str = "nano"
    """Size of the model: nano (0.9 million parameters), small (11), gpt2 (86) or gpt3-xl (1213)."""
    steps: int = 300
    """Training steps of each run."""
    batch: int = 16
    """Windows per step."""
    context: int | None = None
    """Window length in bytes; by default the model's."""
    schedule: str = "warmup_cosine"
    """Course of the learning rate over the run."""
    warmup: float = 0.05
    """Part of the run in which the learning rate rises."""
    weight_decay: float = 0.1
    """Weight decay."""
    weights: str | None = None
    """Weights of the learned rule: a name, a file or hf://owner/repo; by default the preset's."""
    state_dtype: str = "float32"
    """Of the learned rule's state: float32 or bfloat16."""
    dtype: str = "float32"
    """What the model computes in: float32 or bfloat16."""
    param_dtype: str = "float32"
    """What the parameters are kept in: float32 or bfloat16."""
    out: Path = Path("runs/compare")
    """Folder of the results."""
    eval_every: int = 25
    """Steps between evaluations on the held-out end of the text."""


def run(config: Config) -> int:
    """Compares; returns 0 when all runs are done, diverged ones included, and 130 if it was interrupted."""
    compare_config = CompareConfig(config.steps, config.seed, config.eval_every)
    with input_errors():
        task = make_language_model(
            config.model,
            config.text,
            config.batch,
            context=config.context,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
        )
    contenders = _contenders(config)
    total = len(contenders) * len(config.seed)
    with StopSignals() as stop, Display(task.tokens_per_batch) as display:
        comparison = compare(
            task,
            contenders,
            compare_config,
            config.out,
            settings=task.describe(),
            should_stop=lambda: stop.requested,
            on_start=lambda contender, seed: display.start(
                f"{contender.name} {contender.learning_rate:g} seed {seed}", config.steps
            ),
            on_progress=display.update,
        )
    if comparison.found:
        print(f"{comparison.found} of {total} runs were in {config.out} already")
    if not comparison.complete:
        done = len(comparison.runs)
        print(f"interrupted after {done} of {total} runs; the same command goes on from there", file=sys.stderr)
        return 130
    rows = summarize(comparison.runs)
    picture = config.out / "compare.png"
    seeds = "1 seed" if len(config.seed) == 1 else f"{len(config.seed)} seeds"
    plot_comparison(rows, picture, f"{config.model}, {config.steps} steps of {task.tokens_per_batch} bytes, {seeds}")
    Console(width=None if sys.stdout.isatty() else 120).print(_table(rows))
    print(f"runs: {config.out / 'compare.jsonl'}\npicture: {picture}")
    return 0


def _contenders(config: Config) -> list[Contender]:
    if not config.preset or len(set(config.preset)) < len(config.preset):
        raise InputError(f"preset = {list(config.preset)}: expected one or more different names")
    if len(set(config.learning_rate)) < len(config.learning_rate):
        raise InputError(f"learning_rate = {list(config.learning_rate)}: expected different numbers")
    contenders, presets = [], harness.presets()
    for preset in config.preset:
        default = default_learning_rate(preset)
        for rate in config.learning_rate or (default,):
            arguments = {
                "preset": preset,
                "learning_rate": rate,
                "total_steps": config.steps,
                "weight_decay": config.weight_decay,
                "schedule": config.schedule,
                "warmup": config.warmup,
                "weights": config.weights if presets[preset].learned else None,
                "state_dtype": config.state_dtype,
            }
            contenders.append(Contender(preset, rate, make_optimizer(**arguments), arguments))
    if config.weights is not None and not any(presets[preset].learned for preset in config.preset):
        raise InputError(f"weights = {config.weights!r}: none of the presets has a learned rule; leave it out")
    return contenders


def _table(rows: Sequence[Row]) -> Table:
    table = Table("preset", box=None, pad_edge=False, header_style="bold")
    for heading in ("learning rate", "held-out loss", "steps to adamw's", "ms per step", "optimizer state"):
        table.add_column(heading, justify="right")
    finished = [row.validation_loss for row in rows if row.status == "finished"]
    for row in rows:
        loss = "diverged" if row.status == "diverged" else f"{row.validation_loss:.4f}"
        if row.spread is not None:
            loss += f" ± {row.spread:.4f}"
        table.add_row(
            row.name,
            f"{row.learning_rate:g}" + (f" (best of {row.learning_rates})" if row.learning_rates > 1 else ""),
            loss,
            "-" if row.steps_to_baseline is None else str(row.steps_to_baseline),
            "-" if row.step_milliseconds is None else f"{row.step_milliseconds:.1f}",
            f"{_human(row.state_bytes)} ({row.state_bytes / row.parameter_bytes:.2f}x)",
            style="bold" if len(finished) > 1 and row.validation_loss == min(finished) else None,
        )
    table.caption = "optimizer state: in brackets, relative to the parameters"
    table.caption_justify = "left"
    return table


def _human(size: int | float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
