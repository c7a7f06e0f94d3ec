"""Many arrays as one, and back: nothing but moving, whatever their number."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo2_harness.rule.joining import cut, join, part


@pytest.mark.parametrize("number", [1, 64, 65, 300, 600])  # of 65 on in one round, of 600 in two
def test_rows_keep_their_order(number):
    counts = (*[1] * (number - 1), 2)
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 3)).astype(np.float32) for n in counts]
    parts[0][0] = [np.nan, -0.0, np.inf]

    @jax.jit
    def there_and_back(parts):
        whole = join(parts)
        pieces = cut((whole, whole[:, 0]), counts)
        return whole, [part(x, counts) for x in pieces]

    whole, (same, first) = there_and_back(parts)
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    for got, thin, wanted in zip(same, first, parts, strict=True):
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(thin, wanted[:, 0])


def test_a_thousand_leaves_take_few_different_loops():
    """A compiler makes code once for loops that are alike; one loop per leaf and array would take minutes."""
    counts = (1,) * 1000

    def update(arrays):
        whole = join(arrays)
        return part(cut(0.5 * whole, counts), counts)

    program = jax.jit(update).lower([jax.ShapeDtypeStruct((1, 12), jnp.float32)] * 1000).compile().as_text()
    assert different_loops(program) <= 40


def different_loops(program):
    """How many of a program's fused loops differ in more than the names of their values."""
    bodies = [body.split("\n")[1:] for body in program.split("\n\n") if body.lstrip().startswith("%fused")]
    named = re.compile(r"%[\w.-]+|, metadata=.*")
    return len({tuple(sorted(named.sub("", line) for line in body)) for body in bodies})
