"""What is learned: the interface between inner problems and a kind of rule."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from celo2_harness.lab.metatrain.problem import Clock
from celo2_harness.rule import MatrixView
from celo2_harness.velo import VeloWeights
from celo2_harness.weights import Weights

AnyWeights = Weights | VeloWeights


class InnerLeaf(NamedTuple):
    """The ways in which a rule may treat a parameter of an inner network.

    Attributes:
        view: The matrix or vector that the leaf is seen as.
        hidden: Whether the leaf is a hidden matrix, which the learned rule has in every variant.
    """

    view: MatrixView
    hidden: bool


class InnerStep(NamedTuple):
    """The inputs of a rule in a step of an unroll, beside the parameters and its own state.

    Attributes:
        layout: The ways in which each parameter may be treated.
        gradients: The gradient of each parameter.
        loss: The training loss before the step.
        clock: The step at which the unroll is.
        step_size: The step size of now.
    """

    layout: Sequence[InnerLeaf]
    gradients: Sequence[Array]
    loss: Float[Array, ""]
    clock: Clock
    step_size: Float[Array, ""]


@runtime_checkable
class InnerRule(Protocol):
    """A rule that trains inner networks. Its own settings are fields; all methods are pure functions."""

    def start(self, layout: Sequence[InnerLeaf], leaves: Sequence[Array]) -> Any:
        """Returns the state of the rule before the first step of an unroll."""
        ...

    def step(self, theta: Any, leaves: Sequence[Array], state: Any, step: InnerStep) -> tuple[list[Array], Any]:
        """Returns the parameters and the state after a step."""
        ...


@runtime_checkable
class LearnedRule(InnerRule, Protocol):
    """A kind of rule whose numbers theta are learned."""

    def init(self, key: Array) -> Any:
        """Returns a random theta."""
        ...

    def weights(self, theta: Any, provenance: Mapping[str, Any]) -> AnyWeights:
        """Returns theta as weights that can be saved and used."""
        ...

    def load(self, source: str | Path) -> AnyWeights:
        """Reads weights; raises ValueError if they are of another rule."""
        ...

    def save(self, path: Path, weights: AnyWeights) -> None:
        """Writes weights to a file."""
        ...


def network_kernel() -> str:
    """Returns how small networks are evaluated: on a GPU as one kernel, for which XLA would search minutes."""
    return "pallas" if jax.default_backend() == "gpu" else "xla"
