"""IDX files, the layout of MNIST: images and labels in files of their own, plain or compressed with gzip.

A file is a big-endian header - two zero bytes, the type (8 for unsigned bytes), the number of axes, then the length of
every axis as 32 bits - and the bytes after it. Source: the MNIST page of LeCun, Cortes and Burges.
"""

import gzip
import re
import struct
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from celo2_harness.lab.tasks.images.pairs import DataError, Pair, check_labels, shrink
from celo2_harness.lab.tasks.images.reader import Reader

_UNSIGNED_BYTE = 8
_PARTS = {"train": ("train",), "test": ("t10k", "test")}
# "train-images-idx3-ubyte.gz", "train-images.idx3-ubyte", "emnist-digits-test-images-idx3-ubyte"
_IMAGES = re.compile(r"(?P<name>.*?)-?(?P<part>train|t10k|test)-images(?P<dot>[-.])idx3-ubyte(?P<gz>\.gz)?")
_GZIP_MAGIC = b"\x1f\x8b"


def matches(source: str) -> bool:
    """Whether a source is a folder with training images in this layout, or any file."""
    return Path(source).is_file() or any(match["part"] == "train" for _, match in _image_files(Path(source)))


def find(source: str) -> Mapping[str, Reader]:
    """The sets: named by what stands before "train" in the names of the files, or else by the folder."""
    path = Path(source)
    if path.is_file():
        match = _IMAGES.fullmatch(path.name)
        name = match["name"] if match else path.name.split(".")[0]
        return {name or path.absolute().parent.name: partial(_read, {"train": path})}
    return {name: partial(_read, files) for name, files in sorted(_find_files(path).items())}


def _find_files(folder: Path) -> dict[str, dict[str, Path]]:
    """The image files by set and part, of every set that has a training part."""
    found: dict[str, dict[str, Path]] = {}
    for file, match in _image_files(folder):
        part = next(part for part, words in _PARTS.items() if match["part"] in words)
        found.setdefault(match["name"] or folder.absolute().name, {})[part] = file
    return {name: files for name, files in found.items() if "train" in files}


def _image_files(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    return [
        (path, match)
        for path in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if (match := _IMAGES.fullmatch(path.name))
    ]


def read_parts(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images of their own size and labels of the one set in a folder, by part: "train", and "test" where it is there.

    Args:
        folder: Where the files are.

    Returns:
        uint8 images (N, height, width) and labels (N,).

    Raises:
        DataError: none or several sets, a file that is missing, cut short or no IDX file, or labels that do not fit.
    """
    found = _find_files(folder)
    if len(found) != 1:
        there = f"several sets: {', '.join(sorted(found))}" if found else "no train-images-idx3-ubyte"
        raise DataError(f"{folder}: {there}; expected a folder with the files of one IDX image set.")
    (files,) = found.values()
    return {part: _read_full(path) for part, path in files.items()}


def _read(files: Mapping[str, Path], part: str) -> Pair | None:
    if part not in files:
        return None
    images, labels = _read_full(files[part])
    return Pair(shrink(images, f"{files[part]}: images"), labels)


def _read_full(path: Path) -> tuple[np.ndarray, np.ndarray]:
    images = _read_array(path, 3)
    labels_path = _labels_beside(path)
    labels = _read_array(labels_path, 1)
    return images, check_labels(labels, len(images), f"{labels_path}: labels")


def _labels_beside(path: Path) -> Path:
    name = path.name.removesuffix(".gz")
    if "images" not in name:
        raise DataError(
            f"{path}: the labels of an IDX file are looked for in its folder under its own name with 'labels' in"
            " place of 'images', but this name has no 'images' in it. Rename the file, or give an npz folder."
        )
    plain = path.with_name(name.replace("images", "labels").replace("idx3", "idx1"))
    both = [plain, plain.with_name(plain.name + ".gz")]
    for candidate in both:
        if candidate.is_file():
            return candidate
    raise DataError(f"{plain}: no labels for {path.name}; expected this file, plain or with .gz.")


def _read_array(path: Path, axes: int) -> np.ndarray:
    """The bytes of an IDX file as an array with a number of axes."""
    what = {1: "labels", 3: "images"}[axes]
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP_MAGIC):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {what} cannot be read ({type(error).__name__}: {error}).") from None
    header = 4 + 4 * axes
    if content[:4] != bytes((0, 0, _UNSIGNED_BYTE, axes)) or len(content) < header:
        raise DataError(
            f"{path}: not an IDX file of {what}: it starts with {content[:4].hex(' ') or 'nothing'}, expected"
            f" 00 00 08 {axes:02x} (unsigned bytes, {axes} {'axis' if axes == 1 else 'axes'}) and their lengths."
        )
    shape = struct.unpack(f">{axes}I", content[4:header])
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise DataError(
            f"{path}: {what} of shape {shape} take {expected} bytes with the header, the file has {len(content)}:"
            f" {'cut short' if len(content) < expected else 'too long'}."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
