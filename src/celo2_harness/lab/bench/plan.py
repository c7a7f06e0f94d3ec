"""What a model, its gradients and an optimizer need on each device of a mesh, without allocating any of it."""

import math
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from celo2_harness.lab.bench.collectives import find_collectives
from celo2_harness.lab.bench.step import with_loss
from celo2_harness.sharding import parameter_shardings, state_shardings


class Plan(NamedTuple):
    """Bytes per device, and what the update sends.

    Attributes:
        parameters: Of the parameters.
        gradients: Of the gradients; the updates take their place.
        state: Of the optimizer state.
        temporaries: Of the update beyond these, as XLA plans them.
        collectives: How many the update has, those of all branches.
        sent: What one device puts into them.
    """

    parameters: int
    gradients: int
    state: int
    temporaries: int
    collectives: int
    sent: int

    @property
    def total(self) -> int:
        """Bytes of parameters, gradients, state and temporaries."""
        return sum(self[:4])


def plan_update(tx: optax.GradientTransformation, shapes: Any, mesh: Mesh) -> Plan:
    """Plans one update on a mesh.

    Parameters and gradients lie as `parameter_shardings` says, state as `state_shardings` does.

    Args:
        tx: The optimizer; one of `harness.build` should have `sharding=mesh`.
        shapes: Tree of `jax.ShapeDtypeStruct`, the parameters.
        mesh: Of real or simulated devices (`jax_num_cpu_devices`), see `celo2_harness.sharding.make_mesh`.

    Returns:
        Bytes per device; temporaries and collectives from compiling the update for the mesh.

    >>> from celo2_harness.sharding import make_mesh
    >>> shapes = {"kernel": jax.ShapeDtypeStruct((64, 32), "float32")}
    >>> plan_update(optax.adam(1e-3), shapes, make_mesh({"fsdp": 1}))[:3]
    (8192, 8192, 16388)
    """
    places = parameter_shardings(shapes, mesh)
    params = jax.tree.map(_placed, shapes, places)
    state_places = state_shardings(tx, shapes, places)
    state = jax.tree.map(_placed, jax.eval_shape(tx.init, shapes), state_places)
    update = jax.jit(with_loss(tx), donate_argnums=(0, 1), out_shardings=(places, state_places))
    compiled = update.lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes if memory is not None else 0
    collectives = find_collectives(compiled.as_text() or "")
    return Plan(
        parameters=_bytes(params),
        gradients=_bytes(params),
        state=_bytes(state),
        temporaries=temporaries,
        collectives=len(collectives),
        sent=sum(collective.operand_bytes for collective in collectives),
    )


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _bytes(tree: Any) -> int:
    """Of one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
