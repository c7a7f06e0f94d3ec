"""`celo2 evaluate`: a suite of tasks, optimizers, learning rates, weight decays and seeds."""

import dataclasses
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from celo2_harness.lab.cli._suites import show_suite
from celo2_harness.lab.errors import InputError, check_range
from celo2_harness.lab.suites import Record, Suite, SuiteOptimizer, SuiteState, load_suite, run_suite, suites
from celo2_harness.lab.suites.record import RECORDS
from celo2_harness.lab.training.display import Display
from celo2_harness.lab.training.interrupt import StopSignals

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
    check_range(1, processes=config.processes)
    suite, folder = _suite(config)
    helpers: list[Any] = []

    def on_state(state: SuiteState) -> None:
        # The others start once everything has been checked and something is left to do.
        if not helpers and state.runs < state.total:
            helpers.extend(_start(config, number) for number in range(1, config.processes))

    records: list[Record] | None = None
    with StopSignals() as stop, Display() as display:
        try:
            arguments = _arguments(config, lambda: stop.requested)
            records = show_suite(suite, folder, display, on_state=on_state, **arguments)
        finally:
            for helper in helpers:
                if records is None:
                    helper.terminate()
                helper.join()
    if records is None:
        return 130
    print(f"{suite.name}: {len(records)} runs are done\nruns: {folder / RECORDS}\nnext: celo2 report {folder}")
    return 0


def _arguments(config: Config, should_stop: Callable[[], bool]) -> dict[str, Any]:
    return {"only": config.only, "retry_failed": config.retry_failed, "should_stop": should_stop}


def _start(config: Config, number: int) -> Any:
    """Starts a process that works on the same folder."""
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    # Failed runs are retried once, by the first process.
    config = dataclasses.replace(config, retry_failed=False)
    helper = context.Process(target=_help, args=(config, os.getpid()), name=f"celo2-evaluate-{number}")
    helper.start()
    return helper


def _help(config: Config, parent: int) -> None:
    suite, folder = _suite(config)
    with StopSignals() as stop:
        # Whoever kills the first process alone means all of them.
        run_suite(suite, folder, **_arguments(config, lambda: stop.requested or os.getppid() != parent))


def _suite(config: Config) -> tuple[Suite, Path]:
    """The suite that the options ask for, and its folder."""
    suite = load_suite(config.suite)
    more = tuple(SuiteOptimizer(make=path) for path in itertools.chain(*config.optimizer))
    paths = dict(map(_data, itertools.chain(*config.data)))
    tasks = tuple(
        dataclasses.replace(task, data=paths.get(task.label, paths.get(task.name, task.data))) for task in suite.tasks
    )
    if unknown := set(paths) - {name for task in tasks for name in (task.label, task.name)}:
        names = ", ".join(dict.fromkeys(name for task in tasks for name in (task.label, task.name)))
        raise InputError(f"data: there is no task {min(unknown)!r}; expected some of {names}")
    suite = dataclasses.replace(suite, tasks=tasks, optimizers=suite.optimizers + more)
    if any(optimizer.make is not None for optimizer in suite.optimizers):
        sys.path.insert(0, os.getcwd())
    return suite, Path("runs") / suite.name if config.out is None else config.out


def _data(word: str) -> tuple[str, Path]:
    name, _, path = word.partition("=")
    if not name or not path:
        raise InputError(f"data = {word!r}: expected NAME=PATH")
    return name, Path(path)
