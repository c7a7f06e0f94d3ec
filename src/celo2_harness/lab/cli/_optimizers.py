"""From an optimizer of a suite to an Optax transformation: the only place that knows presets and suites."""

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from celo2_harness import harness
from celo2_harness._types import Params
from celo2_harness.blocks import guard_updates
from celo2_harness.lab.cli._setup import default_learning_rate, input_errors, make_optimizer
from celo2_harness.lab.suites import Contender, InputError, Suite, SuiteOptimizer, make_imported, make_optax
from celo2_harness.routing import route
from celo2_harness.schedules import SCHEDULES

# What a suite says elsewhere.
_RESERVED = ("preset", "learning_rate", "total_steps", "weight_decay", "schedule", "warmup", "weights")


def make_contender(
    suite: Suite, optimizer: SuiteOptimizer, learning_rate: float, weight_decay: float, steps: int
) -> Contender:
    """Makes an optimizer of a suite at one point of the search.

    Args:
        suite: For the schedule.
        optimizer: What to make.
        learning_rate: The peak.
        weight_decay: Of hidden matrices; the same leaves decay under every optimizer that a suite can name.
        steps: Length of the run.

    Returns:
        The optimizer with its settings.

    Raises:
        InputError: if something in the suite does not fit.
    """
    if suite.schedule not in SCHEDULES:
        raise InputError(f"schedule = {suite.schedule!r}: expected one of {', '.join(SCHEDULES)}")
    shared = {
        "learning_rate": learning_rate,
        "total_steps": steps,
        "weight_decay": weight_decay,
        "schedule": suite.schedule,
        "warmup": suite.warmup,
    }
    with input_errors():
        shape = SCHEDULES[suite.schedule](steps, suite.warmup)
    schedule = lambda step: learning_rate * shape(step)
    settings = {optimizer.kind: optimizer.name, **shared}
    if optimizer.kind == "preset":
        default_learning_rate(optimizer.name)  # refuses a preset that there is not
        _check_options(optimizer)
        tx = make_optimizer(preset=optimizer.name, weights=optimizer.weights, **shared, **optimizer.options)
        settings |= _weights(optimizer)
    elif optimizer.kind == "optax":
        tx = make_optax(optimizer.name, schedule, weight_decay, _hidden, optimizer.options)
    else:
        tx = make_imported(optimizer.name, schedule, weight_decay, steps, optimizer.options)
    if optimizer.options:
        settings["options"] = dict(optimizer.options)
    if optimizer.guard is not None:
        with input_errors():
            tx = guard_updates(tx, **optimizer.guard)
        settings["guard"] = dict(optimizer.guard)
    return Contender(optimizer.label, learning_rate, tx, settings)


def _check_options(optimizer: SuiteOptimizer) -> None:
    known = [name for name in inspect.signature(harness.build).parameters if name not in _RESERVED]
    for name in optimizer.options:
        if name not in known:
            raise InputError(f"{optimizer.label}: options.{name}: there is none; expected some of {', '.join(known)}")


def _weights(optimizer: SuiteOptimizer) -> Mapping[str, Any]:
    """Which weights a preset has: their name, and a digest of the numbers, since a name may change its meaning."""
    preset = harness.presets()[optimizer.name]
    with input_errors():
        weights = harness.preset_weights(preset, optimizer.weights)
    if weights is None:
        return {}
    leaves = jax.tree.leaves(weights.theta)
    digest = hashlib.sha256(b"".join(np.asarray(leaf, np.float32).tobytes() for leaf in leaves))
    # Not the whole path: a run is the same run in another folder.
    return {"weights": Path(optimizer.weights or str(preset.weights)).name, "weights_sha256": digest.hexdigest()[:16]}


def _hidden(params: Params) -> Any:
    """Which leaves decay: those that presets call hidden."""
    return jax.tree.map(lambda found: harness.group_of(found) == "hidden", route(params))
