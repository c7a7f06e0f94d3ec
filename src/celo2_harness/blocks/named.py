"""The blocks by name, those of installed packages too: what a configuration file can ask for."""

from collections.abc import Callable
from typing import Any

import optax

from celo2_harness import plugins
from celo2_harness.blocks.celo2 import scale_by_celo2
from celo2_harness.blocks.decay import add_decayed_weights
from celo2_harness.blocks.direction import celo2_direction
from celo2_harness.blocks.guard import guard_updates
from celo2_harness.blocks.orthogonalize import orthogonalize
from celo2_harness.blocks.rms import normalize_rms
from celo2_harness.blocks.shape import scale_by_shape

BLOCKS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "celo2_direction": celo2_direction,
    "orthogonalize": orthogonalize,
    "normalize_rms": normalize_rms,
    "scale_by_celo2": scale_by_celo2,
    "scale_by_shape": scale_by_shape,
    "add_decayed_weights": add_decayed_weights,
    "guard_updates": guard_updates,
}


def make_block(name: str, /, *arguments: Any, **options: Any) -> optax.GradientTransformation:
    """A block by its name.

    Args:
      name: out of `BLOCKS`, or of an installed package (entry-point group "celo2_harness.blocks").
      *arguments: of the block.
      **options: of the block.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ValueError: no such block, or one that is broken.

    Example:
      >>> tx = make_block("normalize_rms", mode="clip")
    """
    block = BLOCKS.get(name) or plugins.load_plugin("blocks", name, require_block)
    if block is None:
        known = (*BLOCKS, *plugins.plugin_names("blocks"))
        raise ValueError(f"block {name!r}: expected one of {', '.join(known)}.")
    made = block(*arguments, **options)
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(f"block {name!r} made a {type(made).__name__}, expected an optax.GradientTransformation.")
    return made


def require_block(value: Any) -> Callable[..., optax.GradientTransformation]:
    """The value, if it can be called; the check of plug-ins."""
    if not callable(value):
        raise TypeError(f"got a {type(value).__name__}.")
    made: Callable[..., Any] = value
    return made
