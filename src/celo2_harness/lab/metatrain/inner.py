"""Training inside: what all inner problems share, and the paper's, a small network that classifies 8x8 images."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from celo2_harness.lab.metatrain.augmentation import draw_log_alphas
from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.inner_schedules import INNER_SCHEDULES
from celo2_harness.lab.metatrain.learned import LEARNED, InnerStep
from celo2_harness.lab.metatrain.problem import Clock, TaskGroup
from celo2_harness.lab.metatrain.update import Views
from celo2_harness.lab.tasks import ImageSets
from celo2_harness.lab.tasks.image_files import CLASSES
from celo2_harness.lab.tasks.image_mlp import init_mlp, mlp_loss
from celo2_harness.rule import MatrixView, default_view


class Unroll(NamedTuple):
    """One inner training run: parameters (divided by alpha), optimizer state, and its task's constants.

    `batch_part` is the part of a full batch that counts, None for all of it.
    """

    params: Any
    state: Any
    alphas: list[Float[Array, "..."]]
    learning_rate: Float[Array, ""]
    batch_part: Float[Array, ""] | None


def kernel_view(shape: tuple[int, ...]) -> MatrixView:
    """The view of a kernel stored outputs x inputs that equals the default view of inputs x outputs.

    The rule does not care which axis is called the row, but which one is larger, and of a square the last one counts.

    >>> kernel_view((10, 32)).factored, kernel_view((32, 10)).factored, kernel_view((8, 8)).factored
    ((0, 1), (1, 0), (1, 0))
    """
    return MatrixView(shape, (0,), (1,), (0, 1) if shape[1] > shape[0] else (1, 0))


def new_unroll(config: MetaTrainConfig, views: Views, init: Callable[[Array], Any], key: Array) -> Unroll:
    """A new task: initial parameters, zero state, and what is drawn once per task.

    Args:
      config: the run.
      views: of each leaf, None for Adam.
      init: key -> parameters.
      key: randomness of the task.
    """
    params_key, alpha_key, rate_key = jax.random.split(key, 3)
    leaves, treedef = jax.tree.flatten(init(params_key))
    logarithms = draw_log_alphas(config.augmentation_level, config.augmentation, alpha_key, [x.shape for x in leaves])
    # A quotient would be rounded one way or the other, as the program around it happens to be compiled; and in
    # training by Newton-Schulz one bit grows to order one within an outer iteration.
    leaves = [leaf * jnp.exp(-x) for leaf, x in zip(leaves, logarithms, strict=True)]
    low, high = (math.log(rate) for rate in config.inner_learning_rates)
    batch_part = None
    if config.smallest_batch is not None:
        smallest = math.log(config.smallest_batch / config.batch)
        # A fourth key, beside the three above.
        batch_part = jnp.exp(jax.random.uniform(jax.random.fold_in(key, 3), (), minval=smallest, maxval=0.0))
    return Unroll(
        params=treedef.unflatten(leaves),
        state=LEARNED[config.variant].start(config, views, leaves),
        alphas=[jnp.exp(x) for x in logarithms],
        learning_rate=jnp.exp(jax.random.uniform(rate_key, (), minval=low, maxval=high)),
        batch_part=batch_part,
    )


def batch_weights(part: Float[Array, ""] | None, batch: int) -> Float[Array, " batch"] | None:
    """Weights that make a smaller batch of the first examples of a full one; they sum to 1. None without a part.

    >>> batch_weights(jnp.array(0.5), 4).tolist()
    [0.5, 0.5, 0.0, 0.0]
    """
    if part is None:
        return None
    size = jnp.clip(jnp.round(part * batch), 1.0, batch)
    return jnp.where(jnp.arange(batch) < size, 1.0 / size, 0.0)


def training_step(
    config: MetaTrainConfig,
    views: Views,
    theta: Any,
    state: Unroll,
    clock: Clock,
    loss_fn: Callable[[Any], Float[Array, ""]],
) -> tuple[Unroll, Float[Array, ""]]:
    """One step of the rule on a loss of the parameters at their true scale.

    Args:
      config: the run.
      views: as in `new_unroll`.
      theta: the rule's numbers.
      state: before the step.
      clock: where the unroll stands.
      loss_fn: training loss of the step's batch.

    Returns:
      The unroll after the step, and the training loss before it.
    """
    leaves, treedef = jax.tree.flatten(state.params)

    def scaled_loss(leaves: list[Array]) -> Float[Array, ""]:
        return loss_fn(treedef.unflatten([leaf * alpha for leaf, alpha in zip(leaves, state.alphas, strict=True)]))

    loss, gradients = jax.value_and_grad(scaled_loss)(leaves)
    factor = INNER_SCHEDULES[config.inner_schedule](clock.step, clock.length, config.inner_warmup)
    leaves, rule_state = LEARNED[config.variant].step(
        config, theta, leaves, state.state, InnerStep(views, gradients, loss, clock, state.learning_rate * factor)
    )
    return state._replace(params=treedef.unflatten(leaves), state=rule_state), loss


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
        return new_unroll(self.config, self._views(), lambda k: init_mlp(k, self.widths), key)

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
        images, labels = data.images[batch].astype(jnp.float32) / 255.0, data.labels[batch]
        weights = batch_weights(state.batch_part, self.config.batch)
        loss_fn = lambda params: mlp_loss(params, images, labels, weights)
        return training_step(self.config, self._views(), theta, state, clock, loss_fn)

    def _views(self) -> list[MatrixView | None]:
        bias = (lambda shape: None) if self.config.variant == "ortho" else default_view
        layers = zip(self.widths[:-1], self.widths[1:], strict=True)
        return [view for i, o in layers for view in (kernel_view((o, i)), bias((o,)))]


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
