"""Between the accumulators of one leaf and one tree per accumulator, which is how states keep them."""

from typing import Any

import optax

from celo2_harness.rule import Moments, RuleConfig

# Of a leaf that keeps nothing.
NOTHING = Moments(mu=None, nu=None, row=None, col=None, diag=None)  # type: ignore[arg-type]


def pack_moments(treedef: Any, moments: list[Moments], config: RuleConfig) -> dict[str, Any]:
    """Moments per leaf -> by field of `Moments` one tree, or one per decay; `MaskedNode` where a leaf lacks it."""

    def tree(values: list[Any]) -> Any:
        return treedef.unflatten([optax.MaskedNode() if value is None else value for value in values])

    def trees(fields: list[Any], count: int) -> tuple[Any, ...]:
        return tuple(tree([None if field is None else field[k] for field in fields]) for k in range(count))

    factored = len(config.factored_decays)
    return {
        "mu": trees([m.mu for m in moments], len(config.momentum_decays)),
        "nu": tree([m.nu for m in moments]),
        "row": trees([m.row for m in moments], factored),
        "col": trees([m.col for m in moments], factored),
        "diag": trees([m.diag for m in moments], factored),
    }


def unpack_moments(treedef: Any, state: Any) -> list[Moments]:
    """The inverse of `pack_moments`, from a state with fields of these names."""

    def per_leaf(trees: tuple[Any, ...]) -> list[Any]:
        per_decay = zip(*[treedef.flatten_up_to(tree) for tree in trees], strict=True)
        return [None if isinstance(values[0], optax.MaskedNode) else values for values in per_decay]

    mu, row, col, diag = map(per_leaf, (state.mu, state.row, state.col, state.diag))
    return [Moments(*fields) for fields in zip(mu, treedef.flatten_up_to(state.nu), row, col, diag, strict=True)]
