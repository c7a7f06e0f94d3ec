"""Bytes of a text as training and held-out data."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from celo2_harness.lab.tasks.task import step_generator

HELD_OUT = 0.1
"""The part of a text that is kept for validation, at its end."""


@dataclass(frozen=True, eq=False)
class Text:
    """A text as two runs of bytes that never overlap; `LanguageData`.

    Attributes:
        name: Where the text came from, for records and messages.
        train: The bytes to train on, uint8.
        held_out: The bytes to validate on, uint8: the tail of the text.
    """

    name: str
    train: UInt8[np.ndarray, " train_bytes"]
    held_out: UInt8[np.ndarray, " held_out_bytes"]

    @property
    def unit(self) -> str:
        """The unit of a loss on this text."""
        return "nats per byte"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the whole text, in hexadecimal: tells whether two runs saw the same data."""
        return hashlib.sha256(self.train.tobytes() + self.held_out.tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Returns the digest and the number of bytes."""
        return {"text": {"sha256": self.digest, "bytes": len(self.train) + len(self.held_out)}}

    def sample(self, seed: int, step: int, count: int, context: int) -> UInt8[np.ndarray, "count window"]:
        """Draws windows of `context + 1` bytes; the same ones for the same seed and step.

        >>> text = split_text(bytes(range(100)), "numbers", context=3)
        >>> text.sample(seed=0, step=5, count=2, context=3).shape
        (2, 4)
        """
        starts = step_generator(seed, step).integers(0, len(self.train) - context, size=count)
        return self.train[starts[:, None] + np.arange(context + 1)]

    def spread(self, context: int, most: int) -> UInt8[np.ndarray, "count window"]:
        """Cuts evenly spread held-out windows of `context + 1` bytes, whose predictions do not overlap.

        Args:
            context: The number of predictions per window.
            most: A bound on the predictions in all windows together; at least one window is returned.

        Returns:
            The windows; the first starts the held-out part and the last ends it.
        """
        count = max(1, min((len(self.held_out) - 1) // context, most // context))
        starts = np.linspace(0, len(self.held_out) - context - 1, count).astype(np.int64)
        return self.held_out[starts[:, None] + np.arange(context + 1)]


def split_text(content: bytes, name: str, context: int) -> Text:
    """Splits a text into a training part and a held-out tail.

    Args:
        content: The bytes of the text.
        name: What to call it in messages.
        context: The length of a training window in bytes. Each part must hold one window and the byte after it.

    Returns:
        The two parts.

    Raises:
        ValueError: If the text is empty or too short; the message says how many bytes there are and are needed.

    >>> text = split_text(bytes(100), "zeros", context=8)
    >>> text.train.shape, text.held_out.shape
    ((90,), (10,))
    """
    if not content:
        raise ValueError(f"text: {name} is empty; give a file with some text in it")
    held_out = int(len(content) * HELD_OUT)
    if held_out < context + 1:
        # The smallest size whose tail holds a window; the training part is then larger still.
        needed = next(size for size in range(int((context + 1) / HELD_OUT), 2**62) if int(size * HELD_OUT) > context)
        raise ValueError(
            f"text: {name} has {len(content)} bytes, but a context of {context} needs at least {needed} "
            f"(its last {HELD_OUT:.0%} are held out and must be {context + 1}); give more text or a smaller context"
        )
    array = np.frombuffer(content, np.uint8)
    return Text(name, array[:-held_out], array[-held_out:])


def read_text(path: str | os.PathLike[str], context: int) -> Text:
    """Reads any file as bytes and splits it; see `split_text`.

    Args:
        path: The file.
        context: The length of a training window in bytes.

    Returns:
        The two parts.

    Raises:
        ValueError: If there is no such file, it is a folder, it cannot be read, or it is empty or too short.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"text: there is no file {path}; check the path") from None
    except IsADirectoryError:
        raise ValueError(f"text: {path} is a folder; give a single text file") from None
    except OSError as error:
        raise ValueError(f"text: cannot read {path}: {error.strerror or error}") from None
    return split_text(content, str(path), context)


def default_text(context: int) -> Text:
    """Returns the text that every Python carries: the language reference behind `help()`, 0.5 MB of English.

    It differs a little between Python versions; `Text.digest` tells which one a run saw.

    Args:
        context: The length of a training window in bytes.

    Returns:
        The two parts.

    Raises:
        ValueError: If the text is too short for the context, or this Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("text: this Python has no pydoc_data.topics; give a text file") from None
    return split_text("".join(topics[name] for name in sorted(topics)).encode(), "pydoc_data.topics", context)


def byte_classes(content: UInt8[np.ndarray, " bytes"], classes: int) -> UInt8[np.ndarray, " bytes"]:
    """Maps the bytes of a text to few classes: one for each of the most frequent bytes, the last for all others.

    Args:
        content: The text.
        classes: The number of classes, 2 to 256.

    Returns:
        The class of each byte; 0 is the most frequent one, and of equally frequent ones the lower comes first.

    >>> byte_classes(np.frombuffer(b"banana!?", np.uint8), 3)
    array([2, 0, 1, 0, 1, 0, 2, 2], dtype=uint8)
    """
    order = np.argsort(-np.bincount(content, minlength=256), kind="stable")
    table = np.empty(256, np.uint8)
    table[order] = np.minimum(np.arange(256), classes - 1)
    return table[content]
