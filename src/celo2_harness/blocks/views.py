"""The matrix view of every leaf, functions over matrices, and how leaves lie on a mesh."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from optax.contrib import MuonDimensionNumbers

from celo2_harness._trees import bare_structure, is_function, leaves_by_bare_path, unboxed
from celo2_harness._types import Params, PyTree, Updates
from celo2_harness.rule import MatrixView, default_view, view_from_axes

# A tree of MuonDimensionNumbers or MatrixViews (None: published behaviour for that leaf), a function of the updates
# that returns such a tree, or None for the published behaviour everywhere.
WeightDimensionNumbers = Any | Callable[[Updates], Any] | None
# A tree of NamedSharding like the updates, a function of the updates that returns one, or None: not on a mesh.
LeafShardings = Any | Callable[[Updates], Any] | None


def matrix_views(updates: Params, weight_dimension_numbers: WeightDimensionNumbers) -> list[MatrixView]:
    """Returns the matrices that every leaf is seen as; here Optax's `MuonDimensionNumbers` become `MatrixView`s.

    Args:
        updates: A tree of updates or parameters; only shapes are read.
        weight_dimension_numbers: A tree of `MuonDimensionNumbers` or `MatrixView`s, a function of `updates` that
            returns one, or None. None, or None at a leaf, is the published behaviour: the last two axes.

    Returns:
        One view per leaf, in the order of `jax.tree.leaves`.

    Raises:
        ValueError: If a leaf has no entry, or one that does not fit its shape.

    Example:
        >>> views = matrix_views({"conv": jnp.ones((3, 3, 4, 8))}, MuonDimensionNumbers((0, 1, 2), (3,)))
        >>> views[0].viewed
        (36, 8)
    """
    tree: Any = weight_dimension_numbers(updates) if is_function(weight_dimension_numbers) else weight_dimension_numbers
    leaves = leaves_by_bare_path(updates)
    if _is_specification(tree):
        specifications = dict.fromkeys(leaves, tree)
    else:
        # Looked up by path, so that a full tree of specifications serves a masked tree of updates too.
        specifications = leaves_by_bare_path(tree, _is_specification)
    views = []
    for path, leaf in leaves.items():
        name = jax.tree_util.keystr(path) or "the leaf"
        if path not in specifications:
            raise ValueError(
                f"{name}: no entry in weight_dimension_numbers. Give a tree like the parameters, with a"
                " MuonDimensionNumbers or None at every leaf."
            )
        views.append(_resolve(leaf.shape, specifications[path], name))
    return views


def map_matrices(
    function: Callable[..., Any], views: Sequence[MatrixView], tree: PyTree, *rest: PyTree, state: bool = False
) -> PyTree:
    """Applies a function to every leaf of a tree together with the leaf's matrix view.

    Args:
        function: Takes a view, the leaf of `tree` and the corresponding parts of `rest`; returns the new leaf. It does
            not see leaves of size zero.
        views: What `matrix_views` gives for `tree`.
        tree: A tree of arrays.
        rest: Trees that have at every leaf of `tree` an array, or a tree of their own.
        state: The result is optimizer state of other shapes than the leaves. It has `optax.MaskedNode()` for leaves of
            size zero, and no metadata of other libraries.

    Returns:
        A tree of the structure of `tree`.

    Example:
        >>> updates = {"w": jnp.ones((2, 4)), "b": jnp.ones(3)}
        >>> views = matrix_views(updates, None)
        >>> scaled = map_matrices(lambda view, x: 2.0 * x if view.is_matrix else x, views, updates)
        >>> float(jnp.sum(scaled["w"])), float(jnp.sum(scaled["b"]))
        (16.0, 3.0)
    """
    leaves, treedef = jax.tree.flatten(tree)
    bare = bare_structure(treedef)
    columns = [map(unboxed, bare.flatten_up_to(other)) for other in rest]
    results = [
        function(view, x, *others) if x.size else optax.MaskedNode() if state else x
        for view, x, *others in zip(views, leaves, *columns, strict=True)
    ]
    return (bare if state else treedef).unflatten(results)


def zeros_like_params(params: Params, dtype: Any = jnp.float32) -> PyTree:
    """A tree of zeros like the parameters, of the state's own dtype; `optax.MaskedNode()` for leaves of size zero."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype) if x.size else optax.MaskedNode(), params)


def _is_specification(x: Any) -> bool:
    return x is None or isinstance(x, (MuonDimensionNumbers, MatrixView))


def _resolve(shape: tuple[int, ...], specification: MuonDimensionNumbers | MatrixView | None, name: str) -> MatrixView:
    if specification is None:
        return default_view(shape)
    if isinstance(specification, MuonDimensionNumbers):
        return view_from_axes(shape, *specification, name=name)
    if specification.shape != shape:
        raise ValueError(
            f"{name} of shape {shape}: its matrix view is one of a leaf of shape {specification.shape}. Route the tree"
            " that is updated."
        )
    return specification


def optax_dimension_numbers(weight_dimension_numbers: WeightDimensionNumbers) -> WeightDimensionNumbers:
    """The same dimension numbers in Optax's type alone, for blocks of Optax."""
    if is_function(weight_dimension_numbers):
        return lambda updates: optax_dimension_numbers(weight_dimension_numbers(updates))

    def translate(x: Any) -> Any:
        return MuonDimensionNumbers(x.reduction_axis, x.output_axis) if isinstance(x, MatrixView) else x

    return jax.tree.map(translate, weight_dimension_numbers, is_leaf=_is_specification)


def leaf_shardings(updates: Params, shardings: LeafShardings) -> list[NamedSharding] | None:
    """The sharding of every leaf of `updates`, in the order of `jax.tree.leaves`; None without any.

    Raises:
        ValueError: If a leaf has none, or one that does not fit its shape.
    """
    if shardings is None:
        return None
    tree = shardings(updates) if is_function(shardings) else shardings
    by_path = dict(jax.tree_util.tree_flatten_with_path(tree)[0])
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0]:
        name, place = jax.tree_util.keystr(path) or "the leaf", by_path.get(path)
        if not isinstance(place, NamedSharding):
            raise ValueError(
                f"{name}: its sharding is {place!r}. Give a tree like the parameters, with a jax.sharding.NamedSharding"
                " at every leaf."
            )
        for axis, names in enumerate(split_axes(place, leaf.ndim)):
            devices = math.prod(place.mesh.shape[mesh_axis] for mesh_axis in names)
            if leaf.shape[axis] % devices:
                raise ValueError(
                    f"{name} of shape {leaf.shape}: {place.spec} splits axis {axis} over {devices} devices, which do"
                    " not divide it. Split another axis, or none."
                )
        found.append(place)
    return found


def split_axes(place: NamedSharding, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of a leaf."""
    names = [() if name is None else (name,) if isinstance(name, str) else tuple(name) for name in place.spec]
    return names + [()] * (ndim - len(names))


def viewed_axes(view: MatrixView, place: NamedSharding) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of the viewed array, as far as they split it into equal runs."""
    names = split_axes(place, len(view.shape))
    batch = len(view.viewed) - len(view.axes)
    # The axes of the leaf that make the last axis of the view: all at the end, until they multiply to its length.
    first, length = len(view.permutation), 1
    while first > batch and length < view.viewed[-1]:
        first -= 1
        length *= view.shape[view.permutation[first]]

    def joined(axes: Sequence[int]) -> tuple[str, ...]:
        """The mesh axes of several axes seen as one: only the outermost may be split."""
        long = [axis for axis in axes if view.shape[axis] > 1]
        return names[long[0]] if long and not any(names[axis] for axis in long[1:]) else ()

    groups = [*([axis] for axis in view.permutation[:batch])]
    if view.is_matrix:
        groups.append(list(view.permutation[batch:first]))
    groups.append(list(view.permutation[first:]))
    return [joined(axes) for axes in groups]


def explicitly_split(x: Any) -> bool:
    """Returns whether the type of an array says that it is split over the devices of a mesh with explicit axes."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    return sharding is not None and any(name is not None for name in sharding.spec)
