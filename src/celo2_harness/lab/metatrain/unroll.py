"""One inner training run, whatever is trained: its state, its start, and a step of the rule."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.learned import InnerLeaf, InnerRule, InnerStep
from celo2_harness.lab.metatrain.problem import Clock
from celo2_harness.rule import MatrixView
from celo2_harness.schedules import SCHEDULES

# Unrolls differ in length, and schedules want a number: so each is made once, and looked up by the part that is done.
_SCHEDULE_STEPS = 1000
_WARMUP = 0.05


class Unroll(NamedTuple):
    """One inner training run.

    Attributes:
        params: The parameters, divided by alpha.
        state: The state of the rule.
        alpha: The scale of the parameters.
        learning_rate: The step size at its peak.
    """

    params: Any
    state: Any
    alpha: Float[Array, ""]
    learning_rate: Float[Array, ""]


def kernel_view(shape: tuple[int, ...]) -> MatrixView:
    """Returns the view of a kernel that is stored outputs x inputs, without turning it round.

    The rule does not care which axis is called the row, but which one is longer, and of a square the last one counts:
    so the view equals the default view of inputs x outputs.

    >>> kernel_view((10, 32)).factored, kernel_view((32, 10)).factored, kernel_view((8, 8)).factored
    ((0, 1), (1, 0), (1, 0))
    """
    return MatrixView(shape, (0,), (1,), factored_over=(0, 1) if shape[1] > shape[0] else (1, 0))


def new_unroll(
    config: MetaTrainConfig, rule: InnerRule, layout: Sequence[InnerLeaf], init: Callable[[Array], Any], key: Array
) -> Unroll:
    """Starts a task: initial parameters, zero state, and what is drawn once per task.

    Args:
        config: The recipe.
        rule: The rule that trains the network.
        layout: The ways in which the rule may treat each parameter.
        init: A function from a key to parameters.
        key: The randomness of the task.

    Returns:
        The unroll before its first step.
    """
    params_key, alpha_key, rate_key = jax.random.split(key, 3)
    leaves, treedef = jax.tree.flatten(init(params_key))
    log_alpha = _uniform(alpha_key, -math.log(config.augmentation), math.log(config.augmentation))
    # A quotient would be rounded one way or the other, as the program around it happens to be compiled; and in
    # training by Newton-Schulz one bit grows to order one within an outer iteration.
    leaves = [leaf * jnp.exp(-log_alpha) for leaf in leaves]
    return Unroll(
        params=treedef.unflatten(leaves),
        state=rule.start(layout, leaves),
        alpha=jnp.exp(log_alpha),
        learning_rate=jnp.exp(_uniform(rate_key, *map(math.log, config.inner_learning_rates))),
    )


def training_step(
    config: MetaTrainConfig,
    rule: InnerRule,
    layout: Sequence[InnerLeaf],
    theta: Any,
    state: Unroll,
    clock: Clock,
    loss_fn: Callable[[Any], Float[Array, ""]],
) -> tuple[Unroll, Float[Array, ""]]:
    """Takes a step of the rule on a loss of the parameters at their true scale.

    Args:
        config: The recipe.
        rule: As in `new_unroll`.
        layout: As in `new_unroll`.
        theta: The numbers of the rule.
        state: The unroll before the step.
        clock: The step at which the unroll is.
        loss_fn: The training loss of the step's batch.

    Returns:
        The unroll after the step, and the training loss before it.
    """
    leaves, treedef = jax.tree.flatten(state.params)

    def scaled_loss(leaves: list[Array]) -> Float[Array, ""]:
        return loss_fn(treedef.unflatten([leaf * state.alpha for leaf in leaves]))

    loss, gradients = jax.value_and_grad(scaled_loss)(leaves)
    step_size = state.learning_rate * step_size_factor(config, clock)
    leaves, rule_state = rule.step(theta, leaves, state.state, InnerStep(layout, gradients, loss, clock, step_size))
    return state._replace(params=treedef.unflatten(leaves), state=rule_state), loss


def step_size_factor(config: MetaTrainConfig, clock: Clock) -> Float[Array, "..."]:
    """Returns the factor of the step size at a step of an unroll, by the schedule of the same name."""
    schedule = SCHEDULES[config.inner_schedule](_SCHEDULE_STEPS, _WARMUP)
    return jnp.asarray(schedule(_SCHEDULE_STEPS * clock.step / clock.length), jnp.float32)


def _uniform(key: Array, low: float, high: float) -> Float[Array, ""]:
    return jax.random.uniform(key, (), minval=low, maxval=high)
