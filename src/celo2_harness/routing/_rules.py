"""Which label a leaf gets: the built-in table, and the user's rules in front of it."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from optax.contrib import MuonDimensionNumbers

from celo2_harness.routing._layouts import (
    LAYOUTS,
    any_view,
    in_attention,
    is_depthwise,
    is_lora,
    is_single,
    table_view,
    under_attention,
    vector_view,
)
from celo2_harness.routing._leaves import BIAS_WORDS, Leaf, is_norm, words
from celo2_harness.rule import MatrixView

LABELS = ("hidden", "embedding", "head", "vector", "other", "frozen")
ROLES = ("matrix", "embedding", "head", "bias", "gain", "scalar", "vector", "other")

_VECTOR_WORDS = frozenset(words("bias biases scale scales offset offsets gamma beta gain gains"))
_EMBEDDING_WORDS = frozenset(words("embed embeds embedder embedding embeddings emb embs wte wpe posemb codebook"))
# Only as the end of an array's own name: "cls_token" is an embedding, "token_mixing/kernel" is not.
_TOKEN_WORDS = frozenset(words("token tokens pos positions positional"))
_PATCH_WORDS = frozenset({"patch", "patches"})
_PATCH_LAYER_WORDS = _EMBEDDING_WORDS | frozenset(words("conv proj projection stem dense linear"))
# A module named "embed_proj" maps embeddings to something else: it is a layer, not a table.
_LAYER_WORDS = frozenset(words("proj projection projector dense linear fc mlp conv"))
_HEAD_WORDS = frozenset(words("head lmhead logits classifier unembed unembedding readout"))
# "multi_head", "q_head", "map_head" (attention pooling) are no output layers.
_NOT_A_HEAD = frozenset(words("multi attn attention q k v kv query key per map pool num norm"))
_ROOT_HEADS = frozenset(
    words("out output fcout projout outproj outputproj outputprojection outputlayer finallayer finaldense")
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the routing table, built-in or the user's.

    A rule applies where its `pattern` is found in the path (`re.search`) and its `when` is true; either may be missing.

    Args:
        name: what the report prints for leaves this rule decided.
        label: one of `LABELS`.
        pattern: regular expression searched in the path, such as "lora" or "^decoder/.*kernel$".
        when: function of the `Leaf`.
        view: the matrix view, or a function of the `Leaf` that gives it; None keeps the built-in view.

    Example:
        >>> Rule("gates", "other", pattern="router", when=lambda leaf: leaf.ndim == 2).label
        'other'
    """

    name: str
    label: str
    pattern: str | None = None
    when: Callable[[Leaf], bool] | None = None
    view: MatrixView | MuonDimensionNumbers | Callable[[Leaf], MuonDimensionNumbers | None] | None = None

    def applies(self, leaf: Leaf) -> bool:
        """Whether this rule decides about a leaf."""
        if self.pattern is not None and not re.search(self.pattern, leaf.path):
            return False
        return self.when is None or self.when(leaf)


def is_vector(leaf: Leaf) -> bool:
    """Whether a name says bias, scale or offset, however many axes stacking has added."""
    if leaf.name_words & (_LAYER_WORDS | {"kernel", "w"}) and not leaf.name_words & {"bias", "biases"} or is_lora(leaf):
        return False
    named = bool(leaf.name_words & _VECTOR_WORDS) or leaf.name.lower() in ("b", "g", "a_log")
    # "c_attn_b" is a bias if there is a "c_attn_w"; alone, a trailing b proves nothing.
    paired = "b" in leaf.name_words and leaf.weight is not None and len(leaf.weight) > leaf.ndim
    return named or paired


def is_padded_vector(leaf: Leaf) -> bool:
    """Whether a leaf is one vector with extra axes of size one, as a (1, 1, d) class token."""
    return leaf.ndim >= 3 and not leaf.is_weight and sum(length != 1 for length in leaf.shape) <= 1


def is_patch_embedding(leaf: Leaf) -> bool:
    """Whether a leaf turns image patches into tokens: "patch_embed/proj", "patch_conv", "patchify"."""
    if leaf.ndim < 2:
        return False
    spoken = [frozenset(words(part)) for part in leaf.parts]
    return any("patchify" in part or (part & _PATCH_WORDS and part & _PATCH_LAYER_WORDS) for part in spoken)


def is_embedding(leaf: Leaf) -> bool:
    """Whether a leaf is a table of embeddings, by its own name or its module's."""
    token = frozenset(words(leaf.name)[-1:]) & _TOKEN_WORDS
    own = (leaf.name_words & _EMBEDDING_WORDS or token) and not leaf.name_words & _LAYER_WORDS
    named = frozenset(words(leaf.owner))
    # Library classes settle it (Equinox calls the table `weight`); a name must not also say "projection".
    owned = leaf.layer in ("Embedding", "Embed") or (named & _EMBEDDING_WORDS and not named & _LAYER_WORDS)
    return leaf.ndim >= 2 and bool(own or owned)


def is_head(leaf: Leaf) -> bool:
    """Whether a leaf belongs to the output layer: "lm_head", "classifier", an "out" at the top of the model."""
    if leaf.ndim < 2 or under_attention(leaf) or is_lora(leaf):
        return False
    return any(_names_a_head(part) for part in leaf.names) or (_is_root_head(leaf) and not in_attention(leaf))


def _names_a_head(name: str) -> bool:
    spoken = [word for word in words(name) if word not in ("w", "weight", "kernel")]
    if not spoken or frozenset(spoken) & _NOT_A_HEAD:
        return False
    meaning = frozenset(spoken)
    untied = meaning & {"embed", "embedding", "embeddings"} and meaning & {"out", "output"}
    return spoken[-1] in _HEAD_WORDS or "logits" in meaning or bool(untied)


def _is_root_head(leaf: Leaf) -> bool:
    depth = len(leaf.names) - leaf.is_weight
    return depth == 1 and "".join(word for word in words(leaf.names[0]) if word not in ("w", "weight")) in _ROOT_HEADS


BUILT_IN: tuple[Rule, ...] = (
    Rule("scalar", "vector", when=lambda leaf: leaf.ndim == 0, view=vector_view),
    Rule("1-d array", "vector", when=lambda leaf: leaf.ndim == 1, view=vector_view),
    Rule("bias or scale, by its name", "vector", when=is_vector, view=vector_view),
    Rule("normalisation layer", "vector", when=is_norm, view=vector_view),
    Rule("patch embedding", "embedding", when=is_patch_embedding, view=table_view),
    Rule("output head", "head", when=is_head, view=any_view),
    Rule(
        "embedding table",
        "embedding",
        when=lambda leaf: is_embedding(leaf) and not is_lora(leaf) and not is_padded_vector(leaf),
        view=table_view,
    ),
    Rule("vector with axes of size one", "vector", when=is_padded_vector, view=vector_view),
    Rule(
        "weight of its bias's shape",
        "vector",
        when=lambda leaf: leaf.is_weight and leaf.bias == leaf.shape,
        view=vector_view,
    ),
    Rule("depthwise (or one-channel) convolution", "other", when=is_depthwise, view=any_view),
    Rule("kernel with one row or one column", "other", when=is_single, view=any_view),
    *(Rule(layout.name, "hidden", when=layout.applies, view=layout.view) for layout in LAYOUTS),
)
# What a leaf gets that no rule matched. Its empty name is how strict mode and the report know it.
UNMATCHED = Rule("", "other", view=any_view)

RuleLike = (
    Rule
    | tuple[str, str]
    | tuple[str, str, MuonDimensionNumbers | None]
    | Callable[..., Any]  # (path, leaf) -> label, Rule, (label, view) or None
    | str  # the name of an installed package's rules
)
Decide = Callable[[Leaf, Any], Rule | None]


def first_match(leaf: Leaf) -> Rule:
    """The built-in rule that decides about a leaf."""
    return next((rule for rule in BUILT_IN if rule.applies(leaf)), UNMATCHED)


def compile_rules(rules: Sequence[RuleLike]) -> list[Decide]:
    """Turns what users may write into functions (leaf, array) -> Rule or None, in order.

    Raises:
        ValueError: for a rule of unknown form, a regular expression that does not compile, or an unknown label.
    """
    if isinstance(rules, str):
        raise ValueError(f"routing: rules = {rules!r}, expected a sequence of rules, such as [(regex, label)].")
    return [_compile(index, item) for index, item in enumerate(rules)]


def _compile(index: int, item: Any) -> Decide:
    where = f"rules[{index}]"
    if isinstance(item, tuple) and not isinstance(item, MuonDimensionNumbers) and len(item) in (2, 3):
        item = Rule(f"user: {item[0]}", item[1], pattern=item[0], view=item[2] if len(item) == 3 else None)
    if isinstance(item, Rule):
        rule = item
        _check_label(rule.label, f"{where} ({rule.name!r})")
        try:
            re.compile(rule.pattern or "")
        except (re.error, TypeError) as error:
            raise ValueError(
                f"routing: {where} has the pattern {rule.pattern!r}, which is no regular expression ({error}). "
                "Expected a Python regular expression to search in paths such as 'layers/0/attention/query/kernel'; "
                "escape special characters with a backslash."
            ) from error
        return lambda leaf, _: rule if rule.applies(leaf) else None
    if callable(item):
        name = f"user: {getattr(item, '__name__', type(item).__name__)}"
        return lambda leaf, value: _result(item(leaf.path, value), name, f"{where} ({name}) for leaf {leaf.path!r}")
    raise ValueError(
        f"routing: {where} is {item!r}. Expected a Rule, a tuple (regex, label) or (regex, label, "
        "MuonDimensionNumbers), or a function (path, leaf) -> label or None; `rules` is a sequence of these, so a "
        "single rule is written rules=[(regex, label)]."
    )


def _result(result: Any, name: str, where: str) -> Rule | None:
    """The rule that a user's function answered with."""
    if result is None:
        return None
    if isinstance(result, Rule):
        rule = result
    elif isinstance(result, tuple) and not isinstance(result, MuonDimensionNumbers) and len(result) == 2:
        label, view = result
        _check_label(label, where)
        rule = Rule(name, label, view=view)
    else:
        _check_label(result, where)
        rule = Rule(name, str(result))
    _check_label(rule.label, where)
    return rule


def _check_label(label: Any, where: str) -> None:
    if label not in LABELS:
        raise ValueError(
            f"routing: {where} gives the label {label!r}. Expected one of {', '.join(map(repr, LABELS))}"
            " (a function may also return None to leave the leaf to the next rule)."
        )


_GAIN_WORDS = frozenset(words("scale scales gamma gain gains g weight"))


def role_of(leaf: Leaf, label: str) -> str:
    """The role of a leaf, out of `ROLES`."""
    if label == "frozen":
        label = first_match(leaf).label
    if label != "vector":
        return "matrix" if label == "hidden" else label
    if leaf.ndim == 0:
        return "scalar"
    if leaf.name_words & BIAS_WORDS:
        return "bias"
    gain = leaf.name_words & _GAIN_WORDS
    return "gain" if gain else "bias" if is_norm(leaf) else "vector"


def resolve_view(rule: Rule, leaf: Leaf) -> MatrixView | None:
    """The view a rule gives a leaf, with non-negative axes in tuples.

    A rule without a view keeps the built-in one, except that a vector has no input axes.

    Raises:
        ValueError: if the view's axes do not fit the leaf.
    """
    if isinstance(rule.view, (MatrixView, MuonDimensionNumbers)):
        view = rule.view
    elif rule.view is not None:
        view = rule.view(leaf)
    elif rule.label == "vector":
        view = vector_view(leaf)
    else:
        return resolve_view(first_match(leaf), leaf)
    return None if view is None else _normalise(view, rule, leaf)


def _normalise(view: Any, rule: Rule, leaf: Leaf) -> MatrixView:
    def fail(problem: str) -> ValueError:
        return ValueError(
            f"routing: rule {rule.name!r} gives leaf {leaf.path!r} of shape {leaf.shape} the view {view!r}, {problem}. "
            "Expected input (reduction_axis) and output axes (output_axis) that are different axes of the leaf, "
            f"each from {-leaf.ndim} to {leaf.ndim - 1}, with at least one output axis; all others are batch axes. "
            "Correct the view, or narrow the rule so that it does not match this leaf."
        )

    def axes(value: Any, side: str) -> tuple[int, ...]:
        listed = (value,) if isinstance(value, int) else tuple(value)
        wrong = [axis for axis in listed if not isinstance(axis, int) or not -leaf.ndim <= axis < leaf.ndim]
        if wrong:
            raise fail(f"whose {side} names {wrong}, no axes of a {leaf.ndim}-d leaf")
        return tuple(axis % leaf.ndim for axis in listed)

    if not isinstance(view, (MatrixView, MuonDimensionNumbers)):
        raise fail("which is not an optax.contrib.MuonDimensionNumbers")
    inputs, outputs = axes(view.reduction_axis, "reduction_axis"), axes(view.output_axis, "output_axis")
    if len({*inputs, *outputs}) < len(inputs) + len(outputs):
        raise fail("which names an axis twice")
    if not outputs:
        raise fail("which has no output axis")
    return MatrixView(leaf.shape, inputs, outputs)
