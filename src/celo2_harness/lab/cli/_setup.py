"""From options to a task and an optimizer, with errors fit to print."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from celo2_harness import harness
from celo2_harness.lab.suites import InputError
from celo2_harness.schedules import SCHEDULES
from celo2_harness.sharding import MESH_AXES, make_mesh

# A CPU can be made any number of devices, and JAX would try.
MOST_DEVICES = 4096


@contextmanager
def input_errors() -> Iterator[None]:
    """Turns the error of a wrong argument or a missing extra into an `InputError`, whose message is shown as it is."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(str(error)) from error


def default_learning_rate(preset: str) -> float:
    """Returns the learning rate that a preset is used with where none is given.

    Args:
        preset: The name of a preset.

    Returns:
        Its learning rate.

    Raises:
        InputError: if there is no such preset.
    """
    presets = harness.presets()
    if preset not in presets:
        raise InputError(f"preset = {preset!r}: expected one of {', '.join(presets)}")
    return float(presets[preset].learning_rate)


def course(preset: str, schedule: str, steps: int, warmup: float) -> Callable[[int], Any]:
    """Returns what a learning rate is multiplied by at each step: one throughout for rules that keep their own time."""
    return lambda step: 1.0 if harness.presets()[preset].needs_num_steps else SCHEDULES[schedule](steps, warmup)(step)


def make_optimizer(**arguments: Any) -> optax.GradientTransformation:
    """Returns `harness.build(**arguments)`.

    Args:
        **arguments: Of `harness.build`.

    Returns:
        The optimizer.

    Raises:
        InputError: if an argument is wrong.
    """
    if arguments["learning_rate"] <= 0:
        raise InputError(f"learning_rate = {arguments['learning_rate']}: expected a number above 0")
    if arguments["total_steps"] < 1:
        raise InputError(f"steps = {arguments['total_steps']}: expected at least 1")
    with input_errors():
        return harness.build(**arguments)


def mesh_lengths(text: str) -> dict[str, int]:
    """Reads a `--mesh` option.

    Args:
        text: Lengths of mesh axes, such as data=2,fsdp=4.

    Returns:
        The lengths by name.

    Raises:
        InputError: if the text is no mesh.

    >>> mesh_lengths("data=2,fsdp=4")
    {'data': 2, 'fsdp': 4}
    """
    lengths: dict[str, int] = {}
    for part in text.split(","):
        name, _, length = part.partition("=")
        fits = length.isdecimal() and len(length) <= 4 and int(length) >= 1
        if name not in MESH_AXES or not fits or name in lengths:
            raise InputError(
                f"mesh = {text!r}: expected lengths of the axes {', '.join(MESH_AXES)}, such as data=2,fsdp=4"
            )
        lengths[name] = int(length)
    return lengths


def device_mesh(text: str) -> Mesh:
    """Returns the mesh of a `--mesh` option. If JAX has not run yet, a CPU becomes as many devices as it takes.

    Args:
        text: As for `mesh_lengths`.

    Returns:
        The mesh.

    Raises:
        InputError: if the text is no mesh, or there are too few devices.
    """
    lengths = mesh_lengths(text)
    if math.prod(lengths.values()) > MOST_DEVICES:
        raise InputError(f"mesh = {text!r}: {math.prod(lengths.values())} devices, expected at most {MOST_DEVICES}")
    with suppress(RuntimeError):  # JAX has started, with the devices that it has
        if (places := math.prod(lengths.values())) > 1:
            jax.config.update("jax_num_cpu_devices", places)
    with input_errors():
        return make_mesh(lengths)
