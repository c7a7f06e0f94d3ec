"""Flax linen: a convolutional net tells horizontal from vertical stripes. `TrainState.create(tx=...)`.

Routing sees the second convolution as a matrix of (3 x 3 x 8) x 8; the first one has a single input channel, and goes
to AdamW.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState

import celo2_harness as c2


class Stripes(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(images))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


def stripes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images of 12 x 12 pixels, and which way their stripes run."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count)
    waves = np.sin(np.arange(12) + rng.uniform(0, 6, (count, 1)))
    images = np.where(labels[:, None, None], waves[:, :, None], waves[:, None, :])
    return (images + rng.normal(0, 0.3, images.shape))[..., None].astype(np.float32), labels


def main(steps: int = 20) -> tuple[float, float]:
    """Trains; returns the first and the last loss."""
    images, labels = stripes(64)
    model = Stripes()
    params = model.init(jax.random.key(0), images)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=c2.build("celo2_ortho", 3e-3, steps))

    @jax.jit
    def step(state):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(steps):
        state, loss = step(state)
        losses.append(float(loss))
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
