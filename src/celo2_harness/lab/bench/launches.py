"""What a compiled program launches on a GPU, read off its text; nothing is run."""

import math
import re
from collections import Counter
from typing import NamedTuple

# Instructions that give a name to memory, or to a place in it, and run nothing.
NOTHING = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all")
)
_CONTROL = ("conditional", "while", "call")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=")
_NAME = re.compile(r"%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Launches(NamedTuple):
    """What one call of a program launches.

    Attributes:
        kernels: The number of launches: fusions, kernels of one's own, library calls, copies. Of a branch the one
            with the most counts, and the body of a loop counts once.
        branches: The number of conditionals and loops, at each of which the host may have to wait for the device.
        bytes: The bytes that the launches read and write, every operand and every result once.
        kinds: The number of launches by kind.
    """

    kernels: int
    branches: int
    bytes: int
    kinds: dict[str, int]


def count_launches(program: str) -> Launches:
    """Counts what a compiled program launches.

    Args:
        program: The text of the program, `compiled.as_text()`.

    Returns:
        The counts.

    Example:
        >>> text = '''
        ... ENTRY %main (x: f32[4]) -> f32[4] {
        ...   %x = f32[4]{0} parameter(0)
        ...   ROOT %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%double
        ... }'''
        >>> count_launches(text)[:3]
        (1, 0, 32)
    """
    computations: dict[str, list[tuple[str, str, str, str, str]]] = {}
    entry = current = ""
    for line in program.splitlines():
        if found := _COMPUTATION.match(line):
            current = found[2]
            computations[current] = []
            entry = current if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, shape, opcode, operands, rest = found.groups()
            computations[current].append((name, shape, opcode, operands, rest))
    known: dict[str, Launches] = {}

    def count(name: str) -> Launches:
        if name not in known:
            known[name] = _count(computations[name], count)
        return known[name]

    return count(entry)


def _count(instructions, count) -> Launches:  # type: ignore[no-untyped-def]
    sizes = {name: _bytes(shape) for name, shape, *_ in instructions}
    kernels = branches = moved = 0
    kinds: Counter[str] = Counter()
    for name, _, opcode, operands, rest in instructions:
        if opcode in NOTHING:
            continue
        if opcode in _CONTROL:
            branches += opcode != "call"
            inside = [count(called) for called in _called(rest)]
            most = max(inside, key=lambda launches: launches.kernels)
            kernels, branches, moved = kernels + most.kernels, branches + most.branches, moved + most.bytes
            kinds.update(most.kinds)
            continue
        kernels += 1
        kinds[_kind(opcode, rest)] += 1
        moved += sizes[name] + sum(sizes.get(operand, 0) for operand in _NAME.findall(operands))
    return Launches(kernels, branches, moved, dict(kinds))


def _kind(opcode: str, rest: str) -> str:
    """The opcode, of custom calls what is called."""
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    return target[1] if target else "triton product" if "__triton" in rest else opcode


def _called(rest: str) -> list[str]:
    names = []
    for found in _CALLED.finditer(rest):
        tail = rest[found.end() :]
        group = re.match(r"\{([^}]*)\}", tail)
        names += _NAME.findall(group[1]) if group else [_NAME.match(tail)[1]]  # type: ignore[index]
    return names


def _bytes(shape: str) -> int:
    total = 0
    for kind, bits, lengths in _ARRAY.findall(shape):
        width = 1 if kind == "pred" else int(bits or 0) // 8
        total += width * math.prod(map(int, filter(None, lengths.split(","))))
    return total
