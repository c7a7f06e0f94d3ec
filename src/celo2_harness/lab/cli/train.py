"""`celo2 train`: one training run in a folder of its own."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celo2_harness.lab.cli._devices import device_mesh
from celo2_harness.lab.cli._gpt import GPTOptions
from celo2_harness.lab.training.display import Display
from celo2_harness.lab.training.folder import read_header
from celo2_harness.lab.training.interrupt import StopSignals
from celo2_harness.lab.training.optimizers import preset_spec, with_average_tail
from celo2_harness.lab.training.reading import read
from celo2_harness.lab.training.train import TrainConfig, train


@dataclass(frozen=True)
class Config(GPTOptions):
    """Train a byte-level GPT on a text with one optimizer.

    Metrics, a picture of the loss and checkpoints go to a folder. Ctrl-C saves and stops; --resume goes on.
    """

    preset: str = "celo2"
    """Optimizer; `celo2 presets` lists them."""
    learning_rate: float | None = None
    """Peak learning rate; by default the preset's."""
    steps: int = 500
    """Training steps."""
    seed: int = 0
    """Seed of the initial parameters and the batches."""
    mesh: str | None = None
    """Devices to train on, as lengths of mesh axes, for example data=4,fsdp=2: parameters are split over fsdp and
    tensor, batches over data and fsdp. A run may be resumed on another mesh."""
    out: Path | None = None
    """Folder of the run; by default runs/train-PRESET."""
    resume: bool = False
    """Continue the run in the folder with its own settings. Other options may be left out."""
    eval_every: int = 50
    """Steps between evaluations on the held-out end of the text."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last one is always saved."""


def defaults(config: Config) -> Config:
    """Returns the options that hold where none is given: those that a run was started with when it is resumed."""
    if not config.resume:
        return Config()
    return read(Config, read_header(_folder(config))["options"], "options")


def run(config: Config) -> int:
    """Trains; returns 0 if the run finished, 1 if it diverged, 130 if it was interrupted."""
    folder = _folder(config)
    mesh = None if config.mesh is None else device_mesh(config.mesh)
    train_config = TrainConfig(config.steps, config.seed, config.eval_every, config.log_every, config.checkpoint_every)
    task = config.task()
    spec = preset_spec(
        config.preset,
        config.learning_rate,
        total_steps=config.steps,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        warmup=config.warmup,
        weights=config.weights,
        sharding=mesh,
    )
    if config.average_tail:
        spec = with_average_tail(spec, config.steps)
    rate = spec.settings["learning_rate"]
    with StopSignals() as stop, Display("tokens", task.tokens_per_batch) as display:
        result = train(
            task,
            spec,
            train_config,
            folder,
            options=_options(config),
            title=f"{spec.name}, learning rate {rate:g}: {config.model}, {task.tokens_per_batch} bytes per step",
            resume=config.resume,
            mesh=mesh,
            should_stop=lambda: stop.requested,
            on_start=lambda step: display.start(spec.name, config.steps, step),
            on_progress=display.update,
        )
    if result.status == "interrupted":
        print(f"saved at step {result.step}; go on with: celo2 train --resume --out {folder}", file=sys.stderr)
        return 130
    if result.status == "diverged":
        print(f"diverged: the loss was not a number at step {result.step}; try a lower learning rate")
    else:
        what = " of the average" if config.average_tail else ""
        print(f"final held-out loss{what}: {result.validation_loss:.4f} nats per byte after {result.step} steps")
    print(f"curve: {result.curve}")
    return 1 if result.status == "diverged" else 0


def _folder(config: Config) -> Path:
    return Path("runs") / f"train-{config.preset}" if config.out is None else config.out


def _options(config: Config) -> dict[str, Any]:
    """Returns what `defaults` finds again, with paths in full, because a run may be resumed from another folder."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "resume")}
    return options | {"text": None if config.text is None else str(config.text.absolute())}
