"""A stack of layers under `jax.lax.scan`: one leaf (layers, in, out), and one matrix per layer to the optimizer.

The training loop is a scan as well: the state keeps its structure and dtypes.
"""

import jax
import jax.numpy as jnp
import optax

import celo2_harness as c2
from celo2_harness import harness

STEPS = 20

LAYERS = 3


def init(key):
    keys = jax.random.split(key)
    return {
        "layers": {"kernel": jax.random.normal(keys[0], (LAYERS, 8, 8)) / 3, "bias": jnp.zeros((LAYERS, 8))},
        "head": {"kernel": jax.random.normal(keys[1], (8, 1)) / 3},
    }


def loss_fn(params, x, y):
    layer = lambda x, p: (x + jnp.tanh(x @ p["kernel"] + p["bias"]), None)
    x, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.mean((x @ params["head"]["kernel"] - y) ** 2)


def main():
    x, y = jax.random.normal(jax.random.key(1), (32, 8)), jax.random.normal(jax.random.key(2), (32, 1))
    params = init(jax.random.key(0))
    tx = harness.build("celo2_ortho", 3e-3, STEPS)
    route = c2.route(params)["layers"]
    assert route["kernel"].label == "hidden" and route["kernel"].view.reduction_axis == (1,)  # axis 0 is the batch
    assert route["bias"].label == "vector"

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=STEPS))
    _, losses = run((params, tx.init(params)))
    return float(losses[0]), float(losses[-1])


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
