"""What installed packages add, by entry points: presets and tasks.

A package names its additions in its `pyproject.toml`, one group per kind:

    [project.entry-points."celo2_harness.presets"]
    mine = "my_package:preset"

Nothing is looked up when `celo2_harness` is imported, and nothing of a package is imported before its name is asked
for or all are listed. Built-in names go first, so an installed package never changes what a name meant before.
"""

import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

# Kind -> what an entry point of the group "celo2_harness.KIND" must be.
KINDS = {
    "presets": "a celo2_harness.harness.Preset",
    "tasks": "a celo2_harness.lab.tasks.TaskKind",
}

Value = TypeVar("Value")


class PluginError(ValueError):
    """A plug-in that was asked for by name and is broken; the message names it, its package and the cause."""


def group_name(kind: str) -> str:
    """The entry-point group of a kind.

    >>> group_name("presets")
    'celo2_harness.presets'
    """
    return f"celo2_harness.{kind}"


def plugin_names(kind: str) -> tuple[str, ...]:
    """Names that installed packages add, without importing any of them.

    Args:
      kind: out of `KINDS`.

    Returns:
      The names, sorted. Where two packages use one name, the first on the import path has it.
    """
    return tuple(sorted(_entries(kind)))


def load_plugin(kind: str, name: str, check: Callable[[Any], Value]) -> Value | None:
    """The addition of one name, imported now.

    Args:
      kind: out of `KINDS`.
      name: of the entry point.
      check: gets what the entry point names; returns what to use, or raises with the reason why not.

    Returns:
      What `check` made of it; None if no package adds that name.

    Raises:
      PluginError: the plug-in cannot be imported, or is not what its kind asks for.
    """
    entry = _entries(kind).get(name)
    if entry is None:
        return None
    try:
        return check(entry.load())
    except _BROKEN as error:
        raise PluginError(f"plug-in {name!r} is broken: {_cause(kind, entry, error)}") from error


def load_plugins(kind: str, check: Callable[[Any], Value]) -> dict[str, Value]:
    """All additions of a kind. A broken one is named in a warning and left out.

    Args:
      kind: out of `KINDS`.
      check: as for `load_plugin`.

    Returns:
      Name -> what `check` made of it.
    """
    found = {}
    for name, entry in _entries(kind).items():
        try:
            found[name] = check(entry.load())
        except _BROKEN as error:
            warnings.warn(f"plug-in {name!r} left out: {_cause(kind, entry, error)}", stacklevel=3)
    return found


# Whatever a foreign module does while it is imported must not end this program; an interrupt by the user may.
_BROKEN = (Exception, SystemExit)


def _entries(kind: str) -> dict[str, Any]:
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: expected one of {', '.join(KINDS)}.")
    try:
        entries = list(importlib.metadata.entry_points(group=group_name(kind)))
    except Exception as error:  # metadata of any installed package that cannot be read
        warnings.warn(f"plug-ins left out: {group_name(kind)}: {type(error).__name__}: {error}", stacklevel=4)
        return {}
    found: dict[str, Any] = {}
    for entry in entries:
        found.setdefault(entry.name, entry)
    return found


def _cause(kind: str, entry: Any, error: BaseException) -> str:
    package = getattr(getattr(entry, "dist", None), "name", None) or "an unknown package"
    expected = f" Expected {KINDS[kind]}." if isinstance(error, TypeError) else ""
    return f"{group_name(kind)}, {entry.value} of {package}: {type(error).__name__}: {error}{expected}"


def expect(kind: type[Value]) -> Callable[[Any], Value]:
    """A check that lets instances of one class through."""

    def check(value: Any) -> Value:
        if not isinstance(value, kind):
            raise TypeError(f"got a {type(value).__name__}, expected a {kind.__module__}.{kind.__qualname__}.")
        return value

    return check
