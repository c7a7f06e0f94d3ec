"""A GPT in the usual shape: pre-norm blocks, causal attention, a fourfold MLP, an untied or a tied head."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Integer

from celo2_harness._types import Params
from celo2_harness.lab.tasks.transformer import Block, Linear, check_transformer, embedding, layer_norm, run_blocks

VOCABULARY = 256
"""The vocabulary of models on bytes."""


@dataclass(frozen=True)
class GPTConfig:
    """The size and the number formats of a model.

    Attributes:
        width: The channels of the residual stream.
        layers: The number of blocks.
        heads: The number of attention heads; it divides the width.
        context: The longest input, in tokens.
        dtype: The format that the forward and backward pass compute in, "float32" or "bfloat16". The loss is float32
            always.
        param_dtype: The format of the parameters.
        remat: Whether each block is computed again in the backward pass instead of keeping its activations: less
            memory, a third more arithmetic.
        vocabulary: The number of tokens; the 256 bytes by default.
        tied: Whether the output layer is the table of token embeddings, as in GPT-2, and not a matrix of its own.
    """

    width: int
    layers: int
    heads: int
    context: int
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False
    vocabulary: int = VOCABULARY
    tied: bool = False

    def __post_init__(self):
        check_transformer(self, "context", "vocabulary")


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

# GPT-2 and GPT-3 share the table of token embeddings with the output layer; the small model has a head of its own.
TOKEN_MODELS = {
    "small": GPTConfig(width=128, layers=4, heads=4, context=128, vocabulary=4096),
    "gpt2-124m": GPTConfig(width=768, layers=12, heads=12, context=1024, vocabulary=50257, tied=True),
    "gpt3-xl-1.3b": GPTConfig(width=2048, layers=24, heads=16, context=2048, vocabulary=50257, tied=True, remat=True),
}


def flops_per_token(config: GPTConfig) -> float:
    """Returns the floating-point operations that training takes per token, forward and backward.

    6 N + 12 L W T with N the parameters of all matrices that multiply activations (the output layer too), L blocks of
    width W and windows of T tokens. What is computed again to save memory does not count.

    Args:
        config: The size of the model.

    Returns:
        The operations per token.

    References:
        PaLM, arXiv 2204.02311, appendix B.

    Example:
        >>> round(flops_per_token(TOKEN_MODELS["gpt2-124m"]) / 1e6)
        854
    """
    matrices = 12 * config.layers * config.width**2 + config.vocabulary * config.width
    return 6.0 * matrices + 12.0 * config.layers * config.width * config.context


class GPT(nnx.Module):
    """A GPT.

    Args:
        config: The size of the model.
        rngs: The source of the initial values; only the `params` stream is used.

    >>> model = GPT(GPTConfig(width=8, layers=1, heads=2, context=4), nnx.Rngs(0))
    >>> nnx.eval_shape(model, jnp.zeros((3, 4), jnp.uint8)).shape
    (3, 4, 256)
    """

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = embedding(config.vocabulary, config, rngs)
        self.position_embedding = embedding(config.context, config, rngs)
        self.blocks = nnx.List([Block(config, rngs, causal=True) for _ in range(config.layers)])
        self.norm = layer_norm(config, rngs)
        if not config.tied:
            self.head = Linear(config.width, config.vocabulary, config, rngs)

    def __call__(self, tokens: Integer[Array, "batch time"]) -> Float[Array, "batch time vocabulary"]:
        """Returns the logits of the next token at each position, in the compute dtype."""
        time = tokens.shape[1]
        if time > self.config.context:
            raise ValueError(f"tokens: got windows of {time} tokens, the model's context is {self.config.context}")
        x = self.token_embedding(tokens) + self.position_embedding(jnp.arange(time))
        x = self.norm(run_blocks(self.blocks, x, self.config.remat))
        return self.token_embedding.attend(x) if self.config.tied else self.head(x)


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
    """Returns the mean cross-entropy of predicting each token of a window from those before it, in nats.

    Args:
        config: The size of the model.
        params: Parameters from `init_gpt`.
        windows: Bytes or tokens, of shape `(batch, time + 1)` with `time` at most the model's context.

    Returns:
        The loss, float32.
    """
    # Abstract construction costs a little tracing time and no memory; the structure it yields holds no arrays.
    structure, _ = nnx.split(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(params=0))))
    logits = nnx.merge(structure, params)(windows[:, :-1]).astype(jnp.float32)
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), windows[:, 1:, None].astype(jnp.int32), axis=-1)
    return -jnp.mean(log_likelihood)
