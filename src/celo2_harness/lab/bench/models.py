"""Parameter trees to measure on, as shapes: nothing is allocated until something is timed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from celo2_harness.lab.tasks import MODELS, init_gpt


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def matrix_blocks(width: int, depth: int) -> dict[str, Any]:
    """Returns the hidden matrices of `depth` transformer blocks: 12 width^2 parameters each."""
    block = {
        "attention": {"qkv": {"kernel": _array(width, 3 * width)}, "out": {"kernel": _array(width, width)}},
        "mlp": {"up": {"kernel": _array(width, 4 * width)}, "down": {"kernel": _array(4 * width, width)}},
    }
    return {f"block_{i}": block for i in range(depth)}


def gpt2_tree(depth: int, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> dict[str, Any]:
    """Returns GPT-2 with every block on its own, biases and norms included: 12 leaves a block and 4 more."""
    dense = lambda inputs, outputs: {"kernel": _array(inputs, outputs), "bias": _array(outputs)}
    norm = {"scale": _array(width), "bias": _array(width)}
    block = {
        "norm_1": norm,
        "attention": {"qkv": dense(width, 3 * width), "out": dense(width, width)},
        "norm_2": norm,
        "mlp": {"up": dense(width, 4 * width), "down": dense(4 * width, width)},
    }
    return {
        "token_embedding": {"embedding": _array(vocabulary, width)},
        "position_embedding": {"embedding": _array(context, width)},
        **{f"block_{i}": block for i in range(depth)},
        "final_norm": norm,
    }


def llama_tree(depth: int, width: int, heads: int, groups: int, inner: int, vocabulary: int = 32000) -> dict[str, Any]:
    """Returns a Llama: grouped-query attention, gated MLP, norms without bias, an untied head."""
    kernel = lambda inputs, outputs: {"kernel": _array(inputs, outputs)}
    shared = width // heads * groups
    block = {
        "attention_norm": {"scale": _array(width)},
        "attention": {
            "query": kernel(width, width),
            "key": kernel(width, shared),
            "value": kernel(width, shared),
            "out": kernel(width, width),
        },
        "mlp_norm": {"scale": _array(width)},
        "mlp": {"gate": kernel(width, inner), "up": kernel(width, inner), "down": kernel(inner, width)},
    }
    return {
        "token_embedding": {"embedding": _array(vocabulary, width)},
        **{f"block_{i}": block for i in range(depth)},
        "final_norm": {"scale": _array(width)},
        "lm_head": kernel(width, vocabulary),
    }


def _gpt(name: str) -> Any:
    return jax.eval_shape(lambda key: init_gpt(MODELS[name], key), jax.random.key(0))


# Name -> shapes. "blocks" is the tree that the figures of docs/research/performance.md are about.
MODEL_SHAPES: dict[str, Callable[[], Any]] = {
    "blocks": partial(matrix_blocks, 512, 4),
    "blocks-1m": partial(matrix_blocks, 256, 1),
    "blocks-3m": partial(matrix_blocks, 512, 1),
    "blocks-25m": partial(matrix_blocks, 512, 8),
    "blocks-50m": partial(matrix_blocks, 1024, 4),
    "blocks-100m": partial(matrix_blocks, 1024, 8),
    "gpt2-12": partial(gpt2_tree, 12),
    "gpt2-48": partial(gpt2_tree, 48),
    "gpt3-1.3b": partial(gpt2_tree, 24, 2048, context=2048),
    "llama-70b": partial(llama_tree, 80, 8192, 64, 8, 28672),
    **{name: partial(_gpt, name) for name in MODELS},
}
