"""Which arrays in the state of a transformation are first moments, and what becomes of them when the coordinates turn.

States say so by the names of their fields, which are Optax's own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array

# Momenta are vectors and turn with the basis. Second moments belong to the columns of a basis, one by one, and stay,
# since every column keeps its place.
FIRST_MOMENTS = ("mu", "trace", "m1", "m2")
SECOND_MOMENTS = ("nu", "diag", "row", "col", "sum_of_squares")


def refuse_unknown_fields(state: optax.OptState, shapes: Mapping[Any, Any]) -> None:
    """Refuses a state that does not say of every array whether it turns.

    Args:
        state: The state of any transformation; shapes are enough.
        shapes: The shape, by the path of the parameter, of those that turn. An array in the state belongs to the
            parameter if its path ends with that of the parameter and it has its shape.

    Raises:
        ValueError: If an array that belongs to a parameter is in a field of another name than these.
    """
    for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        owner = _owner(path, x.shape, shapes)
        if owner is not None and _field(path, owner) not in FIRST_MOMENTS + SECOND_MOMENTS:
            raise ValueError(
                f"in_eigenbasis: inner_state{jax.tree_util.keystr(path)} of shape {x.shape} belongs to a matrix, but"
                f" its name does not say whether it turns with the basis. Call the field {' or '.join(FIRST_MOMENTS)}"
                f" (a first moment, which turns) or {' or '.join(SECOND_MOMENTS)} (a second moment, which stays)."
            )


def map_first_moments(
    state: optax.OptState, shapes: Mapping[Any, Any], function: Callable[[dict[Any, Array]], Mapping[Any, Array]]
) -> optax.OptState:
    """Applies a function to every tree of first moments in a state.

    Args:
        state: The state of any transformation.
        shapes: As for `refuse_unknown_fields`.
        function: Takes one first moment of each parameter, by its path, or of some of them; returns the new ones.

    Returns:
        The state with the new first moments, of their old dtypes.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(state)
    leaves = [x for _, x in flat]
    trees: dict[Any, dict[Any, int]] = {}
    for position, (path, x) in enumerate(flat):
        owner = _owner(path, x.shape, shapes)
        if owner is not None and _field(path, owner) in FIRST_MOMENTS:
            trees.setdefault(path[: len(path) - len(owner)], {})[owner] = position
    for positions in trees.values():
        news = function({owner: leaves[position] for owner, position in positions.items()})
        for owner, position in positions.items():
            leaves[position] = news[owner].astype(leaves[position].dtype)
    return treedef.unflatten(leaves)


def _field(path: Any, owner: Any) -> str | None:
    """The name of the innermost field that holds a leaf of state, before the path of its parameter begins."""
    before = path[: len(path) - len(owner)]
    names = [entry.name for entry in before if isinstance(entry, jax.tree_util.GetAttrKey)]
    return names[-1] if names else None


def _owner(path: Any, shape: Any, shapes: Mapping[Any, Any]) -> Any:
    """The path of the parameter that a leaf of state belongs to; None if there is none."""
    ends = (path[start:] for start in range(len(path) + 1))
    return next((end for end in ends if shapes.get(end) == shape), None)
