"""Learning the rule: small image tasks inside, persistent evolution strategies outside."""

from celo2_harness.metatrain.config import MetaTrainConfig as MetaTrainConfig
from celo2_harness.metatrain.outer import MetaTrainState as MetaTrainState
from celo2_harness.metatrain.outer import init_metatrain as init_metatrain
from celo2_harness.metatrain.outer import metatrain_step as metatrain_step
from celo2_harness.metatrain.run import RunError as RunError
from celo2_harness.metatrain.run import run_metatrain as run_metatrain
