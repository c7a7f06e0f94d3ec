"""What an update needs on each device of a mesh, by formula: nothing is compiled, and no device has to be there."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, NamedSharding

from celo2_harness.blocks import Celo2State
from celo2_harness.blocks.direction import moment_shardings
from celo2_harness.blocks.orthogonalize import LARGEST_STACKED
from celo2_harness.blocks.spread import plan_rounds
from celo2_harness.blocks.views import matrix_views
from celo2_harness.routing import route
from celo2_harness.sharding import like_parameters, parameter_shardings

# Presets whose hidden matrices are orthogonalised.
ORTHOGONAL = ("celo2_ortho", "celo2_muon", "muon")


class Estimate(NamedTuple):
    """Per device.

    Attributes:
        parameters: Bytes of the parameters.
        gradients: Bytes of the gradients.
        state: Bytes of the optimizer state.
        collectives: How many the orthogonalisation takes.
        sent: Bytes that a device puts into them.
        matrices: Matrices that the busiest device orthogonalises, paddings included.
    """

    parameters: int
    gradients: int
    state: int
    collectives: int
    sent: int
    matrices: int

    @property
    def total(self) -> int:
        """Bytes of parameters, gradients and state."""
        return sum(self[:3])


def estimate_update(
    tx: optax.GradientTransformation, shapes: Any, lengths: Mapping[str, int], *, orthogonalized: bool = False
) -> Estimate:
    """Estimates one update of an optimizer as it would be with `harness.build(..., sharding=mesh)`.

    The all-reduces of the statistics are not in it: a handful per leaf, of some hundred numbers and at most twice the
    length of an unsplit axis.

    Args:
        tx: The optimizer, built without a mesh.
        shapes: Tree of `jax.ShapeDtypeStruct`, the parameters.
        lengths: Of the mesh axes, out of `celo2_harness.sharding.MESH_AXES`, by name.
        orthogonalized: Whether its hidden matrices are, as in the presets `ORTHOGONAL`.

    Returns:
        Bytes per device.

    >>> shapes = {"mlp": {"kernel": jax.ShapeDtypeStruct((64, 256), "float32")}}
    >>> estimate_update(optax.adam(1e-3), shapes, {"fsdp": 4})[:3]
    (16384, 16384, 32772)
    """
    mesh = AbstractMesh(tuple(lengths.values()), tuple(lengths))
    places = parameter_shardings(shapes, mesh)
    path_of = lambda tree: dict(jax.tree_util.tree_flatten_with_path(tree)[0])
    place_of = path_of(places)
    routes = route(shapes)
    route_of = dict(jax.tree_util.tree_flatten_with_path(routes)[0])
    views = lambda updates: jax.tree_util.tree_map_with_path(lambda path, _: route_of[path].view, updates)

    def learned(part: Celo2State) -> int:
        paths = path_of(part.nu)
        moments = [
            moment_shardings(view, place_of[path])
            for path, view in zip(paths, matrix_views(part.nu, views), strict=True)
        ]
        treedef = jax.tree.structure(part.nu)
        total = 0
        for name, field in part._asdict().items():
            for tree in field if isinstance(field, tuple) else (field,):
                for part_of_leaf, sharding in zip(treedef.flatten_up_to(tree), moments, strict=True):
                    total += sum(_bytes(x, getattr(sharding, name)) for x in jax.tree.leaves(part_of_leaf))
        return total

    state = jax.eval_shape(tx.init, shapes)
    is_learned = lambda part: isinstance(part, Celo2State)
    state_bytes = sum(map(learned, filter(is_learned, jax.tree.leaves(state, is_leaf=is_learned))))
    others = jax.tree.map(lambda part: None if is_learned(part) else part, state, is_leaf=is_learned)
    found = jax.tree.structure(others).flatten_up_to(like_parameters(others, shapes, places))
    state_bytes += sum(_bytes(x, place) for x, place in zip(jax.tree.leaves(others), found, strict=True))

    parameters = sum(jax.tree.leaves(jax.tree.map(_bytes, shapes, places)))
    flat = path_of(shapes)
    hidden = {path: x for path, x in flat.items() if orthogonalized and route_of[path].label == "hidden"}
    hidden_views = [matrix_views(x, route_of[path].view)[0] for path, x in hidden.items()]
    rounds = plan_rounds(list(hidden.values()), hidden_views, [place_of[path] for path in hidden], LARGEST_STACKED)
    return Estimate(
        parameters=parameters,
        gradients=parameters,
        state=state_bytes,
        collectives=sum(len(turn.sent) for turn in rounds),
        sent=sum(sum(turn.sent) for turn in rounds),
        matrices=sum(-(-turn.per_device // turn.cut.shared) if turn.divided else turn.per_device for turn in rounds),
    )


def _bytes(x: Any, place: NamedSharding | None) -> int:
    """Of one device; without a place, all of it."""
    return math.prod(x.shape if place is None else place.shard_shape(x.shape)) * x.dtype.itemsize
