"""The features of the learned rule: a table of named groups, each a function of one leaf's statistics.

A channel is a product, given as its factors: arrays that broadcast to the viewed leaf. Factors that depend on the row
or the column alone stay thin (one of their matrix axes has length one): neither the network nor the mean square of a
channel needs them at full size. The training fraction is no product at all, but a part of the network's bias (see
`training_fraction.py`). To add a feature, add a row of `FEATURES`, and name it in a `RuleConfig`.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from celo2_harness.rule.accumulators import Moments, clip
from celo2_harness.rule.config import RuleConfig
from celo2_harness.rule.padding import mean_over
from celo2_harness.rule.view import MatrixView

ROOT_FLOOR = 1e-9  # under the inverse roots of factored moments
RMS_FLOOR = 1e-8  # under the inverse root of the second moment
GRADIENT_FEATURE_CLIP = 0.1

Planes = tuple[Float[Array, "..."], ...]  # one array per decay


class InverseRoot(NamedTuple):
    """The factor 1 / sqrt(of + floor); its square needs no root, which a loop over all parameters feels."""

    of: Float[Array, "..."]
    floor: float


Factor = Float[Array, "..."] | InverseRoot
Channel = tuple[Factor, ...]


def value(factor: Factor) -> Float[Array, "..."]:
    """The factor as an array."""
    return jax.lax.rsqrt(factor.of + factor.floor) if isinstance(factor, InverseRoot) else factor


def square(factor: Factor) -> Float[Array, "..."]:
    """The square of the factor."""
    return 1.0 / (factor.of + factor.floor) if isinstance(factor, InverseRoot) else jnp.square(factor)


def product(factors: Sequence[Factor]) -> Float[Array, "..."]:
    """The product of factors."""
    return functools.reduce(operator.mul, map(value, factors))


class LeafStatistics(NamedTuple):
    """The inputs of features: one leaf in its view, float32, accumulators after this step's gradient.

    `row` and `col` keep the lost axis with length one; of vectors both are the diagonal. `factored_inverse_rms` holds
    per decay the factors (R_k, C_k) of matrices, (1 / sqrt(diag_k + 1e-9),) of vectors.
    """

    gradient: Float[Array, "..."]
    parameter: Float[Array, "..."]
    momentum: Planes
    second_moment: Float[Array, "..."]
    inverse_rms: InverseRoot
    row: Planes
    col: Planes
    factored_inverse_rms: tuple[Channel, ...]


class Feature(NamedTuple):
    """One named group: how many channels it has, whether vectors have it, how it is computed."""

    channels: Callable[[RuleConfig], int]
    for_vectors: bool
    compute: Callable[[LeafStatistics], tuple[Channel, ...]]


def _one(config: RuleConfig) -> int:
    del config
    return 1


def _per_momentum(config: RuleConfig) -> int:
    return len(config.momentum_decays)


def _per_factored(config: RuleConfig) -> int:
    return len(config.factored_decays)


def _inverse_root(x: jax.Array) -> jax.Array:
    return 1.0 / jnp.sqrt(x + RMS_FLOOR)


def _single(planes: Planes) -> tuple[Channel, ...]:
    return tuple((x,) for x in planes)


FEATURES: dict[str, Feature] = {
    "gradient": Feature(_one, True, lambda s: ((s.gradient,),)),
    "clipped_gradient": Feature(_one, True, lambda s: ((clip(s.gradient, GRADIENT_FEATURE_CLIP),),)),
    "parameter": Feature(_one, True, lambda s: ((s.parameter,),)),
    "momentum": Feature(_per_momentum, True, lambda s: _single(s.momentum)),
    "second_moment": Feature(_one, True, lambda s: ((s.second_moment,),)),
    "momentum_over_rms": Feature(_per_momentum, True, lambda s: tuple((m, s.inverse_rms) for m in s.momentum)),
    "inverse_rms": Feature(_one, True, lambda s: ((s.inverse_rms,),)),
    "factored_gradient": Feature(
        _per_factored, True, lambda s: tuple((s.gradient, *factors) for factors in s.factored_inverse_rms)
    ),
    "gradient_over_rms": Feature(_one, True, lambda s: ((s.gradient, s.inverse_rms),)),
    "row_moment": Feature(_per_factored, False, lambda s: _single(s.row)),
    "column_moment": Feature(_per_factored, False, lambda s: _single(s.col)),
    "inverse_row_rms": Feature(_per_factored, False, lambda s: _single(tuple(map(_inverse_root, s.row)))),
    "inverse_column_rms": Feature(_per_factored, False, lambda s: _single(tuple(map(_inverse_root, s.col)))),
    "factored_momentum": Feature(
        _per_momentum,
        False,
        lambda s: tuple((m, *factors) for m, factors in zip(s.momentum, s.factored_inverse_rms, strict=True)),
    ),
    # The same for all parameters: `at_training_fraction` makes it a part of the bias.
    "training_fraction": Feature(_one, True, lambda s: ()),
}


def channel_counts(config: RuleConfig) -> tuple[int, ...]:
    """Channels of each feature group, in order; their sum is the number of rows of `w0`."""
    return tuple(FEATURES[name].channels(config) for name in config.features)


def leaf_statistics(
    view: MatrixView,
    gradient: Float[Array, "*leaf"],
    parameter: Float[Array, "*leaf"],
    moments: Moments,
    rms_floor: float = RMS_FLOOR,
    lengths: np.ndarray | None = None,
) -> LeafStatistics:
    """Gathers what features read, with factored inverse roots computed at thin size.

    Args:
        view: The leaf's view.
        gradient: The clipped gradient.
        parameter: The leaf before the step.
        moments: The accumulators after the gradient.
        rms_floor: Added to the second moment under its root.
        lengths: The true lengths of padded matrices (see `mean_over`).

    Returns:
        The statistics, in the leaf's view.
    """
    nu = view.apply(moments.nu)
    if view.factored is not None:
        assert moments.row is not None and moments.col is not None
        d1, d0 = view.factored
        row = tuple(jnp.expand_dims(r, d0) for r in moments.row)
        col = tuple(jnp.expand_dims(c, d1) for c in moments.col)
        factored = factored_inverse_rms(row, col, [mean_over(r, (d1 - nu.ndim,), lengths) for r in row])
    else:
        assert moments.diag is not None
        row = col = tuple(map(view.apply, moments.diag))
        factored = tuple((InverseRoot(d, ROOT_FLOOR),) for d in row)
    return LeafStatistics(
        gradient=view.apply(gradient),
        parameter=view.apply(parameter.astype(jnp.float32)),
        momentum=tuple(view.apply(m) for m in moments.mu),
        second_moment=nu,
        inverse_rms=InverseRoot(nu, rms_floor),
        row=row,
        col=col,
        factored_inverse_rms=factored,
    )


def factored_inverse_rms(row: Planes, col: Planes, means: Sequence[Float[Array, "..."]]) -> tuple[Channel, ...]:
    """The factors (R_k, C_k) of matrices.

    Args:
        row: Per decay the row moments, with the lost axis of length one.
        col: The column moments likewise.
        means: The means of the row moments over each matrix.
    """
    root = lambda x: jax.lax.rsqrt(jnp.maximum(x, ROOT_FLOOR))
    return tuple((root(r / (mean + ROOT_FLOOR)), root(c)) for r, c, mean in zip(row, col, means, strict=True))
