"""The tasks by name: what `celo2 evaluate` and suites can ask for."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from celo2_harness import plugins
from celo2_harness.lab.tasks.image_task import make_image_task
from celo2_harness.lab.tasks.language_model import make_language_model, make_token_language_model
from celo2_harness.lab.tasks.task import Task


class TaskKind(NamedTuple):
    """A kind of task.

    Attributes:
        description: A line for lists of tasks.
        sizes: The names of its sizes, the usual one first, with a description of each.
        make: (size, data, batch) -> the task; data is a file or folder, or None for the data that come with Python or a
            package; it raises ValueError where they do not fit.
        batch: The number of examples in a training batch where none is given.
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
    "token_language_model": TaskKind(
        "predict the next token of a text with a GPT, on shards made by `celo2 data tokens`",
        {
            "small": "1.9 million parameters, 4,096 tokens, windows of 128",
            "gpt2-124m": "124 million parameters, 50,257 tokens, windows of 1,024",
            "gpt3-xl-1.3b": "1315 million parameters, 50,257 tokens, windows of 2,048",
        },
        make_token_language_model,
        batch=16,
    ),
    "image_mlp": TaskKind(
        "classify images with a multilayer perceptron",
        {
            "digits": "64-32-10 on 8x8 digits",
            "fashion": "784-128-128-10 on Fashion-MNIST",
        },
        partial(make_image_task, "image_mlp"),
        batch=64,
    ),
    "conv": TaskKind(
        "classify images with a convolutional net",
        {
            "digits": "2 layers, 5 thousand parameters, on 8x8 digits",
            "fashion": "3 layers, 24 thousand parameters, on Fashion-MNIST",
        },
        partial(make_image_task, "conv"),
        batch=64,
    ),
    "vit": TaskKind(
        "classify images with a vision transformer",
        {
            "digits": "26 thousand parameters, patches of 2 pixels, on 8x8 digits",
            "fashion": "0.2 million parameters, patches of 7 pixels, on Fashion-MNIST",
        },
        partial(make_image_task, "vit"),
        batch=64,
    ),
    "autoencoder": TaskKind(
        "compress images to a short code and back",
        {
            "digits": "64-32-8-32-64 on 8x8 digits",
            "fashion": "784-256-64-32-64-256-784 on Fashion-MNIST",
        },
        partial(make_image_task, "autoencoder"),
        batch=64,
    ),
}


def find_task(name: str) -> TaskKind | None:
    """Returns a kind of task out of `TASKS` or of an installed package; None if there is none of that name."""
    return TASKS.get(name) or plugins.load_plugin("tasks", name, TaskKind)


def make_task(name: str, size: str | None = None, data: Path | None = None, batch: int | None = None) -> Task:
    """Returns a task by name.

    Args:
        name: The name of a task in `TASKS` or of an installed package (entry-point group "celo2_harness.tasks").
        size: The name of a size of that kind; by default the first.
        data: A file or folder; by default data that need no file.
        batch: The number of examples in a training batch; by default the kind's.

    Returns:
        The task.

    Raises:
        ValueError: If there is no such task or size, or the data cannot be used.

    >>> make_task("language_model", "nano", batch=2).tokens_per_batch
    128
    """
    kind = find_task(name)
    if kind is None:
        raise ValueError(f"task = {name!r}: expected one of {', '.join((*TASKS, *plugins.plugin_names('tasks')))}")
    size = next(iter(kind.sizes)) if size is None else size
    if size not in kind.sizes:
        raise ValueError(f"size = {size!r}: {name} comes as {', '.join(kind.sizes)}")
    return kind.make(size, data, kind.batch if batch is None else batch)
