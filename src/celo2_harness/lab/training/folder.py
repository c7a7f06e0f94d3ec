"""A run in a folder: its metrics, its checkpoints, and going on after a stop or a kill.

Every kind of run (a training run, a trial of a suite, an agent, a meta-training run) writes the same folder:

    metrics.jsonl    {"kind": "header", "settings", "options", "versions", "device", "commit"}
                     {"kind": "progress" or a kind of the run's own, "step", "seconds", measures by name ...}
                     {"kind": "end", "step", "seconds", "status"}
    checkpoints/     the newest two states, one file each
    lock             which process works here

and goes through the same loop:

    with open_run(folder, settings, resume=resume) as run:
        step, state = run.begin(initial_state)
        status = run.follow(generator_of_progress(step, state), steps=1000, checkpoint_every=100)
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.training.checkpoints import fit_to, read_checkpoint, write_checkpoint
from celo2_harness.lab.training.locks import lock_folder
from celo2_harness.lab.training.provenance import provenance
from celo2_harness.lab.training.settings import refuse_difference
from celo2_harness.weights.files import replace_file

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
KEEP = 2
"""How many checkpoints a run folder keeps."""

Status = Literal["finished", "diverged", "interrupted"]


class Progress(NamedTuple):
    """The report of a run of any kind after a step.

    Attributes:
        step: The number of steps taken. The same unit counts in metrics and checkpoints.
        state: A tree of arrays, which a checkpoint holds. It may be given away to the next step.
        lines: The lines to write down: measures by name, with a "kind" other than "progress" and a "step" other
            than this one where they apply. Often there is nothing.
        diverged: Whether the run ends here, because a loss is not a finite number.
        text: Says how the run does, for the display. It is called only where that is shown, since it may have to wait
            for the step.
        notable: Whether the display shows the text at once, and not only now and then.
    """

    step: int
    state: Any
    lines: tuple[Mapping[str, Any], ...] = ()
    diverged: bool = False
    text: Callable[[], str] = str
    notable: bool = False


@contextmanager
def open_run(
    path: Path, settings: Mapping[str, Any], *, options: Mapping[str, Any] | None = None, resume: bool = False
) -> Iterator["RunFolder"]:
    """Opens the folder of a run, in which no other process works meanwhile.

    Args:
        path: The folder. It is made if missing; a folder that holds a run is refused unless `resume`.
        settings: The settings that determine the numbers of the run, as JSON can hold them. A run with other
            settings is not resumed.
        options: Facts that `read_header` finds again. They are written down, never compared.
        resume: Whether to continue the run in the folder.

    Yields:
        The folder.

    Raises:
        InputError: If the folder cannot be used, another process works in it, or the run in it is another one; nothing
            in it was changed then. Also if it cannot be written any more; its checkpoints are whole then.
    """
    settings = json.loads(json.dumps(settings))  # As it comes back from a file, with lists for tuples.
    if resume:
        refuse_difference(str(path / METRICS), read_header(path)["settings"], settings)
    elif holds_run(path):
        raise InputError(f"out: {path} holds a run already; add --resume to continue it, or choose another folder")
    prepare_folder(path)
    run = RunFolder(path, settings, dict(options or {}))

    def safe() -> str:
        return f"the run is safe up to step {next(iter(run.saved_steps()), 0)}: make room, then resume it"

    with write_errors(path, safe), lock_folder(path):
        run.read()
        yield run


class RunFolder:
    """The folder of a run; see `open_run`.

    Attributes:
        path: The folder.
        header: The first line of the metrics.
        lines: The other lines of the metrics, so far.
        step: The number of steps taken.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], options: Mapping[str, Any]):
        self.path = path
        self.header: dict[str, Any] = {"kind": "header", "settings": settings, "options": options}
        self.lines: list[dict[str, Any]] = []
        self.step = 0
        self._is_new = True
        self._started = time.perf_counter()

    def read(self) -> None:
        """Reads what is in the folder."""
        path = self.path / METRICS
        if lines := read_lines(path):
            self.header, self.lines, self._is_new = lines[0], lines[1:], False
        for number, line in enumerate(self.lines, start=2):
            numbers = isinstance(line.get("step"), int) and isinstance(line.get("seconds"), int | float)
            if not numbers or (line.get("kind") == "end") != ("status" in line):
                raise InputError(f"{path} is damaged: line {number} is no line of a run")
            self.step = line["step"]

    @property
    def status(self) -> Status | None:
        """How the run ended; None if it has not."""
        return self.lines[-1].get("status") if self.lines else None

    def saved_steps(self) -> list[int]:
        """Returns the steps of the checkpoints, the newest first."""
        names = (file.stem for file in (self.path / CHECKPOINTS).glob("*.checkpoint"))
        return sorted(map(int, filter(str.isdecimal, names)), reverse=True)

    def begin(self, state: Any, step: int = 0) -> tuple[int, Any]:
        """Returns where the run starts: at its newest checkpoint, or else at the given state.

        Metrics after that are cut off: the run will write them again.

        Args:
            state: The state of a new run, which also gives structure, shapes, dtypes and devices to a restored one.
            step: The step of that state.

        Raises:
            InputError: If the checkpoint cannot be read or is of other arrays; nothing in the folder was changed then.
        """
        if saved := self.saved_steps():
            file = self._checkpoint(saved[0])
            facts, arrays = read_checkpoint(file)
            refuse_difference(f"checkpoint {file}", facts.get("settings", {}), self.header["settings"])
            step, state = saved[0], fit_to(state, arrays, f"checkpoint {file}")
        if self._is_new:
            self.header |= provenance()
        there = itertools.takewhile(lambda line: line.get("kind") != "end", self.lines if saved else ())
        self.lines = [line for line in there if line["step"] <= step]
        content = "".join(json.dumps(line) + "\n" for line in [self.header, *self.lines])
        replace_file(self.path / METRICS, content.encode())
        self._started = time.perf_counter() - max((line["seconds"] for line in self.lines), default=0.0)
        self.step = step
        return step, state

    def follow(
        self,
        progress: Iterator[Progress],
        *,
        steps: int,
        checkpoint_every: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> Status:
        """Follows a run to its end: writes down what it says, and saves its state.

        Args:
            progress: The run, as a generator that starts where `begin` says.
            steps: The last step.
            checkpoint_every: Steps between checkpoints, for which the last step counts too; 0 for none at all.
            should_stop: Asked after every step. Once it says yes, the state is saved and the run is interrupted.
            on_progress: Called after every step.

        Returns:
            How the run ended.
        """
        for now in progress:
            before, self.step = self.step, now.step
            for line in now.lines:
                self.write(**{"step": now.step, **line})
            on_progress(now)
            if now.diverged:
                self.write(kind="end", step=now.step, status="diverged")
                return "diverged"
            last = now.step >= steps
            stop = not last and should_stop()
            # A step here may be several: it is enough to have passed a multiple.
            if checkpoint_every and (last or stop or now.step // checkpoint_every > before // checkpoint_every):
                self.save(now.step, now.state)
            if stop:
                return "interrupted"
        self.write(kind="end", step=steps, status="finished")
        return "finished"

    def write(self, *, step: int, kind: str = "progress", **measures: Any) -> None:
        """Writes a line of metrics. Numbers that are not finite become null, for which alone JSON has a word."""
        seconds = round(time.perf_counter() - self._started, 3)
        line = {"kind": kind, "step": step, **_finite(measures), "seconds": seconds}
        self.lines.append(line)
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def save(self, step: int, state: Any) -> None:
        """Writes a checkpoint, and returns when it is on the disk; of those before, the newest stays."""
        if step in self.saved_steps():
            return
        (self.path / CHECKPOINTS).mkdir(exist_ok=True)
        write_checkpoint(self._checkpoint(step), state, {"settings": self.header["settings"]})
        for old in self.saved_steps()[KEEP:]:
            self._checkpoint(old).unlink()

    def _checkpoint(self, step: int) -> Path:
        return self.path / CHECKPOINTS / f"{step:08}.checkpoint"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def holds_run(path: Path) -> bool:
    """Returns whether a folder holds a run."""
    return (path / METRICS).exists() or (path / CHECKPOINTS).exists()


def read_header(path: Path) -> dict[str, Any]:
    """Returns the first line of the metrics of a run, with the "settings" and "options" that it was started with.

    Args:
        path: The folder of the run.

    Raises:
        InputError: If the folder holds no run, or its metrics are damaged.
    """
    if not holds_run(path):
        raise InputError(f"resume: {path} holds no run; check the folder, or start one without --resume")
    header = next(iter(read_lines(path / METRICS)), {})
    if not all(isinstance(header.get(name), dict) for name in ("settings", "options")):
        raise InputError(f"resume: {path / METRICS} does not start with the header of a run, so it cannot go on")
    return header


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines; a last line that a kill has cut short is left out.

    Args:
        path: The file. A missing one counts as empty.

    Raises:
        InputError: If the file cannot be read, or a line before the last is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError
            records.append(record)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise InputError(f"{path} is damaged: line {number} is not a JSON record") from None
    return records


def prepare_folder(folder: Path) -> None:
    """Makes a folder with its parents where missing, and checks that it can be written.

    Raises:
        InputError: If it is a file, or cannot be made or written.
    """
    probe = folder / ".write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"out: cannot write to {folder}: {error.strerror or error}; choose another folder") from None


@contextmanager
def write_errors(folder: Path, safe: Callable[[], str]) -> Iterator[None]:
    """Says what a full disk or a missing permission means for the work in a folder.

    Args:
        folder: The folder.
        safe: Returns what is safe, and how to go on.

    Raises:
        InputError: In place of an `OSError`.
    """
    try:
        yield
    except BrokenPipeError:  # Of the reader of what is printed, not of the folder.
        raise
    except OSError as error:
        raise InputError(f"out: cannot write to {folder}: {error.strerror or error}; {safe()}") from error
