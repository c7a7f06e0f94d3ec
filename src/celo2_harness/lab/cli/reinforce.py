"""`celo2 reinforce`: PPO on a game, one run in a folder of its own."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from celo2_harness.lab.errors import check_range, input_errors
from celo2_harness.lab.reinforce import (
    NATURE_CONVOLUTIONS,
    ActorCriticConfig,
    PPOConfig,
    ReinforceConfig,
    ReinforceResult,
    make_environments,
    reinforce,
)
from celo2_harness.lab.training.display import Display
from celo2_harness.lab.training.folder import read_header
from celo2_harness.lab.training.interrupt import StopSignals
from celo2_harness.lab.training.optimizers import preset_spec
from celo2_harness.lab.training.reading import read


@dataclass(frozen=True)
class Config:
    """Train an agent on a game with PPO and one optimizer.

    Metrics and checkpoints go to a folder. Ctrl-C saves and stops; --resume goes on, with new games. `celo2 report`
    draws the returns of runs.
    """

    game: str = "freeway"
    """Game: asterix, freeway or space_invaders (Atari, with the extra atari), or catch, which is learned in seconds."""
    preset: str = "celo2_ortho"
    """Optimizer; `celo2 presets` lists them."""
    learning_rate: float = 2.5e-4
    """Peak learning rate; the default is PPO's usual one, whatever the preset."""
    steps: int = 500_000
    """Agent steps over all copies of the game (four frames each), rounded up to whole updates."""
    seed: int = 0
    """Determines the initial parameters, the games, and what is drawn."""
    schedule: str = "linear"
    """Schedule of the learning rate over the run."""
    warmup: float = 0.0
    """Part of the run in which the learning rate rises."""
    weight_decay: float = 0.0
    """Weight decay of hidden matrices."""
    rest_learning_rate_factor: float | None = None
    """Learning rate of biases and heads over that of hidden matrices; by default the preset's."""
    weights: str | None = None
    """Weights of the learned rule: a name, a file or hf://owner/repo; by default the preset's."""
    hidden: int = 512
    """Units of the last hidden layer."""
    ppo: tyro.conf.OmitArgPrefixes[PPOConfig] = PPOConfig()
    """The settings of PPO."""
    out: Path | None = None
    """Folder of the run; by default runs/reinforce-GAME-PRESET-SEED."""
    resume: bool = False
    """Continue the run in the folder with its own settings. Other options may be left out."""
    checkpoint_every: int = 20
    """Updates between checkpoints; the last one is always saved."""


def defaults(config: Config) -> Config:
    """Returns the options that hold where none is given: those that a run was started with when it is resumed."""
    if not config.resume:
        return Config()
    return read(Config, read_header(_folder(config))["options"], "options")


def run(config: Config) -> int:
    """Trains; returns 0 if the run finished, 1 if it diverged, 130 if it was interrupted."""
    folder, total = _folder(config), config.ppo.updates(config.steps) * config.ppo.batch
    name = f"{config.game} {config.preset} seed {config.seed}"
    with StopSignals() as stop, Display("agent steps") as display:
        result = train(
            config,
            folder,
            should_stop=lambda: stop.requested,
            on_start=lambda step: display.start(name, total, step),
            on_progress=display.update,
        )
    if result.status == "interrupted":
        print(f"saved at step {result.step}; go on with: celo2 reinforce --resume --out {folder}", file=sys.stderr)
        return 130
    if result.status == "diverged":
        print(f"diverged: the loss was not a number at step {result.step}; try a lower learning rate")
        return 1
    score = "no episode ended" if result.score is None else f"mean return {result.score:.2f}"
    print(f"{score}, last {result.episodes} episodes, {result.step} agent steps\nmetrics: {folder / 'metrics.jsonl'}")
    return 0


def train(config: Config, folder: Path, **callbacks: Callable[..., Any]) -> ReinforceResult:
    """From options to a run in a folder; what is shown of it, and when it stops, is the caller's.

    Args:
        config: The options; `out` is not looked at.
        folder: The run folder.
        **callbacks: The arguments `should_stop`, `on_start` and `on_progress` of `reinforce`.

    Returns:
        How the run ended.

    Raises:
        InputError: If an option is wrong, or `reinforce` refuses the folder.
    """
    run_config = ReinforceConfig(config.steps, config.seed, config.checkpoint_every)
    rest: dict[str, Any] = {}
    if config.rest_learning_rate_factor is not None:
        rest["rest_learning_rate_factor"] = config.rest_learning_rate_factor
    spec = preset_spec(
        config.preset,
        config.learning_rate,
        total_steps=config.ppo.optimizer_steps(config.steps),
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        warmup=config.warmup,
        weights=config.weights,
        **rest,
    )
    check_range(1, hidden=config.hidden)
    with input_errors():
        environments = make_environments(config.game, config.ppo.environments)
    # Only pictures of some size have something to convolve.
    convolutions = NATURE_CONVOLUTIONS if min(environments.observation_shape[:2]) >= 36 else ()
    network = ActorCriticConfig(environments.observation_shape, environments.actions, convolutions, config.hidden)
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "resume")}
    try:
        return reinforce(
            environments,
            network,
            config.ppo,
            spec,
            run_config,
            folder,
            options=options,
            resume=config.resume,
            **callbacks,
        )
    finally:
        environments.close()


def _folder(config: Config) -> Path:
    if config.out is not None:
        return config.out
    return Path("runs") / f"reinforce-{config.game}-{config.preset}-{config.seed}"
