"""Token shards: folders of uint16 arrays that stay on disk, and windows out of them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt16

from celo2_harness.lab.tasks.task import step_generator

HEADER = "tokens.json"
FORMAT = 1
LARGEST_VOCABULARY = 2**16
PARTS = ("train", "held_out")

Shards = tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class TokenShards:
    """Tokens of a text in two parts that never overlap; `LanguageData`. Shards are mapped into memory, not read.

    Attributes:
        folder: The folder of the shards, for messages.
        vocabulary: The size of the vocabulary; tokens are below this.
        digest: SHA-256 over the digests that the header gives of the tokenizer and of all shards, in hexadecimal.
        train: The shards to train on, uint16.
        held_out: The shards to validate on.
    """

    folder: Path
    vocabulary: int
    digest: str
    train: Shards
    held_out: Shards

    @property
    def unit(self) -> str:
        """The unit of a loss on these tokens."""
        return "nats per token"

    def describe(self) -> dict[str, Any]:
        """Returns the digest, the vocabulary and the number of tokens in each part."""
        counts = {part: sum(map(len, getattr(self, part))) for part in PARTS}
        return {"tokens": {"sha256": self.digest, "vocabulary": self.vocabulary, **counts}}

    def sample(self, seed: int, step: int, count: int, context: int) -> UInt16[np.ndarray, "count window"]:
        """Draws windows of `context + 1` tokens, each as likely as any other; the same for the same seed and step.

        Args:
            seed: The seed of the run.
            step: The step that the windows are for.
            count: The number of windows.
            context: The number of predictions per window. Windows do not cross from one shard to the next.

        Returns:
            The windows.

        Raises:
            ValueError: If a token is outside the vocabulary.
        """
        ends = np.cumsum([max(0, len(shard) - context) for shard in self.train])
        return self._cut(self.train, ends, step_generator(seed, step).integers(0, ends[-1], size=count), 1, context)

    def spread(self, context: int, most: int) -> UInt16[np.ndarray, "count window"]:
        """Returns evenly spread held-out windows, whose predictions do not overlap.

        Args:
            context: The number of predictions per window.
            most: A bound on the predictions in all windows together; at least one window is returned.

        Returns:
            The windows.

        Raises:
            ValueError: If a token is outside the vocabulary.
        """
        ends = np.cumsum([max(0, (len(shard) - 1) // context) for shard in self.held_out])
        count = max(1, min(int(ends[-1]), most // context))
        places = np.linspace(0, ends[-1] - 1, count).astype(np.int64)
        return self._cut(self.held_out, ends, places, context, context)

    def _cut(
        self, shards: Shards, ends: np.ndarray, places: np.ndarray, stride: int, context: int
    ) -> UInt16[np.ndarray, "count window"]:
        """Windows by their place in the row of all windows, of which shard k has those from ends[k - 1] to ends[k]."""
        which = np.searchsorted(ends, places, side="right")
        starts = (places - np.concatenate([[0], ends])[which]) * stride
        windows = np.stack([shards[k][s : s + context + 1] for k, s in zip(which, starts, strict=True)])
        if windows.max() >= self.vocabulary:
            raise ValueError(
                f"data: {self.folder} holds the token {windows.max()}, but {HEADER} says that all are below"
                f" {self.vocabulary}; make the shards again with celo2 data tokens"
            )
        return windows


def open_tokens(folder: Path, context: int, vocabulary: int = LARGEST_VOCABULARY) -> TokenShards:
    """Opens a folder that `celo2 data tokens` has made.

    Args:
        folder: A folder with `tokens.json`, which names the shards of each part, and these as one-dimensional uint16
            npy files.
        context: The number of predictions per window; each part must have a shard that holds a window.
        vocabulary: The number of tokens that the model knows.

    Returns:
        The shards, not read yet.

    Raises:
        ValueError: If there is no such folder, a file is missing, damaged or not what the header says, the vocabulary
            is too large, or there are too few tokens.
    """
    path = folder / HEADER
    try:
        header = json.loads(path.read_text())
        known = header["format"] == FORMAT
        size = int(header["vocabulary"])
        listed = {part: [(str(s["file"]), int(s["tokens"]), str(s["sha256"])) for s in header[part]] for part in PARTS}
        digests = [str(header["tokenizer"]["sha256"]), *(shard[2] for part in PARTS for shard in listed[part])]
    except OSError as error:
        raise ValueError(
            f"data: cannot read {path} ({error.strerror or error}); expected a folder made by celo2 data tokens, which"
            f" writes {HEADER} last"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: {path} is no header of token shards ({type(error).__name__}: {error})") from None
    if not known:
        raise ValueError(f"data: {path} has format {header['format']!r}, this version reads {FORMAT}")
    if not 0 < size <= vocabulary:
        raise ValueError(
            f"data: {folder} has a vocabulary of {size}, the model has {vocabulary}; choose a larger size, or make"
            " shards with a smaller vocabulary"
        )
    parts = {part: tuple(_open(folder / file, count) for file, count, _ in listed[part]) for part in PARTS}
    for part, shards in parts.items():
        longest = max(map(len, shards), default=0)
        if longest < context + 1:
            raise ValueError(
                f"data: {folder} has no {part} shard of {context + 1} tokens, which a context of {context} needs; the"
                f" longest has {longest}. Give more text or a size with a smaller context"
            )
    digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return TokenShards(folder, size, digest, parts["train"], parts["held_out"])


def _open(path: Path, count: int) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"data: cannot read the shard {path} ({error}); make the shards again") from None
    if not isinstance(shard, np.ndarray) or shard.dtype != np.uint16 or shard.shape != (count,):
        got = f"{shard.dtype} {shard.shape}" if isinstance(shard, np.ndarray) else "an archive"
        raise ValueError(f"data: the shard {path} is {got}, {HEADER} says uint16 ({count},); make the shards again")
    return shard
