"""Fair comparisons of optimizers: suites, the records of their runs, and reports of them."""

from celo2_harness.lab.suites.optimizers import OPTIMIZERS as OPTIMIZERS
from celo2_harness.lab.suites.optimizers import OptimizerRow as OptimizerRow
from celo2_harness.lab.suites.optimizers import make_imported as make_imported
from celo2_harness.lab.suites.optimizers import make_optax as make_optax
from celo2_harness.lab.suites.optimizers import make_spec as make_spec
from celo2_harness.lab.suites.plan import Run as Run
from celo2_harness.lab.suites.plan import Trial as Trial
from celo2_harness.lab.suites.plan import best_trial as best_trial
from celo2_harness.lab.suites.plan import grids as grids
from celo2_harness.lab.suites.plan import plan as plan
from celo2_harness.lab.suites.plan import total_steps as total_steps
from celo2_harness.lab.suites.record import Record as Record
from celo2_harness.lab.suites.record import read_records as read_records
from celo2_harness.lab.suites.results import Row as Row
from celo2_harness.lab.suites.results import TaskResults as TaskResults
from celo2_harness.lab.suites.results import results_by_task as results_by_task
from celo2_harness.lab.suites.returns import ReturnCurve as ReturnCurve
from celo2_harness.lab.suites.returns import return_curves as return_curves
from celo2_harness.lab.suites.runner import SuiteState as SuiteState
from celo2_harness.lab.suites.runner import run_suite as run_suite
from celo2_harness.lab.suites.suite import Search as Search
from celo2_harness.lab.suites.suite import Suite as Suite
from celo2_harness.lab.suites.suite import SuiteOptimizer as SuiteOptimizer
from celo2_harness.lab.suites.suite import SuiteTask as SuiteTask
from celo2_harness.lab.suites.suite import load_suite as load_suite
from celo2_harness.lab.suites.suite import suites as suites
