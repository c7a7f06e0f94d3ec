"""The training fraction as a feature: how much of the run is over, one number per step.

It is the same for all parameters, so its channel is a part of the first layer's bias, and costs nothing per parameter.
"""

import jax.numpy as jnp
from jaxtyping import ArrayLike

from celo2_harness.rule.config import RuleConfig, Theta
from celo2_harness.rule.features import channel_counts

TRAINING_FRACTION = "training_fraction"


def sees_training_fraction(config: RuleConfig) -> bool:
    """Returns whether the rule has the training fraction among its features."""
    return TRAINING_FRACTION in config.features


def at_training_fraction(theta: Theta, config: RuleConfig, fraction: ArrayLike) -> Theta:
    """Moves the channel of the training fraction into the bias of the first layer: b0 <- b0 + (2 t - 1) w0[row].

    The channel is 2 t - 1, from -1 at the start of a run to 1 at its end. It is not normalised like the others, since a
    number divided by its own root mean square is a sign.

    Args:
        theta: The numbers of the network.
        config: The configuration that theta was trained with.
        fraction: t, the part of the run that is over; what is outside of [0, 1] counts as the nearer end.

    Returns:
        The theta to evaluate at this time; the given one if the rule does not see the training fraction.

    Example:
        >>> import numpy as np
        >>> config = RuleConfig(features=("gradient", "training_fraction"))
        >>> weights = [np.ones(shape) for shape in ((2, 1), 1, (1, 1), 1, (1, 3), 3)]
        >>> float(at_training_fraction(Theta(*weights), config, 0.75).b0[0])
        1.5
    """
    if not sees_training_fraction(config):
        return theta
    row = sum(channel_counts(config)[: config.features.index(TRAINING_FRACTION)])
    channel = 2.0 * jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0) - 1.0
    return theta._replace(b0=theta.b0 + channel * theta.w0[row])
