"""Scaling of updates to unit root mean square, matrix by matrix."""

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from celo2_harness._types import Params, Updates
from celo2_harness.blocks.small import map_batches
from celo2_harness.blocks.views import (
    LeafShardings,
    WeightDimensionNumbers,
    leaf_shardings,
    map_matrices,
    matrix_views,
)
from celo2_harness.rule import (
    MatrixView,
    Normalization as Mode,
    init_mean_square,
    matrix_mean_square,
    rms_divisor,
    rolling_mean_square,
)


class NormalizeRmsState(NamedTuple):
    """Step count and, per matrix, the running mean square (`nu`, shape: batch axes, then ones)."""

    count: Int[Array, ""]
    nu: Updates


def normalize_rms(
    mode: Mode = "per_step",
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    decay: float = 0.99,
    threshold: float | int = 1.0,
    eps: float | int = 1e-9,
    sharding: LeafShardings = None,
) -> optax.GradientTransformation:
    """Divides every matrix (or vector) of an update by a root mean square.

    - `"per_step"`: d / sqrt(mean(d^2) + eps), so that each step has RMS one (published);
    - `"rolling"`: the mean square is averaged over steps with `decay`, bias-corrected;
    - `"clip"`: d / max(1, RMS(d) / threshold), which only ever shrinks;
    - `"none"`: unchanged.

    The mean runs over one matrix (the last two axes, or the input and output axes of the view), over all entries of a
    vector; a scalar therefore becomes about +-1.

    Args:
        mode: One of the four.
        weight_dimension_numbers: How leaves are seen as matrices (see `celo2_direction`).
        decay: The decay of the running mean square ("rolling").
        threshold: The largest RMS that is left alone ("clip").
        eps: Added to the mean square.
        sharding: How the updates lie on a mesh (see `orthogonalize`). Leaves that are not split share batches.

    Returns:
        An `optax.GradientTransformation`; statistics are float32, updates keep their dtype. Zero stays zero;
        a mean square that is not finite does not enter the running one.

    Raises:
        ValueError: If the mode is unknown; in `update`, if a view does not fit its leaf.

    Example:
        >>> tx = normalize_rms()
        >>> updates, _ = tx.update({"b": jnp.array([3.0, -3.0])}, tx.init({"b": jnp.zeros(2)}))
        >>> updates["b"].tolist()
        [1.0, -1.0]

    References:
        Celo2, arXiv 2602.19142, section 3 (per-step RMS) and its ablation (rolling, clip, none).
    """
    if mode not in get_args(Mode):
        raise ValueError(f"normalize_rms: mode = {mode!r}, expected one of {', '.join(get_args(Mode))}.")
    if mode == "none":
        return optax.identity()

    def mean_square(view: MatrixView, x: jax.Array, lengths: Any = None) -> jax.Array:
        return matrix_mean_square(view, view.apply(x).astype(jnp.float32), lengths)

    def divide(view: MatrixView, x: jax.Array, square: jax.Array, count: jax.Array | int = 1) -> jax.Array:
        divisor = rms_divisor(mode, square, count, decay=decay, threshold=threshold, eps=eps)
        return view.invert(view.apply(x).astype(jnp.float32) * (1.0 / divisor)).astype(x.dtype)

    def stateless(updates: Updates, state: Any, params: Params | None = None) -> tuple[Updates, Any]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        views = matrix_views(updates, weight_dimension_numbers)
        function = lambda view, lengths, x: [divide(view, x, mean_square(view, x, lengths))]
        (leaves,) = map_batches(function, views, leaf_shardings(updates, sharding), leaves)
        return treedef.unflatten(leaves), state

    def rolling_init(params: Params) -> NormalizeRmsState:
        views = matrix_views(params, weight_dimension_numbers)
        nu = map_matrices(lambda view, _: init_mean_square(view), views, params, state=True)
        return NormalizeRmsState(jnp.zeros([], jnp.int32), nu)

    def rolling(
        updates: Updates, state: NormalizeRmsState, params: Params | None = None
    ) -> tuple[Updates, NormalizeRmsState]:
        del params
        views = matrix_views(updates, weight_dimension_numbers)
        count = jnp.asarray(optax.safe_increment(state.count))
        step = lambda view, x, nu: rolling_mean_square(nu, mean_square(view, x), decay)
        nu = map_matrices(step, views, updates, state.nu, state=True)
        scaled = map_matrices(lambda view, x, nu: divide(view, x, nu, count), views, updates, nu)
        return scaled, NormalizeRmsState(count, nu)

    if mode == "rolling":
        return optax.GradientTransformation(rolling_init, rolling)  # type: ignore[arg-type]
    return optax.GradientTransformation(optax.init_empty_state, stateless)  # type: ignore[arg-type]
