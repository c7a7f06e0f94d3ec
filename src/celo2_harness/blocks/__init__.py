"""Building blocks: each file one Optax transformation."""

from celo2_harness.blocks.average_tail import (
    AverageTailState as AverageTailState,
    average_tail as average_tail,
    averaged_params as averaged_params,
)
from celo2_harness.blocks.celo2 import scale_by_celo2 as scale_by_celo2
from celo2_harness.blocks.control_norm import ControlNormState as ControlNormState, control_norm as control_norm
from celo2_harness.blocks.decay import add_decayed_weights as add_decayed_weights
from celo2_harness.blocks.direction import Celo2State as Celo2State, celo2_direction as celo2_direction
from celo2_harness.blocks.guard import GuardState as GuardState, guard_updates as guard_updates
from celo2_harness.blocks.in_eigenbasis import EigenbasisState as EigenbasisState, in_eigenbasis as in_eigenbasis
from celo2_harness.blocks.linear_direction import LinearState as LinearState, linear_direction as linear_direction
from celo2_harness.blocks.look_ahead import LookAheadState as LookAheadState, look_ahead as look_ahead
from celo2_harness.blocks.mix_momenta import MixMomentaState as MixMomentaState, mix_momenta as mix_momenta
from celo2_harness.blocks.orthogonalize import orthogonalize as orthogonalize
from celo2_harness.blocks.rms import NormalizeRmsState as NormalizeRmsState, normalize_rms as normalize_rms
from celo2_harness.blocks.shape import scale_by_shape as scale_by_shape
from celo2_harness.blocks.width import scale_by_width as scale_by_width
