"""What a training loop needs from a task; nothing here knows of optimizers."""

from typing import Any, Protocol, runtime_checkable

import jax


@runtime_checkable
class Task(Protocol):
    """Something to train: parameters, a loss, training batches and a fixed validation set.

    Tasks are hashable (the jitted training step takes them as static arguments) and hold no state: a batch is a pure
    function of the seed and the step, which is what lets a resumed run see exactly the batches it would have seen.
    """

    @property
    def tokens_per_batch(self) -> int:
        """How many predictions one batch holds, for the speed shown as tokens per second."""
        ...

    @property
    def unit(self) -> str:
        """What the loss is counted in, for tables and axes, such as "nats per byte"."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns what determines the numbers, as JSON can hold it (model, data, batch): results differ by it."""
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
