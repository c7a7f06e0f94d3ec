"""One run of an optimizer on a task, reduced to a record."""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from celo2_harness._types import Params
from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites.records import finite_or_none
from celo2_harness.lab.tasks import Task
from celo2_harness.lab.training.loop import Progress, fit, init_state, tree_bytes
from celo2_harness.lab.training.orbax import Checkpoints
from celo2_harness.weights.files import replace_file


class Contender(NamedTuple):
    """An optimizer at a learning rate.

    Attributes:
        name: Runs are grouped by it; the best learning rate of a group stands for it.
        learning_rate: For the records; the optimizer has its own.
        tx: The optimizer.
        settings: What else determines it, as JSON can hold it: runs are told apart by this.
    """

    name: str
    learning_rate: float
    tx: optax.GradientTransformation
    settings: Mapping[str, Any]


def run_settings(
    described: Mapping[str, Any], contender: Contender, *, steps: int, seed: int, eval_every: int
) -> dict[str, Any]:
    """Returns what determines the numbers of a run; two runs with the same settings are the same run.

    Args:
        described: What the task says of itself, from `Task.describe`.
        contender: The optimizer.
        steps: Training steps.
        seed: Of the initial parameters and the batches.
        eval_every: Steps between evaluations.

    Returns:
        A record that JSON can hold.
    """
    run = {"steps": steps, "seed": seed, "eval_every": eval_every}
    return {**described, "optimizer": dict(contender.settings), "run": run}


def settings_key(settings: Mapping[str, Any]) -> str:
    """Returns one string per different settings, whatever the order of their names.

    >>> settings_key({"b": 1, "a": [2]}) == settings_key({"a": (2,), "b": 1})
    True
    """
    return json.dumps(settings, sort_keys=True)


@jax.jit
def parameter_rms(params: Params) -> Float[Array, ""]:
    """Returns the root mean square over all parameters, as float32.

    >>> float(parameter_rms({"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}))
    2.5
    """
    leaves = jax.tree.leaves(params)
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves]
    return jnp.sqrt(sum(squares, jnp.zeros([])) / sum(leaf.size for leaf in leaves))


def run_once(
    task: Task,
    contender: Contender,
    settings: Mapping[str, Any],
    *,
    folder: Path | None = None,
    checkpoint_every: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any] | None:
    """Trains once.

    Args:
        task: What to train.
        contender: The optimizer.
        settings: From `run_settings`; the run is as long as they say.
        folder: Where checkpoints go, if there are to be any. What is in it is continued; whoever has written the record
            down removes it.
        checkpoint_every: Steps between checkpoints; 0 for none.
        should_stop: Asked after every step; once it says yes, the run is saved, if it has checkpoints, and given up.
        on_progress: Called after every step.

    Returns:
        The record, or None if the run was given up. `status` is "finished" or "diverged" (the held-out loss is no
        finite number; the run ends there). `validation`, `parameter_rms`, `training` and `training_peak` are pairs of
        step and number: the held-out loss, the root mean square of the parameters, and the mean and the largest
        training loss of the steps since the evaluation before. `guarded_steps`, of optimizers in `guard_updates`, is
        the number of steps that were skipped or clipped. `seconds` is the time of all, compilation too.

    Raises:
        InputError: if the checkpoints cannot be read.
    """
    steps, seed, eval_every = (settings["run"][name] for name in ("steps", "seed", "eval_every"))
    started = time.perf_counter()
    state = init_state(task, contender.tx, seed)
    sizes = {"parameter_bytes": tree_bytes(state.params), "state_bytes": tree_bytes(state.opt_state)}
    history = _History()
    checkpoints = Checkpoints(folder / "checkpoints") if folder and checkpoint_every else None
    try:
        if checkpoints and folder and (there := checkpoints.steps()):
            state = checkpoints.restore(there[-1], state, settings)
            history.load(folder / f"history-{state.step}.json")
        before, status = history.seconds, "finished"

        def save(progress: Progress) -> None:
            if checkpoints and folder:
                # The history first: a checkpoint without one could not be continued.
                history.seconds = before + time.perf_counter() - started
                folder.mkdir(parents=True, exist_ok=True)
                history.save(folder / f"history-{progress.state.step}.json")
                checkpoints.save(progress.state, settings)

        for progress in fit(task, contender.tx, state, steps=steps, seed=seed, eval_every=eval_every):
            history.add(progress)
            state = progress.state
            step, loss = state.step, progress.validation_loss
            if loss is not None and not math.isfinite(loss):
                status = "diverged"
                break
            on_progress(progress)
            if step < steps and should_stop():
                save(progress)
                return None
            if checkpoint_every and step and step < steps and step % checkpoint_every == 0:
                save(progress)
    finally:
        if checkpoints:
            checkpoints.close()
    times = history.step_seconds
    return {
        "name": contender.name,
        "learning_rate": contender.learning_rate,
        "seed": seed,
        "unit": task.unit,
        **sizes,
        "status": status,
        "validation_loss": history.curves["validation"][-1][1],
        **history.curves,
        **_guarded(state.opt_state),
        "step_milliseconds": round(1e3 * statistics.median(times), 3) if times else None,
        "seconds": round(before + time.perf_counter() - started, 3),
    }


def _guarded(opt_state: Any) -> dict[str, int]:
    """On how many steps guards acted; nothing where there is none."""
    names = ("nonfinite_count", "spike_count")
    counts = [int(count) for name in names for _, count in optax.tree.get_all_with_path(opt_state, name)]
    return {"guarded_steps": sum(counts)} if counts else {}


class _History:
    """What a run has written down so far."""

    def __init__(self):
        names = ("validation", "parameter_rms", "training", "training_peak")
        self.curves: dict[str, list[list[Any]]] = {name: [] for name in names}
        self.step_seconds: list[float] = []
        self.seconds = 0.0
        # Losses of the steps since the last evaluation: arrays, read together when one is due, since reading waits.
        self._losses: list[Any] = []

    def add(self, progress: Progress) -> None:
        step = progress.state.step
        if progress.step_seconds is not None:
            self.step_seconds.append(progress.step_seconds)
        if progress.loss is not None:
            self._losses.append(progress.loss)
        if progress.validation_loss is None:
            return
        self._note("validation", step, progress.validation_loss)
        self._note("parameter_rms", step, float(parameter_rms(progress.state.params)))
        if self._losses:
            losses = [float(loss) for loss in self._losses]
            self._losses.clear()
            self._note("training", step, statistics.fmean(losses))
            self._note("training_peak", step, max(losses) if all(map(math.isfinite, losses)) else math.inf)

    def _note(self, curve: str, step: int, value: float) -> None:
        self.curves[curve].append([step, finite_or_none(value)])

    def save(self, path: Path) -> None:
        content = {
            "curves": self.curves,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "losses": [float(loss) for loss in self._losses],
        }
        replace_file(path, json.dumps(content).encode())

    def load(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(
                f"{path} cannot be read, so its run cannot go on; remove the folder {path.parent} to repeat the run"
            ) from None
        self.curves, self.step_seconds, self.seconds = content["curves"], content["step_seconds"], content["seconds"]
        self._losses = content["losses"]
