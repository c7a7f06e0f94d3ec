"""Learning the rule: small image and text tasks inside, evolution strategies outside."""

from celo2_harness.lab.metatrain.config import MetaTrainConfig as MetaTrainConfig, config_from as config_from
from celo2_harness.lab.metatrain.data import MetaTrainData as MetaTrainData, load_data as load_data
from celo2_harness.lab.metatrain.evaluations import Evaluation as Evaluation, select_weights as select_weights
from celo2_harness.lab.metatrain.groups import (
    InnerData as InnerData,
    fitting_mesh as fitting_mesh,
    run_groups as run_groups,
    task_mesh as task_mesh,
)
from celo2_harness.lab.metatrain.learned import LearnedRule as LearnedRule
from celo2_harness.lab.metatrain.loop import metatrain as metatrain
from celo2_harness.lab.metatrain.outer import (
    MetaTrainState as MetaTrainState,
    init_metatrain as init_metatrain,
    metatrain_step as metatrain_step,
    place_data as place_data,
    place_state as place_state,
)
from celo2_harness.lab.metatrain.problem import InnerProblem as InnerProblem, TaskGroup as TaskGroup
from celo2_harness.lab.metatrain.references import with_references as with_references
from celo2_harness.lab.metatrain.run import run_metatrain as run_metatrain
from celo2_harness.lab.metatrain.starts import starting_theta as starting_theta
