"""Optimizers of runs: what is trained with, the schedule that it was given, and the settings that tell it apart."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from celo2_harness import harness
from celo2_harness.blocks import average_tail, averaged_params
from celo2_harness.lab.errors import InputError, check_range, input_errors
from celo2_harness.presets import find_preset, preset_weights


class OptimizerSpec(NamedTuple):
    """An optimizer at a learning rate, ready to train with.

    Attributes:
        name: The name in tables.
        tx: The optimizer.
        schedule: The learning rate at a step: what the optimizer was given, to be written down.
        settings: The settings that determine the optimizer, as JSON can hold them. Runs are told apart by them. They
            hold a "learning_rate", the peak.
        eval_params: From the optimizer's state and the parameters to those that are evaluated, as `averaged_params`;
            None for the parameters themselves.
    """

    name: str
    tx: optax.GradientTransformation
    schedule: Callable[[int], Any]
    settings: Mapping[str, Any]
    eval_params: Callable[[Any, Any], Any] | None = None


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
        name: The name in tables; by default the preset.
        sharding: The mesh of devices that parameters lie on. It changes no setting, since numbers stay the same.
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


@dataclasses.dataclass(frozen=True)
class AverageTail:
    """The average of the last parameters that a run is evaluated at: (1 - weight) W + weight A.

    Attributes:
        start: Part of the run after which `average_tail` begins.
        horizon: Part of the run that the average reaches back.
        weight: Weight of the average.
    """

    start: float = 0.7
    horizon: float = 0.05
    weight: float = 0.6

    def __post_init__(self):
        check_range(0, 1, **vars(self))


def with_average_tail(spec: OptimizerSpec, total_steps: int, average: AverageTail = AverageTail()) -> OptimizerSpec:
    """Makes the same optimizer evaluated at the average of its last parameters.

    Args:
        spec: The optimizer.
        total_steps: The length of the run.
        average: The settings of the average.

    Returns:
        The optimizer with `average_tail` as its last link. The steps are the same; the settings say what is evaluated.

    Raises:
        InputError: If it is evaluated at an average of its own.

    Example:
        >>> spec = with_average_tail(preset_spec("adamw", total_steps=100), 100, AverageTail(start=0.5))
        >>> spec.settings["average_tail"]
        {'start': 0.5, 'horizon': 0.05, 'weight': 0.6}
    """
    if spec.eval_params is not None:
        raise InputError(f"average_tail: {spec.name} is evaluated at an average of its own; leave it out")
    return spec._replace(
        tx=optax.chain(spec.tx, average_tail(average.start, average.horizon, total_steps=total_steps)),
        settings={**spec.settings, "average_tail": dataclasses.asdict(average)},
        eval_params=functools.partial(averaged_params, weight=average.weight),
    )


def weights_digest(weights: Any) -> str:
    """Returns sixteen hexadecimal digits of numbers and configuration of weights; a name may change its meaning."""
    digest = hashlib.sha256(repr(weights.config).encode())
    for leaf in jax.tree.leaves(weights.theta):
        digest.update(np.asarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:16]


def _weights_name(weights: Any) -> str:
    # Not the whole path: a run is the same run in another folder.
    return Path(weights).name if isinstance(weights, str) else "given"
