"""What users write before the built-in table: rules, tuples and functions, and the views that rules give."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from optax.contrib import MuonDimensionNumbers

from celo2_harness.routing.layouts import vector_view
from celo2_harness.routing.leaves import Leaf
from celo2_harness.routing.rules import LABELS, Rule, first_match
from celo2_harness.rule import MatrixView, view_from_axes

RuleLike = (
    Rule
    | tuple[str, str]
    | tuple[str, str, MuonDimensionNumbers | None]
    | Callable[..., Any]  # (path, leaf) -> label, Rule, (label, view) or None
)
Decide = Callable[[Leaf, Any], Rule | None]


def compile_rules(rules: Sequence[RuleLike]) -> list[Decide]:
    """Turns what users may write into functions of a leaf and its array that return a rule or None, in order.

    Raises:
        ValueError: If a rule has an unknown form, a regular expression does not compile, or a label is unknown.
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
        _check_label(result.label, where)
        return result
    pair = isinstance(result, tuple) and not isinstance(result, MuonDimensionNumbers) and len(result) == 2
    label: Any = result[0] if pair else result
    view: Any = result[1] if pair else None
    _check_label(label, where)
    return Rule(name, label, view=view)


def _check_label(label: Any, where: str) -> None:
    if label not in LABELS:
        raise ValueError(
            f"routing: {where} gives the label {label!r}. Expected one of {', '.join(map(repr, LABELS))}"
            " (a function may also return None to leave the leaf to the next rule)."
        )


def resolve_view(rule: Rule, leaf: Leaf) -> MatrixView | None:
    """The view a rule gives a leaf.

    A rule without a view keeps the built-in one, except that a vector has no input axes.

    Raises:
        ValueError: If the view's axes do not fit the leaf.
    """
    view: Any = rule.view
    if view is None:
        return vector_view(leaf) if rule.label == "vector" else resolve_view(first_match(leaf), leaf)
    if not isinstance(view, (MatrixView, MuonDimensionNumbers)):
        view = view(leaf)
    if view is None or (isinstance(view, MatrixView) and view.shape == leaf.shape):
        return view
    if not isinstance(view, MuonDimensionNumbers):
        raise ValueError(
            f"routing: rule {rule.name!r} gives leaf {leaf.path!r} of shape {leaf.shape} the view {view!r}, which is"
            " not an optax.contrib.MuonDimensionNumbers for it."
        )
    name = f"routing: rule {rule.name!r}: leaf {leaf.path!r}"
    try:
        return view_from_axes(leaf.shape, view.reduction_axis, view.output_axis, name=name)
    except ValueError as error:
        raise ValueError(f"{error} Or narrow the rule so that it does not match this leaf.") from None
