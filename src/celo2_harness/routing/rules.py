"""Which label a leaf gets: the built-in table."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from optax.contrib import MuonDimensionNumbers

from celo2_harness.routing import words as say
from celo2_harness.routing.layouts import (
    LAYOUTS,
    any_view,
    find_layout,
    is_depthwise,
    is_single,
    table_view,
    vector_view,
)
from celo2_harness.routing.leaves import Leaf
from celo2_harness.routing.words import words
from celo2_harness.rule import MatrixView

LABELS = ("hidden", "embedding", "head", "vector", "other", "frozen")
ROLES = ("matrix", "embedding", "head", "bias", "gain", "scalar", "vector", "other")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the routing table, built-in or the user's.

    A rule applies where its `pattern` is found in the path (`re.search`) and its `when` is true; either may be missing.

    Args:
        name: The name that the report prints for leaves that this rule decided.
        label: One of `LABELS`.
        pattern: A regular expression searched in the path, such as "lora" or "^decoder/.*kernel$".
        when: A function of the `Leaf`.
        view: The matrix view, or a function of the `Leaf` that gives it; None keeps the built-in view.

    Example:
        >>> Rule("gates", "other", pattern="router", when=lambda leaf: leaf.ndim == 2).label
        'other'
    """

    name: str
    label: str
    pattern: str | None = None
    when: Callable[[Leaf], bool] | None = None
    view: MatrixView | MuonDimensionNumbers | Callable[[Leaf], Any] | None = None

    def applies(self, leaf: Leaf) -> bool:
        """Returns whether this rule decides about a leaf."""
        if self.pattern is not None and not re.search(self.pattern, leaf.path):
            return False
        return self.when is None or self.when(leaf)


def is_vector(leaf: Leaf) -> bool:
    """Returns whether a leaf is a bias, scale or offset by its name, with more than one axis in one layer."""
    biased = bool(leaf.name_words & {"bias", "biases"})
    if leaf.layer.kind in ("dense", "conv") and not biased or leaf.adapter:
        return False
    last = words(leaf.name)[-1:]
    if say.TOKEN.issuperset(last) or (leaf.name_words & (say.LAYER | {"kernel", "w"}) and not say.VECTOR & {*last}):
        return False
    if leaf.name_words & say.VECTOR or say.says_diagonal(leaf.name):
        return True
    # A matrix may be called b or g. A bias has a weight with more axes; a gain is a vector padded with ones.
    paired = leaf.weight is not None and bool(leaf.name_words & say.BIAS)
    return paired or (leaf.name_words <= {"g"} | say.WEIGHT and "g" in leaf.name_words and _is_padded(leaf))


def _is_padded(leaf: Leaf) -> bool:
    return sum(length != 1 for length in leaf.body) <= 1


def is_padded_vector(leaf: Leaf) -> bool:
    """Returns whether a leaf is one vector with extra axes of size one, as a (1, 1, d) class token."""
    return leaf.rank >= 3 and not leaf.is_weight and _is_padded(leaf)


def is_patch_embedding(leaf: Leaf) -> bool:
    """Whether a leaf turns image patches into tokens: "patch_embed/proj", "patchify", a convolution in "embedding"."""
    return any(map(say.says_patch, leaf.parts)) or (leaf.rank >= 4 and any(map(say.says_embedding, leaf.names[-3:-1])))


def is_embedding(leaf: Leaf) -> bool:
    """Returns whether a leaf is a table of embeddings, by its class, its own name or its module's.

    A weight that has a bias is a layer, whatever it is called; so is a kernel with axes of heads or of a window.
    """
    if leaf.layer.kind or leaf.adapter or is_padded_vector(leaf):
        return leaf.layer.kind == "embedding"
    layer = leaf.is_weight and leaf.bias is not None
    return say.says_table(leaf.name) or (say.says_embedding(leaf.owner) and not layer)


def is_head(leaf: Leaf) -> bool:
    """Returns whether a leaf belongs to the output layer: "lm_head", "classifier", an "out" at the top of the model."""
    if leaf.under_attention or leaf.adapter or leaf.layer.kind == "embedding":
        return False
    return any(map(say.says_head, leaf.names)) or (_is_root_head(leaf) and not leaf.in_attention)


def _is_root_head(leaf: Leaf) -> bool:
    return len(leaf.names) - leaf.is_weight == 1 and say.is_root_head(leaf.names[0])


# Vectors of one layer come first: all rows below speak of arrays with two axes or more.
BUILT_IN: tuple[Rule, ...] = (
    Rule("scalar", "vector", when=lambda leaf: leaf.rank == 0, view=vector_view),
    Rule("1-d array", "vector", when=lambda leaf: leaf.rank == 1, view=vector_view),
    Rule("bias or scale, by its name", "vector", when=is_vector, view=vector_view),
    Rule("normalisation layer", "vector", when=lambda leaf: leaf.is_norm, view=vector_view),
    Rule("patch embedding", "embedding", when=is_patch_embedding, view=table_view),
    Rule("output head", "head", when=is_head, view=any_view),
    Rule("embedding table", "embedding", when=is_embedding, view=table_view),
    Rule("vector with axes of size one", "vector", when=is_padded_vector, view=vector_view),
    Rule(
        "weight of its bias's shape",
        "vector",
        when=lambda leaf: leaf.is_weight and leaf.bias == leaf.body,
        view=vector_view,
    ),
    Rule("depthwise (or one-channel) convolution", "other", when=is_depthwise, view=any_view),
    Rule("kernel with one row or one column", "other", when=is_single, view=any_view),
    *(Rule(name, "hidden", when=lambda leaf, name=name: _has_layout(leaf, name), view=any_view) for name, _ in LAYOUTS),
)
# What a leaf gets that no rule matched. Its empty name is how strict mode and the report know it.
UNMATCHED = Rule("", "other", view=any_view)


def _has_layout(leaf: Leaf, name: str) -> bool:
    found = find_layout(leaf)
    return found is not None and found[0] == name


def first_match(leaf: Leaf) -> Rule:
    """The built-in rule that decides about a leaf."""
    return next((rule for rule in _BEFORE_LAYOUTS if rule.applies(leaf)), None) or _by_layout(leaf)


_BEFORE_LAYOUTS = BUILT_IN[: -len(LAYOUTS)]
_BY_LAYOUT = {rule.name: rule for rule in BUILT_IN[-len(LAYOUTS) :]}


def _by_layout(leaf: Leaf) -> Rule:
    found = find_layout(leaf)
    return UNMATCHED if found is None else _BY_LAYOUT[found[0]]


def role_of(leaf: Leaf, label: str) -> str:
    """The role of a leaf, out of `ROLES`: finer than its label."""
    if label == "frozen":
        label = first_match(leaf).label
    if label != "vector":
        return "matrix" if label == "hidden" else label
    if leaf.rank == 0:
        return "scalar"
    if leaf.weight is not None or leaf.name_words & say.BIAS:
        return "bias"
    return "gain" if leaf.name_words & say.GAIN else "bias" if leaf.is_norm else "vector"
