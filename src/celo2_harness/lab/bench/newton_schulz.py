"""Newton-Schulz of this package against Optax's, on one matrix."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax.contrib._muon import orthogonalize_via_newton_schulz

from celo2_harness.lab.bench.timing import interleave
from celo2_harness.rule import newton_schulz
from celo2_harness.rule.newton_schulz import COEFFICIENTS


class NewtonSchulzCost(NamedTuple):
    """Seconds per round of both, and ||ours - optax's|| / ||optax's||."""

    ours: tuple[float, ...]
    optax: tuple[float, ...]
    difference: float


def measure_newton_schulz(
    shape: tuple[int, int], *, rounds: int, seed: int = 0, on_round: Callable[[int], None] = lambda _: None
) -> NewtonSchulzCost:
    """Times five quintic iterations on a normal float32 matrix.

    Args:
        shape: Rows and columns.
        rounds: Timed calls of each.
        seed: Of the matrix.
        on_round: Called with the number of rounds done.

    Returns:
        The times and the relative difference of the results.
    """
    x = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    triples = COEFFICIENTS["quintic"]
    ours = jax.jit(newton_schulz)
    theirs = jax.jit(lambda x: orthogonalize_via_newton_schulz(x, jnp.asarray(triples[0]), len(triples)))
    a, b = ours(x), theirs(x)
    seconds = interleave({"ours": lambda: ours(x), "optax": lambda: theirs(x)}, rounds, on_round=on_round)
    return NewtonSchulzCost(seconds["ours"], seconds["optax"], float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)))
