"""Trees that users give: looked up by path, freed of metadata, checked with messages that name the leaf."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from celo2_harness._types import PyTree


def leaves_by_name(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths, as in "layers/0/kernel".

    >>> leaves_by_name({"layers": [{"kernel": 1.0}]})
    {'layers/0/kernel': 1.0}
    """
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def tree_bytes(tree: PyTree, shardings: PyTree = None) -> int:
    """The memory that the arrays of a tree take, in bytes.

    Args:
        tree: Arrays or their abstract shapes.
        shardings: How they are laid out, a tree like it whose leaves may be None; then what one device holds is meant.

    Returns:
        The sum over leaves.

    >>> tree_bytes({"a": jnp.zeros((2, 3), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.int32)})
    28
    """
    leaves, treedef = jax.tree.flatten(tree)
    places = [None] * len(leaves) if shardings is None else treedef.flatten_up_to(shardings)
    shape = lambda x, place: x.shape if place is None else place.shard_shape(x.shape)
    return sum(math.prod(shape(x, place)) * x.dtype.itemsize for x, place in zip(leaves, places, strict=True))


def is_function(x: Any) -> TypeGuard[Callable[..., Any]]:
    """Returns whether a value is a function and not a tree that can be called, as an Equinox module of labels can.

    >>> is_function(len), is_function({"layer": len})
    (True, False)
    """
    return callable(x) and jax.tree_util.treedef_is_leaf(jax.tree.structure(x))


def by_path(tree: PyTree, read: Callable[[Any], Any] = lambda leaf: leaf) -> Callable[[PyTree], PyTree]:
    """What is known of every leaf of a tree, for whatever part of that tree a masked block sees.

    Args:
        tree: A tree of facts, one per leaf.
        read: Applied to each of them.

    Returns:
        A function of a tree with some of the same paths; it returns a tree like that one.

    Example:
        >>> by_path({"w": "hidden", "b": "vector"}, str.upper)({"w": 1.0})
        {'w': 'HIDDEN'}
    """
    found = {path: read(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    return lambda part: jax.tree_util.tree_map_with_path(lambda path, _: found[path], part)


def bare_structure(treedef: Any) -> Any:
    """The structure of a tree without the boxes that other libraries put around single arrays.

    Flax's `Partitioned` and `Variable`, or Haliax's `NamedArray`, say how the axes of an array are named or sharded.
    State that has other axes than the parameter, such as a row moment, must not carry that along.

    Example:
        >>> from flax.linen import Partitioned
        >>> params = {"kernel": Partitioned(jnp.ones((2, 4)), ("data", None))}
        >>> bare_structure(jax.tree.structure(params))
        PyTreeDef({'kernel': *})
    """
    return jax.tree.structure(treedef.unflatten([0] * treedef.num_leaves), is_leaf=_is_box)


def leaves_by_bare_path(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[Any, Any]:
    """The leaves of a tree by their paths, of which boxes are no part (see `bare_structure`).

    A tree that has boxes and one that has none then have the same paths: `flax.nnx.Optimizer` hands `init` variables
    and `update` plain arrays.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
    bare = bare_structure(treedef).unflatten(range(len(leaves)))
    return {path: leaves[index] for path, index in jax.tree_util.tree_flatten_with_path(bare)[0]}


def unboxed(part: Any) -> Any:
    """The content of a box, and everything else as it is (see `bare_structure`)."""
    return jax.tree.leaves(part)[0] if _is_box(part) else part


def _is_box(node: Any) -> bool:
    if isinstance(node, (tuple, list, Mapping)) or jax.tree_util.all_leaves([node]):
        return False
    level = jax.tree_util.default_registry.flatten_one_level(node)
    children = list(level[0]) if level else []
    return len(children) == 1 and jax.tree_util.all_leaves(children)


def require_like_params(owner: str, updates: PyTree, params: PyTree) -> None:
    """Refuses updates whose tree or shapes are not those of the parameters.

    Args:
        owner: Who asks, for the message.
        updates: Gradients or updates.
        params: The parameters.

    Raises:
        ValueError: If only one of the trees has a leaf, or it has another shape; the message names it.
    """
    same = jax.tree.structure(updates) == jax.tree.structure(params)
    if same and [jnp.shape(x) for x in jax.tree.leaves(updates)] == [jnp.shape(x) for x in jax.tree.leaves(params)]:
        return
    difference = tree_difference(updates, params)
    if difference is not None:
        raise ValueError(
            f"{owner}: the updates do not fit params: {difference} Pass gradients with respect to the tree that is"
            " passed as params."
        )


def tree_difference(got: PyTree, wanted: PyTree, dtypes: bool = False) -> str | None:
    """The first leaf in which two trees differ, in words; None if their paths and shapes (and dtypes) agree."""
    here, there = leaves_by_name(got), leaves_by_name(wanted)
    for name in there:
        if name not in here:
            return f"leaf {name!r} of shape {jnp.shape(there[name])} is missing."
    for name, leaf in here.items():
        if name not in there:
            return f"leaf {name!r} of shape {jnp.shape(leaf)} is not expected."
        if jnp.shape(leaf) != jnp.shape(there[name]):
            return f"leaf {name!r} has shape {jnp.shape(leaf)}, expected {jnp.shape(there[name])}."
        if dtypes and jnp.result_type(leaf) != jnp.result_type(there[name]):
            return f"leaf {name!r} has dtype {jnp.result_type(leaf)}, expected {jnp.result_type(there[name])}."
    return None
