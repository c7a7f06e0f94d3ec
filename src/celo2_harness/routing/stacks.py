"""Which axes of a leaf count layers of a stack: decided for a whole container, by all its leaves together.

`nn.scan`, `nnx.vmap`, `eqx.filter_vmap` and `hk.layer_stack` give every array of a layer one more axis, of one length,
at one place: the first, or the second (MaxText). So a container is a stack if all its leaves agree in that axis, if
every weight still fits its bias without it, and if at least one leaf cannot be what it is with it: a norm's scale with
two axes, a bias that fits its weight only then, a layer whose class knows better.
"""

import enum
from collections.abc import Iterable, Sequence

from celo2_harness.routing import words as say
from celo2_harness.routing.leaves import Leaf, Node, Shape
from celo2_harness.routing.neighbours import Neighbours
from celo2_harness.routing.words import words


class Vote(enum.Enum):
    """What one leaf says to "this axis counts layers": it must, it may, it never does."""

    MUST = "must"
    MAY = "may"
    NEVER = "never"


def bias_axes(weight: Shape, bias: Shape, out_first: bool, most: int = 3) -> tuple[int, ...] | None:
    """The axes of a weight that are its bias's: its output axes, if the bias has at most `most` axes.

    Example:
        >>> bias_axes((16, 4, 8), (4, 8), False), bias_axes((32, 16, 3, 3), (32, 1, 1), True)
        ((1, 2), (0,))
    """
    while len(bias) > 1 and bias[-1] == 1 and out_first:
        bias = bias[:-1]
    count, ndim = len(bias), len(weight)
    if not 1 <= count <= most or count >= ndim:
        return None
    if out_first and weight[:count] == bias:
        return tuple(range(count))
    if weight[ndim - count :] == bias:
        return tuple(range(ndim - count, ndim))
    # Transposed convolutions: (..., out, in), or PyTorch's (in, out, ...).
    other = 1 if out_first else ndim - 2
    return (other,) if ndim >= 3 and (weight[other],) == bias else None


def usual_bias_ndim(leaf: Leaf) -> int:
    """Returns how many axes the bias of a weight may have in one layer: heads and their size in attention, else one."""
    return 3 if say.is_fused_qkv(leaf.module) else 2 if say.is_qkv(leaf.module) else 1


def attention_order(kernel: Shape, out: Shape) -> str | None:
    """Whether a query, key or value kernel is stored input first ("in") or output first ("out"), by its block's output.

    Their number of heads may differ, so only the model's width and the size of a head count.

    Example:
        >>> attention_order((16, 4, 8), (4, 8, 16)), attention_order((2, 8, 16), (16, 4, 8))
        ('in', 'out')
    """
    if len(kernel) != len(out) or len(kernel) not in (2, 3):
        return None
    if kernel[0] == out[-1] and (len(kernel) == 2 or kernel[2] == out[1]):
        return "in"
    return "out" if kernel[-1] == out[0] and (len(kernel) == 2 or kernel[1] == out[2]) else None


def stack_axes(root: Node, leaves: Sequence[Leaf], near: Neighbours) -> tuple[list[tuple[int, ...]], dict[int, int]]:
    """The stacked axes of every leaf, and the leaves of which nobody can tell.

    Args:
        root: The names of the leaves as a tree.
        leaves: The leaves.
        near: Which of them go together.

    Returns:
        A tuple of axes per leaf; and for leaves whose surroundings may be a stack or none, the axis in question.
    """
    stacks = _Stacks(leaves, near)
    stacks.settle(root, "")
    found = [
        tuple(axis for axis in range(leaf.ndim) if axis not in kept)
        for leaf, kept in zip(leaves, stacks.axes, strict=True)
    ]
    return found, stacks.unclear


class _Stacks:
    """The search: which axes of every leaf are left, after those that count layers."""

    def __init__(self, leaves: Sequence[Leaf], near: Neighbours):
        self.leaves, self.near = leaves, near
        self.axes = [tuple(range(leaf.ndim)) for leaf in leaves]
        self.shapes = [leaf.shape for leaf in leaves]
        self.unclear: dict[int, int] = {}

    def settle(self, node: Node, name: str, inside: bool = False) -> int | None:
        """Decides about a container and what is in it.

        Args:
            node: The container, or an array.
            name: The container's name.
            inside: Whether it lies in a stack already.

        Returns:
            The number of layers, if all of it is one stack along the first axis.
        """
        length = None
        # Names prove little: they count once, and for experts inside of layers.
        named = bool(node.children) and self._named_stack(node, name, inside)
        while (axis := self._stacked_axis(node, named)) is not None:
            leaves = self._wide(node)
            length = self.shapes[leaves[0]][0] if axis == 0 else None
            self._strip(leaves, axis)
            named, inside = False, True
        if not node.children:
            return length
        below = self._wide(node)
        second = bool(below) and self._length(below, 1) is not None
        before = {i: (self.axes[i], self.shapes[i]) for i in below} if second else {}
        for group in self.near.groups[node]:
            while group and self._holds(group, 0):
                self._strip(group, 0)
        lengths = {name: self.settle(child, name, inside) for name, child in node.children.items()}
        self._adopt(node, lengths)
        if any(self._open(i, axes) for i, (axes, _) in before.items()):
            after = {i: (self.axes[i], self.shapes[i]) for i in below}
            self._restore(before)
            if self._holds(below, 1):
                self._strip(below, 1)
            else:
                self._restore(after)
        if all(self.shapes[i] == shape for i, (_, shape) in before.items()) and self._may_hold(below, 1):
            self.unclear.update(dict.fromkeys(below, 1))
        known = set(lengths.values())
        return length or (known.pop() if len(known) == 1 else None)

    def _restore(self, saved: dict[int, tuple[tuple[int, ...], Shape]]) -> None:
        for i, (axes, shape) in saved.items():
            self.axes[i], self.shapes[i] = axes, shape

    def _named_stack(self, node: Node, name: str, inside: bool) -> bool:
        spoken = frozenset(words(name)) & (say.EXPERT if inside else say.STACK)
        return bool(spoken) and not any(child.isdigit() for child in node.children)

    def _wide(self, node: Node) -> list[int]:
        """All leaves of a container but scalars, which say nothing."""
        return [i for i in node.below if self.shapes[i]]

    def _length(self, leaves: Sequence[int], axis: int) -> int | None:
        """The length of an axis, if all leaves have it and agree."""
        first = self.shapes[leaves[0]]
        if len(first) <= axis:
            return None
        same = all(len(self.shapes[i]) > axis and self.shapes[i][axis] == first[axis] for i in leaves)
        return first[axis] if same else None

    def _holds(self, leaves: Sequence[int], axis: int) -> bool:
        if self._length(leaves, axis) is None:
            return False
        votes = {self.vote(i, axis) for i in leaves}
        return Vote.MUST in votes and Vote.NEVER not in votes

    def _may_hold(self, leaves: Sequence[int], axis: int) -> bool:
        """Returns whether all leaves agree in an axis, and none contradicts or proves that it counts layers."""
        apart = {i for i in leaves if i not in self.near.weight}  # a weight and its bias alone are one layer
        return (
            len(apart) > 1
            and max(len(self.shapes[i]) for i in leaves) > 2
            and {self.vote(i, axis) for i in leaves} == {Vote.MAY}
        )

    def _stacked_axis(self, node: Node, named: bool) -> int | None:
        leaves = self._wide(node)
        if not leaves or self._length(leaves, 0) is None:
            return None
        if self._holds(leaves, 0):
            return 1 if self._holds(leaves, 1) and self._square(leaves) else 0
        votes = [self.vote(i, 0) for i in leaves]
        wide = any(len(self.shapes[i]) > 2 for i in leaves)
        if Vote.NEVER in votes or not wide:
            return None
        if named:
            return 0
        # The vectors of a stack of layers, or matrices: nobody can tell.
        if any(len(self.shapes[i]) == 2 for i in leaves):
            self.unclear.update(dict.fromkeys(leaves, 0))
        return None

    def _square(self, leaves: Sequence[int]) -> bool:
        """Whether the first axis is as long as another one in every kernel, and the second in none: (d, layers, d)."""
        shapes = [shape for shape in map(self.shapes.__getitem__, leaves) if len(shape) > 2]
        repeats = lambda axis: [shape.count(shape[axis]) > 1 for shape in shapes]
        return bool(shapes) and all(repeats(0)) and not any(repeats(1))

    def _strip(self, leaves: Iterable[int], axis: int) -> None:
        for i in leaves:
            self.axes[i] = self.axes[i][:axis] + self.axes[i][axis + 1 :]
            self.shapes[i] = self.shapes[i][:axis] + self.shapes[i][axis + 1 :]
            self.unclear.pop(i, None)

    def _adopt(self, node: Node, lengths: dict[str, int | None]) -> None:
        """Kernels beside a stack of as many layers as their first axis is long belong to it; of vectors, who knows."""
        known = {length for length in lengths.values() if length is not None and length > 1}
        for name, child in node.children.items() if known else ():
            leaves = self._wide(child)
            if not leaves or lengths[name] is not None or self._length(leaves, 0) not in known:
                continue
            if any(self.vote(i, 0) is Vote.NEVER for i in leaves):
                continue
            ndims = [len(self.shapes[i]) for i in leaves]
            if max(ndims) < 3:
                self.unclear.update({i: 0 for i in leaves if len(self.shapes[i]) == 2})
            elif max(ndims) == 3 or all(self.leaves[i].in_attention for i in leaves):
                self._strip(leaves, 0)

    def vote(self, i: int, axis: int) -> Vote:
        """Returns what a leaf says, by the best evidence that there is: its class, its bias, its block, its name."""
        leaf, shape = self.leaves[i], self.shapes[i]
        if len(shape) <= axis:
            return Vote.NEVER
        if leaf.layer.batch is not None:
            return Vote.MUST if self.axes[i][axis] in leaf.layer.batch else Vote.NEVER
        if leaf.layer.ndim is not None:
            return Vote.MUST if len(shape) > leaf.layer.ndim else Vote.NEVER
        weight, a, b = self._pair(i)
        if b is not None and a == b:  # a scale and an offset
            return _between(len(shape), 1, 1)
        if b is not None and len(b) < len(a):
            return self._vote_pair(weight, a, b, axis)
        if i in self.near.mate:
            vote = self._vote_block(i, axis)
            if vote is not Vote.MAY:
                return vote
        return _between(*_usual_ndim(leaf, shape))

    def _pair(self, i: int) -> tuple[Leaf, Shape, Shape | None]:
        """The weight that a leaf is, or is the bias of, with its shape and the bias's."""
        weight = self.near.weight.get(i, i)
        bias = self.near.bias.get(weight, self.near.gain.get(weight))
        return self.leaves[weight], self.shapes[weight], None if bias is None else self.shapes[bias]

    def _open(self, i: int, before: tuple[int, ...]) -> bool:
        """Whether stacks along first axes leave a leaf unexplained, as it lies or by a stack along its second."""
        if self.axes[i] != before:
            return self.axes[i][:1] == before[:1]
        weight, a, b = self._pair(i)
        unfit = b is not None and len(b) < len(a) and bias_axes(a, b, weight.is_out_first) is None
        alone = i in self.near.mate and attention_order(*self._block(i)) is None
        return unfit or alone or self.vote(i, 0) is Vote.MAY

    def _vote_pair(self, weight: Leaf, a: Shape, b: Shape, axis: int) -> Vote:
        """A weight must fit its bias, before or after: with the usual number of output axes rather than with more."""
        cut = lambda shape: shape[:axis] + shape[axis + 1 :]
        agree = len(b) > axis and a[axis] == b[axis]
        usual, out_first = usual_bias_ndim(weight), weight.is_out_first
        now = bias_axes(a, b, out_first, usual) is not None
        then = agree and bias_axes(cut(a), cut(b), out_first, usual) is not None
        if now or not then:
            return Vote.MAY if then else Vote.NEVER
        # With more output axes it may fit as it is; for a stack along the second axis that is reason to doubt.
        return Vote.MAY if axis and bias_axes(a, b, out_first) is not None else Vote.MUST

    def _block(self, i: int) -> tuple[Shape, Shape]:
        """The shapes of the query, key or value and of the output kernel of the block that a leaf belongs to."""
        a, b = self.shapes[i], self.shapes[self.near.mate[i]]
        return (b, a) if say.is_out(self.leaves[i].module) else (a, b)

    def _vote_block(self, i: int, axis: int) -> Vote:
        a, b = self._block(i)
        if len(b) <= axis or len(a) <= axis or a[axis] != b[axis]:
            return Vote.NEVER
        cut = lambda shape: shape[:axis] + shape[axis + 1 :]
        now, then = attention_order(a, b), attention_order(cut(a), cut(b))
        return Vote.MAY if bool(now) == bool(then) else Vote.MUST if then else Vote.NEVER


def _between(ndim: int, least: int, most: int) -> Vote:
    return Vote.MUST if ndim > most else Vote.NEVER if ndim - 1 < least else Vote.MAY


def _usual_ndim(leaf: Leaf, shape: Shape) -> tuple[int, int, int]:
    """The number of axes of an array, and how many its name lets expect in one layer: at least, at most."""
    ndim, name = len(shape), leaf.module
    if leaf.is_norm:
        # Haiku keeps a batch norm's scale as (1, 1, 1, d).
        per_head = frozenset(words(leaf.owner)) | leaf.name_words
        return ndim if ndim < 3 else sum(n != 1 for n in shape), 1, 2 if per_head & (say.QKV | {"qk"}) else 1
    if leaf.is_conv and leaf.is_weight:
        spatial = conv_rank(leaf)
        if spatial:
            return ndim, spatial + 2, spatial + 2
        return ndim, ndim if ndim > 3 and shape[0] == shape[1] and not leaf.is_out_first else 3, 5
    if "einsum" in words(name):
        return ndim, 3, 4
    if say.is_fused_qkv(name, leaf.in_attention):
        return ndim, 2, 4
    if (say.is_qkv(name) or (leaf.in_attention and say.is_out(name))) and ndim > 1:
        return ndim, 2, 4 if shape[:2] == (1, 1) or shape[-2:] == (1, 1) else 3
    if say.says_embedding(leaf.name) or (leaf.name_words & {"embedding", "embeddings"}):
        return ndim, 2, 3
    if leaf.is_weight or "lora" in leaf.name.lower():
        return ndim, 1 if leaf.is_out_first else 2, 9
    return ndim, 1 if leaf.name_words & say.BIAS and leaf.name not in ("b", "B") else 0, 99


def conv_rank(leaf: Leaf) -> int | None:
    """The number of spatial axes that a name tells: "conv2d"."""
    joined = "".join(part.lower().replace("_", "") for part in (leaf.owner, leaf.name))
    return next((rank for rank in (1, 2, 3) if f"conv{rank}d" in joined), None)
