r"""Persistent evolution strategies: gradients of the meta-loss from truncated, antithetic unrolls.

Per task, with eps the perturbation of this truncation, xi <- xi + eps the sum of perturbations since its unroll began,
and l+ - l- the difference of the meta-losses under theta + eps and theta - eps:

  estimate = 1 / (2 sigma^2 K) * [ sum over steps before a restart of (l+ - l-) xi
                                   + sum over the restarting step and the steps after it of (l+ - l-) eps ]

If the unroll restarted in this truncation, xi <- eps. A restart happens at the start of a step, so the loss of the
restarting step already belongs to the new unroll. Source: Vicol, Metz, Sohl-Dickstein, ICML 2021.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from celo2_harness.metatrain.config import MetaTrainConfig
from celo2_harness.metatrain.inner import Clock, Unroll, fresh_unroll, inner_step
from celo2_harness.rule import Theta
from celo2_harness.tasks.images import ImageSets

LARGEST_LOSS = 1.5 * math.log(10.0)


class PesState(NamedTuple):
    """State of all tasks; leading axis task, second axis (in `unrolls`) the sign of the antithetic pair."""

    unrolls: Unroll
    clocks: Clock
    xi: Theta


class PesMetrics(NamedTuple):
    """Mean meta-loss per image set, and the share of tasks that restarted."""

    meta_loss: Float[Array, " sets"]
    restarted: Float[Array, ""]


def _pair(tree: Unroll) -> Unroll:
    return jax.tree.map(lambda x: jnp.stack([x, x]), tree)


def init_pes(config: MetaTrainConfig, theta: Theta, sets: int, key: Array) -> PesState:
    """Fresh tasks whose step counters start at random offsets, so that they do not restart together."""
    tasks = sets * config.tasks_per_set
    task_key, offset_key = jax.random.split(key)
    unrolls, clocks = jax.vmap(lambda k: fresh_unroll(config, k))(jax.random.split(task_key, tasks))
    offset = jax.random.randint(offset_key, (tasks,), 0, config.longest_unroll)
    return PesState(
        unrolls=jax.vmap(_pair)(unrolls),
        clocks=clocks._replace(step=offset),
        xi=jax.tree.map(lambda x: jnp.zeros((tasks, *x.shape)), theta),
    )


def bounded_loss(loss: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The meta-loss of a step: the training loss in [0, 1.5 ln 10], NaN counted as the upper end."""
    return jnp.clip(jnp.where(jnp.isnan(loss), LARGEST_LOSS, loss), 0.0, LARGEST_LOSS)


def pes_gradient(
    config: MetaTrainConfig, theta: Theta, state: PesState, data: ImageSets, key: Array
) -> tuple[Theta, PesState, PesMetrics]:
    """One truncation of all tasks.

    Args:
      config: the run.
      theta: the current rule.
      state: all tasks, as `init_pes` and this function return them.
      data: image sets; task i uses set i // tasks_per_set.
      key: randomness of this truncation: perturbations, batches, fresh tasks.

    Returns:
      The mean of the tasks' estimates (entries that are not finite count as 0), the new state, metrics.
    """
    tasks = state.clocks.step.shape[0]
    which = jnp.arange(tasks) // config.tasks_per_set
    perturbation_key, batch_key, fresh_key = jax.random.split(key, 3)
    leaves, treedef = jax.tree.flatten(theta)
    perturbation_keys = jax.random.split(perturbation_key, len(leaves))
    eps = treedef.unflatten(
        [config.sigma * jax.random.normal(k, (tasks, *x.shape)) for k, x in zip(perturbation_keys, leaves, strict=True)]
    )
    xi = jax.tree.map(jnp.add, state.xi, eps)
    pairs = jax.tree.map(lambda x, e: jnp.stack([x + e, x - e], axis=1), theta, eps)
    # An unroll restarts at most once per truncation (it is never shorter), so one fresh task each is enough.
    fresh, fresh_clocks = jax.vmap(lambda k: fresh_unroll(config, k))(jax.random.split(fresh_key, tasks))
    fresh = jax.vmap(_pair)(fresh)
    batch_keys = jax.random.split(batch_key, (config.truncation, tasks))

    def step(
        carry: tuple[Unroll, Clock, Array], keys: Array
    ) -> tuple[tuple[Unroll, Clock, Array], tuple[Array, Array]]:
        unrolls, clocks, restarted = carry
        ended = clocks.step >= clocks.length
        choose = lambda new, old: jnp.where(ended.reshape(-1, *[1] * (old.ndim - 1)), new, old)
        unrolls = jax.tree.map(choose, fresh, unrolls)
        clocks = jax.tree.map(choose, fresh_clocks, clocks)
        restarted = restarted | ended

        def task(theta_pair: Theta, unroll_pair: Unroll, k: Array, which: Array) -> tuple[Unroll, Array]:
            images, labels = data.batch(which, k, config.batch)
            return jax.vmap(lambda t, u: inner_step(config, t, u, images, labels))(theta_pair, unroll_pair)

        unrolls, losses = jax.vmap(task)(pairs, unrolls, keys, which)
        return (unrolls, clocks._replace(step=clocks.step + 1), restarted), (bounded_loss(losses), restarted)

    start = (state.unrolls, state.clocks, jnp.zeros((tasks,), bool))
    (unrolls, clocks, restarted), (losses, restarted_by) = jax.lax.scan(step, start, batch_keys)

    difference = losses[..., 0] - losses[..., 1]
    before = jnp.sum(jnp.where(restarted_by, 0.0, difference), axis=0)
    after = jnp.sum(jnp.where(restarted_by, difference, 0.0), axis=0)

    def estimate(x: Array, e: Array) -> Array:
        weighted = jnp.tensordot(before, x, 1) + jnp.tensordot(after, e, 1)
        mean = weighted / (2.0 * config.sigma**2 * config.truncation * tasks)
        return jnp.where(jnp.isfinite(mean), mean, 0.0)

    gradient = jax.tree.map(estimate, xi, eps)
    kept = jax.tree.map(lambda x, e: jnp.where(restarted.reshape(-1, *[1] * (x.ndim - 1)), e, x), xi, eps)
    per_set = jnp.mean(losses, axis=(0, 2)).reshape(-1, config.tasks_per_set).mean(axis=1)
    return gradient, PesState(unrolls, clocks, kept), PesMetrics(per_set, jnp.mean(restarted))
