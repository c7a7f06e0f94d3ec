"""Nothing but JAX and Optax: a table is factored into two thin matrices. The whole run is one `jax.lax.scan`."""

import jax
import jax.numpy as jnp
import optax

import celo2_harness as c2


def main(steps: int = 20) -> tuple[float, float]:
    """Trains; returns the first and the last loss."""
    left, right, start_left, start_right = jax.random.split(jax.random.key(0), 4)
    table = jax.random.normal(left, (24, 4)) @ jax.random.normal(right, (4, 32))
    params = {
        "left": jax.random.normal(start_left, (24, 4)),
        "right": jax.random.normal(start_right, (4, 32)),
        "shift": jnp.zeros([]),
    }
    tx = c2.build("celo2_ortho", 3e-2, steps)

    def loss_fn(params):
        return jnp.mean((params["left"] @ params["right"] + params["shift"] - table) ** 2)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    train = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps))
    _, losses = train(params)
    return float(losses[0]), float(losses[-1])


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
