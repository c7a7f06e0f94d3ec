"""What a model, its gradients and an optimizer need on each device of a mesh, without allocating any of it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from celo2_harness.bench.step import with_loss


class Plan(NamedTuple):
    """Bytes per device.

    Attributes:
        parameters: Of the parameters.
        gradients: Of the gradients; the updates take their place.
        state: Of the optimizer state.
        temporaries: Of the update beyond these, as XLA plans them.
    """

    parameters: int
    gradients: int
    state: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def plan_update(tx: optax.GradientTransformation, shapes: Any, mesh: Mapping[str, int]) -> Plan:
    """Plans one update on a mesh of CPU devices, real or simulated (`jax_num_cpu_devices`).

    Every leaf is split over the axis "fsdp" of the mesh along its longest axis that divides; state of a parameter's
    shape is split like the parameter, everything else lies on every device. Over other axes ("data") all is repeated.

    Args:
        tx: The optimizer.
        shapes: Tree of `jax.ShapeDtypeStruct`, the parameters.
        mesh: Length of every mesh axis, by name.

    Returns:
        Bytes per device; temporaries from compiling the update for the mesh.

    Raises:
        ValueError: There are fewer CPU devices than the mesh has places.

    >>> shapes = {"kernel": jax.ShapeDtypeStruct((64, 32), "float32")}
    >>> plan_update(optax.adam(1e-3), shapes, {"fsdp": 1})[:3]
    (8192, 8192, 16388)
    """
    places = math.prod(mesh.values())
    devices = jax.devices("cpu")
    if places > len(devices):
        raise ValueError(
            f"mesh of {places} devices: there are {len(devices)} CPU devices. Simulate more with"
            f" jax.config.update('jax_num_cpu_devices', {places}) before JAX is used."
        )
    automatic = (jax.sharding.AxisType.Auto,) * len(mesh)
    grid = jax.make_mesh(tuple(mesh.values()), tuple(mesh), automatic, devices=devices[:places])
    pieces = mesh.get("fsdp", 1)
    whole = NamedSharding(grid, PartitionSpec())

    def place(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def split(x: Any) -> jax.ShapeDtypeStruct:
        fitting = [axis for axis, n in enumerate(x.shape) if n % pieces == 0]
        if pieces == 1 or not fitting:
            return place(x, whole)
        axis = max(fitting, key=lambda axis: x.shape[axis])
        return place(x, NamedSharding(grid, PartitionSpec(*[None] * axis, "fsdp")))

    params = jax.tree.map(split, shapes)
    # The path of a state leaf ends with the path of the parameter that it belongs to.
    by_path = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}

    def like_parameter(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        ends = (by_path.get(jax.tree_util.keystr(path[start:])) for start in range(len(path)))
        parameter = next((end for end in ends if end is not None), None)
        return place(x, whole if parameter is None or parameter.shape != x.shape else parameter.sharding)

    state = jax.tree_util.tree_map_with_path(like_parameter, jax.eval_shape(tx.init, shapes))
    compiled = jax.jit(with_loss(tx), donate_argnums=(0, 1)).lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes if memory is not None else 0
    return Plan(_bytes(params), _bytes(params), _bytes(state), temporaries)


def _bytes(tree: Any) -> int:
    """Of one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
