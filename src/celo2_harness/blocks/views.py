"""From Optax's description of matrices to the rule's: one view per leaf of an update tree."""

from collections.abc import Callable
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

from celo2_harness._trees import is_function
from celo2_harness._types import Updates
from celo2_harness.rule import MatrixView, default_view, view_from_axes

# A tree of MuonDimensionNumbers (None: published behaviour for that leaf), a function of the updates that returns such
# a tree, or None for the published behaviour everywhere.
WeightDimensionNumbers = Any | Callable[[Updates], Any] | None


def _is_specification(x: Any) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)


def leaf_views(updates: Updates, weight_dimension_numbers: WeightDimensionNumbers) -> list[MatrixView]:
    """The view of every leaf of `updates`, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: the tree of dimension numbers does not match, or a view does not fit its leaf.
    """
    tree: Any = weight_dimension_numbers(updates) if is_function(weight_dimension_numbers) else weight_dimension_numbers
    leaves = dict(jax.tree_util.tree_flatten_with_path(updates)[0])
    if _is_specification(tree):
        specifications = dict.fromkeys(leaves, tree)
    else:
        # Looked up by path, so that a full tree of specifications serves a masked tree of updates too.
        specifications = dict(jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_specification)[0])
    views = []
    for path, leaf in leaves.items():
        name = jax.tree_util.keystr(path) or "the leaf"
        if path not in specifications:
            raise ValueError(
                f"{name}: no entry in weight_dimension_numbers. Give a tree like the parameters, with a"
                " MuonDimensionNumbers or None at every leaf."
            )
        specification = specifications[path]
        views.append(
            default_view(leaf.shape) if specification is None else view_from_axes(leaf.shape, *specification, name=name)
        )
    return views
