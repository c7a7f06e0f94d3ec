"""Optimizers of Optax by name, and any other by import path."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from celo2_harness._types import Params
from celo2_harness.lab.errors import InputError

Schedule = Callable[[Any], Any]
Mask = Callable[[Params], Any]


class OptimizerRow(NamedTuple):
    """An optimizer that a suite can name.

    Attributes:
        description: One line.
        make: (learning rate, a schedule; weight decay; mask of the leaves that decay; further options by name) -> the
            optimizer.
    """

    description: str
    make: Callable[..., optax.GradientTransformation]


def _with_decay(direction: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    """p <- p - eta (direction + weight_decay p): the same decay for all, on the same leaves."""

    def make(learning_rate: Schedule, weight_decay: float, mask: Mask, **options: Any) -> optax.GradientTransformation:
        return optax.chain(
            direction(**options),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    return make


def _adafactor(**options: Any) -> optax.GradientTransformation:
    # Without a learning rate Optax's chain ends with a sign, which `_with_decay` brings again.
    return optax.chain(optax.adafactor(learning_rate=None, **options), optax.scale(-1.0))


def _muon(**options: Any) -> optax.GradientTransformation:
    # At learning rate 1 it is a direction with a sign, as above.
    return optax.chain(optax.contrib.muon(1.0, **options), optax.scale(-1.0))


OPTIMIZERS = {
    "adamw": OptimizerRow("AdamW; betas as optax.adamw", _with_decay(optax.scale_by_adam)),
    "nadamw": OptimizerRow(
        "AdamW with Nesterov momentum", _with_decay(lambda **options: optax.scale_by_adam(nesterov=True, **options))
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
    name: str, learning_rate: Schedule, weight_decay: float, mask: Mask, options: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Makes an optimizer of `OPTIMIZERS`.

    Args:
        name: The row.
        learning_rate: Step -> learning rate.
        weight_decay: Decoupled weight decay.
        mask: Parameters -> tree of booleans: which leaves decay.
        options: Further arguments.

    Returns:
        The optimizer.

    Raises:
        InputError: if there is no such row, or an option is wrong.

    >>> tx = make_optax("sgd", lambda step: 0.1, 0.0, lambda params: True, {"nesterov": True})
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optax = {name!r}: expected one of {', '.join(OPTIMIZERS)}")
    try:
        return OPTIMIZERS[name].make(learning_rate, weight_decay, mask, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"optax = {name!r} with options {dict(options)}: {error}") from None


def make_imported(
    path: str, learning_rate: Schedule, weight_decay: float, total_steps: int, options: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Makes an optimizer by import path.

    Args:
        path: `package.module:function`; the function is called as `function(learning_rate, weight_decay, total_steps,
            **options)`.
        learning_rate: Step -> learning rate.
        weight_decay: Weight decay.
        total_steps: Length of the run.
        options: Further arguments.

    Returns:
        The optimizer.

    Raises:
        InputError: if there is no such function, it refuses its arguments, or it returns something else.
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
