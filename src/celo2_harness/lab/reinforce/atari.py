"""Atari 2600 games in the Arcade Learning Environment, by its vector environment."""

import dataclasses
import os
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from celo2_harness.lab.reinforce.environments import Transition


@dataclass(frozen=True)
class AtariConfig:
    """The preprocessing, in the form that most published PPO results use.

    Attributes:
        frame_skip: The frames per agent step; the last two are merged by their maximum, because sprites flicker.
        size: The height and width that grayscale frames are shrunk to.
        stack: The frames in an observation.
        noop_max: The most steps of doing nothing that an episode starts with, drawn at random.
        fire_on_reset: Whether fire is pressed after that, in games that wait for it.
        repeat_action_probability: The probability of sticky actions; 0 for none.
        life_is_terminal: Whether the learner is told that a lost life ends its future. The game goes on all the same.
        max_frames: The frames after which games are cut off (half an hour of play).
    """

    frame_skip: int = 4
    size: int = 84
    stack: int = 4
    noop_max: int = 30
    fire_on_reset: bool = True
    repeat_action_probability: float = 0.0
    life_is_terminal: bool = True
    max_frames: int = 108_000


class Atari:
    """Copies of an Atari game; `Environments`.

    Args:
        game: The name of the ROM, in snake case.
        count: The number of copies.
        config: The preprocessing.

    Raises:
        ImportError: If ale-py or gymnasium is missing.
    """

    def __init__(self, game: str, count: int, config: AtariConfig = AtariConfig()):
        try:
            from ale_py.vector_env import AtariVectorEnv
        except ImportError as error:
            raise ImportError(f"game = {game!r} needs {error.name}: pip install 'celo2-harness[atari]'") from error
        self._game, self._count, self._config = game, count, config
        # Containers and batch systems often give a process fewer cores than the machine has.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._ale = AtariVectorEnv(
            game,
            count,
            num_threads=min(count, cores),
            max_num_frames_per_episode=config.max_frames,
            repeat_action_probability=config.repeat_action_probability,
            # Every step is then one of the game: in the other modes a step in between only resets.
            autoreset_mode="SameStep",
            img_height=config.size,
            img_width=config.size,
            stack_num=config.stack,
            frameskip=config.frame_skip,
            noop_max=config.noop_max,
            use_fire_reset=config.fire_on_reset,
            reward_clipping=False,
        )
        self._lives = np.zeros(count, np.int32)

    @property
    def count(self) -> int:
        """The number of copies."""
        return self._count

    @property
    def actions(self) -> int:
        """The number of actions, out of the 18 of the console, that make a difference in the game."""
        return len(self._ale.ale.get_action_set())

    @property
    def observation_shape(self) -> tuple[int, int, int]:
        """Height, width, frames."""
        return self._config.size, self._config.size, self._config.stack

    def describe(self) -> dict[str, Any]:
        """Returns the game, its preprocessing and the version of ale-py."""
        return {"game": self._game, "ale_py": version("ale-py"), **dataclasses.asdict(self._config)}

    def reset(self, seed: int) -> UInt8[np.ndarray, "count height width channels"]:
        """Starts new games; the seed determines what the games draw at random from here on."""
        seeds = np.random.default_rng(seed).integers(0, 2**31 - 1, self._count, dtype=np.int32)
        frames, info = self._ale.reset(seed=seeds)
        self._lives = info["lives"].copy()
        return _channels_last(frames)

    def step(self, actions: Int32[np.ndarray, " count"]) -> Transition:
        """Plays `frame_skip` frames in every copy."""
        frames, rewards, terminations, truncations, info = self._ale.step(actions)
        over = terminations | truncations
        terminals = over | (info["lives"] < self._lives) if self._config.life_is_terminal else over.copy()
        self._lives = info["lives"].copy()
        return Transition(_channels_last(frames), rewards.astype(np.float32), terminals, over)

    def close(self) -> None:
        """Ends the emulators."""
        self._ale.close()


def _channels_last(frames: UInt8[np.ndarray, "count stack height width"]) -> np.ndarray:
    # A copy, too: the vector environment may write into its own array at the next step.
    return np.ascontiguousarray(np.moveaxis(frames, 1, -1))
