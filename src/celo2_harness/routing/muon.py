"""The dimension numbers that `optax.contrib.muon` takes, as routing rules."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from celo2_harness._trees import is_function
from celo2_harness._types import PyTree
from celo2_harness.routing.reading import leaves_of
from celo2_harness.routing.rules import first_match
from celo2_harness.routing.user_rules import RuleLike


def rules_of_dimension_numbers(numbers: Any | Callable[[PyTree], Any] | None, params: PyTree) -> list[RuleLike]:
    """The routing that `optax.contrib.muon(muon_weight_dimension_numbers=numbers)` has, as rules.

    A leaf with dimension numbers is "hidden" and has that view. A leaf with None keeps its built-in label, or gets
    "other" if that would be "hidden".

    Args:
        numbers: A tree of `MuonDimensionNumbers` and None, or a prefix of one; a function of the parameters that
            returns it; None for the built-in routing.
        params: A tree of parameters.

    Returns:
        Rules, to go behind the user's.

    Raises:
        ValueError: If a leaf has no entry, an entry has no leaf, or something is no dimension numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from celo2_harness.routing import label_params
        >>> params = {"in": {"kernel": jnp.zeros((4, 8))}, "out": {"kernel": jnp.zeros((8, 4))}}
        >>> label_params(params, rules_of_dimension_numbers({"in": None, "out": MuonDimensionNumbers()}, params))
        {'in': {'kernel': 'other'}, 'out': {'kernel': 'hidden'}}
    """
    tree: Any = numbers(params) if is_function(numbers) else numbers
    if tree is None:
        return []
    entries = dict(jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_entry)[0])
    leaves = {path: leaf for (path, _), leaf in zip(_flat(params), leaves_of(params)[0], strict=True)}
    found: dict[str, MuonDimensionNumbers | None] = {}
    used = set()
    for path, leaf in leaves.items():
        prefix = next((path[:end] for end in range(len(path), -1, -1) if path[:end] in entries), None)
        if prefix is None:
            raise ValueError(
                f"routing: leaf {leaf.path!r} of shape {leaf.shape} has no entry in the tree of dimension numbers."
                " Give a tree like the parameters, with MuonDimensionNumbers or None at every leaf."
            )
        used.add(prefix)
        entry = entries[prefix]
        if isinstance(entry, optax.MaskedNode):
            entry = None
        if not (entry is None or isinstance(entry, MuonDimensionNumbers)):
            raise ValueError(
                f"routing: leaf {leaf.path!r} has {entry!r} in the tree of dimension numbers, expected an"
                " optax.contrib.MuonDimensionNumbers or None."
            )
        found[leaf.path] = entry
    unused = [path for path in entries if path not in used and entries[path] is not None]
    if unused:
        raise ValueError(
            f"routing: the tree of dimension numbers has an entry at {jax.tree_util.keystr(unused[0])}, where the"
            " parameters have no leaf. Give a tree like the parameters."
        )
    by_path = {leaf.path: leaf for leaf in leaves.values()}

    def dimension_numbers(path: str, _: Any) -> Any:
        view = found[path]
        if view is not None:
            return "hidden", view
        return "other" if first_match(by_path[path]).label == "hidden" else None

    return [dimension_numbers]


def _is_entry(x: Any) -> bool:
    return x is None or isinstance(x, (MuonDimensionNumbers, optax.MaskedNode))


def _flat(params: PyTree) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(params)[0]
