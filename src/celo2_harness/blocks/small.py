"""Which leaves are small enough to share a batch, and functions over matrices that make use of it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from celo2_harness._types import Updates
from celo2_harness.blocks.views import explicitly_split
from celo2_harness.rule import Batch, MatrixView, plan_batches, stackable

# Entries of a leaf up to which it shares a batch; larger ones gain less than stacking costs.
SMALL = 1 << 14
# Entries of padding that cost what a batch of its own would.
JOIN_BELOW = 1 << 14
# Entries of a batch, which bound the memory for stacking.
LARGEST_BATCH = 1 << 19


def small_batches(
    views: Sequence[MatrixView], leaves: Sequence[jax.Array], shardings: Sequence[NamedSharding | None]
) -> tuple[list[Batch], list[int]]:
    """Sorts the small leaves of a tree that are whole on every device into batches.

    Args:
        views: The views of the leaves.
        leaves: The leaves.
        shardings: How the leaves lie on a mesh; None of those that do not.

    Returns:
        The batches, each of several leaves, and the positions of all other leaves that are not empty.
    """

    def is_small(i: int) -> bool:
        place = shardings[i]
        whole = not explicitly_split(leaves[i]) if place is None else place.is_fully_replicated
        return leaves[i].size <= SMALL and stackable(views[i]) and whole

    filled = [i for i, leaf in enumerate(leaves) if leaf.size]
    planned = plan_batches(
        views, filter(is_small, filled), lambda i: leaves[i].dtype, join_below=JOIN_BELOW, largest=LARGEST_BATCH
    )
    batches = [batch for batch in planned if len(batch.members) > 1]
    batched = {i for batch in batches for i in batch.members}
    return batches, [i for i in filled if i not in batched]


def map_batches(
    function: Callable[[MatrixView, jax.Array, Any], jax.Array],
    views: Sequence[MatrixView],
    updates: Updates,
    shardings: Sequence[NamedSharding] | None = None,
) -> Updates:
    """Applies a function to the matrices of every leaf, once for all small leaves that share a batch.

    Args:
        function: Takes a view, a leaf or a batch of that view, and the true lengths of its matrices if they are padded
            (see `rule.padding`), else None; returns an array of the same shape.
        views: The views of the leaves.
        updates: A tree of arrays.
        shardings: How the leaves lie on a mesh.

    Returns:
        A tree like `updates`.
    """
    leaves, treedef = jax.tree.flatten(updates)
    batches, alone = small_batches(views, leaves, shardings or [None] * len(leaves))
    for batch in batches:
        results = batch.unstack(function(batch.view, batch.stack([leaves[i] for i in batch.members]), batch.lengths))
        for i, result in zip(batch.members, results, strict=True):
            leaves[i] = result
    for i in alone:
        leaves[i] = function(views[i], leaves[i], None)
    return treedef.unflatten(leaves)
