"""The games by name."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from celo2_harness.lab.errors import check_range
from celo2_harness.lab.reinforce.atari import Atari
from celo2_harness.lab.reinforce.catch import Catch
from celo2_harness.lab.reinforce.environments import Environments


class EnvironmentKind(NamedTuple):
    """A game.

    Attributes:
        description: A line for lists of games.
        make: A function from a number of copies to them; it raises ImportError where an extra is missing.
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
        name: The name of a game in `ENVIRONMENTS`.
        count: The number of copies.

    Returns:
        The copies, not yet reset.

    Raises:
        ValueError: If there is no such game, or no copy of it.
        ImportError: If it needs an extra that is not installed.

    >>> make_environments("catch", 3).reset(seed=0).shape
    (3, 10, 5, 1)
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"game = {name!r}: expected one of {', '.join(ENVIRONMENTS)}")
    check_range(1, environments=count)
    return ENVIRONMENTS[name].make(count)
