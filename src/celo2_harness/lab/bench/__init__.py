"""What an optimizer step costs: time, temporaries, state, compilation."""

from celo2_harness.lab.bench.collectives import Collective, find_collectives
from celo2_harness.lab.bench.estimate import ORTHOGONAL, Estimate, estimate_update
from celo2_harness.lab.bench.models import MODEL_SHAPES
from celo2_harness.lab.bench.newton_schulz import NewtonSchulzCost, measure_newton_schulz
from celo2_harness.lab.bench.plan import Plan, plan_update
from celo2_harness.lab.bench.step import StepCost, measure_updates
from celo2_harness.lab.bench.timing import interleave, median_ratio
from celo2_harness.lab.bench.training import GRADIENT, measure_training

__all__ = [
    "GRADIENT",
    "MODEL_SHAPES",
    "ORTHOGONAL",
    "Collective",
    "Estimate",
    "NewtonSchulzCost",
    "Plan",
    "StepCost",
    "estimate_update",
    "find_collectives",
    "interleave",
    "measure_newton_schulz",
    "measure_training",
    "measure_updates",
    "median_ratio",
    "plan_update",
]
