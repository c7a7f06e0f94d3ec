"""Reinforcement learning: environments, a network, and the loss of proximal policy optimisation."""

from celo2_harness.lab.reinforce.actor_critic import NATURE_CONVOLUTIONS as NATURE_CONVOLUTIONS
from celo2_harness.lab.reinforce.actor_critic import ActorCritic as ActorCritic
from celo2_harness.lab.reinforce.actor_critic import ActorCriticConfig as ActorCriticConfig
from celo2_harness.lab.reinforce.actor_critic import ConvolutionConfig as ConvolutionConfig
from celo2_harness.lab.reinforce.actor_critic import apply_actor_critic as apply_actor_critic
from celo2_harness.lab.reinforce.actor_critic import init_actor_critic as init_actor_critic
from celo2_harness.lab.reinforce.atari import Atari as Atari
from celo2_harness.lab.reinforce.atari import AtariConfig as AtariConfig
from celo2_harness.lab.reinforce.catch import Catch as Catch
from celo2_harness.lab.reinforce.environments import ENVIRONMENTS as ENVIRONMENTS
from celo2_harness.lab.reinforce.environments import EnvironmentKind as EnvironmentKind
from celo2_harness.lab.reinforce.environments import Environments as Environments
from celo2_harness.lab.reinforce.environments import make_environments as make_environments
from celo2_harness.lab.reinforce.ppo import Losses as Losses
from celo2_harness.lab.reinforce.ppo import PPOConfig as PPOConfig
from celo2_harness.lab.reinforce.ppo import Samples as Samples
from celo2_harness.lab.reinforce.ppo import generalized_advantages as generalized_advantages
from celo2_harness.lab.reinforce.ppo import ppo_loss as ppo_loss
from celo2_harness.lab.reinforce.transition import Transition as Transition
