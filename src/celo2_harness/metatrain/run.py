"""A meta-training run on disk: metrics as JSON lines, checkpoints, and the weights file at the end."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np

from celo2_harness._version import __version__
from celo2_harness.metatrain.config import MetaTrainConfig
from celo2_harness.metatrain.outer import MetaTrainMetrics, MetaTrainState, init_metatrain, metatrain_step
from celo2_harness.rule import Theta, Weights, load_weights, save_weights
from celo2_harness.tasks.images import load_image_sets

METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "checkpoint.msgpack"
WEIGHTS_FILE = "weights.celo2"


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


def run_metatrain(
    config: MetaTrainConfig,
    data: str,
    out: str | Path,
    *,
    sets: tuple[str, ...] = (),
    start_from: str | None = None,
    resume: bool = False,
    checkpoint_every: int = 100,
    log_every: int = 10,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Weights | None:
    """Meta-trains a rule and writes it to `out`.

    Args:
      config: the run.
      data: "digits", or a folder of 8x8 image sets (see `load_image_sets`).
      out: folder for `metrics.jsonl`, `checkpoint.msgpack` and `weights.celo2`.
      sets: names of the image sets; empty for all of the folder.
      start_from: weights to begin with (see `load_weights`), of the configuration of `config`; None: random ones.
      resume: go on from the folder's checkpoint.
      checkpoint_every: iterations between checkpoints.
      log_every: iterations between lines of metrics (means over them).
      on_log: called with every line of metrics.
      stop: asked after every iteration; True saves a checkpoint and returns.

    Returns:
      The weights, or None if stopped before the end.

    Raises:
      DataError: unusable data.
      RunError: the folder holds a run (without `resume`), none (with it), or a run of another config or data.
    """
    images, names = load_image_sets(data, sets)
    out = Path(out)
    header = {
        "config": dataclasses.asdict(config),
        "start_from": start_from,
        "sets": list(names),
        "data_sha256": hashlib.sha256(
            np.asarray(images.images).tobytes() + np.asarray(images.labels).tobytes()
        ).hexdigest(),
    }
    state = init_metatrain(config, len(names))
    if start_from is not None:
        state = state._replace(theta=_start(config, start_from, state.theta))
    lines: list[str] = []
    if resume:
        state, lines = _restore(out, header, state)
    else:
        if (out / METRICS_FILE).exists():
            raise RunError(f"out = {str(out)!r} already holds a run; resume it, or give another folder.")
        out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(header | {"versions": {"celo2_harness": __version__, "jax": jax.__version__}})]
    _write(out / METRICS_FILE, "".join(line + "\n" for line in lines).encode())

    seconds = json.loads(lines[-1]).get("seconds", 0.0)
    started = logged = time.monotonic()
    recent: list[MetaTrainMetrics] = []
    with (out / METRICS_FILE).open("a") as metrics_file:
        for iteration in range(int(state.iteration) + 1, config.iterations + 1):
            state, metrics = metatrain_step(config, state, images)
            recent.append(metrics)
            last = iteration == config.iterations
            if iteration % log_every == 0 or last:
                now = time.monotonic()
                line = _summary(iteration, recent, names)
                line |= {"seconds": seconds + now - started, "iterations_per_second": len(recent) / (now - logged)}
                recent, logged = [], now
                metrics_file.write(json.dumps(line) + "\n")
                metrics_file.flush()
                if on_log is not None:
                    on_log(line)
            interrupted = stop()
            if iteration % checkpoint_every == 0 or last or interrupted:
                saved = jax.tree.map(np.asarray, flax.serialization.to_state_dict(state))
                content = flax.serialization.msgpack_serialize({"header": json.dumps(header), "state": saved})
                _write(out / CHECKPOINT_FILE, content)
            if interrupted and not last:
                return None
    provenance = header | {
        "iterations": config.iterations,
        "seconds": seconds + time.monotonic() - started,
        "final_meta_loss": json.loads((out / METRICS_FILE).read_text().splitlines()[-1])["meta_loss"],
    }
    weights = Weights(Theta(*map(np.asarray, state.theta)), config.rule, provenance)
    save_weights(out / WEIGHTS_FILE, weights)
    return weights


def _start(config: MetaTrainConfig, source: str, like: Theta) -> Theta:
    weights = load_weights(source, expect=config.rule)
    if [np.shape(x) for x in weights.theta] != [x.shape for x in like]:
        raise RunError(
            f"start_from = {source!r}: {np.shape(weights.theta.b0)[0]} hidden units, the run has {config.hidden}."
        )
    return Theta(*(jax.numpy.asarray(x) for x in weights.theta))


def _summary(iteration: int, recent: list[MetaTrainMetrics], names: tuple[str, ...]) -> dict[str, Any]:
    mean = jax.tree.map(lambda *x: np.mean([np.asarray(v) for v in x], axis=0), *recent)
    return {
        "iteration": iteration,
        "meta_loss": dict(zip(names, (float(x) for x in mean.tasks.meta_loss), strict=True)),
        "restarted": float(mean.tasks.restarted),
        "gradient_norm": float(mean.gradient_norm),
        "theta_norm": float(mean.theta_norm),
    }


def _restore(out: Path, header: dict[str, Any], like: MetaTrainState) -> tuple[MetaTrainState, list[str]]:
    """The checkpoint, and the lines of metrics up to it."""
    try:
        content: Any = flax.serialization.msgpack_restore((out / CHECKPOINT_FILE).read_bytes())
        saved = json.loads(content["header"])
        lines = (out / METRICS_FILE).read_text().splitlines()
    except FileNotFoundError as error:
        raise RunError(
            f"out = {str(out)!r}: nothing to resume ({Path(str(error.filename)).name} is missing)."
        ) from None
    except Exception as error:
        raise RunError(
            f"out = {str(out)!r}: the checkpoint cannot be read ({type(error).__name__}: {error})."
        ) from None
    expected = json.loads(json.dumps(header))
    for name, value in expected.items():
        if saved.get(name) != value:
            raise RunError(f"out = {str(out)!r}: made with {name} = {saved.get(name)}, asked for {value}.")
    state = flax.serialization.from_state_dict(like, content["state"])
    state = jax.tree.map(jax.numpy.asarray, state)
    return state, [line for line in lines if _iteration(line) <= int(state.iteration)]


def _iteration(line: str) -> float | int:
    """Of a line of metrics: the header comes before all, a line that a kill cut short after all."""
    try:
        return json.loads(line).get("iteration", 0)
    except json.JSONDecodeError:
        return float("inf")


def _write(path: Path, content: bytes) -> None:
    """Replaces a file in one step, so that a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
