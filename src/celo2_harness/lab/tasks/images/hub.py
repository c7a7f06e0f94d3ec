"""Data sets of the Hugging Face `datasets` library: by name from the hub, or folders made by its `save_to_disk`."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from celo2_harness.lab.tasks.images.pairs import DataError, Pair, check_labels, shrink_each
from celo2_harness.lab.tasks.images.reader import Reader

PREFIX = "hf://"
KNOWN = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "svhn": "ufldl-stanford/svhn/cropped_digits",
}
"""Short names: what to load for each, owner/name or owner/name/configuration."""
_LABELS = "label"


def matches(source: str) -> bool:
    """Whether a source starts with hf://, or is a folder that `save_to_disk` has made."""
    return source.startswith(PREFIX) or _saved(Path(source))


def find(source: str) -> Mapping[str, Reader]:
    """The one set: named as on the hub, or as the folder."""
    if not source.startswith(PREFIX):
        return {Path(source).absolute().name: partial(_read_saved, Path(source))}
    name = source.removeprefix(PREFIX).strip("/")
    path = KNOWN.get(name, name)
    owner, _, rest = path.partition("/")
    dataset, _, configuration = rest.partition("/")
    if not owner or not dataset:
        raise DataError(
            f"data = {source!r}: expected hf://owner/name, hf://owner/name/configuration, or hf:// and one of"
            f" {', '.join(KNOWN)}."
        )
    return {dataset: partial(_read_hub, source, f"{owner}/{dataset}", configuration or None)}


def _saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _library() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("a data set of the Hugging Face kind needs: pip install 'celo2-harness[hf]'") from None
    return datasets


def _read_saved(folder: Path, part: str) -> Pair | None:
    library = _library()
    try:
        loaded: Any = library.load_from_disk(str(folder))
    except Exception as error:  # of the library, pyarrow, JSON or the file system
        raise DataError(f"{folder}: cannot be read as a saved data set ({type(error).__name__}: {error}).") from None
    # A folder may hold one part only, without a name.
    parts = loaded if isinstance(loaded, dict) else {"train": loaded}
    return _pair(parts[part], f"{folder}: {part}") if part in parts else _absent(parts, part, str(folder))


def _read_hub(source: str, path: str, configuration: str | None, part: str) -> Pair | None:
    library = _library()
    try:
        parts: Any = library.load_dataset(path, configuration)
    except Exception as error:  # of the library, the network or the file system
        raise DataError(f"{source}: cannot be loaded ({type(error).__name__}: {error}).") from None
    return _pair(parts[part], f"{source}: {part}") if part in parts else _absent(parts, part, source)


def _absent(parts: Any, part: str, where: str) -> None:
    if part == "train":
        raise DataError(f"{where}: no part 'train'; there are {sorted(parts)}.")


def _pair(dataset: Any, where: str) -> Pair:
    features: Mapping[str, Any] = dataset.features
    pictures = [name for name, feature in features.items() if type(feature).__name__ in ("Image", "Array2D")]
    classes = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    labels = _LABELS if _LABELS in features else classes[0] if len(classes) == 1 else None
    if len(pictures) != 1 or labels is None:
        raise DataError(
            f"{where}: expected one column of images and a column '{_LABELS}' (or one of classes); there are"
            f" {', '.join(f'{name} ({type(feature).__name__})' for name, feature in features.items())}."
        )
    where_images = f"{where}, column {pictures[0]!r}"
    images = shrink_each(_grey(dataset.select_columns(pictures), pictures[0], where_images), where_images)
    where_labels = f"{where}, column {labels!r}"
    return Pair(images, check_labels(np.array(dataset.select_columns(labels)[:][labels]), len(images), where_labels))


def _grey(rows: Any, column: str, where: str) -> Iterator[np.ndarray]:
    for number, row in enumerate(rows):
        picture = row[column]
        # Pillow's luma (ITU-R 601) at full size; a column of arrays is grey already.
        try:
            image = np.asarray(picture.convert("L") if hasattr(picture, "convert") else picture)
            yield image if hasattr(picture, "convert") else _bytes(image)
        except Exception as error:
            raise DataError(f"{where} [{number}]: no image ({type(error).__name__}: {error}).") from None


def _bytes(image: np.ndarray) -> np.ndarray:
    """A list of lists has lost its type; whole numbers from 0 to 255 go back to it."""
    if image.ndim != 2 or not np.issubdtype(image.dtype, np.integer) or image.min() < 0 or image.max() > 255:
        raise ValueError(f"{image.dtype} {image.shape}, expected a matrix of whole numbers from 0 to 255")
    return image.astype(np.uint8)
