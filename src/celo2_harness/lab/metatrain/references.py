"""The losses that a meta-loss is divided by: what Muon reaches in the same unrolls."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.estimators import bounded_loss, new_pair, step_weight
from celo2_harness.lab.metatrain.groups import run_groups
from celo2_harness.lab.metatrain.instances import Instances
from celo2_harness.lab.metatrain.muon_rule import Muon
from celo2_harness.lab.metatrain.outer import MetaTrainState
from celo2_harness.lab.metatrain.problem import InnerProblem, TaskGroup


def with_references(
    config: MetaTrainConfig, state: MetaTrainState, data: Any, groups: tuple[TaskGroup, ...] | None = None
) -> MetaTrainState:
    """Measures the references of a run; they are kept in its state, and so in its checkpoints.

    Args:
        config: The recipe.
        state: The state before the first iteration, from `init_metatrain`.
        data: The data that the tasks sample from, as in `metatrain_step`.
        groups: As in `init_metatrain`. Their problems have a field `rule`, which says what trains the networks.

    Returns:
        The state, in which every unroll has its reference: Muon's loss in it, weighed as the meta-loss is, so over all
        of it or over its last part. Without `config.reference` it is the state that was given.
    """
    if config.reference == "none":
        return state
    groups = run_groups(config, len(data.images.starts)) if groups is None else groups
    measured = jax.jit(_measured, static_argnums=(0, 1))
    tasks = [
        task._replace(instances=measured(config, group, task.instances, data))
        for group, task in zip(groups, state.tasks, strict=True)
    ]
    return state._replace(tasks=tuple(tasks))


def _measured(config: MetaTrainConfig, group: TaskGroup, instances: Instances, data: Any) -> Instances:
    """The unrolls of all tasks of a group with their references."""
    problem = dataclasses.replace(group.problem, rule=Muon(config.adam_factor))
    data = data if group.part is None else getattr(data, group.part)

    def of_task(instances: Instances, which: Array) -> Array:
        one = lambda index: reference_loss(config, problem, instances, index, data, which)
        return jax.lax.map(one, jnp.arange(config.instances))

    return instances._replace(references=jax.vmap(of_task)(instances, jnp.array(group.sets)))


def reference_loss(
    config: MetaTrainConfig, problem: InnerProblem, instances: Instances, index: Array, data: Any, which: Array
) -> Float[Array, ""]:
    """Returns the mean loss of one unroll, weighed as the meta-loss is.

    Args:
        config: The recipe.
        problem: The problem, with the rule that trains it.
        instances: The unrolls of the task.
        index: Which of them.
        data: The data that the problem samples from.
        which: The data set.
    """
    pair, clock = new_pair(config, problem, instances.start_key(index))

    def step(carry: Any) -> Any:
        unroll, clock, total, weights = carry
        batch = problem.sample(data, which, instances.batch_key(index, clock.step))
        weight = step_weight(config, clock)
        unroll, loss = problem.step(None, unroll, clock, data, batch)
        total = total + weight * bounded_loss(loss, problem.loss_bound)
        return unroll, clock._replace(step=clock.step + 1), total, weights + weight

    one = jax.tree.map(lambda x: x[0], pair)
    carry = one, clock, jnp.zeros([]), jnp.zeros([])
    _, _, total, weights = jax.lax.while_loop(lambda carry: carry[1].step < carry[1].length, step, carry)
    return total / weights
