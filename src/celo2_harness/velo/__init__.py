"""Other learned rules under the same interface."""

from celo2_harness.velo.block import VeloState as VeloState, velo as velo
from celo2_harness.velo.config import (
    VELO as VELO,
    VELO_S as VELO_S,
    VeloConfig as VeloConfig,
    VeloTheta as VeloTheta,
    init_theta as init_theta,
)
from celo2_harness.velo.loss import LossBuffer as LossBuffer
from celo2_harness.velo.weights_file import (
    VeloWeights as VeloWeights,
    load_velo_weights as load_velo_weights,
    save_velo_weights as save_velo_weights,
)
