"""How the inner step size changes over an unroll."""

import math

import jax.numpy as jnp
from jaxtyping import Array


def _constant(step: Array, length: Array, warmup: float) -> Array:
    del length, warmup
    return jnp.ones_like(step, jnp.float32)


def _warmup_cosine(step: Array, length: Array, warmup: float) -> Array:
    rising = jnp.maximum(warmup * length, 1.0)
    place = jnp.clip((step - rising) / jnp.maximum(length - rising, 1.0), 0.0, 1.0)
    return jnp.where(step < rising, step / rising, 0.5 * (1.0 + jnp.cos(math.pi * place)))


# Factor of the inner step size at a step of an unroll of some length, with warm-up over a part of it.
INNER_SCHEDULES = {"constant": _constant, "warmup_cosine": _warmup_cosine}
