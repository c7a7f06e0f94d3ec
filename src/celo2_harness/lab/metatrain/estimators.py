r"""Gradients of the meta-loss by antithetic evolution strategies, for any inner problem.

Letters, per task: theta the rule's numbers, eps ~ N(0, sigma^2) the perturbation of this outer iteration, xi the sum of
perturbations since the task's unroll began (this one included), l+ and l- the meta-losses of a step under theta + eps
and theta - eps with the same data, w the weight of a step (1, or by `meta_loss` = "last"), over the reference loss of
the unroll where there is one.

  pes   1 / (2 sigma^2 K) [ sum over steps before a restart of w (l+ - l-) xi
                            + sum over the restarting step and the steps after it of w (l+ - l-) eps ]
        xi <- xi + eps at the start of a truncation of K steps; xi <- eps if the unroll restarted in it.
  es    the same with eps in place of xi: what a truncation does to later ones is left out, which biases it.
  full  1 / (2 sigma^2 T) sum over all T steps of an unroll from a fresh start of w (l+ - l-) eps: no bias, but one
        outer iteration is as long as the longest of its unrolls.

A restart happens at the start of a step, so the loss of the restarting step already belongs to the new unroll.

Source: Vicol, Metz, Sohl-Dickstein, Unbiased gradient estimation in unrolled computation graphs with persistent
evolution strategies, ICML 2021.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from celo2_harness.lab.metatrain.instances import Instances, new_instances
from celo2_harness.lab.metatrain.problem import Clock, InnerProblem

# Any tree of arrays: the rule's numbers, or something of their shape.
Numbers = Any


@runtime_checkable
class Settings(Protocol):
    """The part of a recipe that an estimator looks at: fields of `MetaTrainConfig`."""

    @property
    def shortest_unroll(self) -> int: ...

    @property
    def longest_unroll(self) -> int: ...

    @property
    def truncation(self) -> int: ...

    @property
    def sigma(self) -> float: ...

    @property
    def meta_loss(self) -> Literal["mean", "last"]: ...

    @property
    def last_part(self) -> float: ...

    @property
    def instances(self) -> int: ...


class TaskState(NamedTuple):
    """The state of a task from one outer iteration to the next.

    Attributes:
        unrolls: The unrolls of the antithetic pair, with the sign as first axis; None where all start afresh.
        clock: The step at which each of them is.
        xi: The sum of perturbations since they began.
        instance: Which of the `instances` they are.
        instances: All unrolls of the task; None where there is no end of them.
    """

    unrolls: Any
    clock: Clock | None
    xi: Any
    instance: Int[Array, ""] | None = None
    instances: Instances | None = None


class Estimate(NamedTuple):
    """The result of an outer iteration of one task.

    Attributes:
        gradient: The estimate of the meta-gradient.
        state: The new state of the task; None if it keeps nothing.
        meta_loss: The mean meta-loss of the antithetic pair, weighed as in the gradient.
        restarted: Whether the task restarted.
    """

    gradient: Any
    state: TaskState | None
    meta_loss: Float[Array, ""]
    restarted: Bool[Array, ""]


# (settings, problem, theta, key) -> the first state of a task.
Init = Callable[[Settings, InnerProblem, Numbers, Array], TaskState | None]
# (settings, problem, theta, state, data, which, key) -> one outer iteration of a task on data set `which`.
Iterate = Callable[[Settings, InnerProblem, Numbers, TaskState | None, Any, Int[Array, ""], Array], Estimate]


class Estimator(NamedTuple):
    """An estimator for one task, to be vectorised over tasks.

    Attributes:
        init: A function that gives the first state of a task.
        estimate: A function that takes an outer iteration of a task.
    """

    init: Init
    estimate: Iterate


def bounded_loss(loss: Float[Array, "*n"], bound: float) -> Float[Array, "*n"]:
    """Returns the meta-loss of a step: the training loss in [0, bound], NaN counted as the upper end."""
    return jnp.clip(jnp.where(jnp.isnan(loss), bound, loss), 0.0, bound)


def step_weight(config: Settings, clock: Clock) -> Float[Array, ""]:
    """Returns w: 1 for the mean of an unroll; for its end, 1 / `last_part` in that last part of it and 0 before.

    The last step always counts, however short the unroll is.
    """
    if config.meta_loss == "mean":
        return jnp.ones_like(clock.step, jnp.float32)
    return jnp.where(clock.step + 1 > (1.0 - config.last_part) * clock.length, 1.0 / config.last_part, 0.0)


def draw_perturbation(sigma: float, theta: Numbers, key: Array) -> Numbers:
    """Draws eps ~ N(0, sigma^2) for every number of theta."""
    leaves, treedef = jax.tree.flatten(theta)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([sigma * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def _pair(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.stack([x, x]), tree)


def _antithetic(theta: Numbers, eps: Numbers) -> Numbers:
    return jax.tree.map(lambda x, e: jnp.stack([x + e, x - e]), theta, eps)


def _choose(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _step_pair(
    problem: InnerProblem, pair: Any, unrolls: Any, clock: Clock, data: Any, batch: Any
) -> tuple[Any, Array]:
    """One step under theta + eps and theta - eps on the same batch."""
    unrolls, losses = jax.vmap(lambda t, u: problem.step(t, u, clock, data, batch))(pair, unrolls)
    return unrolls, bounded_loss(losses, problem.loss_bound)


def new_pair(config: Settings, problem: InnerProblem, key: Array) -> tuple[Any, Clock]:
    """Returns a new pair of unrolls, and its length, log-uniform in [shortest_unroll, longest_unroll]."""
    unroll_key, length_key = jax.random.split(key)
    low, high = jnp.log(config.shortest_unroll), jnp.log(config.longest_unroll)
    length = jnp.round(jnp.exp(jax.random.uniform(length_key, (), minval=low, maxval=high))).astype(jnp.int32)
    return _pair(problem.fresh(unroll_key)), Clock(jnp.zeros([], jnp.int32), length)


def _fresh(
    config: Settings, problem: InnerProblem, instances: Instances | None, key: Array
) -> tuple[Any, Clock, Array | None]:
    """A new pair of unrolls, its length, and which of the instances it is."""
    if instances is None:
        return *new_pair(config, problem, key), None
    instance = instances.draw(key)
    return *new_pair(config, problem, instances.start_key(instance)), instance


def _init_truncated(config: Settings, problem: InnerProblem, theta: Numbers, key: Array) -> TaskState:
    """A fresh pair whose step counter starts at a random offset, so that tasks do not restart together."""
    instances = new_instances(config.instances, key)
    fresh_key, offset_key = jax.random.split(key)
    unrolls, clock, instance = _fresh(config, problem, instances, fresh_key)
    offset = jax.random.randint(offset_key, (), 0, config.longest_unroll)
    xi = jax.tree.map(jnp.zeros_like, theta)
    return TaskState(unrolls, clock._replace(step=offset), xi, instance, instances)


def _truncated(
    persistent: bool,
    config: Settings,
    problem: InnerProblem,
    theta: Numbers,
    state: TaskState | None,
    data: Any,
    which: Int[Array, ""],
    key: Array,
) -> Estimate:
    """K steps from where the task stands: "pes", or "es" if not persistent."""
    assert state is not None
    perturbation_key, batch_key, fresh_key = jax.random.split(key, 3)
    eps = draw_perturbation(config.sigma, theta, perturbation_key)
    xi = jax.tree.map(jnp.add, state.xi, eps) if persistent else eps
    pair = _antithetic(theta, eps)
    # An unroll restarts at most once per truncation (it is never shorter), so one fresh pair is enough.
    fresh = _fresh(config, problem, state.instances, fresh_key)
    batches = None
    if state.instances is None:
        batches = jax.vmap(lambda k: problem.sample(data, which, k))(jax.random.split(batch_key, config.truncation))

    def step(carry: tuple[Any, Array], batch: Any) -> tuple[tuple[Any, Array], tuple[Array, ...]]:
        (unrolls, clock, instance), restarted = carry
        ended = clock.step >= clock.length
        unrolls, clock, instance = _choose(ended, fresh, (unrolls, clock, instance))
        restarted = restarted | ended
        weight = step_weight(config, clock)
        if state.instances is not None:
            batch = problem.sample(data, which, state.instances.batch_key(instance, clock.step))
            weight = weight / state.instances.references[instance]
        unrolls, losses = _step_pair(problem, pair, unrolls, clock, data, batch)
        now = unrolls, clock._replace(step=clock.step + 1), instance
        return (now, restarted), (weight * (losses[0] - losses[1]), weight * jnp.mean(losses), restarted)

    start = (state.unrolls, state.clock, state.instance), jnp.zeros([], bool)
    ((unrolls, clock, instance), restarted), (difference, losses, restarted_by) = jax.lax.scan(
        step, start, batches, length=config.truncation
    )
    before = jnp.sum(jnp.where(restarted_by, 0.0, difference))
    after = jnp.sum(jnp.where(restarted_by, difference, 0.0))
    scale = 2.0 * config.sigma**2 * config.truncation
    return Estimate(
        gradient=jax.tree.map(lambda x, e: (before * x + after * e) / scale, xi, eps),
        state=TaskState(
            unrolls, clock, _choose(restarted, eps, xi) if persistent else state.xi, instance, state.instances
        ),
        meta_loss=jnp.mean(losses),
        restarted=restarted,
    )


def _init_full(config: Settings, problem: InnerProblem, theta: Numbers, key: Array) -> TaskState | None:
    """Whole unrolls leave nothing behind."""
    del problem, theta
    instances = new_instances(config.instances, key)
    return None if instances is None else TaskState(None, None, None, instances=instances)


def _full(
    config: Settings,
    problem: InnerProblem,
    theta: Numbers,
    state: TaskState | None,
    data: Any,
    which: Int[Array, ""],
    key: Array,
) -> Estimate:
    """A whole unroll from a fresh start."""
    perturbation_key, batch_key, fresh_key = jax.random.split(key, 3)
    eps = draw_perturbation(config.sigma, theta, perturbation_key)
    pair = _antithetic(theta, eps)
    instances = None if state is None else state.instances
    unrolls, clock, instance = _fresh(config, problem, instances, fresh_key)

    def step(carry: tuple[Any, Clock, Array, Array]) -> tuple[Any, Clock, Array, Array]:
        unrolls, clock, difference, total = carry
        weight = step_weight(config, clock)
        step_key = jax.random.fold_in(batch_key, clock.step)
        if instances is not None and instance is not None:
            step_key, weight = instances.batch_key(instance, clock.step), weight / instances.references[instance]
        batch = problem.sample(data, which, step_key)
        unrolls, losses = _step_pair(problem, pair, unrolls, clock, data, batch)
        difference = difference + weight * (losses[0] - losses[1])
        return unrolls, clock._replace(step=clock.step + 1), difference, total + weight * jnp.mean(losses)

    start = (unrolls, clock, jnp.zeros([]), jnp.zeros([]))
    _, _, difference, total = jax.lax.while_loop(lambda carry: carry[1].step < carry[1].length, step, start)
    scale = 2.0 * config.sigma**2 * clock.length
    gradient = jax.tree.map(lambda e: difference * e / scale, eps)
    return Estimate(gradient, state, total / clock.length, jnp.ones([], bool))


# How the meta-gradient is estimated; see the head of this file.
ESTIMATORS: dict[str, Estimator] = {
    "pes": Estimator(_init_truncated, lambda *args: _truncated(True, *args)),
    "es": Estimator(_init_truncated, lambda *args: _truncated(False, *args)),
    "full": Estimator(_init_full, _full),
}
