"""Haiku: one layer of attention learns to reverse a sequence. Parameters are a dict of dicts, keyed by module paths."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import celo2_harness as c2

LENGTH, SYMBOLS, WIDTH = 6, 8, 16


def reverse(tokens: jax.Array) -> jax.Array:
    """Logits of the reversed sequence."""
    places = hk.get_parameter("position_embedding", (LENGTH, WIDTH), init=hk.initializers.RandomNormal(0.5))
    x = hk.Embed(SYMBOLS, WIDTH)(tokens) + places
    x += hk.MultiHeadAttention(2, 8, model_size=WIDTH, w_init=hk.initializers.VarianceScaling(1.0))(x, x, x)
    return hk.Linear(SYMBOLS, name="head")(hk.LayerNorm(-1, True, True)(x))


def main(steps: int = 20) -> tuple[float, float]:
    """Trains; returns the first and the last loss."""
    tokens = jax.random.randint(jax.random.key(0), (64, LENGTH), 0, SYMBOLS)
    model = hk.without_apply_rng(hk.transform(reverse))
    params = model.init(jax.random.key(1), tokens)
    tx = c2.build("celo2_ortho", 3e-3, steps)

    def loss_fn(params):
        logits = model.apply(params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.flip(tokens, 1)).mean()

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
