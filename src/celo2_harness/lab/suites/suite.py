"""Suites: what an evaluation runs, read from TOML files."""

import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.tasks import TASKS, find_task

KINDS = ("preset", "optax", "make")
"""How a suite names an optimizer: a preset, a row of `OPTIMIZERS`, or an import path."""
_LARGEST = sys.float_info.max
_FOLDER = resources.files("celo2_harness.lab.suites") / "files"


@dataclass(frozen=True)
class SuiteTask:
    """A task of a suite.

    Attributes:
        label: What tables call it.
        name: Out of `TASKS`, or of an installed package.
        size: Of that kind of task.
        steps: Training steps.
        eval_every: Steps between evaluations.
        batch: Examples per step; None for the kind's.
        data: A file or folder; None for data that need no file.
    """

    label: str
    name: str
    size: str
    steps: int
    eval_every: int
    batch: int | None = None
    data: Path | None = None


@dataclass(frozen=True)
class Search:
    """The search that every optimizer gets.

    Attributes:
        learning_rates: Peak learning rates.
        weight_decays: Each is tried with each learning rate.
        selection_seeds: Every trial runs with these, and the best mean final loss wins.
        report_seeds: The winner runs with these, and tables show them. Either the same as those of the selection, or
            none of them.
        equal_trials: Refuse a suite in which optimizers have different numbers of trials.
    """

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    selection_seeds: tuple[int, ...]
    report_seeds: tuple[int, ...]
    equal_trials: bool = True


@dataclass(frozen=True)
class SuiteOptimizer:
    """An optimizer of a suite.

    Attributes:
        label: What tables call it.
        kind: Out of `KINDS`.
        name: The preset, the row, or the import path `module:function`.
        learning_rates: Its own ones, or those of the search.
        weight_decays: Its own ones, or those of the search.
        weights: Of a preset's learned rule: a name, a file, or hf://owner/repo.
        options: Further arguments of whatever makes it.
        guard: Arguments of `guard_updates`, to wrap it; None for no guard.
    """

    label: str
    kind: str
    name: str
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    guard: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Suite:
    """What an evaluation runs.

    Attributes:
        name: Of the suite.
        description: One line.
        tasks: What is trained.
        search: What every optimizer gets.
        optimizers: What is compared.
        baseline: The optimizer that others are timed to.
        rival: The optimizer that differences are taken to.
        schedule: Course of the learning rate.
        warmup: Part of the run in which the learning rate rises.
        checkpoint_every: Steps between checkpoints of a run; 0 for none.
    """

    name: str
    description: str
    tasks: tuple[SuiteTask, ...]
    search: Search
    optimizers: tuple[SuiteOptimizer, ...]
    baseline: str = "adamw"
    rival: str = "muon"
    schedule: str = "warmup_cosine"
    warmup: float = 0.05
    checkpoint_every: int = 0


def suites() -> dict[str, str]:
    """Returns the names of the built-in suites with their descriptions.

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
        InputError: if there is none, or something in it is not as it must be; the message names the key.

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
    try:
        return read_suite(content, folder)
    except InputError as error:
        raise InputError(f"suite {source}: {error}") from None


class _Key(NamedTuple):
    """A key of a table: what it holds, in words and as a test, and what stands for a missing one."""

    expected: str
    fits: Callable[[Any], bool]
    default: Any = ...  # must be given


def _is_number(value: Any) -> bool:
    # The bound keeps whole numbers out that no float can hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(fits, value)) and len(set(value)) == len(value)


def _text(default: Any = ...) -> _Key:
    return _Key("a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()), default)


def _rates(default: Any = ...) -> _Key:
    expected = "a list of one or more different numbers above 0"
    return _Key(expected, lambda value: _is_list(value, lambda x: _is_number(x) and x > 0), default)


def _decays(default: Any = ...) -> _Key:
    expected = "a list of one or more different numbers from 0 on"
    return _Key(expected, lambda value: _is_list(value, lambda x: _is_number(x) and x >= 0), default)


def _seeds(default: Any = ...) -> _Key:
    def is_seed(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**32

    return _Key("a list of one or more different whole numbers from 0 on", lambda v: _is_list(v, is_seed), default)


def _tables(default: Any = ...) -> _Key:
    def fits(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)

    return _Key("one or more tables", fits, default)


def _table(default: Any = ...) -> _Key:
    return _Key("a table", lambda value: isinstance(value, dict), default)


def _count(default: Any = ...) -> _Key:
    return _Key("a whole number from 1 on, below 2^31", _is_count, default)


_SUITE = {
    "name": _text(),
    "description": _text(""),
    "tasks": _tables(),
    "search": _table(),
    "optimizers": _tables(),
    "baseline": _text(None),
    "rival": _text(None),
    "schedule": _text("warmup_cosine"),
    "warmup": _Key("a number from 0 on", lambda value: _is_number(value) and value >= 0, 0.05),
    "checkpoint_every": _Key("a whole number from 0 on", lambda value: _is_count(value) or value == 0, 0),
}
_TASK = {
    "label": _text(None),
    "name": _Key(f"one of {', '.join(TASKS)}", lambda value: isinstance(value, str) and find_task(value) is not None),
    "size": _text(None),
    "steps": _count(),
    "eval_every": _count(None),
    "batch": _count(None),
    "data": _text(None),
}
_SEARCH = {
    "learning_rates": _rates(),
    "weight_decays": _decays([0.1]),
    "selection_seeds": _seeds([0, 1, 2]),
    "report_seeds": _seeds(None),
    "equal_trials": _Key("true or false", lambda value: isinstance(value, bool), True),
}
_OPTIMIZER = {
    "label": _text(None),
    **{kind: _text(None) for kind in KINDS},
    "weights": _text(None),
    "options": _table({}),
    "guard": _table(None),
    "learning_rates": _rates(None),
    "weight_decays": _decays(None),
}


def read_suite(content: Mapping[str, Any], folder: Path = Path()) -> Suite:
    """Makes a suite of what a TOML file holds.

    Args:
        content: As `tomllib` returns it.
        folder: What paths of data and weights in it are relative to.

    Returns:
        The suite.

    Raises:
        InputError: if something in it is not as it must be; the message names the key.
    """
    top = _read(content, _SUITE, "")
    tasks = tuple(
        _read_task(_read(task, _TASK, f"tasks[{i}]."), f"tasks[{i}]", folder) for i, task in enumerate(top["tasks"])
    )
    lists = _read(top["search"], _SEARCH, "search.")
    lists["report_seeds"] = lists["report_seeds"] or lists["selection_seeds"]
    search = Search(
        learning_rates=tuple(map(float, lists["learning_rates"])),
        weight_decays=tuple(map(float, lists["weight_decays"])),
        selection_seeds=tuple(lists["selection_seeds"]),
        report_seeds=tuple(lists["report_seeds"]),
        equal_trials=lists["equal_trials"],
    )
    selection, report = set(search.selection_seeds), set(search.report_seeds)
    if selection != report and selection & report:
        raise InputError(
            f"search.report_seeds = {lists['report_seeds']}: expected those of the selection, "
            f"{lists['selection_seeds']}, or none of them"
        )
    optimizers = tuple(
        read_optimizer(optimizer, search, folder, f"optimizers[{i}]") for i, optimizer in enumerate(top["optimizers"])
    )
    for name, things in (("tasks", tasks), ("optimizers", optimizers)):
        labels = [thing.label for thing in things]
        for label in labels:
            if labels.count(label) > 1:
                raise InputError(f"{name}: two of them are called {label!r}; give each a label of its own")
    for name in ("baseline", "rival"):
        labels = [optimizer.label for optimizer in optimizers]
        if top[name] is not None and top[name] not in labels:
            raise InputError(f"{name} = {top[name]!r}: expected one of {', '.join(labels)}")
    suite = Suite(
        **{name: top[name] for name in ("name", "description", "schedule", "checkpoint_every")},
        warmup=float(top["warmup"]),
        tasks=tasks,
        search=search,
        optimizers=optimizers,
        baseline=top["baseline"] or "adamw",
        rival=top["rival"] or "muon",
    )
    check_trials(suite)
    return suite


def check_trials(suite: Suite) -> None:
    """Refuses a suite in which optimizers have different numbers of trials, unless it says so.

    Args:
        suite: The suite.

    Raises:
        InputError: naming the numbers.
    """
    numbers = {o.label: len(o.learning_rates) * len(o.weight_decays) for o in suite.optimizers}
    if suite.search.equal_trials and len(set(numbers.values())) > 1:
        found = ", ".join(f"{label} {number}" for label, number in numbers.items())
        raise InputError(
            f"optimizers have different numbers of trials ({found}): expected the same for all; "
            "search.equal_trials = false allows it, and reports say so"
        )


def read_optimizer(content: Mapping[str, Any], search: Search, folder: Path, where: str) -> SuiteOptimizer:
    """Makes an optimizer of a table of a suite; see `read_suite`."""
    table = _read(content, _OPTIMIZER, f"{where}.")
    kinds = [kind for kind in KINDS if table[kind] is not None]
    if len(kinds) != 1:
        raise InputError(f"{where}: got {' and '.join(kinds) or 'none'} of {', '.join(KINDS)}; expected exactly one")
    kind = kinds[0]
    weights = table["weights"]
    if weights is not None and kind != "preset":
        raise InputError(f"{where}.weights = {weights!r}: only a preset has weights")
    # Paths are relative to the suite, whose folder may be anywhere; names have no such file beside it.
    if weights is not None and (folder / weights).is_file():
        weights = str(folder / weights)
    return SuiteOptimizer(
        label=table["label"] or table[kind],
        kind=kind,
        name=table[kind],
        learning_rates=tuple(map(float, table["learning_rates"] or search.learning_rates)),
        weight_decays=tuple(map(float, table["weight_decays"] or search.weight_decays)),
        weights=weights,
        options=table["options"],
        guard=table["guard"],
    )


def _read_task(table: Mapping[str, Any], where: str, folder: Path) -> SuiteTask:
    name, kind = table["name"], find_task(table["name"])
    assert kind is not None  # `_TASK` has seen to it
    sizes = kind.sizes
    size = table["size"] or next(iter(sizes))
    if size not in sizes:
        raise InputError(f"{where}.size = {size!r}: {name} comes as {', '.join(sizes)}")
    return SuiteTask(
        label=table["label"] or f"{name} {size}",
        name=name,
        size=size,
        steps=table["steps"],
        eval_every=table["eval_every"] or max(1, table["steps"] // 20),
        batch=table["batch"],
        data=None if table["data"] is None else folder / table["data"],
    )


def _read(content: Mapping[str, Any], keys: Mapping[str, _Key], prefix: str) -> dict[str, Any]:
    for name in content:
        if name not in keys:
            raise InputError(f"{prefix}{name}: there is no such key; expected some of {', '.join(keys)}")
    values = {}
    for name, key in keys.items():
        value = content.get(name, key.default)
        if value is ...:
            raise InputError(f"{prefix}{name} is missing; expected {key.expected}")
        if name in content and not key.fits(value):
            raise InputError(f"{prefix}{name} = {value!r}: expected {key.expected}")
        values[name] = value
    return values
