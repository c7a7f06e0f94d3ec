"""What a VeLO was trained as, and its numbers as a tree."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from celo2_harness.rule import RuleConfig, Theta

# The accumulators, and the channels of the small networks, are those of Celo2 but for one decay.
RULE = RuleConfig(second_moment_decay=0.999)
INPUTS = 30  # numbers that the LSTM is told of a leaf
CHANNELS, UNITS, OUTPUTS = 30, 4, 3  # of the small networks
# Shapes of one small network, in the order in which a row of the bank holds them.
NETWORK_SHAPES = Theta(
    w0=(CHANNELS, UNITS),  # type: ignore[arg-type]
    b0=(UNITS,),  # type: ignore[arg-type]
    w1=(UNITS, UNITS),  # type: ignore[arg-type]
    b1=(UNITS,),  # type: ignore[arg-type]
    w2=(UNITS, OUTPUTS),  # type: ignore[arg-type]
    b2=(OUTPUTS,),  # type: ignore[arg-type]
)
NETWORK_SIZE = sum(math.prod(shape) for shape in NETWORK_SHAPES)
# Lower bound of ff_mult / sqrt(K) times the scale of the mixing coefficients at the start; a sum of K independent terms
# grows with sqrt(K), so this is the size of a mixed network of random numbers. Of the released weights it is 6.25.
FIRST_MIX = 3.0


@dataclasses.dataclass(frozen=True)
class VeloConfig:
    """The configuration that a theta of VeLO belongs to; a theta under another configuration is another rule.

    Attributes:
        lstm: Width of the LSTM.
        bank: How many small networks there are to mix.
        ff_mult: Factor on the mixed weights.
        bugged_loss_features: Compute the loss features as if every run took ten steps, as early weights were trained.
        bugged_next_lstm_state: Keep the LSTM state of the step before, as the oldest weights were trained; not
            supported, and here so that weights can be refused for it.
    """

    lstm: int = 512
    bank: int = 256
    ff_mult: float = 100.0
    bugged_loss_features: bool = False
    bugged_next_lstm_state: bool = False


VELO = VeloConfig()
"""The released weights: 2,320,385 numbers."""
VELO_S = VeloConfig(lstm=64, bank=32, ff_mult=1.0)
"""A small one, which this package can meta-train: 46,337 numbers."""


class Affine(NamedTuple):
    """x @ w + b."""

    w: Float[jax.Array | np.ndarray, "inputs outputs"]
    b: Float[jax.Array | np.ndarray, " outputs"]


class VeloTheta(NamedTuple):
    """The numbers of VeLO, with H the width of the LSTM and K the size of the bank.

    `unused` is computed and thrown away by the published program; files have it. A row of `bank` is one small network,
    its parts (`rule.Theta`) flattened and joined, so that mixing networks is one product.
    """

    hidden: Float[jax.Array | np.ndarray, " H"]
    cell: Float[jax.Array | np.ndarray, " H"]
    unused: Affine
    message: Affine
    own: Affine
    gates: Affine
    controls: Affine
    step_size: Affine
    bank: Float[jax.Array | np.ndarray, "K numbers"]


def theta_shapes(config: VeloConfig) -> VeloTheta:
    """The shape of every array of a theta.

    >>> import math
    >>> sum(math.prod(x) for x in jax.tree.leaves(theta_shapes(VELO), is_leaf=lambda x: type(x) is tuple))
    2320385
    """
    h = config.lstm

    def affine(inputs: int, outputs: int) -> Affine:
        return Affine((inputs, outputs), (outputs,))  # type: ignore[arg-type]

    return VeloTheta(
        hidden=(h,),  # type: ignore[arg-type]
        cell=(h,),  # type: ignore[arg-type]
        unused=affine(INPUTS, h),
        message=affine(INPUTS, h),
        own=affine(INPUTS, h),
        gates=affine(2 * h, 4 * h),
        controls=affine(h, config.bank),
        step_size=affine(h, 1),
        bank=(config.bank, NETWORK_SIZE),  # type: ignore[arg-type]
    )


def init_theta(config: VeloConfig, key: Array) -> VeloTheta:
    """Random numbers: kernels from a normal cut off at 2 sigma, sigma = 1 / sqrt(fan in); zero biases, zero start.

    Where ff_mult < 3 sqrt(K), the kernel of the mixing coefficients is multiplied by their quotient. The three layers
    of a mixed network take its scale to the third power: of `VELO_S` without that factor, 17, a step is 1e-9 of the
    parameters, which float32 rounds away, and meta-training has no gradient to begin with. In the released size, and
    in the published program everywhere, there is no such factor.

    >>> float(jnp.std(init_theta(VELO_S, jax.random.key(0)).controls.w)) > 1.5
    True
    """
    keys = iter(jax.random.split(key, 16))

    def kernel(*shape: int) -> jax.Array:
        return jax.random.truncated_normal(next(keys), -2.0, 2.0, shape) / math.sqrt(shape[-2])

    def affine(shapes: Affine) -> Affine:
        return Affine(kernel(*shapes.w), jnp.zeros(shapes.b))  # type: ignore[arg-type]

    shapes, count = theta_shapes(config), config.bank
    network = [kernel(count, *shape) if len(shape) > 1 else jnp.zeros((count, *shape)) for shape in NETWORK_SHAPES]
    parts = {name: affine(part) for name, part in shapes._asdict().items() if isinstance(part, Affine)}
    mixing = parts["controls"]
    parts["controls"] = mixing._replace(w=mixing.w * max(1.0, FIRST_MIX * math.sqrt(count) / config.ff_mult))
    zeros = jnp.zeros(config.lstm)
    return VeloTheta(hidden=zeros, cell=zeros, bank=join_networks(Theta(*network)), **parts)


def join_networks(networks: Theta) -> Float[Array, "... numbers"]:
    """Small networks, stacked on leading axes, as rows of numbers."""
    parts = [x.reshape(*x.shape[: x.ndim - len(shape)], -1) for x, shape in zip(networks, NETWORK_SHAPES, strict=True)]
    return jnp.concatenate(parts, axis=-1)


def split_networks(rows: Float[Array | np.ndarray, "... numbers"]) -> Theta:
    """The inverse of `join_networks`."""
    ends = np.cumsum([math.prod(shape) for shape in NETWORK_SHAPES])[:-1]
    parts = jnp.split(jnp.asarray(rows), ends, axis=-1)
    return Theta(*(x.reshape(*x.shape[:-1], *shape) for x, shape in zip(parts, NETWORK_SHAPES, strict=True)))
