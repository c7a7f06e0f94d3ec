"""Reading tables into dataclasses: what fits, and what is named where it does not."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.training.reading import read


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    kind: Literal["one", "two"] = "one"


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    rate: float
    inner: tuple[Inner, ...] = ()
    curve: tuple[tuple[int, float | None], ...] = ()
    widths: tuple[int, ...] | tuple[tuple[int, ...], ...] = ()
    data: Path | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.rate < 0:
            raise InputError(f"rate = {self.rate}: expected at least 0")


GOOD = {"name": "a", "rate": 1}


def test_what_fits():
    table = GOOD | {"inner": [{"size": 3, "kind": "two"}], "curve": [[0, 1.5], [1, None]], "data": "a/b"}
    outer = read(Outer, table | {"widths": [[1, 2], [3]], "options": {"x": [1]}})
    assert outer == Outer("a", 1.0, (Inner(3, "two"),), ((0, 1.5), (1, None)), ((1, 2), (3,)), Path("a/b"), {"x": [1]})
    assert isinstance(outer.rate, float) and read(Outer, GOOD | {"widths": [1, 2]}).widths == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 1}, "it.speed: there is no such key; expected some of name, rate"),
        ({"name": 3}, "it.name = 3: expected a text"),
        ({"rate": "high"}, "it.rate = 'high': expected a number"),
        ({"rate": True}, "it.rate = True: expected a number"),
        ({"rate": -1}, "it: rate = -1.0: expected at least 0"),
        ({"rate": 10**400}, "it.rate = 1000"),
        ({"inner": {}}, "it.inner = {}: expected a list"),
        ({"inner": [{"size": 1}, {"size": 1.5}]}, "it.inner[1].size = 1.5: expected a whole number"),
        ({"inner": [{"size": 1, "kind": "six"}]}, "it.inner[0].kind = 'six': expected one of one, two"),
        ({"inner": [{}]}, "it.inner[0].size is missing"),
        ({"curve": [[0]]}, "it.curve[0] = [0]: expected a list of 2"),
        ({"curve": [[0, "x"]]}, "it.curve[0][1] = 'x': expected a number"),
        ({"options": [1]}, "it.options = [1]: expected a table"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(InputError) as refused:
        read(Outer, GOOD | change, "it")
    assert str(refused.value).startswith(message)
    with pytest.raises(InputError, match=r"^file, line 3: name is missing|^file, line 3: a"):
        read(Outer, {}, "file, line 3")
