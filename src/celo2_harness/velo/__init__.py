"""Other learned rules under the same interface."""

from celo2_harness.velo.block import VeloState as VeloState
from celo2_harness.velo.block import velo as velo
from celo2_harness.velo.config import VELO as VELO
from celo2_harness.velo.config import VELO_S as VELO_S
from celo2_harness.velo.config import VeloConfig as VeloConfig
from celo2_harness.velo.config import VeloTheta as VeloTheta
from celo2_harness.velo.config import init_theta as init_theta
from celo2_harness.velo.loss import LossBuffer as LossBuffer
from celo2_harness.velo.weights_file import VeloWeights as VeloWeights
from celo2_harness.velo.weights_file import load_velo_weights as load_velo_weights
from celo2_harness.velo.weights_file import save_velo_weights as save_velo_weights
