"""Arrays in tiles: a Pallas kernel with one program to a tile (Triton on GPUs), and its launch.

A tile is a part of the rows and columns of one matrix. What it has beyond the end of its matrix is masked.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from celo2_harness.rule.view import MatrixView

ROW = 128  # the most of a row, which four warps read at once
WARPS = 4


class Tile(NamedTuple):
    """A tile of an array in memory, which is read where it is asked for."""

    ref: Any
    mask: Any

    def __getitem__(self, index: Any) -> Array:
        # A NumPy number: the interpreter asks an index for its shape.
        ref = self.ref if index is ... else self.ref.at[np.int32(index)]
        return ref[...] if self.mask is None else triton.load(ref, mask=self.mask, other=0.0)

    def write(self, x: Array) -> None:
        """Writes the tile."""
        x = x.astype(self.ref.dtype)
        if self.mask is None:
            self.ref[...] = x
        else:
            triton.store(self.ref, x, mask=self.mask)


class Grid:
    """The tiles of a leaf, one to a program; what a tile has beyond the end of its matrix is masked.

    Attributes:
        shape: The number of matrices, their rows and columns. A vector is a matrix of one row.
        tile: Rows and columns of a tile.
        parts: How many tiles a matrix has down and across.
        counts: The entries of each matrix, without padding.
    """

    def __init__(self, view: MatrixView, lengths: np.ndarray | None, entries: int, interpret: bool):
        self._interpret, self._is_matrix = interpret, view.is_matrix
        self.shape = view.viewed if view.is_matrix else (view.viewed[0], 1, view.viewed[1])
        rows, columns = map(_power, self.shape[1:])  # Triton wants powers of two.
        width = min(columns, ROW if rows > 1 else entries)
        height = min(rows, entries // width)
        self.tile = (height, min(columns, entries // height))
        self.parts = tuple(-(-n // size) for n, size in zip(self.shape[1:], self.tile, strict=True))
        self._ends = None
        self.counts = np.full(self.shape[0], math.prod(self.shape[1:]))
        if lengths is not None:
            ends = lengths if view.is_matrix else np.concatenate([np.ones_like(lengths), lengths], axis=1)
            self._ends = jnp.asarray(ends, jnp.int32)
            self.counts = np.prod(ends, axis=1)

    @property
    def tiles(self) -> int:
        """The tiles of a matrix."""
        return math.prod(self.parts)

    def place(self, program: Any) -> tuple[Any, Any, Any]:
        """Which matrix, and where in it."""
        down, across = self.parts
        return program // (down * across), program // across % down, program % across

    def lift(self, x: Array) -> Array:
        """An array that broadcasts to the leaf, with the axes of matrices, rows and columns."""
        return x if self._is_matrix else jnp.expand_dims(x, -2)

    def block(self, shape: Sequence[int]) -> pl.BlockSpec:
        """The tile of an array with these three axes; thin ones have length one, others before them are whole."""
        *before, count, rows, columns = shape
        sizes = [1 if n == 1 else size for n, size in zip((rows, columns), self.tile, strict=True)]

        def index(program: Any) -> tuple[Any, ...]:
            matrix, down, across = self.place(program)
            return (
                *[0] * len(before),
                0 if count == 1 else matrix,
                0 if rows == 1 else down,
                0 if columns == 1 else across,
            )

        return pl.BlockSpec((*before, None, *sizes), index)

    def mask(self, shape: Sequence[int], ends: Any) -> Any:
        """Which entries of a tile of such an array lie in the matrix; None if all do."""
        mask = None
        places = self.place(pl.program_id(0))[1:]
        for axis, (length, size, place) in enumerate(zip(self.shape[1:], self.tile, places, strict=True)):
            if shape[-2 + axis] == 1 or (ends is None and length % size == 0):
                continue
            sizes = tuple(1 if n == 1 else size for n, size in zip(shape[-2:], self.tile, strict=True))
            index = place * size + jax.lax.broadcasted_iota(jnp.int32, sizes, axis)
            inside = index < (length if ends is None else ends[axis])
            mask = inside if mask is None else mask & inside
        return mask

    def launch(
        self,
        name: str,
        body: Callable[[Any, Any, list[Any]], None],
        tiled: Any,
        whole: Any,
        outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec | None]],
        in_place: Sequence[tuple[Array, int]] = (),
    ) -> Sequence[Array]:
        """Runs a kernel with a program to a tile.

        Args:
            name: The name of the kernel.
            body: Called with `tiled` and `whole` as trees of tiles and references, and with the references to write.
            tiled: A tree of arrays with the axes of matrices, rows and columns, of length one where they are thin.
            whole: A tree of arrays that every program may read anywhere.
            outputs: The outputs, and which part of them a program writes; None for the tile of an array like the leaf.
            in_place: Arrays out of `tiled` that an output is written over, and which.
        """
        arrays, tree = jax.tree.flatten(tiled)
        numbers, number_tree = jax.tree.flatten((self._ends, whole))
        aliases = {len(numbers) + next(i for i, x in enumerate(arrays) if x is array): k for array, k in in_place}

        def kernel(*refs: Any) -> None:
            written = list(refs[len(refs) - len(outputs) :])
            ends, whole = number_tree.unflatten(refs[: len(numbers)])
            if ends is not None:
                matrix, _, _ = self.place(pl.program_id(0))
                ends = (ends[matrix, 0], ends[matrix, 1])
            masks: dict[tuple[int, ...], Any] = {}

            def masked(ref: Any, array: Any) -> Tile:
                thin = tuple(n == 1 for n in array.shape[-2:])
                if thin not in masks:
                    masks[thin] = self.mask(array.shape, ends)
                return Tile(ref, masks[thin])

            tiles = [masked(*pair) for pair in zip(refs[len(numbers) : -len(outputs)], arrays, strict=True)]
            for k, (output, spec) in enumerate(outputs):
                if spec is None:
                    written[k] = masked(written[k], output)
            body(tree.unflatten(tiles), whole, written)

        return pl.pallas_call(
            kernel,
            out_shape=[output for output, _ in outputs],
            grid=(self.shape[0] * self.tiles,),
            in_specs=[*map(_everything, numbers), *(self.block(x.shape) for x in arrays)],
            out_specs=[spec or self.block(output.shape) for output, spec in outputs],
            input_output_aliases=aliases,
            interpret=self._interpret,
            compiler_params=None if self._interpret else triton.CompilerParams(num_warps=WARPS),
            name=name,
        )(*numbers, *arrays)


def _everything(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda _: (0,) * x.ndim)


def _power(n: int) -> int:
    """The power of two that holds n."""
    return 1 << (n - 1).bit_length()
