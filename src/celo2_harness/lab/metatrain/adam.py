"""Adam as it runs inside: for leaves that are no hidden matrices, without bias correction."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

DECAYS = (0.9, 0.95)
FLOOR = 1e-8  # under the root, as the paper's inner Adam has it


class AdamState(NamedTuple):
    """The first and second moment of a leaf under Adam."""

    mu: Float[Array, "..."]
    nu: Float[Array, "..."]


def init_adam(leaf: Array) -> AdamState:
    """Returns zero moments for a leaf."""
    return AdamState(jnp.zeros_like(leaf), jnp.zeros_like(leaf))


def adam_step(leaf: Array, gradient: Array, state: AdamState, step_size: Array) -> tuple[Array, AdamState]:
    """Returns the leaf and its moments after a step.

    >>> leaf, state = adam_step(jnp.ones(2), jnp.ones(2), init_adam(jnp.ones(2)), jnp.array(1.0))
    >>> round(float(leaf[0]), 4)  # 1 - 0.1 / sqrt(0.05)
    0.5528
    """
    mu = DECAYS[0] * state.mu + (1 - DECAYS[0]) * gradient
    nu = DECAYS[1] * state.nu + (1 - DECAYS[1]) * jnp.square(gradient)
    return leaf - step_size * mu / jnp.sqrt(nu + FLOOR), AdamState(mu, nu)
