"""Reads what JSON and TOML hold into frozen dataclasses: the annotations of their fields say what is expected."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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
        where: Where it stands, for messages.

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
    try:
        return _reader(kind)(value)
    except _Misfit as misfit:
        path = "".join(reversed(misfit.path)).lstrip(".")
        name = ": ".join(filter(None, [where, path])) if " " in where else ".".join(filter(None, [where, path]))
        raise InputError(f"{name}{misfit.reason}".removeprefix(": ").replace(".[", "[")) from None


class _Misfit(Exception):
    """A value that is not what was expected; the path to it is gathered on the way out."""

    def __init__(self, reason: str, *path: str):
        self.reason, self.path = reason, list(path)


def _expected(value: Any, what: str) -> _Misfit:
    text = repr(value)
    return _Misfit(f" = {text if len(text) <= 80 else text[:77] + '...'}: expected {what}")


@functools.cache
def _reader(hint: Any) -> Callable[[Any], Any]:
    arguments = get_args(hint)
    if hint is Any:
        return lambda value: value
    if dataclasses.is_dataclass(hint):
        return _table_reader(hint)
    if get_origin(hint) in (Union, UnionType):
        return _union_reader(arguments)
    if get_origin(hint) is Literal:
        return _scalar_reader(lambda value: value in arguments, "one of " + ", ".join(map(str, arguments)))
    if get_origin(hint) is tuple:
        return _tuple_reader(arguments)
    if get_origin(hint) in (Mapping, dict):
        return _scalar_reader(lambda value: isinstance(value, Mapping), "a table")
    if hint is type(None):
        return _scalar_reader(lambda value: value is None, "nothing")
    if hint is float:
        # The bound keeps out whole numbers that no float can hold.
        return _scalar_reader(
            lambda value: isinstance(value, float) or (_is_whole(value) and abs(value) <= sys.float_info.max),
            "a number",
            float,
        )
    if hint is int:
        return _scalar_reader(_is_whole, "a whole number")
    if hint is Path:
        return _scalar_reader(lambda value: isinstance(value, str | Path), "a path", Path)
    return _scalar_reader(lambda value: isinstance(value, hint), _SCALARS[hint])


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _scalar_reader(
    fits: Callable[[Any], bool], what: str, convert: Callable[[Any], Any] = lambda value: value
) -> Callable[[Any], Any]:
    def read_scalar(value: Any) -> Any:
        if not fits(value):
            raise _expected(value, what)
        return convert(value)

    return read_scalar


def _union_reader(hints: tuple[Any, ...]) -> Callable[[Any], Any]:
    readers = [_reader(hint) for hint in hints if hint is not type(None)]
    optional = len(readers) < len(hints)

    def read_union(value: Any) -> Any:
        if value is None and optional:
            return None
        for reader in readers[:-1]:
            try:
                return reader(value)
            except _Misfit:
                continue
        return readers[-1](value)

    return read_union


def _tuple_reader(hints: tuple[Any, ...]) -> Callable[[Any], Any]:
    length = None if hints[-1] is ... else len(hints)
    readers = [_reader(hint) for hint in hints if hint is not ...]

    def read_tuple(value: Any) -> Any:
        if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
            raise _expected(value, "a list" if length is None else f"a list of {length}")
        index = 0
        try:
            items = []
            for index, item in enumerate(value):
                items.append(readers[index if length else 0](item))
            return tuple(items)
        except _Misfit as misfit:
            misfit.path.append(f"[{index}]")
            raise

    return read_tuple


def _table_reader(kind: Any) -> Callable[[Any], Any]:
    readers = {name: _reader(hint) for name, hint in get_type_hints(kind).items()}
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}

    def read_table(value: Any) -> Any:
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            raise _expected(value, "a table")
        found = {}
        for name, item in value.items():
            if name not in fields:
                raise _Misfit(f": there is no such key; expected some of {', '.join(fields)}", f".{name}")
            try:
                found[name] = readers[name](item)
            except _Misfit as misfit:
                misfit.path.append(f".{name}")
                raise
        for name, field in fields.items():
            if name not in found and field.default is field.default_factory is dataclasses.MISSING:
                raise _Misfit(" is missing", f".{name}")
        try:
            return kind(**found)
        except ValueError as error:
            raise _Misfit(f": {error}") from None

    return read_table
