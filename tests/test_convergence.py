"""Small problems that every preset must solve with its default weights.

A step of the learned rule has a fixed size, so the schedule must end at zero for it to settle.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo2_harness import harness

STEPS = 200


def parabola(key):
    """A matrix and a bias towards targets, each with its own curvature."""
    target = {"layer": {"kernel": jax.random.normal(key, (4, 6)), "bias": jnp.linspace(-1.0, 1.0, 6)}}
    loss = lambda p: sum(jnp.mean(jnp.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (p, target)), strict=True))
    return jax.tree.map(jnp.zeros_like, target), loss


def regression(key):
    """Two layers on data that two layers made."""
    x_key, *keys = jax.random.split(key, 5)
    x = jax.random.normal(x_key, (32, 4))
    init = lambda k1, k2: {
        "layer": {"kernel": jax.random.normal(k1, (4, 6)) / 2, "bias": jnp.zeros(6)},
        "head": {"kernel": jax.random.normal(k2, (6, 2)) / 2},
    }
    model = lambda p: jnp.tanh(x @ p["layer"]["kernel"] + p["layer"]["bias"]) @ p["head"]["kernel"]
    y = model(init(*keys[:2]))
    return init(*keys[2:]), lambda p: jnp.mean(jnp.square(model(p) - y))


PAIRS = [
    *((name, regression) for name in ("celo2_ortho", "celo2_base", "celo2_muon", "muon", "adamw")),
    ("celo2_base", parabola),
]


@pytest.mark.parametrize(("name", "problem"), PAIRS)
def test_converges(name, problem):
    params, loss = problem(jax.random.key(0))
    rate = {"celo2_ortho": 0.02, "celo2_base": 0.02}.get(name, 0.1)
    # 20 times the rate of the matrices suits runs a thousand times as long.
    tx = harness.build(name, rate, STEPS, schedule="linear", warmup=0, rest_learning_rate_factor=1.0)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(carry):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, None, STEPS)[0][0]

    start = float(loss(params))
    end = float(loss(train((params, tx.init(params)))))
    assert np.isfinite(end) and end < 0.05 * start, (start, end)
