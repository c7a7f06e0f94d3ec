"""Root mean squares of matrices: what an update is divided by, step by step or over time."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from celo2_harness.rule.config import Normalization
from celo2_harness.rule.padding import mean_over
from celo2_harness.rule.view import MatrixView


def init_mean_square(view: MatrixView) -> Float[Array, "..."]:
    """Returns the running mean squares before the first step: zero per matrix, of the shape (batch axes, ones)."""
    return jnp.zeros((*view.viewed[: -len(view.axes)], *[1] * len(view.axes)), jnp.float32)


def rms_divisor(
    mode: Normalization,
    view: MatrixView,
    x: Float[Array, "..."],
    running: Float[Array, "..."] | None = None,
    count: Int[Array, ""] | int = 1,
    *,
    decay: float = 0.99,
    threshold: float | int = 1.0,
    eps: float | int = 1e-9,
    lengths: Int[np.ndarray, "matrices axes"] | None = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """Computes what an update is divided by, one number per matrix or vector.

    With m the mean square over a matrix:

    - `"per_step"`: sqrt(m + eps);
    - `"clip"`: max(1, sqrt(m) / threshold);
    - `"rolling"`: sqrt(v / (1 - decay^count) + eps), where v <- decay v + (1 - decay) m.

    Args:
        mode: One of the three.
        view: How the leaf is seen as matrices.
        x: The update in its view, float32.
        running: The running mean square v before this step ("rolling").
        count: The number of steps, this one included ("rolling").
        decay: The decay of the running mean square.
        threshold: The largest root mean square that is left alone ("clip").
        eps: The number that is added to the mean square.
        lengths: The true lengths of padded matrices (see `rule.padding`).

    Returns:
        The divisor, and the running mean square after this step; a mean square that is not finite does not enter it.
    """
    square = mean_over(jnp.square(x), view.axes, lengths)
    if mode == "clip":
        return jnp.maximum(1.0, jnp.sqrt(square) / threshold), running
    if mode == "rolling":
        assert running is not None
        running = jnp.where(jnp.isfinite(square), decay * running + (1.0 - decay) * square, running)
        square = running / (1.0 - decay ** jnp.asarray(count, jnp.float32))
    return jnp.sqrt(square + eps), running
