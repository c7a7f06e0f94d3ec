"""Catch: a ball falls down a board, a paddle moves at its foot. Pure JAX, and learned in seconds."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt8

from celo2_harness.lab.reinforce.environments import Transition

ROWS, COLUMNS = 10, 5


class CatchState(NamedTuple):
    """A board.

    Attributes:
        key: The randomness of the next balls.
        ball_row: The row of the ball, 0 at the top.
        ball_column: The column of the ball, which does not change while it falls.
        paddle: The column of the paddle, which is in the last row.
    """

    key: Key[Array, "*boards"]
    ball_row: Int32[Array, "*boards"]
    ball_column: Int32[Array, "*boards"]
    paddle: Int32[Array, "*boards"]


def start_catch(key: Key[Array, ""]) -> CatchState:
    """Returns a board with the ball in the top row, at random, and the paddle in the middle.

    >>> int(start_catch(jax.random.key(0)).paddle)
    2
    """
    key, draw = jax.random.split(key)
    column = jax.random.randint(draw, (), 0, COLUMNS, jnp.int32)
    return CatchState(key, jnp.int32(0), column, jnp.int32(COLUMNS // 2))


def step_catch(state: CatchState, action: Int32[Array, ""]) -> tuple[CatchState, Float32[Array, ""], Bool[Array, ""]]:
    """Moves the paddle (0 left, 1 not, 2 right) and lets the ball fall by a row.

    Args:
        state: The board.
        action: 0, 1 or 2.

    Returns:
        The board after it (a new one where the ball is down), the reward (1 for a caught ball, -1 for a missed one, 0
        while it falls), and whether it is down.
    """
    paddle = jnp.clip(state.paddle + action - 1, 0, COLUMNS - 1)
    row = state.ball_row + 1
    over = row == ROWS - 1
    reward = jnp.where(over, jnp.where(paddle == state.ball_column, 1.0, -1.0), 0.0)
    moved = CatchState(state.key, row, state.ball_column, paddle)
    after = jax.tree.map(partial(jnp.where, over), start_catch(state.key), moved)
    return after, reward, over


def show_catch(state: CatchState) -> UInt8[Array, "rows columns 1"]:
    """Returns the board as a picture, 255 where ball and paddle are."""
    board = jnp.zeros((ROWS, COLUMNS, 1), jnp.uint8)
    return board.at[state.ball_row, state.ball_column].set(255).at[ROWS - 1, state.paddle].set(255)


@partial(jax.jit, static_argnums=1)
def _start(key: Key[Array, ""], count: int) -> tuple[CatchState, UInt8[Array, "count rows columns 1"]]:
    states = jax.vmap(start_catch)(jax.random.split(key, count))
    return states, jax.vmap(show_catch)(states)


@jax.jit
def _step(states: CatchState, actions: Int32[Array, " count"]) -> tuple[CatchState, Any]:
    states, rewards, over = jax.vmap(step_catch)(states, actions)
    return states, (jax.vmap(show_catch)(states), rewards, over)


class Catch:
    """Copies of the game; `Environments`. An episode has nine steps, and a return of 1 or -1.

    Args:
        count: The number of copies.
    """

    def __init__(self, count: int):
        self._count = count
        self._states: CatchState | None = None

    @property
    def count(self) -> int:
        """The number of copies."""
        return self._count

    @property
    def actions(self) -> int:
        """Left, stay, right."""
        return 3

    @property
    def observation_shape(self) -> tuple[int, int, int]:
        """Rows, columns, one channel."""
        return ROWS, COLUMNS, 1

    def describe(self) -> dict[str, Any]:
        """Returns the size of the board."""
        return {"game": "catch", "rows": ROWS, "columns": COLUMNS}

    def reset(self, seed: int) -> UInt8[np.ndarray, "count height width channels"]:
        """Starts new episodes; the seed determines all balls from here on."""
        self._states, boards = _start(jax.random.key(seed), self._count)
        return np.asarray(boards)

    def step(self, actions: Int32[np.ndarray, " count"]) -> Transition:
        """Takes one action in every copy."""
        if self._states is None:
            raise ValueError("Catch.step: the boards have not been set up; call reset(seed) first")
        self._states, result = _step(self._states, jnp.asarray(actions))
        boards, rewards, over = map(np.asarray, result)
        return Transition(boards, rewards, over, over)

    def close(self) -> None:
        """Forgets the boards."""
        self._states = None
