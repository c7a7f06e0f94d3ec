"""Master copies in float32, model in bfloat16: cast inside the loss, and no step is too small to count."""

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
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        def loss_of_master(params):
            return loss_fn(*jax.tree.map(lambda p: p.astype(jnp.bfloat16), (params, x, y))).astype(jnp.float32)

        loss, grads = jax.value_and_grad(loss_of_master)(params)  # gradients are float32, as the master copies are
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
