"""Newton-Schulz orthogonalisation of matrices, in the cheaper of two equal forms."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# (a, b, c) of X <- a X + (b A + c A A) X with A = X X^T, one triple per iteration.
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # Keller Jordan's quintic, tuned for the steepest slope at zero; singular values end in about [0.7, 1.2].
    "quintic": ((3.4445, -4.7750, 2.0315),) * 5,
    # Amsel et al., Polar Express, arXiv 2505.16932: the first five of its polynomials for singular values in [1e-3, 1],
    # each with the paper's safety factor 1.01 (divide by 1.01, 1.01^3, 1.01^5); they end in [0.84, 1.13].
    "polar_express": (
        (8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.300387312530933 / 1.01**5),
        (4.107059111542203 / 1.01, -2.9478499167379106 / 1.01**3, 0.5448431082926601 / 1.01**5),
        (3.9486908534822946 / 1.01, -2.908902115962949 / 1.01**3, 0.5518191394370137 / 1.01**5),
        (3.3184196573706015 / 1.01, -2.488488024314874 / 1.01**3, 0.51004894012372 / 1.01**5),
        (2.300652019954817 / 1.01, -1.6689039845747493 / 1.01**3, 0.4188073119525673 / 1.01**5),
    ),
}
NORM_FLOOR = 1e-8
# From this ratio of the longer axis to the shorter one on, iterating on the Gram matrix needs fewer multiplications.
_GRAM_ASPECT = 2.0


def newton_schulz(
    x: Float[Array, "*batch rows columns"],
    coefficients: str | Sequence[Sequence[float]] = "quintic",
    *,
    eps: float = NORM_FLOOR,
    dtype: Any = None,
    precision: Any = None,
    gram: bool | None = None,
) -> Float[Array, "*batch rows columns"]:
    """Pushes all singular values of each matrix towards one, keeping its singular vectors.

    X_0 = X / (||X||_F + eps);  X <- a X + (b A + c A A) X,  A = X X^T, once per coefficient triple.

    Wide matrices are iterated on their Gram matrix: every X_k is P_k X_0 with P_k a polynomial in A_0, so only small
    square products are needed between the first and the last. The two forms agree to rounding. Rows and columns of
    zeros stay zero and change nothing else.

    Args:
        x: Matrices in the last two axes; any batch axes before them.
        coefficients: "quintic" (published, 5 iterations), "polar_express", or triples, one per iteration.
        eps: Added to the Frobenius norm.
        dtype: The dtype of the products (None: float32, or x's own if wider); bfloat16 suits accelerators.
        precision: The precision of the products, as in `jax.numpy.matmul`. None: the highest where JAX runs on a CPU,
            and the hardware's usual one on accelerators, such as TF32.
        gram: Whether to iterate on the Gram matrix. None: where the longer axis is at least twice the shorter one. The
            rounding of the Gram form grows with the condition of the matrix, which is why square ones do without.

    Returns:
        Matrices of the shape and dtype of `x`; zero for zero matrices.

    Raises:
        ValueError: If the coefficients are unknown, or `x` has fewer than two axes.

    Example:
        >>> y = newton_schulz(jnp.diag(jnp.array([1.0, 0.5])), "polar_express")
        >>> bool(jnp.all(jnp.abs(jnp.diag(y) - 1.0) < 0.16))
        True

    References:
        Keller Jordan, Muon, https://kellerjordan.github.io/posts/muon;
        Amsel et al., The Polar Express, arXiv 2505.16932.
    """
    triples = resolve_coefficients(coefficients)
    if x.ndim < 2:
        raise ValueError(f"newton_schulz: x has shape {x.shape}, expected at least two axes (rows, columns).")
    if x.size == 0:
        return x
    work = jnp.promote_types(x.dtype, jnp.float32) if dtype is None else jnp.dtype(dtype)
    if work != jnp.bfloat16:
        precision = usual_precision(precision)
    y = x.astype(work)
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        y = jnp.swapaxes(y, -1, -2)
    norm = jnp.sqrt(jnp.sum(jnp.square(y.astype(jnp.float32)), axis=(-2, -1), keepdims=True))
    y = y / (norm + eps).astype(work)
    y = iterate(y, triples, precision, gram)
    if transposed:
        y = jnp.swapaxes(y, -1, -2)
    return y.astype(x.dtype)


def usual_precision(precision: Any = None) -> Any:
    """The precision of matrix products that None stands for: "highest" where JAX runs on a CPU, else "default"."""
    if precision is not None:
        return precision
    return "highest" if jax.default_backend() == "cpu" else "default"


def iterate(
    x: jax.Array, triples: Sequence[tuple[float, float, float]], precision: Any, gram: bool | None = None
) -> jax.Array:
    """All iterations on matrices that are at least as wide as high, of norm 1 at most."""
    form = _gram_form if (prefers_gram(x.shape[-2:]) if gram is None else gram) else _plain_form
    return form(x, triples, precision)


def prefers_gram(lengths: Sequence[int]) -> bool:
    """Returns whether iterating on the Gram matrix needs fewer multiplications for matrices of these lengths."""
    return max(lengths) >= _GRAM_ASPECT * min(lengths)


def resolve_coefficients(coefficients: str | Sequence[Sequence[float]]) -> tuple[tuple[float, float, float], ...]:
    """Looks up triples by name, or checks the given ones."""
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients = {coefficients!r}: expected one of {', '.join(COEFFICIENTS)}, or triples.")
        return COEFFICIENTS[coefficients]
    triples = tuple(tuple(float(c) for c in triple) for triple in coefficients)
    if not triples or any(len(triple) != 3 for triple in triples):
        raise ValueError(f"coefficients = {triples!r}: expected at least one triple (a, b, c).")
    return triples  # type: ignore[return-value]


def _plain_form(x: jax.Array, triples: Sequence[tuple[float, float, float]], precision: Any) -> jax.Array:
    for a, b, c in triples:
        gram = jnp.matmul(x, jnp.swapaxes(x, -1, -2), precision=precision)
        polynomial = b * gram + c * jnp.matmul(gram, gram, precision=precision)
        x = a * x + jnp.matmul(polynomial, x, precision=precision)
    return x


def _gram_form(x: jax.Array, triples: Sequence[tuple[float, float, float]], precision: Any) -> jax.Array:
    """X_k = P_k X_0 with M = a I + b A + c A A, P <- M P, A <- M A M; all of them commute."""
    matmul = lambda p, q: jnp.matmul(p, q, precision=precision)
    identity = jnp.expand_dims(jnp.eye(x.shape[-2], dtype=x.dtype), range(x.ndim - 2))
    gram = matmul(x, jnp.swapaxes(x, -1, -2))
    product = None
    for k, (a, b, c) in enumerate(triples):
        step = a * identity + b * gram + c * matmul(gram, gram)
        product = step if product is None else matmul(step, product)
        if k + 1 < len(triples):
            gram = matmul(step, matmul(gram, step))
    assert product is not None
    return matmul(product, x)
