"""Fair comparisons of optimizers: suites, the records of their runs, and reports of them."""

from celo2_harness.lab.suites.optimizers import (
    OPTIMIZERS as OPTIMIZERS,
    OptimizerRow as OptimizerRow,
    make_imported as make_imported,
    make_optax as make_optax,
    make_spec as make_spec,
)
from celo2_harness.lab.suites.plan import (
    Run as Run,
    Trial as Trial,
    best_trial as best_trial,
    grids as grids,
    plan as plan,
    total_steps as total_steps,
)
from celo2_harness.lab.suites.record import Record as Record, read_records as read_records
from celo2_harness.lab.suites.results import Row as Row, TaskResults as TaskResults, results_by_task as results_by_task
from celo2_harness.lab.suites.returns import ReturnCurve as ReturnCurve, return_curves as return_curves
from celo2_harness.lab.suites.runner import SuiteState as SuiteState, run_suite as run_suite
from celo2_harness.lab.suites.suite import (
    Search as Search,
    Suite as Suite,
    SuiteOptimizer as SuiteOptimizer,
    SuiteTask as SuiteTask,
    load_suite as load_suite,
    suites as suites,
)
