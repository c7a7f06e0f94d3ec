"""Environments by name: several copies of a game side by side, stepped from the host."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt8

from celo2_harness.lab.reinforce.atari import Atari
from celo2_harness.lab.reinforce.catch import Catch
from celo2_harness.lab.reinforce.transition import Transition


@runtime_checkable
class Environments(Protocol):
    """Copies of one game, all stepped at once. A copy whose episode is over starts the next one by itself."""

    @property
    def count(self) -> int:
        """How many copies there are."""
        ...

    @property
    def actions(self) -> int:
        """How many actions there are to choose from."""
        ...

    @property
    def observation_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an observation of one copy."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns what determines the game, as JSON can hold it: returns can be compared where this is the same."""
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


class EnvironmentKind(NamedTuple):
    """A game.

    Attributes:
        description: One line.
        make: count -> the copies; raises ImportError where an extra is missing.
    """

    description: str
    make: Callable[[int], Environments]


ENVIRONMENTS: Mapping[str, EnvironmentKind] = {
    "asterix": EnvironmentKind("Atari: collect, and avoid the lyres", lambda count: Atari("asterix", count)),
    "freeway": EnvironmentKind("Atari: cross ten lanes of traffic", lambda count: Atari("freeway", count)),
    "space_invaders": EnvironmentKind("Atari: shoot what comes down", lambda count: Atari("space_invaders", count)),
    "catch": EnvironmentKind("catch a falling ball on a board of 10 x 5, in pure JAX", Catch),
}


def make_environments(name: str, count: int) -> Environments:
    """Returns copies of a game.

    Args:
        name: Out of `ENVIRONMENTS`.
        count: How many copies.

    Returns:
        The copies, not yet reset.

    Raises:
        ValueError: if there is no such game, or no copy of it.
        ImportError: if it needs an extra that is not installed.

    >>> make_environments("catch", 3).reset(seed=0).shape
    (3, 10, 5, 1)
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"game = {name!r}: expected one of {', '.join(ENVIRONMENTS)}")
    if count < 1:
        raise ValueError(f"environments = {count}: expected at least 1")
    return ENVIRONMENTS[name].make(count)
