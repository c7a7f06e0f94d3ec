"""Label and view of every leaf of a parameter tree."""

import collections
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

from celo2_harness._types import PyTree
from celo2_harness.routing.leaves import Leaf
from celo2_harness.routing.reading import leaves_of
from celo2_harness.routing.rules import first_match, role_of
from celo2_harness.routing.user_rules import Decide, RuleLike, compile_rules, resolve_view
from celo2_harness.rule import MatrixView


@dataclasses.dataclass(frozen=True)
class Route:
    """The place of one leaf in an optimizer, and the rule that decided.

    A route is a leaf of a tree, not a node.

    Attributes:
        path: Plain names joined by "/": "layers/0/attention/query/kernel".
        shape: The leaf's shape.
        dtype: The leaf's dtype; None for a Python number.
        label: One of `LABELS`.
        role: One of `ROLES`, finer than the label: a vector is a "gain", a "bias", a "scalar" or just a "vector".
        view: The matrices that the leaf is seen as; without input axes a batch of vectors. None for a scalar or a plain
            vector.
        rule: Name of the rule that decided; "" where none matched.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    label: str
    role: str
    view: MatrixView | None
    rule: str


def route(params: PyTree, rules: Sequence[RuleLike] = (), *, strict: bool = False, per_head: bool = False) -> PyTree:
    """Decides for every leaf its label, its matrix view and the rule behind them.

    The user's rules come first, then the built-in table; the first that matches decides. Only names, shapes and
    the neighbouring leaves are read, never values, so this works on tracers and on `jax.eval_shape` results. Route
    whole trees: in a masked tree a kernel may have lost the bias that tells its layout.

    Args:
        params: A tree of parameters: dict, flax nnx State, linen FrozenDict, Haiku params, Equinox module.
        rules: `Rule`s, tuples (regex, label) or (regex, label, view), or functions (path, leaf) -> label or None.
        strict: Refuse trees with leaves that no rule matched.
        per_head: Treat each head of a (d, heads, dim) or (heads, dim, d) attention kernel as a matrix of its own.

    Returns:
        A tree of the structure of `params` with a `Route` for every leaf.

    Raises:
        ValueError: If a rule cannot be read, a label is unknown, a view does not fit its leaf, a leaf is no array,
            or, in strict mode, no rule matched a leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"conv": {"kernel": jnp.zeros((3, 3, 4, 6)), "bias": jnp.zeros(6)}}
        >>> found = route(params)["conv"]["kernel"]
        >>> found.label, found.view.reduction_axis, found.view.output_axis, found.rule
        ('hidden', (0, 1, 2), (3,), 'convolution kernel')

    References:
        The view is the `weight_dimension_numbers` of `optax.contrib.muon`.
    """
    decide = compile_rules(rules)
    leaves, structure = leaves_of(params, per_head)
    routes = [_route(leaf, value, decide) for leaf, value in zip(leaves, jax.tree.leaves(params), strict=True)]
    unmatched = [found for found in routes if not found.rule]
    if strict and unmatched:
        listed = "\n".join(f"  {found.path!r} of shape {found.shape}" for found in unmatched)
        raise ValueError(
            f"routing: no rule matched {len(unmatched)} of {len(routes)} leaves:\n{listed}\n"
            "Strict mode expects a rule for every leaf. Add rules such as "
            f"rules=[({unmatched[0].path!r}, 'hidden')] with the label you mean, or pass strict=False to send these "
            "leaves to 'other'."
        )
    return structure.unflatten(routes)


def _route(leaf: Leaf, value: Any, decide: Sequence[Decide]) -> Route:
    rule = next((rule for rule in (choose(leaf, value) for choose in decide) if rule is not None), None)
    if rule is None:
        rule = first_match(leaf)
    view = resolve_view(rule, leaf)
    return Route(leaf.path, leaf.shape, leaf.dtype, rule.label, role_of(leaf, rule.label), view, rule.name)


def label_params(
    params: PyTree, rules: Sequence[RuleLike] = (), *, strict: bool = False, per_head: bool = False
) -> PyTree:
    """The label of every leaf, as `optax.partition` takes it.

    Labels: "hidden" (matrices for the learned rule), "embedding", "head", "vector" (also stacked biases and scales),
    "other" (depthwise convolutions, single rows and columns, whatever no rule matched) and "frozen" (only by a user's
    rule).

    Args:
        params: A tree of parameters, see `route`.
        rules: The user's rules, see `route`.
        strict: Refuse trees with leaves that no rule matched.
        per_head: See `route`; it changes views, not labels.

    Returns:
        A tree of the structure of `params` with a string for every leaf.

    Raises:
        ValueError: As `route` does.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"wte": jnp.zeros((50, 8)), "fc": {"w": jnp.zeros((8, 32)), "b": jnp.zeros(32)}}
        >>> label_params(params)
        {'fc': {'b': 'vector', 'w': 'hidden'}, 'wte': 'embedding'}
        >>> label_params(params, rules=[("wte", "frozen")])["wte"]
        'frozen'
    """
    routes = route(params, rules, strict=strict, per_head=per_head)
    return jax.tree.map(lambda found: found.label, routes)


def warn_if_nothing_hidden(routes: PyTree, name: str, optimizer: str) -> None:
    """Warns if not one leaf that is trained is a hidden matrix, as after `optax.flatten`.

    Args:
        routes: A tree of routes.
        name: The name of the optimizer, for the message.
        optimizer: The optimizer of all leaves that are not hidden.
    """
    labels = collections.Counter(found.label for found in jax.tree.leaves(routes) if found.label != "frozen")
    if labels and not labels["hidden"]:
        counted = ", ".join(f"{number} x {label}" for label, number in labels.items())
        warnings.warn(
            f"{name}: no leaf is a hidden matrix, so {optimizer} trains all there is: {counted}. Print"
            " celo2_harness.describe(params). If matrices are missing, give the tree as the model has it (optax.flatten"
            " makes one vector of it), or rules=[(regex, 'hidden')].",
            stacklevel=2,
        )


def view_params(
    params: PyTree, rules: Sequence[RuleLike] = (), *, strict: bool = False, per_head: bool = False
) -> PyTree:
    """The matrix view of every leaf in Optax's type, as `optax.contrib.muon` and the blocks take it.

    Args:
        params: A tree of parameters, see `route`.
        rules: The user's rules, see `route`.
        strict: Refuse trees with leaves that no rule matched.
        per_head: Treat each attention head as a matrix of its own.

    Returns:
        A tree of the structure of `params` with a `optax.contrib.MuonDimensionNumbers` for every leaf, or None for
        scalars and plain vectors.

    Raises:
        ValueError: As `route` does.

    Example:
        >>> import jax.numpy as jnp
        >>> view_params({"query": {"kernel": jnp.zeros((16, 4, 8))}}, per_head=True)["query"]["kernel"]
        MuonDimensionNumbers(reduction_axis=(0,), output_axis=(2,))
    """
    routes = route(params, rules, strict=strict, per_head=per_head)

    def numbers(found: Route) -> MuonDimensionNumbers | None:
        view = found.view
        # Optax has no numbers for a batch of scalars.
        return MuonDimensionNumbers(view.reduction_axis, view.output_axis) if view and view.output_axis else None

    return jax.tree.map(numbers, routes)
