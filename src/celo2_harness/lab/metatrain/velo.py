"""VeLO under meta-training: all leaves, the unroll's own length, the training loss, and no step size."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from celo2_harness.lab.metatrain.update import Views, network_kernel
from celo2_harness.rule import MatrixView, init_moments
from celo2_harness.velo import VELO_S, VeloTheta
from celo2_harness.velo.config import RULE
from celo2_harness.velo.loss import init_losses
from celo2_harness.velo.step import Memory, velo_step


def init_velo(views: Views) -> Memory:
    """Before the first step. The LSTM's start is learned, hence not known before theta is: see `apply_velo`."""
    zeros = jnp.zeros((len(views), VELO_S.lstm))
    return Memory(
        jnp.zeros([], jnp.int32), [init_moments(RULE, view) for view in _whole(views)], zeros, zeros, init_losses()
    )


def apply_velo(
    theta: VeloTheta,
    views: Views,
    leaves: Sequence[Array],
    gradients: Sequence[Array],
    memory: Memory,
    loss: Float[Array, ""],
    length: Int[Array, ""],
) -> tuple[list[Array], Memory]:
    """One step on all leaves.

    Args:
      theta: the numbers of VeLO.
      views: of each leaf; it is normalised whole.
      leaves: parameters.
      gradients: of the loss.
      memory: as `init_velo` and this function return it.
      loss: of the batch, before the step.
      length: of the unroll, in steps.

    Returns:
      New parameters and memory.
    """
    start = lambda rows, row: jnp.where(memory.count == 0, jnp.broadcast_to(row, rows.shape), rows)
    memory = memory._replace(hidden=start(memory.hidden, theta.hidden), cell=start(memory.cell, theta.cell))
    updates, memory, _ = velo_step(
        VELO_S, theta, _whole(views), gradients, leaves, memory, loss, length, kernel=network_kernel()
    )
    return jax.tree.map(jnp.add, list(leaves), updates), memory


def _whole(views: Views) -> list[MatrixView]:
    return [dataclasses.replace(view, whole=True) for view in views if view is not None]
