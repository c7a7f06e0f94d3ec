"""One loop, one run folder and one display for every kind of run: training, trials, agents, meta-training."""

from celo2_harness.lab.training.checkpoints import (
    read_checkpoint as read_checkpoint,
    write_checkpoint as write_checkpoint,
)
from celo2_harness.lab.training.display import Display as Display
from celo2_harness.lab.training.folder import Progress as Progress, RunFolder as RunFolder, open_run as open_run
from celo2_harness.lab.training.interrupt import StopSignals as StopSignals
from celo2_harness.lab.training.loop import (
    Step as Step,
    TrainState as TrainState,
    init_state as init_state,
    train_step as train_step,
    train_steps as train_steps,
)
from celo2_harness.lab.training.optimizers import (
    AverageTail as AverageTail,
    OptimizerSpec as OptimizerSpec,
    preset_spec as preset_spec,
    with_average_tail as with_average_tail,
)
from celo2_harness.lab.training.reading import read as read
from celo2_harness.lab.training.sharded import ShardedTask as ShardedTask
from celo2_harness.lab.training.train import (
    TrainConfig as TrainConfig,
    TrainResult as TrainResult,
    train as train,
    training_progress as training_progress,
)
