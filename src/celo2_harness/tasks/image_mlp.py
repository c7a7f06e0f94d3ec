"""A multilayer perceptron on small images: the inner task of meta-training."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class Layer(NamedTuple):
    """One affine layer: x @ kernel + bias."""

    kernel: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"]


Mlp = tuple[Layer, ...]


def init_mlp(key: Array, widths: Sequence[int]) -> Mlp:
    """Kernels from a normal cut off at 2 sigma, sigma = 1 / sqrt(inputs) (not rescaled); zero biases.

    >>> [layer.kernel.shape for layer in init_mlp(jax.random.key(0), (64, 32, 10))]
    [(64, 32), (32, 10)]
    """
    keys = jax.random.split(key, len(widths) - 1)
    return tuple(
        Layer(jax.random.truncated_normal(k, -2.0, 2.0, (i, o)) / jnp.sqrt(i), jnp.zeros(o))
        for k, i, o in zip(keys, widths[:-1], widths[1:], strict=True)
    )


def mlp_loss(params: Mlp, images: Float[Array, "batch pixels"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """Mean softmax cross-entropy in nats; ReLU between layers."""
    x = images
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer.kernel + layer.bias)
    logits = x @ params[-1].kernel + params[-1].bias
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
