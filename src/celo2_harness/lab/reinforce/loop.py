"""The loop of proximal policy optimisation, as a generator: it plays, learns from it, and yields what came out."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt8

from celo2_harness.lab.reinforce.actor_critic import ActorCriticConfig, apply_actor_critic, init_actor_critic
from celo2_harness.lab.reinforce.environments import Environments
from celo2_harness.lab.reinforce.ppo import Losses, PPOConfig, Samples, generalized_advantages, ppo_loss
from celo2_harness.lab.training.loop import TrainState


class Episode(NamedTuple):
    """A whole game.

    Attributes:
        step: The number of agent steps, over all copies, when it was over.
        total: The return: the sum of the rewards, neither clipped nor discounted.
        length: The number of agent steps that it had.
    """

    step: int
    total: float
    length: int


class PPOUpdate(NamedTuple):
    """The state, losses and episodes after an update.

    Attributes:
        state: The state after it; its `step` counts updates. Its arrays are given away to the next update.
        losses: The losses, means over the optimizer steps of the update.
        episodes: The games that ended while the update was collected for.
        seconds: How long playing and learning took.
    """

    state: TrainState
    losses: Losses
    episodes: list[Episode]
    seconds: float


class Rollout(NamedTuple):
    """The samples of one update."""

    observations: UInt8[Array, "time count height width channels"]
    actions: Int32[Array, "time count"]
    log_probabilities: Float32[Array, "time count"]
    values: Float32[Array, "time count"]
    rewards: Float32[Array, "time count"]
    terminals: Bool[Array, "time count"]


def init_agent(network: ActorCriticConfig, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first update.

    Args:
        network: The network.
        tx: The optimizer.
        seed: The seed of the initial parameters; optimizers compared on a seed start from the same ones.

    Returns:
        The state at update 0.
    """
    params = init_actor_critic(network, _keys(seed)[0])
    # Weak types would be lost in a checkpoint and the resumed run would compile another program; so drop them here.
    return TrainState(0, params, jax.tree.map(lambda x: jnp.array(x, dtype=x.dtype), tx.init(params)))


@partial(jax.jit, static_argnames="network")
def act(
    network: ActorCriticConfig,
    params: Any,
    observations: UInt8[Array, "count height width channels"],
    key: Key[Array, ""],
    step: Int32[Array, ""],
) -> tuple[Int32[Array, " count"], Float32[Array, " count"], Float32[Array, " count"]]:
    """Draws actions from the policy.

    Args:
        network: The network.
        params: The parameters of the network.
        observations: What is seen.
        key: The key of the update that is collected for.
        step: The step within that update; another one draws other actions.

    Returns:
        The actions, the logarithms of their probabilities, and the values.
    """
    logits, values = apply_actor_critic(network, params, observations)
    actions = jax.random.categorical(jax.random.fold_in(key, step), logits).astype(jnp.int32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), actions[:, None], axis=-1)[:, 0]
    return actions, chosen, values


@partial(jax.jit, static_argnames=("network", "config", "tx"), donate_argnames=("params", "opt_state"))
def ppo_update(
    network: ActorCriticConfig,
    config: PPOConfig,
    tx: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    rollout: Rollout,
    last_observations: UInt8[Array, "count height width channels"],
    key: Key[Array, ""],
) -> tuple[Any, Any, Losses]:
    """Learns from a rollout: `epochs` times over it, in shuffled minibatches, with one optimizer step each.

    Args:
        network: The network.
        config: The settings of PPO.
        tx: The optimizer. It gets gradients of a norm of at most `max_gradient_norm`, and the loss as `value`.
        params: The parameters; they and the optimizer's state are given away.
        opt_state: The optimizer's state.
        rollout: What was collected.
        last_observations: What is seen after the last step of the rollout.
        key: The key of the shuffling.

    Returns:
        The new parameters, the new optimizer state, and the losses, means over all optimizer steps.
    """
    rewards = jnp.clip(rollout.rewards, -config.reward_limit, config.reward_limit)
    _, last_values = apply_actor_critic(network, params, last_observations)
    advantages = generalized_advantages(
        rewards, rollout.values, rollout.terminals, last_values, config.discount, config.gae_lambda
    )
    samples = Samples(
        rollout.observations,
        rollout.actions,
        rollout.log_probabilities,
        rollout.values,
        advantages,
        advantages + rollout.values,
    )
    samples = jax.tree.map(lambda x: jnp.reshape(x, (config.batch, *x.shape[2:])), samples)
    clip = optax.clip_by_global_norm(config.max_gradient_norm)
    update = optax.with_extra_args_support(tx).update

    def learn(carry, indices):
        params, opt_state = carry
        minibatch = jax.tree.map(lambda x: x[indices], samples)
        gradient = jax.grad(ppo_loss, argnums=2, has_aux=True)
        grads, losses = gradient(config, network, params, minibatch)
        grads, _ = clip.update(grads, clip.init(params))
        updates, opt_state = update(grads, opt_state, params, value=losses.loss)
        return (optax.apply_updates(params, updates), opt_state), losses

    orders = jax.vmap(lambda key: jax.random.permutation(key, config.batch))(jax.random.split(key, config.epochs))
    orders = orders.reshape(config.epochs * config.minibatches, -1)
    (params, opt_state), losses = jax.lax.scan(learn, (params, opt_state), orders)
    return params, opt_state, jax.tree.map(jnp.mean, losses)


def train_agent(
    environments: Environments,
    network: ActorCriticConfig,
    config: PPOConfig,
    tx: optax.GradientTransformation,
    state: TrainState,
    *,
    updates: int,
    seed: int,
) -> Iterator[PPOUpdate]:
    """Trains from a state up to a number of updates, yielding after every one.

    The emulators cannot be saved, so a state from a checkpoint goes on with new games: episodes that were under way are
    not counted, and the numbers are not those of a run that was never stopped.

    Args:
        environments: The copies of the game, as many as `config` says.
        network: The network, made for them.
        config: The settings of PPO.
        tx: The optimizer.
        state: Where to start; its arrays are given away.
        updates: The total number of updates, those already done included.
        seed: The seed of the games and of what is drawn.

    Yields:
        A `PPOUpdate` per update.
    """
    games = int(np.random.SeedSequence([seed, state.step]).generate_state(1)[0])
    observations = environments.reset(games)
    tally = _Tally(config.environments)
    while state.step < updates:
        started = time.perf_counter()
        key = jax.random.fold_in(_keys(seed)[1], state.step)
        play, shuffle = jax.random.split(key)
        rollout, observations, episodes = _collect(
            environments, network, config, state.params, observations, play, tally, state.step * config.batch
        )
        params, opt_state, losses = ppo_update(
            network, config, tx, state.params, state.opt_state, rollout, observations, shuffle
        )
        state = TrainState(state.step + 1, params, opt_state)
        losses = jax.block_until_ready(losses)
        yield PPOUpdate(state, losses, episodes, time.perf_counter() - started)


def _keys(seed: int) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """One key for the initial parameters, and one for the rest."""
    first, second = jax.random.split(jax.random.key(seed))
    return first, second


class _Tally:
    """Adds up the rewards of the episodes under way."""

    def __init__(self, count: int):
        self._totals, self._lengths = np.zeros(count), np.zeros(count, np.int64)

    def add(self, step: int, rewards: np.ndarray, over: np.ndarray) -> list[Episode]:
        """Counts a step of every copy; returns the episodes that it ended."""
        self._totals += rewards
        self._lengths += 1
        ended = [Episode(step, float(self._totals[i]), int(self._lengths[i])) for i in np.flatnonzero(over)]
        self._totals[over], self._lengths[over] = 0.0, 0
        return ended


def _collect(
    environments: Environments,
    network: ActorCriticConfig,
    config: PPOConfig,
    params: Any,
    observations: np.ndarray,
    key: Key[Array, ""],
    tally: _Tally,
    steps_before: int,
) -> tuple[Rollout, np.ndarray, list[Episode]]:
    shape = (config.rollout, config.environments)
    observed = (*shape, *environments.observation_shape)
    columns = [np.empty(observed, np.uint8), np.empty(shape, np.int32)]
    columns += [np.empty(shape, dtype) for dtype in (np.float32, np.float32, np.float32, np.bool_)]
    episodes = []
    for time_step in range(config.rollout):
        chosen = act(network, params, observations, key, np.int32(time_step))
        actions, log_probabilities, values = map(np.asarray, chosen)
        after = environments.step(actions)
        record = (observations, actions, log_probabilities, values, after.rewards, after.terminals)
        for column, entry in zip(columns, record, strict=True):
            column[time_step] = entry
        step = steps_before + (time_step + 1) * config.environments
        episodes += tally.add(step, after.rewards, after.episodes_over)
        observations = after.observations
    return Rollout._make(map(jnp.asarray, columns)), observations, episodes
