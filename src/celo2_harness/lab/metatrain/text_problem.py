"""An inner problem beside the images: a tiny GPT that learns the bytes of a text under the rule.

The GPT is so small that hundreds train at once: plain functions of a tuple of arrays.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, UInt8

from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.learned import InnerLeaf, InnerRule
from celo2_harness.lab.metatrain.problem import Clock
from celo2_harness.lab.metatrain.unroll import Unroll, kernel_view, new_unroll, training_step
from celo2_harness.rule import default_view


@dataclasses.dataclass(frozen=True)
class TinyGPTConfig:
    """The size of a tiny GPT.

    Attributes:
        width: The channels of the residual stream.
        layers: The number of blocks.
        heads: The number of attention heads; it divides the width.
        context: The number of predictions per window.
        classes: The number of different tokens.
    """

    width: int = 16
    layers: int = 1
    heads: int = 2
    context: int = 16
    classes: int = 64


class Norm(NamedTuple):
    """The scale and shift after a layer normalisation."""

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
    """All parameters of a tiny GPT; the head is stored outputs x inputs."""

    tokens: Float[Array, "classes width"]
    positions: Float[Array, "context width"]
    blocks: tuple[TinyBlock, ...]
    norm: Norm
    head: Float[Array, "classes width"]


def init_tiny_gpt(config: TinyGPTConfig, key: Array) -> TinyGPT:
    """Draws GPT-2's initial values: normal with deviation 0.02, less by sqrt(2 layers) where blocks end.

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
    """Computes the cross-entropy of predicting each token of a window from those before it.

    Args:
        config: The size of the model.
        params: The parameters, from `init_tiny_gpt`.
        windows: The tokens, of shape `(batch, context + 1)`.

    Returns:
        The mean over each window, in nats per token.
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


@dataclasses.dataclass(frozen=True)
class TextProblem:
    """A GPT of some size on one text of byte classes; an `InnerProblem`.

    In "ortho" the rule has the matrices inside of the blocks, and Adam the embeddings, the head and the norms; in
    "base" the rule has everything.

    Attributes:
        config: The recipe.
        model: The size of the network.
        rule: What trains the network, if not the recipe's rule.
    """

    config: MetaTrainConfig
    model: TinyGPTConfig = TinyGPTConfig()
    rule: InnerRule | None = None

    @property
    def loss_bound(self) -> float:
        """1.5 times the loss of an even guess."""
        return 1.5 * math.log(self.model.classes)

    def fresh(self, key: Array) -> Unroll:
        """Returns a new task: initial parameters, zero state, alpha and step size."""
        return new_unroll(self.config, self._rule, self._layout(), lambda k: init_tiny_gpt(self.model, k), key)

    def sample(self, data: UInt8[Array, " bytes"], which: Int[Array, ""], key: Array) -> Int[Array, " batch"]:
        """Draws where the windows of a batch start, with replacement; there is one text."""
        del which
        return jax.random.randint(key, (self.config.text_batch,), 0, data.shape[0] - self.model.context)

    def step(
        self, theta: Any, state: Unroll, clock: Clock, data: UInt8[Array, " bytes"], batch: Int[Array, " batch"]
    ) -> tuple[Unroll, Float[Array, ""]]:
        """Returns the unroll after a training step, and the training loss before it."""
        windows = data[batch[:, None] + jnp.arange(self.model.context + 1)]
        loss_fn = lambda params: jnp.mean(tiny_gpt_losses(self.model, params, windows))
        return training_step(self.config, self._rule, self._layout(), theta, state, clock, loss_fn)

    @property
    def _rule(self) -> InnerRule:
        return self.config.learned if self.rule is None else self.rule

    def _layout(self) -> list[InnerLeaf]:
        shapes: Any = jax.eval_shape(lambda: init_tiny_gpt(self.model, jax.random.key(0)))

        def leaf(name: str, shape: tuple[int, ...]) -> InnerLeaf:
            view = kernel_view(shape) if name in (*_HIDDEN, "head") else default_view(shape)
            return InnerLeaf(view, hidden=name in _HIDDEN)

        return [leaf(path[-1].name, x.shape) for path, x in jax.tree_util.tree_leaves_with_path(shapes)]


# The kernels inside of the blocks, stored outputs x inputs.
_HIDDEN = ("qkv", "projection", "up", "down")
