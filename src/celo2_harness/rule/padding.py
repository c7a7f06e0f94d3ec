"""Means over matrices that are padded to the shape of their batch.

The lengths of such matrices are whole numbers, a row per matrix and a column per axis of a matrix.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Lengths = Int[Array | np.ndarray, "matrices axes"]


def inside(shape: Sequence[int], lengths: Lengths) -> Bool[Array, "..."]:
    """Marks the entries of a batch that are no padding.

    Args:
        shape: The shape of the batch: an axis of matrices, then the axes of a matrix.
            Axes of length one have no padding.
        lengths: The true lengths of every matrix.

    Returns:
        A truth value per entry, of a shape that broadcasts to `shape`.

    Example:
        >>> inside((1, 2, 3), np.array([[1, 2]]))[0].tolist()
        [[True, True, False], [False, False, False]]
    """
    marks = jnp.ones([1] * len(shape), bool)
    for axis, longest in enumerate(shape[1:], start=1):
        if longest > 1:
            place = [longest if i == axis else 1 for i in range(len(shape))]
            length = lengths[:, axis - 1].reshape(-1, *[1] * (len(shape) - 1))
            marks = marks & (jnp.arange(longest).reshape(place) < jnp.asarray(length))
    return marks


def count_inside(shape: Sequence[int], axes: Sequence[int], lengths: Lengths) -> Array:
    """Counts the entries along some axes of a batch that are no padding.

    Args:
        shape: As in `inside`.
        axes: Axes of a matrix, counted from the end.
        lengths: As in `inside`.

    Returns:
        A float32 number per matrix, of a shape that broadcasts to `shape`.
    """
    counts = math.prod((lengths[:, axis] for axis in axes if shape[axis] > 1), start=np.ones(len(lengths), int))
    return jnp.asarray(counts.reshape(-1, *[1] * (len(shape) - 1)), jnp.float32)


def mean_over(x: Float[Array, "..."], axes: Sequence[int], lengths: Lengths | None = None) -> Float[Array, "..."]:
    """The mean over some axes, which keep length one; of padded matrices that of the entries that are no padding.

    Args:
        x: A leaf in its view, or with `lengths` a batch of padded matrices; further axes may stand before it.
        axes: The axes to average over; with `lengths` axes of a matrix, counted from the end.
        lengths: As in `inside`; None without padding.

    Returns:
        The means.
    """
    if lengths is None:
        return jnp.mean(x, axis=tuple(axes), keepdims=True)
    shape = x.shape[-1 - lengths.shape[1] :]
    further = tuple(range(x.ndim - len(shape)))
    marks = jnp.expand_dims(inside(shape, lengths), further)
    total = jnp.sum(jnp.where(marks, x, 0.0), axis=tuple(axes), keepdims=True)
    return total / jnp.expand_dims(count_inside(shape, axes, lengths), further)
