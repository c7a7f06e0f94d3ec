"""Weight files of linear rules: two arrays and a configuration, in the layout that says what it is."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from celo2_harness.rule import LinearConfig, LinearTheta
from celo2_harness.weights.container import (
    LearnedWeights,
    WeightsError,
    as_mapping,
    check_digest,
    pack,
    read_arrays,
    unpack,
)

FORMAT = "celo2-harness linear weights"


@dataclasses.dataclass(frozen=True, eq=False)
class LinearWeights(LearnedWeights):
    """A learned linear rule: its numbers, its configuration, and how it was made.

    Weights are equal, and have the same hash, where numbers and configuration are the same.

    Attributes:
        theta: The arrays, float32.
        config: Decays, power and floor that theta was found with.
        provenance: Free facts about how theta was found, JSON values.

    Example:
        >>> from celo2_harness import load_weights
        >>> load_weights("celo2_linear").config.momentum_decays
        (0.9, 0.99)
    """

    theta: LinearTheta
    config: LinearConfig
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"LinearWeights({sum(np.size(x) for x in self.theta)} numbers, {self.config})"


def parse_linear(content: Mapping[str, Any], name: str) -> LinearWeights:
    """The weights in the content of a file that says that it holds a linear rule.

    Raises:
        WeightsError: If they do not fit their configuration, or that fits no rule.
    """
    config, provenance = unpack(content, LinearConfig, name)
    _check_config(config, name)
    theta = read_arrays(content.get("theta"), _shapes(config), name)
    check_digest(content, name)  # last: the checks before say more
    return LinearWeights(theta, config, provenance)


def pack_linear(weights: LinearWeights, name: str) -> dict[str, Any]:
    """The content of the file of a linear rule.

    Raises:
        WeightsError: If shapes do not fit the configuration, numbers are not finite, or no rule can have the
            configuration.
    """
    _check_config(weights.config, name)
    theta = as_mapping(weights.theta)
    read_arrays(theta, _shapes(weights.config), name)
    return pack(FORMAT, weights.config, weights.provenance, theta)


def _shapes(config: LinearConfig) -> LinearTheta:
    channels = 1 + len(config.momentum_decays)
    return LinearTheta((channels,), (channels,))  # type: ignore[arg-type]


def _check_config(config: LinearConfig, name: str) -> None:
    decays = (*config.momentum_decays, config.second_moment_decay)
    if not all(0.0 <= d < 1.0 for d in decays):
        raise WeightsError(f"{name}: decays must be numbers in [0, 1); got {decays}.")
    for field, above in (("power", config.power >= 0.0), ("floor", config.floor > 0.0)):
        value = getattr(config, field)
        if not above or not math.isfinite(value):
            raise WeightsError(
                f"{name}: {field} = {value!r}, expected a finite number {'>= 0' if field == 'power' else '> 0'}."
            )
