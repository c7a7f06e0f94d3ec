"""Scaling of normalised updates by the size of their matrix: one learning rate from width to width."""

import math

import jax
import optax

from celo2_harness.blocks.views import WeightDimensionNumbers, map_matrices, matrix_views
from celo2_harness.rule import MatrixView


def scale_by_width(
    width: float | int = 128, power: float | int = 1.0, *, weight_dimension_numbers: WeightDimensionNumbers = None
) -> optax.GradientTransformation:
    """Multiplies every matrix by (width / sqrt(rows columns))^power; vectors pass through.

    After `normalize_rms` and with a power of one, the steps of all matrices have one Frobenius norm, whatever their
    size: the root mean square falls as one over the width. A power of zero leaves it the same for all sizes.

    Args:
        width: The square root of rows times columns at which nothing changes.
        power: How fast steps shrink with the size.
        weight_dimension_numbers: How leaves are seen as matrices (see `celo2_direction`).

    Returns:
        A stateless `optax.GradientTransformation`; updates keep their dtype.

    Raises:
        ValueError: If a view does not fit its leaf, in `update`.

    Example:
        >>> tx = scale_by_width(4)
        >>> tx.update({"w": jax.numpy.ones((2, 32))}, tx.init({}))[0]["w"][0, :2].tolist()
        [0.5, 0.5]
    """

    def scaled(view: MatrixView, x: jax.Array) -> jax.Array:
        return x * (width / math.prod(view.viewed[-2:]) ** 0.5) ** power if view.is_matrix else x

    return optax.stateless(
        lambda updates, params: map_matrices(scaled, matrix_views(updates, weight_dimension_numbers), updates)
    )
