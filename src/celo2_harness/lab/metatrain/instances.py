"""A finite number of unrolls per task, each with its own start, length and batches: references can be measured."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


class Instances(NamedTuple):
    """All unrolls of a task.

    Attributes:
        key_data: The randomness of the task, of which that of every unroll is made.
        references: The loss that the losses of an unroll are divided by; one where none has been measured.
    """

    # The data of a key and not the key itself, for checkpoints.
    key_data: UInt32[Array, " words"]
    references: Float[Array, " instances"]

    def start_key(self, index: Int[Array, ""]) -> Array:
        """Returns the randomness of the start of an unroll."""
        return jax.random.split(self._key(index))[0]

    def batch_key(self, index: Int[Array, ""], step: Int[Array, ""]) -> Array:
        """Returns the randomness of a batch of an unroll."""
        return jax.random.fold_in(jax.random.split(self._key(index))[1], step)

    def draw(self, key: Array) -> Int[Array, ""]:
        """Draws the number of an unroll."""
        return jax.random.randint(key, (), 0, len(self.references))

    def _key(self, index: Array) -> Array:
        return jax.random.fold_in(jax.random.wrap_key_data(self.key_data), index)


def new_instances(count: int, key: Array) -> Instances | None:
    """Returns so many unrolls, without references; None for zero, which stands for no end of them."""
    return Instances(jax.random.key_data(jax.random.fold_in(key, 1)), jnp.ones(count)) if count else None
