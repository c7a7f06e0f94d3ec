"""Folders of `NAME_8x8.npz` files: what `celo2 data prepare` writes."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from celo2_harness.lab.tasks.images.pairs import SIDE, DataError, Pair, check_labels
from celo2_harness.lab.tasks.images.reader import Reader

SUFFIX = f"_{SIDE}x{SIDE}.npz"


def matches(source: str) -> bool:
    """Whether a source is a folder with such files, or one such file."""
    return bool(_files(source))


def find(source: str) -> Mapping[str, Reader]:
    """The sets, by the names of their files."""
    return {path.name.removesuffix(SUFFIX): partial(_read, path) for path in _files(source)}


def _files(source: str) -> list[Path]:
    path = Path(source)
    return [path] if path.name.endswith(SUFFIX) and path.is_file() else sorted(path.glob(f"*{SUFFIX}"))


def _read(path: Path, part: str) -> Pair | None:
    images_name, labels_name = f"{part}_images", f"{part}_labels"
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if part == "test" and images_name not in file and labels_name not in file:
                return None
            images, labels = file[images_name], file[labels_name]
    except Exception as error:  # zipfile, zlib, numpy and key errors alike: the file holds no image set
        raise DataError(
            f"{path}: cannot be read as an image set ({type(error).__name__}: {error}); expected arrays"
            f" {images_name} and {labels_name}."
        ) from None
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or images.dtype != np.uint8 or not len(images):
        raise DataError(f"{path}: {images_name} is {images.dtype} {images.shape}, expected uint8 (N, {SIDE}, {SIDE}).")
    return Pair(images, check_labels(labels, len(images), f"{path}: {labels_name}"))
