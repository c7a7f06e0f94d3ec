"""The running statistics of one leaf: three momenta, a second moment, and factored (or diagonal) second moments."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from celo2_harness.rule.config import RuleConfig
from celo2_harness.rule.view import MatrixView

GRADIENT_CLIP = 1000.0
# Added to squared gradients under the factored moments, so that their inverse roots exist for a zero gradient.
FACTORED_FLOOR = 1e-30
STATE_DTYPES = ("float32", "bfloat16")


class Moments(NamedTuple):
    """Accumulators of one leaf; tuples hold one array per decay. No bias correction; all start at zero.

    `mu` and `nu` have the leaf's shape, `row` and `col` the viewed shape without one axis (matrices only), `diag` the
    leaf's shape (vectors only).
    """

    mu: tuple[Float[Array, "..."], ...]
    nu: Float[Array, "..."]
    row: tuple[Float[Array, "..."], ...] | None
    col: tuple[Float[Array, "..."], ...] | None
    diag: tuple[Float[Array, "..."], ...] | None


def resolve_state_dtype(dtype: Any) -> Any:
    """The dtype of momenta and second moment, checked.

    Raises:
        ValueError: If it is neither float32 nor bfloat16.
    """
    for choice in STATE_DTYPES:
        # Comparing with a dtype raises for words that name none.
        if dtype == choice or (not isinstance(dtype, str) and jnp.dtype(dtype) == choice):
            return jnp.dtype(choice)
    raise ValueError(f"state_dtype = {dtype!r}: expected one of {', '.join(STATE_DTYPES)}.")


def init_moments(config: RuleConfig, view: MatrixView, dtype: Any = jnp.float32) -> Moments:
    """Zeros for one leaf.

    Args:
        config: Gives the number of decays.
        view: The leaf's view.
        dtype: The dtype of `mu` and `nu`. Factored moments stay float32: they are small, and a decay of 0.999 changes
            them by less than bfloat16 resolves.
    """
    factored = lambda shape: tuple(jnp.zeros(shape, jnp.float32) for _ in config.factored_decays)
    return Moments(
        mu=tuple(jnp.zeros(view.shape, dtype) for _ in config.momentum_decays),
        nu=jnp.zeros(view.shape, dtype),
        row=factored(view.row_shape) if view.is_matrix else None,
        col=factored(view.column_shape) if view.is_matrix else None,
        diag=None if view.is_matrix else factored(view.shape),
    )


def clip_gradient(gradient: Float[Array, "*leaf"]) -> Float[Array, "*leaf"]:
    """float32 gradient in [-1000, 1000]; NaN becomes 0, so that it never enters the state."""
    gradient = gradient.astype(jnp.float32)
    return clip(jnp.where(jnp.isnan(gradient), 0.0, gradient), GRADIENT_CLIP)


def clip(x: Float[Array, "*leaf"], bound: float) -> Float[Array, "*leaf"]:
    """x in [-bound, bound]."""
    # Comparisons and selections; jnp.clip costs more on a CPU, for the sake of NaN and signed zeros.
    x = jnp.where(x > bound, bound, x)
    return jnp.where(x < -bound, -bound, x)


def update_moments(
    config: RuleConfig,
    view: MatrixView,
    gradient: Float[Array, "*leaf"],
    moments: Moments,
    lengths: Int[np.ndarray, "matrices axes"] | None = None,
) -> Moments:
    """All accumulators after one clipped gradient, in float32 (the caller rounds to the state's dtype).

    m <- beta m + (1 - beta) g,  v <- beta v + (1 - beta) g^2,  row and col: means of g^2 + 1e-30 over one axis.

    Args:
        config: Gives the decays.
        view: The leaf's view.
        gradient: The clipped gradient, float32.
        moments: The accumulators before it.
        lengths: The true lengths of padded matrices (see `rule.padding`).

    Returns:
        The new accumulators.
    """

    def averages(old: tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(average(decay, o, new) for decay, o in zip(config.factored_decays, old, strict=True))

    # The square is written three times, each time differently: XLA's CPU library squares while it sums, but a square
    # that is used twice is stored first, as one more plane.
    row = col = diag = None
    if view.factored is not None:
        assert moments.row is not None and moments.col is not None
        d1, d0 = view.factored
        viewed = view.apply(gradient)
        row = averages(moments.row, _mean(jnp.square(viewed), d0, lengths) + FACTORED_FLOOR)
        col = averages(moments.col, FACTORED_FLOOR - _mean(viewed * -viewed, d1, lengths))
    else:
        assert moments.diag is not None
        diag = averages(moments.diag, jnp.square(gradient) + FACTORED_FLOOR)
    mu, nu = update_elementwise(config, gradient, moments.mu, moments.nu)
    return Moments(mu, nu, row, col, diag)


def update_elementwise(
    config: RuleConfig, gradient: Float[Array, "*leaf"], mu: Sequence[Float[Array, "*leaf"]], nu: Float[Array, "*leaf"]
) -> tuple[tuple[Float[Array, "*leaf"], ...], Float[Array, "*leaf"]]:
    """Momenta and second moment after one clipped gradient, in float32."""
    momenta = tuple(average(decay, m, gradient) for decay, m in zip(config.momentum_decays, mu, strict=True))
    second = config.second_moment_decay * nu.astype(jnp.float32)
    return momenta, second + (1.0 - config.second_moment_decay) * gradient * gradient


def average(decay: float, old: Float[Array, "*leaf"], new: Float[Array, "*leaf"]) -> Float[Array, "*leaf"]:
    """The moving average after one more value, in float32."""
    return decay * old.astype(jnp.float32) + (1.0 - decay) * new


def mean_square(view: MatrixView, gradient: Float[Array, "*leaf"]) -> Float[Array, "..."]:
    """The mean of g^2 over the larger factored axis, which keeps length one, in the leaf's view (matrices only)."""
    assert view.factored is not None
    return jnp.mean(jnp.square(view.apply(gradient)), axis=view.factored[1], keepdims=True)


def _mean(x: jax.Array, axis: int, lengths: np.ndarray | None) -> jax.Array:
    """The mean over an axis. Padding holds zeros, and only asks for another denominator."""
    if lengths is None:
        return jnp.mean(x, axis=axis)
    return jnp.sum(x, axis=axis) / jnp.asarray(lengths[:, [axis - 1]], jnp.float32)
