"""One training run in a folder of its own: metrics, a picture, checkpoints, and resuming."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from celo2_harness._trees import tree_bytes
from celo2_harness.lab.errors import check_range
from celo2_harness.lab.tasks import Task
from celo2_harness.lab.training.figures import plot_run
from celo2_harness.lab.training.folder import Progress, RunFolder, Status, open_run
from celo2_harness.lab.training.loop import TrainState, init_state, steps_per_call, train_steps
from celo2_harness.lab.training.optimizers import OptimizerSpec
from celo2_harness.lab.training.peak import share_of_peak
from celo2_harness.lab.training.sharded import ShardedTask

CURVE = "curve.png"


@dataclass(frozen=True)
class TrainConfig:
    """The length and the intervals of a training run.

    Attributes:
        steps: The number of training steps.
        seed: The seed of the initial parameters and the batches, from 0 to 2^32 - 1.
        eval_every: The number of steps between evaluations.
        log_every: The number of steps between lines with the training loss; an evaluation writes a line, too.
        checkpoint_every: The number of steps between checkpoints, for which the last step counts too; 0 for none.
    """

    steps: int
    seed: int = 0
    eval_every: int = 50
    log_every: int = 10
    checkpoint_every: int = 100

    def __post_init__(self):
        check_range(1, steps=self.steps, eval_every=self.eval_every, log_every=self.log_every)
        check_range(0, checkpoint_every=self.checkpoint_every)
        check_range(0, 2**32 - 1, seed=self.seed)


class TrainResult(NamedTuple):
    """The end of a training run.

    Attributes:
        status: "finished", "diverged" (the held-out loss became NaN or infinite), or "interrupted" (saved and stopped).
        step: The number of steps taken.
        validation_loss: The last one written down; NaN where the run diverged.
        curve: The picture.
    """

    status: Status
    step: int
    validation_loss: float
    curve: Path


def run_settings(task: Task, spec: OptimizerSpec, config: TrainConfig) -> dict[str, Any]:
    """Returns what determines the numbers of a run: two runs with the same settings are the same run."""
    run = {name: getattr(config, name) for name in ("steps", "seed", "eval_every", "log_every")}
    return {**task.describe(), "optimizer": dict(spec.settings), "run": run}


def train(
    task: Task,
    spec: OptimizerSpec,
    config: TrainConfig,
    folder: Path,
    *,
    options: Mapping[str, Any] | None = None,
    title: str = "Training",
    resume: bool = False,
    mesh: Mesh | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[int], None] = lambda step: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> TrainResult:
    """Trains in a folder: metrics go to `metrics.jsonl`, a picture to `curve.png`, checkpoints to `checkpoints/`.

    A resumed run continues to the numbers that it would have reached without the interruption: `metrics.jsonl` is cut
    back to the last checkpoint, and from there on only its timings differ.

    Args:
        task: The task.
        spec: The optimizer.
        config: Length and intervals.
        folder: The run folder. It is made if missing; one that holds a run is refused unless `resume`.
        options: Facts that `read_header` finds again.
        title: The title of the picture.
        resume: Whether to continue the run in the folder, from its last checkpoint or from the start.
        mesh: Devices to train on; see `ShardedTask`. The numbers differ from those of one device by rounding, and a run
            may be resumed on another mesh.
        should_stop: Asked after every step; once it says yes, a checkpoint is saved and the run returns.
        on_start: Called with the step to start from, after everything was checked and restored.
        on_progress: Called after every step.

    Returns:
        How the run ended.

    Raises:
        InputError: As `open_run`.
    """
    if mesh is not None:
        task = ShardedTask(task, mesh)
        task.batch(config.seed, 0)  # Refuses a batch that does not divide before anything is written.
    with open_run(folder, run_settings(task, spec, config), options=options, resume=resume) as run:
        status = run.status or follow_training(
            run, task, spec, config, should_stop=should_stop, on_start=on_start, on_progress=on_progress
        )
        plot_run(run.lines, folder / CURVE, title)
        losses = [line["validation_loss"] for line in run.lines if "validation_loss" in line]
        last = losses[-1] if losses and losses[-1] is not None else math.nan
        return TrainResult(status, run.step, last, folder / CURVE)


def follow_training(
    run: RunFolder,
    task: Task,
    spec: OptimizerSpec,
    config: TrainConfig,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[int], None] = lambda step: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Status:
    """Trains in an open run folder, from where it is to the end; see `train`."""
    first = init_state(task, spec.tx, config.seed)
    step, (params, opt_state, losses) = run.begin((first.params, first.opt_state, jnp.zeros(3)))
    on_start(step)
    return run.follow(
        training_progress(task, spec, config, TrainState(step, params, opt_state), losses),
        steps=config.steps,
        checkpoint_every=config.checkpoint_every,
        should_stop=should_stop,
        on_progress=on_progress,
    )


def training_progress(
    task: Task, spec: OptimizerSpec, config: TrainConfig, state: TrainState, losses: Float[Array, " 3"]
) -> Iterator[Progress]:
    """Trains from a state, and says what is to be written down.

    The lines have the learning rate; "loss" and "largest_loss", the mean and the largest training loss since the line
    before; the median time of a step, the tokens per second and, on a device whose peak is known, the share of it that
    the model takes; and at evaluations the held-out loss, the root mean square of the parameters and, of an optimizer
    in `guard_updates`, the number of steps skipped or clipped.

    Args:
        task: The task.
        spec: The optimizer.
        config: Length and intervals.
        state: The state to start from; its arrays are given away.
        losses: Number, sum and largest of the training losses since the last line. A checkpoint holds them, so that a
            resumed run writes the same lines.

    Yields:
        The progress after every step, on accelerators after every few; see `steps_per_call`.
    """
    seconds: list[float] = []
    held_out = speed = ""
    # A task on a mesh places its batches itself, one at a time.
    per_call = 1 if isinstance(task, ShardedTask) else steps_per_call(config.eval_every, config.log_every)
    steps = train_steps(
        task,
        spec.tx,
        state,
        steps=config.steps,
        seed=config.seed,
        eval_every=config.eval_every,
        eval_params=spec.eval_params,
        per_call=per_call,
    )
    flops = getattr(task, "flops_per_batch", None)
    for now in steps:
        step, params = now.state.step, now.state.params
        line: dict[str, Any] = {}
        if now.loss is not None:
            losses = _add_loss(losses, now.loss)
        if now.seconds is not None:
            seconds.append(now.seconds)
        evaluated = now.validation_loss is not None
        if step and (step % config.log_every == 0 or evaluated):
            count, total, largest = map(float, losses)
            line |= {"loss": total / count, "largest_loss": largest, "learning_rate": float(spec.schedule(step - 1))}
            if seconds:
                median = statistics.median(seconds)
                line |= {"step_milliseconds": round(1e3 * median, 3)}
                line |= {"tokens_per_second": round(task.tokens_per_batch / median)}
                if (share := share_of_peak(flops, median)) is not None:
                    line |= {"share_of_peak": round(share, 4)}
                    speed = f"{share:.0%} of peak"
            losses, seconds = jnp.zeros(3), []
        if evaluated:
            line |= {"validation_loss": now.validation_loss, "parameter_rms": float(parameter_rms(params))}
            line |= _guarded(now.state.opt_state)
            held_out = f"held-out loss {now.validation_loss:.3f}"
        if step == 0:
            line |= {"parameter_bytes": tree_bytes(params), "state_bytes": tree_bytes(now.state.opt_state)}

        def text(loss: Any = now.loss, held_out: str = held_out, speed: str = speed) -> str:
            last = "" if loss is None else f"loss {float(loss.reshape(-1)[-1]):.3f}"
            return "  ".join(filter(None, [last, held_out, speed]))

        diverged = evaluated and not math.isfinite(now.validation_loss or 0.0)
        yield Progress(step, (*now.state[1:], losses), (line,) if line else (), diverged, text, notable=evaluated)


@jax.jit
def _add_loss(losses: Float[Array, " 3"], loss: Float[Array, "..."]) -> Float[Array, " 3"]:
    if loss.ndim:
        return jax.lax.scan(lambda losses, loss: (_add_loss(losses, loss), None), losses, loss)[0]
    count, total, largest = losses
    return jnp.stack([count + 1, total + loss, jnp.where(count > 0, jnp.maximum(largest, loss), loss)])


@jax.jit
def parameter_rms(params: Any) -> Float[Array, ""]:
    """Returns the root mean square over all parameters, as float32.

    Example:
        >>> float(parameter_rms({"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}))
        2.5
    """
    leaves = jax.tree.leaves(params)
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves]
    return jnp.sqrt(sum(squares, jnp.zeros([])) / sum(leaf.size for leaf in leaves))


def _guarded(opt_state: Any) -> dict[str, int]:
    """On how many steps guards acted; nothing where there is none."""
    names = ("nonfinite_count", "spike_count")
    counts = [int(count) for name in names for _, count in optax.tree.get_all_with_path(opt_state, name)]
    return {"guarded_steps": sum(counts)} if counts else {}
