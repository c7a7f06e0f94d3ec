"""Labelled images in memory: where they come from, what they look like, and batches as a function of seed and step."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8

from celo2_harness.lab.tasks.image_files import (
    CLASSES,
    DataError,
    Parts,
    find_idx_sets,
    read_digits,
    read_idx,
    read_npz,
)
from celo2_harness.lab.tasks.task import step_generator

VALIDATION_IMAGES = 2000
"""The most held-out images that an evaluation takes; they are spread evenly over all there are."""
HELD_OUT = 6
"""Where a source has no test part, one image in this many, at the end, is held out."""

_FORMS = (
    "a folder with IDX files (train-images-idx3-ubyte.gz and its labels, t10k-... for the test part), or an npz file"
    " with train_images, train_labels, test_images and test_labels"
)


class ImageBatch(NamedTuple):
    """Images as they are stored, and their classes."""

    images: UInt8[np.ndarray, "batch height width channels"] | UInt8[Array, "batch height width channels"]
    labels: Int32[np.ndarray, " batch"] | Int32[Array, " batch"]


@dataclass(frozen=True)
class ImageFormat:
    """The size, colours and classes of images.

    Attributes:
        height: The number of rows of pixels.
        width: The number of columns of pixels.
        channels: 1 for grey, 3 for colour.
        classes: The number of classes; labels are 0 to classes - 1.
        mean: The mean of each channel over the training images, with pixels scaled to [0, 1].
        deviation: The standard deviation of each channel, likewise.

    >>> digits = ImageFormat(8, 8, 1, 10, mean=(0.5,), deviation=(0.25,))
    >>> digits.standardise(np.array([0, 255], np.uint8).reshape(1, 2, 1, 1)).ravel().tolist()
    [-2.0, 2.0]
    """

    height: int
    width: int
    channels: int
    classes: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.height, self.width, self.channels

    @property
    def pixels(self) -> int:
        """The number of values of an image."""
        return self.height * self.width * self.channels

    def standardise(
        self, images: UInt8[np.ndarray, "*batch height width channels"] | UInt8[Array, "*batch height width channels"]
    ) -> Float32[Array, "*batch height width channels"]:
        """Returns (x / 255 - mean) / deviation, per channel."""
        scaled = jnp.asarray(images, jnp.float32) / 255.0
        return (scaled - jnp.array(self.mean, jnp.float32)) / jnp.array(self.deviation, jnp.float32)


FORMATS = {
    "digits": ImageFormat(8, 8, 1, CLASSES, mean=(0.3052,), deviation=(0.3749,)),
    "fashion": ImageFormat(28, 28, 1, CLASSES, mean=(0.2860,), deviation=(0.3530,)),
}
"""The image sets by name. Means and deviations are those of the training images, rounded."""


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """Labelled images in two parts that never overlap.

    Attributes:
        images: The training images, uint8.
        labels: The classes of the training images.
        held_out_images: The images for validation, uint8.
        held_out_labels: The classes of the images for validation.
    """

    images: UInt8[np.ndarray, "count height width channels"]
    labels: Int32[np.ndarray, " count"]
    held_out_images: UInt8[np.ndarray, "held_out height width channels"]
    held_out_labels: Int32[np.ndarray, " held_out"]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all arrays, in hexadecimal."""
        content = hashlib.sha256()
        for array in (self.images, self.labels, self.held_out_images, self.held_out_labels):
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Returns the digest and the counts."""
        return {"sha256": self.digest, "train": len(self.labels), "held_out": len(self.held_out_labels)}

    def sample(self, seed: int, step: int, count: int) -> ImageBatch:
        """Returns training images, drawn with replacement; the same ones for the same seed and step."""
        rows = step_generator(seed, step).integers(0, len(self.labels), size=count)
        return ImageBatch(self.images[rows], self.labels[rows])

    def validation(self) -> ImageBatch:
        """Returns at most `VALIDATION_IMAGES` held-out images at even distances, the first and the last among them."""
        count = len(self.held_out_labels)
        rows = np.linspace(0, count - 1, min(count, VALIDATION_IMAGES)).astype(np.int64)
        return ImageBatch(self.held_out_images[rows], self.held_out_labels[rows])


def load_images(source: Path | None, form: ImageFormat) -> ImageArrays:
    """Returns the labelled images of a source, checked against a format.

    Where there is no test part, the last sixth of the images is held out.

    Args:
        source: None for the 8x8 digits of scikit-learn (the `data` extra); a folder with the IDX files of one set; or
            an npz file with uint8 `train_images` (N, height, width) or (N, height, width, channels), `train_labels`
            (N,) and, if it has them, `test_images` and `test_labels`.
        form: The format that the task needs.

    Returns:
        The images.

    Raises:
        DataError: If there is nothing of the kind, a file is damaged, or sizes or labels do not fit the format.
        ImportError: If an extra is missing.
    """
    if source is None:
        if form.shape != FORMATS["digits"].shape:
            raise DataError(
                f"data: this size takes {_name(form)}, which do not come with a package; give {_FORMS}. Debian's"
                " dataset-fashion-mnist has Fashion-MNIST in /usr/share/datasets/fashion-mnist."
            )
        return _split(read_digits(), form, "digits")
    if source.is_dir():
        found = find_idx_sets(source)
        if len(found) != 1:
            there = f"several sets: {', '.join(found)}" if found else "no train-images-idx3-ubyte"
            raise DataError(f"{source}: {there}; expected a folder with the files of one IDX image set.")
        return _split(read_idx(*found.values()), form, str(source))
    if source.is_file() and source.suffix == ".npz":
        return _split(read_npz(source, form.classes), form, str(source))
    problem = "neither a folder nor an npz file" if source.exists() else "no such folder or file"
    raise DataError(f"data = {str(source)!r}: {problem}; expected {_FORMS}.")


def _split(parts: Parts, form: ImageFormat, where: str) -> ImageArrays:
    checked = {
        part: (_check_images(images, form, f"{where}: {part} images"), labels.astype(np.int32))
        for part, (images, labels) in parts.items()
    }
    images, labels = checked["train"]
    if "test" in checked:
        return ImageArrays(images, labels, *checked["test"])
    cut = len(labels) - len(labels) // HELD_OUT
    if cut == len(labels):
        raise DataError(f"{where}: {len(labels)} images and no test part; expected at least {HELD_OUT}.")
    return ImageArrays(images[:cut], labels[:cut], images[cut:], labels[cut:])


def _check_images(images: np.ndarray, form: ImageFormat, what: str) -> np.ndarray:
    given = images[..., None] if images.ndim == 3 else images
    if given.dtype != np.uint8 or given.shape[1:] != form.shape or not len(given):
        raise DataError(
            f"{what} are {images.dtype} {images.shape}, but this size takes {_name(form)} as uint8; choose the size"
            " that fits the images."
        )
    return given


def _name(form: ImageFormat) -> str:
    colour = {1: "grey", 3: "colour"}.get(form.channels, f"{form.channels}-channel")
    return f"{colour} images of {form.height}x{form.width} pixels in {form.classes} classes"
