"""What a learned rule was trained with: features, decays and floors, kept apart from its numbers."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

CELO2_FEATURES = (
    "gradient",
    "clipped_gradient",
    "parameter",
    "momentum",
    "second_moment",
    "momentum_over_rms",
    "inverse_rms",
    "factored_gradient",
    "gradient_over_rms",
    "row_moment",
    "column_moment",
    "inverse_row_rms",
    "inverse_column_rms",
    "factored_momentum",
)


# How updates may be scaled; the modes of `normalize_rms`.
Normalization = Literal["per_step", "rolling", "clip", "none"]


class Theta(NamedTuple):
    """The numbers of the network: three affine layers, 347 numbers at the published size.

    `w0` has one row per feature channel, in the order of `RuleConfig.features`.
    """

    w0: Float[jax.Array | np.ndarray, "channels hidden"]
    b0: Float[jax.Array | np.ndarray, " hidden"]
    w1: Float[jax.Array | np.ndarray, "hidden hidden"]
    b1: Float[jax.Array | np.ndarray, " hidden"]
    w2: Float[jax.Array | np.ndarray, "hidden outputs"]
    b2: Float[jax.Array | np.ndarray, " outputs"]


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """The configuration that a theta belongs to; a theta under another configuration is another rule.

    Attributes:
        features: Names of the feature groups, in the order of the rows of `w0`. A rule with "training_fraction" needs
            the length of the run.
        momentum_decays: Decays of the momentum accumulators.
        second_moment_decay: Decay of the elementwise second moment.
        factored_decays: Decays of the row, column and diagonal second moments.
        normalization: How the update is scaled in the inner loop of meta-training (see `normalize_rms`).
    """

    features: tuple[str, ...] = CELO2_FEATURES
    momentum_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    second_moment_decay: float = 0.95
    factored_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    normalization: Normalization = "per_step"


CELO2_CONFIG = RuleConfig()
