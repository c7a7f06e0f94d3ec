"""What an optimizer step costs: time, temporaries, state, compilation, and its share of a mesh."""

from celo2_harness.lab.bench.measure import (
    GRADIENT as GRADIENT,
    NewtonSchulzCost as NewtonSchulzCost,
    StepCost as StepCost,
    interleave as interleave,
    measure_newton_schulz as measure_newton_schulz,
    measure_training as measure_training,
    measure_updates as measure_updates,
    median_ratio as median_ratio,
)
from celo2_harness.lab.bench.models import MODEL_SHAPES as MODEL_SHAPES
from celo2_harness.lab.bench.plan import (
    ORTHOGONAL as ORTHOGONAL,
    Collective as Collective,
    Estimate as Estimate,
    Plan as Plan,
    estimate_update as estimate_update,
    find_collectives as find_collectives,
    plan_update as plan_update,
)
