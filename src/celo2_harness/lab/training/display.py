"""What a run shows while it goes: a bar in a terminal, a line now and then elsewhere."""

import datetime
import sys
import time
from typing import Any

from celo2_harness.lab.training.folder import Progress

_REFRESH_SECONDS = 0.2
_LINE_SECONDS = 15.0


class Display:
    """Shows how far the work is, how it does, and how long it will take. Use it as a context manager.

    One display is for one run, or for several runs whose steps are counted together.

    Args:
        unit: The unit of the speed, which is shown as so many of them per second.
        per_step: The number of units that a step takes.
    """

    def __init__(self, unit: str = "steps", per_step: int = 1):
        self._unit, self._per_step = unit, per_step
        self.name, self._total, self._step = "", 0, 0
        self._shown, self._stepped, self._seconds = time.monotonic(), None, None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Display":
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            # The time left is ours: the bar's own estimate would count what an earlier process did as done at once.
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[status]}"))
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, name: str, total: int, step: int = 0, status: str = "compiling") -> None:
        """Starts to show a run, or the next one.

        Args:
            name: What to call it.
            total: The last step.
            step: The step that it starts from.
            status: What is done before the first step.
        """
        first = not self.name
        self.name, self._total, self._step = name, total, step
        self._stepped = None
        if self._bar is None:
            if step and first:
                print(f"{name}: goes on from step {step}", flush=True)
            return
        if self._task is None:
            self._task = self._bar.add_task(name, total=total, status=status)
        self._bar.update(self._task, description=name, total=total, completed=step, status=status)

    def update(self, progress: Progress) -> None:
        """Shows a step, if it is notable or the last one shown was some time ago."""
        now, step = time.monotonic(), progress.step
        if self._stepped is not None and step > self._step:
            # A moving average: single steps jump about on a shared machine.
            seconds = (now - self._stepped) / (step - self._step)
            self._seconds = seconds if self._seconds is None else 0.9 * self._seconds + 0.1 * seconds
        if step > self._step:  # The first step of a run compiles, so that speed is measured from its end.
            self._stepped, self._step = now, step
        due = now - self._shown > (_LINE_SECONDS if self._bar is None else _REFRESH_SECONDS)
        if not (due or progress.notable or step >= self._total):
            return
        self._shown = now
        parts = [progress.text(), self._speed()]
        if self._bar is None:
            print("  ".join(filter(None, [f"{self.name}: step {step}/{self._total}", *parts])), flush=True)
        else:
            self._bar.update(self._task, completed=step, status="  ".join(filter(None, parts)))

    def note(self, text: str) -> None:
        """Shows a line that stays, above the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _speed(self) -> str:
        if not self._seconds:
            return ""
        left = datetime.timedelta(seconds=round((self._total - self._step) * self._seconds))
        return f"{self._per_step / self._seconds:,.4g} {self._unit}/s" + (f"  {left} left" if left else "")
