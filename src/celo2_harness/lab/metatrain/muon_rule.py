"""Muon inside: the reference that a learned rule is judged by."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from celo2_harness.lab.metatrain.adam import AdamState, adam_step, init_adam
from celo2_harness.lab.metatrain.celo2_rule import orthogonalized
from celo2_harness.lab.metatrain.learned import InnerLeaf, InnerStep
from celo2_harness.rule import matrix_mean_square, rms_divisor


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon for hidden matrices and Adam for the rest; an `InnerRule` that has no theta.

    Hidden matrices: m <- b m + (1 - b) g;  p <- p - step_size * normalized(newton_schulz((1 - b) g + b m)).

    Attributes:
        adam_factor: The step size of Adam over that of Muon.
        decay: The decay b of the momentum.
    """

    adam_factor: float
    decay: float = 0.95

    def start(self, layout: Sequence[InnerLeaf], leaves: Sequence[Array]) -> tuple[Array | AdamState, ...]:
        """Returns a momentum of zero for every hidden matrix, and zero moments for all other leaves."""
        pairs = zip(layout, leaves, strict=True)
        return tuple(jnp.zeros_like(x) if leaf.hidden else init_adam(x) for leaf, x in pairs)

    def step(
        self, theta: Any, leaves: Sequence[Array], state: Sequence[Array | AdamState], step: InnerStep
    ) -> tuple[list[Array], tuple[Array | AdamState, ...]]:
        """Returns the parameters and the state after a step."""
        del theta
        new_leaves, new_state = [], []
        for leaf, p, g, s in zip(step.layout, leaves, step.gradients, state, strict=True):
            if isinstance(s, AdamState):
                p, s = adam_step(p, g, s, step.step_size * self.adam_factor)
            else:
                s = self.decay * s + (1.0 - self.decay) * g
                ahead = orthogonalized(leaf.view.apply((1.0 - self.decay) * g + self.decay * s))
                square = matrix_mean_square(leaf.view, ahead)
                direction = ahead / rms_divisor("per_step", square, step.clock.step + 1)
                p = p - step.step_size * leaf.view.invert(direction)
            new_leaves.append(p)
            new_state.append(s)
        return new_leaves, tuple(new_state)
