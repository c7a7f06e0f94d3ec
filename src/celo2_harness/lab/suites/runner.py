"""Runs a suite in a folder: every run once, whoever does it and however often it is interrupted."""

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from celo2_harness.lab.errors import InputError, input_errors
from celo2_harness.lab.suites.optimizers import make_spec
from celo2_harness.lab.suites.plan import Run, grids, plan, total_steps
from celo2_harness.lab.suites.record import RECORDS, Record, append_record, read_file
from celo2_harness.lab.suites.suite import Suite, SuiteOptimizer, SuiteTask
from celo2_harness.lab.tasks import Task, make_task
from celo2_harness.lab.training.folder import Progress, holds_run, open_run, prepare_folder, write_errors
from celo2_harness.lab.training.locks import Claims
from celo2_harness.lab.training.loop import train_chunk, train_step
from celo2_harness.lab.training.optimizers import OptimizerSpec
from celo2_harness.lab.training.provenance import provenance
from celo2_harness.lab.training.settings import settings_key
from celo2_harness.lab.training.train import TrainConfig, follow_training, run_settings

_WAIT_SECONDS = 0.5


class SuiteState(NamedTuple):
    """The progress of a suite.

    Attributes:
        runs: The number of runs that are done.
        total: The number of runs that there are.
        steps: The number of steps that those that are done took.
        total_steps: The number of steps that there are.
    """

    runs: int
    total: int
    steps: int
    total_steps: int


class _Work(NamedTuple):
    """A run with everything that it needs."""

    task: Task
    spec: OptimizerSpec
    config: TrainConfig
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        return settings_key(self.settings)


def task_of(task: SuiteTask) -> Task:
    """Makes a task of a suite."""
    with input_errors():
        return make_task(task.name, task.size, task.data, task.batch)


def run_suite(
    suite: Suite,
    folder: Path,
    *,
    make_task: Callable[[SuiteTask], Task] = task_of,
    make_spec: Callable[[Suite, SuiteOptimizer, float, float, int], OptimizerSpec] = make_spec,
    only: str | None = None,
    retry_failed: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    on_state: Callable[[SuiteState], None] = lambda state: None,
    on_start: Callable[[Run], None] = lambda run: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_end: Callable[[Run, Record], None] = lambda run, record: None,
) -> list[Record] | None:
    """Does the runs of a suite that are not in the folder yet, and writes one line per run to `runs.jsonl`.

    Any number of processes may work in one folder: each claims a run before it starts it, and waits at the end for the
    runs of the others. A run that was killed is done again, from its last checkpoint where the suite has some. A run
    that diverges, or that stops with an error, is recorded as such, and the others go on.

    Args:
        suite: The suite.
        folder: The folder. It is made if missing.
        make_task: Makes a task of the suite.
        make_spec: Makes an optimizer of the suite at a learning rate and a weight decay, for a number of steps.
        only: A pattern of what to run; see `grids`.
        retry_failed: Whether to do runs again that are in the folder and failed.
        should_stop: Asked after every step; once it says yes, the current run is saved, if it can be, and given up.
        on_state: Called before every run, and while waiting for other processes.
        on_start: Called before each run.
        on_progress: Called after every step.
        on_end: Called with the record of each run that was done here.

    Returns:
        The records of all runs, or None if it was stopped.

    Raises:
        InputError: If the pattern leaves nothing, the folder cannot be written, or a file in it is damaged. What was
            recorded before is safe.
    """
    everything = _prepare(suite, only, make_task, make_spec)
    prepare_folder(folder)
    path = folder / RECORDS
    retried: set[str] = set()
    if retry_failed:
        retried = {key for key, record in _latest(path).items() if record.status == "failed"}
    total, steps = total_steps(suite, only)
    safe = lambda: f"the runs in {RECORDS} are safe: make room, and the same command goes on"
    with write_errors(folder, safe):
        claims, before = Claims(folder / "claims"), None
        try:
            while True:
                done = {key: record for key, record in _latest(path).items() if key not in retried}
                records = {run: done[work.key] for run, work in everything.items() if work.key in done}
                runs = plan(suite, {run: record.final_loss for run, record in records.items()}, only)
                left = [run for run in runs if run not in records]
                finished = [run for run in runs if run in records]
                taken = sum(everything[run].config.steps for run in finished)
                on_state(SuiteState(len(finished), total, taken, steps))
                if not left:
                    for run in finished:  # What a kill has left between the record and the removal.
                        _clear(_place(folder, everything[run]), records[run])
                    return [records[run] for run in finished]
                if should_stop():
                    return None
                run = next((run for run in left if claims.take(everything[run].key)), None)
                if run is None:
                    time.sleep(_WAIT_SECONDS)
                    continue
                work = everything[run]
                try:
                    # Another process may have finished it after the file was read.
                    if work.key in _latest(path) and work.key not in retried:
                        continue
                    # Compiled programs are kept as long as their optimizers: without this, one for every trial.
                    if before not in (None, run.trial):
                        for program in (train_step, train_chunk):
                            program.clear_cache()  # type: ignore[attr-defined]
                    before = run.trial
                    on_start(run)
                    record = _record(suite, run, work, _place(folder, work), should_stop, on_progress)
                    if record is None:
                        return None
                    append_record(path, record)
                    _clear(_place(folder, work), record)
                    retried.discard(work.key)
                    on_end(run, record)
                finally:
                    claims.release(work.key)
        finally:
            claims.close()


def _prepare(
    suite: Suite,
    only: str | None,
    make_task: Callable[[SuiteTask], Task],
    make_spec: Callable[[Suite, SuiteOptimizer, float, float, int], OptimizerSpec],
) -> dict[Run, _Work]:
    """Tasks and optimizers of all runs, before anything runs: what is wrong with the last one should show at once."""
    needed = grids(suite, only)
    if not needed:
        pairs = ", ".join(f"{grid[0].task}/{grid[0].optimizer}" for grid in grids(suite))
        raise InputError(f"only = {only!r}: expected a part of {pairs}; * stands for anything")
    specified = {task.label: task for task in suite.tasks}
    optimizers = {optimizer.label: optimizer for optimizer in suite.optimizers}
    tasks = {label: make_task(specified[label]) for label in dict.fromkeys(grid[0].task for grid in needed)}
    everything = {}
    for trial in (trial for grid in needed for trial in grid):
        task, wanted = tasks[trial.task], specified[trial.task]
        optimizer = optimizers[trial.optimizer]
        spec = make_spec(suite, optimizer, trial.learning_rate, trial.weight_decay, wanted.steps)
        for seed in dict.fromkeys((*suite.search.selection_seeds, *suite.search.report_seeds)):
            config = TrainConfig(wanted.steps, seed, wanted.eval_every, wanted.eval_every, suite.checkpoint_every)
            everything[Run(trial, seed)] = _Work(task, spec, config, run_settings(task, spec, config))
    return everything


def _place(folder: Path, work: _Work) -> Path:
    """The folder of a run while it goes."""
    return folder / "unfinished" / hashlib.sha256(work.key.encode()).hexdigest()[:16]


def _clear(place: Path, record: Record) -> None:
    """Removes the folder of a run once its record is safe, unless it failed and may be continued."""
    if record.status != "failed":
        shutil.rmtree(place, ignore_errors=True)


def _latest(path: Path) -> dict[str, Record]:
    """The records of a file by their settings; a later one replaces an earlier one."""
    return {settings_key(record.settings): record for record in read_file(path)}


def _record(
    suite: Suite,
    run: Run,
    work: _Work,
    place: Path,
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None],
) -> Record | None:
    """Trains, and returns what is kept of it; None if it was stopped."""
    started = time.perf_counter()
    facts: dict[str, Any] = {
        "task": run.trial.task,
        "unit": work.task.unit,
        "selection_seeds": suite.search.selection_seeds,
        "report_seeds": suite.search.report_seeds,
        "baseline": suite.baseline,
        "reference": suite.reference,
    }
    try:
        with open_run(place, work.settings, resume=holds_run(place)) as opened:
            status = opened.status or follow_training(
                opened, work.task, work.spec, work.config, should_stop=should_stop, on_progress=on_progress
            )
            if status == "interrupted":
                return None
            return Record.from_run(work.spec.name, opened.header, opened.lines, **facts)
    except (OSError, InputError):  # Of a folder that cannot be written or read: no fault of the optimizer.
        raise
    except Exception as error:  # Whatever an optimizer raises: the other runs are worth having.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        facts |= {"status": "failed", "error": f"{type(error).__name__}: {reason[:300]}"}
        facts |= {"seconds": round(time.perf_counter() - started, 3), **provenance()}
        return Record(name=work.spec.name, settings=work.settings, **facts)
