"""Runs a suite in a folder: every run once, whoever does it and however often it is interrupted."""

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites.claims import Claims
from celo2_harness.lab.suites.plan import Run, Trial, grids, plan, total_steps
from celo2_harness.lab.suites.records import append_record, prepare_folder, provenance, read_lines, write_errors
from celo2_harness.lab.suites.rows import final_loss
from celo2_harness.lab.suites.single import Contender, run_once, run_settings, settings_key
from celo2_harness.lab.suites.suite import Suite, SuiteOptimizer, SuiteTask
from celo2_harness.lab.tasks import Task
from celo2_harness.lab.training.loop import Progress, train_step

RUNS = "runs.jsonl"
_WAIT_SECONDS = 0.5


class State(NamedTuple):
    """How far a suite is.

    Attributes:
        runs: How many runs are done.
        total: How many there are.
        steps: How many steps those that are done took.
        total_steps: How many there are.
    """

    runs: int
    total: int
    steps: int
    total_steps: int


def run_suite(
    suite: Suite,
    folder: Path,
    *,
    make_task: Callable[[SuiteTask], Task],
    make_contender: Callable[[SuiteOptimizer, float, float, int], Contender],
    only: str | None = None,
    retry_failed: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    on_state: Callable[[State], None] = lambda state: None,
    on_start: Callable[[Run], None] = lambda run: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_end: Callable[[Run, Mapping[str, Any]], None] = lambda run, record: None,
) -> bool:
    """Does the runs of a suite that are not in the folder yet, and writes one line per run to `runs.jsonl`.

    Any number of processes may work in one folder: each claims a run before it starts it, and waits at the end for the
    runs of the others. A run that was killed is done again, from its last checkpoint where the suite has some. A run
    that diverges, or that stops with an error, is recorded as such, and the others go on.

    Args:
        suite: What to run.
        folder: Made where missing.
        make_task: Makes a task of the suite.
        make_contender: (optimizer, learning rate, weight decay, steps) -> the optimizer.
        only: Leave the rest out; see `grids`.
        retry_failed: Do runs again that are in the folder and failed.
        should_stop: Asked after every step; once it says yes, the current run is saved, if it can be, and given up.
        on_state: Called before every run, and while waiting for other processes.
        on_start: Called before each run.
        on_progress: Called after every step.
        on_end: Called with the record of each run that was done here.

    Returns:
        True if all runs are done, False if it was stopped.

    Raises:
        InputError: if the pattern leaves nothing, the folder cannot be written, or a file in it is damaged. What was
            recorded before is safe.
    """
    steps_of = {task.label: task.steps for task in suite.tasks}
    tasks, contenders, settings = _make_everything(suite, only, make_task, make_contender)
    keys = {run: settings_key(of_run) for run, of_run in settings.items()}
    prepare_folder(folder)
    path = folder / RUNS
    retried: set[str] = set()
    if retry_failed:
        retried = {key for key, record in _latest(path).items() if record["status"] == "failed"}
    total, steps = total_steps(suite, only)
    safe = lambda: f"the runs in {RUNS} are safe: make room, and the same command goes on"
    with write_errors(folder, safe):
        claims, before = Claims(folder / "claims"), None
        try:
            while True:
                done = {key: record for key, record in _latest(path).items() if key not in retried}
                final = {run: final_loss(done[key]) for run, key in keys.items() if key in done}
                runs = plan(suite, final, only)
                left = [run for run in runs if run not in final]
                finished = [run for run in runs if run in final]
                on_state(State(len(finished), total, sum(steps_of[r.trial.task] for r in finished), steps))
                if not left:
                    for run in finished:  # what a kill has left between the record and the removal
                        _clear(_place(folder, keys[run]), done[keys[run]])
                    return True
                if should_stop():
                    return False
                run = next((run for run in left if claims.take(keys[run])), None)
                if run is None:
                    time.sleep(_WAIT_SECONDS)
                    continue
                try:
                    # Another process may have finished it after the file was read.
                    there = _latest(path).get(keys[run])
                    if there is not None and keys[run] not in retried:
                        continue
                    # Compiled programs are kept as long as their optimizers: without this, one for every trial.
                    if before not in (None, run.trial):
                        train_step.clear_cache()  # type: ignore[attr-defined]
                    before = run.trial
                    on_start(run)
                    place = _place(folder, keys[run])
                    task, contender = tasks[run.trial.task], contenders[run.trial]
                    record = _record(suite, run, task, contender, settings[run], place, should_stop, on_progress)
                    if record is None:
                        return False
                    append_record(path, record)
                    _clear(place, record)
                    retried.discard(keys[run])
                    on_end(run, record)
                finally:
                    claims.release(keys[run])
        finally:
            claims.close()


def _make_everything(
    suite: Suite,
    only: str | None,
    make_task: Callable[[SuiteTask], Task],
    make_contender: Callable[[SuiteOptimizer, float, float, int], Contender],
) -> tuple[dict[str, Task], dict[Trial, Contender], dict[Run, dict[str, Any]]]:
    """Tasks by label, optimizers by trial and settings by run, before anything runs: what is wrong with the last
    optimizer should show at once."""
    specified = {task.label: task for task in suite.tasks}
    optimizers = {optimizer.label: optimizer for optimizer in suite.optimizers}
    needed = grids(suite, only)
    if not needed:
        pairs = ", ".join(f"{grid[0].task}/{grid[0].optimizer}" for grid in grids(suite))
        raise InputError(f"only = {only!r}: expected a part of {pairs}; * stands for anything")
    tasks = {label: make_task(specified[label]) for label in dict.fromkeys(grid[0].task for grid in needed)}
    described = {label: task.describe() for label, task in tasks.items()}
    contenders, settings = {}, {}
    for grid in needed:
        for trial in grid:
            task, optimizer = specified[trial.task], optimizers[trial.optimizer]
            contenders[trial] = make_contender(optimizer, trial.learning_rate, trial.weight_decay, task.steps)
            for seed in {*suite.search.selection_seeds, *suite.search.report_seeds}:
                settings[Run(trial, seed)] = run_settings(
                    described[trial.task], contenders[trial], steps=task.steps, seed=seed, eval_every=task.eval_every
                )
    return tasks, contenders, settings


def _place(folder: Path, key: str) -> Path:
    """Where the checkpoints of a run are."""
    return folder / "unfinished" / hashlib.sha256(key.encode()).hexdigest()[:16]


def _clear(place: Path, record: Mapping[str, Any]) -> None:
    """Removes the checkpoints of a run once its record is safe; a failed run may be gone on with."""
    if record["status"] != "failed":
        shutil.rmtree(place, ignore_errors=True)


def _latest(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file by their settings; a later one replaces an earlier one."""
    return {settings_key(record["settings"]): record for record in read_lines(path) if "settings" in record}


def _record(
    suite: Suite,
    run: Run,
    task: Task,
    contender: Contender,
    settings: Mapping[str, Any],
    place: Path,
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None],
) -> dict[str, Any] | None:
    started = time.perf_counter()
    try:
        record = run_once(
            task,
            contender,
            settings,
            folder=place,
            checkpoint_every=suite.checkpoint_every,
            should_stop=should_stop,
            on_progress=on_progress,
        )
    except (OSError, InputError):  # of checkpoints that cannot be written or read: no fault of the optimizer
        raise
    except Exception as error:  # whatever an optimizer raises: the other runs are worth having
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        record = {
            "name": contender.name,
            "learning_rate": contender.learning_rate,
            "seed": run.seed,
            "unit": task.unit,
            "status": "failed",
            "error": f"{type(error).__name__}: {reason[:300]}",
            "validation": [],
            "validation_loss": None,
            "seconds": round(time.perf_counter() - started, 3),
        }
    if record is None:
        return None
    header = {
        "task": run.trial.task,
        "suite": suite.name,
        "selection_seeds": list(suite.search.selection_seeds),
        "report_seeds": list(suite.search.report_seeds),
        "equal_trials": suite.search.equal_trials,
        "baseline": suite.baseline,
        "rival": suite.rival,
    }
    return {**header, **record, "settings": dict(settings), **provenance()}
