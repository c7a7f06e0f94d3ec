"""What a run shows while it goes: a bar in a terminal, a line now and then elsewhere."""

import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from celo2_harness.lab import suites as evaluate

_REFRESH_SECONDS = 0.2
_LINE_SECONDS = 15.0


class Display:
    """Shows the progress of one run after another. Use as a context manager, and call `start` before each run.

    Args:
        tokens_per_batch: Predictions per step, for the speed.
    """

    def __init__(self, tokens_per_batch: int):
        self._tokens_per_batch = tokens_per_batch
        self._bar = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
        self._name, self._steps, self._task = "", 0, None
        self._shown, self._seconds, self._validation_loss = 0.0, None, None

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def start(self, name: str, steps: int, step: int = 0) -> None:
        """Starts the display of a run.

        Args:
            name: What to call it.
            steps: Its length.
            step: Where it starts.
        """
        self._name, self._steps = name, steps
        self._shown, self._seconds, self._validation_loss = 0.0, None, None
        if self._bar:
            self._task = self._bar.add_task(name, total=steps, completed=step, status="compiling")
        elif step:
            print(f"{name}: goes on from step {step}", flush=True)

    def update(self, progress: evaluate.Progress) -> None:
        """Shows a step.

        Args:
            progress: What the training loop yields.
        """
        step = progress.state.step
        if progress.step_seconds is not None:
            # A moving average: single steps jump about on a shared machine.
            old = progress.step_seconds if self._seconds is None else self._seconds
            self._seconds = 0.9 * old + 0.1 * progress.step_seconds
        if progress.validation_loss is not None:
            self._validation_loss = progress.validation_loss
        now = time.monotonic()
        due = now - self._shown > (_REFRESH_SECONDS if self._bar else _LINE_SECONDS)
        if not (due or progress.validation_loss is not None or step == self._steps):
            return
        self._shown = now
        parts = [] if progress.loss is None else [f"loss {float(progress.loss):.3f}"]
        if self._validation_loss is not None and (self._bar or progress.validation_loss is not None):
            parts.append(f"held-out loss {self._validation_loss:.3f}")
        if self._seconds:
            parts.append(f"{self._tokens_per_batch / self._seconds:,.0f} tokens/s")
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, status="  ".join(parts))
        else:
            print(f"{self._name}: step {step}/{self._steps}  {'  '.join(parts)}", flush=True)
