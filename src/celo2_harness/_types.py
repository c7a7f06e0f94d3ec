"""Names for the shapes and trees that signatures share."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxtyping import ArrayLike

if TYPE_CHECKING:
    # To static checkers a tree is anything; jaxtyping's own PyTree is unknown to them, which strict mode refuses.
    PyTree: TypeAlias = Any
    Params: TypeAlias = Any
    Updates: TypeAlias = Any
else:
    import jax
    import numpy as np
    from jaxtyping import PyTree

    Params = PyTree[jax.Array | jax.ShapeDtypeStruct]
    Updates = PyTree[jax.Array | np.ndarray]
# A number, a traced scalar (what `optax.inject_hyperparams` passes), or a function of the step count.
ScalarOrSchedule: TypeAlias = ArrayLike | Callable[[Any], Any]
