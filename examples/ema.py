"""An exponential average of the parameters beside the parameters, to evaluate with."""

import jax
import jax.numpy as jnp
import optax

from celo2_harness import harness

STEPS = 20


def init(key):
    keys = jax.random.split(key)
    return {
        "hidden": {"kernel": jax.random.normal(keys[0], (8, 16)) / 3, "bias": jnp.zeros(16)},
        "head": {"kernel": jax.random.normal(keys[1], (16, 1)) / 4},
    }


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] - y) ** 2)


def main():
    x, y = jax.random.normal(jax.random.key(1), (32, 8)), jax.random.normal(jax.random.key(2), (32, 1))
    params = init(jax.random.key(0))
    tx = harness.build("celo2_ortho", 3e-3, STEPS)
    average = optax.ema(0.9)  # debiased: usable from the first step on
    state, average_state = tx.init(params), average.init(params)

    @jax.jit
    def step(params, state, average_state):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        averaged, average_state = average.update(params, average_state)
        return params, state, averaged, average_state

    first = float(loss_fn(params, x, y))
    averaged = params
    for _ in range(STEPS):
        params, state, averaged, average_state = step(params, state, average_state)
    assert bool(jnp.any(averaged["hidden"]["kernel"] != params["hidden"]["kernel"]))
    return first, float(loss_fn(averaged, x, y))


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
