"""Learning the rule: small image tasks inside, evolution strategies outside."""

from celo2_harness.lab.metatrain.checkpoints import Portable as Portable
from celo2_harness.lab.metatrain.checkpoints import load_portable as load_portable
from celo2_harness.lab.metatrain.config import MetaTrainConfig as MetaTrainConfig
from celo2_harness.lab.metatrain.errors import RunError as RunError
from celo2_harness.lab.metatrain.evaluations import Evaluation as Evaluation
from celo2_harness.lab.metatrain.evaluations import read_evaluations as read_evaluations
from celo2_harness.lab.metatrain.evaluations import select_weights as select_weights
from celo2_harness.lab.metatrain.groups import InnerData as InnerData
from celo2_harness.lab.metatrain.outer import MetaTrainState as MetaTrainState
from celo2_harness.lab.metatrain.outer import init_metatrain as init_metatrain
from celo2_harness.lab.metatrain.outer import metatrain_step as metatrain_step
from celo2_harness.lab.metatrain.outer import place_data as place_data
from celo2_harness.lab.metatrain.outer import place_state as place_state
from celo2_harness.lab.metatrain.problem import InnerProblem as InnerProblem
from celo2_harness.lab.metatrain.problem import TaskGroup as TaskGroup
from celo2_harness.lab.metatrain.run import SavedRun as SavedRun
from celo2_harness.lab.metatrain.run import run_metatrain as run_metatrain
from celo2_harness.lab.metatrain.run import saved_run as saved_run
from celo2_harness.lab.metatrain.tasks import task_mesh as task_mesh
