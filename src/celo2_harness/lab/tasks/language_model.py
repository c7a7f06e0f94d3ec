"""Language-model tasks: a GPT that learns the bytes of a text or the tokens of shards."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float32, Integer

from celo2_harness._types import Params
from celo2_harness.lab.errors import check_range
from celo2_harness.lab.tasks.gpt import MODELS, TOKEN_MODELS, GPTConfig, flops_per_token, gpt_loss, init_gpt
from celo2_harness.lab.tasks.text import default_text, read_text
from celo2_harness.lab.tasks.tokens import open_tokens

VALIDATION_PREDICTIONS = 16384
"""The most held-out bytes or tokens that are predicted in one evaluation."""


@runtime_checkable
class LanguageData(Protocol):
    """Bytes or tokens in two parts that never overlap: `Text`, or `TokenShards`."""

    @property
    def unit(self) -> str:
        """The unit of a loss on these data."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns what tells these data from others, as JSON values."""
        ...

    def sample(self, seed: int, step: int, count: int, context: int) -> Integer[np.ndarray, "count window"]:
        """Returns training windows of `context + 1` bytes or tokens, the same for the same seed and step."""
        ...

    def spread(self, context: int, most: int) -> Integer[np.ndarray, "count window"]:
        """Returns held-out windows at even distances, of at most so many predictions in all."""
        ...


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """Predict the next byte of a text, or the next token of shards; a `Task`.

    Attributes:
        config: The size of the model. Windows are as long as its context.
        data: The text or the tokens.
        batch_size: The number of windows in a training batch.

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
    data: LanguageData
    batch_size: int

    def __post_init__(self):
        check_range(1, batch=self.batch_size)

    @property
    def tokens_per_batch(self) -> int:
        """The number of bytes or tokens that a batch predicts."""
        return self.batch_size * self.config.context

    @property
    def flops_per_batch(self) -> float:
        """The floating-point operations of the model in a training step; see `flops_per_token`."""
        return self.tokens_per_batch * flops_per_token(self.config)

    @property
    def unit(self) -> str:
        """The unit of the loss, "nats per byte" or "nats per token"."""
        return self.data.unit

    def describe(self) -> dict[str, Any]:
        """Returns the sizes of the model, the size and digest of the data, and the batch size."""
        return {"model": dataclasses.asdict(self.config), **self.data.describe(), "batch": self.batch_size}

    def init(self, key: jax.Array) -> Params:
        """Returns new parameters."""
        return init_gpt(self.config, key)

    def loss(
        self, params: Params, batch: Integer[Array, "batch window"] | Integer[np.ndarray, "batch window"]
    ) -> Float32[Array, ""]:
        """Returns the mean cross-entropy of the next byte or token, in nats."""
        return gpt_loss(self.config, params, jax.numpy.asarray(batch))

    def batch(self, seed: int, step: int) -> Integer[np.ndarray, "batch window"]:
        """Returns the training windows of a step; the same for the same seed and step."""
        return self.data.sample(seed, step, self.batch_size, self.config.context)

    def validation(self) -> Integer[np.ndarray, "count window"]:
        """Returns the held-out windows, the same for every seed and batch size."""
        return self.data.spread(self.config.context, VALIDATION_PREDICTIONS)


def make_language_model(
    size: str,
    data: Path | None,
    batch: int,
    *,
    context: int | None = None,
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> LanguageModel:
    """Returns the task of learning the bytes of a text.

    Args:
        size: The name of a model in `MODELS`.
        data: A text file, or None for the text that Python carries.
        batch: The number of windows in a training batch.
        context: The length of a window in bytes, or None for the model's.
        dtype: The format to compute in, "float32" or "bfloat16".
        param_dtype: The format of the parameters.

    Returns:
        The task.

    Raises:
        ValueError: If there is no such model, or an option or the text does not fit it.
    """
    if size not in MODELS:
        raise ValueError(f"model = {size!r}: expected one of {', '.join(MODELS)}")
    config = MODELS[size]
    context = config.context if context is None else context
    config = dataclasses.replace(config, context=context, dtype=dtype, param_dtype=param_dtype)
    return LanguageModel(config, default_text(context) if data is None else read_text(data, context), batch)


def make_token_language_model(size: str, data: Path | None, batch: int) -> LanguageModel:
    """Returns the task of learning token shards.

    Args:
        size: The name of a model in `TOKEN_MODELS`.
        data: A folder made by `celo2 data tokens`, with at most the model's vocabulary.
        batch: The number of windows in a training batch.

    Returns:
        The task.

    Raises:
        ValueError: If there is no such model, or no data, or they do not fit it.
    """
    if size not in TOKEN_MODELS:
        raise ValueError(f"size = {size!r}: expected one of {', '.join(TOKEN_MODELS)}")
    config = TOKEN_MODELS[size]
    if data is None:
        raise ValueError(
            "data: token shards do not come with a package; make some with celo2 data tokens TEXT --out FOLDER"
            f" --train-vocabulary {min(config.vocabulary, 4096)} and give the folder"
        )
    return LanguageModel(config, open_tokens(data, config.context, config.vocabulary), batch)
