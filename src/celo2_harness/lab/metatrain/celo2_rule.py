"""Celo2 under meta-training: the learned rule on some leaves, Adam on the others.

The update is that of the public blocks, as a function of theta, which changes from unroll to unroll.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from celo2_harness.blocks import in_eigenbasis
from celo2_harness.lab.metatrain.adam import AdamState, adam_step, init_adam
from celo2_harness.lab.metatrain.learned import AnyWeights, InnerLeaf, InnerStep, network_kernel
from celo2_harness.rule import (
    MatrixView,
    Moments,
    RuleConfig,
    Theta,
    at_training_fraction,
    channel_counts,
    init_mean_square,
    init_moments,
    leaf_direction,
    matrix_mean_square,
    newton_schulz,
    rms_divisor,
    rolling_mean_square,
)
from celo2_harness.weights import Weights, load_weights, save_weights


class LearnedState(NamedTuple):
    """The state of a leaf under the learned rule.

    Attributes:
        moments: The accumulators; of a matrix in the eigenbasis the state of `in_eigenbasis`, which holds them.
        square: The running mean square of "rolling" normalisation, or None.
    """

    moments: Any
    square: Float[Array, "..."] | None


@dataclasses.dataclass(frozen=True)
class Celo2Learning:
    """The network of Celo2; a `LearnedRule`.

    A step is p <- p - step_size * direction under the rule, and p <- p - adam_factor * step_size * direction under
    Adam.

    Attributes:
        rule: The features, decays and normalisation.
        hidden: The units of each hidden layer of the network.
        orthogonalize: Whether hidden matrices go through Newton-Schulz and all other leaves to Adam; otherwise all
            leaves follow the rule.
        adam_factor: The step size of Adam over that of the rule.
        eigenbasis: Whether the rule acts in the eigenbasis of the gradients' covariance on hidden matrices (see
            `in_eigenbasis`).
    """

    rule: RuleConfig
    hidden: int
    orthogonalize: bool
    adam_factor: float
    eigenbasis: bool = False

    def init(self, key: Array) -> Theta:
        """Returns kernels from a normal cut off at 2 sigma, sigma = 1 / sqrt(fan in), and zero biases."""
        channels, hidden, outputs = sum(channel_counts(self.rule)), self.hidden, 3
        keys = jax.random.split(key, 3)
        kernel = lambda k, i, o: jax.random.truncated_normal(k, -2.0, 2.0, (i, o)) / jnp.sqrt(i)
        return Theta(
            w0=kernel(keys[0], channels, hidden),
            b0=jnp.zeros(hidden),
            w1=kernel(keys[1], hidden, hidden),
            b1=jnp.zeros(hidden),
            w2=kernel(keys[2], hidden, outputs),
            b2=jnp.zeros(outputs),
        )

    def start(self, layout: Sequence[InnerLeaf], leaves: Sequence[Array]) -> tuple[LearnedState | AdamState, ...]:
        """Returns zero state for every leaf."""

        def init(leaf: InnerLeaf, x: Array) -> LearnedState | AdamState:
            if self.orthogonalize and not leaf.hidden:
                return init_adam(x)
            square = init_mean_square(leaf.view) if self.rule.normalization == "rolling" else None
            if self._in_basis(leaf):
                return LearnedState(self._turned(None, leaf.view).init(x), square)
            return LearnedState(init_moments(self.rule, leaf.view), square)

        return tuple(init(leaf, x) for leaf, x in zip(layout, leaves, strict=True))

    def step(
        self,
        theta: Theta,
        leaves: Sequence[Array],
        state: Sequence[LearnedState | AdamState],
        step: InnerStep,
    ) -> tuple[list[Array], tuple[LearnedState | AdamState, ...]]:
        """Returns the parameters and the state after a step."""
        theta = at_training_fraction(theta, self.rule, step.clock.step / step.clock.length)
        new_leaves, new_state = [], []
        for leaf, p, g, s in zip(step.layout, leaves, step.gradients, state, strict=True):
            if isinstance(s, LearnedState):
                direction, s = self._direction(theta, leaf, p, g, s, step.clock.step)
                p = p - step.step_size * direction
            else:
                p, s = adam_step(p, g, s, step.step_size * self.adam_factor)
            new_leaves.append(p)
            new_state.append(s)
        return new_leaves, tuple(new_state)

    def _direction(
        self, theta: Theta, leaf: InnerLeaf, p: Array, g: Array, state: LearnedState, count: Array
    ) -> tuple[Array, LearnedState]:
        view = leaf.view
        if self._in_basis(leaf):
            stepped: Any = self._turned(theta, view).update(g, state.moments, p)
            direction, moments = view.apply(stepped[0]), stepped[1]
        else:
            direction, moments = self._raw(theta, view, g, state.moments, p)
        if self.orthogonalize and view.is_matrix:
            direction = orthogonalized(direction)
        running = state.square
        if self.rule.normalization != "none":
            square = matrix_mean_square(view, direction)
            if running is not None:
                square = running = rolling_mean_square(running, square)
            direction = direction / rms_divisor(self.rule.normalization, square, count + 1)
        return view.invert(direction), LearnedState(moments, running)

    def _raw(self, theta: Theta, view: MatrixView, g: Array, moments: Moments, p: Array) -> tuple[Array, Moments]:
        """The output of the network in the leaf's view, and the new accumulators."""
        direction, moments, _ = leaf_direction(theta, self.rule, view, g, p, moments, network_kernel())
        return _computed_once(direction, moments.nu), moments

    def _in_basis(self, leaf: InnerLeaf) -> bool:
        return self.eigenbasis and leaf.hidden and leaf.view.is_matrix

    def _turned(self, theta: Theta | None, view: MatrixView) -> optax.GradientTransformation:
        """The rule on one leaf, in the eigenbasis. Its `init` needs no theta."""

        def update(g: Any, moments: Any, p: Any = None) -> tuple[Array, Moments]:
            assert theta is not None
            direction, moments = self._raw(theta, view, g, moments, p)
            return view.invert(direction), moments

        rule = optax.GradientTransformation(lambda p: init_moments(self.rule, view), update)  # type: ignore[arg-type]
        return in_eigenbasis(rule, mode="act", weight_dimension_numbers=view)

    def weights(self, theta: Theta, provenance: Mapping[str, Any]) -> AnyWeights:
        """Returns theta as weights that can be saved and used."""
        return Weights(jax.tree.map(np.asarray, theta), self.rule, provenance)

    def load(self, source: str | Path) -> AnyWeights:
        """Reads weights; raises ValueError if they are of another rule or size."""
        weights = load_weights(source, kind=Weights, expect=self.rule)
        hidden = np.shape(weights.theta.b0)[0]
        if hidden != self.hidden:
            raise ValueError(f"{source}: {hidden} hidden units, the run has hidden = {self.hidden}.")
        return weights

    def save(self, path: Path, weights: AnyWeights) -> None:
        """Writes weights to a file."""
        save_weights(path, weights)  # pyright: ignore[reportArgumentType]


def orthogonalized(direction: Array) -> Array:
    """Newton-Schulz; on a GPU as one launch where the matrix is small, instead of some thirty."""
    if jax.default_backend() == "gpu" and direction.ndim == 2:
        # Imported where it is used: Pallas takes a good part of the package's import time.
        from celo2_harness.rule.newton_schulz_kernel import LARGEST, newton_schulz_in_registers

        if max(direction.shape) <= LARGEST:
            return newton_schulz_in_registers(direction)
    return newton_schulz(direction)


@jax.custom_batching.custom_vmap
def _computed_once(x: Array, second_moment: Array) -> Array:
    """Returns x, as an array in memory.

    Everything that reads a cheap-looking result gets a copy of the computation from XLA on CPU: the network would run
    once for the norm of its output and once more for the output itself. A conditional is not looked through; its
    condition always holds, but XLA cannot know that a second moment is not negative.
    """
    through_branch = lambda x, v: jax.lax.cond(v.reshape(-1)[0] >= 0.0, lambda x: x, jnp.zeros_like, x)
    return jax.lax.platform_dependent(x, second_moment, cpu=through_branch, default=lambda x, v: x)


@_computed_once.def_vmap
def _computed_once_batched(size: int, batched: Any, x: Array, second_moment: Array) -> tuple[Array, bool]:
    # The rule of a conditional under vmap is to compute both branches and select, which is what this must not be.
    del size, batched
    return _computed_once(x, second_moment), True
