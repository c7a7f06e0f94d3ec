"""One training run in a folder of its own: metrics, a picture, checkpoints, and resuming."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optax
from jax.sharding import Mesh

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites.plots import plot_training
from celo2_harness.lab.suites.records import (
    finite_or_none,
    prepare_folder,
    provenance,
    read_lines,
    write_errors,
    write_line,
    write_lines,
)
from celo2_harness.lab.tasks import Task
from celo2_harness.lab.training.locks import lock_folder
from celo2_harness.lab.training.loop import Progress, TrainState, fit, init_state
from celo2_harness.lab.training.orbax import Checkpoints, refuse_difference
from celo2_harness.lab.training.placed import PlacedTask

METRICS = "metrics.jsonl"
CURVE = "curve.png"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainConfig:
    """How long a run is and what it writes down when.

    Attributes:
        steps: Training steps.
        seed: Determines the initial parameters and the batches; 0 to 2^32 - 1.
        eval_every: Steps between evaluations.
        log_every: Steps between lines with the training loss.
        checkpoint_every: Steps between checkpoints. The last step is saved always.
    """

    steps: int
    seed: int = 0
    eval_every: int = 50
    log_every: int = 10
    checkpoint_every: int = 100

    def __post_init__(self):
        for name in ("steps", "eval_every", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed = {self.seed}: expected a number from 0 to {2**32 - 1}")


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
        status: "finished", "diverged" (the loss became NaN or infinite), or "interrupted" (saved and stopped).
        step: The steps taken.
        validation_loss: The last one written down; NaN or infinite where the run diverged.
        curve: The picture.
    """

    status: Literal["finished", "diverged", "interrupted"]
    step: int
    validation_loss: float
    curve: Path


def holds_run(folder: Path) -> bool:
    """Returns whether a folder holds a run."""
    return (folder / METRICS).exists() or (folder / CHECKPOINTS).exists()


def saved_options(folder: Path) -> dict[str, Any]:
    """Reads the options that a run was started with.

    Args:
        folder: The folder of a run.

    Returns:
        The options, as they were passed to `train`.

    Raises:
        InputError: if the folder holds no run, or its metrics file is damaged.
    """
    return _read_header(folder)["options"]


def _read_header(folder: Path) -> dict[str, Any]:
    if not holds_run(folder):
        raise InputError(f"resume: {folder} holds no run; check the folder, or start one without --resume")
    header = next(iter(read_lines(folder / METRICS)), {})
    if not all(isinstance(header.get(name), dict) for name in ("settings", "options")):
        raise InputError(f"resume: {folder / METRICS} does not start with the header of a run, so it cannot go on")
    return header


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run, the header first; empty where there is none yet."""
    lines = read_lines(path)
    for number, line in enumerate(lines[1:], start=2):
        # What the run itself needs of a line when it goes on.
        fits = isinstance(line.get("kind"), str) and isinstance(line.get("step"), int)
        if not fits or not isinstance(line.get("seconds"), int | float) or (line["kind"] == "end") > ("status" in line):
            raise InputError(f"{path} is damaged: line {number} is no line of a run")
    return lines


def train(
    task: Task,
    tx: optax.GradientTransformation,
    config: TrainConfig,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    title: str = "Training",
    resume: bool = False,
    mesh: Mesh | None = None,
    learning_rate: Callable[[int], Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[int], None] = lambda step: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> TrainResult:
    """Trains in a folder: metrics go to `metrics.jsonl`, a picture to `curve.png`, checkpoints to `checkpoints/`.

    A resumed run continues to the numbers that it would have reached without the interruption: `metrics.jsonl` is cut
    back to the last checkpoint, and from there on only its timings differ.

    Args:
        task: What to train.
        tx: The optimizer.
        config: Length and intervals.
        folder: The run folder, made where missing. One that holds a run is refused unless `resume`.
        settings: What else determines the numbers (model, data, optimizer), as JSON can hold it; written to the
            header, and a run with other settings is not resumed.
        options: What the caller wants to find again with `saved_options`; written to the header, never compared.
        title: The heading of the picture.
        resume: Continue the run in the folder from its last checkpoint, or from the start where it has none.
        mesh: Devices to train on; see `PlacedTask`. The numbers differ from those of one device by rounding, and a run
            may be resumed on another mesh.
        learning_rate: The learning rate as a function of the step, only to be written down.
        should_stop: Asked after every step; once it says yes, a checkpoint is saved and the run returns.
        on_start: Called with the step to start from, after everything was checked and restored.
        on_progress: Called after every step.

    Returns:
        How the run ended.

    Raises:
        InputError: if the folder cannot be used, another process works in it, or the run in it cannot be resumed:
            nothing in it was changed then. Or if it cannot be written any more: its checkpoints are whole then.
    """
    if mesh is not None:
        task = PlacedTask(task, mesh)
        task.batch(config.seed, 0)  # refuses a batch that does not divide before anything is written
    settings = {**settings, "run": {k: v for k, v in dataclasses.asdict(config).items() if k != "checkpoint_every"}}
    metrics = folder / METRICS
    if resume:
        refuse_difference(f"{metrics}", _read_header(folder)["settings"], settings)
    elif holds_run(folder):
        raise InputError(f"out: {folder} holds a run already; add --resume to continue it, or choose another folder")
    prepare_folder(folder)
    checkpoints = Checkpoints(folder / CHECKPOINTS)

    def safe() -> str:
        steps = checkpoints.steps()
        return f"the run is safe up to step {steps[-1] if steps else 0}: make room, then resume it"

    with write_errors(folder, safe), lock_folder(folder):
        lines = _read_metrics(metrics)
        if lines and lines[-1].get("kind") == "end":
            if not (folder / CURVE).exists():  # killed between the two
                plot_training(lines, folder / CURVE, title)
            return TrainResult(lines[-1]["status"], lines[-1]["step"], _last_validation_loss(lines), folder / CURVE)
        try:
            state = init_state(task, tx, config.seed)
            if resume and (steps := checkpoints.steps()):
                state = checkpoints.restore(steps[-1], state, settings)
            on_start(state.step)
            header = {"kind": "header", "settings": settings, "options": dict(options or {}), **provenance()}
            kept = [line for line in lines[1:] if line["step"] <= state.step] if state.step else []
            write_lines(metrics, [*lines[:1], *kept] if lines else [header])
            writer = _Writer(metrics, config, task.tokens_per_batch, learning_rate, kept)
            status, step = _run(task, tx, config, state, settings, checkpoints, writer, should_stop, on_progress)
        finally:
            checkpoints.close()
        lines = read_lines(metrics)
        plot_training(lines, folder / CURVE, title)
        return TrainResult(status, step, _last_validation_loss(lines), folder / CURVE)


def _run(
    task: Task,
    tx: optax.GradientTransformation,
    config: TrainConfig,
    state: TrainState,
    settings: Mapping[str, Any],
    checkpoints: Checkpoints,
    writer: "_Writer",
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None],
) -> tuple[Literal["finished", "diverged", "interrupted"], int]:
    for progress in fit(task, tx, state, steps=config.steps, seed=config.seed, eval_every=config.eval_every):
        state = progress.state
        if not writer.write(progress):
            writer.write_end("diverged", state.step)
            return "diverged", state.step
        on_progress(progress)
        if state.step and (state.step % config.checkpoint_every == 0 or state.step == config.steps):
            checkpoints.save(state, settings)
        if should_stop() and state.step < config.steps:
            checkpoints.save(state, settings)
            return "interrupted", state.step
    writer.write_end("finished", config.steps)
    return "finished", config.steps


class _Writer:
    """Writes the metrics of a run, line by line."""

    def __init__(
        self,
        path: Path,
        config: TrainConfig,
        tokens_per_batch: int,
        learning_rate: Callable[[int], Any] | None,
        written: list[dict[str, Any]],
    ):
        self._path = path
        self._config = config
        self._tokens_per_batch = tokens_per_batch
        self._learning_rate = learning_rate
        self._seconds_before = max((line["seconds"] for line in written), default=0.0)
        self._started = time.perf_counter()
        self._step_seconds: list[float] = []

    def write(self, progress: Progress) -> bool:
        """Writes what is due after a step; returns False if a loss was no longer a finite number."""
        step = progress.state.step
        if progress.step_seconds is not None:
            self._step_seconds.append(progress.step_seconds)
        losses = []
        due = step % self._config.log_every == 0 or step == self._config.steps
        if progress.loss is not None and due:
            losses.append(float(progress.loss))
            record = {"kind": "train", "step": step, "loss": finite_or_none(losses[-1])}
            if self._learning_rate is not None:
                record["learning_rate"] = float(self._learning_rate(step - 1))
            if self._step_seconds:
                mean = sum(self._step_seconds) / len(self._step_seconds)
                record["tokens_per_second"] = round(self._tokens_per_batch / mean)
                self._step_seconds.clear()
            write_line(self._path, record | self._time())
        if progress.validation_loss is not None:
            losses.append(progress.validation_loss)
            record = {"kind": "validation", "step": step, "loss": finite_or_none(losses[-1])}
            write_line(self._path, record | self._time())
        return all(map(math.isfinite, losses))

    def write_end(self, status: str, step: int) -> None:
        """Writes the last line."""
        write_line(self._path, {"kind": "end", "step": step, "status": status} | self._time())

    def _time(self) -> dict[str, float]:
        return {"seconds": round(self._seconds_before + time.perf_counter() - self._started, 3)}


def _last_validation_loss(lines: list[dict[str, Any]]) -> float:
    losses = [line["loss"] for line in lines if line.get("kind") == "validation"]
    return math.nan if not losses or losses[-1] is None else losses[-1]
