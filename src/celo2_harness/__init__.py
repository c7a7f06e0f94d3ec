"""Celo2, a learned optimizer, and the harness around it, as Optax building blocks.

import celo2_harness
tx = celo2_harness.build(total_steps=10_000)
"""

from celo2_harness import harness as harness, plugins as plugins, schedules as schedules
from celo2_harness._version import __version__ as __version__
from celo2_harness.blocks import (
    Celo2State as Celo2State,
    GuardState as GuardState,
    NormalizeRmsState as NormalizeRmsState,
    add_decayed_weights as add_decayed_weights,
    average_tail as average_tail,
    averaged_params as averaged_params,
    celo2_direction as celo2_direction,
    control_norm as control_norm,
    guard_updates as guard_updates,
    in_eigenbasis as in_eigenbasis,
    linear_direction as linear_direction,
    look_ahead as look_ahead,
    mix_momenta as mix_momenta,
    normalize_rms as normalize_rms,
    orthogonalize as orthogonalize,
    scale_by_celo2 as scale_by_celo2,
    scale_by_shape as scale_by_shape,
    scale_by_width as scale_by_width,
)
from celo2_harness.harness import AdamW as AdamW, build as build, describe as describe
from celo2_harness.routing import Rule as Rule, label_params as label_params, route as route
from celo2_harness.rule import (
    LinearConfig as LinearConfig,
    LinearTheta as LinearTheta,
    RuleConfig as RuleConfig,
    Theta as Theta,
    newton_schulz as newton_schulz,
)
from celo2_harness.weights import (
    LinearWeights as LinearWeights,
    Weights as Weights,
    WeightsError as WeightsError,
    bundled_weights as bundled_weights,
    load_weights as load_weights,
    save_weights as save_weights,
)
