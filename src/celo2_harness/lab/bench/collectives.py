"""What a compiled program sends between devices, read from its text."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: Out of `KINDS`.
        operand_bytes: What one device puts in.
        largest_operand: The entries of its largest array.
    """

    kind: str
    operand_bytes: int
    largest_operand: int


def find_collectives(program: str) -> list[Collective]:
    """Finds the collectives of a compiled program, those of every branch and of a loop's body once.

    Args:
        program: `compiled.as_text()`.

    Returns:
        The collectives, in the order of the text.

    >>> text = '''
    ... %x = f32[4,2]{1,0} parameter(0)
    ... ROOT %y = f32[8,2]{1,0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}
    ... '''
    >>> find_collectives(text)
    [Collective(kind='all-gather', operand_bytes=32, largest_operand=8)]
    """
    instructions = _INSTRUCTION.findall(program)
    shapes = {name: shape for name, shape, _, _ in instructions}
    found = []
    for _, _, operation, rest in instructions:
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            arguments = rest.partition(")")[0]
            arrays = [array for name in re.findall(r"%([\w.\-]+)", arguments) for array in _arrays(shapes[name])]
            found.append(Collective(kind, sum(n * size for n, size in arrays), max(n for n, _ in arrays)))
    return found


def _arrays(shape: str) -> list[tuple[int, int]]:
    """Entries and bytes per entry of every array of a shape in HLO's notation."""
    return [
        (math.prod(int(n) for n in lengths.split(",") if n), max(1, int(bits or 8) // 8))
        for _, bits, lengths in _ARRAY.findall(shape)
    ]
