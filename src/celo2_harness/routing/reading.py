"""From a tree to leaves that know their surroundings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from celo2_harness._types import PyTree
from celo2_harness.routing.leaves import Leaf, Shape, bare_leaves, nodes_of, tree_of
from celo2_harness.routing.neighbours import neighbours_of
from celo2_harness.routing.stacks import stack_axes


def leaves_of(params: PyTree, per_head: bool = False) -> tuple[list[Leaf], Any]:
    """All leaves of a tree as rules see them, and the tree's structure, in time linear in their number.

    Args:
        params: Arrays, tracers or `jax.ShapeDtypeStruct`s; nodes without leaves (None, `optax.MaskedNode`) are skipped.
        per_head: Copied into every leaf.

    Returns:
        The leaves in `jax.tree.leaves` order, and the tree's structure.

    Raises:
        ValueError: If a leaf is not an array or a number.
    """
    leaves, structure = bare_leaves(params, per_head)
    root = tree_of(leaves)
    near = neighbours_of(root)
    leaves = [
        dataclasses.replace(leaf, attends=i in near.attends, direction=i in near.gain) for i, leaf in enumerate(leaves)
    ]
    stacks, unclear = stack_axes(root, leaves, near)
    leaves = [
        dataclasses.replace(leaf, stack=stack, unclear=unclear.get(i))
        for i, (leaf, stack) in enumerate(zip(leaves, stacks, strict=True))
    ]
    bodies = [leaf.body for leaf in leaves]

    bias = {i: bodies[j] for i, j in near.gain.items()}
    bias |= {i: bodies[j] for i, j in near.bias.items() if _may_pair(bodies[i], bodies[j])}
    weight = {i: bodies[j] for i, j in near.weight.items() if _may_pair(bodies[j], bodies[i])}
    adapters = {i for node in nodes_of(root) for i in _adapters(node.arrays(), leaves, bodies)}
    return [
        dataclasses.replace(
            leaf,
            bias=bias.get(i),
            weight=weight.get(i),
            mate=bodies[near.mate[i]] if i in near.mate else None,
            adapter=i in adapters or "lora" in "".join(leaf.parts[-2:]).lower(),
        )
        for i, leaf in enumerate(leaves)
    ], structure


def _may_pair(weight: Shape, bias: Shape) -> bool:
    """A matrix that is called b is no bias of a matrix beside it."""
    return len(bias) < len(weight) or bias == weight


def _adapters(arrays: Mapping[str, int], leaves: Sequence[Leaf], bodies: Sequence[Shape]) -> tuple[int, ...]:
    """Two low-rank factors beside the weight that they change, whatever they are called."""
    matrices = [i for i in arrays.values() if len(bodies[i]) == 2]
    base = [i for i in matrices if leaves[i].is_weight or leaves[i].name_words & {"embedding", "embeddings"}]
    if len(matrices) != 3 or len(base) != 1:
        return ()
    (rows, columns), (a, b) = bodies[base[0]], (i for i in matrices if i != base[0])
    for first, second in ((a, b), (b, a)):
        (m, rank), (inner, n) = bodies[first], bodies[second]
        if rank == inner and rank < min(rows, columns) and (m, n) in ((rows, columns), (columns, rows)):
            return a, b
    return ()
