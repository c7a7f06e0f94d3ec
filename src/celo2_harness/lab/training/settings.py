"""Settings of runs: what determines their numbers, as JSON can hold it."""

import json
from collections.abc import Mapping
from typing import Any

from celo2_harness.lab.errors import InputError


def settings_key(settings: Mapping[str, Any]) -> str:
    """Returns one string per different settings, whatever the order of their names.

    Example:
        >>> settings_key({"b": 1, "a": [2]}) == settings_key({"a": (2,), "b": 1})
        True
    """
    return json.dumps(settings, sort_keys=True)


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> tuple[str, Any, Any] | None:
    """Returns the first setting in which two nested mappings differ.

    Args:
        there: The one mapping.
        here: The other one.
        path: A prefix of the name.

    Returns:
        The name and both values, where "absent" stands for no value; None if there is no difference.

    Example:
        >>> first_difference({"model": {"width": 8}}, {"model": {"width": 16}})
        ('model.width', 8, 16)
    """
    for name in [*there, *(name for name in here if name not in there)]:
        old, new = there.get(name, "absent"), here.get(name, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if inner := first_difference(old, new, f"{path}{name}."):
                return inner
        elif old != new:
            return f"{path}{name}", old, new
    return None


def refuse_difference(where: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuses to continue a run with other settings.

    Args:
        where: The name of what holds the saved settings, for the message.
        there: The saved settings.
        here: The settings of now.

    Raises:
        InputError: If they differ; the message names the first setting that does.

    Example:
        >>> refuse_difference("the run", {"model": {"width": 8}}, {"model": {"width": 8}})
    """
    if difference := first_difference(there, here):
        name, old, new = difference
        raise InputError(
            f"{where} is of another run: {name} is {old} there and {new} here; use the same settings or another folder"
        )
