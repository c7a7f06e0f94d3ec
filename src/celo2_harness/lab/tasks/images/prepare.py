"""Any source as `NAME_8x8.npz` files, so that it is read and shrunk once."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from celo2_harness.lab.tasks.images.hub import KNOWN, PREFIX
from celo2_harness.lab.tasks.images.loading import find_sets
from celo2_harness.lab.tasks.images.npz import SUFFIX
from celo2_harness.weights.files import replace_file


def prepare_image_sets(
    source: str, folder: Path, on_file: Callable[[Path, dict[str, int]], None] = lambda path, counts: None
) -> list[Path]:
    """Writes the sets of a source to `NAME_8x8.npz` files: 8x8 grey uint8 images and labels, train and test.

    Args:
      source: as for `load_image_sets`; also "mnist", "fashion_mnist", "cifar10" and "svhn", which are fetched from
        the Hugging Face hub.
      folder: where the files go; made where missing. Files of the same name are replaced.
      on_file: called after each file, with its path and the number of images in each part.

    Returns:
      The files.

    Raises:
      DataError: unusable data (see `load_image_sets`); files written before it stay.
      ImportError: a source whose extra is not installed.
      OSError: a folder that cannot be written.
    """
    source = PREFIX + source if source in KNOWN else source
    readers = find_sets(source)
    written = []
    for name, read in readers.items():
        parts = {part: pair for part in ("train", "test") if (pair := read(part)) is not None}
        arrays = {f"{part}_{field}": array for part, pair in parts.items() for field, array in pair._asdict().items()}
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        path = folder / f"{name}{SUFFIX}"
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.getvalue())
        written.append(path)
        on_file(path, {part: len(pair.labels) for part, pair in parts.items()})
    return written
