"""The learned rule on one leaf as three Pallas kernels, each one pass over memory (Triton on GPUs).

    means      reads the gradient; the mean squares of rows and columns
    squares    reads gradient, parameter and accumulators; the mean square of every channel
    network    reads the same again; writes the direction, and the new accumulators over the old ones

What lies between them has the length of a row or a column. Nothing asks the host, and nothing of the leaf's size is
kept beside the state. The arithmetic is that of `features` and `network`, applied to tiles.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from celo2_harness.rule.accumulators import FACTORED_FLOOR, Moments, average, clip_gradient, update_elementwise
from celo2_harness.rule.channels import NORMALIZATION_FLOOR, channel_groups, input_scales
from celo2_harness.rule.config import RuleConfig, Theta
from celo2_harness.rule.features import (
    FEATURES,
    RMS_FLOOR,
    ROOT_FLOOR,
    Channel,
    InverseRoot,
    LeafStatistics,
    channel_counts,
    factored_inverse_rms,
    product,
    square,
)
from celo2_harness.rule.network import FirstLayer, first_layer, first_units, upper_layers
from celo2_harness.rule.padding import mean_over
from celo2_harness.rule.tiles import Grid, Tile
from celo2_harness.rule.view import MatrixView

# Entries of a tile, which a program holds in registers. Compiled for an H100 the kernels take 32, 85 and 185 of the 255
# registers of a thread; the network on tiles of 1,024 would take all of them and spill.
MEANS_TILE = 4096
SQUARES_TILE = 1024
NETWORK_TILE = 512


def direction_in_tiles(
    theta: Theta,
    config: RuleConfig,
    view: MatrixView,
    gradient: Float[Array, "..."],
    parameter: Float[Array, "..."],
    moments: Moments,
    *,
    lengths: Int[np.ndarray, "matrices axes"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "..."], Moments]:
    """What `leaf_direction` computes, in three kernels.

    Args:
        theta: The network's numbers.
        config: What theta was trained with.
        view: The view of the leaf or the batch, which must be `stackable`.
        gradient: The gradient in the view, of any float dtype and not clipped.
        parameter: The parameter in the view.
        moments: The accumulators before the gradient; those of the leaf's shape in the view.
        lengths: The true lengths of padded matrices (see `rule.padding`).
        interpret: Run the bodies of the kernels as ordinary JAX operations.

    Returns:
        The raw direction in the view, float32, and the new accumulators, with the dtypes of the old ones.

    References:
        arXiv 2602.19142, section 3.
    """
    flat = _flattened(view)
    planes = _Planes(
        gradient.reshape(flat.viewed),
        parameter.reshape(flat.viewed),
        tuple(m.reshape(flat.viewed) for m in moments.mu),
        moments.nu.reshape(flat.viewed),
        () if moments.diag is None else tuple(d.reshape(flat.viewed) for d in moments.diag),
    )
    row, col, thin = None, None, _Thin((), (), jnp.zeros([1, flat.viewed[0]]))
    if view.factored is not None:
        # Otherwise XLA computes them anew wherever they are read, and copies the old ones for that.
        row, col = jax.lax.optimization_barrier(
            _factored_moments(config, flat, planes.gradient, moments, lengths, interpret)
        )
        thin = _thin(flat, row, col, lengths)

    # Outside of the kernels what has the size of the leaf stands for its shape alone.
    stand_ins = tuple(zip(thin.row, thin.col, strict=True))
    statistics = _statistics(planes.gradient, planes.parameter, planes.mu, planes.nu, planes.diag, thin, stand_ins)
    groups = channel_groups(config, flat, statistics)
    rows = groups[0].rows
    squares = _mean_squares(config, Grid(flat, lengths, SQUARES_TILE, interpret), planes, thin, rows)
    ones = jnp.ones((len(rows), *[1] * len(flat.viewed)))
    offsets = first_layer(theta, flat, groups, [ones, *input_scales(flat, groups[1:], lengths=lengths)]).offsets
    raw, mu, nu, diag = _network(
        theta, config, Grid(flat, lengths, NETWORK_TILE, interpret), planes, thin, rows, offsets, squares
    )
    new = Moments(
        mu=tuple(x.reshape(m.shape) for x, m in zip(mu, moments.mu, strict=True)),
        nu=nu.reshape(moments.nu.shape),
        row=None if row is None else tuple(map(_like, row, moments.row or ())),
        col=None if col is None else tuple(map(_like, col, moments.col or ())),
        diag=None if moments.diag is None else tuple(map(_like, diag, moments.diag)),
    )
    return raw.reshape(view.viewed), new


class _Planes(NamedTuple):
    """What has the size of the leaf: (matrices, rows, columns), or (vectors, length)."""

    gradient: Array
    parameter: Array
    mu: tuple[Array, ...]
    nu: Array
    diag: tuple[Array, ...]


class _Thin(NamedTuple):
    """The row and column moments with the lost axis of length one, and per decay and matrix the mean of the former."""

    row: tuple[Array, ...]
    col: tuple[Array, ...]
    means: Float[Array, "decays matrices"]


def _flattened(view: MatrixView) -> MatrixView:
    """The view with all batch axes as one."""
    if view.factored is None:
        return MatrixView((math.prod(view.viewed[:-1]), view.viewed[-1]), (), (1,))
    first = len(view.viewed) - 3
    d1, d0 = view.factored
    return MatrixView((math.prod(view.viewed[:-2]), *view.viewed[-2:]), (1,), (2,), (d1 - first, d0 - first))


def _like(x: Array, old: Array) -> Array:
    return x.reshape(old.shape).astype(old.dtype)


def _factored_moments(
    config: RuleConfig,
    view: MatrixView,
    gradient: Array,
    moments: Moments,
    lengths: np.ndarray | None,
    interpret: bool,
) -> tuple[list[Array], list[Array]]:
    """The row and column moments after the gradient, (matrices, length)."""
    assert view.factored is not None and moments.row is not None and moments.col is not None
    over_columns, over_rows = _sums_of_squares(Grid(view, lengths, MEANS_TILE, interpret), gradient)
    by_axis = {2: over_columns, 1: over_rows}
    d1, d0 = view.factored

    def averages(old: Sequence[Array], axis: int) -> list[Array]:
        count = view.viewed[axis] if lengths is None else jnp.asarray(lengths[:, [axis - 1]], jnp.float32)
        mean = by_axis[axis] / count + FACTORED_FLOOR
        return [average(d, x.reshape(mean.shape), mean) for d, x in zip(config.factored_decays, old, strict=True)]

    return averages(moments.row, d0), averages(moments.col, d1)


def _thin(view: MatrixView, row: Sequence[Array], col: Sequence[Array], lengths: np.ndarray | None) -> _Thin:
    assert view.factored is not None
    d1, d0 = view.factored
    rows = jnp.stack([jnp.expand_dims(x, d0) for x in row])
    columns = tuple(jnp.expand_dims(x, d1) for x in col)
    if lengths is None:
        means = jnp.sum(rows / view.viewed[d1], axis=d1 + 1)
    else:
        means = mean_over(rows, (d1 - len(view.viewed),), lengths)
    return _Thin(tuple(rows), columns, means.reshape(len(row), -1))


def _statistics(
    gradient: Any, parameter: Any, mu: Any, nu: Any, diag: Any, thin: _Thin, factored: tuple[Channel, ...]
) -> LeafStatistics:
    """What features read, of the whole leaf or of a tile; the accumulators are those after the gradient."""
    return LeafStatistics(
        gradient=gradient,
        parameter=parameter,
        momentum=mu,
        second_moment=nu,
        inverse_rms=InverseRoot(nu, RMS_FLOOR),
        row=diag or thin.row,
        col=diag or thin.col,
        factored_inverse_rms=tuple((InverseRoot(d, ROOT_FLOOR),) for d in diag) or factored,
    )


def _sums_of_squares(grid: Grid, gradient: Array) -> tuple[Array, Array]:
    """The sums of the squares of the clipped gradient over columns, and over rows; both (matrices, length)."""
    count, rows, columns = grid.shape
    (down, across), (height, width) = grid.parts, grid.tile

    def body(tiled: Any, _: Any, outputs: list[Any]) -> None:
        squares = jnp.square(clip_gradient(tiled[...]))
        outputs[0][...] = jnp.sum(squares, axis=1)
        outputs[1][...] = jnp.sum(squares, axis=0)

    # A tile's worth of memory beyond the last row and column, so that nothing needs a mask.
    def part(tiles: int, length: int, axis: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        def index(program: Any) -> tuple[Any, ...]:
            place = grid.place(program)
            return place[0], place[2 - axis], place[1 + axis]

        shape = (count, tiles, grid.parts[axis] * length)
        return jax.ShapeDtypeStruct(shape, jnp.float32), pl.BlockSpec((None, None, length), index)

    over_columns, over_rows = grid.launch(
        "celo2_means", body, gradient, (), [part(across, height, 0), part(down, width, 1)]
    )
    return jnp.sum(over_columns, axis=1)[:, :rows], jnp.sum(over_rows, axis=1)[:, :columns]


def _full_channels(
    config: RuleConfig, rows: Sequence[int], is_matrix: bool, statistics: LeafStatistics
) -> list[Channel]:
    """The channels that belong to these rows of `w0`, of a tile."""
    channels: dict[int, Channel] = {}
    row = 0
    for name, count in zip(config.features, channel_counts(config), strict=True):
        if is_matrix or FEATURES[name].for_vectors:
            channels |= dict(enumerate(FEATURES[name].compute(statistics), start=row))
        row += count
    return [channels[row] for row in rows]


def _after_gradient(config: RuleConfig, planes: _Planes, row: Any, col: Any, means: Any, matrix: Any) -> LeafStatistics:
    """What features read, of a tile, from the accumulators before the gradient."""
    planes, row, col = jax.tree.map(lambda tile: tile[...], (planes, row, col), is_leaf=lambda x: isinstance(x, Tile))
    gradient = clip_gradient(planes.gradient)
    mu, nu = update_elementwise(config, gradient, planes.mu, planes.nu)
    squared = jnp.square(gradient) + FACTORED_FLOOR
    decays = config.factored_decays[: len(planes.diag)]
    diag = tuple(average(decay, d, squared) for decay, d in zip(decays, planes.diag, strict=True))
    factored = factored_inverse_rms(row, col, [means[k, matrix] for k in range(len(row))])
    parameter = planes.parameter.astype(jnp.float32)
    return _statistics(gradient, parameter, mu, nu, diag, _Thin(row, col, means), factored)


def _mean_squares(
    config: RuleConfig, grid: Grid, planes: _Planes, thin: _Thin, rows: Sequence[int]
) -> Float[Array, "channels_and_one matrices"]:
    """The mean squares of the channels, and last the sum of the absolute values of the slowest momentum."""

    def body(tiled: Any, means: Any, outputs: list[Any]) -> None:
        planes, row, col = tiled
        matrix, _, _ = grid.place(pl.program_id(0))
        statistics = _after_gradient(config, planes, row, col, means, matrix)
        # What lies beyond the end of a matrix is zero, but not its inverse root.
        mask = planes.gradient.mask
        total = lambda x: jnp.sum(x if mask is None else jnp.where(mask, x, 0.0))
        ones = jnp.ones(grid.tile, jnp.float32)
        for k, factors in enumerate(_full_channels(config, rows, not planes.diag, statistics)):
            outputs[0][k] = total(product([ones, *map(square, factors)]))
        slowest = max(range(len(statistics.momentum)), key=config.momentum_decays.__getitem__)
        outputs[0][len(rows)] = jnp.sum(jnp.abs(statistics.momentum[slowest]))

    def index(program: Any) -> tuple[Any, ...]:
        return 0, program // grid.tiles, program % grid.tiles

    shape = (len(rows) + 1, grid.shape[0], grid.tiles)
    output = (jax.ShapeDtypeStruct(shape, jnp.float32), pl.BlockSpec((len(rows) + 1, None, None), index))
    tiled = jax.tree.map(grid.lift, (planes, thin.row, thin.col))
    (parts,) = grid.launch("celo2_squares", body, tiled, thin.means, [output])
    divisors = np.concatenate([np.tile(grid.counts, (len(rows), 1)), np.ones((1, len(grid.counts)))])
    # Before the sum, so that it is no launch of its own.
    return jnp.sum(parts / jnp.asarray(divisors[..., None], jnp.float32), axis=-1)


def _network(
    theta: Theta,
    config: RuleConfig,
    grid: Grid,
    planes: _Planes,
    thin: _Thin,
    rows: Sequence[int],
    offsets: Sequence[Array],
    squares: Float[Array, "channels_and_one matrices"],
) -> tuple[Array, tuple[Array, ...], Array, tuple[Array, ...]]:
    """The direction, momenta, second moment and diagonal moments.

    A matrix (or vector) that has had no gradient, of which the last of the squares tells, gets direction zero.
    """
    theta = Theta(*map(jnp.asarray, theta))
    tiled = jax.tree.map(grid.lift, (planes, thin.row, thin.col, tuple(offsets)))

    def body(tiled: Any, whole: Any, outputs: list[Any]) -> None:
        (planes, row, col, offsets), (theta, means, squares) = tiled, whole
        matrix, _, _ = grid.place(pl.program_id(0))
        statistics = _after_gradient(config, planes, row, col, means, matrix)
        channels = _full_channels(config, rows, not planes.diag, statistics)
        scales = [jax.lax.rsqrt(squares[k, matrix] + NORMALIZATION_FLOOR) for k in range(len(rows))]
        weights: Any = _Scaled(theta.w0, rows, scales)
        units = [first_units(FirstLayer(weights, offsets), channels, j) for j in range(theta.b1.shape[0])]
        raw = jnp.broadcast_to(upper_layers(theta, units), grid.tile)
        outputs[0].write(jnp.where(squares[len(rows), matrix] > 0.0, raw, 0.0))
        diag = statistics.row if planes.diag else ()
        for output, x in zip(outputs[1:], (*statistics.momentum, statistics.second_moment, *diag), strict=True):
            output.write(x)

    old = (*tiled[0].mu, tiled[0].nu, *tiled[0].diag)
    plane = lambda dtype: (jax.ShapeDtypeStruct(grid.shape, dtype), None)
    outputs = [plane(jnp.float32), *(plane(x.dtype) for x in old)]
    in_place = [(x, k) for k, x in enumerate(old, start=1)]
    if planes.gradient.dtype == jnp.float32:
        in_place.append((tiled[0].gradient, 0))
    raw, *new = grid.launch("celo2_network", body, tiled, (theta, thin.means, squares), outputs, in_place)
    momenta = len(planes.mu)
    return raw, tuple(new[:momenta]), new[momenta], tuple(new[momenta + 1 :])


class _Scaled(NamedTuple):
    """The weights of the first layer for one matrix, by channel and unit, with the scales of the channels."""

    w0: Any
    rows: Sequence[int]
    scales: Sequence[Array]

    def __getitem__(self, index: tuple[int, int]) -> Array:
        channel, unit = index
        return self.scales[channel] * self.w0[self.rows[channel], unit]
