"""The tasks by name: what `celo2 evaluate` and suites can ask for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from celo2_harness.tasks.language_model import make_language_model
from celo2_harness.tasks.task import Task


class TaskKind(NamedTuple):
    """A kind of task.

    Attributes:
        description: One line.
        sizes: Names of its sizes, the usual one first, and what each is.
        make: (size, data, batch) -> the task; data is a file or folder, or None for the data that come with Python or a
            package; raises ValueError where they do not fit.
        batch: Examples per training batch where none is given.
    """

    description: str
    sizes: Mapping[str, str]
    make: Callable[[str, Path | None, int], Task]
    batch: int


TASKS = {
    "language_model": TaskKind(
        "predict the next byte of a text with a GPT",
        {
            "nano": "0.9 million parameters, windows of 64 bytes",
            "tiny": "12 thousand parameters, windows of 16 bytes, for tests",
            "nano-64": "nano at width 64",
            "nano-256": "nano at width 256",
            "nano-512": "nano at width 512",
            "small": "11 million parameters, windows of 256 bytes",
            "gpt2": "86 million parameters, windows of 1024 bytes",
            "gpt3-xl": "1213 million parameters, windows of 2048 bytes",
        },
        make_language_model,
        batch=16,
    ),
}


def make_task(name: str, size: str | None = None, data: Path | None = None, batch: int | None = None) -> Task:
    """Returns a task by name.

    Args:
        name: Out of `TASKS`.
        size: Out of the sizes of that kind; by default the first.
        data: A file or folder; by default data that need no file.
        batch: Examples per training batch; by default the kind's.

    Returns:
        The task.

    Raises:
        ValueError: if there is no such task or size, or the data cannot be used.

    >>> make_task("language_model", "nano", batch=2).tokens_per_batch
    128
    """
    if name not in TASKS:
        raise ValueError(f"task = {name!r}: expected one of {', '.join(TASKS)}")
    kind = TASKS[name]
    size = next(iter(kind.sizes)) if size is None else size
    if size not in kind.sizes:
        raise ValueError(f"size = {size!r}: {name} comes as {', '.join(kind.sizes)}")
    return kind.make(size, data, kind.batch if batch is None else batch)
