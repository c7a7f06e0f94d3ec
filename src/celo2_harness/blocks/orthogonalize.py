"""Newton-Schulz orthogonalisation as an Optax transformation."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import optax

from celo2_harness._types import Params, Updates
from celo2_harness.blocks.spread import spread_matrices
from celo2_harness.blocks.views import (
    LeafShardings,
    WeightDimensionNumbers,
    explicitly_split,
    leaf_shardings,
    matrix_views,
)
from celo2_harness.rule import Batch, MatrixView, newton_schulz, plan_batches
from celo2_harness.rule.newton_schulz import NORM_FLOOR, prefers_gram, resolve_coefficients

# Entries of a matrix up to which matrices share a batch. Stacking saves calls, but copies the matrices, and every slice
# out of a stack is code of its own for XLA to compile; large matrices do better alone.
LARGEST_STACKED = 512 * 512
# On an accelerator launches cost more than copies, up to the size whose products alone fill the device.
LARGEST_STACKED_ON_ACCELERATORS = 2048 * 2048
# Multiplications of one product: of a batch, which bounds the memory for it, and of padding that costs what a batch of
# its own would.
LARGEST_BATCH = 1 << 31
LARGEST_BATCH_ON_ACCELERATORS = 1 << 34
JOIN_BELOW = 1 << 17


def _batches(views: Sequence[MatrixView], leaves: Sequence[jax.Array], chosen: Sequence[int]) -> list[Batch]:
    """The matrices of the chosen leaves in batches; large ones, and split ones, each by itself."""

    on_cpu = jax.default_backend() == "cpu"
    stacked = LARGEST_STACKED if on_cpu else LARGEST_STACKED_ON_ACCELERATORS
    largest = LARGEST_BATCH if on_cpu else LARGEST_BATCH_ON_ACCELERATORS

    def key(i: int) -> Any:
        matrix = views[i].viewed[-2:]
        alone = math.prod(matrix) > stacked or explicitly_split(leaves[i])
        # Padding must not change the form of the iteration, on which rounding depends.
        return leaves[i].dtype, prefers_gram(matrix), i if alone else None

    multiplications = lambda lengths: lengths[0] * math.prod(lengths)
    return plan_batches(views, chosen, key, cost=multiplications, join_below=JOIN_BELOW, largest=largest)


def orthogonalize(
    coefficients: str | Sequence[Sequence[float]] = "quintic",
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    eps: float = NORM_FLOOR,
    dtype: Any = None,
    precision: Any = None,
    sharding: LeafShardings = None,
) -> optax.GradientTransformation:
    """Replaces every matrix by (nearly) its closest semi-orthogonal one; vectors and scalars pass through.

    Small matrices of one shape are orthogonalised together as one batch, whichever leaves they come from; on
    accelerators also large ones. With `sharding`, matrices of one shape are shared out among the devices, each
    orthogonalised on one of them: two all-to-alls per mesh axis that splits them and at most one all-gather, whatever
    the number of iterations.

    Args:
        coefficients: "quintic" (published), "polar_express", or triples (a, b, c), one per iteration.
        weight_dimension_numbers: How leaves are seen as matrices (see `celo2_direction`).
        eps: Added to the Frobenius norm.
        dtype: The dtype of the matrix products; None keeps float32 (or wider). bfloat16 suits accelerators.
        precision: The precision of the products, as in `jax.numpy.matmul`. None: the highest where JAX runs on a CPU,
            and the hardware's usual one on accelerators, such as TF32.
        sharding: How the updates lie on a mesh: a tree of `jax.sharding.NamedSharding`, or a function of the updates
            returning one. None: as XLA places them, which communicates in every iteration if matrices are split.

    Returns:
        A stateless `optax.GradientTransformation`; updates keep their dtype.

    Raises:
        ValueError: If the coefficients are unknown; in `update`, if a view does not fit its leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = orthogonalize("polar_express")
        >>> updates, _ = tx.update({"w": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "b": jnp.ones(2)}, tx.init({}))
        >>> bool(jnp.allclose(updates["w"], jnp.eye(2), atol=0.16))
        True

    References:
        arXiv 2602.19142, section 4; https://kellerjordan.github.io/posts/muon.
    """
    triples = resolve_coefficients(coefficients)

    def iterate(x: jax.Array, gram: bool | None = None) -> jax.Array:
        return newton_schulz(x, triples, eps=eps, dtype=dtype, precision=precision, gram=gram)

    def update_fn(updates: Updates, state: Any, params: Params | None = None) -> tuple[Updates, Any]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        views = matrix_views(updates, weight_dimension_numbers)
        if places := leaf_shardings(updates, sharding):
            chosen = [i for i, view in enumerate(views) if view.is_matrix and leaves[i].size]
            pick = lambda x: [x[i] for i in chosen]
            spread = spread_matrices(iterate, pick(leaves), pick(views), pick(places), LARGEST_STACKED)
            for i, leaf in zip(chosen, spread, strict=True):
                leaves[i] = leaf
            return treedef.unflatten(leaves), state
        chosen = [i for i, view in enumerate(views) if view.is_matrix and leaves[i].size]
        for batch in _batches(views, leaves, chosen):
            gram = prefers_gram(batch.views[0].viewed[-2:])
            x = batch.stack([leaves[i] for i in batch.members])
            # One axis of matrices, as on a mesh: products of other shapes round differently.
            y = iterate(x.reshape(-1, *batch.matrix), gram).reshape(x.shape)
            for i, leaf in zip(batch.members, batch.unstack(y), strict=True):
                leaves[i] = leaf
        return treedef.unflatten(leaves), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)  # type: ignore[arg-type]
