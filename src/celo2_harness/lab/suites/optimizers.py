"""From an optimizer of a suite to an Optax transformation: presets, rows of Optax, and any other by import path."""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from celo2_harness import harness
from celo2_harness._arguments import choose
from celo2_harness._types import Params
from celo2_harness.blocks import guard_updates
from celo2_harness.lab.errors import InputError, input_errors
from celo2_harness.lab.suites.suite import Suite, SuiteOptimizer
from celo2_harness.lab.training.optimizers import OptimizerSpec, preset_spec, with_average_tail
from celo2_harness.routing import route
from celo2_harness.schedules import SCHEDULES, scaled

Schedule = Callable[[Any], Any]
Mask = Callable[[Params], Any]
# What a suite says elsewhere.
_RESERVED = ("preset", "learning_rate", "total_steps", "weight_decay", "schedule", "warmup", "weights")


class OptimizerRow(NamedTuple):
    """An optimizer that a suite can name.

    Attributes:
        description: One line.
        make: Makes the optimizer of a learning rate, which is a schedule, a weight decay, the length of the run, a mask
            of the leaves that decay, and further options by name.
        schedule: The schedule that it has in every suite; None for that of the suite.
        eval_params: As in `OptimizerSpec`.
    """

    description: str
    make: Callable[..., optax.GradientTransformation]
    schedule: str | None = None
    eval_params: Callable[[Any, Any], Any] | None = None


def _decayed(
    direction: optax.GradientTransformation, learning_rate: Schedule, weight_decay: float, mask: Mask
) -> optax.GradientTransformation:
    """p <- p - eta (direction + weight_decay p): the same decay for all, on the same leaves."""
    decay = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(direction, decay, optax.scale_by_learning_rate(learning_rate))


def _with_decay(direction: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    """`make` of a row whose direction does not depend on the length of the run."""

    def make(
        learning_rate: Schedule, weight_decay: float, total_steps: int, mask: Mask, **options: Any
    ) -> optax.GradientTransformation:
        del total_steps
        return _decayed(direction(**options), learning_rate, weight_decay, mask)

    return make


def _adafactor(**options: Any) -> optax.GradientTransformation:
    # Without a learning rate Optax's chain ends with a sign, which `_with_decay` brings again.
    return optax.chain(optax.adafactor(learning_rate=None, **options), optax.scale(-1.0))


def _muon(**options: Any) -> optax.GradientTransformation:
    # At learning rate 1 it is a direction with a sign, as above.
    return optax.chain(optax.contrib.muon(1.0, **options), optax.scale(-1.0))


def _ademamix(
    learning_rate: Schedule,
    weight_decay: float,
    total_steps: int,
    mask: Mask,
    *,
    b1: float = 0.9,
    b3: float = 0.999,
    alpha: float = 5.0,
    **options: Any,
) -> optax.GradientTransformation:
    """The weight of the slow average grows over the whole run, and so does its time scale, as in the paper."""

    def slow_decay(count: Any) -> Any:
        part = jnp.minimum(count / total_steps, 1.0)
        return jnp.exp(1.0 / ((1.0 - part) / math.log(b1) + part / math.log(b3)))

    weight = optax.linear_schedule(0.0, alpha, total_steps)
    direction = optax.contrib.scale_by_ademamix(b1=b1, b3=slow_decay, alpha=weight, **options)
    return _decayed(direction, learning_rate, weight_decay, mask)


def _schedule_free_adamw(
    learning_rate: Schedule,
    weight_decay: float,
    total_steps: int,
    mask: Mask,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """`optax.contrib.schedule_free_adamw`, which takes no mask."""
    del total_steps
    direction = optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)
    inner = _decayed(direction, learning_rate, weight_decay, mask)
    return optax.contrib.schedule_free(inner, learning_rate, b1=b1)


def _schedule_free_params(state: Any, params: Params) -> Params:
    """The average of a Schedule-Free optimizer, at any depth of a state."""
    is_found = lambda node: isinstance(node, optax.contrib.ScheduleFreeState)
    (found,) = filter(is_found, jax.tree.leaves(state, is_leaf=is_found))
    return optax.contrib.schedule_free_eval_params(found, params)


OPTIMIZERS = {
    "adamw": OptimizerRow("AdamW; betas as optax.adamw", _with_decay(optax.scale_by_adam)),
    "nadamw": OptimizerRow(
        "AdamW with Nesterov momentum", _with_decay(lambda **options: optax.scale_by_adam(nesterov=True, **options))
    ),
    "ademamix": OptimizerRow(
        "AdamW with a second, slow momentum (b3 = 0.999) that grows in over the run, arXiv 2409.03137", _ademamix
    ),
    "schedule_free_adamw": OptimizerRow(
        "AdamW at a constant learning rate after a warm-up, evaluated at the average of its parameters,"
        " arXiv 2405.15682",
        _schedule_free_adamw,
        schedule="warmup_constant",
        eval_params=_schedule_free_params,
    ),
    "sgd": OptimizerRow(
        "SGD with momentum 0.9", _with_decay(lambda decay=0.9, **options: optax.trace(decay, **options))
    ),
    "adafactor": OptimizerRow("Adafactor; steps relative to the parameters' scale", _with_decay(_adafactor)),
    "lion": OptimizerRow("Lion; wants a tenth of AdamW's learning rate", _with_decay(optax.scale_by_lion)),
    "muon": OptimizerRow(
        "Muon as in Optax: every matrix, embeddings and heads too; Adam for the rest", _with_decay(_muon)
    ),
}


def make_optax(
    name: str,
    learning_rate: Schedule,
    weight_decay: float,
    total_steps: int,
    mask: Mask,
    options: Mapping[str, Any],
) -> optax.GradientTransformation:
    """Makes an optimizer of `OPTIMIZERS`.

    Args:
        name: The row.
        learning_rate: The learning rate at a step.
        weight_decay: The decoupled weight decay.
        total_steps: The length of the run.
        mask: Which leaves of the parameters decay, as a tree of booleans.
        options: Further arguments.

    Returns:
        The optimizer.

    Raises:
        InputError: If there is no such row, or an option is wrong.

    Example:
        >>> tx = make_optax("sgd", lambda step: 0.1, 0.0, 100, lambda params: True, {"nesterov": True})
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optax = {name!r}: expected one of {', '.join(OPTIMIZERS)}")
    try:
        return OPTIMIZERS[name].make(learning_rate, weight_decay, total_steps, mask, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"optax = {name!r} with options {dict(options)}: {error}") from None


def make_imported(
    path: str, learning_rate: Schedule, weight_decay: float, total_steps: int, options: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Makes an optimizer by import path.

    Args:
        path: The path `package.module:function`; the function is called as `function(learning_rate, weight_decay,
            total_steps, **options)`.
        learning_rate: The learning rate at a step.
        weight_decay: The weight decay.
        total_steps: The length of the run.
        options: Further arguments.

    Returns:
        The optimizer.

    Raises:
        InputError: If there is no such function, it refuses its arguments, or it returns something else.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise InputError(f"make = {path!r}: expected an import path such as mypackage.mymodule:make")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"make = {path!r}: {error}; the module must be installed or in the folder that the command is started from"
        ) from None
    try:
        tx = function(learning_rate, weight_decay, total_steps, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"make = {path!r} refuses its arguments: {error}") from None
    if not isinstance(tx, optax.GradientTransformation):
        raise InputError(f"make = {path!r} returned a {type(tx).__name__}: expected an optax.GradientTransformation")
    return tx


def make_spec(
    suite: Suite, optimizer: SuiteOptimizer, learning_rate: float, weight_decay: float, steps: int
) -> OptimizerSpec:
    """Makes an optimizer of a suite at one point of the search.

    Args:
        suite: The suite, for its schedule.
        optimizer: The optimizer.
        learning_rate: The peak learning rate.
        weight_decay: The weight decay of hidden matrices; the same leaves decay under every optimizer that a suite can
            name.
        steps: The length of the run.

    Returns:
        The optimizer with its settings.

    Raises:
        InputError: If something in the suite does not fit.
    """
    shared = {"total_steps": steps, "weight_decay": weight_decay, "schedule": suite.schedule, "warmup": suite.warmup}
    options = dict(optimizer.options)
    if optimizer.preset is not None:
        known = [name for name in inspect.signature(harness.build).parameters if name not in _RESERVED]
        if unknown := [name for name in options if name not in known]:
            expected = f"there is none; expected some of {', '.join(known)}"
            raise InputError(f"{optimizer.label}: options.{unknown[0]}: {expected}")
        spec = preset_spec(
            optimizer.preset, learning_rate, weights=optimizer.weights, name=optimizer.label, **shared, **options
        )
    else:
        row = OPTIMIZERS.get(optimizer.name) if optimizer.kind == "optax" else None
        if row is not None and row.schedule is not None:
            shared["schedule"] = row.schedule
        with input_errors():
            shape = choose(shared["schedule"], SCHEDULES, "schedule")(steps, suite.warmup)
        schedule: Any = scaled(learning_rate, shape)
        if optimizer.optax is not None:
            tx = make_optax(optimizer.optax, schedule, weight_decay, steps, _is_hidden, options)
        else:
            tx = make_imported(optimizer.name, schedule, weight_decay, steps, options)
        settings = {optimizer.kind: optimizer.name, "learning_rate": learning_rate, **shared}
        settings |= {"options": options} if options else {}
        spec = OptimizerSpec(optimizer.label, tx, schedule, settings, None if row is None else row.eval_params)
    if optimizer.guard is not None:
        with input_errors():
            guarded = guard_updates(spec.tx, **optimizer.guard)
        spec = spec._replace(tx=guarded, settings={**spec.settings, "guard": dict(optimizer.guard)})
    if optimizer.average_tail is not None:
        spec = with_average_tail(spec, steps, optimizer.average_tail)
    return spec


def _is_hidden(params: Params) -> Any:
    """Returns which leaves decay: those that presets call hidden."""
    return jax.tree.map(lambda found: harness.group_of(found) == "hidden", route(params))
