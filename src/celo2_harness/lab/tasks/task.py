"""What a training loop needs from a task; nothing here knows of optimizers."""

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np


@runtime_checkable
class Task(Protocol):
    """Something to train: parameters, a loss, training batches and a fixed validation set.

    Tasks are hashable (the jitted training step takes them as static arguments) and hold no state: a batch is a pure
    function of the seed and the step, which is what lets a resumed run see exactly the batches it would have seen.
    """

    @property
    def tokens_per_batch(self) -> int:
        """The number of predictions in a batch, for the speed in tokens per second."""
        ...

    @property
    def unit(self) -> str:
        """The unit of the loss for tables and axes, for example "nats per byte"."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns what determines the results (model, data, batch) as JSON values."""
        ...

    def init(self, key: jax.Array) -> Any:
        """Returns new parameters. Called once per run."""
        ...

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Returns the mean loss over a batch. Called inside jit and differentiated with respect to `params`."""
        ...

    def batch(self, seed: int, step: int) -> Any:
        """Returns the training batch of a step as numpy arrays. Called on the host, once per step."""
        ...

    def validation(self) -> Any:
        """Returns the fixed held-out examples, stacked on the first axis. Called before the first evaluation."""
        ...


def step_generator(seed: int, step: int) -> np.random.Generator:
    """Returns the source of everything random about the batch of a step.

    Args:
        seed: A number from 0 to 2^64 - 1.
        step: A number from 0 on.

    Returns:
        A counter-based generator, which needs no state carried from step to step.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))
