"""Learning the rule: small image tasks inside, evolution strategies outside."""

from celo2_harness.metatrain.checkpoints import Portable as Portable
from celo2_harness.metatrain.checkpoints import load_portable as load_portable
from celo2_harness.metatrain.config import MetaTrainConfig as MetaTrainConfig
from celo2_harness.metatrain.errors import RunError as RunError
from celo2_harness.metatrain.evaluations import Evaluation as Evaluation
from celo2_harness.metatrain.evaluations import read_evaluations as read_evaluations
from celo2_harness.metatrain.evaluations import select_weights as select_weights
from celo2_harness.metatrain.groups import InnerData as InnerData
from celo2_harness.metatrain.outer import MetaTrainState as MetaTrainState
from celo2_harness.metatrain.outer import init_metatrain as init_metatrain
from celo2_harness.metatrain.outer import metatrain_step as metatrain_step
from celo2_harness.metatrain.outer import place_data as place_data
from celo2_harness.metatrain.outer import place_state as place_state
from celo2_harness.metatrain.problem import InnerProblem as InnerProblem
from celo2_harness.metatrain.problem import TaskGroup as TaskGroup
from celo2_harness.metatrain.run import SavedRun as SavedRun
from celo2_harness.metatrain.run import run_metatrain as run_metatrain
from celo2_harness.metatrain.run import saved_run as saved_run
from celo2_harness.metatrain.tasks import task_mesh as task_mesh
