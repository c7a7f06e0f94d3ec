"""Where image sets come from: one row per kind of source."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from celo2_harness.lab.tasks.images import digits, hub, idx, npz
from celo2_harness.lab.tasks.images.pairs import DataError
from celo2_harness.lab.tasks.images.reader import Reader
from celo2_harness.lab.tasks.images.sets import ImageSets, join_sets


class Source(NamedTuple):
    """A kind of source.

    Attributes:
      form: what such a source looks like, for messages.
      matches: whether a source, as a string, is of this kind.
      find: the image sets in it, by name. A set is read only when it is asked for.
    """

    form: str
    matches: Callable[[str], bool]
    find: Callable[[str], Mapping[str, Reader]]


SOURCES = (
    Source("'digits'", digits.matches, digits.find),
    Source("a folder with files NAME_8x8.npz", npz.matches, npz.find),
    Source("hf://NAME or a folder saved by the datasets library", hub.matches, hub.find),
    Source("a folder with IDX files (train-images-idx3-ubyte.gz)", idx.matches, idx.find),
)
"""The first kind that matches is taken."""


def find_sets(source: str | Path, names: Sequence[str] = ()) -> dict[str, Reader]:
    """The image sets of a source, not read yet.

    Args:
      source: see `load_image_sets`.
      names: which sets, in this order; empty for all.

    Returns:
      A function per set that reads a part of it, "train" or "test".

    Raises:
      DataError: no kind of source matches, or a name is not there.
    """
    for kind in SOURCES:
        if kind.matches(str(source)):
            found = kind.find(str(source))
            break
    else:
        there = "it holds none of these" if Path(source).is_dir() else "there is no such folder or file"
        forms = "; ".join(kind.form for kind in SOURCES)
        raise DataError(f"data = {str(source)!r}: {there}. Expected one of: {forms}.")
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"data = {str(source)!r}: found sets {sorted(found)}, missing {missing}.")
    return {name: found[name] for name in names or found}


def load_image_sets(source: str | Path, names: Sequence[str] = ()) -> tuple[ImageSets, tuple[str, ...]]:
    """Training images of several sets. Larger images are shrunk to 8x8 by area averages.

    Args:
      source: "digits" (scikit-learn's 8x8 digits, the `data` extra); a folder of `NAME_8x8.npz` files with uint8 arrays
        `train_images` [N, 8, 8] and `train_labels` [N]; a folder of IDX files, or one of images with its labels beside
        it; "hf://owner/name" or a folder that the datasets library has saved (the `hf` extra).
      names: which sets of the source; empty for all.

    Returns:
      The sets, and their names in order.

    Raises:
      DataError: a missing folder or file, one that is cut short, a wrong shape or type, a label out of range.
      ImportError: a source whose extra is not installed.
    """
    readers = find_sets(source, names)
    pairs = [pair for read in readers.values() if (pair := read("train")) is not None]
    return join_sets(pairs), tuple(readers)
