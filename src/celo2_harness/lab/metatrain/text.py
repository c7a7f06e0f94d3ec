"""An inner problem beside the images: a tiny GPT that learns the bytes of a text under the rule."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.inner import Unroll, batch_weights, kernel_view, new_unroll, training_step
from celo2_harness.lab.metatrain.problem import Clock
from celo2_harness.lab.tasks.text import Text, byte_classes
from celo2_harness.lab.tasks.tiny_gpt import TinyGPT, TinyGPTConfig, init_tiny_gpt, tiny_gpt_losses
from celo2_harness.rule import MatrixView, Theta, default_view

TEXT_MODEL = TinyGPTConfig()
# Stored outputs x inputs. The first four are the matrices that "ortho" gives to the rule; it leaves the rest to Adam.
_HIDDEN = ("qkv", "projection", "up", "down")
_KERNELS = (*_HIDDEN, "head")


def text_classes(text: Text) -> UInt8[Array, " bytes"]:
    """The training part of a text as the classes that `TextProblem` predicts, on the device."""
    return jnp.asarray(byte_classes(text.train, TEXT_MODEL.classes))


@dataclasses.dataclass(frozen=True)
class TextProblem:
    """A GPT of some size on one text of byte classes; an `InnerProblem`.

    In "ortho" the rule has the matrices inside of the blocks, and Adam the embeddings, the head and the norms; in
    "base" the rule has everything.

    Attributes:
      config: the run.
      model: the size of the network.
    """

    config: MetaTrainConfig
    model: TinyGPTConfig = TEXT_MODEL

    @property
    def loss_bound(self) -> float:
        """1.5 times the loss of an even guess."""
        return 1.5 * math.log(self.model.classes)

    def fresh(self, key: Array) -> Unroll:
        """A new task: initial parameters, zero state, alphas and step size."""
        return new_unroll(self.config, self.views(), lambda k: init_tiny_gpt(self.model, k), key)

    def sample(self, data: UInt8[Array, " bytes"], which: Int[Array, ""], key: Array) -> Int[Array, " batch"]:
        """Where the windows of a batch start, drawn with replacement; there is one text."""
        del which
        return jax.random.randint(key, (self.config.text_batch,), 0, data.shape[0] - self.model.context)

    def step(
        self, theta: Theta, state: Unroll, clock: Clock, data: UInt8[Array, " bytes"], batch: Int[Array, " batch"]
    ) -> tuple[Unroll, Float[Array, ""]]:
        """One training step.

        Returns:
          The unroll after the step, and the training loss before it.
        """
        windows = data[batch[:, None] + jnp.arange(self.model.context + 1)]
        weights = batch_weights(state.batch_part, self.config.text_batch)

        def loss_fn(params: TinyGPT) -> Float[Array, ""]:
            losses = tiny_gpt_losses(self.model, params, windows)
            return jnp.mean(losses) if weights is None else jnp.sum(weights * losses)

        return training_step(self.config, self.views(), theta, state, clock, loss_fn)

    def views(self) -> list[MatrixView | None]:
        """Of each leaf; None: it is Adam's."""
        shapes: Any = jax.eval_shape(lambda: init_tiny_gpt(self.model, jax.random.key(0)))

        def view(name: str, shape: tuple[int, ...]) -> MatrixView | None:
            if self.config.variant == "ortho" and name not in _HIDDEN:
                return None
            return kernel_view(shape) if name in _KERNELS else default_view(shape)

        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        return [view(path[-1].name, leaf.shape) for path, leaf in leaves]
