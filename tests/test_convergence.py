"""Small problems that presets must solve with their default weights.

A step of the learned rule has a fixed size, so the schedule must end at zero for it to settle.
"""

import jax
import jax.numpy as jnp
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


def solve(name, problem, rate, weights=None):
    """Loss at the end over loss at the start."""
    params, loss = problem(jax.random.key(0))
    # 20 times the rate of the matrices suits runs a thousand times as long.
    tx = harness.build(name, rate, STEPS, schedule="linear", warmup=0, rest_learning_rate_factor=1.0, weights=weights)

    @jax.jit
    def train(carry):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, None, STEPS)[0][0]

    return float(loss(train((params, tx.init(params))))) / float(loss(params))


# Steps of the learned rule have RMS one before the rate; those of the others a fifth of that, or Adam's.
RATES = {
    "celo2": 0.02,
    "modern_muon": 0.02,
    "celo2_ortho": 0.02,
    "celo2_base": 0.02,
    "celo2_muon": 0.1,
    "muon": 0.1,
    "adamw": 0.1,
}


# Each compiles for seconds; two are enough for every day.
@pytest.mark.parametrize(
    "name", [name if name in ("celo2_ortho", "adamw") else pytest.param(name, marks=pytest.mark.slow) for name in RATES]
)
def test_regression(name):
    # A fifth: the bound is for plumbing (signs, rates, schedules), whatever weights are bundled.
    assert solve(name, regression, RATES[name]) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate", "bound"), [("celo2_ortho", 0.02, 0.001), ("celo2_base", 0.02, 0.05)])
def test_parabola_with_the_bundled_weights(name, rate, bound):
    assert solve(name, parabola, rate) < bound


@pytest.mark.slow
def test_parabola_with_the_published_weights(shared):
    path = shared / "oracle" / "celo2_official_theta.state"
    if not path.exists():
        pytest.skip(f"{path.name} is not there")
    assert solve("celo2_base", parabola, 0.02, weights=str(path)) < 0.01
