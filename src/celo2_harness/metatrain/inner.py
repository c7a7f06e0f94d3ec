"""The inner loop: one small network trained by the rule under meta-training, one step at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from celo2_harness.metatrain.config import MetaTrainConfig
from celo2_harness.rule import Moments, Theta, default_view, init_moments, leaf_direction, newton_schulz
from celo2_harness.tasks.image_mlp import Mlp, init_mlp, mlp_loss

RMS_FLOOR = 1e-9
ADAM_DECAYS = (0.9, 0.95)
ADAM_FLOOR = 1e-8  # under the root, as the paper's inner Adam has it; no bias correction


class AdamMoments(NamedTuple):
    """First and second moment of one leaf."""

    mu: Float[Array, "..."]
    nu: Float[Array, "..."]


class Unroll(NamedTuple):
    """One inner training run: parameters (divided by alpha), optimizer state per leaf, and its task's constants."""

    params: Mlp
    state: tuple[Any, ...]
    alpha: Float[Array, ""]


class Clock(NamedTuple):
    """Where an unroll stands: steps done, and steps until it is restarted. Shared by an antithetic pair."""

    step: Int[Array, ""]
    length: Int[Array, ""]


def _learned(config: MetaTrainConfig, leaf: Array) -> bool:
    return config.variant == "base" or leaf.ndim >= 2


def fresh_unroll(config: MetaTrainConfig, key: Array) -> tuple[Unroll, Clock]:
    """A new task: initial parameters, zero state, augmentation alpha and unroll length."""
    params_key, alpha_key, length_key = jax.random.split(key, 3)
    bound = jnp.log(config.augmentation)
    alpha = jnp.exp(jax.random.uniform(alpha_key, (), minval=-bound, maxval=bound))
    params = jax.tree.map(lambda p: p / alpha, init_mlp(params_key, config.widths))
    state = tuple(
        init_moments(config.rule, default_view(leaf.shape))
        if _learned(config, leaf)
        else AdamMoments(jnp.zeros_like(leaf), jnp.zeros_like(leaf))
        for leaf in jax.tree.leaves(params)
    )
    low, high = jnp.log(config.shortest_unroll), jnp.log(config.longest_unroll)
    length = jnp.round(jnp.exp(jax.random.uniform(length_key, (), minval=low, maxval=high))).astype(jnp.int32)
    return Unroll(params, state, alpha), Clock(jnp.zeros([], jnp.int32), length)


def inner_step(
    config: MetaTrainConfig, theta: Theta, unroll: Unroll, images: Array, labels: Array
) -> tuple[Unroll, Float[Array, ""]]:
    """One training step.

    Returns:
      The unroll after the step, and the training loss before it.
    """

    def loss_fn(params: Mlp) -> Float[Array, ""]:
        return mlp_loss(jax.tree.map(lambda p: p * unroll.alpha, params), images, labels)

    loss, gradients = jax.value_and_grad(loss_fn)(unroll.params)
    leaves, treedef = jax.tree.flatten(unroll.params)
    new_leaves, new_state = [], []
    for p, g, s in zip(leaves, jax.tree.leaves(gradients), unroll.state, strict=True):
        if isinstance(s, Moments):
            direction, s = _learned_update(config, theta, g, p, s)
            p = p - config.inner_learning_rate * direction
        else:
            mu = ADAM_DECAYS[0] * s.mu + (1 - ADAM_DECAYS[0]) * g
            nu = ADAM_DECAYS[1] * s.nu + (1 - ADAM_DECAYS[1]) * jnp.square(g)
            s = AdamMoments(mu, nu)
            p = p - config.inner_learning_rate * config.adam_factor * mu / jnp.sqrt(nu + ADAM_FLOOR)
        new_leaves.append(p)
        new_state.append(s)
    return Unroll(treedef.unflatten(new_leaves), tuple(new_state), unroll.alpha), loss


def _learned_update(
    config: MetaTrainConfig, theta: Theta, gradient: Array, parameter: Array, moments: Moments
) -> tuple[Array, Moments]:
    view = default_view(gradient.shape)
    direction, moments, _ = leaf_direction(theta, config.rule, view, gradient, parameter, moments)
    if config.variant == "ortho" and view.is_matrix:
        direction = newton_schulz(direction)
    if config.rule.normalization == "per_step":
        square = jnp.mean(jnp.square(direction), axis=view.axes, keepdims=True)
        direction = direction / jnp.sqrt(square + RMS_FLOOR)
    return view.invert(direction), moments
