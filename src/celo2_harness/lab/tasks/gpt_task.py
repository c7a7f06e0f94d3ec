"""What tasks of a GPT share, whatever its windows are made of."""

import jax
import numpy as np
from jaxtyping import Array, Float32, Integer

from celo2_harness._types import Params
from celo2_harness.lab.tasks.gpt import GPTConfig, gpt_loss, init_gpt

VALIDATION_PREDICTIONS = 16384
"""How many held-out bytes or tokens are predicted in one evaluation, at most."""


class GPTTask:
    """The part of a `Task` that does not depend on the data; a subclass is a dataclass with these fields."""

    config: GPTConfig
    batch_size: int

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch = {self.batch_size}: expected at least 1")

    @property
    def tokens_per_batch(self) -> int:
        """How many bytes or tokens one batch predicts."""
        return self.batch_size * self.config.context

    def init(self, key: jax.Array) -> Params:
        """Returns new parameters."""
        return init_gpt(self.config, key)

    def loss(
        self, params: Params, batch: Integer[Array, "batch window"] | Integer[np.ndarray, "batch window"]
    ) -> Float32[Array, ""]:
        """Returns the mean loss in nats per byte or token."""
        return gpt_loss(self.config, params, jax.numpy.asarray(batch))
