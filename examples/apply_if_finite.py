"""A batch with NaN in it is skipped: neither parameters nor state move.

`c2.guard_updates` does the same, and skips or clips gradients that explode as well.
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
    params = init(jax.random.key(0))
    tx = optax.apply_if_finite(harness.build("celo2_ortho", 3e-3, STEPS), max_consecutive_errors=3)
    state = tx.init(params)

    @jax.jit
    def step(params, state, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in range(STEPS):
        bad = i == 5
        before = params
        params, state, loss = step(params, state, x.at[0, 0].set(jnp.nan) if bad else x)
        if bad:
            assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before, params)))
        losses.append(float(loss))
    assert int(state.total_notfinite) == 1
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
