"""A run of an agent in a folder."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from celo2_harness.lab.errors import check_range
from celo2_harness.lab.reinforce.actor_critic import ActorCriticConfig
from celo2_harness.lab.reinforce.environments import Environments
from celo2_harness.lab.reinforce.loop import PPOUpdate, init_agent, train_agent
from celo2_harness.lab.reinforce.ppo import PPOConfig
from celo2_harness.lab.training.folder import Progress, Status, open_run
from celo2_harness.lab.training.loop import TrainState
from celo2_harness.lab.training.optimizers import OptimizerSpec

LAST_EPISODES = 100
"""The number of last episodes that the final score of a run is the mean of."""


@dataclasses.dataclass(frozen=True)
class ReinforceConfig:
    """The length and the intervals of a run.

    Attributes:
        steps: The number of agent steps, over all copies of the game; rounded up to whole updates.
        seed: The seed of the initial parameters, the games, and what is drawn; 0 to 2^32 - 1.
        checkpoint_every: The number of updates between checkpoints. The last one is saved always.
    """

    steps: int
    seed: int = 0
    checkpoint_every: int = 20

    def __post_init__(self):
        check_range(1, steps=self.steps, checkpoint_every=self.checkpoint_every)
        check_range(0, 2**32 - 1, seed=self.seed)


class ReinforceResult(NamedTuple):
    """The end of a run.

    Attributes:
        status: "finished", "diverged" (the loss became NaN or infinite), or "interrupted" (saved and stopped).
        step: The number of agent steps taken.
        score: The mean return of the last 100 episodes, or of all where there were fewer; None without any.
        episodes: The number of episodes that this is the mean of.
    """

    status: Status
    step: int
    score: float | None
    episodes: int


def reinforce(
    environments: Environments,
    network: ActorCriticConfig,
    ppo: PPOConfig,
    spec: OptimizerSpec,
    config: ReinforceConfig,
    folder: Path,
    *,
    options: Mapping[str, Any] | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[int], None] = lambda step: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> ReinforceResult:
    """Trains an agent in a folder: metrics go to `metrics.jsonl`, checkpoints to `checkpoints/`.

    The metrics have a line of kind "episode" per episode with its return, and one of kind "update" per update with
    losses and speed; steps are agent steps. A resumed run goes on from the last checkpoint with new games, since
    emulators cannot be saved.

    Args:
        environments: The copies of the game, as many as `ppo` says.
        network: The network, made for them.
        ppo: The settings of PPO.
        spec: The optimizer.
        config: Length, seed and intervals.
        folder: The run folder. It is made if missing; one that holds a run is refused unless `resume`.
        options: What the caller wants to find again with `read_header`. It is never compared.
        resume: Whether to continue the run in the folder, from its last checkpoint or from the start.
        should_stop: Asked after every update; once it says yes, a checkpoint is saved and the run returns.
        on_start: Called with the agent step to start from, after everything was checked and restored.
        on_progress: Called after every update.

    Returns:
        How the run ended.

    Raises:
        InputError: As `open_run`.
    """
    settings = {
        "environment": environments.describe(),
        "network": dataclasses.asdict(network),
        "ppo": dataclasses.asdict(ppo),
        "optimizer": dict(spec.settings),
        "run": {"steps": config.steps, "seed": config.seed},
    }
    with open_run(folder, settings, options=options, resume=resume) as run:
        status = run.status
        if status is None:
            first = init_agent(network, spec.tx, config.seed)
            start, (params, opt_state) = run.begin((first.params, first.opt_state))
            on_start(start)
            state, updates = TrainState(start // ppo.batch, params, opt_state), ppo.updates(config.steps)
            agent = train_agent(environments, network, ppo, spec.tx, state, updates=updates, seed=config.seed)
            status = run.follow(
                _progress(agent, ppo, spec),
                steps=updates * ppo.batch,
                checkpoint_every=config.checkpoint_every * ppo.batch,
                should_stop=should_stop,
                on_progress=on_progress,
            )
        returns = [line["return"] for line in run.lines if line["kind"] == "episode"][-LAST_EPISODES:]
        step = max((line["step"] for line in run.lines), default=0)
        return ReinforceResult(status, step, statistics.fmean(returns) if returns else None, len(returns))


def _progress(agent: Iterator[PPOUpdate], ppo: PPOConfig, spec: OptimizerSpec) -> Iterator[Progress]:
    returns: list[float] = []
    for count, now in enumerate(agent):
        step, losses = now.state.step * ppo.batch, {name: float(x) for name, x in now.losses._asdict().items()}
        episodes = [
            {"kind": "episode", "step": episode.step, "return": episode.total, "length": episode.length}
            for episode in now.episodes
        ]
        rate = float(spec.schedule(now.state.step * ppo.epochs * ppo.minibatches - 1))
        update = {"kind": "update", **losses, "learning_rate": rate}
        if count:  # The first update of a process is mostly compilation.
            update["steps_per_second"] = round(ppo.batch / now.seconds, 1)
        returns = [*returns, *(episode.total for episode in now.episodes)][-LAST_EPISODES:]
        text = f"return {statistics.fmean(returns):.1f}" if returns else ""
        yield Progress(
            step,
            (now.state.params, now.state.opt_state),
            (*episodes, update),
            diverged=not all(map(math.isfinite, losses.values())),
            text=lambda text=text: text,
        )
