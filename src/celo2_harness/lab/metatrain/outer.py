"""The outer step: an Optax optimizer on estimates of the meta-gradient, as a pure function of its state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.estimators import Numbers
from celo2_harness.lab.metatrain.groups import (
    TasksMetrics,
    init_tasks,
    replicated,
    run_groups,
    task_sharding,
    tasks_gradient,
)
from celo2_harness.lab.metatrain.problem import TaskGroup

WARMUP = 0.02
"""The part of a run that is warm-up under the outer schedule "cosine"."""


class MetaTrainState(NamedTuple):
    """Everything that a run needs to go on.

    Attributes:
        iteration: The number of outer iterations done.
        theta: The rule.
        outer: The state of the outer optimizer.
        tasks: The state of all tasks, per group, with the task as leading axis.
    """

    iteration: Int[Array, ""]
    theta: Any
    outer: optax.OptState
    tasks: tuple[Any, ...]


class MetaTrainMetrics(NamedTuple):
    """Metrics of an outer iteration.

    Attributes:
        tasks: The meta-losses, and how many tasks restarted.
        gradient_norm: The norm of the estimate of the meta-gradient.
        theta_norm: The norm of theta after the step.
    """

    tasks: TasksMetrics
    gradient_norm: Float[Array, ""]
    theta_norm: Float[Array, ""]


def outer_optimizer(config: MetaTrainConfig) -> optax.GradientTransformation:
    """Returns the optimizer of theta: AdamW, without clipping."""
    rate: Any = config.outer_learning_rate
    if config.outer_schedule == "cosine":
        warmup = max(1, round(WARMUP * config.iterations))
        rate = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, config.iterations)
    return optax.adamw(rate, b1=0.9, b2=0.999, weight_decay=config.outer_weight_decay)


def init_metatrain(
    config: MetaTrainConfig,
    sets: int,
    *,
    optimizer: optax.GradientTransformation | None = None,
    groups: tuple[TaskGroup, ...] | None = None,
    theta: Numbers | None = None,
    mesh: Mesh | None = None,
) -> MetaTrainState:
    """Returns the state before the first iteration; a function of its arguments alone.

    Args:
        config: The recipe.
        sets: The number of image sets.
        optimizer: The optimizer of theta, instead of the recipe's.
        groups: The tasks, instead of the recipe's.
        theta: The rule to begin with, instead of random numbers.
        mesh: The devices that the tasks are spread over, from `task_mesh`; `metatrain_step` needs the same.
    """
    state = _init(config, sets, optimizer, groups, theta)
    return state if mesh is None else place_state(state, mesh)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _init(
    config: MetaTrainConfig,
    sets: int,
    optimizer: optax.GradientTransformation | None,
    groups: tuple[TaskGroup, ...] | None,
    theta: Numbers | None,
) -> MetaTrainState:
    theta_key, tasks_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    start: Any = config.learned.init(theta_key) if theta is None else theta
    state = MetaTrainState(
        iteration=jnp.zeros([], jnp.int32),
        theta=start,
        outer=(optimizer or outer_optimizer(config)).init(start),
        tasks=init_tasks(config, groups or run_groups(config, sets), start, tasks_key),
    )
    # Weak types would be lost in a checkpoint and the resumed run would compile another program; so drop them here.
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)


def place_state(state: MetaTrainState, mesh: Mesh) -> MetaTrainState:
    """Lays a state out over a mesh: tasks spread, the rest on every device. All processes must give the same."""
    tasks = jax.device_put(state.tasks, task_sharding(mesh))
    rest = jax.device_put(state._replace(tasks=()), replicated(mesh))
    return rest._replace(tasks=tasks)


def place_data(data: Any, mesh: Mesh) -> Any:
    """Puts data on every device of a mesh. All processes must give the same."""
    return jax.device_put(data, replicated(mesh))


# How XLA compiles a step for CPUs, where it knows the option.
_COMPILER_OPTIONS = {
    # Loops over parameters fill whole registers: twice the speed of the network where they are 512 bits wide.
    "xla_cpu_prefer_vector_width": 512,
    # No matrix products from a library that is used for some numbers of tasks per device and not for others: its
    # rounding differs, and in training by Newton-Schulz one bit grows to order one within an outer iteration.
    "xla_cpu_experimental_ynn_fusion_type": "",
}


@functools.cache
def _jitted_step() -> Callable[..., tuple[MetaTrainState, MetaTrainMetrics]]:
    """`_step`, compiled with those of the options that this version of XLA has."""

    def known(name: str, value: Any) -> bool:
        try:
            jax.jit(lambda: 0.0, compiler_options={name: value}).lower().compile()
        except Exception:  # which error it is has changed between versions
            return False
        return True

    options = {name: value for name, value in _COMPILER_OPTIONS.items() if known(name, value)}
    return jax.jit(
        _step,
        static_argnames=("config", "optimizer", "groups", "mesh"),
        donate_argnames="state",
        compiler_options=options,
    )


def metatrain_step(
    config: MetaTrainConfig,
    state: MetaTrainState,
    data: Any,
    *,
    optimizer: optax.GradientTransformation | None = None,
    groups: tuple[TaskGroup, ...] | None = None,
    mesh: Mesh | None = None,
) -> tuple[MetaTrainState, MetaTrainMetrics]:
    """Takes one outer iteration: K inner steps of every task, one step on theta.

    Args:
        config: The recipe.
        state: The state, from `init_metatrain` or this function; its memory is reused.
        data: `InnerData`, or what the problems of `groups` sample from.
        optimizer: As in `init_metatrain`.
        groups: As in `init_metatrain`.
        mesh: As in `init_metatrain`. The result does not depend on it, but for rounding.

    Returns:
        The new state, and metrics.

    Raises:
        ValueError: If the tasks cannot be spread evenly over the mesh.
    """
    return _jitted_step()(config, state, data, optimizer=optimizer, groups=groups, mesh=mesh)


def _step(
    config: MetaTrainConfig,
    state: MetaTrainState,
    data: Any,
    *,
    optimizer: optax.GradientTransformation | None,
    groups: tuple[TaskGroup, ...] | None,
    mesh: Mesh | None,
) -> tuple[MetaTrainState, MetaTrainMetrics]:
    groups = run_groups(config, data.images.starts.shape[0]) if groups is None else groups
    key = jax.random.fold_in(jax.random.key(config.seed), 1 + state.iteration)
    gradient, tasks, metrics = tasks_gradient(config, groups, state.theta, state.tasks, data, key, mesh)
    updates, outer = (optimizer or outer_optimizer(config)).update(gradient, state.outer, state.theta)
    theta = jax.tree.map(jnp.add, state.theta, updates)
    norms = (optax.tree.norm(gradient), optax.tree.norm(theta))
    return MetaTrainState(state.iteration + 1, theta, outer, tasks), MetaTrainMetrics(metrics, *norms)
