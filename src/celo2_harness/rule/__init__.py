"""The learned rule as pure functions of arrays; knows nothing of Optax."""

from celo2_harness.rule.accumulators import (
    Moments as Moments,
    init_moments as init_moments,
    resolve_state_dtype as resolve_state_dtype,
)
from celo2_harness.rule.batches import (
    Batch as Batch,
    plan_batches as plan_batches,
    single_batch as single_batch,
    stackable as stackable,
)
from celo2_harness.rule.config import (
    CELO2_CONFIG as CELO2_CONFIG,
    Normalization as Normalization,
    RuleConfig as RuleConfig,
    Theta as Theta,
)
from celo2_harness.rule.direction import (
    KERNELS as KERNELS,
    LeafResult as LeafResult,
    batch_direction as batch_direction,
    kernel_here as kernel_here,
    leaf_direction as leaf_direction,
    resolve_kernel as resolve_kernel,
)
from celo2_harness.rule.features import FEATURES as FEATURES, Feature as Feature, channel_counts as channel_counts
from celo2_harness.rule.linear import (
    LinearConfig as LinearConfig,
    LinearTheta as LinearTheta,
    linear_leaf_direction as linear_leaf_direction,
)
from celo2_harness.rule.newton_schulz import (
    COEFFICIENTS as COEFFICIENTS,
    newton_schulz as newton_schulz,
    usual_precision as usual_precision,
)
from celo2_harness.rule.rms import (
    init_mean_square as init_mean_square,
    matrix_mean_square as matrix_mean_square,
    rms_divisor as rms_divisor,
    rolling_mean_square as rolling_mean_square,
)
from celo2_harness.rule.training_fraction import (
    at_training_fraction as at_training_fraction,
    sees_training_fraction as sees_training_fraction,
)
from celo2_harness.rule.view import (
    MatrixView as MatrixView,
    default_view as default_view,
    view_from_axes as view_from_axes,
)
