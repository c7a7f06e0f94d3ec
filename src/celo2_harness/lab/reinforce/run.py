"""A run of reinforcement learning in a folder: what it writes down, its checkpoints, and how it is resumed."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optax

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.reinforce import ActorCriticConfig, Environments, PPOConfig
from celo2_harness.lab.reinforce.train import PPOProgress, fit_ppo, init_ppo
from celo2_harness.lab.training.folder import CHECKPOINTS, METRICS, holds_run, prepare_folder, read_header, read_lines
from celo2_harness.lab.training.locks import lock_folder
from celo2_harness.lab.training.orbax import Checkpoints, refuse_difference
from celo2_harness.lab.training.provenance import provenance
from celo2_harness.weights.files import replace_file


def finite_or_none(value):
    return value if math.isfinite(value) else None


def write_line(path, record):
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def write_lines(path, records):
    replace_file(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode())


LAST_EPISODES = 100
"""How many of the last episodes the final score of a run is the mean of."""


@dataclass(frozen=True)
class ReinforceConfig:
    """How long a run is and when it is saved.

    Attributes:
        steps: Agent steps, over all copies of the game; rounded up to whole updates.
        seed: Determines the initial parameters, the games, and what is drawn; 0 to 2^32 - 1.
        checkpoint_every: Updates between checkpoints. The last one is saved always.
    """

    steps: int
    seed: int = 0
    checkpoint_every: int = 20

    def __post_init__(self):
        for name in ("steps", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed = {self.seed}: expected a number from 0 to {2**32 - 1}")


class ReinforceResult(NamedTuple):
    """How a run ended.

    Attributes:
        status: "finished", "diverged" (the loss became NaN or infinite), or "interrupted" (saved and stopped).
        step: Agent steps taken.
        score: The mean return of the last 100 episodes, or of all where there were fewer; None without any.
        episodes: How many episodes that are.
    """

    status: Literal["finished", "diverged", "interrupted"]
    step: int
    score: float | None
    episodes: int


def reinforce(
    environments: Environments,
    network: ActorCriticConfig,
    ppo: PPOConfig,
    tx: optax.GradientTransformation,
    config: ReinforceConfig,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    resume: bool = False,
    learning_rate: Callable[[int], Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[int], None] = lambda step: None,
    on_progress: Callable[[PPOProgress], None] = lambda progress: None,
) -> ReinforceResult:
    """Trains an agent in a folder: metrics go to `metrics.jsonl`, checkpoints to `checkpoints/`.

    `metrics.jsonl` has a header, a line per episode with its return, a line per update with losses and speed, and a
    line for the end. A resumed run goes on from the last checkpoint (parameters, optimizer state and step) with new
    games, since the emulators cannot be saved; lines after that checkpoint are cut off.

    Args:
        environments: As many copies of the game as `ppo` says.
        network: The network, made for them.
        ppo: The settings of PPO.
        tx: The optimizer.
        config: Length, seed and intervals.
        folder: The run folder, made where missing. One that holds a run is refused unless `resume`.
        settings: The optimizer, as JSON can hold it. A run with another one, another game or other settings of PPO is
            not resumed.
        options: What the caller wants to find again with `saved_options`; written to the header, never compared.
        resume: Continue the run in the folder from its last checkpoint, or from the start where it has none.
        learning_rate: The learning rate as a function of the optimizer step, only to be written down.
        should_stop: Asked after every update; once it says yes, a checkpoint is saved and the run returns.
        on_start: Called with the agent step to start from, after everything was checked and restored.
        on_progress: Called after every update.

    Returns:
        How the run ended.

    Raises:
        InputError: if the folder cannot be used, another process works in it, or the run in it cannot be resumed.
            Nothing in it was changed then.
    """
    described = {
        "environment": environments.describe(),
        "network": dataclasses.asdict(network),
        "ppo": dataclasses.asdict(ppo),
        **settings,
        "run": {"steps": config.steps, "seed": config.seed},
    }
    # As it comes back from a file: JSON has lists where Python has tuples.
    described = json.loads(json.dumps(described))
    if resume:
        read_header(folder)  # refuses a folder without a run
    prepare_folder(folder)
    with lock_folder(folder):
        return _locked(
            environments,
            network,
            ppo,
            tx,
            config,
            folder,
            {"kind": "header", "settings": described, "options": dict(options or {})},
            resume,
            learning_rate,
            should_stop,
            on_start,
            on_progress,
        )


def _locked(
    environments: Environments,
    network: ActorCriticConfig,
    ppo: PPOConfig,
    tx: optax.GradientTransformation,
    config: ReinforceConfig,
    folder: Path,
    header: dict[str, Any],
    resume: bool,
    learning_rate: Callable[[int], Any] | None,
    should_stop: Callable[[], bool],
    on_start: Callable[[int], None],
    on_progress: Callable[[PPOProgress], None],
) -> ReinforceResult:
    metrics, settings = folder / METRICS, header["settings"]
    lines = read_lines(metrics)
    if resume:
        refuse_difference(f"{metrics}", lines[0]["settings"], settings)
    elif holds_run(folder):
        raise InputError(f"out: {folder} holds a run already; add --resume to continue it, or choose another folder")
    if lines and lines[-1]["kind"] == "end":
        return _result(lines)
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    try:
        state = init_ppo(network, tx, config.seed)
        if saved := checkpoints.steps():
            state = checkpoints.restore(saved[-1], state, settings)
        done = state.step * ppo.batch
        on_start(done)
        kept = [line for line in lines[1:] if line["step"] <= done]
        write_lines(metrics, [*lines[:1], *kept] if lines else [header | provenance()])
        writer = _Writer(metrics, ppo, learning_rate, kept)
        status, step = "finished", done
        updates = ppo.updates(config.steps)
        for progress in fit_ppo(environments, network, ppo, tx, state, updates=updates, seed=config.seed):
            state, step = progress.state, progress.state.step * ppo.batch
            if not writer.write(progress):
                status = "diverged"
                break
            on_progress(progress)
            last = state.step == updates
            stopped = should_stop() and not last
            if state.step % config.checkpoint_every == 0 or last or stopped:
                checkpoints.save(state, settings)
            if stopped:
                return _result(read_lines(metrics))._replace(status="interrupted", step=step)
        writer.write_end(status, step)
    finally:
        checkpoints.close()
    return _result(read_lines(metrics))


def _result(lines: list[dict[str, Any]]) -> ReinforceResult:
    returns = [line["return"] for line in lines if line["kind"] == "episode"][-LAST_EPISODES:]
    end = lines[-1]
    score = statistics.fmean(returns) if returns else None
    return ReinforceResult(end.get("status", "interrupted"), end.get("step", 0), score, len(returns))


class _Writer:
    """Writes the metrics of a run, line by line."""

    def __init__(
        self,
        path: Path,
        ppo: PPOConfig,
        learning_rate: Callable[[int], Any] | None,
        written: list[dict[str, Any]],
    ):
        self._path, self._ppo, self._learning_rate = path, ppo, learning_rate
        self._seconds_before = max((line["seconds"] for line in written), default=0.0)
        self._started = time.perf_counter()
        self._compiled = False

    def write(self, progress: PPOProgress) -> bool:
        """Writes what an update brought; returns False if a loss was no longer a finite number."""
        seconds = self._time()
        for episode in progress.episodes:
            record = {"kind": "episode", "step": episode.step, "return": episode.total, "length": episode.length}
            write_line(self._path, record | seconds)
        losses = {name: float(value) for name, value in progress.losses._asdict().items()}
        record = {"kind": "update", "step": progress.state.step * self._ppo.batch}
        record |= {name: finite_or_none(value) for name, value in losses.items()}
        if self._learning_rate is not None:
            taken = progress.state.step * self._ppo.epochs * self._ppo.minibatches
            record["learning_rate"] = float(self._learning_rate(taken - 1))
        if self._compiled:  # the first update of a process is mostly compilation
            record["steps_per_second"] = round(self._ppo.batch / progress.seconds, 1)
        self._compiled = True
        write_line(self._path, record | seconds)
        return all(map(math.isfinite, losses.values()))

    def write_end(self, status: str, step: int) -> None:
        """Writes the last line."""
        write_line(self._path, {"kind": "end", "step": step, "status": status} | self._time())

    def _time(self) -> dict[str, float]:
        return {"seconds": round(self._seconds_before + time.perf_counter() - self._started, 3)}
