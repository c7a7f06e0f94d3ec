"""Result files, read and checked: what each kind of record must have."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites.compare import RUNS as COMPARE_RUNS
from celo2_harness.lab.suites.records import read_lines
from celo2_harness.lab.suites.returns import RETURNS, read_return_run
from celo2_harness.lab.suites.rows import FAILURES
from celo2_harness.lab.suites.runner import RUNS
from celo2_harness.lab.suites.single import settings_key
from celo2_harness.lab.training.train import METRICS

TRAINING = "training"
"""The kind of records that do not say one: runs of `celo2 evaluate` and `celo2 compare`."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(point, list)
        and len(point) == 2
        and _is_whole(point[0])
        and (point[1] is None or _is_number(point[1]))
        for point in value
    )


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _settings(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("optimizer"), dict)
        and isinstance(value.get("run"), dict)
        and _is_whole(value["run"].get("steps"))
    )


def _game_settings(value: Any) -> bool:
    return (
        _settings(value)
        and isinstance(value.get("environment"), dict)
        and isinstance(value["environment"].get("game"), str)
    )


# Name -> what it must be, in words and as a test.
_Fields = Mapping[str, tuple[str, Callable[[Any], bool]]]

_COMMON: _Fields = {
    "name": ("a text", lambda value: isinstance(value, str)),
    "learning_rate": ("a number", _is_number),
    "seed": ("a whole number", _is_whole),
}
_TRAINING: _Fields = {
    "status": (f"finished, {' or '.join(FAILURES)}", lambda value: value in ("finished", *FAILURES)),
    "validation": ("pairs of step and loss", _is_curve),
    "settings": ("a table with `optimizer` and `run`", _settings),
}
_RETURNS: _Fields = {
    "status": ("finished, diverged or unfinished", lambda value: value in ("finished", "diverged", "unfinished")),
    "reached": ("a whole number", _is_whole),
    "episode_steps": ("whole numbers", _all(_is_whole)),
    "returns": ("numbers", _all(_is_number)),
    "settings": ("a table with `optimizer`, `environment` and `run`", _game_settings),
}
# Kind of record -> its fields.
_KINDS: dict[str, _Fields] = {TRAINING: _COMMON | _TRAINING, RETURNS: _COMMON | _RETURNS}


def read_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Reads the records of runs.

    Args:
        paths: Folders of `celo2 evaluate` or `celo2 compare`; folders of such files by any name, and of runs of
            `celo2 reinforce` at any depth; or files.

    Returns:
        The records in order. Of runs with the same settings the last one counts, unless only an earlier one is whole.

    Raises:
        InputError: if there are no runs, or a file is damaged or holds something else; the message names file and line.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in paths:
        for record in _read(path):
            key = settings_key({"name": record["name"], **record["settings"]})
            if key not in records or record["status"] in ("finished", "diverged"):
                records[key] = record
    if not records:
        raise InputError(f"{', '.join(map(str, paths))}: no runs there yet")
    return list(records.values())


def _read(path: Path) -> list[dict[str, Any]]:
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        raise InputError(f"{path}: there is no such folder or file")
    if known := [path / name for name in (RUNS, COMPARE_RUNS) if (path / name).exists()]:
        return [record for file in known for record in _read_file(file)]
    files = sorted(file for file in path.glob("*.jsonl") if file.name != METRICS)
    played = []
    for file in sorted(path.rglob(METRICS)):
        if run := read_return_run(file):
            _check(str(file), run)
            played.append(run)
    if not files and not played:
        raise InputError(
            f"{path} holds no results; expected {RUNS}, {COMPARE_RUNS} or other .jsonl files, "
            "or runs of celo2 reinforce"
        )
    return [record for file in files for record in _read_file(file)] + played


def _read_file(file: Path) -> list[dict[str, Any]]:
    records = read_lines(file)
    for number, record in enumerate(records, start=1):
        _check(f"{file}, line {number}", record)
    return records


def _check(where: str, record: Mapping[str, Any]) -> None:
    kind = record.get("kind", TRAINING)
    if str(kind) not in _KINDS:
        raise InputError(f"{where}: kind = {str(kind)[:80]!r}: expected one of {', '.join(_KINDS)}")
    for name, (expected, fits) in _KINDS[kind].items():
        if name not in record:
            raise InputError(f"{where}: {name!r} is missing, so this is no run of celo2 evaluate, compare or reinforce")
        if not fits(record[name]):
            raise InputError(f"{where}: {name} = {str(record[name])[:80]}: expected {expected}")
    if kind == RETURNS:
        if len(record["returns"]) != len(record["episode_steps"]):
            raise InputError(f"{where}: returns and episode_steps differ in length")
    elif record["status"] == "finished" and not (_is_number(record.get("validation_loss")) and record["validation"]):
        raise InputError(f"{where}: a finished run without validation_loss or validation")
