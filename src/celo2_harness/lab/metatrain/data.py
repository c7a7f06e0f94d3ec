"""The data of a meta-training run: image sets and a text, their names, and digests that tell them from others."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.groups import InnerData
from celo2_harness.lab.metatrain.text_problem import TinyGPTConfig
from celo2_harness.lab.tasks import byte_classes, default_text, load_image_sets, read_text

TEXT_SET = "text"
"""The name of the text beside those of image sets."""


class MetaTrainData(NamedTuple):
    """The data that the tasks of a run sample from.

    Attributes:
        inner: The arrays.
        sets: The names of the image sets.
        digests: SHA-256 in hexadecimal: "data_sha256" of the pixels and labels of all sets, "text_sha256" of the text.
    """

    inner: InnerData
    sets: tuple[str, ...]
    digests: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of everything that has a meta-loss of its own."""
        return self.sets if self.inner.text is None else (*self.sets, TEXT_SET)


def load_data(
    config: MetaTrainConfig, source: str | Path, sets: Sequence[str] = (), text: str | Path | None = None
) -> MetaTrainData:
    """Loads the data of a run.

    Args:
        config: The recipe, which says whether there are tasks on text.
        source: "digits", or another source of 8x8 image sets (see `celo2_harness.lab.tasks.find_sets`).
        sets: The names of the image sets; all of the source if empty.
        text: A text file for the tasks on text; by default the text that Python carries.

    Returns:
        The data.

    Raises:
        ValueError: If the data cannot be used, or a text is given and no tasks are on text.
    """
    if text is not None and not config.text_tasks:
        raise ValueError(f"inner_text = {str(text)!r}: no tasks are on text; give text_tasks, 8 for instance.")
    images, names = load_image_sets(source, sets)
    pixels_and_labels = np.asarray(images.images).tobytes() + np.asarray(images.labels).tobytes()
    digests = {"data_sha256": hashlib.sha256(pixels_and_labels).hexdigest()}
    if not config.text_tasks:
        return MetaTrainData(InnerData(images), names, digests)
    if TEXT_SET in names:
        raise ValueError(f"sets: an image set is called {TEXT_SET!r}, as the tasks on text are; give it another name.")
    model = TinyGPTConfig()
    read = default_text(model.context) if text is None else read_text(text, model.context)
    classes = jnp.asarray(byte_classes(read.train, model.classes))
    return MetaTrainData(InnerData(images, classes), names, digests | {"text_sha256": read.digest})
