"""The language-model task: a GPT that learns the bytes of a text."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from celo2_harness.lab.tasks.gpt import MODELS, GPTConfig
from celo2_harness.lab.tasks.gpt_task import VALIDATION_PREDICTIONS, GPTTask
from celo2_harness.lab.tasks.text import Text, default_text, read_text, sample_windows, spread_windows


@dataclass(frozen=True, eq=False)
class LanguageModel(GPTTask):
    """Predict the next byte of a text; a `Task`.

    Attributes:
        config: The model. Windows are as long as its context.
        text: The data.
        batch_size: Windows per training batch.

    >>> import jax
    >>> from celo2_harness.lab.tasks import GPTConfig, LanguageModel, split_text
    >>> task = LanguageModel(GPTConfig(8, 1, 2, context=4), split_text(b"abracadabra" * 9, "spell", 4), batch_size=3)
    >>> task.batch(seed=0, step=0).shape
    (3, 5)
    >>> params = task.init(jax.random.key(0))
    >>> loss = jax.jit(task.loss)(params, task.batch(seed=0, step=0))
    >>> bool(abs(loss - jax.numpy.log(256.0)) < 0.2)  # a new model guesses evenly
    True
    """

    config: GPTConfig
    text: Text
    batch_size: int

    @property
    def unit(self) -> str:
        """Of the loss."""
        return "nats per byte"

    def describe(self) -> dict[str, Any]:
        """Returns the sizes of the model, the size and digest of the text, and the batch size."""
        return {
            "model": dataclasses.asdict(self.config),
            "text": {"sha256": self.text.digest, "bytes": len(self.text.train) + len(self.text.held_out)},
            "batch": self.batch_size,
        }

    def batch(self, seed: int, step: int) -> UInt8[np.ndarray, "batch window"]:
        """Returns the training windows of a step; the same for the same seed and step."""
        return sample_windows(self.text.train, seed, step, self.batch_size, self.config.context)

    def validation(self) -> UInt8[np.ndarray, "count window"]:
        """Returns the held-out windows, the same for every seed and batch size."""
        return spread_windows(self.text.held_out, self.config.context, VALIDATION_PREDICTIONS)


def make_language_model(
    size: str,
    data: Path | None,
    batch: int,
    *,
    context: int | None = None,
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> LanguageModel:
    """Returns the task of a size in `MODELS`.

    Args:
        size: The name of the model.
        data: A text file, or None for the text that Python carries.
        batch: Windows per batch.
        context: Window length in bytes, or None for the model's.
        dtype: What to compute in.
        param_dtype: What to keep the parameters in.

    Returns:
        The task.

    Raises:
        ValueError: if there is no such model, or an option or the text does not fit it.
    """
    if size not in MODELS:
        raise ValueError(f"model = {size!r}: expected one of {', '.join(MODELS)}")
    config = MODELS[size]
    config = dataclasses.replace(
        config, context=config.context if context is None else context, dtype=dtype, param_dtype=param_dtype
    )
    return LanguageModel(
        config, default_text(config.context) if data is None else read_text(data, config.context), batch
    )
