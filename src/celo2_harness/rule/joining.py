"""Many small arrays as one, and back, in operations that are alike.

XLA's CPU compiler makes code for every operand of a long concatenation, and for every slice that starts elsewhere; of
fused loops that are alike it makes code once. Some of its passes also compare every array with every other, and every
reader of an array with the others. So many arrays are joined a few at a time, and cut apart in two rounds.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from celo2_harness._types import PyTree

# From how many arrays on this pays; also how many pieces an array is cut into first.
_MANY = 64
# Operands of a concatenation that XLA takes into the loop that reads it, and from which on it does not: the last one
# shall stay outside, or every loop that reads the whole would repeat it.
_INSIDE, _OUTSIDE = 8, 16


def join(parts: Sequence[Shaped[Array, "_ length"]]) -> Shaped[Array, "rows length"]:
    """Concatenates arrays along their first axis.

    Args:
        parts: One array or more, of one length.

    Returns:
        All their rows, in order.

    Example:
        >>> join([jnp.zeros((1, 2)), jnp.ones((2, 2))]).tolist()
        [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    """
    turned = False
    while len(parts) > _MANY:
        few = min(_INSIDE, len(parts) // _OUTSIDE)
        # Only a loop that does something is fused: this one turns every row round.
        parts, turned = [jax.lax.rev(jax.lax.concatenate(some, 0), [1]) for some in _portions(parts, few)], not turned
    whole = parts[0] if len(parts) == 1 else jax.lax.concatenate(parts, 0)
    return jax.lax.rev(whole, [1]) if turned else whole


def cut(arrays: PyTree, counts: Sequence[int]) -> PyTree:
    """Cuts arrays along their first axis into pieces, each of which `part` cuts further.

    On a CPU the pieces start at numbers that the compiler does not know. It would otherwise make code for every part;
    this way all parts share it that lie at one place of their piece. Both branches give the same, but XLA does not look
    into them.

    Args:
        arrays: A tree of arrays with equally many rows.
        counts: How many rows each part has.

    Returns:
        A tree like `arrays`, with a list of arrays for every array.
    """
    lengths = [sum(some) for some in _portions(counts, _piece(counts))]
    numbers = lambda: [jnp.asarray(end - n, jnp.uint32) for end, n in zip(_ends(lengths), lengths, strict=True)]
    unseen = lambda x: jax.lax.cond(x.reshape(-1)[0] >= 0.0, numbers, numbers)
    starts = jax.lax.platform_dependent(jax.tree.leaves(arrays)[0], cpu=unseen, default=lambda _: numbers())

    def pieces(x: jax.Array) -> list[jax.Array]:
        first = [jnp.zeros([], jnp.uint32)] * (x.ndim - 1)
        return [
            jax.lax.dynamic_slice(x, (start, *first), (n, *x.shape[1:]))
            for start, n in zip(starts, lengths, strict=True)
        ]

    return jax.tree.map(pieces, arrays)


def part(pieces: Sequence[Shaped[Array, "_ ..."]], counts: Sequence[int]) -> list[Shaped[Array, "_ ..."]]:
    """Cuts the pieces of one array into parts.

    Args:
        pieces: What `cut` makes of an array.
        counts: How many rows each part has.

    Returns:
        The parts, in order.

    Example:
        >>> [x.tolist() for x in part(cut(jnp.arange(4.0), (1, 2, 1)), (1, 2, 1))]
        [[0.0], [1.0, 2.0], [3.0]]
    """
    found = []
    for piece, own in zip(pieces, _portions(counts, _piece(counts)), strict=True):
        found += [jax.lax.slice_in_dim(piece, end - n, end) for end, n in zip(_ends(own), own, strict=True)]
    return found


def _piece(counts: Sequence[int]) -> int:
    """How many parts a piece has."""
    return max(1, len(counts) // _MANY)


def _ends(lengths: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(lengths))


def _portions(items: Sequence[Any], size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]
