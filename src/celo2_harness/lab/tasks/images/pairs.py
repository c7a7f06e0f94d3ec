"""Images with their labels, as every source hands them on: what fits, and how large images become 8x8."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

SIDE = 8
CLASSES = 10
# Images that are shrunk at once: 16 MB in float64 at 28x28.
_AT_ONCE = 2048


class DataError(ValueError):
    """Data that is missing or not what it should be; the message names the file and the fault."""


class Pair(NamedTuple):
    """8x8 grey images, and their classes."""

    images: UInt8[np.ndarray, "count 8 8"]
    labels: UInt8[np.ndarray, " count"]


def check_labels(
    labels: Shaped[np.ndarray, "..."], count: int, where: str, classes: int = CLASSES
) -> Shaped[np.ndarray, " count"]:
    """Labels as uint8, or as int32 where there are more than 256 classes.

    Args:
      labels: what a source gave.
      count: how many images they belong to.
      where: file and array, for the message.
      classes: how many there may be.

    Raises:
      DataError: another number of labels than `count`, no integers, or one that is no class.
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
    return labels.astype(np.uint8 if classes <= 256 else np.int32)


def shrink(images: Shaped[np.ndarray, "count height width"], where: str) -> UInt8[np.ndarray, "count 8 8"]:
    """The exact area mean on 8x8: every pixel is the mean of the area that it covers, rounded once, half up.

    Where 8 does not divide the side, pixels on a border count by the part that is covered.

    Args:
      images: uint8.
      where: file and array, for the message.

    Raises:
      DataError: another type, no images, or a side below 8.

    Example:
      >>> stripes = np.tile(np.arange(16, dtype=np.uint8), (1, 16, 1))
      >>> shrink(stripes, "stripes")[0, 0]
      array([ 1,  3,  5,  7,  9, 11, 13, 15], dtype=uint8)
    """
    count, height, width = images.shape
    if images.dtype != np.uint8 or not count or min(height, width) < SIDE:
        raise DataError(
            f"{where} is {images.dtype} {images.shape}, expected uint8 (N, height, width) with at least one image of"
            f" at least {SIDE}x{SIDE} pixels."
        )
    if (height, width) == (SIDE, SIDE):
        return images
    rows, columns = _coverage(height), _coverage(width)
    small = np.empty((count, SIDE, SIDE), np.uint8)
    for start in range(0, count, _AT_ONCE):
        part = images[start : start + _AT_ONCE].astype(np.float64)
        # Sums of whole parts, divided last: a mean of x.5 is exact and rounds up.
        total = rows @ part @ columns.T
        small[start : start + _AT_ONCE] = np.floor(total / (height * width) + 0.5)
    return small


def shrink_each(images: Iterable[Shaped[np.ndarray, "height width"]], where: str) -> UInt8[np.ndarray, "count 8 8"]:
    """`shrink` for images that may differ in size."""
    small = [shrink(image[None], f"{where} [{number}]")[0] for number, image in enumerate(images)]
    if not small:
        raise DataError(f"{where} is empty, expected at least one image.")
    return np.stack(small)


def _coverage(side: int) -> np.ndarray:
    """[8, side]: which part of each pixel falls into each of 8 equal stretches, times 8; whole numbers."""
    left = np.arange(SIDE)[:, None] * side
    pixel = np.arange(side)[None, :] * SIDE
    return np.clip(np.minimum(left + side, pixel + SIDE) - np.maximum(left, pixel), 0, None).astype(np.float64)
