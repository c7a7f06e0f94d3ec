"""Several processes of one run: what they agree on, and where their arrays meet. With one process, nothing happens."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process is the one that reads and writes files, evaluates and is asked to stop."""
    return jax.process_index() == 0


def agreed(tree: Any) -> Any:
    """The first process's values, as NumPy arrays, on every process; all have to call this at the same place.

    Args:
      tree: numbers and arrays, of the same structure, shapes and types everywhere.
    """
    arrays = jax.tree.map(np.asarray, tree)
    if jax.process_count() == 1:
        return arrays
    # As bytes: they are added up to be sent, which would lose the sign of a zero.
    as_bytes = lambda x: np.frombuffer(x.tobytes(), np.uint8)
    sent = multihost_utils.broadcast_one_to_all(jax.tree.map(as_bytes, arrays))
    back = lambda x, like: np.frombuffer(np.asarray(x).tobytes(), like.dtype).reshape(like.shape)
    return jax.tree.map(back, sent, arrays)


def gathered(tree: Any) -> Any:
    """Arrays that are spread over processes, whole, as NumPy arrays; all processes have to call this."""

    def whole(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)
