"""A policy and a value function on shared layers: the network of the Nature paper, or any of its form."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, UInt8

from celo2_harness._types import Params
from celo2_harness.lab.reinforce.convolution import convolve


class ConvolutionConfig(NamedTuple):
    """A convolutional layer.

    Attributes:
        features: The number of output channels.
        side: The height and width of the kernel.
        stride: The distance between neighbouring outputs; it divides the side.
    """

    features: int
    side: int
    stride: int


NATURE_CONVOLUTIONS = (ConvolutionConfig(32, 8, 4), ConvolutionConfig(64, 4, 2), ConvolutionConfig(64, 3, 1))


@dataclass(frozen=True)
class ActorCriticConfig:
    """The size of a network.

    Attributes:
        observation_shape: The height, width and channels of what it sees.
        actions: The number of actions that the policy chooses from.
        convolutions: The convolutional layers, without padding; none for a plain perceptron.
        hidden: The units of the layer between them and the heads.
    """

    observation_shape: tuple[int, int, int]
    actions: int
    convolutions: tuple[ConvolutionConfig, ...] = NATURE_CONVOLUTIONS
    hidden: int = 512

    def __post_init__(self):
        self.flat_size()

    def flat_size(self) -> int:
        """Returns the number of values that the convolutional layers leave.

        >>> ActorCriticConfig((84, 84, 4), actions=3).flat_size()
        3136
        """
        height, width, channels = self.observation_shape
        for layer in self.convolutions:
            height, width = ((length - layer.side) // layer.stride + 1 for length in (height, width))
            channels = layer.features
            if min(height, width) < 1:
                raise ValueError(f"convolutions: {layer} leaves nothing of observations {self.observation_shape}")
        return height * width * channels


class Convolution(nnx.Conv):
    """A convolution without padding that is fast on a CPU too."""

    def __init__(self, inputs: int, layer: ConvolutionConfig, rngs: nnx.Rngs):
        super().__init__(
            inputs,
            layer.features,
            (layer.side, layer.side),
            layer.stride,
            padding="VALID",
            kernel_init=_orthogonal(math.sqrt(2)),
            rngs=rngs,
        )
        self.stride = layer.stride

    def __call__(
        self, inputs: Float[Array, "batch height width channels"], out_sharding: Any = None
    ) -> Float[Array, "batch rows columns features"]:
        del out_sharding
        assert self.bias is not None
        return jnp.add(convolve(inputs, self.kernel[...], self.stride), self.bias[...])


def _orthogonal(scale: float) -> Any:
    return nnx.initializers.orthogonal(scale)


class ActorCritic(nnx.Module):
    """Convolutions, one hidden layer, and two heads: logits of the actions and the value of the state.

    ReLU between layers. Kernels start orthogonal, scaled by sqrt(2) in the body, 0.01 in the policy (all actions are
    about equally likely at first) and 1 in the value; biases start at 0.

    Args:
        config: The size.
        rngs: The source of the initial values; only the `params` stream is used.

    >>> config = ActorCriticConfig((84, 84, 4), actions=3)
    >>> logits, values = nnx.eval_shape(ActorCritic(config, nnx.Rngs(0)), jnp.zeros((2, 84, 84, 4), jnp.uint8))
    >>> logits.shape, values.shape
    ((2, 3), (2,))
    """

    def __init__(self, config: ActorCriticConfig, rngs: nnx.Rngs):
        channels = config.observation_shape[-1]
        self.convolutions = nnx.List()
        for layer in config.convolutions:
            self.convolutions.append(Convolution(channels, layer, rngs))
            channels = layer.features
        self.hidden = nnx.Linear(config.flat_size(), config.hidden, kernel_init=_orthogonal(math.sqrt(2)), rngs=rngs)
        self.policy_head = nnx.Linear(config.hidden, config.actions, kernel_init=_orthogonal(0.01), rngs=rngs)
        self.value_head = nnx.Linear(config.hidden, 1, kernel_init=_orthogonal(1.0), rngs=rngs)

    def __call__(
        self, observations: UInt8[Array, "batch height width channels"]
    ) -> tuple[Float32[Array, "batch actions"], Float32[Array, " batch"]]:
        """Returns the logits of the policy and the values."""
        x = observations.astype(jnp.float32) / 255.0
        for layer in self.convolutions:
            x = jax.nn.relu(layer(x))
        x = jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.policy_head(x), self.value_head(x)[:, 0]


@partial(jax.jit, static_argnums=0)
def init_actor_critic(config: ActorCriticConfig, key: jax.Array) -> Params:
    """Returns new parameters for a network.

    Args:
        config: The size.
        key: A JAX random key.

    Returns:
        The parameters, an `nnx.State` of `nnx.Param`, float32.
    """
    return nnx.state(ActorCritic(config, nnx.Rngs(params=key)), nnx.Param)


def apply_actor_critic(
    config: ActorCriticConfig, params: Params, observations: UInt8[Array, "batch height width channels"]
) -> tuple[Float32[Array, "batch actions"], Float32[Array, " batch"]]:
    """Returns the logits of the policy and the values of observations.

    Args:
        config: The size of the network.
        params: Parameters from `init_actor_critic`.
        observations: Pixels from 0 to 255; the network sees them from 0 to 1.

    Returns:
        Logits and values.
    """
    # Abstract construction costs a little tracing time and no memory; the structure it yields holds no arrays.
    structure, _ = nnx.split(nnx.eval_shape(lambda: ActorCritic(config, nnx.Rngs(params=0))))
    return nnx.merge(structure, params)(observations)
