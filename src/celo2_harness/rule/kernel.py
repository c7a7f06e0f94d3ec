"""The network of the learned rule as one Pallas kernel: a tile of every plane in, a tile of the direction out.

XLA may or may not fuse the network into one loop; a kernel is one loop by construction. The arithmetic inside is
`network` itself, applied to tiles, so there is nothing to keep in step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from celo2_harness.rule.config import RuleConfig, Theta
from celo2_harness.rule.features import RMS_FLOOR, InverseRoot, LeafStatistics
from celo2_harness.rule.network import network
from celo2_harness.rule.view import MatrixView

TILE = (8, 128)  # at most; one tile is what a Triton program holds in registers


def _tile(viewed: tuple[int, ...]) -> tuple[int | None, ...]:
    """Lengths of a tile along each axis; None along batch axes. Triton wants powers of two, and nothing is padded."""
    lengths = [math.gcd(n, limit) for n, limit in zip(viewed[-2:], TILE[-len(viewed[-2:]) :], strict=True)]
    return (*[None] * (len(viewed) - len(lengths)), *lengths)


def _block(shape: tuple[int, ...], tile: tuple[int | None, ...]) -> pl.BlockSpec:
    """The block of an array that broadcasts against the leaf: axes of length one stay where they are."""
    fixed = tuple(n == 1 for n in shape)
    lengths = tuple(None if size is None else 1 if thin else size for size, thin in zip(tile, fixed, strict=True))
    return pl.BlockSpec(lengths, lambda *ids: tuple(0 if thin else i for i, thin in zip(ids, fixed, strict=True)))


def _whole(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def evaluate_in_tiles(
    theta: Theta,
    config: RuleConfig,
    view: MatrixView,
    statistics: LeafStatistics,
    scales: Sequence[Float[Array, "..."]],
    *,
    interpret: bool | None = None,
) -> Float[Array, "..."]:
    """What `network.evaluate` computes, as one kernel (Triton on GPUs).

    Args:
      theta: the network's numbers.
      config: names the feature groups, in the order of the rows of `theta.w0`.
      view: the leaf's view. Axes that no power of two divides get tiles of length one there: right, but slow.
      statistics: the leaf's statistics after this step's gradient.
      scales: what `input_scales` gives for them.
      interpret: run the kernel's body as ordinary JAX operations. None: wherever there is no GPU.

    Returns:
      float32 array of the viewed shape.

    Source: arXiv 2602.19142, section 3.
    """
    if interpret is None:
        interpret = jax.default_backend() != "gpu"
    tile = _tile(view.viewed)
    # 1 / sqrt(v + eps) is made of v inside, so that it need not be a plane of its own.
    planes, structure = jax.tree.flatten((statistics._replace(inverse_rms=None), list(scales)))
    numbers = [jnp.asarray(x) for x in theta]

    def kernel(*refs: Any) -> None:
        *inputs, output = refs
        weights, tiles = inputs[: len(numbers)], [ref[...] for ref in inputs[len(numbers) :]]
        statistics, scales = structure.unflatten(tiles)
        statistics = statistics._replace(inverse_rms=InverseRoot(statistics.second_moment + RMS_FLOOR))
        output[...] = jnp.broadcast_to(network(weights, config, view, statistics, scales), output.shape)

    call: Callable[..., jax.Array] = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(view.viewed, jnp.float32),
        grid=tuple(n // (size or 1) for n, size in zip(view.viewed, tile, strict=True)),
        in_specs=[*map(_whole, numbers), *(_block(x.shape, tile) for x in planes)],
        out_specs=pl.BlockSpec(tile, lambda *ids: ids),
        interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4),
        name="celo2_network",
    )
    return call(*numbers, *planes)
