"""Which arrays go together: a weight and its bias, the projections of one attention block, two low-rank factors."""

import dataclasses
import re
from collections.abc import Mapping

from celo2_harness.routing import words as say
from celo2_harness.routing.leaves import Node, nodes_of
from celo2_harness.routing.words import words

_TOKEN = re.compile(r"[a-z]+|\d+")


@dataclasses.dataclass
class Neighbours:
    """Which arrays of one module, or of one attention block, go together; leaves by their numbers.

    Attributes:
        bias: Weight -> its bias ("w1" with "b1", "in_proj_weight" with "in_proj_bias").
        weight: Bias -> its weight.
        gain: Direction of a weight-normed kernel -> its gain.
        mate: Query, key or value kernel -> output kernel of the same block, and the reverse.
        attends: Leaves in or beside a module that holds a query, key or value.
        groups: Node -> the pairs and blocks in it, which are stacked together or not at all.
    """

    bias: dict[int, int] = dataclasses.field(default_factory=dict)
    weight: dict[int, int] = dataclasses.field(default_factory=dict)
    gain: dict[int, int] = dataclasses.field(default_factory=dict)
    mate: dict[int, int] = dataclasses.field(default_factory=dict)
    attends: set[int] = dataclasses.field(default_factory=set)
    groups: dict[Node, list[list[int]]] = dataclasses.field(default_factory=dict)


def neighbours_of(root: Node) -> Neighbours:
    """Pairs up the leaves of every module, in one pass over the tree."""
    found = Neighbours()
    for node in nodes_of(root):
        arrays = node.arrays()
        found.groups[node] = _pair(arrays, found)
        if node.attends:
            found.attends.update(arrays.values())
            for child in node.children.values():
                found.attends.update(child.arrays().values())
    for node in found.groups if found.attends else ():
        block = _pair_attention(node, found)
        found.groups[node].insert(0, block + [found.bias[i] for i in block if i in found.bias])
    return found


def _pair(arrays: Mapping[str, int], found: Neighbours) -> list[list[int]]:
    weights: dict[tuple[str, ...], int] = {}
    biases: dict[tuple[str, ...], int] = {}
    for name, number in arrays.items():
        tokens = tuple(_TOKEN.findall(name.lower()))
        spoken = frozenset(words(name))
        gain = None if not tokens or tokens[-1] != "v" else arrays.get(re.sub("v$", "g", re.sub("V$", "G", name)))
        if gain is not None:
            found.gain[number] = gain
            tokens, spoken = (*tokens[:-1], "w"), spoken | {"w"}
        if spoken & say.WEIGHT:
            weights.setdefault(tuple(token for token in tokens if token not in say.WEIGHT), number)
        if spoken & say.BIAS:
            biases.setdefault(tuple(token for token in tokens if token not in say.BIAS), number)
    for rest, number in weights.items():
        if rest in biases:
            found.bias[number], found.weight[biases[rest]] = biases[rest], number
    bias, gain = found.bias, found.gain
    return [[i, *(of[i] for of in (bias, gain) if i in of)] for i in arrays.values() if i in bias or i in gain]


def _pair_attention(node: Node, found: Neighbours) -> list[int]:
    """Joins query, key and value with the output projection beside them."""
    if not node.attends:
        return []

    def kernel(name: str, child: Node) -> int | None:
        if child.leaves:
            return child.leaves[0]
        arrays = [number for name, number in child.arrays().items() if set(words(name)) <= say.WEIGHT]
        return arrays[0] if len(arrays) == 1 else None

    sides = {"in": [], "out": []}
    for name, child in node.children.items():
        side = "in" if say.is_qkv(name) and "einsum" not in words(name) else "out" if say.is_out(name) else None
        number = None if side is None else kernel(name, child)
        if side is not None and number is not None:
            sides[side].append(number)
    if not sides["in"] or len(sides["out"]) != 1:
        return []
    out = sides["out"][0]
    found.mate[out] = sides["in"][0]
    found.mate.update(dict.fromkeys(sides["in"], out))
    return [*sides["in"], out]
