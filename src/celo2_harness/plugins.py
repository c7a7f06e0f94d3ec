"""Presets and tasks that installed packages add, by entry points.

A package names its additions in its `pyproject.toml`:

    [project.entry-points."celo2_harness.presets"]
    mine = "my_package:preset"

A package is imported when one of its names is asked for, and built-in names go first: installing a package never
changes what a name meant before.
"""

import importlib.metadata
from typing import TypeVar

Value = TypeVar("Value")


def plugin_names(kind: str) -> tuple[str, ...]:
    """The names that installed packages add; none of them is imported.

    Args:
        kind: "presets" or "tasks".

    Returns:
        The names, sorted.
    """
    return tuple(sorted(importlib.metadata.entry_points(group=f"celo2_harness.{kind}").names))


def load_plugin(kind: str, name: str, expected: type[Value]) -> Value | None:
    """Imports and returns what an installed package adds under a name.

    Args:
        kind: "presets" or "tasks".
        name: The name of the entry point. Where two packages use it, the first on the import path has it.
        expected: The class that the entry point must be an instance of.

    Returns:
        The addition; None if no package adds that name.

    Raises:
        ValueError: If the package cannot be imported, or adds something else; the message names it.
    """
    entry = next(iter(importlib.metadata.entry_points(group=f"celo2_harness.{kind}", name=name)), None)
    if entry is None:
        return None
    where = f"plug-in {name!r} ({entry.value} of {entry.dist.name if entry.dist else 'an unknown package'})"
    try:
        value = entry.load()
    # Whatever a foreign module does while it is imported must not end this program.
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(value, expected):
        raise ValueError(f"{where} is a {type(value).__name__}, expected a {expected.__qualname__}.")
    return value
