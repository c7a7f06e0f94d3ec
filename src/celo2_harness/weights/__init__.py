"""Weight files of learned rules: the bundled ones with their cards, reading and writing."""

from celo2_harness.weights.linear_file import LinearWeights as LinearWeights
from celo2_harness.weights.weights_file import (
    Weights as Weights,
    WeightsError as WeightsError,
    bundled_weights as bundled_weights,
    load_weights as load_weights,
    save_weights as save_weights,
)
