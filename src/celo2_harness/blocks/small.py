"""Which leaves are small enough to share a batch, and functions over matrices that make use of it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from celo2_harness.blocks.views import explicitly_split
from celo2_harness.rule import Batch, MatrixView, plan_batches, stackable

# Entries of a leaf up to which it shares a batch; larger ones gain less than stacking costs.
SMALL = 1 << 14
# On a CPU a call costs next to nothing, and all work but that of the network takes no longer than a copy.
SMALL_ON_CPUS = 1 << 12
# Entries of padding that cost what a batch of its own would.
JOIN_BELOW = 1 << 14
# Entries of a batch, which bound the memory for stacking.
LARGEST_BATCH = 1 << 19


def small_batches(
    views: Sequence[MatrixView],
    leaves: Sequence[jax.Array],
    shardings: Sequence[NamedSharding | None],
    small: int | None = None,
    join_below: int = JOIN_BELOW,
) -> tuple[list[Batch], list[int]]:
    """Sorts the small leaves of a tree that are whole on every device into batches.

    Args:
        views: The views of the leaves.
        leaves: The leaves.
        shardings: How the leaves lie on a mesh; None of those that do not.
        small: Entries of a leaf up to which it shares a batch; None for work that takes no longer than a copy.
        join_below: Entries of padding that cost what a batch of its own would; with zero nothing is padded.

    Returns:
        The batches, each of several leaves, and the positions of all other leaves that are not empty.
    """
    if small is None:
        small = SMALL_ON_CPUS if jax.default_backend() == "cpu" else SMALL

    def is_small(i: int) -> bool:
        place = shardings[i]
        whole = not explicitly_split(leaves[i]) if place is None else place.is_fully_replicated
        return leaves[i].size <= small and stackable(views[i]) and whole

    filled = [i for i, leaf in enumerate(leaves) if leaf.size]
    planned = plan_batches(
        views, filter(is_small, filled), lambda i: leaves[i].dtype, join_below=join_below, largest=LARGEST_BATCH
    )
    batches = [batch for batch in planned if len(batch.members) > 1]
    batched = {i for batch in batches for i in batch.members}
    return batches, [i for i in filled if i not in batched]


def map_batches(
    function: Callable[..., Sequence[jax.Array]],
    views: Sequence[MatrixView],
    shardings: Sequence[NamedSharding] | None,
    *arrays: Sequence[Any],
) -> list[list[Any]]:
    """Applies a function to the matrices of every leaf, once for all small leaves that share a batch.

    Args:
        function: Takes a view; the true lengths of the matrices if they are padded (see `rule.padding`), else None;
            and of every list a leaf, or a batch, of that view. Returns as many arrays of the same shape.
        views: The views of the leaves.
        shardings: How the leaves lie on a mesh.
        *arrays: Lists of one array for every leaf; anything for empty ones.

    Returns:
        As many lists. Empty leaves are in them as they were.
    """
    results = [list(leaves) for leaves in arrays]
    batches, alone = small_batches(views, arrays[0], shardings or [None] * len(views))
    for batch in batches:
        replace_members(batch, functools.partial(function, batch.view, batch.lengths), results)
    for i in alone:
        news = function(views[i], None, *(leaves[i] for leaves in results))
        for leaves, new in zip(results, news, strict=True):
            leaves[i] = new
    return results


def replace_members(batch: Batch, function: Callable[..., Sequence[jax.Array]], arrays: Sequence[list[Any]]) -> None:
    """Replaces the members of a batch, in place.

    Args:
        batch: The batch.
        function: Takes the batch of every list; returns as many arrays of the same shape.
        arrays: Lists of one array for every leaf.
    """
    news = function(*(batch.stack([leaves[i] for i in batch.members]) for leaves in arrays))
    for leaves, pieces in zip(arrays, batch.cut(list(news)), strict=True):
        for i, leaf in zip(batch.members, batch.unstack(pieces), strict=True):
            leaves[i] = leaf
