"""The blocks of a pre-norm transformer, which the language models and the vision transformer share."""

import math
from collections.abc import Iterable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from celo2_harness.lab.errors import check_range

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@runtime_checkable
class TransformerConfig(Protocol):
    """The part of a configuration that the blocks look at: sizes, and number formats by name."""

    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def param_dtype(self) -> str: ...
    @property
    def remat(self) -> bool: ...


def check_transformer(config: Any, *sizes: str) -> None:
    """Checks a configuration.

    Args:
        config: A `TransformerConfig`.
        sizes: The names of further fields that count something.

    Raises:
        ValueError: If a size is below 1, the heads do not divide the width, or a number format is unknown.
    """
    check_range(1, **{name: getattr(config, name) for name in ("width", "layers", "heads", *sizes)})
    if config.width % config.heads:
        raise ValueError(f"heads = {config.heads}: expected a divisor of the width {config.width}")
    for name in ("dtype", "param_dtype"):
        if getattr(config, name) not in DTYPES:
            raise ValueError(f"{name} = {getattr(config, name)!r}: expected one of {', '.join(DTYPES)}")


class Linear(nnx.Linear):
    """A linear map without bias and with GPT-2's initial values."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, rngs: nnx.Rngs, scale: float = 0.02):
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


def _residual_scale(config: TransformerConfig) -> float:
    # Each block adds twice to the residual stream; this keeps its variance at the start independent of the depth.
    return 0.02 / math.sqrt(2 * config.layers)


def layer_norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A LayerNorm over the width."""
    return nnx.LayerNorm(
        config.width, dtype=DTYPES[config.dtype], param_dtype=DTYPES[config.param_dtype], epsilon=1e-5, rngs=rngs
    )


def embedding(count: int, config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of `count` vectors of the width."""
    return nnx.Embed(
        count,
        config.width,
        embedding_init=nnx.initializers.normal(0.02),
        dtype=DTYPES[config.dtype],
        param_dtype=DTYPES[config.param_dtype],
        rngs=rngs,
    )


def attention_implementation(dtype: Any, head: int, time: int) -> Literal["xla", "cudnn"]:
    """Returns how attention is computed: by cuDNN without the matrix of scores where it can be, or by XLA.

    Args:
        dtype: The dtype of queries, keys and values.
        head: The channels of a head.
        time: The length of a window.
    """
    if jax.default_backend() != "gpu" or dtype != jnp.bfloat16 or head % 8 or head > 128 or time % 2:
        return "xla"
    # Of other makers there is no such number.
    capability = str(getattr(jax.devices()[0], "compute_capability", "0"))
    return "cudnn" if capability.replace(".", "", 1).isdecimal() and float(capability) >= 8.0 else "xla"


class Attention(nnx.Module):
    """Self-attention with queries, keys and values from one matrix; causal, each position sees those before it."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, causal: bool):
        self.heads = config.heads
        self.causal = causal
        self.qkv = Linear(config.width, 3 * config.width, config, rngs)
        self.projection = Linear(config.width, config.width, config, rngs, _residual_scale(config))

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        batch, time, width = x.shape
        query, key, value = jnp.split(self.qkv(x).reshape(batch, time, 3 * self.heads, -1), 3, axis=2)
        implementation = attention_implementation(query.dtype, query.shape[-1], time)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal, implementation=implementation)
        return self.projection(mixed.reshape(batch, time, width))


class MLP(nnx.Module):
    """Two linear maps with a GELU between, four times as wide inside."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.up = Linear(config.width, 4 * config.width, config, rngs)
        self.down = Linear(4 * config.width, config.width, config, rngs, _residual_scale(config))

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        return self.down(jax.nn.gelu(self.up(x)))


class Block(nnx.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, causal: bool):
        self.attention_norm = layer_norm(config, rngs)
        self.attention = Attention(config, rngs, causal)
        self.mlp_norm = layer_norm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def run_blocks(
    blocks: Iterable[Block], x: Float[Array, "batch time width"], remat: bool
) -> Float[Array, "batch time width"]:
    """Applies the blocks in order; with `remat` each is computed again in the backward pass."""
    run_block = nnx.remat(_run_block) if remat else _run_block
    for block in blocks:
        x = run_block(block, x)
    return x


def _run_block(block: Block, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
    return block(x)
