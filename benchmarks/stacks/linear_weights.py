"""Writes the searched rule of `table.py` as the weight file that the package ships.

Usage: python -m benchmarks.stacks.linear_weights celo2_linear.celo2

Two things differ from the row "searched rule". The momentum of decay 0.999 is left out: its weight is so small that it
was worth nothing, and it costs as much state as the others. The floor of the second moment, 5.9e-10 in the search, is
relative to the mean over the matrix, so that the unit of the loss does not matter. In a run of `nano-64` on this
project's text (400 steps) the mean second moment of a matrix was 1.1e-6 to 3.2e-6 in the median, at every step that was
looked at after the first five, of which the searched floor is 1.8e-4 to 5.6e-4.
"""

import sys

import numpy as np

from benchmarks.stacks.table import SEARCHED_RULE
from celo2_harness import LinearConfig, LinearTheta, LinearWeights, save_weights

KEPT = (1, 2)
DECAYS = (0.9, 0.99)
RELATIVE_FLOOR = 3e-4
PROVENANCE = {
    "made_by": "CMA-ES of twelve numbers, 24 generations of 36 rules on two texts",
    "command": "python -m benchmarks.stacks TEXT TEXT --models nano-64 --search-seconds SECONDS",
    "generations": "meta-training/linear/search.jsonl",
    "commit": "a4b281d",
    "task": "byte GPT of width 64 (nano-64), 1,000 steps",
    "texts": ["Debian's perl-doc", "tiny-Shakespeare"],
    "judged_by": "held-out loss at the end of the run",
    "stack": "in_eigenbasis(mode='act'), Newton-Schulz, RMS one per matrix; AdamW for the rest",
    "left_out": "the momentum of decay 0.999 (weight 0.00117, slope 1.66)",
    "floor": "5.9e-10 in the search, here relative to the mean of the second moment",
}


def searched_weights() -> LinearWeights:
    """The searched rule without its slowest momentum."""
    weights = [SEARCHED_RULE["gradient"], *(SEARCHED_RULE[f"weight_{k}"] for k in KEPT)]
    slopes = [0.0, *(SEARCHED_RULE[f"slope_{k}"] for k in KEPT)]
    config = LinearConfig(DECAYS, SEARCHED_RULE["second_decay"], SEARCHED_RULE["whitening"], RELATIVE_FLOOR)
    return LinearWeights(LinearTheta(np.array(weights, np.float32), np.array(slopes, np.float32)), config, PROVENANCE)


if __name__ == "__main__":
    save_weights(sys.argv[1], searched_weights())
