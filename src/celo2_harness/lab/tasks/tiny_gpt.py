"""A GPT so small that hundreds train at once: an inner task of meta-training. Plain functions of a tuple of arrays."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer


@dataclass(frozen=True)
class TinyGPTConfig:
    """The size of a model.

    Attributes:
        width: Channels of the residual stream.
        layers: Number of blocks.
        heads: Attention heads; they divide the width.
        context: Predictions per window.
        classes: Number of different tokens.
    """

    width: int = 16
    layers: int = 1
    heads: int = 2
    context: int = 16
    classes: int = 64


class Norm(NamedTuple):
    """Scale and shift after a layer normalisation."""

    scale: Float[Array, " width"]
    bias: Float[Array, " width"]


class TinyBlock(NamedTuple):
    """Attention and MLP, each behind a norm and added to the residual stream. Kernels are outputs x inputs."""

    attention_norm: Norm
    qkv: Float[Array, "3*width width"]
    projection: Float[Array, "width width"]
    mlp_norm: Norm
    up: Float[Array, "4*width width"]
    down: Float[Array, "width 4*width"]


class TinyGPT(NamedTuple):
    """All parameters; the head is outputs x inputs."""

    tokens: Float[Array, "classes width"]
    positions: Float[Array, "context width"]
    blocks: tuple[TinyBlock, ...]
    norm: Norm
    head: Float[Array, "classes width"]


def init_tiny_gpt(config: TinyGPTConfig, key: Array) -> TinyGPT:
    """GPT-2's initial values: normal with deviation 0.02, less by the root of twice the depth where blocks end.

    >>> params = init_tiny_gpt(TinyGPTConfig(width=8), jax.random.key(0))
    >>> params.blocks[0].up.shape, params.head.shape
    ((32, 8), (64, 8))
    """
    width, last = config.width, 0.02 / math.sqrt(2 * config.layers)
    normal = lambda k, rows, columns, deviation=0.02: deviation * jax.random.normal(k, (rows, columns))
    norm = Norm(jnp.ones(width), jnp.zeros(width))

    def block(key: Array) -> TinyBlock:
        keys = jax.random.split(key, 4)
        return TinyBlock(
            attention_norm=norm,
            qkv=normal(keys[0], 3 * width, width),
            projection=normal(keys[1], width, width, last),
            mlp_norm=norm,
            up=normal(keys[2], 4 * width, width),
            down=normal(keys[3], width, 4 * width, last),
        )

    keys = jax.random.split(key, 3 + config.layers)
    return TinyGPT(
        tokens=normal(keys[0], config.classes, width),
        positions=normal(keys[1], config.context, width),
        blocks=tuple(block(k) for k in keys[3:]),
        norm=norm,
        head=normal(keys[2], config.classes, width),
    )


def _normalize(norm: Norm, x: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5) * norm.scale + norm.bias


def _attend(block: TinyBlock, config: TinyGPTConfig, x: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
    depth = config.width // config.heads
    qkv = (x @ block.qkv.T).reshape(-1, config.context, 3, config.heads, depth)
    query, key, value = jnp.transpose(qkv, (2, 0, 3, 1, 4))
    scores = query @ jnp.swapaxes(key, -1, -2) / math.sqrt(depth)
    weights = jax.nn.softmax(jnp.where(jnp.tri(config.context, dtype=bool), scores, -jnp.inf))
    return jnp.swapaxes(weights @ value, 1, 2).reshape(x.shape) @ block.projection.T


def tiny_gpt_losses(
    config: TinyGPTConfig, params: TinyGPT, windows: Integer[Array, "batch window"]
) -> Float[Array, " batch"]:
    """Cross-entropy of predicting each token of a window from those before it, in nats per token.

    Args:
        config: The size.
        params: From `init_tiny_gpt`.
        windows: Tokens, of shape `(batch, context + 1)`.

    Returns:
        The mean over each window.
    """
    # Products with one-hot rows: their gradients are products too, where those of lookups would be scatters. Windows
    # and positions are one axis, since on CPU XLA multiplies faster so.
    one_hot = jax.nn.one_hot(windows, config.classes)
    inputs, targets = (part.reshape(-1, config.classes) for part in (one_hot[:, :-1], one_hot[:, 1:]))
    x = inputs @ params.tokens + jnp.tile(params.positions, (windows.shape[0], 1))
    for block in params.blocks:
        x = x + _attend(block, config, _normalize(block.attention_norm, x))
        x = x + jax.nn.gelu(_normalize(block.mlp_norm, x) @ block.up.T) @ block.down.T
    log_likelihood = jax.nn.log_softmax(_normalize(params.norm, x) @ params.head.T)
    return -jnp.mean(jnp.sum(log_likelihood * targets, axis=-1).reshape(-1, config.context), axis=-1)
