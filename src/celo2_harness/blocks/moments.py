"""Between the accumulators of one leaf and one tree per accumulator, which is how states keep them."""

from typing import Any

import optax

from celo2_harness._trees import bare_structure
from celo2_harness.rule import Moments, RuleConfig

# Of a leaf that keeps nothing.
NOTHING = Moments(mu=None, nu=None, row=None, col=None, diag=None)  # type: ignore[arg-type]


def pack_moments(treedef: Any, moments: list[Moments], config: RuleConfig) -> dict[str, Any]:
    """Moments per leaf -> by field of `Moments` one tree, or one per decay; `MaskedNode` where a leaf lacks it.

    Row, column and diagonal moments have other axes than the leaf, so they carry no metadata of other libraries.
    """

    def tree(values: list[Any], treedef: Any = treedef) -> Any:
        return treedef.unflatten([optax.MaskedNode() if value is None else value for value in values])

    def trees(fields: list[Any], count: int, treedef: Any = treedef) -> tuple[Any, ...]:
        return tuple(tree([None if field is None else field[k] for field in fields], treedef) for k in range(count))

    factored, bare = len(config.factored_decays), bare_structure(treedef)
    return {
        "mu": trees([m.mu for m in moments], len(config.momentum_decays)),
        "nu": tree([m.nu for m in moments]),
        "row": trees([m.row for m in moments], factored, bare),
        "col": trees([m.col for m in moments], factored, bare),
        "diag": trees([m.diag for m in moments], factored, bare),
    }


def unpack_moments(treedef: Any, state: Any) -> list[Moments]:
    """The inverse of `pack_moments`, from a state with fields of these names."""

    bare = bare_structure(treedef)

    def per_leaf(trees: tuple[Any, ...], treedef: Any) -> list[Any]:
        per_decay = zip(*[treedef.flatten_up_to(tree) for tree in trees], strict=True)
        return [None if isinstance(values[0], optax.MaskedNode) else values for values in per_decay]

    mu = per_leaf(state.mu, treedef)
    row, col, diag = (per_leaf(trees, bare) for trees in (state.row, state.col, state.diag))
    return [Moments(*fields) for fields in zip(mu, treedef.flatten_up_to(state.nu), row, col, diag, strict=True)]
