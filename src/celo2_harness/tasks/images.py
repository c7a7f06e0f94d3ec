"""Small image sets for meta-training: 8x8 grayscale images with labels 0 to 9."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

SIDE = 8
CLASSES = 10
_SUFFIX = "_8x8.npz"


class DataError(ValueError):
    """Data that is missing or not what it should be; the message names the file and the fault."""


class ImageSets(NamedTuple):
    """Several training sets in one array, so that a batch of any of them is one gather.

    `images` [total, 64] holds pixels 0 to 255, `labels` [total]; set k lies at `starts[k] : starts[k] + sizes[k]`.
    """

    images: UInt8[Array, "total 64"]
    labels: Int[Array, " total"]
    starts: Int[Array, " sets"]
    sizes: Int[Array, " sets"]

    def batch(
        self, which: Int[Array, ""], key: Array, size: int
    ) -> tuple[Float[Array, "size 64"], Int[Array, " size"]]:
        """A batch drawn with replacement from set `which`: pixels in [0, 1], labels."""
        rows = self.starts[which] + jax.random.randint(key, (size,), 0, self.sizes[which])
        return self.images[rows].astype(jnp.float32) / 255.0, self.labels[rows]


def load_image_sets(source: str | Path, names: Sequence[str] = ()) -> tuple[ImageSets, tuple[str, ...]]:
    """Training images of several sets.

    Args:
      source: "digits" (scikit-learn's 8x8 digits, the `data` extra), or a folder of `NAME_8x8.npz` files with uint8
        arrays `train_images` [N, 8, 8] and `train_labels` [N].
      names: which sets of the folder; empty for all.

    Returns:
      The sets, and their names in order.

    Raises:
      DataError: a missing folder or file, a wrong shape or type, a label out of range.
      ImportError: "digits" without scikit-learn.
    """
    if str(source) == "digits":
        if tuple(names) not in ((), ("digits",)):
            raise DataError(f"data = 'digits' has one set, 'digits'; asked for {list(names)}. Give a folder of sets.")
        pairs = {"digits": _digits()}
    else:
        folder = Path(source)
        found = sorted(path.name.removesuffix(_SUFFIX) for path in folder.glob(f"*{_SUFFIX}"))
        missing = [name for name in names if name not in found]
        if missing or not found:
            raise DataError(
                f"data = {str(source)!r}: expected 'digits' or a folder with files NAME{_SUFFIX};"
                f" found sets {found}, missing {missing}."
            )
        pairs = {name: _read(folder / f"{name}{_SUFFIX}") for name in names or found}
    sizes = np.array([len(labels) for _, labels in pairs.values()])
    return (
        ImageSets(
            images=jnp.asarray(np.concatenate([images.reshape(-1, SIDE * SIDE) for images, _ in pairs.values()])),
            labels=jnp.asarray(np.concatenate([labels for _, labels in pairs.values()]).astype(np.int32)),
            starts=jnp.asarray((np.cumsum(sizes) - sizes).astype(np.int32)),
            sizes=jnp.asarray(sizes.astype(np.int32)),
        ),
        tuple(pairs),
    )


def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("data = 'digits' needs scikit-learn: pip install 'celo2-harness[data]'") from None
    digits: Any = load_digits()
    # Pixels are 0 to 16 there.
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            images, labels = file["train_images"], file["train_labels"]
    except Exception as error:  # zipfile, zlib, numpy and key errors alike: the file holds no image set
        raise DataError(
            f"{path}: cannot be read as an image set ({type(error).__name__}: {error}); expected arrays"
            " train_images and train_labels."
        ) from None
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or images.dtype != np.uint8 or not len(images):
        raise DataError(f"{path}: train_images is {images.dtype} {images.shape}, expected uint8 (N, {SIDE}, {SIDE}).")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{path}: train_labels has shape {labels.shape}, expected {images.shape[:1]}.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= CLASSES:
        raise DataError(f"{path}: train_labels must be integers from 0 to {CLASSES - 1}.")
    return images, labels
