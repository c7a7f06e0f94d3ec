"""Newton-Schulz of small matrices as one Pallas kernel: a matrix per program, all iterations in registers.

Left to XLA, an iteration is a handful of launches, and launching takes longer than multiplying where matrices are small
and many, as in meta-training. The iterations inside the kernel are those of `newton_schulz`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from celo2_harness.rule.newton_schulz import NORM_FLOOR, iterate, resolve_coefficients

LARGEST = 128
"""Rows and columns that a program can hold."""
_SMALLEST = 16  # what Triton multiplies


def newton_schulz_in_registers(
    x: Float[Array, "rows columns"],
    coefficients: str | Sequence[Sequence[float]] = "quintic",
    *,
    interpret: bool | None = None,
) -> Float[Array, "rows columns"]:
    """Computes `newton_schulz` in float32 for one small matrix; batches by `jax.vmap`.

    Args:
        x: A float32 matrix of at most `LARGEST` rows and columns.
        coefficients: As in `newton_schulz`.
        interpret: Run the kernel's body as ordinary JAX operations. None: wherever there is no GPU.

    Returns:
        A float32 array of the same shape.

    Raises:
        ValueError: If the coefficients are unknown, or the matrix is too large.

    Example:
        >>> y = newton_schulz_in_registers(jnp.diag(jnp.array([1.0, 0.5])), "polar_express")
        >>> bool(jnp.all(jnp.abs(jnp.diag(y) - 1.0) < 0.16))
        True

    References:
        https://kellerjordan.github.io/posts/muon.
    """
    triples = resolve_coefficients(coefficients)
    if max(x.shape) > LARGEST:
        raise ValueError(f"newton_schulz_in_registers: x has shape {x.shape}, expected at most {LARGEST} x {LARGEST}.")
    if interpret is None:
        interpret = jax.default_backend() != "gpu"
    transposed = x.shape[0] > x.shape[1]
    y = x.T if transposed else x
    rows, columns = y.shape
    # Triton wants powers of two. Rows and columns of zeros stay zero, and change no other entry.
    padded = jnp.pad(y, [(0, _length(n) - n) for n in y.shape])

    def kernel(x_ref, output_ref) -> None:  # type: ignore[no-untyped-def]
        matrix = x_ref[...]
        norm = jnp.sqrt(jnp.sum(matrix * matrix))
        output_ref[...] = iterate(matrix / (norm + NORM_FLOOR), triples, jax.lax.Precision.HIGHEST)

    result = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(padded.shape, jnp.float32),
        interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4),
        name="newton_schulz",
    )(padded)[:rows, :columns]
    return result.T if transposed else result


def _length(n: int) -> int:
    """The power of two that holds n."""
    return max(_SMALLEST, 1 << (n - 1).bit_length())
