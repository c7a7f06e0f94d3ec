"""`celo2 compare`: several optimizers on one task, one table and one picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from celo2_harness.lab.cli._gpt import GPTOptions
from celo2_harness.lab.cli._suites import show_suite
from celo2_harness.lab.cli.report import print_tables
from celo2_harness.lab.errors import InputError, input_errors
from celo2_harness.lab.suites import Search, Suite, SuiteOptimizer, SuiteTask, results_by_task
from celo2_harness.lab.suites.plots import plot_curves
from celo2_harness.lab.suites.record import RECORDS
from celo2_harness.lab.suites.tables import comparison_table
from celo2_harness.lab.training.display import Display
from celo2_harness.lab.training.interrupt import StopSignals
from celo2_harness.lab.training.optimizers import AverageTail
from celo2_harness.presets import find_preset


@dataclass(frozen=True)
class Config(GPTOptions):
    """Train the same GPT with several optimizers and compare them.

    Results go to a folder as they come; runs that are there already are not repeated.
    """

    preset: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--presets"])] = ("celo2", "muon", "adamw")
    """Optimizers; `celo2 presets` lists them."""
    learning_rate: Annotated[tuple[float, ...], tyro.conf.arg(aliases=["--learning-rates"])] = ()
    """Peak learning rates; each preset is run at each of them and its best is shown. By default the preset's own."""
    seed: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seeds"])] = (0,)
    """Each run is repeated with each of these seeds."""
    steps: int = 300
    """Training steps of each run."""
    state_dtype: str = "float32"
    """What the learned rule's state is kept in: float32 or bfloat16."""
    out: Path = Path("runs/compare")
    """Folder of the results."""
    eval_every: int = 25
    """Steps between evaluations on the held-out end of the text."""


def run(config: Config) -> int:
    """Compares; returns 0 when all runs are done, diverged ones included, and 130 if it was interrupted."""
    with input_errors():
        suite = _suite(config)
    task = config.task()
    with StopSignals() as stop, Display("tokens", task.tokens_per_batch) as display:
        records = show_suite(suite, config.out, display, make_task=lambda _: task, should_stop=lambda: stop.requested)
    if records is None:
        return 130
    (results,) = results_by_task(records)
    print_tables([comparison_table(results)])
    picture = config.out / "compare.png"
    seeds = "1 seed" if len(config.seed) == 1 else f"{len(config.seed)} seeds"
    what = ", average of the last parameters" if config.average_tail else ""
    title = f"{config.model}, {config.steps} steps of {task.tokens_per_batch} bytes, {seeds}{what}"
    plot_curves(results, picture, title)
    print(f"runs: {config.out / RECORDS}\npicture: {picture}")
    return 0


def _suite(config: Config) -> Suite:
    """The suite with one task that the options ask for."""
    presets = {name: find_preset(name) for name in config.preset}
    learned = [name for name, preset in presets.items() if preset.learned]
    if config.weights is not None and not learned:
        raise InputError(f"weights = {config.weights!r}: none of the presets has a learned rule; leave it out")
    options = {} if config.state_dtype == "float32" else {"state_dtype": config.state_dtype}
    optimizers = tuple(
        SuiteOptimizer(
            preset=name,
            learning_rates=config.learning_rate or (float(presets[name].learning_rate),),
            weights=config.weights if name in learned else None,
            options=options,
            average_tail=AverageTail() if config.average_tail else None,
        )
        for name in config.preset
    )
    return Suite(
        name="compare",
        tasks=(SuiteTask("language_model", config.steps, label=config.model, eval_every=config.eval_every),),
        search=Search(config.learning_rate or (1.0,), (config.weight_decay,), selection_seeds=config.seed),
        optimizers=optimizers,
        schedule=config.schedule,
        warmup=config.warmup,
    )
