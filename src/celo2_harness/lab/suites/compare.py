"""Several optimizers on one task from the same starting points and batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites.records import append_record, prepare_folder, provenance, read_lines
from celo2_harness.lab.suites.single import Contender, run_once, run_settings, settings_key
from celo2_harness.lab.tasks import Task
from celo2_harness.lab.training.loop import Progress

RUNS = "compare.jsonl"


@dataclass(frozen=True)
class CompareConfig:
    """What all runs of a comparison share.

    Attributes:
        steps: Training steps.
        seeds: Every contender runs once per seed; a seed fixes the initial parameters and the batches.
        eval_every: Steps between evaluations.
    """

    steps: int
    seeds: tuple[int, ...] = (0,)
    eval_every: int = 25

    def __post_init__(self):
        for name in ("steps", "eval_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds = {list(self.seeds)}: expected one or more different numbers")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise InputError(f"seed = {seed}: expected a number from 0 to {2**32 - 1}")


class Comparison(NamedTuple):
    """The runs of a comparison.

    Attributes:
        runs: The records of the contenders' runs, as they are in the file.
        complete: False if it was stopped before the last run.
        found: How many of the runs were found in the folder, and not run again.
    """

    runs: list[dict[str, Any]]
    complete: bool
    found: int


def compare(
    task: Task,
    contenders: Sequence[Contender],
    config: CompareConfig,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    should_stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[Contender, int], None] = lambda contender, seed: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Comparison:
    """Runs every contender on every seed, and writes one line per run to `compare.jsonl`.

    Runs that are in the file already with the same settings are not repeated, so an interrupted comparison goes on
    where it was, and a finished one can be widened. A run that diverges is recorded as such and the others go on.

    Args:
        task: What to train.
        contenders: The optimizers.
        config: Length and seeds.
        folder: Made where missing.
        settings: What else determines the numbers (model, data), as JSON can hold it.
        should_stop: Asked after every step; once it says yes, the current run is given up.
        on_start: Called before each run that is not in the folder yet.
        on_progress: Called after every step.

    Returns:
        The runs of these contenders; those in the file with other settings are left out.

    Raises:
        InputError: if the folder cannot be written or its file is damaged.
    """
    prepare_folder(folder)
    path = folder / RUNS
    known = {settings_key(record["settings"]): record for record in read_lines(path) if "settings" in record}
    runs, found = [], 0
    for contender in contenders:
        for seed in config.seeds:
            of_run = run_settings(settings, contender, steps=config.steps, seed=seed, eval_every=config.eval_every)
            record = known.get(settings_key(of_run))
            if record is not None:
                found += 1
            elif should_stop():
                return Comparison(runs, False, found)
            else:
                on_start(contender, seed)
                record = run_once(task, contender, of_run, should_stop=should_stop, on_progress=on_progress)
                if record is None:
                    return Comparison(runs, False, found)
                record |= {"settings": of_run, **provenance()}
                append_record(path, record)
            runs.append(record)
    return Comparison(runs, True, found)
