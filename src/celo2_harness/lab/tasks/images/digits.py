"""The 8x8 digits that come with scikit-learn: the data that needs no file and no network."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from celo2_harness.lab.tasks.images.pairs import Pair
from celo2_harness.lab.tasks.images.reader import Reader

NAME = "digits"


def matches(source: str) -> bool:
    """Whether a source is the word "digits"."""
    return source == NAME


def find(source: str) -> Mapping[str, Reader]:
    """The one set, "digits": 1,797 training images, no test part."""
    del source
    return {NAME: _read}


def _read(part: str) -> Pair | None:
    if part != "train":
        return None
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("data = 'digits' needs scikit-learn: pip install 'celo2-harness[data]'") from None
    digits: Any = load_digits()
    # Pixels are 0 to 16 there.
    return Pair(np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.uint8))
