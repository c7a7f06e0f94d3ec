"""A dict of arrays: nothing but JAX, Optax and celo2-harness."""

import jax
import jax.numpy as jnp
import optax

from celo2_harness import harness

STEPS = 20


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] - y) ** 2)


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (8, 16)) / 3, "bias": jnp.zeros(16)},
        "head": {"kernel": jax.random.normal(keys[1], (16, 1)) / 4},
    }
    x, y = jax.random.normal(keys[2], (32, 8)), jax.random.normal(keys[3], (32, 1))

    tx = harness.build("celo2_ortho", learning_rate=3e-3, total_steps=STEPS)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
