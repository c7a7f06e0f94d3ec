"""Weight files of the learned rule: the bundled ones with their cards, reading and writing."""

from celo2_harness.weights.weights_file import Weights as Weights
from celo2_harness.weights.weights_file import WeightsError as WeightsError
from celo2_harness.weights.weights_file import bundled_weights as bundled_weights
from celo2_harness.weights.weights_file import load_weights as load_weights
from celo2_harness.weights.weights_file import save_weights as save_weights
