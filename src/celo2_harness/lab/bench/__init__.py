"""What an optimizer step costs: time, temporaries, state, compilation, and its share of a mesh."""

from celo2_harness.lab.bench.measure import GRADIENT as GRADIENT
from celo2_harness.lab.bench.measure import NewtonSchulzCost as NewtonSchulzCost
from celo2_harness.lab.bench.measure import StepCost as StepCost
from celo2_harness.lab.bench.measure import interleave as interleave
from celo2_harness.lab.bench.measure import measure_newton_schulz as measure_newton_schulz
from celo2_harness.lab.bench.measure import measure_training as measure_training
from celo2_harness.lab.bench.measure import measure_updates as measure_updates
from celo2_harness.lab.bench.measure import median_ratio as median_ratio
from celo2_harness.lab.bench.models import MODEL_SHAPES as MODEL_SHAPES
from celo2_harness.lab.bench.plan import ORTHOGONAL as ORTHOGONAL
from celo2_harness.lab.bench.plan import Collective as Collective
from celo2_harness.lab.bench.plan import Estimate as Estimate
from celo2_harness.lab.bench.plan import Plan as Plan
from celo2_harness.lab.bench.plan import estimate_update as estimate_update
from celo2_harness.lab.bench.plan import find_collectives as find_collectives
from celo2_harness.lab.bench.plan import plan_update as plan_update
