"""Control of the norms of matrices, in place of weight decay: pinned, damped along the radius, or with a floor."""

from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int

from celo2_harness._trees import require_like_params
from celo2_harness._types import Params, ScalarOrSchedule, Updates
from celo2_harness.blocks.views import WeightDimensionNumbers, map_matrices, matrix_views
from celo2_harness.rule import MatrixView

Mode = Literal["hyperball", "radial", "rows"]


class ControlNormState(NamedTuple):
    """Step count, and per matrix the norm that it is pinned to (shape: batch axes, then ones); zero: not pinned."""

    count: Int[Array, ""]
    norm: Updates


def control_norm(
    mode: Mode = "hyperball",
    learning_rate: ScalarOrSchedule | None = None,
    *,
    strength: ArrayLike = 0.5,
    floor: ArrayLike = 0.38,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformation:
    """Keeps matrices at the norm that they start with, or steps from leading away from it.

    With W a matrix, R its norm at `init`, U its direction (to be subtracted), all norms Frobenius norms:

    - `"hyperball"`: W' = W - r R U / ||U||, then W <- R W' / ||W'||. The learning rate r is an angle, the same for
      every width. This is the last link: it takes the learning rate and turns the sign, so neither
      `optax.scale_by_learning_rate` nor weight decay belong beside it. Vectors, and matrices that start at zero, are
      left alone: they take the plain step - r U.
    - `"radial"`: U - `strength` min(<U, W>, 0) W / ||W||^2, which shortens the part of U along which a step leads
      outward. Before the learning rate.
    - `"rows"`: U_i max(1, `floor` ||W_i|| / ||U_i||) for every output unit i of a matrix (a column of a kernel (in,
      out), a row in the convention of PyTorch), so that no unit falls asleep. Before the learning rate.

    The modes can follow each other, in the order "radial", "rows", "hyperball". In the last two, vectors and matrices
    (or units) of zero are left alone: their directions pass.

    Args:
        mode: One of the three.
        learning_rate: The learning rate r, a number or a schedule of the step count; "hyperball" only.
        strength: The part of the outward radial component that is taken away; "radial" only.
        floor: The least norm of a unit's direction, over that of its weights; "rows" only.
        weight_dimension_numbers: How leaves are seen as matrices (see `celo2_direction`).

    Returns:
        An `optax.GradientTransformation`; `update` needs `params`. The state of "hyperball" is one number per matrix,
        the others have none. Updates keep their dtype. A matrix whose direction is zero or not finite gets update zero.

    Raises:
        ValueError: If the mode is unknown, or a learning rate is missing ("hyperball") or out of place (the others); in
            `update`, if `params` is None or another tree than the updates, or a view does not fit its leaf.

    Example:
        >>> tx = control_norm("hyperball", learning_rate=0.1)
        >>> params = {"w": jnp.diag(jnp.array([3.0, 4.0]))}
        >>> updates, _ = tx.update({"w": jnp.array([[0.0, 1.0], [0.0, 0.0]])}, tx.init(params), params)
        >>> new = optax.apply_updates(params, updates)
        >>> round(float(jnp.linalg.norm(new["w"])), 4), round(float(-new["w"][0, 1] / new["w"][0, 0]), 4)
        (5.0, 0.1667)

    References:
        Hyperball, arXiv 2606.16899; the softer forms are from KellerJordan/modded-nanogpt (optimization track).
    """
    if mode not in get_args(Mode):
        raise ValueError(f"control_norm: mode = {mode!r}, expected one of {', '.join(get_args(Mode))}.")
    if (learning_rate is None) == (mode == "hyperball"):
        raise ValueError(
            f"control_norm: learning_rate = {learning_rate!r} in mode {mode!r}; "
            + ("give the angle of a step." if mode == "hyperball" else "it belongs to mode 'hyperball', leave it out.")
        )

    def init_fn(params: Params) -> Any:
        if mode != "hyperball":
            return optax.EmptyState()

        def norm(view: MatrixView, w: Array) -> Any:
            return _norm(view.apply(w).astype(jnp.float32)) if view.is_matrix else optax.MaskedNode()

        views = matrix_views(params, weight_dimension_numbers)
        return ControlNormState(jnp.zeros([], jnp.int32), map_matrices(norm, views, params, state=True))

    def update_fn(updates: Updates, state: Any, params: Params | None = None) -> tuple[Updates, Any]:
        if params is None:
            raise ValueError(
                "control_norm: update(updates, state, params) was called without params. It controls the norms of the"
                " parameters; pass the tree that you will apply the updates to."
            )
        require_like_params("control_norm", updates, params)
        rate: Any = 0.0
        if mode == "hyperball":
            rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def control(view: MatrixView, update: Array, parameter: Array, *pinned: Any) -> Array:
            u = view.apply(update).astype(jnp.float32)
            w = view.apply(parameter).astype(jnp.float32)
            u = jnp.where(jnp.isfinite(jnp.sum(jnp.square(u), axis=view.axes, keepdims=True)), u, 0.0)
            if mode == "hyperball":
                u = _hyperball(u, w, pinned[0], rate) if view.is_matrix else -rate * u
            elif view.is_matrix:
                u = _radial(u, w, strength) if mode == "radial" else _rows(u, w, floor)
            return view.invert(u).astype(update.dtype)

        views = matrix_views(updates, weight_dimension_numbers)
        if mode != "hyperball":
            return map_matrices(control, views, updates, params), state
        controlled = map_matrices(control, views, updates, params, state.norm)
        return controlled, state._replace(count=jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init_fn, update_fn)  # type: ignore[arg-type]


def _norm(x: Array, axis: int | tuple[int, ...] = (-2, -1)) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True))


def _over(x: Array, y: Array) -> Array:
    """x / y, and zero where y is."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1.0), 0.0)


def _hyperball(u: Array, w: Array, norm: Array, rate: Any) -> Array:
    size = _norm(u)
    moved = w - rate * norm * _over(u, size)
    step = moved * _over(norm, _norm(moved)) - w
    return jnp.where(norm > 0, jnp.where(size > 0, step, 0.0), -rate * u)


def _radial(u: Array, w: Array, strength: ArrayLike) -> Array:
    outward = jnp.minimum(jnp.sum(u * w, axis=(-2, -1), keepdims=True), 0.0)
    size = _norm(w)
    # Divided twice, since the square of a small norm underflows.
    return u - strength * _over(outward, size) * _over(w, size)


def _rows(u: Array, w: Array, floor: ArrayLike) -> Array:
    return u * jnp.maximum(1.0, floor * _over(_norm(w, -2), _norm(u, -2)))
