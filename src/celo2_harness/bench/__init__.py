"""What an optimizer step costs: time, temporaries, state, compilation."""

from celo2_harness.bench.models import MODEL_SHAPES
from celo2_harness.bench.newton_schulz import NewtonSchulzCost, measure_newton_schulz
from celo2_harness.bench.step import StepCost, measure_updates
from celo2_harness.bench.timing import interleave, median_ratio

__all__ = [
    "MODEL_SHAPES",
    "NewtonSchulzCost",
    "StepCost",
    "interleave",
    "measure_newton_schulz",
    "measure_updates",
    "median_ratio",
]
