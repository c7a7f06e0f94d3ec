"""Training runs and fair comparisons of optimizers, with their records and pictures."""

from celo2_harness.evaluate.checkpoints import Checkpoints as Checkpoints
from celo2_harness.evaluate.compare import CompareConfig as CompareConfig
from celo2_harness.evaluate.compare import Comparison as Comparison
from celo2_harness.evaluate.compare import Contender as Contender
from celo2_harness.evaluate.compare import Row as Row
from celo2_harness.evaluate.compare import compare as compare
from celo2_harness.evaluate.compare import summarize as summarize
from celo2_harness.evaluate.errors import InputError as InputError
from celo2_harness.evaluate.interrupt import StopSignals as StopSignals
from celo2_harness.evaluate.loop import Progress as Progress
from celo2_harness.evaluate.loop import TrainState as TrainState
from celo2_harness.evaluate.loop import evaluate as evaluate
from celo2_harness.evaluate.loop import fit as fit
from celo2_harness.evaluate.loop import init_state as init_state
from celo2_harness.evaluate.loop import train_step as train_step
from celo2_harness.evaluate.loop import tree_bytes as tree_bytes
from celo2_harness.evaluate.plots import plot_comparison as plot_comparison
from celo2_harness.evaluate.plots import plot_meta_loss as plot_meta_loss
from celo2_harness.evaluate.plots import plot_training as plot_training
from celo2_harness.evaluate.train import TrainConfig as TrainConfig
from celo2_harness.evaluate.train import TrainResult as TrainResult
from celo2_harness.evaluate.train import saved_options as saved_options
from celo2_harness.evaluate.train import train as train
