"""Scale augmentation: parameters divided by alpha at the start and multiplied by alpha inside the loss."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Logarithms = list[Float[Array, "..."]]
_Shapes = Sequence[tuple[int, ...]]


def _uniform(key: Array, bound: float, shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jax.random.uniform(key, shape, minval=-math.log(bound), maxval=math.log(bound))


def _global(key: Array, bound: float, shapes: _Shapes) -> Logarithms:
    return [_uniform(key, bound, ())] * len(shapes)


def _tensor(key: Array, bound: float, shapes: _Shapes) -> Logarithms:
    return [_uniform(k, bound, ()) for k in jax.random.split(key, len(shapes))]


def _parameter(key: Array, bound: float, shapes: _Shapes) -> Logarithms:
    return [_uniform(k, bound, shape) for k, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)]


def _mixed(key: Array, bound: float, shapes: _Shapes) -> Logarithms:
    level_key, alpha_key = jax.random.split(key)
    levels = [level(alpha_key, bound, shapes) for level in (_global, _tensor, _parameter)]
    chosen = jax.random.randint(level_key, (), 0, len(levels))
    return [
        jnp.select([chosen == k for k in range(len(levels))], [jnp.broadcast_to(x, shape) for x in logarithms])
        for *logarithms, shape in zip(*levels, shapes, strict=True)
    ]


# What shares one alpha: all of a task, a leaf, nothing, or one of these three, drawn per task.
AUGMENTATIONS: dict[str, Callable[[Array, float, _Shapes], Logarithms]] = {
    "global": _global,
    "tensor": _tensor,
    "parameter": _parameter,
    "mixed": _mixed,
}


def draw_log_alphas(level: str, bound: float, key: Array, shapes: _Shapes) -> Logarithms:
    """The logarithm of the alpha of each leaf; alpha is log-uniform in [1 / bound, bound].

    Args:
      level: which entries share one, out of `AUGMENTATIONS`.
      bound: at least 1, which switches augmentation off.
      key: randomness of this task.
      shapes: of the leaves.

    Returns:
      Per leaf an array that broadcasts against it.

    Source: arXiv 2602.19142, section 4; arXiv 2501.12670 for the levels.
    """
    return AUGMENTATIONS[level](key, bound, shapes)
