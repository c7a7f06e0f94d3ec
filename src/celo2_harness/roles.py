"""The AdamW side by role: what a role may have apart from the rest of its preset, and what it has in the end."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from celo2_harness._arguments import choose, number
from celo2_harness._types import ScalarOrSchedule

# The roles that a weight decay on "all matrices, but no biases and no norms" names.
MATRICES = ("hidden", "embedding", "head", "other")
# What may be set apart, from general to special: a "vector" is any of the four after it.
REST_ROLES = ("embedding", "head", "other", "vector", "gain", "bias", "scalar")
_VECTORS = ("gain", "bias", "scalar")

# One value for all, or a value by role.
ByRole = ScalarOrSchedule | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The settings in which one role differs from the rest of its preset; None stands for no difference.

    Attributes:
        learning_rate_factor: Learning rate over that of hidden matrices, a number or a schedule.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        weight_decay: Weight decay, a number or a schedule.

    Example:
        >>> from celo2_harness import harness
        >>> tx = harness.build(rest={"embedding": AdamW(b2=0.99, weight_decay=0.1), "gain": AdamW(weight_decay=0.0)})
    """

    learning_rate_factor: ScalarOrSchedule | None = None
    b1: float | None = None
    b2: float | None = None
    weight_decay: ScalarOrSchedule | None = None

    def over(self, other: "AdamW") -> "AdamW":
        """This one, with the other's values where it has none."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(other, **values)


def by_role(name: str, value: Any, alone: str, read: Callable[[str, Any], Any] = number) -> dict[str, Any]:
    """A value by role; one that is given alone belongs to the role `alone`."""
    if not isinstance(value, Mapping):
        return {alone: read(name, value)}
    known = REST_ROLES if alone == "rest" else (alone, *REST_ROLES)
    for role in value:
        choose(role, dict.fromkeys(known), f"role in {name}")
    return {role: read(f"{name}[{role!r}]", x) for role, x in value.items()}


def checked_terms(name: str, terms: Any) -> AdamW:
    """The terms of a role, checked.

    Raises:
        TypeError: If they are no `AdamW`.
        ValueError: If a number is out of range.
    """
    if not isinstance(terms, AdamW):
        raise TypeError(f"{name} = {terms!r}: expected a celo2_harness.AdamW.")
    values = {field: number(f"{name}.{field}", x) for field, x in vars(terms).items() if x is not None}
    for field in ("b1", "b2"):
        if not 0.0 <= values.get(field, 0.0) < 1.0:
            raise ValueError(f"{name}.{field} = {values[field]!r}: expected a number in [0, 1).")
    return AdamW(**values)


def rest_terms(
    base: AdamW,
    of_preset: Mapping[str, AdamW],
    factors: Mapping[str, Any],
    decays: Mapping[str, Any],
    asked: Mapping[str, AdamW],
) -> dict[str, AdamW]:
    """The terms of "rest" and of every role that is set apart from it; general layers first, special ones over them.

    Args:
        base: The terms of the preset.
        of_preset: The roles that the preset sets apart.
        factors: Learning-rate factors by role.
        decays: Weight decays by role.
        asked: Terms by role, which go before all others.
    """

    def terms_of(*names: str) -> AdamW:
        terms = base
        for layer in (of_preset.get, lambda _: AdamW(factors.get("rest"))):
            for name in names:
                terms = (layer(name) or AdamW()).over(terms)
        for name in names:
            terms = AdamW(factors.get(name), weight_decay=decays.get(name)).over(terms)
        for name in names:
            terms = asked.get(name, AdamW()).over(terms)
        return terms

    apart = [role for role in REST_ROLES if any(role in layer for layer in (of_preset, factors, decays, asked))]
    found = {role: terms_of("vector", role) if role in _VECTORS else terms_of(role) for role in apart}
    return {"rest": terms_of("rest"), **found}
