"""Reinforcement learning: games, a network, and proximal policy optimisation with any optimizer."""

from celo2_harness.lab.reinforce.actor_critic import NATURE_CONVOLUTIONS as NATURE_CONVOLUTIONS
from celo2_harness.lab.reinforce.actor_critic import ActorCritic as ActorCritic
from celo2_harness.lab.reinforce.actor_critic import ActorCriticConfig as ActorCriticConfig
from celo2_harness.lab.reinforce.actor_critic import ConvolutionConfig as ConvolutionConfig
from celo2_harness.lab.reinforce.actor_critic import apply_actor_critic as apply_actor_critic
from celo2_harness.lab.reinforce.actor_critic import init_actor_critic as init_actor_critic
from celo2_harness.lab.reinforce.atari import Atari as Atari
from celo2_harness.lab.reinforce.atari import AtariConfig as AtariConfig
from celo2_harness.lab.reinforce.catch import Catch as Catch
from celo2_harness.lab.reinforce.environments import Environments as Environments
from celo2_harness.lab.reinforce.environments import Transition as Transition
from celo2_harness.lab.reinforce.games import ENVIRONMENTS as ENVIRONMENTS
from celo2_harness.lab.reinforce.games import EnvironmentKind as EnvironmentKind
from celo2_harness.lab.reinforce.games import make_environments as make_environments
from celo2_harness.lab.reinforce.loop import Episode as Episode
from celo2_harness.lab.reinforce.loop import PPOUpdate as PPOUpdate
from celo2_harness.lab.reinforce.loop import init_agent as init_agent
from celo2_harness.lab.reinforce.loop import train_agent as train_agent
from celo2_harness.lab.reinforce.ppo import Losses as Losses
from celo2_harness.lab.reinforce.ppo import PPOConfig as PPOConfig
from celo2_harness.lab.reinforce.ppo import Samples as Samples
from celo2_harness.lab.reinforce.ppo import generalized_advantages as generalized_advantages
from celo2_harness.lab.reinforce.ppo import ppo_loss as ppo_loss
from celo2_harness.lab.reinforce.run import ReinforceConfig as ReinforceConfig
from celo2_harness.lab.reinforce.run import ReinforceResult as ReinforceResult
from celo2_harness.lab.reinforce.run import reinforce as reinforce
