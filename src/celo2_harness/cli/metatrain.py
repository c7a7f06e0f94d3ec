"""`celo2 metatrain`: learn a rule on small image tasks."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

from celo2_harness.cli._setup import input_errors
from celo2_harness.evaluate import InputError, StopSignals
from celo2_harness.metatrain import MetaTrainConfig, run_metatrain


@dataclasses.dataclass(frozen=True)
class Config:
    """Meta-train the rule with persistent evolution strategies on 8x8 image tasks.

    Metrics, a checkpoint and at the end weights.celo2 go to a folder. Ctrl-C saves and stops; --resume goes on.
    """

    data: str = "digits"
    """digits (scikit-learn's), or a folder of NAME_8x8.npz files."""
    sets: tuple[str, ...] = ()
    """Image sets of the folder; by default all."""
    start_from: str | None = None
    """Weights to begin with: a bundled name or a file; by default random ones."""
    out: Path = Path("runs/metatrain")
    """Folder of the run."""
    resume: bool = False
    """Continue the run in the folder; give the same options."""
    variant: Literal["ortho", "base"] = "ortho"
    """ortho: Newton-Schulz on matrices, Adam on biases; base: the learned rule alone."""
    hidden: int = 8
    """Units of each hidden layer of the rule."""
    tasks_per_set: int = 8
    """Inner tasks per image set, each an antithetic pair."""
    iterations: int = 100_000
    """Outer iterations."""
    truncation: int = 50
    """Inner steps per outer iteration."""
    longest_unroll: int = 2000
    """Longest inner run, in steps."""
    augmentation: float = 1000.0
    """Bound of the scale augmentation; 1 switches it off."""
    outer_learning_rate: float = 5e-5
    """Learning rate of the outer AdamW."""
    outer_schedule: Literal["constant", "cosine"] = "constant"
    """Course of the outer learning rate."""
    seed: int = 0
    """Of everything random."""
    checkpoint_every: int = 100
    """Iterations between checkpoints."""
    log_every: int = 10
    """Iterations between lines of metrics."""


_RUN_OPTIONS = ("data", "sets", "start_from", "out", "resume", "checkpoint_every", "log_every")


def run(config: Config) -> int:
    """Meta-trains; returns 0 if the run finished, 130 if it was interrupted."""
    options = dataclasses.asdict(config)
    run_options = {name: options.pop(name) for name in _RUN_OPTIONS}
    with input_errors():
        meta_config = MetaTrainConfig(**options)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("metatrain"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with StopSignals() as stop, Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("metatrain", total=config.iterations, status="compiling")

        def show(line: dict[str, Any]) -> None:
            losses = "  ".join(f"{name} {loss:.3f}" for name, loss in line["meta_loss"].items())
            speed = f"{line['iterations_per_second']:.2f} it/s"
            progress.update(task, completed=line["iteration"], status=f"{losses}  {speed}")
            if progress.disable:
                print(f"iteration {line['iteration']}/{config.iterations}  {losses}  {speed}", flush=True)

        try:
            with input_errors():
                weights = run_metatrain(meta_config, on_log=show, stop=lambda: stop.requested, **run_options)
        except ImportError as error:
            raise InputError(str(error)) from error
    if weights is None:
        print(f"saved; go on with the same options and --resume --out {config.out}", file=sys.stderr)
        return 130
    print(f"weights: {config.out / 'weights.celo2'}")
    return 0
