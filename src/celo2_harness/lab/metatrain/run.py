"""A meta-training run on disk: metrics as JSON lines, checkpoints, evaluations, and the weights file at the end."""

import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import numpy as np
from jax.sharding import Mesh

from celo2_harness.lab.metatrain.card import write_weights
from celo2_harness.lab.metatrain.checkpoints import (
    CHECKPOINT_FOLDER,
    config_from,
    fit_to,
    load_portable,
    restore_state,
    save_state,
    saved_checkpoints,
)
from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.errors import RunError
from celo2_harness.lab.metatrain.evaluations import Evaluation, Judge
from celo2_harness.lab.metatrain.groups import TEXT_SET, InnerData, run_groups
from celo2_harness.lab.metatrain.learned import LEARNED, AnyWeights
from celo2_harness.lab.metatrain.outer import (
    MetaTrainMetrics,
    MetaTrainState,
    init_metatrain,
    metatrain_step,
    place_data,
    place_state,
)
from celo2_harness.lab.metatrain.processes import agreed, gathered, is_first
from celo2_harness.lab.metatrain.tasks import fitting_mesh
from celo2_harness.lab.metatrain.text import TEXT_MODEL, text_classes
from celo2_harness.lab.tasks import ImageSets, load_image_sets
from celo2_harness.lab.tasks.text import default_text, read_text
from celo2_harness.lab.training.locks import lock_folder
from celo2_harness.lab.training.provenance import provenance
from celo2_harness.lab.training.settings import first_difference
from celo2_harness.velo import VeloWeights
from celo2_harness.weights.files import replace_file

METRICS_FILE = "metrics.jsonl"
WEIGHTS_FILE = "weights.celo2"
DIGEST_AFTER = 100
"""After how many iterations of a run, or at its end if that is sooner, the digest of theta is recorded."""


class SavedRun(NamedTuple):
    """What the first line of a run's metrics says of it.

    Attributes:
      config: of the run.
      options: what its caller wanted to find again.
      devices: how many its tasks were spread over; 0 if it does not say.
    """

    config: MetaTrainConfig
    options: dict[str, Any]
    devices: int


def saved_run(out: str | Path) -> SavedRun:
    """Reads what a run folder was started with.

    Args:
      out: the run folder.

    Raises:
      RunError: it holds no run, or its metrics do not start with a header.
    """
    path = Path(out) / METRICS_FILE
    if not path.is_file():
        raise RunError(f"out = {str(out)!r}: nothing to resume ({METRICS_FILE} is missing).")
    try:
        header = json.loads(path.read_text(errors="replace").splitlines()[0])
        config, options, devices = header["config"], dict(header["options"]), int(header.get("devices", 0))
    except (ValueError, IndexError, KeyError, TypeError, RecursionError):
        raise RunError(f"{path}: does not start with the header of a run, so it cannot go on.") from None
    return SavedRun(config_from(config, str(path)), options, devices)


def run_metatrain(
    config: MetaTrainConfig,
    data: str,
    out: str | Path,
    *,
    sets: tuple[str, ...] = (),
    inner_text: str | Path | None = None,
    start_from: str | None = None,
    continue_from: str | Path | None = None,
    resume: bool = False,
    mesh: Mesh | None = None,
    checkpoint_every: int = 100,
    log_every: int = 10,
    evaluation: Evaluation | None = None,
    options: Mapping[str, Any] | None = None,
    on_start: Callable[[int], None] = lambda iteration: None,
    on_log: Callable[[dict[str, Any]], None] = lambda line: None,
    on_evaluation: Callable[[dict[str, Any]], None] = lambda record: None,
    warn: Callable[[str], None] = lambda message: warnings.warn(message, stacklevel=3),
    stop: Callable[[], bool] = lambda: False,
) -> AnyWeights | None:
    """Meta-trains a rule and writes it to a folder, in which only one run at a time may work.

    With a mesh over several processes, all call this with the same arguments; the first one alone touches the folder,
    evaluates, is asked to stop and calls back.

    Args:
      config: the run.
      data: "digits", or another source of 8x8 image sets (see `load_image_sets`).
      out: the run folder: `metrics.jsonl`, `checkpoints/`, `portable.msgpack`, and at the end `weights.celo2` with its
        card `weights.md`; with `evaluation` also `evaluations.jsonl` and `snapshots/`.
      sets: names of the image sets; empty for all of the source.
      inner_text: a text file for the tasks on text (`text_tasks`); None: the text that Python carries.
      start_from: weights to begin with (see `load_weights`), of the configuration of `config`; None: random ones.
      continue_from: a `portable.msgpack` whose theta, outer optimizer and iteration a new run goes on from.
      resume: go on from the folder's newest checkpoint, on as many devices to the bits of a run that was never stopped.
      mesh: devices that the tasks are spread over, as `task_mesh` gives it; of one process's devices, as many are used
        as divide the tasks evenly. Their number changes the rounding of the result and nothing else.
      checkpoint_every: iterations between checkpoints.
      log_every: iterations between lines of metrics (means over them).
      evaluation: how thetas are judged along the way.
      options: written to the header for `saved_run`, never compared.
      on_start: called with the iteration to go on from, before anything is compiled.
      on_log: called with every line of metrics.
      on_evaluation: called with every evaluation.
      warn: told what is wrong but does not stop the run, such as a damaged checkpoint.
      stop: asked after every iteration; True saves a checkpoint and returns.

    Returns:
      The weights, or None if stopped before the end.

    Raises:
      DataError: unusable data.
      ValueError: an unusable text.
      RunError: the folder holds a run (without `resume`), none (with it), or a run of another config or data; or it
        cannot be written. The checkpoints in it stay whole in every case.
      InputError: another process works in the folder.
    """
    for name, value in (("checkpoint_every", checkpoint_every), ("log_every", log_every)):
        if value < 1:
            raise RunError(f"{name} = {value}: expected at least 1.")
    if start_from is not None and continue_from is not None:
        raise RunError("start_from and continue_from exclude each other: the second brings its own theta.")
    images, names = load_image_sets(data, sets)
    held, facts = _with_text(config, images, names, inner_text)
    count = len(names)
    out = Path(out)
    header = {
        "config": dataclasses.asdict(config),
        "start_from": start_from,
        "continue_from": None if continue_from is None else str(continue_from),
        "sets": list(names),
        "data_sha256": data_digest(images),
        **facts,
    }
    shown = (*names, TEXT_SET) if config.text_tasks else names
    first = is_first()
    mesh = _mesh(mesh, config, count, warn)
    with _write_errors(out):
        if first:
            _open_folder(out, resume)
        with lock_folder(out) if first else nullcontext():
            if not first:
                state, lines = init_metatrain(config, count), ["{}"]
            elif resume:
                state, header, lines = _resume(out, header, config, count, warn)
            else:
                state = _first_state(config, count, start_from, continue_from, header, warn)
                header["first_iteration"] = int(state.iteration)
                # First of all, so that a run can always be resumed, without the file that it came from.
                save_state(out, state, header)
                more = {"options": dict(options or {}), "devices": 1 if mesh is None else mesh.size}
                lines = [json.dumps(header | more | provenance())]
            if first:
                replace_file(out / METRICS_FILE, "".join(line + "\n" for line in lines).encode())
            # Through NumPy, whether it comes from a checkpoint or not, so that a resumed run executes the same program.
            state = agreed(state)
            state = jax.tree.map(jax.numpy.asarray, state) if mesh is None else place_state(state, mesh)
            held = held if mesh is None else place_data(held, mesh)
            done = int(state.iteration)
            run = _Run(config, out, header, shown, json.loads(lines[-1]))
            run.record(state)
            if done == config.iterations and agreed((out / WEIGHTS_FILE).exists()):
                return LEARNED[config.variant].load(config, out / WEIGHTS_FILE) if first else run.weights(state)
            judge = Judge(out, evaluation if first else None, config.iterations)
            if first:
                on_start(done)
            if agreed(judge.due(done) and not run.evaluate(judge, state, on_evaluation)):
                return None
            for iteration in range(done + 1, config.iterations + 1):
                state, metrics = metatrain_step(config, state, held, mesh=mesh)
                last = iteration == config.iterations
                run.count(metrics)
                if iteration == run.digest_at:
                    run.record(state)
                if first and (iteration % log_every == 0 or last):
                    on_log(run.log(iteration))
                stopped, due = agreed((first and stop(), judge.due(iteration)))
                if iteration % checkpoint_every == 0 or last or stopped or due:
                    whole = gathered(state)
                    if first:
                        save_state(out, whole, header)
                if due and not stopped:
                    stopped = agreed(first and not run.evaluate(judge, state, on_evaluation))
                if stopped and not (last and not agreed(judge.due(iteration))):
                    return None
            weights = run.weights(state)
            if first:
                write_weights(out / WEIGHTS_FILE, weights)
            return weights


def _open_folder(out: Path, resume: bool) -> None:
    """Makes the folder of a new run, or sees that there is a run to resume."""
    if resume:
        saved_run(out)  # before the lock file: a folder without a run stays as it is
    elif (out / METRICS_FILE).exists():
        raise RunError(f"out = {str(out)!r} already holds a run; resume it, or give another folder.")
    else:
        out.mkdir(parents=True, exist_ok=True)


def _mesh(mesh: Mesh | None, config: MetaTrainConfig, sets: int, warn: Callable[[str], None]) -> Mesh | None:
    """As much of the mesh as the tasks fill evenly; a mesh over several processes has to fit as it is."""
    if mesh is None or jax.process_count() > 1:
        return mesh
    fitting = fitting_mesh(mesh, run_groups(config, sets))
    if fitting.size < mesh.size:
        text = f", text_tasks = {config.text_tasks}" if config.text_tasks else ""
        warn(
            f"the tasks of {sets} sets (tasks_per_set = {config.tasks_per_set}, {len(config.networks)} networks{text})"
            f" cannot be spread evenly over {mesh.size} devices; {fitting.size} are used."
        )
    return fitting


def _with_text(
    config: MetaTrainConfig, images: ImageSets, names: tuple[str, ...], source: str | Path | None
) -> tuple[ImageSets | InnerData, dict[str, Any]]:
    """The data of a run, and what the header says of its text."""
    if not config.text_tasks:
        if source is not None:
            raise RunError(f"inner_text = {str(source)!r}: no tasks are on text; give text_tasks, 8 for instance.")
        return images, {}
    if TEXT_SET in names:
        raise RunError(f"sets: an image set is called {TEXT_SET!r}, as the tasks on text are; give it another name.")
    text = default_text(TEXT_MODEL.context) if source is None else read_text(source, TEXT_MODEL.context)
    return InnerData(images, text_classes(text)), {"text_sha256": text.digest}


class _Run:
    """The part of a run that lies between the steps: sums of metrics, times, lines."""

    def __init__(
        self, config: MetaTrainConfig, out: Path, header: dict[str, Any], names: tuple[str, ...], line: dict[str, Any]
    ):
        self._config, self._out, self._header, self._names, self._line = config, out, header, names, line
        self._started = time.monotonic() - line.get("seconds", 0.0)
        self._recent: list[MetaTrainMetrics] = []
        self._timed: tuple[float, int] | None = None

    @property
    def digest_at(self) -> int:
        """The iteration whose theta can be checked by `benchmarks/reproduce_weights.py`."""
        return min(self._header.get("first_iteration", 0) + DIGEST_AFTER, self._config.iterations)

    def record(self, state: MetaTrainState) -> None:
        """Puts the digest of theta into the header, for checkpoints, metrics and weights, if it is its iteration's."""
        if int(state.iteration) == self.digest_at:
            self._header["theta_digest"] = {"iteration": self.digest_at, "sha256": theta_digest(state.theta)}

    def count(self, metrics: MetaTrainMetrics) -> None:
        """Takes in an iteration. The first one compiles, so that speed is counted from its end."""
        self._recent.append(metrics)
        if self._timed is None:
            jax.block_until_ready(metrics)
            self._timed = time.monotonic(), len(self._recent)

    def log(self, iteration: int) -> dict[str, Any]:
        """Writes a line about the iterations since the last one."""
        assert self._timed is not None
        mean = jax.tree.map(lambda *x: np.mean([np.asarray(v) for v in x], axis=0), *self._recent)
        now, (since, before) = time.monotonic(), self._timed
        counted = len(self._recent) - before
        before_this, digest = self._line.get("iteration", 0), self._header.get("theta_digest")
        self._line = {
            "iteration": iteration,
            "meta_loss": dict(zip(self._names, (float(x) for x in mean.tasks.meta_loss), strict=True)),
            "restarted": float(mean.tasks.restarted),
            "gradient_norm": float(mean.gradient_norm),
            "theta_norm": float(mean.theta_norm),
            "seconds": now - self._started,
            "iterations_per_second": counted / (now - since) if counted else None,
        }
        if digest and before_this < digest["iteration"] <= iteration:
            self._line["theta_digest"] = digest
        self._recent, self._timed = [], (now, 0)
        with (self._out / METRICS_FILE).open("a") as file:
            file.write(json.dumps(self._line) + "\n")
        return self._line

    def weights(self, state: MetaTrainState) -> AnyWeights:
        """Theta and where it comes from."""
        facts = self._header | {
            "iterations": int(state.iteration),
            "seconds": time.monotonic() - self._started,
            "final_meta_loss": self._line.get("meta_loss"),
        }
        return LEARNED[self._config.variant].weights(self._config, state.theta, facts | provenance())

    def evaluate(self, judge: Judge, state: MetaTrainState, on_evaluation: Callable[[dict[str, Any]], None]) -> bool:
        """Evaluates the theta of now; False if that was stopped."""
        record = judge.evaluate(int(state.iteration), self.weights(state))
        if self._timed is not None:  # the time of an evaluation is none of the iterations'
            self._timed = (time.monotonic(), len(self._recent))
        if record is not None:
            on_evaluation(record)
        return record is not None


@contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    """Says what a full disk or a folder without permission means for the run."""
    try:
        yield
    except BrokenPipeError:  # of whoever reads what is printed
        raise
    except OSError as error:
        paths = saved_checkpoints(out)
        safe = (
            f"The run is safe up to iteration {int(paths[-1].stem)} ({CHECKPOINT_FOLDER}/{paths[-1].name}): make room"
            " or give permission, then resume."
            if paths
            else "Nothing was written; give another folder."
        )
        where = f" {error.filename}" if error.filename else ""
        raise RunError(f"out = {str(out)!r}: cannot write{where} ({error.strerror or error}). {safe}") from error


def theta_digest(theta: Any) -> str:
    """SHA-256 of the bytes of theta's numbers, leaf after leaf, in hexadecimal."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(theta))).hexdigest()


def data_digest(images: ImageSets) -> str:
    """SHA-256 of the pixels and labels of all sets, in hexadecimal."""
    return hashlib.sha256(np.asarray(images.images).tobytes() + np.asarray(images.labels).tobytes()).hexdigest()


def _first_state(
    config: MetaTrainConfig,
    sets: int,
    start_from: str | None,
    continue_from: str | Path | None,
    header: dict[str, Any],
    warn: Callable[[str], None],
) -> MetaTrainState:
    if continue_from is None:
        state = init_metatrain(config, sets)
        if start_from is not None:
            state = state._replace(theta=_start(config, start_from, state.theta))
        return state
    saved = load_portable(continue_from)
    if saved.iteration >= config.iterations:
        raise RunError(
            f"{continue_from}: {saved.iteration} iterations are done, iterations = {config.iterations}; ask for more."
        )
    if LEARNED[saved.config.variant] is not LEARNED[config.variant]:
        raise RunError(f"{continue_from}: its variant is {saved.config.variant}, asked for {config.variant}.")
    if saved.config.rule != config.rule:
        raise RunError(f"{continue_from}: its rule is {saved.config.rule}, asked for {config.rule}.")
    if any(saved.header.get(name) != header.get(name) for name in ("data_sha256", "text_sha256")):
        warn(f"{continue_from} was made on other data ({', '.join(saved.header['sets'])}); going on with this one.")
    # Other inner tasks than those that the first run began with.
    state = init_metatrain(dataclasses.replace(config, seed=(config.seed + saved.iteration) % 2**31), sets)
    return state._replace(
        iteration=fit_to(state.iteration, np.asarray(saved.iteration, np.int32), str(continue_from)),
        theta=fit_to(state.theta, flax.serialization.to_state_dict(saved.theta), str(continue_from)),
        outer=fit_to(state.outer, saved.outer, str(continue_from)),
    )


def _start(config: MetaTrainConfig, source: str, like: Any) -> Any:
    weights = LEARNED[config.variant].load(config, source)
    if not isinstance(weights, VeloWeights) and [np.shape(x) for x in weights.theta] != [x.shape for x in like]:
        raise RunError(
            f"start_from = {source!r}: {np.shape(weights.theta.b0)[0]} hidden units, the run has {config.hidden}."
        )
    return jax.tree.map(jax.numpy.asarray, weights.theta)


def _resume(
    out: Path, header: dict[str, Any], config: MetaTrainConfig, sets: int, warn: Callable[[str], None]
) -> tuple[MetaTrainState, dict[str, Any], list[str]]:
    """The newest state, the header it was saved with, and the lines of metrics up to it."""
    lines = (out / METRICS_FILE).read_text(errors="replace").splitlines()
    there, here = json.loads(lines[0]), json.loads(json.dumps(header))
    # Fields that came after the run began had their defaults.
    started_with = dataclasses.asdict(config_from(there["config"], str(out / METRICS_FILE)))
    there["config"] = json.loads(json.dumps(started_with))
    # Where a run began matters to nobody once it is under way; it is compared only if it is given again.
    compared = [name for name, value in here.items() if name in ("config", "sets", "data_sha256") or value is not None]
    difference = first_difference({name: there.get(name) for name in compared}, {name: here[name] for name in compared})
    if difference:
        name, old, new = difference
        raise RunError(f"out = {str(out)!r}: made with {name} = {old}, asked for {new}.")
    state, header = restore_state(out, jax.eval_shape(lambda: init_metatrain(config, sets)), warn)
    # The checkpoint has a checksum and the metrics have none.
    saved = json.loads(json.dumps(dataclasses.asdict(config_from(header["config"], str(out / CHECKPOINT_FOLDER)))))
    if difference := first_difference(saved, here["config"], "config."):
        name, old, new = difference
        raise RunError(f"{out / METRICS_FILE}: its header says {name} = {new}, the checkpoint {old}; it is damaged.")
    return state, header, [line for line in lines if _iteration(line) <= int(state.iteration)]


def _iteration(line: str) -> float | int:
    """Of a line of metrics: the header comes before all, a line that a kill cut short after all."""
    try:
        iteration = json.loads(line).get("iteration", 0)
    except (ValueError, AttributeError, RecursionError):
        return float("inf")
    return iteration if isinstance(iteration, int) else float("inf")
