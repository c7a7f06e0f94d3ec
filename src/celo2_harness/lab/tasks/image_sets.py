"""Image sets for meta-training: 8x8 grey images with labels 0 to 9, several sets in one array on the device."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped, UInt8

from celo2_harness.lab.tasks.image_files import DataError, Parts, find_idx_sets, read_digits, read_idx, read_npz
from celo2_harness.weights.files import replace_file

SIDE = 8
"""Height and width of an image in pixels."""
_SUFFIX = f"_{SIDE}x{SIDE}.npz"
# Images that are shrunk at once: 13 MB in float64 at 28x28.
_AT_ONCE = 2048


class ImageSets(NamedTuple):
    """Several training sets in one array, so that a batch of any of them is one gather.

    Attributes:
        images: Pixels from 0 to 255, one image per row.
        labels: The class of each image.
        starts: The first row of each set.
        sizes: The number of rows of each set.
    """

    images: UInt8[Array, "total 64"]
    labels: Int[Array, " total"]
    starts: Int[Array, " sets"]
    sizes: Int[Array, " sets"]


def find_sets(source: str | Path, names: Sequence[str] = ()) -> Mapping[str, Callable[[], Parts]]:
    """Finds the image sets of a source, without reading them.

    Args:
        source: "digits" for scikit-learn's 8x8 digits (the `data` extra); a folder of files `NAME_8x8.npz`, or one such
            file, with uint8 arrays `train_images` (N, 8, 8) and `train_labels` (N,), and the same for "test" or not; or
            a folder with IDX files.
        names: The sets that are wanted, in this order; all of them if empty.

    Returns:
        A function per set that reads it.

    Raises:
        DataError: If the source is of no such kind, or lacks a set that is wanted.
    """
    path = Path(source)
    npz = [path] if path.name.endswith(_SUFFIX) and path.is_file() else sorted(path.glob(f"*{_SUFFIX}"))
    found: dict[str, Callable[[], Parts]] = {}
    if source == "digits":
        found = {"digits": read_digits}
    elif npz:
        found = {file.name.removesuffix(_SUFFIX): partial(read_npz, file) for file in npz}
    else:
        found = {name: partial(read_idx, files) for name, files in find_idx_sets(path).items()}
    if not found:
        there = "it holds none of these" if path.is_dir() else "there is no such folder or file"
        raise DataError(
            f"data = {str(source)!r}: {there}. Expected one of: 'digits'; a folder with files NAME{_SUFFIX}; a folder"
            " with IDX files (train-images-idx3-ubyte.gz)."
        )
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"data = {str(source)!r}: found sets {sorted(found)}, missing {missing}.")
    return {name: found[name] for name in names or found}


def load_image_sets(source: str | Path, names: Sequence[str] = ()) -> tuple[ImageSets, tuple[str, ...]]:
    """Loads the training images of several sets. Larger images are shrunk to 8x8 by area means.

    Args:
        source: As for `find_sets`.
        names: As for `find_sets`.

    Returns:
        The sets, and their names in order.

    Raises:
        DataError: If something is missing, cut short, or of a wrong shape or type, or a label is out of range.
        ImportError: If an extra is missing.
    """
    readers = find_sets(source, names)
    pairs = []
    for name, read in readers.items():
        images, labels = read()["train"]
        pairs.append((shrink(images, f"{source}: {name}, train_images"), labels))
    sizes = np.array([len(labels) for _, labels in pairs])
    sets = ImageSets(
        images=jnp.asarray(np.concatenate([images.reshape(-1, SIDE * SIDE) for images, _ in pairs])),
        labels=jnp.asarray(np.concatenate([labels for _, labels in pairs]).astype(np.int32)),
        starts=jnp.asarray((np.cumsum(sizes) - sizes).astype(np.int32)),
        sizes=jnp.asarray(sizes.astype(np.int32)),
    )
    return sets, tuple(readers)


def prepare_image_sets(
    source: str, folder: Path, on_file: Callable[[Path, dict[str, int]], None] = lambda path, counts: None
) -> list[Path]:
    """Writes the sets of a source to files `NAME_8x8.npz`, so that they are read and shrunk once.

    Args:
        source: As for `find_sets`.
        folder: The folder of the files; made where missing. Files of the same name are replaced.
        on_file: Called after each file with its path and the number of images in each part.

    Returns:
        The files.

    Raises:
        DataError: If the data cannot be used; files written before stay.
        ImportError: If an extra is missing.
        OSError: If a file cannot be written.
    """
    written = []
    for name, read in find_sets(source).items():
        parts, arrays = read(), {}
        for part, (images, labels) in parts.items():
            arrays[f"{part}_images"] = shrink(images, f"{source}: {name}, {part}_images")
            arrays[f"{part}_labels"] = labels
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        path = folder / f"{name}{_SUFFIX}"
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.getvalue())
        written.append(path)
        on_file(path, {part: len(labels) for part, (_, labels) in parts.items()})
    return written


def shrink(images: Shaped[np.ndarray, "..."], where: str) -> UInt8[np.ndarray, "count 8 8"]:
    """Shrinks images to 8x8 by the exact area mean: a pixel is the mean of what it covers, rounded once, half up.

    Where 8 does not divide the side, pixels on a border count by the part that is covered.

    Args:
        images: Grey images of type uint8, of shape (count, height, width).
        where: File and array, for the message.

    Returns:
        The small images.

    Raises:
        DataError: If the images are of another type, there are none, or a side is below 8.

    Example:
        >>> stripes = np.tile(np.arange(16, dtype=np.uint8), (1, 16, 1))
        >>> shrink(stripes, "stripes")[0, 0]
        array([ 1,  3,  5,  7,  9, 11, 13, 15], dtype=uint8)
    """
    if images.ndim != 3 or images.dtype != np.uint8 or not len(images) or min(images.shape[1:]) < SIDE:
        raise DataError(
            f"{where} is {images.dtype} {images.shape}, expected uint8 (N, height, width) with at least one image of"
            f" at least {SIDE}x{SIDE} pixels."
        )
    count, height, width = images.shape
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


def _coverage(side: int) -> np.ndarray:
    """[8, side]: which part of each pixel falls into each of 8 equal stretches, times 8; whole numbers."""
    left = np.arange(SIDE)[:, None] * side
    pixel = np.arange(side)[None, :] * SIDE
    return np.clip(np.minimum(left + side, pixel + SIDE) - np.maximum(left, pixel), 0, None).astype(np.float64)
