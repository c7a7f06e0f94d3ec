"""Locks that end with the process that holds them, however it ends."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from celo2_harness.lab.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no such locks, so one process at a time must do there.
    fcntl = None

LOCK_FILE = "lock"


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder.

    Args:
        folder: The folder. It must exist.

    Raises:
        InputError: If another process holds the lock.
        OSError: If the lock file cannot be made.
    """
    with (folder / LOCK_FILE).open("a+") as file:
        if not _locked(file, wait=False):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise InputError(
                f"out = {str(folder)!r}: another process works in this folder (process {holder}); wait for it or stop"
                " it, or give another folder"
            )
        # The number is only for the message above, so a full disk is no reason to refuse.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file that other processes append to as well.

    The line is written under a lock and is on the disk afterwards. If a kill has cut the last line short, that part is
    removed first, since the new line would run into it.

    Args:
        path: The file. It is created if missing.
        line: The line, without its end.
    """
    with path.open("a+b") as file:
        _locked(file, wait=True)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


class Claims:
    """Claims of processes on pieces of work, as locked bytes of one file.

    A claim ends with the process that has it, so that the work of a killed process is free for the next one. Claims
    keep processes apart, not threads of one process.

    Args:
        path: The file. It is created if missing, and stays empty: bytes beyond its end can be locked.
    """

    def __init__(self, path: Path):
        # Closing any descriptor of the file would end all claims of this process, so there is only this one.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def take(self, key: str) -> bool:
        """Claims a piece of work.

        Args:
            key: The name of the work.

        Returns:
            False if another process has it.
        """
        if fcntl is not None:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _position(key))
            except (BlockingIOError, PermissionError):  # Which of the two depends on the system.
                return False
        return True

    def release(self, key: str) -> None:
        """Gives a claim back."""
        if fcntl is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _position(key))

    def close(self) -> None:
        """Gives all claims back."""
        os.close(self._file)


def _locked(file: IO, *, wait: bool) -> bool:
    """Returns whether the file could be locked; the lock ends when the file is closed."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _position(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
