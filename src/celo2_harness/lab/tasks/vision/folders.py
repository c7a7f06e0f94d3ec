"""Folders of pictures, one folder per class, as ImageNet comes: read and resized when a batch asks for them."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from celo2_harness.lab.tasks.images import DataError
from celo2_harness.lab.tasks.vision.data import VALIDATION_IMAGES, ImageBatch, ImageFormat, spread, step_generator

SUFFIXES = (".jpeg", ".jpg", ".png")
# Validation images are scaled until their shorter side is 256 for a crop of 224, as is usual for ImageNet.
_MARGIN = 256 / 224
# The crop of a training image covers this part of its area, with sides in these proportions.
_AREA = (0.08, 1.0)
_PROPORTIONS = (3 / 4, 4 / 3)
# Pictures that are decoded at the same time; decoding runs outside Python's lock.
_THREADS = 8

Crop = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Pictures on disk; an `ImageData`. Files are opened when a batch asks for them, and not kept.

    Training images are random crops (8% to all of the area, proportions 3:4 to 4:3), scaled to the format, half of them
    mirrored: which and how is a function of seed and step. Validation images are scaled to a shorter side of 8/7 of the
    format and cropped in the middle.

    Attributes:
        form: What pictures become.
        root: The folder.
        train: The training pictures, below the root, and the class of each.
        held_out: The validation pictures, likewise.
    """

    form: ImageFormat
    root: Path
    train: tuple[tuple[str, int], ...]
    held_out: tuple[tuple[str, int], ...]

    def describe(self) -> dict[str, Any]:
        """Returns a digest of the names of all files (not of what is in them), and the counts."""
        names = "\n".join(f"{name}\t{label}" for name, label in (*self.train, *self.held_out))
        return {
            "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
            "train": len(self.train),
            "held_out": len(self.held_out),
        }

    def sample(self, seed: int, step: int, count: int) -> ImageBatch:
        """Returns `count` training images, drawn with replacement, cropped at random."""
        generator = step_generator(seed, step)
        rows = generator.integers(0, len(self.train), size=count)
        # All draws are made here, in order: what the threads do does not depend on which is first.
        draws = generator.random((count, 5))
        return self._read([self.train[row] for row in rows], list(draws))

    def validation(self) -> ImageBatch:
        """Returns held-out images at even distances."""
        files = [self.held_out[row] for row in spread(len(self.held_out), VALIDATION_IMAGES)]
        return self._read(files, [None] * len(files))

    def _read(self, files: list[tuple[str, int]], draws: list[Any]) -> ImageBatch:
        with ThreadPoolExecutor(_THREADS) as pool:
            images = list(pool.map(self._picture, (name for name, _ in files), draws))
        return ImageBatch(np.stack(images), np.array([label for _, label in files], np.int32))

    def _picture(self, name: str, draws: np.ndarray | None) -> UInt8[np.ndarray, "height width channels"]:
        from PIL import Image

        try:
            with Image.open(self.root / name) as file:
                picture = file.convert("RGB" if self.form.channels == 3 else "L")
        except (OSError, SyntaxError) as error:  # pillow says SyntaxError of some damaged files
            raise DataError(f"{self.root / name}: cannot be read as a picture ({error}); replace the file.") from None
        crop = _middle(picture.size, self.form) if draws is None else random_crop(picture.size, self.form, draws)
        picture = picture.resize((self.form.width, self.form.height), Image.Resampling.BILINEAR, crop)
        if draws is not None and draws[4] < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(picture).reshape(self.form.shape)


def is_image_folder(folder: Path) -> bool:
    """Whether a folder has training pictures in a folder per class."""
    return (folder / "train").is_dir()


def open_image_folder(folder: Path, form: ImageFormat) -> ImageFolder:
    """Lists the pictures of a folder; none is opened.

    Args:
        folder: With `train/CLASS/*.jpeg` and `val/CLASS/*.jpeg` (or .jpg, .png). Classes are numbered by the order of
            their names.
        form: What pictures become. There may be fewer classes than it says, not more.

    Returns:
        The pictures.

    Raises:
        ValueError: if a part has no pictures, there are too many classes, or validation has a class of its own.
        ImportError: if pillow is missing.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ImportError("folders of pictures need pillow: pip install 'celo2-harness[data]'") from None
    classes = [path.name for path in sorted((folder / "train").iterdir()) if path.is_dir()]
    if len(classes) > form.classes:
        raise DataError(f"{folder / 'train'}: {len(classes)} classes, but this size has {form.classes}.")
    numbers = {name: number for number, name in enumerate(classes)}
    parts = []
    for part in ("train", "val"):
        files = sorted(path for path in (folder / part).glob("*/*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{folder / part}: no pictures; expected CLASS/NAME with {', '.join(SUFFIXES)}.")
        strange = sorted({path.parent.name for path in files} - numbers.keys())
        if strange:
            raise DataError(f"{folder / part}: the class {strange[0]!r} has no folder under train.")
        parts.append(tuple((str(path.relative_to(folder)), numbers[path.parent.name]) for path in files))
    return ImageFolder(form, folder, *parts)


def random_crop(size: tuple[int, int], form: ImageFormat, draws: np.ndarray) -> Crop:
    """Returns a box inside a picture that covers a random part of it.

    Args:
        size: Width and height of the picture.
        form: What the crop is scaled to; its proportions are multiplied by random ones.
        draws: Four or more numbers in [0, 1): for area, proportions, and place.

    Returns:
        Left, top, right and bottom in pixels; a side that would not fit is cut to the picture's.

    >>> random_crop((50, 50), ImageFormat(8, 8, 1, 2, (0.5,), (0.2,)), np.array([1.0, 0.5, 0.5, 0.5]))
    (0.0, 0.0, 50.0, 50.0)
    """
    area = size[0] * size[1] * (_AREA[0] + (_AREA[1] - _AREA[0]) * draws[0])
    low, high = np.log(_PROPORTIONS)
    proportions = form.width / form.height * np.exp(low + (high - low) * draws[1])
    width = min(float(np.sqrt(area * proportions)), float(size[0]))
    height = min(float(np.sqrt(area / proportions)), float(size[1]))
    left, top = (size[0] - width) * float(draws[2]), (size[1] - height) * float(draws[3])
    return left, top, left + width, top + height


def _middle(size: tuple[int, int], form: ImageFormat) -> Crop:
    scale = min(size[0] / form.width, size[1] / form.height) / _MARGIN
    width, height = form.width * scale, form.height * scale
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height
