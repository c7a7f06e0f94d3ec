"""Token shards from text files, by a tokenizer of the tokenizers library (the `tokens` extra)."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from celo2_harness.lab.tasks.text import HELD_OUT
from celo2_harness.lab.tasks.tokens import FORMAT, HEADER, LARGEST_VOCABULARY, PARTS
from celo2_harness.weights.files import replace_file

END_OF_TEXT = "<|endoftext|>"
"""The token after each file, where the tokenizer has it."""

SHARD_TOKENS = 100_000_000
# Text is encoded in pieces of whole lines, several at a time on all cores.
_PIECE_BYTES = 1 << 16
_PIECES_AT_ONCE = 64


class Piece(NamedTuple):
    """Some lines of a file.

    Attributes:
        part: "train" or "held_out".
        text: The lines.
        size: Their bytes.
        ends: Whether the file ends with them.
    """

    part: str
    text: str
    size: int
    ends: bool


def write_tokens(
    texts: Sequence[Path],
    out: Path,
    *,
    tokenizer: str | None = None,
    train_vocabulary: int | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes the tokens of text files to a folder that `open_tokens` opens.

    The last tenth of the bytes of all files, from the first line that starts there, is held out. A tokenizer that is
    trained sees the other part only. The header is written last, so an interrupted folder is not taken for a whole one.

    Args:
        texts: UTF-8 files, in order.
        out: The folder; made where missing.
        tokenizer: A `tokenizer.json` file, or a name on the Hugging Face hub, which is fetched.
        train_vocabulary: Instead of a tokenizer: train one on the text, byte-level pair encoding with this many tokens
            at most.
        on_bytes: Called with the bytes encoded so far and those in all.

    Returns:
        The header: vocabulary, tokenizer, and shards of each part with their numbers of tokens and SHA-256.

    Raises:
        ValueError: If a text is missing, empty or not UTF-8, nothing is held out, the folder has shards already, or the
            tokenizer cannot be had or has too many tokens.
        ImportError: If the tokenizers library is missing.
        OSError: If a file cannot be written.
    """
    if (tokenizer is None) == (train_vocabulary is None):
        raise ValueError("tokenizer: give the name or file of one, or the vocabulary to train one with; not both")
    if (out / HEADER).exists():
        raise ValueError(f"out: {out} has token shards already; give another folder")
    total = sum(map(_size, texts))
    if not total:
        raise ValueError(f"text: {', '.join(map(str, texts)) or 'no file'}: empty; give files with some text in them")
    coder = _load(tokenizer) if tokenizer is not None else _train(texts, train_vocabulary or 0)
    vocabulary = coder.get_vocab_size()
    if vocabulary > LARGEST_VOCABULARY:
        raise ValueError(f"tokenizer: {tokenizer} has {vocabulary} tokens; shards hold at most {LARGEST_VOCABULARY}")
    # A text that spells a special token means the characters.
    coder.encode_special_tokens = True
    coder.no_padding()
    coder.no_truncation()
    end = coder.token_to_id(END_OF_TEXT)
    out.mkdir(parents=True, exist_ok=True)
    definition = coder.to_str().encode()
    replace_file(out / "tokenizer.json", definition)
    writers = {part: _Writer(out, part) for part in PARTS}
    done, pieces = 0, read_pieces(texts, _PIECE_BYTES)
    while batch := list(islice(pieces, _PIECES_AT_ONCE)):
        encoded = coder.encode_batch([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encoded, strict=True):
            writers[piece.part].add(encoding.ids + [end] * (piece.ends and end is not None))
            done += piece.size
        on_bytes(done, total)
    header = {
        "format": FORMAT,
        "vocabulary": vocabulary,
        "tokenizer": {
            "name": tokenizer if tokenizer is not None else "trained on the text",
            "sha256": hashlib.sha256(definition).hexdigest(),
        },
        **{part: writer.close() for part, writer in writers.items()},
    }
    if not header["held_out"] or not header["train"]:
        raise ValueError(
            f"text: no line starts in the last {HELD_OUT:.0%} of the {total} bytes, or none before it, so one part"
            " would be empty; give more text, or text with line breaks"
        )
    replace_file(out / HEADER, (json.dumps(header, indent=2) + "\n").encode())
    return header


def read_pieces(texts: Sequence[Path], piece_bytes: int) -> Iterator[Piece]:
    """Yields files as pieces of whole lines, in order, each of one part.

    Args:
        texts: The files.
        piece_bytes: A piece ends with the first line that makes it this long.

    Yields:
        Pieces; joined they are the files.

    Raises:
        ValueError: If a file is not UTF-8.
    """
    total = sum(map(_size, texts))
    cut, place = total - int(total * HELD_OUT), 0
    for path in texts:
        lines: list[bytes] = []
        part, size = "train", 0
        with path.open("rb") as file:
            for line in file:
                now = "held_out" if place >= cut else "train"
                if lines and (now != part or size >= piece_bytes):
                    yield Piece(part, _decode(lines, path), size, False)
                    lines, size = [], 0
                part = now
                lines.append(line)
                size += len(line)
                place += len(line)
        if lines:
            yield Piece(part, _decode(lines, path), size, True)


def _decode(lines: list[bytes], path: Path) -> str:
    try:
        return b"".join(lines).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path} is not UTF-8 ({error.reason}); convert it first") from None


def _size(path: Path) -> int:
    if not path.is_file():
        raise ValueError(f"text: {path} is {'a folder' if path.is_dir() else 'not there'}; give text files")
    return path.stat().st_size


class _Writer:
    """Collects tokens of a part and writes a shard whenever there are enough."""

    def __init__(self, folder: Path, part: str):
        self.folder = folder
        self.part = part
        self.shards: list[dict[str, Any]] = []
        self.waiting: list[np.ndarray] = []
        self.count = 0

    def add(self, ids: list[int]) -> None:
        """Takes tokens."""
        self.waiting.append(np.array(ids, np.uint16))
        self.count += len(ids)
        if self.count >= SHARD_TOKENS:
            self._write()

    def close(self) -> list[dict[str, Any]]:
        """Writes what is left; returns what the header says of the shards."""
        if self.count:
            self._write()
        return self.shards

    def _write(self) -> None:
        tokens = np.concatenate(self.waiting)
        content = io.BytesIO()
        np.save(content, tokens, allow_pickle=False)
        name = f"{self.part}_{len(self.shards):05d}.npy"
        replace_file(self.folder / name, content.getvalue())
        digest = hashlib.sha256(tokens.data).hexdigest()
        self.shards.append({"file": name, "tokens": len(tokens), "sha256": digest})
        self.waiting, self.count = [], 0


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError("tokens need the tokenizers library: pip install 'celo2-harness[tokens]'") from None
    return tokenizers


def _load(tokenizer: str) -> Any:
    library = _library()
    is_file = Path(tokenizer).is_file()
    try:
        return library.Tokenizer.from_file(tokenizer) if is_file else library.Tokenizer.from_pretrained(tokenizer)
    except Exception as error:  # the library raises plain Exception, of the file and of the network alike
        problem = "no tokenizer.json" if is_file else "no such file, and it cannot be fetched from the hub"
        raise ValueError(f"tokenizer = {tokenizer!r}: {problem} ({error})") from None


def _train(texts: Sequence[Path], vocabulary: int) -> Any:
    library = _library()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    if not len(alphabet) < vocabulary <= LARGEST_VOCABULARY:
        raise ValueError(
            f"train_vocabulary = {vocabulary}: expected {len(alphabet) + 1} (the bytes and {END_OF_TEXT}) to"
            f" {LARGEST_VOCABULARY}"
        )
    coder = library.Tokenizer(library.models.BPE())
    coder.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
    )
    coder.train_from_iterator(
        (piece.text for piece in read_pieces(texts, _PIECE_BYTES) if piece.part == "train"), trainer
    )
    return coder
