"""Reads what JSON and TOML hold into frozen dataclasses: the annotations of their fields say what is expected."""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from celo2_harness.lab.errors import InputError

T = TypeVar("T")

_SCALARS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}


def read(kind: type[T], value: Any, where: str = "") -> T:
    """Makes a dataclass of a table, and checks it.

    Whole numbers are numbers, but true and false are neither; lists become tuples; texts become paths where a path is
    expected. Dataclasses may hold others. Their own checks, in `__post_init__`, apply as well.

    Args:
        kind: The dataclass. Its fields may be text, bool, int, float, Path, Literal, tuple, Mapping, Any, another
            dataclass, or one of several of these.
        value: The table.
        where: The place of the table, for messages.

    Returns:
        The dataclass.

    Raises:
        InputError: If the table does not fit; the message names the key, the value and what is expected.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Search:
        ...     learning_rates: tuple[float, ...]
        >>> read(Search, {"learning_rates": [1, 0.1]})
        Search(learning_rates=(1.0, 0.1))
        >>> read(Search, {"learning_rates": ["high"]}, "search")
        Traceback (most recent call last):
        ...
        celo2_harness.lab.errors.InputError: search.learning_rates[0] = 'high': expected a number
    """
    return _read(kind, value, where, where + (": " if " " in where else ".") if where else "")


def _read(hint: Any, value: Any, where: str, inside: str) -> Any:
    """Reads the value at a place; the names of its keys go behind `inside` in messages."""
    kind, arguments = get_origin(hint), get_args(hint)
    if hint is Any or (value is None and NoneType in arguments):
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _read_table(hint, value, where, inside)  # type: ignore[arg-type]
    if kind in (Union, UnionType):
        *others, last = (argument for argument in arguments if argument is not NoneType)
        for other in others:
            try:
                return _read(other, value, where, inside)
            except InputError:
                continue
        return _read(last, value, where, inside)
    if kind is tuple and isinstance(value, list | tuple):
        hints = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(hints) == len(value):
            items = enumerate(zip(hints, value, strict=True))
            return tuple(_read(of, item, f"{where}[{i}]", f"{where}[{i}].") for i, (of, item) in items)
    if kind is tuple:
        fits, expected = False, "a list" if arguments[-1] is ... else f"a list of {len(arguments)}"
    elif kind is Literal:
        fits, expected = value in arguments, "one of " + ", ".join(map(str, arguments))
    elif kind is not None:
        fits, expected = isinstance(value, Mapping), "a table"
    else:
        # The bound keeps out whole numbers that no float can hold.
        if hint is float and isinstance(value, int) and abs(value) <= sys.float_info.max:
            value = value if isinstance(value, bool) else float(value)
        elif hint is Path and isinstance(value, str):
            value = Path(value)
        fits, expected = isinstance(value, hint) and isinstance(value, bool) == (hint is bool), _SCALARS[hint]
    if not fits:
        _refuse(value, where, expected)
    return value


@functools.cache
def _fields(kind: Any) -> tuple[Mapping[str, dataclasses.Field], Mapping[str, Any]]:
    return {field.name: field for field in dataclasses.fields(kind) if field.init}, get_type_hints(kind)


def _read_table(kind: Any, value: Any, where: str, inside: str) -> Any:
    if not isinstance(value, Mapping):
        _refuse(value, where, "a table")
    fields, hints = _fields(kind)
    missing = dataclasses.MISSING
    needed = [name for name, field in fields.items() if field.default is field.default_factory is missing]
    if unknown := [name for name in value if name not in fields]:
        raise InputError(f"{inside}{unknown[0]}: there is no such key; expected some of {', '.join(fields)}")
    found = {name: _read(hints[name], item, inside + name, f"{inside}{name}.") for name, item in value.items()}
    if absent := [name for name in needed if name not in found]:
        raise InputError(f"{inside}{absent[0]} is missing")
    try:
        return kind(**found)
    except ValueError as error:
        raise InputError(f"{where}: {error}" if where else str(error)) from None


def _refuse(value: Any, where: str, expected: str) -> NoReturn:
    text = repr(value)
    raise InputError(f"{where} = {text if len(text) <= 80 else text[:77] + '...'}: expected {expected}")
