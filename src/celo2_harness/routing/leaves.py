"""What routing knows of a parameter: the names that lead to it, the shape of one layer, its layer's class, its bias.

A tree is first brought into one form, however it was made: keys are cut into names (a dict may be nested, or flattened
with tuples, "." or "/"), boxes around arrays are dropped, and the axes of stacked layers are set aside (`stacks`).
What is left is the array as it is in a single layer, and rules speak about that.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from celo2_harness._types import PyTree
from celo2_harness.routing import words as say
from celo2_harness.routing.layers import NO_LAYER, Layer, LayerReader
from celo2_harness.routing.words import words

Shape = tuple[int, ...]

_NAME = re.compile(r"[\w~-]+")


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """One parameter array as rules see it.

    Attributes:
        path: Names joined by "/", as printed in reports.
        parts: The names, without Haiku's "~" and a leading "params", however the tree was flattened.
        shape: The array's shape.
        dtype: The array's dtype; None for a Python number.
        stack: The axes along which layers are stacked.
        layer: The facts that the class of its layer states.
        bias: Shape of one layer's bias, if this is a weight that has one. The gain of a weight-normed kernel counts.
        weight: Shape of one layer's weight, if this is a bias.
        mate: The shape of the attention block's output kernel for a query, key or value kernel, and the reverse.
        adapter: Whether this is a factor of a low-rank adapter, by its name or by the weight beside it.
        attends: Whether a module beside this one, or this array's own module, holds a query, key or value.
        direction: Whether this is the direction of a weight-normed kernel, `v` beside a gain `g`.
        unclear: The axis that may count the layers of a stack, or may not; None where this is clear.
        per_head: Whether the caller wants one matrix per attention head.
    """

    path: str
    parts: tuple[str, ...]
    shape: Shape
    dtype: Any = None
    stack: tuple[int, ...] = ()
    layer: Layer = NO_LAYER
    bias: Shape | None = None
    weight: Shape | None = None
    mate: Shape | None = None
    adapter: bool = False
    attends: bool = False
    direction: bool = False
    unclear: int | None = None
    per_head: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @functools.cached_property
    def body_axes(self) -> tuple[int, ...]:
        """The axes of one layer: all but the stacked ones."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.stack)

    @functools.cached_property
    def body(self) -> Shape:
        """The shape in one layer."""
        return tuple(self.shape[axis] for axis in self.body_axes)

    @property
    def rank(self) -> int:
        """The number of axes in one layer."""
        return len(self.shape) - len(self.stack)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The parts that are names, not list positions."""
        return tuple(part for part in self.parts if not part.isdigit())

    @property
    def name(self) -> str:
        """The leaf's own name ("kernel")."""
        return self.names[-1] if self.names else ""

    @property
    def owner(self) -> str:
        """The name of the module that holds it ("Dense_0")."""
        return self.names[-2] if len(self.names) > 1 else ""

    @functools.cached_property
    def name_words(self) -> frozenset[str]:
        return frozenset(words(self.name))

    @property
    def is_weight(self) -> bool:
        """Whether the leaf's own name says "the weight of its module"."""
        return self.direction or bool(self.name_words & say.WEIGHT)

    @property
    def module(self) -> str:
        """The name that tells what the leaf is for: its module's if the leaf is just "kernel", else its own."""
        return self.owner if self.direction or self.name_words <= say.WEIGHT else self.name

    @property
    def is_out_first(self) -> bool:
        """Whether it is stored (out, in), the layout of Equinox and PyTorch, where it is called `weight`."""
        return "weight" in self.name_words

    @functools.cached_property
    def under_attention(self) -> bool:
        """Returns whether the names above a leaf, or its own, say attention."""
        return any(map(say.says_attention, self.names)) or ("value" in self.names and self.attends)

    @property
    def in_attention(self) -> bool:
        """Whether a leaf belongs to an attention block, by the names above it or beside it."""
        return self.under_attention or self.attends

    @functools.cached_property
    def is_conv(self) -> bool:
        """Returns whether class or names say "convolution"."""
        return self.layer.kind == "conv" or (
            not self.layer.kind and (say.says_conv(self.owner) or say.says_conv(self.name))
        )

    @functools.cached_property
    def is_norm(self) -> bool:
        """Returns whether this is the scale or offset of a normalisation layer."""
        if self.layer.kind:
            return self.layer.kind == "norm"
        if self.name_words & {"kernel", "kernels"} or self.name == "w":
            return False
        if not say.says_norm(self.module) and not say.says_norm(self.owner):
            return False
        # An adaptive norm may hold a real matrix; then its bias is shorter than it.
        return self.bias is None or self.bias == self.body


def size(shape: Sequence[int], axes: Sequence[int]) -> int:
    """Number of entries along some axes.

    Example:
        >>> size((3, 3, 4, 6), (0, 1, 2))
        36
    """
    return math.prod(shape[axis] for axis in axes)


@dataclasses.dataclass(eq=False)
class Node:
    """A name in the tree: a container, a module or an array, with the names below it.

    Attributes:
        children: Nodes by name.
        leaves: Which leaves lie here, by their number; more than one where two keys read alike.
    """

    children: dict[str, "Node"] = dataclasses.field(default_factory=dict)
    leaves: list[int] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def below(self) -> list[int]:
        """All leaves here and below."""
        return [*self.leaves, *(leaf for child in self.children.values() for leaf in child.below)]

    @functools.cached_property
    def attends(self) -> bool:
        """Returns whether a child is called like a query, a key or a value; "value" alone may be a critic."""
        return any(name != "value" and (say.is_qkv(name) or say.is_fused_qkv(name)) for name in self.children)

    def arrays(self) -> dict[str, int]:
        """The arrays right here, by name: the leaves of a module."""
        return {name: child.leaves[0] for name, child in self.children.items() if child.leaves}


def tree_of(leaves: Sequence[Leaf]) -> Node:
    """The names of all leaves as a tree."""
    root = Node()
    for number, leaf in enumerate(leaves):
        node = root
        for part in leaf.parts:
            node = node.children.setdefault(part, Node())
        node.leaves.append(number)
    return root


def nodes_of(root: Node) -> list[Node]:
    """All nodes that have children."""
    found, waiting = [], [root]
    while waiting:
        node = waiting.pop()
        if node.children:
            found.append(node)
            waiting += node.children.values()
    return found


def bare_leaves(params: PyTree, per_head: bool = False) -> tuple[list[Leaf], Any]:
    """The leaves of a tree by themselves, without what is beside them, and the tree's structure.

    Raises:
        ValueError: If a leaf is not an array or a number.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    keys = _without_boxes([key for key, _ in flat])
    layer_of = LayerReader(params)
    leaves = []
    for key, (whole, value) in zip(keys, flat, strict=True):
        path = "/".join(name for part in whole for name in _key_names(part))
        shape = tuple(getattr(value, "shape", ()))
        if not (hasattr(value, "shape") and hasattr(value, "dtype")) and not isinstance(
            value, (bool, int, float, complex, np.generic)
        ):
            raise ValueError(
                f"routing: leaf {path!r} is {value!r}, which is not an array. Every leaf must be an array, a tracer, a "
                "jax.ShapeDtypeStruct or a number: keep only those (Equinox: eqx.filter(model, eqx.is_array); "
                "flax nnx: nnx.state(model, nnx.Param))."
            )
        path = "/".join(name for part in key for name in _key_names(part))
        layer = layer_of(key, len(shape))
        leaves.append(Leaf(path, _parts(path), shape, getattr(value, "dtype", None), layer=layer, per_head=per_head))
    return leaves, structure


def _key_names(key: Any) -> tuple[str, ...]:
    for field in ("key", "name", "idx"):  # DictKey and FlattenedIndexKey, GetAttrKey, SequenceKey
        if hasattr(key, field):
            value = getattr(key, field)
            return tuple(map(str, value)) if isinstance(value, tuple) else (str(value),)
    return (str(key).strip(".[]'\""),)


def _parts(path: str) -> tuple[str, ...]:
    """The names in a path, whatever stands between them."""
    parts = [part for part in _NAME.findall(path) if part != "~"]
    if len(parts) > 1 and parts[0] == "params":
        parts = parts[1:]
    if len(parts) > 3 and parts[-3] == "parametrizations":  # PyTorch's name for weight normalisation
        which = {"original0": "_g", "original1": "_v"}.get(parts[-1], "")
        parts = [*parts[:-3], parts[-2] + which]
    return tuple(parts)


def _without_boxes(keys: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Drops the last key of boxed arrays (nnx variables, linen's Partitioned, haliax's NamedArray).

    Only an attribute called "value" or "raw_value", or one without a name, that is the box's one leaf counts: a dict or
    a module that holds query, key and value keeps its names.
    """
    counts: dict[tuple[Any, ...], int] = {}
    for key in keys:
        counts[key[:-1]] = counts.get(key[:-1], 0) + 1

    def boxed(key: tuple[Any, ...]) -> bool:
        if len(key) < 2 or counts[key[:-1]] > 1:
            return False
        attribute = isinstance(key[-1], jax.tree_util.GetAttrKey) and key[-1].name in ("value", "raw_value")
        return attribute or isinstance(key[-1], jax.tree_util.FlattenedIndexKey)

    return [key[:-1] if boxed(key) else key for key in keys]
