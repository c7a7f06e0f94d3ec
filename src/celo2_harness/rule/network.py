"""The network of the learned rule, evaluated per parameter without ever holding its input planes.

Two facts make that possible. The normalisation of a channel is one number per matrix, so it folds into the first
layer's weights. And the layers are so small (eight units) that written out as sums of products they are elementwise
arithmetic, which XLA fuses into one loop over the parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from celo2_harness.rule.channels import ChannelGroup
from celo2_harness.rule.config import Theta
from celo2_harness.rule.features import Channel, InverseRoot, product, value
from celo2_harness.rule.view import MatrixView

# From theta and the units of the second layer to what the network gives.
Head = Callable[[Theta, Sequence[Array]], Array]


class FirstLayer(NamedTuple):
    """The first layer of one leaf, as far as it can be computed before the loop over its parameters.

    `weights` belong to the channels of full size, their scales included; `offsets` are the bias and what the thin
    channels add to each unit, one array per shape. Axes after the named ones broadcast to the viewed leaf.
    """

    weights: Float[Array, "full hidden ..."]
    offsets: tuple[Float[Array, "hidden ..."], ...]


def first_layer(
    theta: Theta, view: MatrixView, groups: Sequence[ChannelGroup], scales: Sequence[Float[Array, "..."]]
) -> FirstLayer:
    """Folds the scales into the weights and sums the thin channels.

    Args:
        theta: The network's numbers.
        view: The leaf's view.
        groups: The leaf's channels, those of full size first.
        scales: What `input_scales` gives for them.
    """
    ones = (1,) * len(view.viewed)
    offsets = [jnp.reshape(theta.b0, (-1, *ones))]
    weights = []
    for group, scale in zip(groups, scales, strict=True):
        rows = jnp.asarray(theta.w0)[np.array(group.rows)]
        weights.append(scale[:, None] * rows.reshape(*rows.shape, *ones))
    for group, thin_weights in zip(groups[1:], weights[1:], strict=True):
        thin = jnp.stack([jnp.broadcast_to(product(factors), group.shape) for factors in group.channels])
        # Reversed twice: XLA's CPU library takes whatever follows a sum along, here all of the first layer, but not
        # reversals; and what is summed outside of the loop over the parameters stays outside.
        terms = jnp.flip(thin_weights, 1) * thin[:, None]
        offsets.append(jnp.flip(jnp.sum(terms, axis=0), 0))
    return FirstLayer(weights[0], tuple(offsets))


def affine(weights: Any, bias: Any, inputs: Sequence[Array], unit: int) -> Array:
    """One unit of a layer, as a sum of products."""
    total = bias[unit]
    for i, x in enumerate(inputs):
        total = total + x * weights[i, unit]
    return total


def first_output(theta: Theta, units: Sequence[Array]) -> Array:
    """Output 0: of the three the direction; the others are kept in the file for compatibility."""
    return affine(theta.w2, theta.b2, units, 0)


def network(
    view: MatrixView, theta: Theta, layer: FirstLayer, group: ChannelGroup, head: Head = first_output
) -> Float[Array, "..."]:
    """The network: the direction.

    h1 = relu(x W0 + b0),  h2 = relu(h1 W1 + b1),  d = h2 w2 + b2, with x the normalised channels.

    Args:
        view: The leaf's view.
        theta: The network's numbers, of which `w0` and `b0` are in `layer` already.
        layer: What `first_layer` gives.
        group: The channels of full size.
        head: The last layer.

    Returns:
        The direction, a float32 array of the viewed shape.

    References:
        arXiv 2602.19142, section 3 and appendix; the published code for constants.
    """
    theta = Theta(*map(jnp.asarray, theta))
    # All units at once, on a new first axis, is less for XLA to compile than one after the other. It still evaluates
    # every unit once per parameter, inside the one loop.
    parts = first_units(layer, _with_unit_axis(group.channels), ...)
    units = [[(root, part[j]) for root, part in parts] for j in range(layer.weights.shape[1])]
    return jnp.broadcast_to(upper_layers(theta, units, head), view.viewed)


def _with_unit_axis(channels: Sequence[Channel]) -> list[Channel]:
    """The channels with a first axis of length one, where the units will be; inverse roots apply to each unit later."""
    lift = lambda factor: factor if isinstance(factor, InverseRoot) else jnp.expand_dims(factor, 0)
    return [tuple(map(lift, factors)) for factors in channels]


# An inverse root (None: none) and what it multiplies.
Part = tuple[InverseRoot | None, Array]


def first_units(layer: FirstLayer, channels: Sequence[Channel], unit: Any) -> list[Part]:
    """Pre-activations of the first layer, in parts: channels that share an inverse root are summed before it applies.

    Args:
        layer: The first layer; its arrays may be references to memory, they are read one by one.
        channels: The channels of full size, on a whole leaf or a tile of it.
        unit: Which one; `...` for all, on a new first axis.
    """
    plain: Any = sum(offset[unit] for offset in layer.offsets)
    parts: dict[Any, Part] = {None: (None, plain)}
    for i, factors in enumerate(channels):
        root = next((factor for factor in factors if isinstance(factor, InverseRoot)), None)
        rest: list[Any] = [factor for factor in factors if factor is not root]
        # What is constant along a row goes to the weight, out of the loop over the row.
        weight = product([layer.weights[i, unit], *(x for x in rest if x.shape[-1] == 1)])
        rest = [x for x in rest if x.shape[-1] != 1]
        term = product(rest) * weight if rest else weight
        key = None if root is None else (id(root.of), root.floor)
        parts[key] = (root, parts[key][1] + term if key in parts else term)
    return list(parts.values())


def upper_layers(theta: Theta, units: Sequence[Sequence[Part]], head: Head = first_output) -> Array:
    """The direction from the first layer's pre-activations; theta may hold references to memory."""
    first = [_relu(sum(part if root is None else value(root) * part for root, part in parts)) for parts in units]
    second = [_relu(affine(theta.w1, theta.b1, first, j)) for j in range(theta.b1.shape[0])]
    return head(theta, second)


def _relu(x: Any) -> Array:
    # A comparison and a selection; the maximum in jax.nn.relu costs more on a CPU, for NaN and signed zeros.
    return jnp.where(x < 0.0, 0.0, x)
