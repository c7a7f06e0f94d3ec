"""What `celo2 evaluate` and `celo2 compare` share: a suite with a display."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celo2_harness.lab.suites import Record, Run, Suite, SuiteState, run_suite
from celo2_harness.lab.training.display import Display
from celo2_harness.lab.training.folder import Progress


def show_suite(
    suite: Suite,
    folder: Path,
    display: Display,
    *,
    on_state: Callable[[SuiteState], None] = lambda state: None,
    **arguments: Any,
) -> list[Record] | None:
    """Runs a suite, and shows a bar over the steps of all its runs.

    Args:
        suite: The suite.
        folder: The folder.
        display: Where to show it.
        on_state: Called before every run, and while waiting for other processes.
        **arguments: Further arguments of `run_suite`.

    Returns:
        The records, or None if it was stopped.
    """
    state = SuiteState(0, 0, 0, 0)
    calls = itertools.count()

    def show_state(now: SuiteState) -> None:
        nonlocal state
        state = now
        if next(calls) == 0 and now.runs:
            display.note(f"{suite.name}: {now.runs} of {now.total} runs are done")
        on_state(now)

    def show_start(run: Run) -> None:
        trial = run.trial
        rates = f"{trial.learning_rate:g}, decay {trial.weight_decay:g}"
        name = f"{trial.task}: {trial.optimizer} {rates}, seed {run.seed}"
        display.start(name, state.total_steps, state.steps)

    def show_end(run: Run, record: Record) -> None:
        how = f"{record.final_loss:.4f}" if record.status == "finished" else record.status
        how += f" ({record.error})" if record.error else ""
        display.note(f"[{state.runs + 1}/{state.total}] {display.name}: {how}")

    def show_progress(progress: Progress) -> None:
        display.update(progress._replace(step=state.steps + progress.step, notable=False))

    records = run_suite(
        suite, folder, on_state=show_state, on_start=show_start, on_progress=show_progress, on_end=show_end, **arguments
    )
    if records is None:
        print("interrupted; the same command goes on from there", file=sys.stderr)
    return records
