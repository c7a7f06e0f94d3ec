"""A GPT over bytes, in the usual shape: pre-norm blocks, causal attention, a fourfold MLP and an untied head."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Integer

from celo2_harness._types import Params

VOCABULARY = 256
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class GPTConfig:
    """The size and the number formats of a model.

    Attributes:
        width: Channels of the residual stream.
        layers: Number of blocks.
        heads: Attention heads; they divide the width.
        context: The longest input, in bytes.
        dtype: What the forward and backward pass compute in, "float32" or "bfloat16". The loss is float32 always.
        param_dtype: What the parameters are kept in.
        remat: Recompute each block in the backward pass instead of keeping its activations: less memory, a third more
            arithmetic.
    """

    width: int
    layers: int
    heads: int
    context: int
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        for name in ("width", "layers", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads}: expected a divisor of the width {self.width}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(DTYPES)}")


# Sizes go by the names of the published models; with 256 bytes for a vocabulary the embeddings are far smaller, so the
# counts are below those of the namesakes.
MODELS = {
    "nano": GPTConfig(width=128, layers=4, heads=4, context=64),
    "tiny": GPTConfig(width=16, layers=1, heads=2, context=16),
    "nano-64": GPTConfig(width=64, layers=4, heads=2, context=64),
    "nano-256": GPTConfig(width=256, layers=4, heads=8, context=64),
    "nano-512": GPTConfig(width=512, layers=4, heads=16, context=64),
    "small": GPTConfig(width=384, layers=6, heads=6, context=256),
    "gpt2": GPTConfig(width=768, layers=12, heads=12, context=1024),
    "gpt3-xl": GPTConfig(width=2048, layers=24, heads=16, context=2048, remat=True),
}


class _Linear(nnx.Linear):
    """A linear map without bias and with GPT-2's initial values."""

    def __init__(self, inputs: int, outputs: int, config: GPTConfig, rngs: nnx.Rngs, scale: float = 0.02):
        super().__init__(
            inputs,
            outputs,
            use_bias=False,
            kernel_init=nnx.initializers.normal(scale),
            dtype=DTYPES[config.dtype],
            param_dtype=DTYPES[config.param_dtype],
            rngs=rngs,
        )

    def __call__(self, inputs: Float[Array, "batch time inputs"], out_sharding: Any = None) -> Array:
        # On CPU, XLA contracts over two axes (the gradient of the kernel) three times slower than over one.
        batch, time, _ = inputs.shape
        return super().__call__(inputs.reshape(batch * time, -1), out_sharding).reshape(batch, time, -1)


def _residual_scale(config: GPTConfig) -> float:
    # Each block adds twice to the residual stream; this keeps its variance at the start independent of the depth.
    return 0.02 / math.sqrt(2 * config.layers)


def _norm(config: GPTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.width, dtype=DTYPES[config.dtype], param_dtype=DTYPES[config.param_dtype], epsilon=1e-5, rngs=rngs
    )


def _embedding(count: int, config: GPTConfig, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(
        count,
        config.width,
        embedding_init=nnx.initializers.normal(0.02),
        dtype=DTYPES[config.dtype],
        param_dtype=DTYPES[config.param_dtype],
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal self-attention with queries, keys and values from one matrix."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        self.heads = config.heads
        self.qkv = _Linear(config.width, 3 * config.width, config, rngs)
        self.projection = _Linear(config.width, config.width, config, rngs, _residual_scale(config))

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        batch, time, width = x.shape
        query, key, value = jnp.split(self.qkv(x).reshape(batch, time, 3 * self.heads, -1), 3, axis=2)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.projection(mixed.reshape(batch, time, width))


class MLP(nnx.Module):
    """Two linear maps with a GELU between, four times as wide inside."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        self.up = _Linear(config.width, 4 * config.width, config, rngs)
        self.down = _Linear(4 * config.width, config.width, config, rngs, _residual_scale(config))

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        return self.down(jax.nn.gelu(self.up(x)))


class Block(nnx.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nnx.Module):
    """A byte-level GPT.

    Args:
        config: Its size.
        rngs: The source of the initial values; only the `params` stream is used.

    >>> model = GPT(GPTConfig(width=8, layers=1, heads=2, context=4), nnx.Rngs(0))
    >>> nnx.eval_shape(model, jnp.zeros((3, 4), jnp.uint8)).shape
    (3, 4, 256)
    """

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = _embedding(VOCABULARY, config, rngs)
        self.position_embedding = _embedding(config.context, config, rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = _norm(config, rngs)
        self.head = _Linear(config.width, VOCABULARY, config, rngs)

    def __call__(self, tokens: Integer[Array, "batch time"]) -> Float[Array, "batch time vocabulary"]:
        """Returns the logits of the next byte at each position, in the compute dtype."""
        time = tokens.shape[1]
        if time > self.config.context:
            raise ValueError(f"tokens: got windows of {time} bytes, the model's context is {self.config.context}")
        run_block = nnx.remat(_run_block) if self.config.remat else _run_block
        x = self.token_embedding(tokens) + self.position_embedding(jnp.arange(time))
        for block in self.blocks:
            x = run_block(block, x)
        return self.head(self.norm(x))


def _run_block(block: Block, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
    return block(x)


@partial(jax.jit, static_argnums=0)
def init_gpt(config: GPTConfig, key: jax.Array) -> Params:
    """Returns new parameters for a model.

    Args:
        config: The size of the model.
        key: A JAX random key.

    Returns:
        The parameters, an `nnx.State` of `nnx.Param`, in the config's `param_dtype`.
    """
    return nnx.state(GPT(config, nnx.Rngs(params=key)), nnx.Param)


def gpt_loss(config: GPTConfig, params: Params, windows: Integer[Array, "batch window"]) -> Float32[Array, ""]:
    """Returns the mean cross-entropy of predicting each byte of a window from those before it, in nats per byte.

    Args:
        config: The size of the model.
        params: Parameters from `init_gpt`.
        windows: Bytes, of shape `(batch, time + 1)` with `time` at most the model's context.

    Returns:
        The loss, float32.
    """
    # Abstract construction costs a little tracing time and no memory; the structure it yields holds no arrays.
    structure, _ = nnx.split(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(params=0))))
    logits = nnx.merge(structure, params)(windows[:, :-1]).astype(jnp.float32)
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), windows[:, 1:, None].astype(jnp.int32), axis=-1)
    return -jnp.mean(log_likelihood)
