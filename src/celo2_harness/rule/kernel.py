"""The network of the learned rule as one Pallas kernel: a tile of every plane in, a tile of the direction out.

XLA may or may not fuse the network into one loop; a kernel is one loop by construction. The arithmetic inside is that
of `network`, applied to tiles, so there is nothing to keep in step.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from celo2_harness.rule.channels import ChannelGroup
from celo2_harness.rule.config import Theta
from celo2_harness.rule.network import FirstLayer, Head, first_output, first_units, upper_layers
from celo2_harness.rule.view import MatrixView

TILE = (8, 128)  # at most; one tile is what a Triton program holds in registers

Lengths = tuple[int | None, ...]


def network_in_tiles(
    view: MatrixView,
    theta: Theta,
    layer: FirstLayer,
    group: ChannelGroup,
    head: Head = first_output,
    *,
    interpret: bool | None = None,
) -> Float[Array, "..."]:
    """Evaluates `network.network` as one kernel (Triton on GPUs).

    Args:
        view: The leaf's view. Axes that no power of two divides get tiles of length one there: right, but slow.
        theta: The network's numbers, of which `w0` and `b0` are in `layer` already.
        layer: What `first_layer` gives.
        group: The channels of full size.
        head: The last layer.
        interpret: Run the kernel's body as ordinary JAX operations. None: wherever there is no GPU.

    Returns:
        The direction, a float32 array of the viewed shape.

    References:
        arXiv 2602.19142, section 3.
    """
    if interpret is None:
        interpret = jax.default_backend() != "gpu"
    tile = _tile(view.viewed)
    # A plane that is a factor of many channels is loaded once; what is no array (a floor) stays in the program.
    factors, structure = jax.tree.flatten(group.channels)
    planes = {id(x): x for x in factors if isinstance(x, jax.Array)}
    numbers, number_structure = jax.tree.flatten(Theta(*map(jnp.asarray, theta)))
    broadcast, layer_structure = jax.tree.flatten(layer)

    def kernel(*refs: Any) -> None:
        start, end = len(numbers), len(numbers) + len(broadcast)
        theta = number_structure.unflatten(refs[:start])
        layer = layer_structure.unflatten(refs[start:end])
        tiles = {key: ref[...] for key, ref in zip(planes, refs[end:-1], strict=True)}
        output = refs[-1]
        channels = structure.unflatten([tiles.get(id(x), x) for x in factors])
        units = [first_units(layer, channels, j) for j in range(theta.b1.shape[0])]
        output[...] = jnp.broadcast_to(upper_layers(theta, units, head), output.shape)

    inputs = [*broadcast, *planes.values()]
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(view.viewed, jnp.float32),
        grid=tuple(n // (size or 1) for n, size in zip(view.viewed, tile, strict=True)),
        in_specs=[*map(_whole, numbers), *(_block(x.shape, tile) for x in inputs)],
        out_specs=pl.BlockSpec(tile, lambda *ids: ids),
        interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4),
        name="celo2_network",
    )(*numbers, *inputs)


def _tile(viewed: tuple[int, ...]) -> Lengths:
    """Lengths of a tile along each axis; None along batch axes. Triton wants powers of two, and nothing is padded."""
    lengths = [math.gcd(n, limit) for n, limit in zip(viewed[-2:], TILE[-len(viewed[-2:]) :], strict=True)]
    return (*[None] * (len(viewed) - len(lengths)), *lengths)


def _block(shape: tuple[int, ...], tile: Lengths) -> pl.BlockSpec:
    """The block of an array whose last axes broadcast against the leaf; axes before those are taken whole."""
    first = len(shape) - len(tile)
    thin = tuple(n == 1 for n in shape[first:])
    lengths = [None if size is None else 1 if is_thin else size for size, is_thin in zip(tile, thin, strict=True)]

    def index(*ids: Any) -> tuple[Any, ...]:
        return (*[0] * first, *(0 if is_thin else i for i, is_thin in zip(ids, thin, strict=True)))

    return pl.BlockSpec((*shape[:first], *lengths), index)


def _whole(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
