"""Labelled images for training: their format, batches as a function of seed and step, a fixed held-out part."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8

VALIDATION_IMAGES = 2000
"""How many held-out images an evaluation takes, at most; they are spread evenly over all there are."""


class ImageBatch(NamedTuple):
    """Images as they are stored, and their classes."""

    images: UInt8[np.ndarray, "batch height width channels"] | UInt8[Array, "batch height width channels"]
    labels: Int32[np.ndarray, " batch"] | Int32[Array, " batch"]


@dataclass(frozen=True)
class ImageFormat:
    """What the images of a task look like.

    Attributes:
        height: Pixels from top to bottom.
        width: Pixels from left to right.
        channels: 1 for grey, 3 for colour.
        classes: How many there are; labels are 0 to classes - 1.
        mean: Of each channel, with pixels scaled to [0, 1].
        deviation: The standard deviation, likewise.

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
        """How many numbers an image has."""
        return self.height * self.width * self.channels

    def standardise(
        self, images: UInt8[np.ndarray, "*batch height width channels"] | UInt8[Array, "*batch height width channels"]
    ) -> Float32[Array, "*batch height width channels"]:
        """Returns (x / 255 - mean) / deviation, per channel."""
        scaled = jnp.asarray(images, jnp.float32) / 255.0
        return (scaled - jnp.array(self.mean, jnp.float32)) / jnp.array(self.deviation, jnp.float32)


@runtime_checkable
class ImageData(Protocol):
    """Labelled images in two parts that never overlap."""

    def sample(self, seed: int, step: int, count: int) -> ImageBatch:
        """Returns training images, the same ones for the same seed and step."""
        ...

    def validation(self) -> ImageBatch:
        """Returns the fixed held-out images, at most `VALIDATION_IMAGES`."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns what tells these images from others, as JSON can hold it."""
        ...


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """Images in memory; an `ImageData`.

    Attributes:
        images: The training images, uint8.
        labels: Their classes.
        held_out_images: The images for validation.
        held_out_labels: Their classes.
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
        """Returns `count` training images, drawn with replacement."""
        rows = step_generator(seed, step).integers(0, len(self.labels), size=count)
        return ImageBatch(self.images[rows], self.labels[rows])

    def validation(self) -> ImageBatch:
        """Returns held-out images at even distances."""
        rows = spread(len(self.held_out_labels), VALIDATION_IMAGES)
        return ImageBatch(self.held_out_images[rows], self.held_out_labels[rows])


def step_generator(seed: int, step: int) -> np.random.Generator:
    """Returns the source of everything random about the batch of a step.

    Args:
        seed: At least 0 and below 2^64.
        step: At least 0.

    Returns:
        A counter-based generator, which needs no state carried from step to step.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))


def spread(count: int, most: int) -> np.ndarray:
    """Returns at most `most` indices at even distances, the first and the last among them.

    >>> spread(10, 4).tolist(), spread(3, 4).tolist()
    ([0, 3, 6, 9], [0, 1, 2])
    """
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)
