"""Devices that a command asks for."""

import math
from contextlib import suppress

import jax
from jax.sharding import Mesh

from celo2_harness.lab.errors import InputError, input_errors
from celo2_harness.sharding import MESH_AXES, make_mesh

# A CPU can be made any number of devices, and JAX would try.
MOST_DEVICES = 4096


def mesh_lengths(text: str) -> dict[str, int]:
    """Reads a `--mesh` option.

    Args:
        text: Lengths of mesh axes, such as data=2,fsdp=4.

    Returns:
        The lengths by name.

    Raises:
        InputError: If the text is no mesh.

    Example:
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
        InputError: If the text is no mesh, or there are too few devices.
    """
    lengths = mesh_lengths(text)
    devices = math.prod(lengths.values())
    if devices > MOST_DEVICES:
        raise InputError(f"mesh = {text!r}: {devices} devices, expected at most {MOST_DEVICES}")
    with suppress(RuntimeError):  # JAX has started, with the devices that it has
        if devices > 1:
            jax.config.update("jax_num_cpu_devices", devices)
    with input_errors():
        return make_mesh(lengths)
