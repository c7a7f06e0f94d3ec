"""`celo2 evaluate`: a suite of tasks, optimizers, learning rates, weight decays and seeds."""

import dataclasses
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from celo2_harness.lab import suites as evaluate
from celo2_harness.lab.cli._optimizers import make_contender
from celo2_harness.lab.cli._setup import input_errors
from celo2_harness.lab.suites import InputError, Run, State, StopSignals, Suite, SuiteTask, load_suite, run_suite
from celo2_harness.lab.suites.runner import RUNS
from celo2_harness.lab.suites.suite import check_trials, suites
from celo2_harness.lab.tasks import Task, make_task

_REFRESH_SECONDS = 0.2
_LINE_SECONDS = 30.0

# Several words after one option, and the option several times.
_Words = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class Config:
    """Run a suite: every optimizer with every learning rate, weight decay and seed on every task.

    Results go to a folder as they come. Runs that are there already are not repeated, and several commands may work in
    one folder, on several machines too if it is shared. `celo2 report` makes tables and pictures of it.
    """

    suite: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(help=f"A built-in suite ({', '.join(suites())}), or a TOML file.")
    ]
    out: Path | None = None
    """Folder of the results; by default runs/ and the suite's name."""
    processes: int = 1
    """Runs that go on at the same time, each in a process of its own."""
    data: _Words = ()
    """NAME=PATH: a file or folder for a task, or for all tasks of a kind."""
    only: str | None = None
    """Leave out what does not match: a part of TASK/OPTIMIZER, * stands for anything."""
    optimizer: Annotated[_Words, tyro.conf.arg(aliases=["--optimizers"])] = ()
    """More optimizers by import path, such as mypackage.mymodule:make."""
    retry_failed: bool = False
    """Do runs again that stopped with an error."""


def run(config: Config) -> int:
    """Runs the suite; returns 0 when all runs are done, diverged and failed ones included, and 130 if interrupted."""
    if config.processes < 1:
        raise InputError(f"processes = {config.processes}: expected at least 1")
    suite = _suite(config)
    folder = _folder(config, suite)
    with StopSignals() as stop, _Display(suite) as display:
        started = [False]

        def on_state(state: State) -> None:
            # The others start once everything has been checked and something is left to do.
            if not started[0] and state.runs < state.total:
                started[0] = True
                helpers.extend(_start(config, n) for n in range(1, config.processes))
            display.show(state)

        helpers: list[Any] = []
        try:
            complete = _work(suite, folder, config, lambda: stop.requested, display, on_state)
        finally:
            for helper in helpers:
                if stop.requested or sys.exc_info()[0] is not None:
                    helper.terminate()
                helper.join()
    if not complete:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    print(f"runs: {folder / RUNS}\nnext: celo2 report {folder}")
    return 0


def _work(suite: Suite, folder: Path, config: Config, should_stop: Any, display: Any, on_state: Any) -> bool:
    paths = dict(map(_data, itertools.chain(*config.data)))
    unknown = set(paths) - {task.label for task in suite.tasks} - {task.name for task in suite.tasks}
    if unknown:
        names = ", ".join(dict.fromkeys(name for task in suite.tasks for name in (task.label, task.name)))
        raise InputError(f"data: there is no task {min(unknown)!r}; expected some of {names}")

    def task_of(task: SuiteTask) -> Task:
        with input_errors():
            return make_task(task.name, task.size, paths.get(task.label, paths.get(task.name, task.data)), task.batch)

    return run_suite(
        suite,
        folder,
        make_task=task_of,
        make_contender=lambda *arguments: make_contender(suite, *arguments),
        only=config.only,
        retry_failed=config.retry_failed,
        should_stop=should_stop,
        on_state=on_state,
        on_start=display.start,
        on_progress=display.step,
        on_end=display.end,
    )


def _start(config: Config, number: int) -> Any:
    """Starts a process that works on the same folder."""
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    # Failed runs are retried once, by the first process.
    config = dataclasses.replace(config, retry_failed=False)
    helper = context.Process(target=_help, args=(config, os.getpid()), name=f"celo2-evaluate-{number}")
    helper.start()
    return helper


def _help(config: Config, parent: int) -> None:
    suite = _suite(config)
    with StopSignals() as stop:
        # Whoever kills the first process alone means all of them.
        _work(
            suite,
            _folder(config, suite),
            config,
            lambda: stop.requested or os.getppid() != parent,
            _Silent(),
            lambda state: None,
        )


def _suite(config: Config) -> Suite:
    suite = load_suite(config.suite)
    if config.optimizer:
        sys.path.insert(0, os.getcwd())
        more = tuple(
            evaluate.read_optimizer({"make": path}, suite.search, Path(), f"optimizer {path}")
            for path in itertools.chain(*config.optimizer)
        )
        suite = dataclasses.replace(suite, optimizers=suite.optimizers + more)
        check_trials(suite)
    elif any(optimizer.kind == "make" for optimizer in suite.optimizers):
        sys.path.insert(0, os.getcwd())
    return suite


def _folder(config: Config, suite: Suite) -> Path:
    return Path("runs") / suite.name if config.out is None else config.out


def _data(word: str) -> tuple[str, Path]:
    name, _, path = word.partition("=")
    if not name or not path:
        raise InputError(f"data = {word!r}: expected NAME=PATH")
    return name, Path(path)


class _Silent:
    """Shows nothing."""

    def start(self, run: Run) -> None: ...

    def step(self, progress: evaluate.Progress) -> None: ...

    def end(self, run: Run, record: Mapping[str, Any]) -> None: ...


class _Display:
    """A bar over the steps of all runs in a terminal; elsewhere a line per run, and now and then within one."""

    def __init__(self, suite: Suite):
        from rich.progress import BarColumn, Progress, TextColumn

        self._suite, self._name, self._steps = suite, "", 0
        self._state, self._shown = None, time.monotonic()
        self._begun: tuple[float, int] | None = None
        columns = (TextColumn(suite.name), BarColumn(bar_width=None), TextColumn("{task.fields[status]}"))
        self._bar = Progress(*columns, disable=not sys.stdout.isatty())
        self._task = self._bar.add_task(suite.name, total=None, status="checking")

    def __enter__(self) -> "_Display":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, state: State) -> None:
        first = self._state is None
        self._state = state
        self._steps = 0
        if first and self._bar.disable:
            print(f"{self._suite.name}: {state.runs} of {state.total} runs are done", flush=True)
        self._bar.update(self._task, total=state.total_steps)
        self._draw("waiting for other processes" if state.runs < state.total else "")

    def start(self, run: Run) -> None:
        trial = run.trial
        self._name = (
            f"{trial.task}: {trial.optimizer} {trial.learning_rate:g}, decay {trial.weight_decay:g}, seed {run.seed}"
        )
        self._draw(f"{self._name}  compiling")

    def step(self, progress: evaluate.Progress) -> None:
        self._steps = progress.state.step
        now = time.monotonic()
        # The estimate starts where steps do, not with the first compilation.
        if self._begun is None and self._state is not None:
            self._begun = now, self._state.steps + self._steps
        if now - self._shown > (_LINE_SECONDS if self._bar.disable else _REFRESH_SECONDS):
            self._shown = now
            self._draw(f"{self._name}  step {self._steps}", line=True)

    def end(self, run: Run, record: Mapping[str, Any]) -> None:
        del run
        self._shown = time.monotonic()
        loss = record["status"] if record["status"] != "finished" else f"{record['validation_loss']:.4f}"
        if record["status"] == "failed":
            loss += f" ({record['error']})"
        done = self._state.runs + 1 if self._state else 1
        total = self._state.total if self._state else 1
        self._bar.console.print(
            f"[{done}/{total}] {self._name}: {loss}{self._left()}", markup=False, highlight=False, soft_wrap=True
        )

    def _draw(self, status: str, line: bool = False) -> None:
        if self._state is None:
            return
        status = f"{self._state.runs}/{self._state.total}  {status}{self._left()}"
        self._bar.update(self._task, completed=self._state.steps + self._steps, status=status)
        if line and self._bar.disable:
            print(status, flush=True)

    def _left(self) -> str:
        """The time left, if all steps take as long as those since the start."""
        if self._state is None or self._begun is None:
            return ""
        seconds, steps = time.monotonic() - self._begun[0], self._state.steps + self._steps - self._begun[1]
        if steps <= 0 or seconds < 1:
            return ""
        left = round((self._state.total_steps - self._state.steps - self._steps) * seconds / steps)
        return f"  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
