"""What a model, its gradients and an optimizer need on each device of a mesh, without allocating any of it.

`plan_update` compiles the update and reads the program; `estimate_update` evaluates formulas, so that no device has to
be there.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, Mesh

from celo2_harness._trees import by_path, tree_bytes
from celo2_harness.blocks import Celo2State
from celo2_harness.blocks.direction import moment_shardings
from celo2_harness.blocks.moments import unpack_moments
from celo2_harness.blocks.orthogonalize import LARGEST_STACKED
from celo2_harness.blocks.spread import plan_rounds
from celo2_harness.blocks.views import matrix_views
from celo2_harness.lab.bench.measure import with_loss
from celo2_harness.routing import route
from celo2_harness.sharding import like_parameters, parameter_shardings, state_shardings

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
ORTHOGONAL = ("celo2", "modern_muon", "celo2_ortho", "celo2_muon", "muon")
"""The presets whose hidden matrices are orthogonalised."""

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: The kind, one of `KINDS`.
        operand_bytes: The bytes that one device puts in.
        largest_operand: The number of entries of the largest array.
    """

    kind: str
    operand_bytes: int
    largest_operand: int


def find_collectives(program: str) -> list[Collective]:
    """Finds the collectives of a compiled program, those of every branch and of a loop's body once.

    Args:
        program: The text of the program, `compiled.as_text()`.

    Returns:
        The collectives, in the order of the text.

    >>> text = '''
    ... %x = f32[4,2]{1,0} parameter(0)
    ... ROOT %y = f32[8,2]{1,0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}
    ... '''
    >>> find_collectives(text)
    [Collective(kind='all-gather', operand_bytes=32, largest_operand=8)]
    """
    instructions = _INSTRUCTION.findall(program)
    shapes = {name: shape for name, shape, _, _ in instructions}
    found = []
    for _, _, operation, rest in instructions:
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            arguments = rest.partition(")")[0]
            arrays = [array for name in re.findall(r"%([\w.\-]+)", arguments) for array in _arrays(shapes[name])]
            found.append(Collective(kind, sum(n * size for n, size in arrays), max(n for n, _ in arrays)))
    return found


def _arrays(shape: str) -> list[tuple[int, int]]:
    """Entries and bytes per entry of every array of a shape in HLO's notation."""
    return [
        (math.prod(int(n) for n in lengths.split(",") if n), max(1, int(bits or 8) // 8))
        for _, bits, lengths in _ARRAY.findall(shape)
    ]


class Plan(NamedTuple):
    """The needs of an update on each device, by its compiled program.

    Attributes:
        parameters: The bytes of the parameters.
        gradients: The bytes of the gradients; the updates take their place.
        state: The bytes of the optimizer state.
        temporaries: The bytes that the update needs beyond these, as XLA plans them.
        collectives: The number of collectives in the update, those of all branches.
        sent: The bytes that a device puts into them.
    """

    parameters: int
    gradients: int
    state: int
    temporaries: int
    collectives: int
    sent: int

    @property
    def total(self) -> int:
        """The bytes of parameters, gradients, state and temporaries."""
        return sum(self[:4])


def plan_update(tx: optax.GradientTransformation, shapes: Any, mesh: Mesh) -> Plan:
    """Plans one update on a mesh.

    Parameters and gradients lie as `parameter_shardings` says, state as `state_shardings` does.

    Args:
        tx: The optimizer; one of `harness.build` should have `sharding=mesh`.
        shapes: The parameters, a tree of `jax.ShapeDtypeStruct`.
        mesh: Real or simulated devices (`jax_num_cpu_devices`), see `celo2_harness.sharding.make_mesh`.

    Returns:
        What each device needs; temporaries and collectives from compiling the update for the mesh.

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
        parameters=tree_bytes(shapes, places),
        gradients=tree_bytes(shapes, places),
        state=tree_bytes(state, state_places),
        temporaries=temporaries,
        collectives=len(collectives),
        sent=sum(collective.operand_bytes for collective in collectives),
    )


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


class Estimate(NamedTuple):
    """The needs of an update on each device, by formula.

    Attributes:
        parameters: The bytes of the parameters.
        gradients: The bytes of the gradients.
        state: The bytes of the optimizer state.
        collectives: The number of collectives that the orthogonalisation takes.
        sent: The bytes that a device puts into them.
        matrices: The number of matrices that the busiest device orthogonalises, paddings included.
    """

    parameters: int
    gradients: int
    state: int
    collectives: int
    sent: int
    matrices: int

    @property
    def total(self) -> int:
        """The bytes of parameters, gradients and state."""
        return sum(self[:3])


def estimate_update(
    tx: optax.GradientTransformation, shapes: Any, lengths: Mapping[str, int], *, orthogonalized: bool = False
) -> Estimate:
    """Estimates one update of an optimizer as it would be with `harness.build(..., sharding=mesh)`.

    The all-reduces of the statistics are not in it: a handful per leaf, of some hundred numbers and at most twice the
    length of an unsplit axis.

    Args:
        tx: The optimizer, built without a mesh.
        shapes: The parameters, a tree of `jax.ShapeDtypeStruct`.
        lengths: The lengths of the mesh axes, named as in `celo2_harness.sharding.MESH_AXES`.
        orthogonalized: Whether its hidden matrices are, as in the presets `ORTHOGONAL`.

    Returns:
        What each device needs.

    >>> shapes = {"mlp": {"kernel": jax.ShapeDtypeStruct((64, 256), "float32")}}
    >>> estimate_update(optax.adam(1e-3), shapes, {"fsdp": 4})[:3]
    (16384, 16384, 32772)
    """
    mesh = AbstractMesh(tuple(lengths.values()), tuple(lengths))
    places = parameter_shardings(shapes, mesh)
    routes, flat = route(shapes), lambda tree: dict(jax.tree_util.tree_flatten_with_path(tree)[0])
    place_of, route_of, views = flat(places), flat(routes), by_path(routes, lambda route: route.view)

    def learned(part: Celo2State) -> int:
        moments = [
            moment_shardings(view, place_of[path])
            for path, view in zip(flat(part.nu), matrix_views(part.nu, views), strict=True)
        ]
        return sum(
            tree_bytes(x, getattr(sharding, name))
            for leaf, sharding in zip(unpack_moments(jax.tree.structure(part.nu), part), moments, strict=True)
            for name, field in leaf._asdict().items()
            for x in jax.tree.leaves(field)
        )

    state = jax.eval_shape(tx.init, shapes)
    is_learned = lambda part: isinstance(part, Celo2State)
    state_bytes = sum(map(learned, filter(is_learned, jax.tree.leaves(state, is_leaf=is_learned))))
    others = jax.tree.map(lambda part: None if is_learned(part) else part, state, is_leaf=is_learned)
    state_bytes += tree_bytes(others, like_parameters(others, shapes, places))

    parameters = tree_bytes(shapes, places)
    hidden = {path: x for path, x in flat(shapes).items() if orthogonalized and route_of[path].label == "hidden"}
    matrices = [matrix_views(x, route_of[path].view)[0] for path, x in hidden.items()]
    rounds = plan_rounds(list(hidden.values()), matrices, [place_of[path] for path in hidden], LARGEST_STACKED)
    return Estimate(
        parameters=parameters,
        gradients=parameters,
        state=state_bytes,
        collectives=sum(len(turn.sent) for turn in rounds),
        sent=sum(sum(turn.sent) for turn in rounds),
        matrices=sum(-(-turn.per_device // turn.cut.shared) if turn.divided else turn.per_device for turn in rounds),
    )
