"""A learning rate that lies in the state, where a program may change it while it trains.

`static_args` names the arguments that must stay Python values; `total_steps` is left out, so the rate is what the
state says.
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
    make = optax.inject_hyperparams(harness.build, static_args=harness.STATIC_ARGS)
    tx = make("celo2_ortho", learning_rate=3e-3, weight_decay=0.1)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in range(STEPS):
        if i == STEPS // 2:
            state.hyperparams["learning_rate"] = state.hyperparams["learning_rate"] / 2
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert abs(float(state.hyperparams["learning_rate"]) - 1.5e-3) < 1e-9
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
