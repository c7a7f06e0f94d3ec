"""The learned rule's update as one transformation: direction, orthogonalisation, normalisation."""

from typing import Any

import optax

from celo2_harness.blocks.direction import celo2_direction
from celo2_harness.blocks.orthogonalize import orthogonalize as orthogonalize_block
from celo2_harness.blocks.rms import Mode, normalize_rms
from celo2_harness.blocks.views import LeafShardings, WeightDimensionNumbers
from celo2_harness.weights import Weights, load_weights


def scale_by_celo2(
    weights: Weights | str = "celo2",
    orthogonalize: bool = False,
    *,
    normalization: Mode | None = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    state_dtype: Any = "float32",
    kernel: str = "auto",
    precision: Any = None,
    sharding: LeafShardings = None,
    total_steps: int | None = None,
) -> optax.GradientTransformation:
    """`celo2_direction`, then (if asked) `orthogonalize`, then `normalize_rms`: the published scale_by_celo2.

    Args:
        weights: `Weights`, or what `load_weights` takes.
        orthogonalize: Whether matrices go through Newton-Schulz.
        normalization: Mode of `normalize_rms`; None takes the one that the weights were trained with.
        weight_dimension_numbers: How leaves are seen as matrices (see `celo2_direction`).
        state_dtype: The dtype of momenta and second moment.
        kernel: How the learned rule is computed (see `celo2_direction`).
        precision: The precision of the products of Newton-Schulz (see `orthogonalize`).
        sharding: How the updates lie on a mesh (see `orthogonalize`).
        total_steps: The length of the run, for weights that see the training fraction (see `celo2_direction`).

    Returns:
        An `optax.GradientTransformation`; the update has RMS one per matrix, to be scaled by the learning rate.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = optax.chain(scale_by_celo2("celo2", orthogonalize=True), optax.scale_by_learning_rate(1e-3))
        >>> params = {"w": jnp.ones((4, 8))}
        >>> updates, _ = tx.update({"w": jnp.arange(32.0).reshape(4, 8)}, tx.init(params), params)
        >>> round(float(jnp.sqrt(jnp.mean(updates["w"] ** 2))), 6)
        0.001

    References:
        arXiv 2602.19142, section 4.
    """
    weights = load_weights(weights, kind=Weights)
    views = weight_dimension_numbers
    blocks = [
        celo2_direction(
            weights,
            weight_dimension_numbers=views,
            state_dtype=state_dtype,
            kernel=kernel,
            sharding=sharding,
            total_steps=total_steps,
        )
    ]
    if orthogonalize:
        blocks.append(orthogonalize_block(weight_dimension_numbers=views, precision=precision, sharding=sharding))
    mode: Any = weights.config.normalization if normalization is None else normalization
    return optax.chain(*blocks, normalize_rms(mode, weight_dimension_numbers=views, sharding=sharding))
