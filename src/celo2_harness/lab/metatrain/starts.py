"""Where theta begins: at random numbers, at earlier weights, or at a rule made by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from celo2_harness.lab.metatrain.celo2_rule import Celo2Learning
from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.rule import RuleConfig, Theta, channel_counts

HAND_MADE = {"muon": ("gradient", "momentum"), "soap": ("gradient_over_rms", "momentum_over_rms")}
"""Rules made by hand: the features of the gradient and of the momenta that they weigh."""
# Of the gradient and the momenta 0.9 and 0.99; those of the preset `modern_muon`.
_WEIGHTS = (1.0, 1.9, 0.76)


def starting_theta(config: MetaTrainConfig, theta: Any, source: str) -> Any:
    """Returns the theta that a run starts from.

    Args:
        config: The recipe.
        theta: Random numbers.
        source: Weights (see `load_weights`), or "muon" or "soap" for a rule made by hand, whose weights may follow:
            "muon:1,1.9,0.76" weighs the gradient, the first and the second momentum, and no other.

    Raises:
        ValueError: If the weights are of another rule, or the rule cannot express what is asked for.
    """
    name, _, numbers = source.partition(":")
    if name not in HAND_MADE:
        return jax.tree.map(jnp.asarray, config.learned.load(source).theta)
    learned = config.learned
    if not isinstance(learned, Celo2Learning):
        raise ValueError(f"start_from = {source!r}: a rule of variant {config.variant} cannot be set by hand.")
    if name == "soap" and not config.eigenbasis:
        raise ValueError(f"start_from = {source!r}: it acts in the eigenbasis; give eigenbasis, or start from muon.")
    try:
        weights = tuple(map(float, numbers.split(","))) if numbers else _WEIGHTS
    except ValueError:
        raise ValueError(
            f"start_from = {source!r}: expected weights of the gradient and the momenta, such as {name}:1,1.9,0.76."
        ) from None
    return hand_made_theta(config.rule, theta, channel_weights(config.rule, HAND_MADE[name], weights, source))


def channel_weights(rule: RuleConfig, features: tuple[str, str], weights: tuple[float, ...], source: str) -> np.ndarray:
    """Returns the weight of every channel of a rule, which is zero for most.

    Args:
        rule: The configuration of the rule.
        features: The names of the features of the gradient and of the momenta.
        weights: The weights of the gradient and of the momenta, in the order of their decays.
        source: The name of the rule, for messages.

    Raises:
        ValueError: If the rule lacks a feature, or has fewer momenta than there are weights.
    """
    missing = [name for name in features if name not in rule.features]
    if missing or len(weights) > 1 + len(rule.momentum_decays):
        raise ValueError(
            f"start_from = {source!r}: {len(weights)} weights of the features {' and '.join(features)}, but the rule"
            f" has the features {', '.join(rule.features)} and momentum_decays {rule.momentum_decays}."
        )
    starts = dict(zip(rule.features, np.cumsum((0, *channel_counts(rule))), strict=False))
    found = np.zeros(sum(channel_counts(rule)), np.float32)
    found[starts[features[0]]] = weights[0]
    found[starts[features[1]] :][: len(weights) - 1] = weights[1:]
    return found


def hand_made_theta(rule: RuleConfig, theta: Theta, weights: np.ndarray) -> Theta:
    """Returns a theta whose output is a weighted sum of its normalised channels.

    Two units carry the positive and the negative part of the sum through the network. The others keep their random
    numbers and are silent: nothing reads them, but evolution strategies see what reading them would bring.

    Args:
        rule: The configuration of the rule.
        theta: Random numbers, with at least two hidden units.
        weights: The weight of every channel.

    Raises:
        ValueError: If there is but one hidden unit.
    """
    if theta.b0.shape[0] < 2:
        raise ValueError("start_from: a rule made by hand takes two hidden units, hidden is 1.")
    assert len(weights) == sum(channel_counts(rule))
    pair = jnp.stack([jnp.asarray(weights), -jnp.asarray(weights)], axis=1)
    return Theta(
        w0=jnp.asarray(theta.w0).at[:, :2].set(pair),
        b0=jnp.asarray(theta.b0).at[:2].set(0.0),
        w1=jnp.asarray(theta.w1).at[:, :2].set(jnp.eye(theta.w1.shape[0], 2)),
        b1=jnp.asarray(theta.b1).at[:2].set(0.0),
        w2=jnp.zeros_like(theta.w2).at[:2, 0].set(jnp.array([1.0, -1.0])),
        b2=jnp.zeros_like(theta.b2),
    )
