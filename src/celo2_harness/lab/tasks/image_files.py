"""Files of labelled images: scikit-learn's digits, npz files, and IDX files, the layout of MNIST.

An IDX file is a big-endian header (two zero bytes, the type, which is 8 for unsigned bytes, the number of axes, then
the length of every axis in 32 bits) and the bytes after it. Images and labels lie in files of their own, plain or
compressed with gzip.
"""

import gzip
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

CLASSES = 10
"""The number of classes of every image set here."""
Parts = dict[str, tuple[np.ndarray, np.ndarray]]
"""Parts "train" and maybe "test": images (count, height, width) or (..., channels), and labels (count,)."""

_UNSIGNED_BYTE = 8
_PARTS = {"train": "train", "t10k": "test", "test": "test"}
# "train-images-idx3-ubyte.gz", "train-images.idx3-ubyte", "emnist-digits-test-images-idx3-ubyte"
_IMAGES = re.compile(r"(?P<name>.*?)-?(?P<part>train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")
_GZIP_MAGIC = b"\x1f\x8b"


class DataError(ValueError):
    """Data that is missing or not what it should be; the message names the file and the fault."""


def read_digits() -> Parts:
    """Reads the 1,797 digits of 8x8 pixels that come with scikit-learn: no file, no network, no test part."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("the digits need scikit-learn: pip install 'celo2-harness[data]'") from None
    digits: Any = load_digits()
    # Pixels are 0 to 16 there.
    return {"train": (np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.uint8))}


def read_npz(path: Path, classes: int = CLASSES) -> Parts:
    """Reads an npz file with `train_images` and `train_labels`, and `test_images` and `test_labels` or neither.

    Args:
        path: The file.
        classes: The number of classes that there may be.

    Returns:
        Images and labels of each part.

    Raises:
        DataError: If the file holds something else, or labels that do not fit.
    """
    parts: Parts = {}
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            for part in ("train", "test"):
                names = (f"{part}_images", f"{part}_labels")
                if part == "train" or any(name in file for name in names):
                    images, labels = (file[name] for name in names)
                    parts[part] = (images, labels)
    except Exception as error:  # zipfile, zlib, numpy and key errors alike: the file holds no image set
        raise DataError(
            f"{path}: cannot be read as an image set ({type(error).__name__}: {error}); expected arrays train_images"
            " and train_labels, and test_images and test_labels or neither."
        ) from None
    return {
        part: (images, check_labels(labels, images.shape[0] if images.ndim else 0, f"{path}: {part}_labels", classes))
        for part, (images, labels) in parts.items()
    }


def find_idx_sets(folder: Path) -> dict[str, dict[str, Path]]:
    """Finds the image files of a folder.

    Args:
        folder: A folder, or any other path, in which nothing is found.

    Returns:
        The files by set and part, for every set that has a training part. A set is named by what stands before "train"
        in the name of its file, or else by the folder.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := _IMAGES.fullmatch(path.name):
            found.setdefault(match["name"] or folder.absolute().name, {})[_PARTS[match["part"]]] = path
    return {name: files for name, files in sorted(found.items()) if "train" in files}


def read_idx(files: dict[str, Path]) -> Parts:
    """Reads the images of a set, and the labels that lie beside them.

    Args:
        files: The image file of each part.

    Returns:
        Images and labels of each part.

    Raises:
        DataError: If a file is missing, cut short or no IDX file, or the labels do not fit the images.
    """

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        images, labels_path = _read_array(path, 3), _labels_beside(path)
        return images, check_labels(_read_array(labels_path, 1), len(images), f"{labels_path}: labels")

    return {part: read(files[part]) for part in ("train", "test") if part in files}


def _labels_beside(path: Path) -> Path:
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    plain = path.with_name(name)
    for candidate in (plain, plain.with_name(name + ".gz")):
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


def check_labels(
    labels: Shaped[np.ndarray, "..."], count: int, where: str, classes: int = CLASSES
) -> UInt8[np.ndarray, " count"]:
    """Returns labels as uint8.

    Args:
        labels: The labels of a source.
        count: The number of images that they belong to.
        where: File and array, for the message.
        classes: The number of classes that there may be.

    Returns:
        The labels.

    Raises:
        DataError: If there is another number of labels than `count`, or they are no integers, or no classes.
    """
    if labels.shape != (count,):
        raise DataError(f"{where} has shape {labels.shape}, expected {(count,)}, one per image.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where} is {labels.dtype}, must be integers from 0 to {classes - 1}.")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        first = outside[0]
        raise DataError(
            f"{where} must be integers from 0 to {classes - 1}; {outside.size} of {count} are not, the first is"
            f" {labels[first]} at {first}."
        )
    return labels.astype(np.uint8)
