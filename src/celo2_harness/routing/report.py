"""The printed table of a routing: one line a leaf, totals per label and overall."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from celo2_harness.routing.leaves import size
from celo2_harness.routing.routes import Route
from celo2_harness.routing.rules import LABELS
from celo2_harness.rule import MatrixView

_NUMBERS = frozenset({"lr x", "decay", "parameters", "state bytes", "leaves"})


class ReportRow(NamedTuple):
    """One leaf of the report: its route, and what the optimizer does with it.

    Attributes:
        route: Path, shape, view, label and rule.
        optimizer: Name of the optimizer, "celo2" or "adamw".
        learning_rate_factor: The learning rate of the group as a multiple of the base learning rate.
        weight_decay: The weight decay of the group.
        parameters: Number of entries of the leaf.
        state_bytes: Bytes of optimizer state kept for it.
    """

    route: Route
    optimizer: str
    learning_rate_factor: Any
    weight_decay: Any
    parameters: int
    state_bytes: int


def format_view(view: MatrixView | None) -> str:
    """A view in sizes: batch x (inputs -> outputs), with the product where several axes are flattened together.

    Example:
        >>> format_view(MatrixView((3, 3, 4, 6), (0, 1, 2), (3,)))
        '3*3*4 -> 6'
        >>> format_view(MatrixView((12, 64, 64), (1,), (2,)))
        '12 x (64 -> 64)'
        >>> format_view(MatrixView((12, 64), (), (1,)))
        '12 x (64)'
    """
    if view is None:
        return "-"

    def sizes(axes: Sequence[int]) -> str:
        return "*".join(str(view.shape[axis]) for axis in axes)

    outputs = sizes(view.output_axis)
    matrix = f"{sizes(view.reduction_axis)} -> {outputs}" if view.is_matrix else f"({outputs})"
    if not view.batch_axis:
        return matrix
    matrices = size(view.shape, view.batch_axis)
    return f"{matrices} x ({matrix})" if view.is_matrix else f"{matrices} x {matrix}"


def format_report(rows: Sequence[ReportRow], note: str = "") -> str:
    """An aligned plain-text table of all leaves, with totals per label and overall.

    Args:
        rows: One row per leaf, in the order to print.
        note: A line between the leaves and the totals.

    Returns:
        The table. Leaves that no rule matched show "no rule matched" and are counted in the last line.

    Example:
        >>> import jax.numpy as jnp
        >>> from celo2_harness.routing import route
        >>> kernel = route({"fc": {"kernel": jnp.zeros((8, 32))}})["fc"]["kernel"]
        >>> print(format_report([ReportRow(kernel, "celo2", 1.0, 0.1, 256, 5120)]))
        path       shape    view     label   optimizer  lr x  decay  parameters  state bytes  rule
        ---------  -------  -------  ------  ---------  ----  -----  ----------  -----------  ------------
        fc/kernel  (8, 32)  8 -> 32  hidden  celo2         1    0.1         256        5,120  dense kernel
        <BLANKLINE>
        label   leaves  parameters  state bytes
        ------  ------  ----------  -----------
        hidden       1         256        5,120
        total        1         256        5,120
    """
    header = ("path", "shape", "view", "label", "optimizer", "lr x", "decay", "parameters", "state bytes", "rule")
    table = [_cells(row) for row in rows]
    groups = [(label, [row for row in rows if row.route.label == label]) for label in LABELS]
    totals = [_total(label, group) for label, group in groups if group]
    lines = [
        *_aligned(header, table),
        "",
        *([note, ""] if note else []),
        *_aligned(("label", "leaves", "parameters", "state bytes"), [*totals, _total("total", rows)]),
    ]
    unmatched = sum(not row.route.rule for row in rows)
    if unmatched:
        lines += ["", f"no rule matched {unmatched} of {len(rows)} leaves; they are labelled 'other'."]
    return "\n".join(lines)


def _cells(row: ReportRow) -> tuple[str, ...]:
    found = row.route
    return (
        found.path or "(the tree itself)",
        str(found.shape),
        format_view(found.view),
        found.label,
        row.optimizer,
        _number(row.learning_rate_factor),
        _number(row.weight_decay),
        f"{row.parameters:,}",
        f"{row.state_bytes:,}",
        found.rule or "no rule matched",
    )


def _number(x: Any) -> str:
    return "schedule" if callable(x) else f"{float(x):g}"


def _total(name: str, rows: Sequence[ReportRow]) -> tuple[str, ...]:
    parameters = sum(row.parameters for row in rows)
    state_bytes = sum(row.state_bytes for row in rows)
    return name, str(len(rows)), f"{parameters:,}", f"{state_bytes:,}"


def _aligned(header: tuple[str, ...], table: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with columns padded to equal width, numbers to the right."""
    widths = [max(len(line[column]) for line in [header, *table]) for column in range(len(header))]

    def line(cells: tuple[str, ...]) -> str:
        padded = [
            cell.rjust(width) if title in _NUMBERS else cell.ljust(width)
            for title, cell, width in zip(header, cells, widths, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, table)]
