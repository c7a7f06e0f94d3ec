"""The outer loop: AdamW on the gradients of persistent evolution strategies."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from celo2_harness.metatrain.config import MetaTrainConfig
from celo2_harness.metatrain.pes import PesMetrics, PesState, init_pes, pes_gradient
from celo2_harness.rule import Theta, channel_counts
from celo2_harness.tasks.images import ImageSets


class MetaTrainState(NamedTuple):
    """Everything that a run needs to go on."""

    iteration: Int[Array, ""]
    theta: Theta
    outer: optax.OptState
    pes: PesState


class MetaTrainMetrics(NamedTuple):
    """Of one outer iteration."""

    pes: PesMetrics
    gradient_norm: Float[Array, ""]
    theta_norm: Float[Array, ""]


def init_theta(config: MetaTrainConfig, key: Array) -> Theta:
    """Kernels from a normal cut off at 2 sigma, sigma = 1 / sqrt(fan in); zero biases; three outputs."""
    channels, hidden, outputs = sum(channel_counts(config.rule)), config.hidden, 3
    keys = jax.random.split(key, 3)
    kernel = lambda k, i, o: jax.random.truncated_normal(k, -2.0, 2.0, (i, o)) / jnp.sqrt(i)
    return Theta(
        w0=kernel(keys[0], channels, hidden),
        b0=jnp.zeros(hidden),
        w1=kernel(keys[1], hidden, hidden),
        b1=jnp.zeros(hidden),
        w2=kernel(keys[2], hidden, outputs),
        b2=jnp.zeros(outputs),
    )


def outer_optimizer(config: MetaTrainConfig) -> optax.GradientTransformation:
    """AdamW at b1 0.9, b2 0.999, no clipping."""
    rate: optax.ScalarOrSchedule = config.outer_learning_rate
    if config.outer_schedule == "cosine":
        warmup = max(1, config.iterations // 50)
        rate = optax.warmup_cosine_decay_schedule(0.0, config.outer_learning_rate, warmup, config.iterations)
    return optax.adamw(rate, b1=0.9, b2=0.999, weight_decay=config.outer_weight_decay)


@partial(jax.jit, static_argnums=(0, 1))
def init_metatrain(config: MetaTrainConfig, sets: int) -> MetaTrainState:
    """The state before the first iteration; a function of the config alone."""
    theta_key, pes_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    theta = init_theta(config, theta_key)
    return MetaTrainState(
        iteration=jnp.zeros([], jnp.int32),
        theta=theta,
        outer=outer_optimizer(config).init(theta),
        pes=init_pes(config, theta, sets, pes_key),
    )


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def metatrain_step(
    config: MetaTrainConfig, state: MetaTrainState, data: ImageSets
) -> tuple[MetaTrainState, MetaTrainMetrics]:
    """One outer iteration: K inner steps of every task, one AdamW step on theta."""
    key = jax.random.fold_in(jax.random.key(config.seed), 1 + state.iteration)
    gradient, pes, metrics = pes_gradient(config, state.theta, state.pes, data, key)
    updates, outer = outer_optimizer(config).update(gradient, state.outer, state.theta)
    theta = jax.tree.map(jnp.add, state.theta, updates)
    norms = (optax.tree.norm(gradient), optax.tree.norm(theta))
    return MetaTrainState(state.iteration + 1, theta, outer, pes), MetaTrainMetrics(metrics, *norms)
