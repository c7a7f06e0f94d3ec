"""Gradient accumulation: four micro-batches make one update.

The schedule counts updates, so `total_steps` is the number of updates, not of micro-batches.
"""

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


MICRO_BATCHES = 4


def main():
    x, y = jax.random.normal(jax.random.key(1), (32, 8)), jax.random.normal(jax.random.key(2), (32, 1))
    params = init(jax.random.key(0))
    tx = optax.MultiSteps(harness.build("celo2_ortho", 3e-3, STEPS), every_k_schedule=MICRO_BATCHES)
    state = tx.init(params)

    @jax.jit
    def micro_step(params, state, x, y):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    first = float(loss_fn(params, x, y))
    for _ in range(STEPS):
        for part_x, part_y in zip(jnp.split(x, MICRO_BATCHES), jnp.split(y, MICRO_BATCHES), strict=True):
            params, state = micro_step(params, state, part_x, part_y)
    assert int(state.gradient_step) == STEPS
    return first, float(loss_fn(params, x, y))


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
