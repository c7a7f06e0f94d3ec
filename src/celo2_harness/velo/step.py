"""One step of VeLO on all leaves, as a pure function: what the Optax transformation and meta-training share."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from celo2_harness.rule import MatrixView, Moments
from celo2_harness.velo.config import VeloConfig, VeloTheta
from celo2_harness.velo.leaf import leaf_update
from celo2_harness.velo.loss import SHORTEST_HALF_LIFE, LossBuffer, add_loss, loss_decays, loss_features
from celo2_harness.velo.lstm import Controls, lstm_inputs, lstm_step, read_controls, summarize_leaf

# Leaves of one shape are traced once, and run as one call each outside of jit.
_summarize_leaf = jax.jit(summarize_leaf)
_leaf_update = jax.jit(leaf_update, static_argnums=(3, 7))


class StepState(NamedTuple):
    """The state of VeLO, leaves in a list; the leading axis of the LSTM's state is the leaf."""

    count: Int[Array, ""]
    moments: list[Moments]
    hidden: Float[Array, "leaves H"]
    cell: Float[Array, "leaves H"]
    losses: LossBuffer


class StepAux(NamedTuple):
    """Intermediate results of a step."""

    inputs: Float[Array, "leaves inputs"]
    controls: Controls


def velo_step(
    config: VeloConfig,
    theta: VeloTheta,
    views: Sequence[MatrixView],
    gradients: Sequence[Array],
    parameters: Sequence[Array],
    state: StepState,
    loss: Float[Array, ""],
    num_steps: Float[Array, ""] | Int[Array, ""] | int,
    kernel: str = "auto",
) -> tuple[list[Array], StepState, StepAux]:
    """The updates of all leaves, in float32, to be added to the parameters.

    The LSTM sees the accumulators before the step, the small networks those after it.

    Args:
        config: What theta was trained with.
        theta: The numbers of VeLO (float32 arrays, traced ones too).
        views: One per leaf, as `velo_view` gives them.
        gradients: One per leaf, at least one, none of size zero.
        parameters: The leaves before the step.
        state: The state before the step.
        loss: The loss of the batch that the gradients are of.
        num_steps: The length of the run. Nothing happens at its end but that the time features saturate.
        kernel: How the small networks are evaluated.
    """
    decays = loss_decays(SHORTEST_HALF_LIFE if config.bugged_loss_features else num_steps)
    losses = add_loss(state.losses, decays, loss)
    summaries = [_summarize_leaf(p, m.mu, m.nu) for p, m in zip(parameters, state.moments, strict=True)]
    fraction = state.count.astype(jnp.float32) / num_steps
    inputs = lstm_inputs(summaries, loss_features(losses, decays), fraction)
    hidden, cell = lstm_step(theta, inputs, state.hidden, state.cell)
    controls = read_controls(config, theta, hidden)
    updates, moments = [], []
    # One leaf after the other, the first after the LSTM, so that their temporaries share memory and what the LSTM was
    # told of can be overwritten.
    done = jnp.sum(jnp.square(controls.step_multiplier))
    for i, (view, g, p, m) in enumerate(zip(views, gradients, parameters, state.moments, strict=True)):
        network = jax.tree.map(lambda x, i=i: x[i], controls.networks)
        square = summaries[i].mean_square
        update, new, done = _leaf_update(network, controls.step_multiplier[i], square, view, g, p, m, kernel, done)
        updates.append(view.invert(update))
        moments.append(new)
    return updates, StepState(state.count + 1, moments, hidden, cell, losses), StepAux(inputs, controls)
