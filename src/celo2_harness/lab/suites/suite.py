"""Suites: what an evaluation runs, read from TOML files."""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from celo2_harness.lab.errors import InputError, check_range
from celo2_harness.lab.tasks import TASKS, find_task
from celo2_harness.lab.training.optimizers import AverageTail
from celo2_harness.lab.training.reading import read

KINDS = ("preset", "optax", "make")
"""How a suite names an optimizer: a preset, a row of `OPTIMIZERS`, or an import path."""
_FOLDER = resources.files("celo2_harness.lab.suites") / "files"


@dataclass(frozen=True)
class SuiteTask:
    """A task of a suite.

    Attributes:
        name: The kind of task, one of `TASKS` or of an installed package.
        steps: The number of training steps.
        size: The size of that kind; by default its first.
        label: The name of the task in tables; by default name and size.
        eval_every: The number of steps between evaluations; by default a twentieth of the run.
        batch: The number of examples per step; by default that of the kind.
        data: A file or folder, relative to the suite; None for data that need no file.
    """

    name: str
    steps: int
    size: str = ""
    label: str = ""
    eval_every: int = 0
    batch: int | None = None
    data: Path | None = None

    def __post_init__(self):
        kind = find_task(self.name)
        if kind is None:
            raise InputError(f"name = {self.name!r}: expected one of {', '.join(TASKS)}")
        _fill(self, "size", next(iter(kind.sizes)))
        if self.size not in kind.sizes:
            raise InputError(f"size = {self.size!r}: {self.name} comes as {', '.join(kind.sizes)}")
        _fill(self, "label", f"{self.name} {self.size}")
        _fill(self, "eval_every", max(1, self.steps // 20))
        check_range(1, steps=self.steps, eval_every=self.eval_every)


@dataclass(frozen=True)
class Search:
    """The search that every optimizer gets.

    Attributes:
        learning_rates: The peak learning rates.
        weight_decays: The weight decays, each of which is tried with each learning rate.
        selection_seeds: The seeds that every trial runs with; the best mean final loss wins.
        report_seeds: The seeds that the winner runs with and that tables show. They are those of the selection, which
            is the default, or none of them.
        equal_trials: Whether to refuse a suite in which optimizers have different numbers of trials.
    """

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...] = (0.1,)
    selection_seeds: tuple[int, ...] = (0, 1, 2)
    report_seeds: tuple[int, ...] = ()
    equal_trials: bool = True

    def __post_init__(self):
        _fill(self, "report_seeds", self.selection_seeds)
        _check_trials(self.learning_rates, self.weight_decays)
        for name in ("selection_seeds", "report_seeds"):
            seeds = getattr(self, name)
            if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
                raise InputError(f"{name} = {list(seeds)}: expected one or more different whole numbers below 2^32")
        selection, report = set(self.selection_seeds), set(self.report_seeds)
        if selection != report and selection & report:
            raise InputError(
                f"report_seeds = {list(self.report_seeds)}: expected those of the selection, "
                f"{list(self.selection_seeds)}, or none of them"
            )


@dataclass(frozen=True)
class SuiteOptimizer:
    """An optimizer of a suite, named in exactly one of three ways.

    Attributes:
        preset: The name of a preset.
        optax: A row of `OPTIMIZERS`.
        make: An import path `module:function`.
        label: The name of the optimizer in tables; by default that of the preset, the row or the import path.
        learning_rates: The peak learning rates; by default those of the search.
        weight_decays: The weight decays; by default those of the search.
        weights: The weights of a preset's learned rule: a name, a file relative to the suite, or hf://owner/repo.
        options: Further arguments of what makes it.
        guard: Arguments of `guard_updates`, to wrap it; None for no guard.
        average_tail: The average of the last parameters to evaluate it at; None for the parameters themselves.
    """

    preset: str | None = None
    optax: str | None = None
    make: str | None = None
    label: str = ""
    learning_rates: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    guard: Mapping[str, Any] | None = None
    average_tail: AverageTail | None = None

    def __post_init__(self):
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise InputError(f"got {' and '.join(kinds) or 'none'} of {', '.join(KINDS)}; expected exactly one")
        if self.weights is not None and self.preset is None:
            raise InputError(f"weights = {self.weights!r}: only a preset has weights")
        _fill(self, "label", self.name)
        _check_trials(self.learning_rates or (1.0,), self.weight_decays or (0.0,))

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def name(self) -> str:
        """The preset, the row, or the import path."""
        return getattr(self, self.kind)


@dataclass(frozen=True)
class Suite:
    """The tasks, optimizers and search of an evaluation.

    Attributes:
        name: The name of the suite.
        tasks: The tasks that are trained.
        search: The search that every optimizer gets.
        optimizers: The optimizers that are compared.
        description: One line.
        baseline: The optimizer that others are timed to; by default the one called adamw.
        reference: The optimizer that differences are taken to; by default the one called muon.
        schedule: The name of the schedule of the learning rate.
        warmup: The warm-up of the schedule.
        checkpoint_every: The number of steps between checkpoints of a run; 0 for none.
    """

    name: str
    tasks: tuple[SuiteTask, ...]
    search: Search
    optimizers: tuple[SuiteOptimizer, ...]
    description: str = ""
    baseline: str = ""
    reference: str = ""
    schedule: str = "warmup_cosine"
    warmup: float = 0.05
    checkpoint_every: int = 0

    def __post_init__(self):
        lists = ("learning_rates", "weight_decays")
        optimizers = tuple(
            dataclasses.replace(o, **{name: getattr(o, name) or getattr(self.search, name) for name in lists})
            for o in self.optimizers
        )
        object.__setattr__(self, "optimizers", optimizers)
        check_range(0, warmup=self.warmup, checkpoint_every=self.checkpoint_every)
        for name in ("tasks", "optimizers"):
            labels = [thing.label for thing in getattr(self, name)]
            if not labels:
                raise InputError(f"{name} = []: expected one or more tables")
            for label in labels:
                if labels.count(label) > 1:
                    raise InputError(f"{name}: two of them are called {label!r}; give each a label of its own")
        for name, default in (("baseline", "adamw"), ("reference", "muon")):
            labels = [optimizer.label for optimizer in optimizers]
            if getattr(self, name) not in ("", default, *labels):
                raise InputError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(labels)}")
            _fill(self, name, default)
        trials = {o.label: len(o.learning_rates) * len(o.weight_decays) for o in optimizers}
        if self.search.equal_trials and len(set(trials.values())) > 1:
            found = ", ".join(f"{label} {number}" for label, number in trials.items())
            raise InputError(
                f"optimizers have different numbers of trials ({found}): expected the same for all; "
                "search.equal_trials = false allows it, and reports say so"
            )


def suites() -> dict[str, str]:
    """Returns the names of the built-in suites with their descriptions.

    Example:
        >>> "smoke" in suites()
        True
    """
    files = {file.name: file for file in _FOLDER.iterdir() if file.name.endswith(".toml")}
    return {
        name.removesuffix(".toml"): tomllib.loads(files[name].read_text(encoding="utf-8"))["description"]
        for name in sorted(files)
    }


def load_suite(source: str | Path) -> Suite:
    """Reads a suite.

    Args:
        source: The name of a built-in suite, or the path of a TOML file.

    Returns:
        The suite.

    Raises:
        InputError: If there is none, or something in it is not as it must be; the message names the key.

    Example:
        >>> load_suite("nano").search.learning_rates
        (0.0003, 0.001, 0.003, 0.01)
    """
    path = Path(source)
    if str(source) in suites():
        text, folder = (_FOLDER / f"{source}.toml").read_text(encoding="utf-8"), Path()
    elif path.suffix != ".toml":
        raise InputError(f"suite = {str(source)!r}: expected one of {', '.join(suites())}, or a .toml file")
    else:
        try:
            text, folder = path.read_text(encoding="utf-8"), path.parent
        except (OSError, ValueError) as error:  # ValueError: no text, or no possible path
            raise InputError(f"suite {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of tomllib, of int, or tables without end
        raise InputError(f"suite {source} is no TOML: {error}") from None
    return _beside(read(Suite, content, f"suite {source}"), folder)


def _beside(suite: Suite, folder: Path) -> Suite:
    """The suite with its files found: their paths are relative to its folder."""

    def weights(name: str | None) -> str | None:
        # Names of bundled weights have no such file beside the suite.
        return str(folder / name) if name is not None and (folder / name).is_file() else name

    tasks = (dataclasses.replace(task, data=None if task.data is None else folder / task.data) for task in suite.tasks)
    optimizers = (dataclasses.replace(o, weights=weights(o.weights)) for o in suite.optimizers)
    return dataclasses.replace(suite, tasks=tuple(tasks), optimizers=tuple(optimizers))


def _fill(record: Any, name: str, default: Any) -> None:
    """Gives a field that was left empty its default, which depends on other fields."""
    if not getattr(record, name):
        object.__setattr__(record, name, default)


def _check_trials(learning_rates: Sequence[float], weight_decays: Sequence[float]) -> None:
    rates_fit = all(0 < rate < float("inf") for rate in learning_rates)
    if not learning_rates or len(set(learning_rates)) < len(learning_rates) or not rates_fit:
        raise InputError(f"learning_rates = {list(learning_rates)}: expected one or more different numbers above 0")
    decays_fit = all(0 <= decay < float("inf") for decay in weight_decays)
    if not weight_decays or len(set(weight_decays)) < len(weight_decays) or not decays_fit:
        raise InputError(f"weight_decays = {list(weight_decays)}: expected one or more different numbers from 0 on")
