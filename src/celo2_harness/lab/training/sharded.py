"""A task on a mesh of devices: parameters split, batches divided, the loss as it was."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.tasks import Task
from celo2_harness.sharding import batch_sharding, parameter_shardings


@dataclass(frozen=True)
class ShardedTask:
    """A `Task` whose parameters and batches lie on a mesh.

    Parameters lie as `parameter_shardings` says. The loss gathers what "fsdp" has split, a leaf at a time, so that
    gradients come back summed and split; over "tensor" leaves stay split, and XLA divides the products. Batches are
    divided over "data" and "fsdp"; held-out examples lie on every device.

    Attributes:
        task: The task.
        mesh: The devices, from `make_mesh`.
    """

    task: Task
    mesh: Mesh

    @property
    def tokens_per_batch(self) -> int:
        """The number of predictions per batch, over all devices together."""
        return self.task.tokens_per_batch

    @property
    def flops_per_batch(self) -> float | None:
        """The floating-point operations of the model in a step, over all devices together."""
        return getattr(self.task, "flops_per_batch", None)

    @property
    def unit(self) -> str:
        """The unit of the loss, for example "nats per byte"."""
        return self.task.unit

    def describe(self) -> dict[str, Any]:
        """Returns what the task says of itself, since the mesh changes numbers by rounding only."""
        return self.task.describe()

    def init(self, key: jax.Array) -> Any:
        """Returns new parameters, the same as on one device."""
        shardings = parameter_shardings(jax.eval_shape(self.task.init, key), self.mesh)
        return jax.jit(self.task.init, out_shardings=shardings)(key)

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Returns the mean loss over the whole batch."""

        def gathered(split: NamedSharding) -> NamedSharding:
            return NamedSharding(self.mesh, PartitionSpec(*(None if name == "fsdp" else name for name in split.spec)))

        shardings = jax.tree.map(gathered, parameter_shardings(params, self.mesh))
        return self.task.loss(jax.lax.with_sharding_constraint(params, shardings), batch)

    def batch(self, seed: int, step: int) -> Any:
        """Returns the batch of a step, divided; every process makes all of it and keeps its part."""
        sharding = batch_sharding(self.mesh)

        def divide(x: np.ndarray) -> jax.Array:
            parts = self.mesh.size // sharding.shard_shape((self.mesh.size,))[0]
            if len(x) % parts:
                raise InputError(f"batch = {len(x)}: expected a multiple of {parts}, the devices of data and fsdp")
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(divide, self.task.batch(seed, step))

    def validation(self) -> Any:
        """Returns the held-out examples, on every device."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        place = lambda x: jax.make_array_from_callback(x.shape, whole, lambda index: x[index])
        return jax.tree.map(place, self.task.validation())
