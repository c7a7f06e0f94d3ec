"""What routing knows of a parameter leaf: names, shape and surroundings, never values."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from celo2_harness._types import PyTree

Shape = tuple[int, ...]

# Libraries whose class names say what a layer is. A user's own class `EmbeddingModel` says nothing about the
# arrays in it, so other classes are not read.
_LAYER_LIBRARIES = ("equinox", "flax", "haiku")
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")

# Words that stand for the weight itself: `c_attn_w` and `c_attn` mean the same thing.
WEIGHT_WORDS = frozenset({"w", "weight", "weights", "kernel", "kernels"})
BIAS_WORDS = frozenset({"b", "bias", "biases"})


@functools.lru_cache(maxsize=4096)
def words(name: str) -> tuple[str, ...]:
    """The lower-case words of a name, without digits.

    Example:
        >>> words("MultiHeadAttention_0"), words("c_attn_w"), words("ln_1")
        (('multi', 'head', 'attention'), ('c', 'attn', 'w'), ('ln',))
    """
    return tuple(word.lower() for word in _WORD.findall(name))


NORM_WORDS = frozenset(words("norm norms ln layernorm rmsnorm batchnorm groupnorm instancenorm bn gn rms"))
# Containers that hold one entry per layer. Followed by an index they are lists; otherwise they may be stacks.
STACK_WORDS = frozenset(words("layers blocks h scan scanned stack stacked"))
# Query and key norms may hold one scale per head, (heads, dim), which is no stack.
_PER_HEAD_NORMS = frozenset(words("q k query key qk"))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter array as rules see it.

    Attributes:
        path: names joined by "/", as printed in reports.
        parts: the path cut at every "/", without Haiku's "~" and a leading "params".
        shape: the array's shape.
        dtype: the array's dtype (None for a Python number).
        siblings: name and shape of every leaf in the same module, this one included.
        around: names of the modules beside this leaf's module.
        layer: class name of the library layer that holds the leaf ("Linear"), "" where the tree is made of dicts.
        stack: how many leading axes its surroundings say are stacked layers.
        per_head: whether the caller wants one matrix per attention head.
    """

    path: str
    parts: tuple[str, ...]
    shape: Shape
    dtype: Any
    siblings: Mapping[str, Shape]
    around: frozenset[str]
    layer: str = ""
    stack: int = 0
    per_head: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

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

    @functools.cached_property
    def owner_words(self) -> frozenset[str]:
        """Words of the module's name and of its library class."""
        return frozenset(words(self.owner)) | frozenset(words(self.layer))

    @property
    def is_weight(self) -> bool:
        """Whether the leaf's own name says "the weight of its module"."""
        return bool(self.name_words & WEIGHT_WORDS)

    @property
    def module(self) -> str:
        """The name that tells what the leaf is for: its module's if the leaf is just "kernel", else its own."""
        return self.owner if set(words(self.name)) <= WEIGHT_WORDS else self.name

    @functools.cached_property
    def bias(self) -> Shape | None:
        """Shape of the bias that goes with this weight ("w1" with "b1", "in_proj_weight" with "in_proj_bias")."""
        return self._partner(WEIGHT_WORDS, BIAS_WORDS)

    @functools.cached_property
    def weight(self) -> Shape | None:
        """Shape of the weight that goes with this bias."""
        return self._partner(BIAS_WORDS, WEIGHT_WORDS)

    @functools.cached_property
    def weight_name(self) -> str | None:
        """Name of the weight that goes with this bias."""
        return self._partner_name(BIAS_WORDS, WEIGHT_WORDS)

    def _partner(self, own: frozenset[str], other: frozenset[str]) -> Shape | None:
        name = self._partner_name(own, other)
        return None if name is None else self.siblings[name]

    def _partner_name(self, own: frozenset[str], other: frozenset[str]) -> str | None:
        def rest(name: str, drop: frozenset[str]) -> tuple[str, ...]:
            return tuple(token for token in re.findall(r"[a-z]+|\d+", name.lower()) if token not in drop)

        if not self.name_words & own:
            return None
        wanted = rest(self.name, own)
        for name in self.siblings:
            if frozenset(words(name)) & other and rest(name, other) == wanted:
                return name
        return None


def size(shape: Sequence[int], axes: Sequence[int]) -> int:
    """Number of entries along some axes.

    Example:
        >>> size((3, 3, 4, 6), (0, 1, 2))
        36
    """
    return math.prod(shape[axis] for axis in axes)


def vector_batch(shape: Shape) -> int:
    """How many leading axes of a vector leaf are stacked layers, read from the shape alone.

    Axes of size one are padding: Haiku keeps a batch-norm scale as (1, 1, 1, d), Equinox a convolution bias as
    (d, 1, 1).

    Example:
        >>> vector_batch((16,)), vector_batch((12, 16)), vector_batch((1, 1, 1, 16)), vector_batch((12, 8, 1, 1))
        (0, 1, 0, 1)
    """
    wide = [axis for axis, length in enumerate(shape) if length != 1]
    return wide[-2] + 1 if len(wide) > 1 else 0


def is_norm(leaf: Leaf) -> bool:
    """Whether a leaf is the scale or offset of a normalisation layer."""
    if "kernel" in leaf.name_words or leaf.ndim == 0:
        return False
    if (
        not (frozenset(words(leaf.module)) | (leaf.owner_words if leaf.owner else frozenset(words(leaf.layer))))
        & NORM_WORDS
    ):
        return False
    # An adaptive norm may hold a real matrix; then its bias is shorter than it.
    return leaf.bias is None or leaf.bias == leaf.shape


def leaves_of(params: PyTree, per_head: bool = False) -> tuple[list[Leaf], Any]:
    """All leaves of a tree, and its structure.

    Args:
        params: arrays, tracers or `jax.ShapeDtypeStruct`s; nodes without leaves (None, `optax.MaskedNode`) are skipped.
        per_head: copied into every leaf.

    Returns:
        The leaves in `jax.tree.leaves` order, and the tree's structure.

    Raises:
        ValueError: if a leaf is not an array or a number.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    keys = _without_variable_keys([key for key, _ in flat])
    bare = [_bare_leaf(params, key, value, per_head=per_head) for key, (_, value) in zip(keys, flat, strict=True)]
    modules: dict[tuple[str, ...], dict[str, Shape]] = {}
    children: dict[tuple[str, ...], set[str]] = {}
    for leaf in bare:
        modules.setdefault(leaf.parts[:-1], {})[leaf.name] = leaf.shape
        for depth in range(len(leaf.parts)):
            children.setdefault(leaf.parts[:depth], set()).add(leaf.parts[depth])
    placed = [
        dataclasses.replace(
            leaf,
            siblings=modules[leaf.parts[:-1]],
            around=frozenset(children.get(leaf.parts[:-1], ())) | frozenset(children.get(leaf.parts[:-2], ())),
        )
        for leaf in bare
    ]
    depths = _stack_depths(placed)
    return [
        dataclasses.replace(leaf, stack=depth) if depth else leaf for leaf, depth in zip(placed, depths, strict=True)
    ], structure


def _bare_leaf(params: PyTree, key: tuple[Any, ...], value: Any, *, per_head: bool) -> Leaf:
    path = "/".join(_key_name(part) for part in key)
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    if not is_array and not isinstance(value, (bool, int, float, complex, np.generic)):
        raise ValueError(
            f"routing: leaf {path!r} is {value!r}, which is not an array. Every leaf must be an array, a tracer, a "
            "jax.ShapeDtypeStruct or a number: keep only those (Equinox: eqx.filter(model, eqx.is_array); "
            "flax nnx: nnx.state(model, nnx.Param))."
        )
    parts = tuple(part for part in path.split("/") if part != "~")
    if len(parts) > 1 and parts[0] == "params":
        parts = parts[1:]
    return Leaf(
        path=path,
        parts=parts,
        shape=tuple(getattr(value, "shape", ())),
        dtype=getattr(value, "dtype", None),
        siblings={},
        around=frozenset(),
        layer=_layer_class(params, key),
        per_head=per_head,
    )


def _key_name(key: Any) -> str:
    for field in ("key", "name", "idx"):  # DictKey and FlattenedIndexKey, GetAttrKey, SequenceKey
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key).strip(".[]'\"")


def _without_variable_keys(keys: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Drops the last key of boxed arrays (nnx variables, linen's Partitioned), which names no module.

    Only an attribute called "value" or "raw_value" that is the box's one leaf counts: a dict or a module that holds
    query, key and value keeps its names.
    """
    boxes: dict[tuple[Any, ...], int] = {}
    for key in keys:
        boxes[key[:-1]] = boxes.get(key[:-1], 0) + 1

    def boxed(key: tuple[Any, ...]) -> bool:
        return (
            len(key) > 1
            and isinstance(key[-1], jax.tree_util.GetAttrKey)
            and key[-1].name in ("value", "raw_value")
            and boxes[key[:-1]] == 1
        )

    return [key[:-1] if boxed(key) else key for key in keys]


def _layer_class(params: PyTree, key: tuple[Any, ...]) -> str:
    """Class name of the library layer that holds a leaf; Equinox trees keep it, and it settles what a `weight` is."""
    node = params
    for part in key[:-1]:
        try:
            if isinstance(part, jax.tree_util.GetAttrKey):
                node = getattr(node, part.name)
            elif isinstance(part, jax.tree_util.SequenceKey):
                node = node[part.idx]
            elif isinstance(part, jax.tree_util.DictKey):
                node = node[part.key]
            else:
                return ""
        except (AttributeError, KeyError, IndexError, TypeError):
            return ""
    for base in type(node).__mro__:
        library = base.__module__.split(".")[0]
        if library in _LAYER_LIBRARIES and not isinstance(node, Mapping):
            return base.__name__
    return ""


def _stack_depths(leaves: Sequence[Leaf]) -> list[int]:
    """How many leading axes of each leaf are stacked layers, as far as its surroundings tell.

    The surest sign is a normalisation scale: it is a vector, so every further axis is a stack. The nearest one in
    the tree decides, if its leading sizes fit. Without any, a container named like a stack ("layers" without
    an index below, linen's "ScanBlock_0") counts if all its leaves share their leading size.
    """
    norms: dict[tuple[str, ...], Shape] = {}
    leading: dict[tuple[str, ...], set[int | None]] = {}
    for leaf in leaves:
        prefixes = [leaf.parts[:depth] for depth in range(len(leaf.parts))]
        for prefix in prefixes:
            leading.setdefault(prefix, set()).add(leaf.shape[0] if leaf.shape else None)
        if is_norm(leaf) and not (leaf.owner_words | leaf.name_words) & _PER_HEAD_NORMS:
            stacked = leaf.shape[: vector_batch(leaf.shape)]
            for prefix in prefixes:
                norms[prefix] = min(norms.get(prefix, stacked), stacked, key=len)

    def depth_of(leaf: Leaf) -> int:
        for end in range(len(leaf.parts) - 1, -1, -1):
            sizes = norms.get(leaf.parts[:end])
            if sizes is not None:
                return len(sizes) if leaf.shape[: len(sizes)] == sizes else 0
        for end in range(len(leaf.parts) - 1, 0, -1):
            named = frozenset(words(leaf.parts[end - 1])) & STACK_WORDS
            if named and not leaf.parts[end].isdigit() and len(leading[leaf.parts[:end]] - {None}) == 1:
                return 1
        return 0

    return [depth_of(leaf) for leaf in leaves]
