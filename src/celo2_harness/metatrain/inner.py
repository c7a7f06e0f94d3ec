"""The inner problem of the paper: a small network that learns to classify 8x8 images under the rule."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from celo2_harness.metatrain.augmentation import draw_log_alphas
from celo2_harness.metatrain.config import MetaTrainConfig
from celo2_harness.metatrain.problem import Clock, TaskGroup
from celo2_harness.metatrain.update import apply_update, init_update
from celo2_harness.metatrain.velo import apply_velo, init_velo
from celo2_harness.rule import MatrixView, default_view
from celo2_harness.tasks.image_mlp import Mlp, init_mlp, mlp_loss
from celo2_harness.tasks.images import CLASSES, ImageSets


class Unroll(NamedTuple):
    """One inner training run: parameters (divided by alpha), optimizer state, and its task's constants."""

    params: Mlp
    state: Any
    alphas: list[Float[Array, "..."]]
    learning_rate: Float[Array, ""]


def _constant(step: Array, length: Array, warmup: float) -> Array:
    del length, warmup
    return jnp.ones_like(step, jnp.float32)


def _warmup_cosine(step: Array, length: Array, warmup: float) -> Array:
    rising = jnp.maximum(warmup * length, 1.0)
    place = jnp.clip((step - rising) / jnp.maximum(length - rising, 1.0), 0.0, 1.0)
    return jnp.where(step < rising, step / rising, 0.5 * (1.0 + jnp.cos(math.pi * place)))


# Factor of the inner step size at a step of an unroll of some length, with warm-up over a part of it.
INNER_SCHEDULES = {"constant": _constant, "warmup_cosine": _warmup_cosine}


def kernel_view(shape: tuple[int, ...]) -> MatrixView:
    """The view of a kernel stored outputs x inputs that equals the default view of inputs x outputs.

    The rule does not care which axis is called the row, but which one is larger, and of a square the last one counts.

    >>> kernel_view((10, 32)).factored, kernel_view((32, 10)).factored, kernel_view((8, 8)).factored
    ((0, 1), (1, 0), (1, 0))
    """
    return default_view(shape)._replace(factored=(0, 1) if shape[1] > shape[0] else (1, 0))


@dataclasses.dataclass(frozen=True)
class ImageProblem:
    """A multilayer perceptron of some widths on 8x8 images; an `InnerProblem`.

    Attributes:
      config: the run.
      widths: layer widths of the network.
    """

    config: MetaTrainConfig
    widths: tuple[int, ...]

    @property
    def loss_bound(self) -> float:
        """1.5 times the loss of an even guess."""
        return 1.5 * math.log(CLASSES)

    def fresh(self, key: Array) -> Unroll:
        """A new task: initial parameters, zero state, alphas and step size."""
        config = self.config
        params_key, alpha_key, rate_key = jax.random.split(key, 3)
        leaves, treedef = jax.tree.flatten(init_mlp(params_key, self.widths))
        logarithms = draw_log_alphas(
            config.augmentation_level, config.augmentation, alpha_key, [x.shape for x in leaves]
        )
        # A quotient would be rounded one way or the other, as the program around it happens to be compiled; and in
        # training by Newton-Schulz one bit grows to order one within an outer iteration.
        leaves = [leaf * jnp.exp(-x) for leaf, x in zip(leaves, logarithms, strict=True)]
        low, high = (math.log(rate) for rate in config.inner_learning_rates)
        return Unroll(
            params=treedef.unflatten(leaves),
            state=init_velo(self._whole_views(leaves))
            if config.variant == "velo_s"
            else init_update(config.rule, self._views(leaves), leaves),
            alphas=[jnp.exp(x) for x in logarithms],
            learning_rate=jnp.exp(jax.random.uniform(rate_key, (), minval=low, maxval=high)),
        )

    def sample(self, data: ImageSets, which: Int[Array, ""], key: Array) -> Int[Array, " batch"]:
        """Rows of a batch drawn with replacement from set `which`."""
        return data.starts[which] + jax.random.randint(key, (self.config.batch,), 0, data.sizes[which])

    def step(
        self, theta: Any, state: Unroll, clock: Clock, data: ImageSets, batch: Int[Array, " batch"]
    ) -> tuple[Unroll, Float[Array, ""]]:
        """One training step.

        Returns:
          The unroll after the step, and the training loss before it.
        """
        config = self.config
        images, labels = data.images[batch].astype(jnp.float32) / 255.0, data.labels[batch]
        leaves, treedef = jax.tree.flatten(state.params)

        def loss_fn(leaves: list[Array]) -> Float[Array, ""]:
            scaled = [leaf * alpha for leaf, alpha in zip(leaves, state.alphas, strict=True)]
            return mlp_loss(treedef.unflatten(scaled), images, labels)

        loss, gradients = jax.value_and_grad(loss_fn)(leaves)
        if config.variant == "velo_s":
            views = self._whole_views(leaves)
            leaves, memory = apply_velo(theta, views, leaves, gradients, state.state, loss, clock.length)
            return state._replace(params=treedef.unflatten(leaves), state=memory), loss
        factor = INNER_SCHEDULES[config.inner_schedule](clock.step, clock.length, config.inner_warmup)
        leaves, update_state = apply_update(
            rule=config.rule,
            views=self._views(leaves),
            orthogonalize=config.variant == "ortho",
            theta=theta,
            leaves=leaves,
            gradients=gradients,
            state=state.state,
            count=clock.step,
            step_size=state.learning_rate * factor,
            adam_factor=config.adam_factor,
        )
        return state._replace(params=treedef.unflatten(leaves), state=update_state), loss

    def _whole_views(self, leaves: list[Array]) -> list[MatrixView]:
        views = [kernel_view(leaf.shape) if leaf.ndim == 2 else default_view(leaf.shape) for leaf in leaves]
        return [view._replace(whole=True) for view in views]

    def _views(self, leaves: list[Array]) -> list[MatrixView | None]:
        vectors = default_view if self.config.variant == "base" else lambda shape: None
        return [kernel_view(leaf.shape) if leaf.ndim == 2 else vectors(leaf.shape) for leaf in leaves]


def image_groups(config: MetaTrainConfig, sets: int) -> tuple[TaskGroup, ...]:
    """The tasks of a run on so many image sets: one group per network, each with its share of every set's tasks."""
    share = config.tasks_per_set // len(config.networks)
    groups = []
    for k, widths in enumerate(config.networks):
        places = [(which, which * config.tasks_per_set + k * share + i) for which in range(sets) for i in range(share)]
        groups.append(
            TaskGroup(
                ImageProblem(config, widths), tuple(task for _, task in places), tuple(which for which, _ in places)
            )
        )
    return tuple(groups)
