"""Files that are replaced in one step."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def replace_file(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Replaces a file in one step: a kill or a full disk leaves the old file or the new one, never a part of it.

    Args:
        path: The file. Its folder must exist.
        content: The new content, whole or in pieces.

    Raises:
        OSError: If the file cannot be written. The old file is unchanged then, and nothing else is left behind.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    # The new name must be on the disk too, or a power cut brings back the old file after the caller went on.
    with contextlib.suppress(OSError):  # some file systems cannot
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
