"""What is trained inside: the interface between estimators and inner problems."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int


class Clock(NamedTuple):
    """The position of an unroll in its course; an antithetic pair shares it.

    Attributes:
        step: The number of steps done.
        length: The number of steps after which the unroll restarts.
    """

    step: Int[Array, ""]
    length: Int[Array, ""]


@runtime_checkable
class InnerProblem(Protocol):
    """Training of something small by a rule with numbers theta, one step at a time.

    All methods are pure functions of their arguments for a single unroll; estimators vectorise them. Problems are
    hashable, since jitted functions take them as static arguments. Theta is any tree of arrays that `step` understands,
    data any tree of arrays that `sample` and `step` do.
    """

    @property
    def loss_bound(self) -> float:
        """The upper end of the meta-loss: larger losses, and NaN, count as this much."""
        ...

    def fresh(self, key: Array) -> Any:
        """Returns the state of a new unroll: parameters, optimizer state, constants drawn for it."""
        ...

    def sample(self, data: Any, which: Int[Array, ""], key: Array) -> Any:
        """Draws what one step needs from data set `which`; both members of a pair get the same.

        Called for all steps of a truncation before the first: return indices rather than the examples themselves.
        """
        ...

    def step(self, theta: Any, state: Any, clock: Clock, data: Any, batch: Any) -> tuple[Any, Float[Array, ""]]:
        """Returns the state after one training step, and the loss before it."""
        ...


class TaskGroup(NamedTuple):
    """Tasks of one inner problem, hence of equal shapes: they run as one vectorised program.

    Attributes:
        problem: The inner problem that they train.
        tasks: A number per task, its own in all groups; its randomness depends on it, and on no other task.
        sets: The data set of each task.
        part: The name of the part of the data that the problem samples from; None for all of it.
    """

    problem: Any
    tasks: tuple[int, ...]
    sets: tuple[int, ...]
    part: str | None = None
