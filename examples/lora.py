"""Low-rank adapters: two thin factors are trained, the model under them is frozen and costs no state."""

import jax
import jax.numpy as jnp
import optax

from celo2_harness import harness

STEPS = 20


def init(key):
    keys = jax.random.split(key, 3)
    return {
        "hidden": {
            "kernel": jax.random.normal(keys[0], (8, 16)) / 3,
            "lora_a": jax.random.normal(keys[1], (8, 2)) / 3,
            "lora_b": jnp.zeros((2, 16)),
        },
        "head": {"kernel": jax.random.normal(keys[2], (16, 1)) / 4},
    }


def loss_fn(params, x, y):
    layer = params["hidden"]
    hidden = jnp.tanh(x @ layer["kernel"] + x @ layer["lora_a"] @ layer["lora_b"])
    return jnp.mean((hidden @ params["head"]["kernel"] - y) ** 2)


def main():
    x, y = jax.random.normal(jax.random.key(1), (32, 8)), jax.random.normal(jax.random.key(2), (32, 1))
    params = before = init(jax.random.key(0))
    # A rule decides where it matches; the adapters keep what routing makes of them, hidden matrices.
    tx = harness.build("celo2_ortho", 1e-2, STEPS, rules=[("kernel$", "frozen")])
    state = tx.init(params)
    assert not any(leaf.shape == (8, 16) for leaf in jax.tree.leaves(state))

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert bool(jnp.all(params["hidden"]["kernel"] == before["hidden"]["kernel"]))
    assert bool(jnp.any(params["hidden"]["lora_b"] != 0))
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
