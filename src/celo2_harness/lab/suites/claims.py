"""Who does what: processes that share a folder take one run each."""

import hashlib
import os
from pathlib import Path


class Claims:
    """Claims on runs in a folder, as locked bytes of one file.

    A claim ends with the process that has it, however that ends, so a killed run is free for the next process. Claims
    keep processes apart, not threads of one.

    Args:
        path: The file, created where missing.
    """

    def __init__(self, path: Path):
        # Closing any descriptor of the file would end all claims of this process, so there is only this one.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def take(self, key: str) -> bool:
        """Claims a run; returns False if another process has it.

        Args:
            key: What tells runs apart.
        """
        try:
            import fcntl
        except ImportError:  # not on Windows, where one process at a time must do
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _position(key))
        except (BlockingIOError, PermissionError):  # which of the two depends on the system
            return False
        return True

    def release(self, key: str) -> None:
        """Gives a claim back."""
        try:
            import fcntl
        except ImportError:
            return
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _position(key))

    def close(self) -> None:
        """Gives all claims back."""
        os.close(self._file)


def _position(key: str) -> int:
    """The byte that stands for a key. The file stays empty: bytes beyond its end can be locked."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
