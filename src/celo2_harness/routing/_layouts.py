"""Which axes of a weight are inputs, outputs and batch: an ordered table, the first row that fits decides."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from optax.contrib import MuonDimensionNumbers

from celo2_harness.routing._leaves import Leaf, Shape, size, vector_batch, words

_QKV = frozenset(words("q k v query key value queries keys values wq wk wv kv"))
_FUSED = frozenset(words("qkv wqkv cattn"))
_OUT = frozenset(words("out o output wo vec proj projection"))
_ATTENTION = frozenset(words("attn attention mha msa mhsa"))
# Words that say nothing about which projection of an attention block a name means.
_FILLER = frozenset(words("w weight kernel to linear dense c attn attention self cross einsum"))
_PROJECTION = frozenset({"proj", "projection"})
# Convolution windows are small and mostly square; only used where neither names nor a bias tell.
_LARGEST_WINDOW = 11


class Layout(NamedTuple):
    """A row of the layout table: its name in reports, when it applies, and the view it gives."""

    name: str
    applies: Callable[[Leaf], bool]
    view: Callable[[Leaf], MuonDimensionNumbers]


def make_view(inputs: Iterable[int], outputs: Iterable[int]) -> MuonDimensionNumbers:
    """A matrix view from input axes and output axes; all other axes are batch axes."""
    return MuonDimensionNumbers(reduction_axis=tuple(inputs), output_axis=tuple(outputs))


def batch_axes(shape: Shape, view: MuonDimensionNumbers) -> tuple[int, ...]:
    """The axes that a (normalised) view names neither as input nor as output.

    Example:
        >>> batch_axes((12, 64, 64), MuonDimensionNumbers((1,), (2,)))
        (0,)
    """
    named = {*view.reduction_axis, *view.output_axis}  # pyright: ignore[reportGeneralTypeIssues]
    return tuple(axis for axis in range(len(shape)) if axis not in named)


def is_out_first(leaf: Leaf) -> bool:
    """Whether a weight is stored (out, in), the layout of Equinox and PyTorch, where it is called `weight`."""
    return "weight" in leaf.name_words


def is_conv(leaf: Leaf) -> bool:
    """Whether names or classes say "convolution"."""
    spoken = leaf.owner_words | leaf.name_words
    return any(word.startswith("conv") or word == "depthwise" for word in spoken)


def is_qkv(leaf: Leaf) -> bool:
    """Whether a name is a query, key or value projection: "query", "q_proj", "to_k", "wv"."""
    return _is_qkv_name(leaf.module)


def is_fused_qkv(leaf: Leaf) -> bool:
    """Whether a name is a fused query-key-value projection: "qkv", "c_attn", "in_proj" of an attention block."""
    return _is_fused_name(leaf.module, in_attention(leaf))


def in_attention(leaf: Leaf) -> bool:
    """Whether a leaf belongs to an attention block, by the names above it or beside it."""
    return under_attention(leaf) or _beside_qkv(leaf)


def under_attention(leaf: Leaf) -> bool:
    """Whether the names above a leaf, or its own, say attention. "value" may also be a critic: it needs company."""
    return (
        any(frozenset(words(part)) & _ATTENTION for part in leaf.parts)
        or any(_is_qkv_name(part) or _is_fused_name(part, False) for part in leaf.names if part != "value")
        or ("value" in leaf.names and _beside_qkv(leaf))
    )


def _beside_qkv(leaf: Leaf) -> bool:
    return any(_is_qkv_name(name) or _is_fused_name(name, False) for name in leaf.around - {"value"})


def is_attention_out(leaf: Leaf) -> bool:
    """Whether a leaf is the output projection of an attention block."""
    meaning = frozenset(words(leaf.module)) - _FILLER
    return bool(meaning) and meaning <= _OUT and in_attention(leaf)


def _is_qkv_name(name: str) -> bool:
    meaning = frozenset(words(name)) - _FILLER - _PROJECTION
    return len(meaning) == 1 and meaning <= _QKV


def _is_fused_name(name: str, attention: bool) -> bool:
    spoken = words(name)
    joined = "".join(word for word in spoken if word not in ("w", "weight", "kernel", "proj", "einsum"))
    return joined in _FUSED or joined == "querykeyvalue" or (attention and spoken[:2] == ("in", "proj"))


def view_from_bias(leaf: Leaf) -> MuonDimensionNumbers | None:
    """Reads the layout of a weight from its bias, whose axes are the batch and the output axes of the weight.

    A weight (L, in, out) has the bias (L, out); (d, heads, dim) has (heads, dim); (heads, dim, d) has (d,); a
    convolution (H, W, I, O) has (O,); Equinox's (O, I, H, W) has (O, 1, 1). Where sizes coincide and several readings
    fit, the stack seen around the leaf decides, then the usual number of output axes (two for query, key and value,
    else one).
    """
    if leaf.bias is None or leaf.ndim < 2:
        return None
    readers = (_out_first_bias, _in_first_bias) if is_out_first(leaf) else (_in_first_bias,)
    for reader in readers:
        view = reader(leaf, leaf.bias)
        if view is not None:
            return view
    return None


def _out_first_bias(leaf: Leaf, bias: Shape) -> MuonDimensionNumbers | None:
    while len(bias) > 1 and bias[-1] == 1:
        bias = bias[:-1]
    last = len(bias) - 1
    if not 0 <= last < leaf.ndim - 1 or leaf.shape[: last + 1] != bias:
        return None
    return make_view(range(last + 1, leaf.ndim), (last,))


def _in_first_bias(leaf: Leaf, bias: Shape) -> MuonDimensionNumbers | None:
    def fits(batch: int) -> bool:
        outputs = len(bias) - batch
        return leaf.shape[:batch] == bias[:batch] and leaf.shape[leaf.ndim - outputs :] == bias[batch:]

    readings = [batch for batch in range(len(bias)) if fits(batch)] if len(bias) < leaf.ndim else []
    if not readings:
        transposed = is_conv(leaf) and leaf.ndim > 2 and bias == leaf.shape[-2:-1]
        return _transposed_conv(leaf) if transposed else None
    usual = 2 if is_qkv(leaf) else 1
    batch = min(readings, key=lambda n: (leaf.stack > 0 and n != leaf.stack, abs(len(bias) - n - usual)))
    return make_view(range(batch, leaf.ndim - len(bias) + batch), range(leaf.ndim - len(bias) + batch, leaf.ndim))


def _transposed_conv(leaf: Leaf) -> MuonDimensionNumbers:
    start = min(leaf.stack, leaf.ndim - 3)
    return make_view((*range(start, leaf.ndim - 2), leaf.ndim - 1), (leaf.ndim - 2,))


def _body(leaf: Leaf) -> tuple[int, ...]:
    """The axes of one layer: all but the stacked ones, which the bias or the surroundings give."""
    view = view_from_bias(leaf)
    start = leaf.stack if view is None else len(batch_axes(leaf.shape, view))
    return tuple(range(start, leaf.ndim))


def _heads_apart(leaf: Leaf, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> MuonDimensionNumbers:
    """Moves the heads, the first of two input or output axes, to the batch axes where the caller asked for it."""
    if leaf.per_head:
        inputs = inputs[1:] if len(inputs) == 2 else inputs
        outputs = outputs[1:] if len(outputs) == 2 else outputs
    return make_view(inputs, outputs)


def _fused_view(leaf: Leaf) -> MuonDimensionNumbers:
    if "einsum" in words(leaf.module) and leaf.ndim >= 3:
        return _einsum_view(leaf)
    body = _body(leaf)
    if len(body) == 2:
        return _pair(leaf, body)
    three = next((axis for axis in body if leaf.shape[axis] == 3), None)
    rest = tuple(axis for axis in body if axis != three)
    if three is None and len(rest) == 3:  # (L, d, 3d) without a sign of the stack
        return _pair(leaf, rest[1:])
    return _pair(leaf, rest) if len(rest) == 2 else _heads_apart(leaf, rest[:1], rest[1:])


def _einsum_view(leaf: Leaf) -> MuonDimensionNumbers:
    return _heads_apart(leaf, (leaf.ndim - 2,), (leaf.ndim - 3, leaf.ndim - 1))


def _pair(leaf: Leaf, axes: tuple[int, ...]) -> MuonDimensionNumbers:
    """One input and one output axis, in the leaf's storage order."""
    first, second = axes
    return make_view((second,), (first,)) if is_out_first(leaf) else make_view((first,), (second,))


def _conv_body(leaf: Leaf) -> tuple[int, ...]:
    """The axes of one convolution: spatial, in and out. A "conv2d" says how many; names alone never take an axis."""
    joined = "".join(part.lower().replace("_", "") for part in (leaf.owner, leaf.layer, leaf.name))
    for rank in (1, 2, 3):
        if f"conv{rank}d" in joined and leaf.ndim >= rank + 2:
            return tuple(range(leaf.ndim - rank - 2, leaf.ndim))
    body = _body(leaf)
    return body if len(body) >= 3 else tuple(range(leaf.ndim))


def conv_view(leaf: Leaf) -> MuonDimensionNumbers:
    """A convolution as one matrix (spatial x in, out)."""
    view = view_from_bias(leaf)
    if view is not None:
        return view
    body = _conv_body(leaf)
    if is_out_first(leaf):
        return make_view(body[1:], body[:1])
    # Haiku stores transposed convolutions (H, W, out, in); flax does so only on request.
    if "transpose" in leaf.owner_words and leaf.name == "w":
        return make_view((*body[:-2], body[-1]), (body[-2],))
    return make_view(body[:-1], body[-1:])


def last_two(leaf: Leaf) -> MuonDimensionNumbers:
    """The last two axes as (in, out), or (out, in) for an out-first weight; all others are batch axes."""
    return _pair(leaf, (leaf.ndim - 2, leaf.ndim - 1))


def table_view(leaf: Leaf) -> MuonDimensionNumbers:
    """An embedding table: a matrix of its last two axes, whichever of them counts the entries."""
    if leaf.ndim > 2 and (is_conv(leaf) or leaf.ndim > 3):
        return conv_view(leaf)
    return make_view((leaf.ndim - 2,), (leaf.ndim - 1,))


def vector_view(leaf: Leaf) -> MuonDimensionNumbers | None:
    """A batch of vectors (no input axes); None for scalars and plain vectors."""
    if leaf.ndim < 2:
        return None
    start = vector_batch(leaf.shape)
    weight = _weight_leaf(leaf)
    view = None if weight is None else view_from_bias(weight)
    if weight is not None and view is not None:
        start = min(len(batch_axes(weight.shape, view)), leaf.ndim - 1)
    return make_view((), range(start, leaf.ndim))


def _weight_leaf(leaf: Leaf) -> Leaf | None:
    """The weight that a bias goes with, as a leaf of its own."""
    if leaf.weight is None or leaf.weight_name is None:
        return None
    return Leaf(
        path=leaf.path,
        parts=(*leaf.parts[:-1], leaf.weight_name),
        shape=leaf.weight,
        dtype=leaf.dtype,
        siblings=leaf.siblings,
        around=leaf.around,
        layer=leaf.layer,
        stack=leaf.stack,
    )


def _is_window(leaf: Leaf) -> bool:
    """Whether a 4-d or 5-d kernel starts with a small square window, as in (3, 3, in, out)."""
    window = leaf.shape[: leaf.ndim - 2]
    return leaf.ndim in (4, 5) and len(set(window)) == 1 and 1 <= window[0] <= _LARGEST_WINDOW


def is_depthwise(leaf: Leaf) -> bool:
    """Whether a leaf is a convolution with one input channel per group.

    A convolution on grey images looks the same and is treated the same.
    """
    view = find_layout(leaf)
    if view is None or leaf.ndim < 3 or in_attention(leaf) and not is_conv(leaf):
        return False
    inputs = tuple(view[1].reduction_axis)  # pyright: ignore[reportArgumentType]
    if len(inputs) < 2:
        return False
    channel = inputs[0] if is_out_first(leaf) else inputs[-1]
    return leaf.shape[channel] == 1


def is_single(leaf: Leaf) -> bool:
    """Whether the view of a leaf has one row or one column: [1, N] and [N, 1] have nothing to orthogonalise."""
    found = find_layout(leaf)
    if found is None:
        return False
    view = found[1]
    return 1 in (size(leaf.shape, view.reduction_axis), size(leaf.shape, view.output_axis))  # pyright: ignore[reportArgumentType]


def is_lora(leaf: Leaf) -> bool:
    """Whether a leaf is a factor of a low-rank adapter."""
    return any("lora" in part.lower() for part in leaf.parts[-2:])


def _is_expert(leaf: Leaf) -> bool:
    return any(frozenset(words(part)) & {"expert", "experts", "moe"} for part in leaf.parts)


LAYOUTS: tuple[Layout, ...] = (
    Layout("low-rank adapter (LoRA)", lambda leaf: is_lora(leaf) and leaf.ndim >= 2, last_two),
    Layout("fused query-key-value kernel", lambda leaf: is_fused_qkv(leaf) and leaf.ndim >= 2, _fused_view),
    Layout(
        "attention kernel (heads, d, dim)",
        lambda leaf: is_qkv(leaf) and "einsum" in words(leaf.module) and len(_body(leaf)) >= 3,
        _einsum_view,
    ),
    Layout(
        "attention kernel (d, heads, dim)",
        lambda leaf: is_qkv(leaf) and len(_body(leaf)) == 3,
        lambda leaf: _heads_apart(leaf, _body(leaf)[:1], _body(leaf)[1:]),
    ),
    Layout(
        "attention output kernel (heads, dim, d)",
        lambda leaf: is_attention_out(leaf) and len(_body(leaf)) == 3,
        lambda leaf: _heads_apart(leaf, _body(leaf)[:2], _body(leaf)[2:]),
    ),
    Layout("expert stack", lambda leaf: _is_expert(leaf) and leaf.ndim >= 3, last_two),
    Layout("convolution kernel", lambda leaf: is_conv(leaf) and leaf.ndim >= 3, conv_view),
    Layout(
        "kernel, axes read from its bias",
        lambda leaf: leaf.ndim >= 3 and view_from_bias(leaf) is not None,
        lambda leaf: view_from_bias(leaf) or last_two(leaf),
    ),
    Layout("stacked kernel", lambda leaf: leaf.stack > 0 and len(_body(leaf)) == 2, last_two),
    Layout(
        "dense kernel",
        lambda leaf: leaf.ndim == 2 and leaf.is_weight,
        lambda leaf: view_from_bias(leaf) or last_two(leaf),
    ),
    Layout("matrix, by its shape alone", lambda leaf: leaf.ndim == 2, last_two),
    Layout(
        "convolution kernel, by its shape alone",
        lambda leaf: leaf.is_weight and leaf.stack == 0 and _is_window(leaf),
        conv_view,
    ),
    Layout("3-d kernel, first axis taken as a batch", lambda leaf: leaf.is_weight and leaf.ndim == 3, last_two),
)


def find_layout(leaf: Leaf) -> tuple[str, MuonDimensionNumbers] | None:
    """Name and view of the first layout that fits, or None."""
    for layout in LAYOUTS:
        if layout.applies(leaf):
            return layout.name, layout.view(leaf)
    return None


def any_view(leaf: Leaf) -> MuonDimensionNumbers | None:
    """A view for any leaf: its layout's, else the last two axes; None for scalars and vectors."""
    if leaf.ndim < 2:
        return None
    found = find_layout(leaf)
    return last_two(leaf) if found is None else found[1]
