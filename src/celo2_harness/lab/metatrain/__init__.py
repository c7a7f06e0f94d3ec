"""Learning the rule: small image and text tasks inside, evolution strategies outside."""

from celo2_harness.lab.metatrain.config import MetaTrainConfig as MetaTrainConfig
from celo2_harness.lab.metatrain.config import config_from as config_from
from celo2_harness.lab.metatrain.data import MetaTrainData as MetaTrainData
from celo2_harness.lab.metatrain.data import load_data as load_data
from celo2_harness.lab.metatrain.evaluations import Evaluation as Evaluation
from celo2_harness.lab.metatrain.evaluations import select_weights as select_weights
from celo2_harness.lab.metatrain.groups import InnerData as InnerData
from celo2_harness.lab.metatrain.groups import fitting_mesh as fitting_mesh
from celo2_harness.lab.metatrain.groups import run_groups as run_groups
from celo2_harness.lab.metatrain.groups import task_mesh as task_mesh
from celo2_harness.lab.metatrain.learned import LearnedRule as LearnedRule
from celo2_harness.lab.metatrain.loop import metatrain as metatrain
from celo2_harness.lab.metatrain.outer import MetaTrainState as MetaTrainState
from celo2_harness.lab.metatrain.outer import init_metatrain as init_metatrain
from celo2_harness.lab.metatrain.outer import metatrain_step as metatrain_step
from celo2_harness.lab.metatrain.outer import place_data as place_data
from celo2_harness.lab.metatrain.outer import place_state as place_state
from celo2_harness.lab.metatrain.problem import InnerProblem as InnerProblem
from celo2_harness.lab.metatrain.problem import TaskGroup as TaskGroup
from celo2_harness.lab.metatrain.run import run_metatrain as run_metatrain
