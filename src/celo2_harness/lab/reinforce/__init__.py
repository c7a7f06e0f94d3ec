"""Reinforcement learning: games, a network, and proximal policy optimisation with any optimizer."""

from celo2_harness.lab.reinforce.actor_critic import (
    NATURE_CONVOLUTIONS as NATURE_CONVOLUTIONS,
    ActorCritic as ActorCritic,
    ActorCriticConfig as ActorCriticConfig,
    ConvolutionConfig as ConvolutionConfig,
    apply_actor_critic as apply_actor_critic,
    init_actor_critic as init_actor_critic,
)
from celo2_harness.lab.reinforce.atari import Atari as Atari, AtariConfig as AtariConfig
from celo2_harness.lab.reinforce.catch import Catch as Catch
from celo2_harness.lab.reinforce.environments import Environments as Environments, Transition as Transition
from celo2_harness.lab.reinforce.games import (
    ENVIRONMENTS as ENVIRONMENTS,
    EnvironmentKind as EnvironmentKind,
    make_environments as make_environments,
)
from celo2_harness.lab.reinforce.loop import (
    Episode as Episode,
    PPOUpdate as PPOUpdate,
    init_agent as init_agent,
    train_agent as train_agent,
)
from celo2_harness.lab.reinforce.ppo import (
    Losses as Losses,
    PPOConfig as PPOConfig,
    Samples as Samples,
    generalized_advantages as generalized_advantages,
    ppo_loss as ppo_loss,
)
from celo2_harness.lab.reinforce.run import (
    ReinforceConfig as ReinforceConfig,
    ReinforceResult as ReinforceResult,
    reinforce as reinforce,
)
