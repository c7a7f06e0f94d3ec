"""Flax nnx: a perceptron predicts the next letter of a sentence. `nnx.Optimizer` takes the optimizer as any other."""

import jax.numpy as jnp
import optax
from flax import nnx

import celo2_harness as c2

TEXT = b"a learned optimizer turns the statistics of gradients into a direction, one parameter at a time"
WINDOW = 4


class NextLetter(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(128, 8, rngs=rngs)
        self.hidden = nnx.Linear(WINDOW * 8, 32, rngs=rngs)
        self.head = nnx.Linear(32, 128, rngs=rngs)

    def __call__(self, letters):
        x = self.embedding(letters).reshape(len(letters), -1)
        return self.head(nnx.relu(self.hidden(x)))


def main(steps: int = 20) -> tuple[float, float]:
    """Trains; returns the first and the last loss."""
    letters = jnp.array([list(TEXT[i : i + WINDOW + 1]) for i in range(len(TEXT) - WINDOW)])
    model = NextLetter(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, c2.build("celo2_ortho", 3e-3, steps), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            logits = model(letters[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, letters[:, -1]).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
