"""Scaling of normalised updates by the number of inputs of their matrix: one learning rate from width to width."""

import jax
import optax

from celo2_harness.blocks.views import WeightDimensionNumbers, map_matrices, matrix_views
from celo2_harness.rule import MatrixView


def scale_by_width(
    width: float | int = 128, power: float | int = 0.5, *, weight_dimension_numbers: WeightDimensionNumbers = None
) -> optax.GradientTransformation:
    """Multiplies every matrix by (width / inputs)^power; vectors pass through.

    Weights usually begin with a root mean square of one over the root of their number of inputs. After
    `normalize_rms` and with a power of a half, a step is the same part of them in matrices of all sizes. Among matrices
    that are orthogonalised these are the steps of Muon with a factor sqrt(max(1, outputs / inputs)). The taps of a
    convolution (a view with three or more input axes) are no inputs of their own: it wants longer steps.

    Args:
        width: The number of inputs at which nothing changes.
        power: How fast steps shrink with the number of inputs.
        weight_dimension_numbers: How leaves are seen as matrices, and which axes are the inputs (see
            `celo2_direction`). None: the last axis but one.

    Returns:
        A stateless `optax.GradientTransformation`; updates keep their dtype.

    Raises:
        ValueError: If a view does not fit its leaf, in `update`.

    Example:
        >>> tx = scale_by_width(4)
        >>> tx.update({"w": jax.numpy.ones((16, 3))}, tx.init({}))[0]["w"][0].tolist()
        [0.5, 0.5, 0.5]

    References:
        The initialisation of LeCun et al., "Efficient BackProp" (1998); the factor of Muon's first implementation,
        github.com/KellerJordan/Muon.
    """

    def scaled(view: MatrixView, x: jax.Array) -> jax.Array:
        return x * (width / view.inputs) ** power if view.is_matrix else x

    return optax.stateless(
        lambda updates, params: map_matrices(scaled, matrix_views(updates, weight_dimension_numbers), updates)
    )
