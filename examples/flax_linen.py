"""Flax linen: `TrainState.create(tx=...)`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from celo2_harness import harness

STEPS = 20


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(16)(x))
        return nn.Dense(1, name="head")(jnp.tanh(x))


def main():
    model = Model()
    x, y = jax.random.normal(jax.random.key(1), (32, 8)), jax.random.normal(jax.random.key(2), (32, 1))
    params = model.init(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=harness.build("celo2_ortho", 3e-3, STEPS))

    @jax.jit
    def step(state):
        loss_fn = lambda params: jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)
        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(STEPS):
        state, loss = step(state)
        losses.append(float(loss))
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
