"""Where parameters, optimizer state and batches lie on a mesh of devices.

Three mesh axes have a meaning. "fsdp" and "tensor" split every parameter with two axes or more; "data" repeats them.
Batches are split over "data" and "fsdp". Everything here is a choice of `NamedSharding`s: XLA moves the data.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from celo2_harness._trees import is_function
from celo2_harness._types import Params

MESH_AXES = ("data", "fsdp", "tensor")
# Mesh axes that split parameters, in the order in which they choose an axis of a leaf.
_SPLITTING = ("fsdp", "tensor")
_BATCH = ("data", "fsdp")

# A mesh, a tree of NamedSharding like the parameters, or a function of the parameters that returns such a tree.
Sharding = Any | Callable[[Params], Any] | Mesh


def make_mesh(lengths: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first devices, on whose axes XLA places what nobody has placed (`AxisType.Auto`).

    Args:
        lengths: The lengths of the mesh axes, out of `MESH_AXES`, by name.
        devices: As many as the product of the lengths, or more. None: JAX's.

    Returns:
        The mesh.

    Raises:
        ValueError: If an axis has another name, a length is below one, or there are too few devices.

    Example:
        >>> make_mesh({"data": 1, "fsdp": 1}).axis_names
        ('data', 'fsdp')
    """
    for name, length in lengths.items():
        if name not in MESH_AXES:
            raise ValueError(f"mesh axis {name!r}: expected one of {', '.join(MESH_AXES)}.")
        if length < 1:
            raise ValueError(f"mesh axis {name} = {length}: expected at least 1.")
    devices = jax.devices() if devices is None else devices
    places = math.prod(lengths.values())
    if places > len(devices):
        raise ValueError(
            f"mesh of {places} devices: there are {len(devices)} {devices[0].platform.upper()} devices. On a CPU,"
            f" simulate more with jax.config.update('jax_num_cpu_devices', {places}) before JAX is used."
        )
    automatic = (AxisType.Auto,) * len(lengths)
    return jax.make_mesh(tuple(lengths.values()), tuple(lengths), automatic, devices=list(devices[:places]))


def parameter_shardings(params: Params, mesh: Mesh | AbstractMesh) -> PyTree:
    """Splits every leaf with two axes or more: over "fsdp" along its longest axis that divides, over "tensor" along the
    longest of the others.

    Vectors and scalars, and leaves that do not divide, lie on every device.

    Args:
        params: A parameter tree; shapes are enough.
        mesh: A mesh with axes out of `MESH_AXES`; an abstract one will do.

    Returns:
        A tree of `NamedSharding` like `params`.

    Example:
        >>> params = {"kernel": jax.ShapeDtypeStruct((6, 4), "float32"), "bias": jax.ShapeDtypeStruct((4,), "float32")}
        >>> shardings = parameter_shardings(params, make_mesh({"fsdp": 1, "tensor": 1}))
        >>> tuple(shardings["kernel"].spec), tuple(shardings["bias"].spec)
        (('fsdp', 'tensor'), ())
    """

    def place(x: Any) -> NamedSharding:
        spec: list[str | None] = [None] * len(x.shape)
        for name in _SPLITTING:
            if name in mesh.shape and len(x.shape) >= 2:
                fitting = [axis for axis, n in enumerate(x.shape) if spec[axis] is None and n % mesh.shape[name] == 0]
                if fitting:
                    spec[max(fitting, key=lambda axis: x.shape[axis])] = name
        while spec and spec[-1] is None:
            spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, params)


def resolve_shardings(sharding: Sharding, params: Params) -> PyTree:
    """The tree of `NamedSharding` that a `Sharding` means for a parameter tree.

    Raises:
        ValueError: If a leaf has no `NamedSharding`, or one on a mesh whose axes are not `AxisType.Auto`.
    """
    if isinstance(sharding, Mesh):
        tree = parameter_shardings(params, sharding)
    else:
        tree = sharding(params) if is_function(sharding) else sharding
    for path, place in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not isinstance(place, NamedSharding):
            raise ValueError(
                f"sharding{jax.tree_util.keystr(path)} is {place!r}: expected a mesh, or a jax.sharding.NamedSharding"
                " at every leaf."
            )
        if any(kind != AxisType.Auto for kind in place.mesh.axis_types):
            raise ValueError(
                f"sharding: the axes of the mesh are {', '.join(kind.name for kind in place.mesh.axis_types)}; expected"
                " Auto. Make it with celo2_harness.sharding.make_mesh, or give jax.make_mesh"
                " axis_types=(jax.sharding.AxisType.Auto,) for every axis."
            )
    return tree


def like_parameters(state: Any, params: Params, shardings: PyTree) -> PyTree:
    """A sharding for every leaf of optimizer state: with a parameter's path and shape that of the parameter, else None.

    Args:
        state: The state of any Optax transformation; shapes are enough.
        params: The parameters.
        shardings: A `NamedSharding` for every parameter.

    Returns:
        A tree like `state`.
    """
    paths, places = jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(shardings)
    # The path of a state leaf ends with the path of the parameter that it belongs to.
    by_path = {path: (x.shape, place) for (path, x), place in zip(paths, places, strict=True)}

    def find(path: Any, x: Any) -> NamedSharding | None:
        ends = (by_path[path[start:]] for start in range(len(path) + 1) if path[start:] in by_path)
        shape, place = next(ends, (None, None))
        return place if shape == x.shape else None

    return jax.tree_util.tree_map_with_path(find, state)


def state_shardings(tx: optax.GradientTransformation, params: Params, shardings: PyTree) -> PyTree:
    """Where the state of an optimizer lies: like the parameters where it has their shape; else where `tx.init` puts it,
    which is on every device unless it says otherwise.

    Args:
        tx: Any Optax transformation.
        params: The parameters; shapes are enough.
        shardings: A `NamedSharding` for every parameter.

    Returns:
        A tree of `NamedSharding` like the state.
    """
    shapes = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, shardings)
    traced = jax.jit(tx.init).trace(shapes)
    state = traced.out_info
    found = like_parameters(state, params, shardings)
    whole = NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())
    chosen = traced.lower().compile().output_shardings

    def pick(mine: Any, theirs: Any) -> NamedSharding:
        if mine is not None:
            return mine
        return theirs if isinstance(theirs, NamedSharding) and theirs.mesh == whole.mesh else whole

    treedef = jax.tree.structure(state)
    return treedef.unflatten(map(pick, treedef.flatten_up_to(found), treedef.flatten_up_to(chosen)))


def placed(
    tx: optax.GradientTransformationExtraArgs, sharding: Sharding, own: type | tuple[type, ...] = ()
) -> optax.GradientTransformationExtraArgs:
    """Places the state and the updates of an optimizer like the parameters; other state lies on every device.

    Args:
        tx: An optimizer whose `update` gets parameters.
        sharding: The mesh, or the sharding of every leaf.
        own: Parts of the state that have placed themselves, by their type.

    Returns:
        The optimizer, with state of the same structure.
    """
    constrain = jax.lax.with_sharding_constraint

    def place(params: Params, state: Any, places: PyTree) -> Any:
        if not jax.tree.leaves(params):
            return state
        whole = NamedSharding(jax.tree.leaves(places)[0].mesh, PartitionSpec())

        def constrained(part: Any, found: Any) -> Any:
            return part if isinstance(part, own) else constrain(part, whole if found is None else found)

        found = like_parameters(state, params, places)
        return jax.tree.map(constrained, state, found, is_leaf=lambda part: isinstance(part, own))

    def init_fn(params: Params) -> Any:
        return place(params, tx.init(params), resolve_shardings(sharding, params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        places = resolve_shardings(sharding, params)
        updates, state = constrain(updates, places), place(params, state, places)
        updates, state = tx.update(updates, state, params, **extra_args)
        return constrain(updates, places), place(params, state, places)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def on_explicit_mesh(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer take parameters on a mesh with explicit axes, the default of `jax.make_mesh`.

    On such axes every operation has to say where its result lies. The optimizer runs as on automatic axes instead, and
    what comes out lies like the parameters and the state that went in. Other parameters pass untouched.

    Args:
        tx: An optimizer whose `update` gets parameters.

    Returns:
        The optimizer, with the same state.
    """

    def run(mesh: AbstractMesh | Mesh, function: Callable[..., Any], specs: Any, *arguments: Any) -> Any:
        automatic = jax.sharding.auto_axes(function, out_sharding=specs)
        if not jax.sharding.get_abstract_mesh().empty:
            return automatic(*arguments)
        with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh):
            return automatic(*arguments)

    def init_fn(params: Params) -> Any:
        mesh = _explicit_mesh(params)
        if mesh is None:
            return tx.init(params)
        places = jax.tree.map(lambda x: jax.typeof(x).sharding, params)
        found = like_parameters(jax.eval_shape(tx.init, params), params, places)
        specs = jax.tree.map(lambda x: PartitionSpec() if x is None else x.spec, found, is_leaf=lambda x: x is None)
        return run(mesh, tx.init, specs, params)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        mesh = _explicit_mesh(params)
        if mesh is None:
            return tx.update(updates, state, params, **extra_args)
        arrays = {name: x for name, x in extra_args.items() if isinstance(x, jax.Array)}
        others = {name: x for name, x in extra_args.items() if name not in arrays}

        def update(updates: Any, state: Any, params: Any, arrays: Any) -> tuple[Any, Any]:
            return tx.update(updates, state, params, **arrays, **others)

        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (params, state))
        return run(mesh, update, specs, updates, state, params, arrays)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _explicit_mesh(params: Params) -> AbstractMesh | Mesh | None:
    """The mesh that some parameter lies on, if it has explicit axes."""
    for x in jax.tree.leaves(params):
        if isinstance(x, jax.Array) and AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types:
            place = None if isinstance(x, Tracer) else x.sharding
            return place.mesh if isinstance(place, NamedSharding) else jax.typeof(x).sharding.mesh
    return None


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over the mesh axes "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(tuple(name for name in _BATCH if name in mesh.shape)))
