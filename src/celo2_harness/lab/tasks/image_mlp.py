"""A multilayer perceptron on small images: the inner task of meta-training."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class Layer(NamedTuple):
    """One affine layer, x @ kernel^T + bias.

    Inputs come last: they are the longer axis nearly everywhere, and that is the one a processor works along.
    """

    kernel: Float[Array, "outputs inputs"]
    bias: Float[Array, " outputs"]


Mlp = tuple[Layer, ...]


def init_mlp(key: Array, widths: Sequence[int]) -> Mlp:
    """Kernels from a normal cut off at 2 sigma, sigma = 1 / sqrt(inputs) (not rescaled); zero biases.

    >>> [layer.kernel.shape for layer in init_mlp(jax.random.key(0), (64, 32, 10))]
    [(32, 64), (10, 32)]
    """
    keys = jax.random.split(key, len(widths) - 1)
    return tuple(
        Layer(jax.random.truncated_normal(k, -2.0, 2.0, (o, i)) * i**-0.5, jnp.zeros(o))
        for k, i, o in zip(keys, widths[:-1], widths[1:], strict=True)
    )


def mlp_loss(
    params: Mlp,
    images: Float[Array, "batch pixels"],
    labels: Int[Array, " batch"],
    weights: Float[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Softmax cross-entropy in nats, the mean or a sum with weights; ReLU between layers."""
    x = images
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer.kernel.T + layer.bias)
    logits = x @ params[-1].kernel.T + params[-1].bias
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses) if weights is None else jnp.sum(weights * losses)
