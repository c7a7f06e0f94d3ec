"""What the class of a layer says about its arrays, in trees that still have their layers: Equinox, flax nnx, haliax."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

# Only classes of these libraries are read: a user's own `EmbeddingModel` says nothing about the arrays in it.
_LIBRARIES = ("equinox", "flax", "haliax")
_CELLS = ("GRUCell", "LSTMCell", "LSTM", "GRU")


class Layer(NamedTuple):
    """The layer that holds an array.

    Attributes:
        kind: "dense", "conv", "embedding", "norm" or "cell"; "" where the class says nothing.
        name: The name of the class.
        ndim: The number of axes that the array has in one layer; None if the class does not say.
        inputs: The input axes of the layer, if the axes have names.
        outputs: The output axes of the layer, if the axes have names.
        batch: All other axes, if the axes have names.
        transposed: Whether it is a convolution that keeps its kernel (..., out, in).
    """

    kind: str = ""
    name: str = ""
    ndim: int | None = None
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    batch: tuple[int, ...] | None = None
    transposed: bool = False


NO_LAYER = Layer()


def _kind(name: str) -> str:
    if name in ("Linear", "LinearGeneral", "Einsum"):
        return "dense"
    if name in ("Embedding", "Embed"):
        return "embedding"
    if name in _CELLS:
        return "cell"
    if name.endswith("Norm") and name not in ("WeightNorm", "SpectralNorm"):  # these two hold no activations' scales
        return "norm"
    return "conv" if name.startswith("Conv") else ""


class LayerReader:
    """Finds the layer of every leaf; nodes that leaves share are looked up once.

    Args:
        tree: The parameters.
    """

    def __init__(self, tree: Any):
        self._nodes: dict[tuple[Hashable, ...], Any] = {(): tree}

    def __call__(self, key: Sequence[Any], ndim: int) -> Layer:
        """The layer that holds the array with a key path that ends with the array's own name."""
        if not key or (node := self._node(tuple(key[:-1]))) is None:
            return NO_LAYER
        for base in type(node).__mro__:
            if base.__module__.split(".")[0] in _LIBRARIES and not isinstance(node, Mapping):
                own = getattr(key[-1], "name", getattr(key[-1], "key", None))
                return _read(node, base.__name__, str(own), ndim)
        return NO_LAYER

    def _node(self, key: tuple[Any, ...]) -> Any:
        if key not in self._nodes:
            parent, last = self._node(key[:-1]), key[-1]
            try:
                if isinstance(last, jax.tree_util.GetAttrKey):
                    self._nodes[key] = getattr(parent, last.name)
                elif isinstance(last, (jax.tree_util.SequenceKey, jax.tree_util.DictKey)):
                    self._nodes[key] = parent[last.idx if isinstance(last, jax.tree_util.SequenceKey) else last.key]
                else:
                    self._nodes[key] = None
            except (AttributeError, KeyError, IndexError, TypeError):
                self._nodes[key] = None
        return self._nodes[key]


def _read(node: Any, name: str, own: str, ndim: int) -> Layer:
    kind, array = _kind(name), getattr(node, own, None)
    axes = [axis.name for axis in getattr(array, "axes", ())]
    if kind and len(axes) == ndim and axes:
        return _read_named(node, kind, name, axes)
    bias = own.startswith("bias")
    spatial = getattr(node, "num_spatial_dims", None) or len(getattr(node, "kernel_size", ()) or ())
    counts = {
        "dense": None if name != "Linear" else 1 if bias else 2,
        "embedding": 2,
        "cell": 1 if bias else 2,
        # Equinox keeps the bias of a convolution with axes of size one.
        "conv": spatial + (1 if own == "bias" and hasattr(node, "num_spatial_dims") else 2) if spatial else None,
        "norm": len(getattr(node, "shape", None) or (0,)),
    }
    if kind == "conv" and bias and not hasattr(node, "num_spatial_dims"):
        counts["conv"] = 1
    return Layer(kind, name, counts.get(kind), transposed=bool(getattr(node, "transpose_kernel", False)))


def _read_named(node: Any, kind: str, name: str, axes: Sequence[str]) -> Layer:
    """A layer whose axes have names (haliax): those that it was made for are its own, all others are a batch."""
    spec = lambda *fields: {
        axis.name
        for field in fields
        for value in [getattr(node, field, ())]
        for axis in (value if isinstance(value, (tuple, list)) else (value,))
        if hasattr(axis, "name")
    }
    inputs, outputs = spec("In", "Vocab"), spec("Out", "Embed", "axis", "Axis")
    if kind == "conv" or not inputs | outputs:
        return Layer(kind, name)
    find = lambda names: tuple(i for i, axis in enumerate(axes) if axis in names)
    found = find(inputs), find(outputs - inputs)
    batch = tuple(i for i in range(len(axes)) if i not in (*found[0], *found[1]))
    return Layer(kind, name, len(axes) - len(batch), *found, batch=batch)
