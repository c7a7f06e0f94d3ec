"""Haiku: its parameters are a dict of dicts, with module paths as keys."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from celo2_harness import harness

STEPS = 20


def forward(x):
    x = hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(hk.Linear(16)(x))
    return hk.Linear(1, name="head")(jnp.tanh(x))


def main():
    model = hk.without_apply_rng(hk.transform(forward))
    x, y = jax.random.normal(jax.random.key(1), (32, 8)), jax.random.normal(jax.random.key(2), (32, 1))
    params = model.init(jax.random.key(0), x)
    tx = harness.build("celo2_ortho", 3e-3, STEPS)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda params: jnp.mean((model.apply(params, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
