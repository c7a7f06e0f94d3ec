"""The outer loop, as a generator: it computes, and whoever iterates decides what to save, show and stop."""

import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.data import MetaTrainData
from celo2_harness.lab.metatrain.outer import MetaTrainMetrics, MetaTrainState, metatrain_step, place_data, place_state
from celo2_harness.lab.training.folder import Progress

DIGEST_AFTER = 100
"""The iteration (or the last one, if that is sooner) whose theta has its SHA-256 written down."""


def metatrain(
    config: MetaTrainConfig,
    data: MetaTrainData,
    state: MetaTrainState,
    *,
    log_every: int = 10,
    mesh: Mesh | None = None,
) -> Iterator[Progress]:
    """Meta-trains from a state to the end of the recipe.

    A state from a checkpoint goes on, on as many devices, to the bits of a run that was never stopped.

    Args:
        config: The recipe.
        data: The data that the tasks sample from.
        state: The state to start from; its arrays are given away.
        log_every: The number of iterations that a line of metrics is the mean of.
        mesh: The devices that the tasks are spread over, from `task_mesh`. Their number changes the rounding of the
            result and nothing else.

    Yields:
        A `Progress` where the run starts and after every iteration. Lines of metrics have the meta-loss of every data
        set, the share of restarted tasks, and the norms of the meta-gradient and of theta; one line has the digest.
    """
    inner = data.inner
    if mesh is not None:
        state, inner = place_state(state, mesh), place_data(inner, mesh)
    iteration, recent, text = int(state.iteration), [], ""
    yield Progress(iteration, state)
    while iteration < config.iterations:
        state, metrics = metatrain_step(config, state, inner, mesh=mesh)
        iteration, lines = iteration + 1, []
        recent.append(metrics)
        if iteration % log_every == 0 or iteration == config.iterations:
            lines.append(_means(recent, data.names))
            text = "  ".join(f"{name} {loss:.3f}" for name, loss in lines[0]["meta_loss"].items())
            recent = []
        if iteration == min(DIGEST_AFTER, config.iterations):
            lines.append({"kind": "digest", "theta_sha256": theta_digest(state.theta)})
        yield Progress(iteration, state, tuple(lines), text=lambda text=text: text)


def theta_digest(theta: Any) -> str:
    """Returns the SHA-256 of the bytes of theta's numbers, leaf after leaf, in hexadecimal."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(theta))).hexdigest()


def _means(recent: list[MetaTrainMetrics], names: tuple[str, ...]) -> dict[str, Any]:
    mean = jax.tree.map(lambda *x: np.mean([np.asarray(v) for v in x], axis=0), *recent)
    return {
        "meta_loss": dict(zip(names, map(float, mean.tasks.meta_loss), strict=True)),
        "restarted": float(mean.tasks.restarted),
        "gradient_norm": float(mean.gradient_norm),
        "theta_norm": float(mean.theta_norm),
    }
