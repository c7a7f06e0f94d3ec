"""VeLO under meta-training: all leaves, the unroll's own length, the training loss, and no step size."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from celo2_harness.lab.metatrain.learned import AnyWeights, InnerLeaf, InnerStep, network_kernel
from celo2_harness.rule import MatrixView, init_moments
from celo2_harness.velo import VELO_S, VeloTheta, VeloWeights, load_velo_weights, save_velo_weights
from celo2_harness.velo.config import RULE, init_theta
from celo2_harness.velo.loss import init_losses
from celo2_harness.velo.step import StepState, velo_step


@dataclasses.dataclass(frozen=True)
class VeloLearning:
    """A small VeLO of the sizes `VELO_S`; a `LearnedRule`."""

    def init(self, key: Array) -> VeloTheta:
        """Returns a random theta."""
        return init_theta(VELO_S, key)

    def start(self, layout: Sequence[InnerLeaf], leaves: Sequence[Array]) -> StepState:
        """Returns zero state. The LSTM's start is learned, hence not known before theta is: see `step`."""
        del leaves
        zeros = jnp.zeros((len(layout), VELO_S.lstm))
        moments = [init_moments(RULE, view) for view in _views(layout)]
        return StepState(jnp.zeros([], jnp.int32), moments, zeros, zeros, init_losses())

    def step(
        self, theta: VeloTheta, leaves: Sequence[Array], state: StepState, step: InnerStep
    ) -> tuple[list[Array], StepState]:
        """Returns the parameters and the state after a step."""
        start = lambda rows, row: jnp.where(state.count == 0, jnp.broadcast_to(row, rows.shape), rows)
        state = state._replace(hidden=start(state.hidden, theta.hidden), cell=start(state.cell, theta.cell))
        updates, state, _ = velo_step(
            VELO_S,
            theta,
            _views(step.layout),
            step.gradients,
            leaves,
            state,
            step.loss,
            step.clock.length,
            kernel=network_kernel(),
        )
        return jax.tree.map(jnp.add, list(leaves), updates), state

    def weights(self, theta: VeloTheta, provenance: Mapping[str, Any]) -> AnyWeights:
        """Returns theta as weights that can be saved and used."""
        return VeloWeights(jax.tree.map(np.asarray, theta), VELO_S, provenance)

    def load(self, source: str | Path) -> AnyWeights:
        """Reads weights; raises ValueError if they are of another rule or size."""
        return load_velo_weights(source, published_as=VELO_S, expect=VELO_S)

    def save(self, path: Path, weights: AnyWeights) -> None:
        """Writes weights to a file."""
        save_velo_weights(path, weights)  # pyright: ignore[reportArgumentType]


def _views(layout: Sequence[InnerLeaf]) -> list[MatrixView]:
    return [dataclasses.replace(leaf.view, whole=True) for leaf in layout]
