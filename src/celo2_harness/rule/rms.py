"""Root mean squares of matrices: what an update is divided by, step by step or over time."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from celo2_harness.rule.config import Normalization
from celo2_harness.rule.padding import mean_over
from celo2_harness.rule.view import MatrixView

ROLLING_DECAY = 0.99
CLIP_THRESHOLD = 1.0
RMS_FLOOR = 1e-9


def matrix_mean_square(
    view: MatrixView, x: Float[Array, "..."], lengths: Int[np.ndarray, "matrices axes"] | None = None
) -> Float[Array, "..."]:
    """Returns the mean square of every matrix (or vector) of a leaf.

    Args:
        view: How the leaf is seen as matrices.
        x: The leaf in its view, float32.
        lengths: The true lengths of padded matrices (see `rule.padding`).

    Returns:
        One number per matrix, of the shape (batch axes, ones).
    """
    return mean_over(jnp.square(x), view.axes, lengths)


def init_mean_square(view: MatrixView) -> Float[Array, "..."]:
    """Returns the running mean squares before the first step: zeros, of the shape of `matrix_mean_square`."""
    return jnp.zeros((*view.viewed[: -len(view.axes)], *[1] * len(view.axes)), jnp.float32)


def rolling_mean_square(
    running: Float[Array, "..."], square: Float[Array, "..."], decay: float = ROLLING_DECAY
) -> Float[Array, "..."]:
    """Returns the running mean squares after a step; a mean square that is not finite does not enter them."""
    return jnp.where(jnp.isfinite(square), decay * running + (1.0 - decay) * square, running)


def rms_divisor(
    mode: Normalization,
    square: Float[Array, "..."],
    count: Int[Array, ""] | int = 1,
    *,
    decay: float = ROLLING_DECAY,
    threshold: float | int = CLIP_THRESHOLD,
    eps: float | int = RMS_FLOOR,
) -> Float[Array, "..."]:
    """Returns what an update is divided by.

    - `"per_step"`: sqrt(square + eps);
    - `"rolling"`: sqrt(square / (1 - decay^count) + eps);
    - `"clip"`: max(1, sqrt(square) / threshold).

    Args:
        mode: One of these three.
        square: The mean squares; for "rolling" the running ones.
        count: The number of steps, this one included ("rolling").
        decay: The decay of the running mean squares ("rolling").
        threshold: The largest root mean square that is left alone ("clip").
        eps: The number that is added to the mean square.
    """
    if mode == "clip":
        return jnp.maximum(1.0, jnp.sqrt(square) / threshold)
    if mode == "rolling":
        square = square / (1.0 - decay ** jnp.asarray(count, jnp.float32))
    return jnp.sqrt(square + eps)
