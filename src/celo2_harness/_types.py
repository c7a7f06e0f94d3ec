"""Names for the shapes and trees that signatures share."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import ArrayLike, PyTree

Params = PyTree[jax.Array | jax.ShapeDtypeStruct]
Updates = PyTree[jax.Array]
# A number, a traced scalar (what `optax.inject_hyperparams` passes), or a function of the step count.
ScalarOrSchedule = ArrayLike | Callable[[Any], Any]
