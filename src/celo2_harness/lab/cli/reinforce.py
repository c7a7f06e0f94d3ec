"""`celo2 reinforce`: PPO on a game, one run in a folder of its own."""

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from celo2_harness.lab.errors import InputError, input_errors
from celo2_harness.lab.reinforce import NATURE_CONVOLUTIONS, ActorCriticConfig, PPOConfig, make_environments
from celo2_harness.lab.reinforce.run import ReinforceConfig, ReinforceResult, reinforce
from celo2_harness.lab.reinforce.train import PPOProgress
from celo2_harness.lab.training.folder import read_header
from celo2_harness.lab.training.interrupt import StopSignals
from celo2_harness.lab.training.optimizers import preset_spec

_LINE_SECONDS = 15.0


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
    """Course of the learning rate over the run."""
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
    options = read_header(_folder(config))["options"]
    ppo = {name: value for name, value in options.get("ppo", {}).items() if name in _names(PPOConfig)}
    options = {name: value for name, value in options.items() if name in _names(Config) - {"ppo"}}
    return dataclasses.replace(Config(**options), ppo=PPOConfig(**ppo))


def _names(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def run(config: Config) -> int:
    """Trains; returns 0 if the run finished, 1 if it diverged, 130 if it was interrupted."""
    folder = _folder(config)
    with StopSignals() as stop, _Display(config) as display:
        result = train(
            config,
            folder,
            should_stop=lambda: stop.requested,
            on_start=display.start,
            on_progress=display.update,
        )
    return _report(result, folder)


def train(config: Config, folder: Path, **callbacks: Callable[..., Any]) -> ReinforceResult:
    """From options to a run in a folder; what is shown of it, and when it stops, is the caller's.

    Args:
        config: The options; `out` is not looked at.
        folder: The run folder.
        **callbacks: `should_stop`, `on_start` and `on_progress` of `reinforce`.

    Returns:
        How the run ended.

    Raises:
        InputError: if an option is wrong, or `reinforce` refuses the folder.
    """
    run_config = ReinforceConfig(config.steps, config.seed, config.checkpoint_every)
    total = config.ppo.optimizer_steps(config.steps)
    options = {}
    if config.rest_learning_rate_factor is not None:
        options["rest_learning_rate_factor"] = config.rest_learning_rate_factor
    spec = preset_spec(
        config.preset,
        config.learning_rate,
        total_steps=total,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        warmup=config.warmup,
        weights=config.weights,
        **options,
    )
    if config.hidden < 1:
        raise InputError(f"hidden = {config.hidden}: expected at least 1")
    with input_errors():
        environments = make_environments(config.game, config.ppo.environments)
    # Only pictures of some size have something to convolve.
    convolutions = NATURE_CONVOLUTIONS if min(environments.observation_shape[:2]) >= 36 else ()
    network = ActorCriticConfig(environments.observation_shape, environments.actions, convolutions, config.hidden)
    try:
        return reinforce(
            environments,
            network,
            config.ppo,
            spec.tx,
            run_config,
            folder,
            settings={"optimizer": dict(spec.settings)},
            options=_options(config),
            resume=config.resume,
            learning_rate=spec.schedule,
            **callbacks,
        )
    finally:
        environments.close()


def _report(result: ReinforceResult, folder: Path) -> int:
    if result.status == "interrupted":
        print(f"saved at step {result.step}; go on with: celo2 reinforce --resume --out {folder}", file=sys.stderr)
        return 130
    if result.status == "diverged":
        print(f"diverged: the loss was not a number at step {result.step}; try a lower learning rate")
        return 1
    score = "no episode ended" if result.score is None else f"mean return {result.score:.2f}"
    print(f"{score}, last {result.episodes} episodes, {result.step} agent steps\nmetrics: {folder / 'metrics.jsonl'}")
    return 0


class _Display:
    """A bar in a terminal, a line now and then elsewhere."""

    def __init__(self, config: Config):
        self._name = f"{config.game} {config.preset} seed {config.seed}"
        self._batch, self._total = config.ppo.batch, config.ppo.updates(config.steps) * config.ppo.batch
        self._shown, self._seconds, self._returns = 0.0, None, []
        # The time left is ours: the bar's own estimate would count what an earlier process did as done at once.
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
        )
        self._bar = Progress(*columns, disable=not sys.stdout.isatty())
        self._task = self._bar.add_task(self._name, total=self._total, status="compiling")

    def __enter__(self) -> "_Display":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def start(self, step: int) -> None:
        """Shows where the run starts."""
        self._bar.start()
        self._bar.update(self._task, completed=step)
        self._first = True
        if self._bar.disable and step:
            print(f"{self._name}: goes on from step {step}", flush=True)

    def update(self, progress: PPOProgress) -> None:
        """Shows an update."""
        step = progress.state.step * self._batch
        self._returns = [*self._returns, *(episode.total for episode in progress.episodes)][-100:]
        if not self._first:  # the first update is mostly compilation
            # A moving average: single updates jump about on a shared machine.
            old = progress.seconds if self._seconds is None else self._seconds
            self._seconds = 0.9 * old + 0.1 * progress.seconds
        self._first = False
        parts = [f"return {sum(self._returns) / len(self._returns):.1f}"] if self._returns else []
        if self._seconds:
            left = datetime.timedelta(seconds=round((self._total - step) / self._batch * self._seconds))
            parts.append(f"{self._batch / self._seconds:,.0f} steps/s  {left} left")
        self._bar.update(self._task, completed=step, status="  ".join(parts))
        now = time.monotonic()
        if self._bar.disable and (now - self._shown > _LINE_SECONDS or step == self._total):
            self._shown = now
            print(f"{self._name}: step {step}/{self._total}  {'  '.join(parts)}", flush=True)


def _folder(config: Config) -> Path:
    if config.out is not None:
        return config.out
    return Path("runs") / f"reinforce-{config.game}-{config.preset}-{config.seed}"


def _options(config: Config) -> dict[str, Any]:
    options = dataclasses.asdict(config)
    for name in ("out", "resume"):
        del options[name]
    return options
