"""Equinox: the optimizer sees the arrays of the module, `eqx.filter(model, eqx.is_inexact_array)`."""

import equinox as eqx
import jax
import jax.numpy as jnp

from celo2_harness import harness

STEPS = 20


class Model(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.hidden = eqx.nn.Linear(8, 16, key=keys[0])
        self.norm = eqx.nn.LayerNorm(16)
        self.head = eqx.nn.Linear(16, 1, key=keys[1])

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(self.hidden(x))))


def main():
    model = Model(jax.random.key(0))
    x, y = jax.random.normal(jax.random.key(1), (32, 8)), jax.random.normal(jax.random.key(2), (32, 1))
    tx = harness.build("celo2_ortho", 3e-3, STEPS)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        loss_fn = lambda model: jnp.mean((jax.vmap(model)(x) - y) ** 2)
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(STEPS):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
