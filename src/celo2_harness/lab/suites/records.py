"""Result files: JSON Lines, opened by a header that says what made them."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.training.provenance import provenance as provenance
from celo2_harness.weights.files import replace_file


def finite_or_none(value: float) -> float | None:
    """Returns the number, or None where JSON has no word for it (NaN and the infinities)."""
    return value if math.isfinite(value) else None


def prepare_folder(folder: Path) -> None:
    """Makes a folder and checks that it can be written.

    Args:
        folder: Created with its parents where missing.

    Raises:
        InputError: if it is a file, cannot be made or cannot be written to.
    """
    probe = folder / ".write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"out: cannot write to {folder}: {error.strerror or error}; choose another folder") from None


@contextmanager
def write_errors(folder: Path, safe: Callable[[], str]) -> Iterator[None]:
    """Says what a full disk or a missing permission means for the work in a folder.

    Args:
        folder: Where the work is written.
        safe: Returns what is safe, and how to go on.

    Raises:
        InputError: in place of an `OSError`.
    """
    try:
        yield
    except BrokenPipeError:  # of whoever reads what is printed
        raise
    except OSError as error:
        raise InputError(f"out: cannot write to {folder}: {error.strerror or error}; {safe()}") from error


def write_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a record to a JSON Lines file.

    Args:
        path: The file, created where missing.
        record: Anything JSON can hold.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a record to a JSON Lines file that other processes append to as well.

    The line is written under a lock and is on the disk afterwards. A last line that a kill cut short is removed first:
    the new one would run into it.

    Args:
        path: The file, created where missing.
        record: Anything JSON can hold.
    """
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    with path.open("a+b") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # ends when the file is closed
        except ImportError:  # not on Windows
            pass
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Replaces a JSON Lines file in one move, so that a kill leaves the old file or the new one.

    Args:
        path: The file.
        records: Its new content.
    """
    replace_file(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a JSON Lines file; a last line cut short by a kill is left out.

    Args:
        path: The file. A missing one counts as empty.

    Returns:
        The records.

    Raises:
        InputError: if the file cannot be read or a line before the last is not JSON.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError
            records.append(record)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise InputError(f"{path} is damaged: line {number} is not a JSON record") from None
    return records
