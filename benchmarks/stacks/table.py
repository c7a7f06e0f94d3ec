"""The stacks: one row each. A new one is a new row; rows of one structure share their compiled program."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from benchmarks.stacks.directions import (
    acting,
    assemble,
    hand_set,
    linear_rule,
    mixed,
    optax_muon,
    theta_direction,
    whitened,
)
from benchmarks.stacks.trainings import Structure
from celo2_harness import Weights, linear_direction, load_weights

HIDDEN_RATES = (7e-4, 1.2e-3, 2e-3, 3.4e-3)
REST_RATES = (6e-3, 1e-2, 1.7e-2)


@dataclass(frozen=True)
class Stack:
    """A row.

    Attributes:
        label: What tables call it.
        structure: Out of `structures()`.
        numbers: What differs from `NUMBERS`.
        hidden_rates: Of the grid; steps of hidden matrices.
        rest_rates: Of the grid; AdamW's.
    """

    label: str
    structure: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    hidden_rates: tuple[float, ...] = HIDDEN_RATES
    rest_rates: tuple[float, ...] = REST_RATES


def structures(published: Path | None = None) -> dict[str, Structure]:
    """What is compiled: name -> from numbers and the length of the run to the optimizer.

    Args:
        published: A file with the published weights; without one, the bundled ones stand in for them.
    """
    names = ["celo2", "celo2" if published is None else str(published)]
    thetas = [
        *(load_weights(name, kind=Weights).theta for name in names),
        hand_set("muon"),
        hand_set("soap"),
    ]
    theta = theta_direction(jax.tree.map(lambda *xs: np.stack(xs), *thetas))
    whole = lambda direction: functools.partial(assemble, direction)
    return {
        "linear": whole(mixed),
        "whiten": whole(whitened),
        "act": whole(acting(linear_rule)),
        "package": whole(acting(lambda n, steps: linear_direction("celo2_linear", steps))),
        "theta": whole(theta),
        "theta in basis": whole(acting(theta)),
        "optax.contrib.muon": optax_muon,
    }


TWO_MOMENTA = {"gradient": 0.0, "decay_1": 0.9, "weight_1": 0.5, "weight_2": 0.5}
THREE_NUMBERS = {"gradient": 1 / 3.66, "decay_1": 0.9, "weight_1": 1.9 / 3.66, "weight_2": 0.76 / 3.66}
OVER_RMS = THREE_NUMBERS | {"normalized": 1.0, "floor_of_second": 1e-8}
ANNEALED = {"slope_1": 1.0, "slope_2": -1.0}
# What the search found, and the annealed weights of its momenta, raw and rounded.
SEARCHED_RULE = OVER_RMS | {
    "weight_1": 0.0826,
    "slope_1": 0.106,
    "weight_2": 0.0253,
    "slope_2": 5.07,
    "weight_3": 0.00117,
    "slope_3": 1.66,
    "basis_decay": 0.68,
    "second_decay": 0.979,
    "floor_of_second": 5.9e-10,
    "whitening": 0.771,
}
ANNEALED_MOMENTA = {"gradient": 0.3, "decay_1": 0.9, "weight_1": 0.3, "weight_2": 0.1, "slope_2": 6.0}

# What is added to Muon and to SOAP, one at a time.
ADDED = {
    "look-ahead 0.3, 0.9": {"look_ahead": 0.3, "look_ahead_decay": 0.9},
    "power 1.2": {"power": 1.2},
    "flat 0.3, then linear": {"flat": 0.3, "power": 1.0},
    "weight decay 0.1": {"weight_decay": 0.1, "rest_weight_decay": 0.1},
    "cautious decay 0.1": {"weight_decay": 0.1, "rest_weight_decay": 0.1, "cautious": 1.0},
    "rows normalised": {"row_norm": 1.0},
    "beta2 0.99 of vectors": {"vector_b2": 0.99},
    "beta2 0.99 of embedding and head": {"embedding_b2": 0.99, "head_b2": 0.99},
    "beta2 0.999 of all": {"vector_b2": 0.999, "embedding_b2": 0.999, "head_b2": 0.999},
    "head at half": {"head_factor": 0.5},
    "embedding at three times": {"embedding_factor": 3.0},
    "vectors at half": {"vector_factor": 0.5},
}
HYPERBALL = {"hyperball": 1.0}
ANGLES = (0.02, 0.04, 0.08)

# In the order of their worth, for runs that are cut short. Tables compare with the first.
STACKS = (
    Stack("Muon", "linear"),
    Stack("SOAP", "whiten"),
    Stack("over-rms in basis", "act", OVER_RMS),
    Stack("searched rule", "act", SEARCHED_RULE, (2e-3, 3.4e-3, 5.8e-3), (1e-2, 1.7e-2, 2.7e-2)),
    Stack("bundled linear rule", "package", {}, (2e-3, 3.4e-3, 5.8e-3), (1e-2, 1.7e-2, 2.7e-2)),
    Stack("SOAP, annealed", "whiten", ANNEALED_MOMENTA, (2e-3, 3.4e-3, 5.8e-3)),
    Stack("Muon, annealed", "linear", ANNEALED_MOMENTA, (2e-3, 3.4e-3, 5.8e-3)),
    Stack("optax.contrib.muon", "optax.contrib.muon", {}, (0.01, 0.02, 0.04), (5e-3, 1e-2, 2e-2)),
    Stack("Muon, 0.9 and 0.99", "linear", TWO_MOMENTA),
    Stack("Muon, three numbers", "linear", THREE_NUMBERS),
    Stack("SOAP, decays 0.9", "whiten", {"basis_decay": 0.9, "second_decay": 0.9}),
    Stack("SOAP, 0.9 and 0.99", "whiten", TWO_MOMENTA),
    Stack("SOAP, three numbers", "whiten", THREE_NUMBERS),
    Stack("over-rms, floor 1e-16", "act", OVER_RMS | {"floor_of_second": 1e-16}),
    Stack("over-rms, not normalised", "act", OVER_RMS | {"normalized": 0.0}),
    Stack("over-rms, annealed", "act", OVER_RMS | ANNEALED),
    Stack("SOAP acting, over-rms", "act", {"normalized": 1.0, "floor_of_second": 1e-8}),
    Stack("bundled theta in basis", "theta in basis", {"theta": 0.0}),
    Stack("published theta in basis", "theta in basis", {"theta": 1.0}),
    Stack("over-rms theta in basis", "theta in basis", {"theta": 3.0}),
    Stack("SOAP + hyperball", "whiten", HYPERBALL, ANGLES),
    *(Stack(f"SOAP + {label}", "whiten", numbers) for label, numbers in ADDED.items()),
    Stack("bundled theta", "theta", {"theta": 0.0}),
    Stack("published theta", "theta", {"theta": 1.0}),
    Stack("hand-set theta", "theta", {"theta": 2.0}),
    Stack("SOAP, eps 1e-3", "whiten", {"eps": 1e-3}),
    Stack("SOAP, eps 1e-2", "whiten", {"eps": 1e-2}),
    Stack("SOAP, second moment 0.99", "whiten", {"second_decay": 0.99}),
    Stack("Muon + hyperball", "linear", HYPERBALL, ANGLES),
    *(Stack(f"Muon + {label}", "linear", numbers) for label, numbers in ADDED.items()),
)
