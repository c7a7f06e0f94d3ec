"""The tasks of a run: which there are, and an outer iteration of all of them, vectorised and spread over devices."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.estimators import ESTIMATORS, Numbers
from celo2_harness.lab.metatrain.image_problem import ImageProblem
from celo2_harness.lab.metatrain.problem import TaskGroup
from celo2_harness.lab.metatrain.text_problem import TextProblem, TinyGPTConfig
from celo2_harness.lab.tasks import ImageSets

TASK_AXIS = "tasks"


class InnerData(NamedTuple):
    """The arrays that the tasks of a run sample from.

    Attributes:
        images: The image sets.
        text: The classes of the bytes of a text, for runs with `text_tasks`.
    """

    images: ImageSets
    text: UInt8[Array, " bytes"] | None = None


class TasksMetrics(NamedTuple):
    """Metrics of the tasks in an outer iteration.

    Attributes:
        meta_loss: The mean meta-loss of each data set.
        restarted: The share of tasks that restarted.
    """

    meta_loss: Float[Array, " sets"]
    restarted: Float[Array, ""]


def run_groups(config: MetaTrainConfig, sets: int) -> tuple[TaskGroup, ...]:
    """Returns the tasks of a run: a group per network, each with its share of every set's tasks, then those on text.

    Args:
        config: The recipe.
        sets: The number of image sets. The text, if there is one, counts as one more set, after the others.

    Returns:
        The groups.
    """
    share, groups = config.tasks_per_set // len(config.networks), []
    for k, widths in enumerate(config.networks):
        places = [(which, which * config.tasks_per_set + k * share + i) for which in range(sets) for i in range(share)]
        problem, tasks = ImageProblem(config, widths), tuple(task for _, task in places)
        groups.append(TaskGroup(problem, tasks, tuple(which for which, _ in places), "images"))
    if config.text_tasks:
        first = sets * config.tasks_per_set
        tasks = tuple(range(first, first + config.text_tasks))
        model = TinyGPTConfig(config.text_width, config.text_layers)
        groups.append(TaskGroup(TextProblem(config, model), tasks, (sets,) * config.text_tasks, "text"))
    return tuple(groups)


def task_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh that spreads tasks over devices; over all devices by default."""
    return Mesh(np.array(jax.devices() if devices is None else devices), (TASK_AXIS,))


def fitting_mesh(mesh: Mesh, groups: tuple[TaskGroup, ...]) -> Mesh:
    """Returns as much of a mesh as the tasks of every group can be spread over evenly."""
    tasks = math.gcd(*(len(group.tasks) for group in groups))
    size = max(n for n in range(1, mesh.size + 1) if tasks % n == 0)
    return task_mesh(list(mesh.devices.flat)[:size])


def init_tasks(config: MetaTrainConfig, groups: tuple[TaskGroup, ...], theta: Numbers, key: Array) -> tuple[Any, ...]:
    """Returns the first state of all tasks, per group, with the task as leading axis.

    Task k draws from fold_in(key, k).
    """

    def init(group: TaskGroup) -> Any:
        estimator = ESTIMATORS[config.estimator]
        one = lambda task: estimator.init(config, group.problem, theta, jax.random.fold_in(key, task))
        return jax.vmap(one)(jnp.array(group.tasks))

    return tuple(map(init, groups))


def tasks_gradient(
    config: MetaTrainConfig,
    groups: tuple[TaskGroup, ...],
    theta: Numbers,
    state: tuple[Any, ...],
    data: Any,
    key: Array,
    mesh: Mesh | None = None,
) -> tuple[Numbers, tuple[Any, ...], TasksMetrics]:
    """Computes one outer iteration of all tasks.

    Args:
        config: The recipe.
        groups: The tasks.
        theta: The current rule.
        state: The state of all tasks, from `init_tasks` or this function.
        data: The data that the problems sample from.
        key: The randomness of this iteration; task k draws from fold_in(key, k), wherever it runs.
        mesh: The devices to spread the tasks of each group over; None for no spreading.

    Returns:
        The mean of the tasks' estimates (entries that are not finite count as 0), the new state, and metrics.

    Raises:
        ValueError: If the tasks of a group cannot be spread evenly.
    """
    tasks = sum(len(group.tasks) for group in groups)
    sets = np.concatenate([np.array(group.sets) for group in groups])
    total, new_state, losses, restarted = None, [], [], []
    for group, group_state in zip(groups, state, strict=True):
        gradient, new, loss, restart = _group_gradient(config, group, theta, group_state, data, key, mesh)
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        new_state.append(new)
        losses.append(loss)
        restarted.append(restart)
    mean = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x / tasks, 0.0), total)
    # Rows average over the tasks of a set.
    averages = (sets == np.arange(sets.max() + 1)[:, None]).astype(np.float32)
    averages /= averages.sum(axis=1, keepdims=True)
    per_set = jnp.sum(averages * jnp.concatenate(losses), axis=1)
    return mean, tuple(new_state), TasksMetrics(per_set, jnp.mean(jnp.concatenate(restarted)))


def _group_gradient(
    config: MetaTrainConfig, group: TaskGroup, theta: Numbers, state: Any, data: Any, key: Array, mesh: Mesh | None
) -> tuple[Numbers, Any, Array, Array]:
    """The sum of a group's estimates, the new state, and meta-loss and restart of every task."""
    estimate = ESTIMATORS[config.estimator].estimate
    data = data if group.part is None else getattr(data, group.part)

    def local(theta: Any, state: Any, data: Any, key: Array, tasks: Array, sets: Array) -> tuple[Any, ...]:
        one = lambda s, task, which: estimate(
            config, group.problem, theta, s, data, which, jax.random.fold_in(key, task)
        )
        result = jax.vmap(one)(state, tasks, sets)
        gradient = result.gradient
        if mesh is not None:
            # Summed on every device in the order of the tasks, so that the result does not depend on how they are
            # spread; theta is small.
            gradient = jax.lax.all_gather(gradient, TASK_AXIS, tiled=True)
        total = jax.tree.map(lambda x: jnp.tensordot(jnp.ones(len(group.tasks)), x, 1, precision="highest"), gradient)
        return total, result.state, result.meta_loss, result.restarted.astype(jnp.float32)

    if mesh is not None:
        if len(group.tasks) % mesh.size:
            raise ValueError(
                f"mesh: {len(group.tasks)} tasks of {group.problem} cannot be spread over {mesh.size} devices; give a"
                " number of tasks that is a multiple, or fewer devices."
            )
        spread = P(TASK_AXIS)
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), spread, P(), P(), spread, spread),
            out_specs=(P(), spread, spread, spread),
            check_vma=False,
        )
    return local(theta, state, data, key, jnp.array(group.tasks), jnp.array(group.sets))


def task_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays with a leading task axis."""
    return NamedSharding(mesh, P(TASK_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds."""
    return NamedSharding(mesh, P())
