"""Scaling of orthogonalised matrices by their shape, so that one learning rate serves all shapes."""

import jax
import optax

from celo2_harness.blocks.views import WeightDimensionNumbers, map_matrices, matrix_views
from celo2_harness.rule import MatrixView


def scale_by_shape(
    rms: float | int = 0.2, *, weight_dimension_numbers: WeightDimensionNumbers = None
) -> optax.GradientTransformation:
    """Multiplies every matrix by rms sqrt(max(rows, columns)); vectors pass through.

    A semi-orthogonal matrix then has root mean square `rms`. 0.2 is about AdamW's, which lets Muon share its learning
    rate.

    Args:
        rms: The root mean square wanted.
        weight_dimension_numbers: How leaves are seen as matrices (see `celo2_direction`).

    Returns:
        A stateless `optax.GradientTransformation`; updates keep their dtype.

    Raises:
        ValueError: If a view does not fit its leaf, in `update`.

    Example:
        >>> tx = scale_by_shape(0.5)
        >>> tx.update({"w": jax.numpy.ones((2, 4))}, tx.init({}))[0]["w"][0].tolist()
        [1.0, 1.0, 1.0, 1.0]

    References:
        arXiv 2502.16982, section 2.2.
    """

    def scaled(view: MatrixView, x: jax.Array) -> jax.Array:
        return x * (rms * max(view.viewed[-2:]) ** 0.5) if view.is_matrix else x

    return optax.stateless(
        lambda updates, params: map_matrices(scaled, matrix_views(updates, weight_dimension_numbers), updates)
    )
