"""Proximal policy optimisation: advantages and the loss. What steps along its gradient is not decided here."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from celo2_harness._types import Params
from celo2_harness.lab.errors import check_range
from celo2_harness.lab.reinforce.actor_critic import ActorCriticConfig, apply_actor_critic


@dataclass(frozen=True)
class PPOConfig:
    """The settings of PPO; the defaults are those that are usual for Atari.

    Attributes:
        environments: The number of copies of the game.
        rollout: The number of steps of every copy between two updates.
        epochs: The number of times that an update goes through what was collected.
        minibatches: The number of parts of what was collected, each good for one optimizer step.
        discount: The weight of a reward one step later, gamma.
        gae_lambda: The weight of the advantage estimate one step longer, lambda.
        clip: How far the probability of an action may move from what it was, as a fraction; also how far a value may.
        entropy_coefficient: The weight of the policy's entropy in the loss.
        value_coefficient: The weight of the squared error of the values.
        max_gradient_norm: Gradients with a larger norm are scaled down to it before any optimizer sees them.
        reward_limit: Rewards are clipped to [-limit, limit] for learning; the returns that are reported are not.
    """

    environments: int = 8
    rollout: int = 128
    epochs: int = 4
    minibatches: int = 4
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.1
    entropy_coefficient: float = 0.01
    value_coefficient: float = 0.5
    max_gradient_norm: float = 0.5
    reward_limit: float = 1.0

    def __post_init__(self):
        counts = ("environments", "rollout", "epochs", "minibatches")
        check_range(1, **{name: getattr(self, name) for name in counts})
        check_range(0, 1, discount=self.discount, gae_lambda=self.gae_lambda)
        for name in ("clip", "max_gradient_norm", "reward_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a number above 0")
        if self.batch % self.minibatches:
            raise ValueError(
                f"minibatches = {self.minibatches}: expected a divisor of environments x rollout = {self.batch}"
            )

    @property
    def batch(self) -> int:
        """The number of agent steps per update."""
        return self.environments * self.rollout

    def updates(self, steps: int) -> int:
        """Returns the number of updates that make up so many agent steps, rounded up.

        >>> PPOConfig().updates(500_000), PPOConfig().optimizer_steps(500_000)
        (489, 7824)
        """
        return -(-steps // self.batch)

    def optimizer_steps(self, steps: int) -> int:
        """Returns the number of steps that an optimizer takes over so many agent steps."""
        return self.updates(steps) * self.epochs * self.minibatches


class Samples(NamedTuple):
    """Agent steps to learn from.

    Attributes:
        observations: What was seen.
        actions: What was done.
        log_probabilities: The logarithms of the probabilities of the actions, under the policy that chose them.
        values: What the value head said then.
        advantages: How much better than that the actions turned out.
        returns: What the value should have been.
    """

    observations: UInt8[Array, "batch height width channels"]
    actions: Int32[Array, " batch"]
    log_probabilities: Float32[Array, " batch"]
    values: Float32[Array, " batch"]
    advantages: Float32[Array, " batch"]
    returns: Float32[Array, " batch"]


class Losses(NamedTuple):
    """The parts of the loss, and what tells how far the policy moved.

    Attributes:
        loss: The sum policy - entropy_coefficient x entropy + value_coefficient x value.
        policy: The loss of the policy.
        value: The loss of the values, half a mean square.
        entropy: The entropy of the policy, in nats.
        divergence: An estimate of the Kullback-Leibler divergence of the new policy from the one that collected.
        clipped: The fraction of samples whose ratio is outside the clipping range.
    """

    loss: Float32[Array, ""]
    policy: Float32[Array, ""]
    value: Float32[Array, ""]
    entropy: Float32[Array, ""]
    divergence: Float32[Array, ""]
    clipped: Float32[Array, ""]


def generalized_advantages(
    rewards: Float[Array, "time count"],
    values: Float[Array, "time count"],
    terminals: Bool[Array, "time count"],
    last_values: Float[Array, " count"],
    discount: float,
    gae_lambda: float,
) -> Float[Array, "time count"]:
    """Generalised advantage estimation (arXiv 1506.02438).

    A_t = d_t + gamma lambda A_{t+1}, with d_t = r_t + gamma V_{t+1} - V_t; after a terminal step V_{t+1} and A_{t+1}
    count as 0.

    Args:
        rewards: The reward of each step.
        values: The values of the states that the steps were taken in.
        terminals: Whether a step was the last of its episode.
        last_values: The values of the states after the last step.
        discount: The weight gamma.
        gae_lambda: The weight lambda.

    Returns:
        The advantages.

    >>> one = jnp.ones((2, 1))
    >>> generalized_advantages(one, 0 * one, jnp.array([[False], [True]]), jnp.ones(1), 0.5, 1.0).tolist()
    [[1.5], [1.0]]
    """

    def back(carry, step):
        advantage, next_value = carry
        reward, value, goes_on = step
        advantage = reward + discount * next_value * goes_on - value + discount * gae_lambda * goes_on * advantage
        return (advantage, value), advantage

    start = (jnp.zeros_like(last_values), last_values)
    goes_on = 1.0 - terminals.astype(values.dtype)
    return jax.lax.scan(back, start, (rewards, values, goes_on), reverse=True)[1]


def ppo_loss(
    config: PPOConfig, network: ActorCriticConfig, params: Params, samples: Samples
) -> tuple[Float32[Array, ""], Losses]:
    """The clipped loss of PPO (arXiv 1707.06347).

    With r the ratio of the action's probability to what it was and A the advantage, brought to mean 0 and variance 1
    over the samples: the policy's loss is the mean of max(-A r, -A clip(r, 1 - e, 1 + e)). The values' is half the mean
    of the larger of (V - R)^2 and (V_old + clip(V - V_old, -e, e) - R)^2.

    Args:
        config: The coefficients.
        network: The size of the network.
        params: The parameters of the network.
        samples: A minibatch.

    Returns:
        The loss, and its parts.
    """
    logits, values = apply_actor_critic(network, params, samples.observations)
    log_policy = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_policy, samples.actions[:, None], axis=-1)[:, 0]
    log_ratio = chosen - samples.log_probabilities
    ratio = jnp.exp(log_ratio)
    advantages = samples.advantages - jnp.mean(samples.advantages)
    advantages = advantages / (jnp.std(samples.advantages) + 1e-8)
    clipped_ratio = jnp.clip(ratio, 1.0 - config.clip, 1.0 + config.clip)
    policy = jnp.mean(jnp.maximum(-advantages * ratio, -advantages * clipped_ratio))
    near = samples.values + jnp.clip(values - samples.values, -config.clip, config.clip)
    value = 0.5 * jnp.mean(jnp.maximum((values - samples.returns) ** 2, (near - samples.returns) ** 2))
    entropy = -jnp.mean(jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1))
    loss = policy - config.entropy_coefficient * entropy + config.value_coefficient * value
    # exp(x) - 1 - x is never negative, and its mean is the divergence where the samples are of the old policy.
    divergence = jnp.mean(ratio - 1.0 - log_ratio)
    clipped = jnp.mean(jnp.abs(ratio - 1.0) > config.clip, dtype=jnp.float32)
    return loss, Losses(loss, policy, value, entropy, divergence, clipped)
