"""One loop, one run folder and one display for every kind of run: training, trials, agents, meta-training."""

from celo2_harness.lab.training.checkpoints import read_checkpoint as read_checkpoint
from celo2_harness.lab.training.checkpoints import write_checkpoint as write_checkpoint
from celo2_harness.lab.training.display import Display as Display
from celo2_harness.lab.training.folder import Progress as Progress
from celo2_harness.lab.training.folder import RunFolder as RunFolder
from celo2_harness.lab.training.folder import open_run as open_run
from celo2_harness.lab.training.interrupt import StopSignals as StopSignals
from celo2_harness.lab.training.loop import Step as Step
from celo2_harness.lab.training.loop import TrainState as TrainState
from celo2_harness.lab.training.loop import init_state as init_state
from celo2_harness.lab.training.loop import train_step as train_step
from celo2_harness.lab.training.loop import train_steps as train_steps
from celo2_harness.lab.training.optimizers import OptimizerSpec as OptimizerSpec
from celo2_harness.lab.training.optimizers import preset_spec as preset_spec
from celo2_harness.lab.training.reading import read as read
from celo2_harness.lab.training.sharded import ShardedTask as ShardedTask
from celo2_harness.lab.training.train import TrainConfig as TrainConfig
from celo2_harness.lab.training.train import TrainResult as TrainResult
from celo2_harness.lab.training.train import train as train
from celo2_harness.lab.training.train import training_progress as training_progress
