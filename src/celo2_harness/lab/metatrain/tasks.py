"""All tasks of a run at once: vectorised on a device, spread over the devices of a mesh."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.estimators import ESTIMATORS, Numbers
from celo2_harness.lab.metatrain.problem import TaskGroup

TASK_AXIS = "tasks"


class TasksMetrics(NamedTuple):
    """Mean meta-loss per data set, and the share of tasks that restarted."""

    meta_loss: Float[Array, " sets"]
    restarted: Float[Array, ""]


def task_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh that spreads tasks over devices; all devices of all processes by default."""
    return Mesh(np.array(jax.devices() if devices is None else devices), (TASK_AXIS,))


def fitting_mesh(mesh: Mesh, groups: tuple[TaskGroup, ...]) -> Mesh:
    """As much of a mesh as the tasks of every group can be spread over evenly."""
    tasks = math.gcd(*(len(group.tasks) for group in groups))
    size = max(n for n in range(1, mesh.size + 1) if tasks % n == 0)
    return task_mesh(list(mesh.devices.flat)[:size])


def init_tasks(config: MetaTrainConfig, groups: tuple[TaskGroup, ...], theta: Numbers, key: Array) -> tuple[Any, ...]:
    """First state of all tasks, per group; leading axis task. Task k draws from fold_in(key, k)."""

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
    """One outer iteration of all tasks.

    Args:
      config: the run.
      groups: the tasks.
      theta: the current rule.
      state: all tasks, as `init_tasks` and this function return them.
      data: what the problems sample from.
      key: randomness of this iteration; task k draws from fold_in(key, k), wherever it runs.
      mesh: devices to spread the tasks of each group over; None: no spreading.

    Returns:
      The mean of the tasks' estimates (entries that are not finite count as 0), the new state, metrics.

    Raises:
      ValueError: a group whose tasks cannot be spread evenly.
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
        check_spread(group, mesh.size)
        spread = P(TASK_AXIS)
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), spread, P(), P(), spread, spread),
            out_specs=(P(), spread, spread, spread),
            check_vma=False,
        )
    return local(theta, state, data, key, jnp.array(group.tasks), jnp.array(group.sets))


def check_spread(group: TaskGroup, devices: int) -> None:
    """Refuses a group whose tasks cannot be spread evenly.

    Raises:
      ValueError: their number is no multiple of the number of devices.
    """
    if len(group.tasks) % devices:
        raise ValueError(
            f"mesh: {len(group.tasks)} tasks of {group.problem} cannot be spread over {devices} devices; give a number"
            " of tasks that is a multiple, or fewer devices."
        )


def task_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays with a leading task axis."""
    return NamedSharding(mesh, P(TASK_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of arrays that every device holds."""
    return NamedSharding(mesh, P())
