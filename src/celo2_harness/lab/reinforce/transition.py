"""What comes back from a step of the environments."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8


class Transition(NamedTuple):
    """What follows the actions, one entry per copy of the game.

    Attributes:
        observations: What is seen now; of the next episode where one is over.
        rewards: As the game counts them, not clipped.
        terminals: Whether the future after this step is worth nothing to the learner: the game is over or a life lost.
        episodes_over: Whether the whole game is over, which is when its return is counted.
    """

    observations: UInt8[np.ndarray, "count height width channels"]
    rewards: Float32[np.ndarray, " count"]
    terminals: Bool[np.ndarray, " count"]
    episodes_over: Bool[np.ndarray, " count"]
