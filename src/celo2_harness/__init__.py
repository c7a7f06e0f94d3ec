"""Celo2, a learned optimizer, and the harness around it, as Optax building blocks.

import celo2_harness
tx = celo2_harness.build(preset="celo2_ortho", learning_rate=1e-3, total_steps=10_000)
"""

# First, because it may install an import hook for all that follows.
from celo2_harness._type_checks import enable_type_checks as enable_type_checks

# isort: split
from celo2_harness import harness as harness
from celo2_harness import plugins as plugins
from celo2_harness import schedules as schedules
from celo2_harness._version import __version__ as __version__
from celo2_harness.blocks import (
    Celo2State as Celo2State,
)
from celo2_harness.blocks import (
    GuardState as GuardState,
)
from celo2_harness.blocks import (
    NormalizeRmsState as NormalizeRmsState,
)
from celo2_harness.blocks import (
    add_decayed_weights as add_decayed_weights,
)
from celo2_harness.blocks import (
    average_tail as average_tail,
)
from celo2_harness.blocks import (
    averaged_params as averaged_params,
)
from celo2_harness.blocks import (
    celo2_direction as celo2_direction,
)
from celo2_harness.blocks import (
    control_norm as control_norm,
)
from celo2_harness.blocks import (
    guard_updates as guard_updates,
)
from celo2_harness.blocks import (
    in_eigenbasis as in_eigenbasis,
)
from celo2_harness.blocks import (
    look_ahead as look_ahead,
)
from celo2_harness.blocks import (
    mix_momenta as mix_momenta,
)
from celo2_harness.blocks import (
    normalize_rms as normalize_rms,
)
from celo2_harness.blocks import (
    orthogonalize as orthogonalize,
)
from celo2_harness.blocks import (
    scale_by_celo2 as scale_by_celo2,
)
from celo2_harness.blocks import (
    scale_by_shape as scale_by_shape,
)
from celo2_harness.harness import build as build
from celo2_harness.harness import describe as describe
from celo2_harness.routing import Rule as Rule
from celo2_harness.routing import label_params as label_params
from celo2_harness.routing import route as route
from celo2_harness.rule import (
    RuleConfig as RuleConfig,
)
from celo2_harness.rule import (
    Theta as Theta,
)
from celo2_harness.rule import (
    newton_schulz as newton_schulz,
)
from celo2_harness.weights import Weights as Weights
from celo2_harness.weights import WeightsError as WeightsError
from celo2_harness.weights import bundled_weights as bundled_weights
from celo2_harness.weights import load_weights as load_weights
from celo2_harness.weights import save_weights as save_weights
