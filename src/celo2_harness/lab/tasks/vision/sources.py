"""Where labelled images come from: scikit-learn's digits, IDX files, npz files, folders of pictures."""

from pathlib import Path

import numpy as np

from celo2_harness.lab.tasks.images import DataError, find_sets
from celo2_harness.lab.tasks.images.idx import read_parts
from celo2_harness.lab.tasks.images.pairs import check_labels
from celo2_harness.lab.tasks.vision.data import ImageArrays, ImageData, ImageFormat
from celo2_harness.lab.tasks.vision.folders import is_image_folder, open_image_folder

HELD_OUT = 6
"""Where a source has no test part, one image in this many, at the end, is held out."""

Parts = dict[str, tuple[np.ndarray, np.ndarray]]

_FORMS = (
    "a folder with IDX files (train-images-idx3-ubyte.gz and its labels, t10k-... for the test part), an npz file with"
    " train_images, train_labels, test_images and test_labels, or a folder with train/CLASS/ and val/CLASS/ of pictures"
)


def load_images(source: Path | None, form: ImageFormat) -> ImageData:
    """Returns the labelled images of a source, checked against a format.

    Where there is no test part, the last sixth of the images is held out.

    Args:
        source: None for the 8x8 digits of scikit-learn (the `data` extra); a folder with the IDX files of one set; an
            npz file with uint8 `train_images` (N, height, width) or (N, height, width, channels), `train_labels` (N,)
            and, if it has them, `test_images` and `test_labels`; a folder with `train/CLASS/` and `val/CLASS/` of
            pictures, which are read when they are needed (see `ImageFolder`).
        form: What the task needs.

    Returns:
        The images.

    Raises:
        ValueError: where there is nothing of the kind, a file is damaged, or sizes or labels do not fit the format.
        ImportError: if an extra is missing.
    """
    if source is None:
        return _digits(form)
    if source.is_dir() and is_image_folder(source):
        return open_image_folder(source, form)
    if source.is_dir():
        return _arrays(read_parts(source), form, str(source))
    if source.is_file() and source.suffix == ".npz":
        return _arrays(_read_npz(source, form.classes), form, str(source))
    problem = "neither a folder nor an npz file" if source.exists() else "no such folder or file"
    raise DataError(f"data = {str(source)!r}: {problem}; expected {_FORMS}.")


def _digits(form: ImageFormat) -> ImageArrays:
    if form.shape != (8, 8, 1):
        raise DataError(
            f"data: this size takes {_name(form)}, which do not come with a package; give {_FORMS}. Debian's"
            " dataset-fashion-mnist has Fashion-MNIST in /usr/share/datasets/fashion-mnist."
        )
    pair = find_sets("digits")["digits"]("train")
    assert pair is not None
    return _arrays({"train": (pair.images, pair.labels)}, form, "digits")


def _read_npz(path: Path, classes: int) -> Parts:
    parts: Parts = {}
    try:
        with np.load(path, allow_pickle=False) as file:
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


def _arrays(parts: Parts, form: ImageFormat, where: str) -> ImageArrays:
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
