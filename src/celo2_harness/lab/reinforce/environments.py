"""Environments: several copies of a game side by side, stepped from the host."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8


class Transition(NamedTuple):
    """The answer of a game to the actions, one entry per copy.

    Attributes:
        observations: What is seen now; that of the next episode where one is over.
        rewards: The rewards as the game counts them, not clipped.
        terminals: Whether the future after this step is worth nothing to the learner: the game is over or a life lost.
        episodes_over: Whether the whole game is over, which is when its return is counted.
    """

    observations: UInt8[np.ndarray, "count height width channels"]
    rewards: Float32[np.ndarray, " count"]
    terminals: Bool[np.ndarray, " count"]
    episodes_over: Bool[np.ndarray, " count"]


@runtime_checkable
class Environments(Protocol):
    """Copies of one game, all stepped at once. A copy whose episode is over starts the next one by itself."""

    @property
    def count(self) -> int:
        """The number of copies."""
        ...

    @property
    def actions(self) -> int:
        """The number of actions to choose from."""
        ...

    @property
    def observation_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an observation of one copy."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns what determines the game, as JSON values: returns can be compared where this is the same."""
        ...

    def reset(self, seed: int) -> UInt8[np.ndarray, "count height width channels"]:
        """Starts new episodes, determined by a seed; returns the first observations."""
        ...

    def step(self, actions: Int32[np.ndarray, " count"]) -> Transition:
        """Takes one action in every copy."""
        ...

    def close(self) -> None:
        """Ends the game; nothing may be called after it."""
        ...
