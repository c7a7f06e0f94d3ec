"""What run folders need: files replaced in one step, a lock, settings compared by name, where numbers come from."""

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

_PACKAGES = {"jax": "jax", "jaxlib": "jaxlib", "optax": "optax", "flax": "flax", "celo2_harness": "celo2-harness"}
LOCK_FILE = "lock"


class InUseError(ValueError):
    """A run folder that another process works in."""


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file in one step: a kill or a full disk leaves the old file or the new one, never a part.

    Args:
        path: The file; its folder must be there.
        content: What it will hold.

    Raises:
        OSError: if it cannot be written. The old file is as it was then, and nothing else is left behind.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
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


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder. The lock ends with the process, however that ends.

    Args:
        folder: Where the lock file goes; it must be there.

    Raises:
        InUseError: if another process has the lock.
        OSError: if the lock file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    path = folder / LOCK_FILE
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "unknown"
            raise InUseError(
                f"out = {str(folder)!r}: another process works in this folder (process {who}); wait for it or stop it,"
                " or give another folder."
            ) from None
        # Only for the message above: a full disk is no reason to refuse.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> tuple[str, Any, Any] | None:
    """The first setting in which two nested records differ: its name and both values; "absent" stands for none.

    >>> first_difference({"model": {"width": 8}}, {"model": {"width": 16}})
    ('model.width', 8, 16)
    """
    for name in [*there, *(name for name in here if name not in there)]:
        old, new = there.get(name, "absent"), here.get(name, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = first_difference(old, new, f"{path}{name}.")
            if inner:
                return inner
        elif old != new:
            return f"{path}{name}", old, new
    return None


def provenance() -> dict[str, Any]:
    """What a result depends on besides its settings: package versions, the device, and the commit in a checkout."""
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {name: version(dist) for name, dist in _PACKAGES.items()},
        "device": f"{device.device_kind} ({device.platform})",
        "commit": git_commit(),
    }


def git_commit(folder: Path = Path(__file__).parent) -> str | None:
    """The git commit that a folder's files are of, "+changes" after it if they differ from it.

    Args:
        folder: The package by default.

    Returns:
        The hexadecimal name; None outside a checkout, without git, and for files that the checkout does not track (an
        installed package inside of another project's checkout).
    """

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "--", ".") is None:
        return None
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return commit and commit + ("+changes" if changed else "")
