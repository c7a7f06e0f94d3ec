"""Which axes of one layer's weight are inputs and outputs: an ordered table, the first row that knows decides.

Axes not named are a batch: query, key and value of a fused kernel, experts, heads where the caller asked for them.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from celo2_harness.routing import words as say
from celo2_harness.routing.leaves import Leaf, Shape, size
from celo2_harness.routing.stacks import attention_order, bias_axes, conv_rank, usual_bias_ndim
from celo2_harness.routing.words import words
from celo2_harness.rule import MatrixView

# Convolution windows are small and mostly square; only used where neither names nor a bias tell.
_LARGEST_WINDOW = 11


class Axes(NamedTuple):
    """Input and output axes, counted in one layer."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Layout(NamedTuple):
    """A row of the layout table: its name in reports, and the axes it finds.

    A row returns None where it does not apply, and `UNCLEAR` where nobody can tell.
    """

    name: str
    axes: Callable[[Leaf], Axes | None]


UNCLEAR = Axes((), ())


def _axes(inputs: Iterable[int], outputs: Iterable[int]) -> Axes:
    return Axes(tuple(inputs), tuple(outputs))


def _all_but(leaf: Leaf, outputs: tuple[int, ...]) -> Axes:
    return _axes((axis for axis in range(leaf.rank) if axis not in outputs), outputs)


def axes_from_bias(leaf: Leaf) -> Axes | None:
    """Reads the axes of a weight from its bias, whose axes are the weight's output axes.

    (d, heads, dim) has the bias (heads, dim); (heads, dim, d) has (d,); a convolution (H, W, I, O) has (O,); Equinox's
    (O, I, H, W) has (O, 1, 1). A transposed convolution (H, W, O, I) has (O,) too. The gain of a weight-normed kernel
    says as much.
    """
    if leaf.bias is None or leaf.rank < 2 or leaf.bias == leaf.body:
        return None
    out_first = leaf.is_out_first or (leaf.direction and leaf.bias[-1:] == (1,))
    found = bias_axes(leaf.body, leaf.bias, out_first) or bias_axes(leaf.body, leaf.bias, not out_first)
    return None if found is None else _all_but(leaf, found)


def last_two(leaf: Leaf) -> Axes:
    """The last two axes as (in, out), or (out, in) for an out-first weight; all others are batch axes."""
    return _pair(leaf, (leaf.rank - 2, leaf.rank - 1))


def _pair(leaf: Leaf, axes: tuple[int, ...]) -> Axes:
    first, second = axes
    return Axes((second,), (first,)) if leaf.is_out_first else Axes((first,), (second,))


def _heads_apart(leaf: Leaf, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Axes:
    """Moves the heads, the first of two input or output axes, to the batch axes where the caller asked for it."""
    if leaf.per_head:
        inputs = inputs[1:] if len(inputs) == 2 else inputs
        outputs = outputs[1:] if len(outputs) == 2 else outputs
    return Axes(inputs, outputs)


def _named(leaf: Leaf) -> Axes | None:
    if not (leaf.layer.inputs and leaf.layer.outputs):
        return None
    place = {axis: i for i, axis in enumerate(leaf.body_axes)}
    inputs, outputs = (tuple(place[axis] for axis in axes) for axes in (leaf.layer.inputs, leaf.layer.outputs))
    return _heads_apart(leaf, inputs, outputs)


def _adapter(leaf: Leaf) -> Axes | None:
    return last_two(leaf) if leaf.adapter and leaf.rank >= 2 else None


def _class_conv(leaf: Leaf) -> Axes | None:
    return conv_axes(leaf) if leaf.layer.kind == "conv" and leaf.rank >= 3 else None


def _fused(leaf: Leaf) -> Axes | None:
    if leaf.rank < 2 or not say.is_fused_qkv(leaf.module, leaf.in_attention):
        return None
    if "einsum" in words(leaf.module) and leaf.rank >= 3:
        return _einsum_axes(leaf)
    if leaf.rank == 2:
        return axes_from_bias(leaf) or last_two(leaf)
    if leaf.bias is not None and len(leaf.bias) == 1:  # a convolution, or (d, 3 heads dim) with more inputs
        return axes_from_bias(leaf)
    if is_window(leaf):
        return None
    three = next((axis for axis in range(leaf.rank) if leaf.body[axis] == 3), None)
    rest = tuple(axis for axis in range(leaf.rank) if axis != three)
    if three is None:
        return _fused_without_three(leaf)
    return _pair(leaf, rest) if len(rest) == 2 else _heads_apart(leaf, rest[:1], rest[1:])


def _fused_without_three(leaf: Leaf) -> Axes:
    """(L, d, 3 d) without a sign of the stack, or (d, heads, 3 dim): the sizes tell, or nobody does."""
    if leaf.rank != 3:
        return UNCLEAR
    first, second, third = leaf.body
    stacked, heads = 3 * min(second, third) == max(second, third), second * third == 3 * first
    return UNCLEAR if stacked == heads else last_two(leaf) if stacked else Axes((0,), (1, 2))


def _einsum_axes(leaf: Leaf) -> Axes:
    return _heads_apart(leaf, (leaf.rank - 2,), (leaf.rank - 3, leaf.rank - 1))


def _einsum(leaf: Leaf) -> Axes | None:
    return _einsum_axes(leaf) if say.is_qkv(leaf.module) and "einsum" in words(leaf.module) and leaf.rank >= 3 else None


def _attention(leaf: Leaf) -> Axes | None:
    outputs = 0 if leaf.bias is None else len(leaf.bias)
    if leaf.rank != 3 or not say.is_qkv(leaf.module) or leaf.is_conv or leaf.direction or outputs == 1:
        return None
    if outputs and leaf.unclear is None:
        return axes_from_bias(leaf)
    order = _order(leaf)
    return UNCLEAR if order is None else _heads_apart(leaf, *(((0,), (1, 2)) if order == "in" else ((2,), (0, 1))))


def _attention_out(leaf: Leaf) -> Axes | None:
    outputs = 0 if leaf.bias is None else len(leaf.bias)
    if leaf.rank != 3 or not (say.is_out(leaf.module) and leaf.in_attention) or leaf.is_conv or outputs > 1:
        return None
    order = "in" if outputs and not leaf.is_out_first else _order(leaf)
    return UNCLEAR if order is None else _heads_apart(leaf, *(((0, 1), (2,)) if order == "in" else ((1, 2), (0,))))


def _order(leaf: Leaf) -> str | None:
    """Whether an attention kernel is stored input first or output first, by the block's other side, then its name."""
    if leaf.mate is not None:
        out = say.is_out(leaf.module)
        order = attention_order(leaf.mate, leaf.body) if out else attention_order(leaf.body, leaf.mate)
        if order is not None:
            return order
    return None if leaf.is_out_first or leaf.unclear is not None else "in"


def _expert(leaf: Leaf) -> Axes | None:
    named = any(frozenset(words(part)) & say.EXPERT for part in leaf.names)
    return last_two(leaf) if named and leaf.rank >= 3 and not leaf.is_conv else None


def _conv(leaf: Leaf) -> Axes | None:
    return _clear_conv_axes(leaf) if leaf.is_conv and leaf.rank >= 3 else None


def _clear_conv_axes(leaf: Leaf) -> Axes:
    return UNCLEAR if _may_be_transposed(leaf) else conv_axes(leaf)


def _may_be_transposed(leaf: Leaf) -> bool:
    """Returns whether a convolution may be a transposed one by its name alone: inputs and outputs cannot be told apart.

    Flax keeps (..., in, out) or (..., out, in), as the layer was asked to; PyTorch and Equinox differ likewise.
    """
    if leaf.layer.kind or say.is_haiku_transposed(leaf.owner, leaf.name):
        return False
    above = [name for name in leaf.names[:-1] if not say.STACK.issuperset(words(name))]
    named = say.says_transposed(leaf.name) or bool(above) and say.says_transposed(above[-1])
    return named and (_is_square(leaf) or axes_from_bias(leaf) is None)


def _is_square(leaf: Leaf) -> bool:
    """Returns whether a convolution has as many input channels as output channels."""
    channels = leaf.body[:2] if leaf.is_out_first else leaf.body[-2:]
    return channels[0] == channels[1]


def conv_axes(leaf: Leaf) -> Axes:
    """A convolution as one matrix (spatial x in, out)."""
    # Haiku stores transposed convolutions (H, W, out, in); flax does so only on request.
    transposed = leaf.layer.transposed or say.is_haiku_transposed(leaf.owner, leaf.name)
    found = axes_from_bias(leaf)
    if found is not None and not (transposed and _is_square(leaf)):
        return found
    start = leaf.rank - 2 - (conv_rank(leaf) or leaf.rank - 2)
    body = tuple(range(max(start, 0), leaf.rank))
    if leaf.is_out_first:
        return Axes(body[1:], body[:1])
    if transposed:
        return Axes((*body[:-2], body[-1]), (body[-2],))
    return Axes(body[:-1], body[-1:])


def _biased(leaf: Leaf) -> Axes | None:
    if leaf.rank < 3 or leaf.bias is None or leaf.bias == leaf.body:
        return None
    found = axes_from_bias(leaf)
    if found is None:  # a weight that does not fit its own bias
        return UNCLEAR
    if len(leaf.bias) == 1 and _may_be_transposed(leaf):
        return UNCLEAR
    unusual = len(leaf.bias) > usual_bias_ndim(leaf) and leaf.unclear is not None
    return UNCLEAR if unusual else found


def _dense(leaf: Leaf) -> Axes | None:
    if leaf.rank != 2 or not leaf.is_weight:
        return None
    return UNCLEAR if leaf.unclear is not None and leaf.is_out_first else axes_from_bias(leaf) or last_two(leaf)


def _matrix(leaf: Leaf) -> Axes | None:
    if leaf.rank != 2:
        return None
    return UNCLEAR if leaf.unclear is not None else last_two(leaf)


def is_window(leaf: Leaf) -> bool:
    """Whether a 4-d or 5-d kernel has a small square window, as in (3, 3, in, out) or PyTorch's (out, in, 3, 3)."""
    window = leaf.body[2:] if leaf.is_out_first else leaf.body[: leaf.rank - 2]
    return leaf.rank in (4, 5) and len(set(window)) == 1 and 1 <= window[0] <= _LARGEST_WINDOW


def _window(leaf: Leaf) -> Axes | None:
    return _clear_conv_axes(leaf) if leaf.is_weight and leaf.unclear is None and is_window(leaf) else None


def _batch_of_kernels(leaf: Leaf) -> Axes | None:
    if leaf.rank != 3 or not (leaf.is_weight or "einsum" in words(leaf.name)):
        return None
    return UNCLEAR if leaf.unclear == 1 else last_two(leaf)


LAYOUTS: tuple[Layout, ...] = (
    Layout("axes by their names", _named),
    Layout("low-rank adapter (LoRA)", _adapter),
    Layout("convolution kernel, by its class", _class_conv),
    Layout("fused query-key-value kernel", _fused),
    Layout("attention kernel (heads, d, dim)", _einsum),
    Layout("attention kernel (d, heads, dim)", _attention),
    Layout("attention output kernel (heads, dim, d)", _attention_out),
    Layout("expert stack", _expert),
    Layout("convolution kernel", _conv),
    Layout("kernel, axes read from its bias", _biased),
    Layout("dense kernel", _dense),
    Layout("matrix, by its shape alone", _matrix),
    Layout("convolution kernel, by its shape alone", _window),
    Layout("3-d kernel, first axis taken as a batch", _batch_of_kernels),
)


@functools.lru_cache(maxsize=8)  # by identity: label, role and view of a leaf ask in turn
def find_layout(leaf: Leaf) -> tuple[str, Axes] | None:
    """Name and axes of the first layout that knows; None if none does or nobody can tell."""
    for name, axes in LAYOUTS:
        found = axes(leaf)
        if found is not None:
            return None if found is UNCLEAR else (name, found)
    return None


def in_leaf(leaf: Leaf, axes: Axes) -> MatrixView:
    """The view of the whole leaf: stacked axes are batch axes."""
    place = lambda some: tuple(leaf.body_axes[axis] for axis in some)
    return MatrixView(leaf.shape, place(axes.inputs), place(axes.outputs))


def any_view(leaf: Leaf) -> MatrixView | None:
    """A view for any leaf: its layout's, else the last two axes; None for plain vectors."""
    if leaf.rank < 2:
        return vector_view(leaf)
    found = find_layout(leaf)
    return in_leaf(leaf, last_two(leaf) if found is None else found[1])


def table_view(leaf: Leaf) -> MatrixView:
    """An embedding table: a matrix of its last two axes, whichever of them counts the entries."""
    if leaf.rank > 2 and (leaf.is_conv or leaf.rank > 3):
        return in_leaf(leaf, conv_axes(leaf))
    return in_leaf(leaf, Axes((leaf.rank - 2,), (leaf.rank - 1,)))


def vector_view(leaf: Leaf) -> MatrixView | None:
    """A batch of vectors (no input axes); None for a single scalar or plain vector.

    The bias of a (d, heads, dim) kernel is one vector (heads, dim); a vector without a weight counts along its last
    axis that is longer than one, so that Haiku's (1, 1, 1, d) and Equinox's (d, 1, 1) are one vector too.
    """
    if not leaf.stack and leaf.ndim < 2:
        return None
    start = 0 if leaf.weight is not None else vector_batch(leaf.body)
    return in_leaf(leaf, Axes((), tuple(range(start, leaf.rank))))


def vector_batch(shape: Shape) -> int:
    """Returns how many leading axes of a vector are a batch, by its shape alone; axes of length one are padding.

    Example:
        >>> vector_batch((16,)), vector_batch((12, 16)), vector_batch((1, 1, 1, 16)), vector_batch((12, 8, 1, 1))
        (0, 1, 0, 1)
    """
    wide = [axis for axis, length in enumerate(shape) if length != 1]
    return wide[-2] + 1 if len(wide) > 1 else 0


def is_depthwise(leaf: Leaf) -> bool:
    """Returns whether a leaf is a convolution with one input channel per group.

    A convolution on grey images looks the same and is treated the same.
    """
    found = find_layout(leaf)
    if found is None or leaf.rank < 3 or (leaf.in_attention and not leaf.is_conv):
        return False
    inputs = found[1].inputs
    channel = inputs[0] if leaf.is_out_first or 0 in found[1].outputs else inputs[-1]
    return len(inputs) > 1 and leaf.body[channel] == 1


def is_single(leaf: Leaf) -> bool:
    """Returns whether the view of a leaf has one row or one column: [1, N] and [N, 1] have nothing to orthogonalise."""
    found = find_layout(leaf)
    return found is not None and 1 in (size(leaf.body, found[1].inputs), size(leaf.body, found[1].outputs))
