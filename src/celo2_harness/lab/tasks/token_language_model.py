"""The language-model task on tokens: a GPT that learns token shards."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt16

from celo2_harness.lab.tasks.gpt import GPTConfig
from celo2_harness.lab.tasks.gpt_task import VALIDATION_PREDICTIONS, GPTTask
from celo2_harness.lab.tasks.tokens import TokenShards, open_tokens

# GPT-2 and GPT-3 share the table of token embeddings with the output layer; the small model has a head of its own.
TOKEN_MODELS = {
    "small": GPTConfig(width=128, layers=4, heads=4, context=128, vocabulary=4096),
    "gpt2-124m": GPTConfig(width=768, layers=12, heads=12, context=1024, vocabulary=50257, tied=True),
    "gpt3-xl-1.3b": GPTConfig(width=2048, layers=24, heads=16, context=2048, vocabulary=50257, tied=True, remat=True),
}


@dataclass(frozen=True, eq=False)
class TokenLanguageModel(GPTTask):
    """Predict the next token of a text; a `Task`.

    Attributes:
        config: The model. Windows are as long as its context.
        data: The tokens.
        batch_size: Windows per training batch.
    """

    config: GPTConfig
    data: TokenShards
    batch_size: int

    @property
    def unit(self) -> str:
        """Of the loss."""
        return "nats per token"

    def describe(self) -> dict[str, Any]:
        """Returns the sizes of the model, the size and digest of the tokens, and the batch size."""
        return {"model": dataclasses.asdict(self.config), "tokens": self.data.describe(), "batch": self.batch_size}

    def batch(self, seed: int, step: int) -> UInt16[np.ndarray, "batch window"]:
        """Returns the training windows of a step; the same for the same seed and step."""
        return self.data.sample(seed, step, self.batch_size, self.config.context)

    def validation(self) -> UInt16[np.ndarray, "count window"]:
        """Returns the held-out windows, the same for every seed and batch size."""
        return self.data.spread(self.config.context, VALIDATION_PREDICTIONS)


def make_token_language_model(size: str, data: Path | None, batch: int) -> TokenLanguageModel:
    """Returns the task of a size in `TOKEN_MODELS`.

    Args:
        size: The name of the model.
        data: A folder made by `celo2 data tokens`, with at most the model's vocabulary.
        batch: Windows per batch.

    Returns:
        The task.

    Raises:
        ValueError: if there is no such model, or no data, or they do not fit it.
    """
    if size not in TOKEN_MODELS:
        raise ValueError(f"size = {size!r}: expected one of {', '.join(TOKEN_MODELS)}")
    config = TOKEN_MODELS[size]
    if data is None:
        raise ValueError(
            "data: token shards do not come with a package; make some with celo2 data tokens TEXT --out FOLDER"
            f" --train-vocabulary {min(config.vocabulary, 4096)} and give the folder"
        )
    return TokenLanguageModel(config, open_tokens(data, config.context, config.vocabulary), batch)
