"""What VeLO knows of the training loss: ten running means with different memories, compared with their minima."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SCALES = 10
SHORTEST_HALF_LIFE = 10.0
FIRST_MINIMUM = 999999999999.0
GAP_FLOOR = 1e-8
# The features are zero until more losses than this were seen.
SILENT = 2


class LossBuffer(NamedTuple):
    """Running means of the loss, the lowest value that each has had (bias-corrected), and the number of losses."""

    means: Float[Array, " scales"]
    running_min: Float[Array, " scales"]
    seen: Int[Array, ""]


def init_losses() -> LossBuffer:
    """Before the first loss."""
    return LossBuffer(
        jnp.zeros(SCALES, jnp.float32), jnp.full(SCALES, FIRST_MINIMUM, jnp.float32), jnp.zeros([], jnp.int32)
    )


def loss_decays(num_steps: Float[Array, ""] | Int[Array, ""] | int | float) -> Float[Array, " scales"]:
    """exp(-1 / h), with h log-spaced from 10 to the length of the run."""
    longest = jnp.log10(jnp.asarray(num_steps, jnp.float32))
    half_lives = 10.0 ** jnp.linspace(jnp.log10(jnp.float32(SHORTEST_HALF_LIFE)), longest, SCALES)
    return jnp.exp(-1.0 / half_lives)


def add_loss(buffer: LossBuffer, decays: Float[Array, " scales"], loss: Float[Array, ""]) -> LossBuffer:
    """The buffer after one more loss L.

    L is cut off at twice the largest running mean, so that a spike does not fill the memory; a loss that is not finite
    counts as that bound, and is left out where it is the first.
    """
    number = buffer.seen.astype(jnp.float32)
    # The exponent is that of the new count, the means are the old ones: this is how the weights were trained.
    largest = jnp.max(buffer.means / (1.0 - decays ** (number + 1.0)))
    finite, first = jnp.isfinite(loss), buffer.seen == 0
    bound = 2.0 * jnp.abs(jnp.where(first, loss, largest))
    loss = jnp.where(finite, jnp.minimum(loss, bound), bound)
    means = decays * buffer.means + (1.0 - decays) * loss
    lowest = jnp.minimum(buffer.running_min, means / (1.0 - decays ** (number + 1.0)))
    new = LossBuffer(means, lowest, buffer.seen + 1)
    left_out = first & ~finite
    return LossBuffer(*(jnp.where(left_out, o, n) for o, n in zip(buffer, new, strict=True)))


def loss_features(buffer: LossBuffer, decays: Float[Array, " scales"]) -> Float[Array, " features"]:
    """Nine numbers in [-1, 1]: how far each mean is above its minimum, relative to the next slower one.

    clip((u_i - min_i) / max(1e-8, u_{i+1} - min_i) - 1, -1, 1), with u the bias-corrected means.
    """
    number = jnp.maximum(buffer.seen, 1).astype(jnp.float32)
    unbiased = buffer.means / (1.0 - decays**number)
    lowest = buffer.running_min[:-1]
    gap = jnp.maximum(GAP_FLOOR, unbiased[1:] - lowest)
    return jnp.where(buffer.seen > SILENT, jnp.clip((unbiased[:-1] - lowest) / gap - 1.0, -1.0, 1.0), 0.0)
