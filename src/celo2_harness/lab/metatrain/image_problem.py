"""The inner problem of the paper: a small perceptron that classifies 8x8 images."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from celo2_harness.lab.metatrain.config import CLASSES, MetaTrainConfig
from celo2_harness.lab.metatrain.learned import InnerLeaf, InnerRule
from celo2_harness.lab.metatrain.problem import Clock
from celo2_harness.lab.metatrain.unroll import Unroll, kernel_view, new_unroll, training_step
from celo2_harness.lab.tasks import ImageSets
from celo2_harness.rule import default_view


class Layer(NamedTuple):
    """One affine layer, x @ kernel^T + bias.

    Inputs come last: they are the longer axis nearly everywhere, and that is the one a processor works along.
    """

    kernel: Float[Array, "outputs inputs"]
    bias: Float[Array, " outputs"]


Mlp = tuple[Layer, ...]


def init_mlp(key: Array, widths: Sequence[int]) -> Mlp:
    """Returns kernels from a normal cut off at 2 sigma, sigma = 1 / sqrt(inputs) (not rescaled), and zero biases.

    >>> [layer.kernel.shape for layer in init_mlp(jax.random.key(0), (64, 32, 10))]
    [(32, 64), (10, 32)]
    """
    keys = jax.random.split(key, len(widths) - 1)
    return tuple(
        Layer(jax.random.truncated_normal(k, -2.0, 2.0, (o, i)) * i**-0.5, jnp.zeros(o))
        for k, i, o in zip(keys, widths[:-1], widths[1:], strict=True)
    )


def mlp_loss(params: Mlp, images: Float[Array, "batch pixels"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """Returns the mean softmax cross-entropy in nats; ReLU between layers."""
    x = images
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer.kernel.T + layer.bias)
    logits = x @ params[-1].kernel.T + params[-1].bias
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@dataclasses.dataclass(frozen=True)
class ImageProblem:
    """A multilayer perceptron on 8x8 images; an `InnerProblem`.

    Attributes:
        config: The recipe.
        widths: The layer widths of the network.
        rule: What trains the network, if not the recipe's rule.
    """

    config: MetaTrainConfig
    widths: tuple[int, ...]
    rule: InnerRule | None = None

    @property
    def loss_bound(self) -> float:
        """1.5 times the loss of an even guess."""
        return 1.5 * math.log(CLASSES)

    def fresh(self, key: Array) -> Unroll:
        """Returns a new task: initial parameters, zero state, alpha and step size."""
        return new_unroll(self.config, self._rule, self._layout(), lambda k: init_mlp(k, self.widths), key)

    def sample(self, data: ImageSets, which: Int[Array, ""], key: Array) -> Int[Array, " batch"]:
        """Draws the rows of a batch from set `which`, with replacement."""
        return data.starts[which] + jax.random.randint(key, (self.config.batch,), 0, data.sizes[which])

    def step(
        self, theta: Any, state: Unroll, clock: Clock, data: ImageSets, batch: Int[Array, " batch"]
    ) -> tuple[Unroll, Float[Array, ""]]:
        """Returns the unroll after a training step, and the training loss before it."""
        images, labels = data.images[batch].astype(jnp.float32) / 255.0, data.labels[batch]
        loss_fn = lambda params: mlp_loss(params, images, labels)
        return training_step(self.config, self._rule, self._layout(), theta, state, clock, loss_fn)

    @property
    def _rule(self) -> InnerRule:
        return self.config.learned if self.rule is None else self.rule

    def _layout(self) -> list[InnerLeaf]:
        layers = zip(self.widths[:-1], self.widths[1:], strict=True)
        return [
            leaf
            for i, o in layers
            for leaf in (InnerLeaf(kernel_view((o, i)), hidden=True), InnerLeaf(default_view((o,)), hidden=False))
        ]
