"""Parameters in bfloat16: the state is float32 all the same, and so is the arithmetic of the update.

Updates are rounded to bfloat16 at the end, so small steps of large numbers are lost; `fp32_master_copies.py` keeps
them.
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


def main():
    x, y = jax.random.normal(jax.random.key(1), (32, 8)), jax.random.normal(jax.random.key(2), (32, 1))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), init(jax.random.key(0)))
    tx = harness.build("celo2_ortho", 1e-2, STEPS)
    state = tx.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("float32")}

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
