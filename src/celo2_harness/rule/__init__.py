"""The learned rule as pure functions of arrays; knows nothing of Optax."""

from celo2_harness.rule.accumulators import Moments as Moments
from celo2_harness.rule.accumulators import init_moments as init_moments
from celo2_harness.rule.accumulators import resolve_state_dtype as resolve_state_dtype
from celo2_harness.rule.batches import Batch as Batch
from celo2_harness.rule.batches import plan_batches as plan_batches
from celo2_harness.rule.batches import stackable as stackable
from celo2_harness.rule.config import CELO2_CONFIG as CELO2_CONFIG
from celo2_harness.rule.config import Normalization as Normalization
from celo2_harness.rule.config import RuleConfig as RuleConfig
from celo2_harness.rule.config import Theta as Theta
from celo2_harness.rule.direction import KERNELS as KERNELS
from celo2_harness.rule.direction import LeafResult as LeafResult
from celo2_harness.rule.direction import batch_direction as batch_direction
from celo2_harness.rule.direction import leaf_direction as leaf_direction
from celo2_harness.rule.direction import resolve_kernel as resolve_kernel
from celo2_harness.rule.features import FEATURES as FEATURES
from celo2_harness.rule.features import Feature as Feature
from celo2_harness.rule.features import channel_counts as channel_counts
from celo2_harness.rule.newton_schulz import COEFFICIENTS as COEFFICIENTS
from celo2_harness.rule.newton_schulz import newton_schulz as newton_schulz
from celo2_harness.rule.rms import init_mean_square as init_mean_square
from celo2_harness.rule.rms import rms_divisor as rms_divisor
from celo2_harness.rule.view import (
    MatrixView as MatrixView,
)
from celo2_harness.rule.view import (
    default_view as default_view,
)
from celo2_harness.rule.view import (
    view_from_axes as view_from_axes,
)
