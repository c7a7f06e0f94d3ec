"""Equinox: a perceptron learns a sine. The optimizer sees the arrays of the module, `eqx.filter(model, ...)`.

The last layer of an `eqx.nn.MLP` has no name of its own, so a rule says that it is the head.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import celo2_harness as c2


def main(steps: int = 20) -> tuple[float, float]:
    """Trains; returns the first and the last loss."""
    angles = jnp.linspace(-3.0, 3.0, 64)[:, None]
    model = eqx.nn.MLP(in_size=1, out_size=1, width_size=16, depth=2, key=jax.random.key(0))
    tx = c2.build("celo2_ortho", 3e-3, steps, rules=[(r"layers/2/weight", "head")])
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        loss_fn = lambda model: jnp.mean((jax.vmap(model)(angles) - jnp.sin(angles)) ** 2)
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(steps):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
