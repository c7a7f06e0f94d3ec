"""Optimizers of runs: what is trained with, the schedule that it was given, and the settings that tell it apart."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from celo2_harness import harness
from celo2_harness.lab.errors import input_errors
from celo2_harness.presets import find_preset, preset_weights


class OptimizerSpec(NamedTuple):
    """An optimizer at a learning rate, ready to train with.

    Attributes:
        name: What tables call it.
        tx: The optimizer.
        schedule: The learning rate at a step: what the optimizer was given, to be written down.
        settings: What determines the optimizer, as JSON can hold it. Runs are told apart by it. It holds a
            "learning_rate", the peak.
    """

    name: str
    tx: optax.GradientTransformation
    schedule: Callable[[int], Any]
    settings: Mapping[str, Any]


def preset_spec(
    preset: str,
    learning_rate: float | int | None = None,
    *,
    total_steps: int,
    weight_decay: float | int = 0.0,
    schedule: str = "warmup_cosine",
    warmup: float | int = 0.05,
    weights: Any = None,
    name: str | None = None,
    sharding: Any = None,
    **options: Any,
) -> OptimizerSpec:
    """Makes an optimizer of a preset.

    Args:
        preset: The name of the preset.
        learning_rate: The peak learning rate; by default the preset's.
        total_steps: The length of the run.
        weight_decay: The weight decay of hidden matrices.
        schedule: The name of the schedule.
        warmup: The warm-up of the schedule.
        weights: The weights of the learned rule, as `harness.build` takes them.
        name: What tables call it; by default the preset.
        sharding: How parameters lie on a mesh of devices. It changes no setting, since numbers stay the same.
        **options: Further arguments of `harness.build`.

    Returns:
        The optimizer.

    Raises:
        InputError: If `harness.build` refuses an argument.
    """
    shared = {"total_steps": total_steps, "schedule": schedule, "warmup": warmup}
    with input_errors():
        recipe = find_preset(preset)
        rate = recipe.learning_rate if learning_rate is None else learning_rate
        # One schedule: it is handed to the optimizer, and written down.
        learning_rates = harness.learning_rate_schedule(recipe, rate, **shared)
        loaded = preset_weights(recipe, weights)
        tx = harness.build(
            recipe,
            learning_rates,
            total_steps,
            weight_decay=weight_decay,
            weights=loaded,
            sharding=sharding,
            **options,
        )
    settings = {"preset": preset, "learning_rate": float(rate), "weight_decay": weight_decay, **shared}
    if loaded is not None:
        settings |= {"weights": _weights_name(weights or recipe.weights), "weights_sha256": weights_digest(loaded)}
    settings |= {"options": options} if options else {}
    return OptimizerSpec(name or preset, tx, learning_rates, settings)


def weights_digest(weights: Any) -> str:
    """Returns sixteen hexadecimal digits of the numbers of weights, since a name may change its meaning."""
    leaves = jax.tree.leaves(weights.theta)
    digest = hashlib.sha256(b"".join(np.asarray(leaf, np.float32).tobytes() for leaf in leaves))
    return digest.hexdigest()[:16]


def _weights_name(weights: Any) -> str:
    # Not the whole path: a run is the same run in another folder.
    return Path(weights).name if isinstance(weights, str) else "given"
