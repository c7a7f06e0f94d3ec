"""SOAP's basis around any direction: the eigenvectors of the gradients' covariance."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Int

from celo2_harness._trees import bare_structure, require_like_params, unboxed
from celo2_harness._types import Params, Updates
from celo2_harness.blocks.bases import (
    Side,
    Sides,
    Square,
    Turning,
    axes_with_basis,
    from_old_basis,
    map_turning,
    next_bases,
    squares_by_leaf,
    turn,
    turning_together,
    with_gradient,
)
from celo2_harness.blocks.first_moments import map_first_moments, refuse_unknown_fields
from celo2_harness.blocks.views import LeafShardings, WeightDimensionNumbers, leaf_shardings, matrix_views
from celo2_harness.rule import MatrixView
from celo2_harness.rule.eigenbasis import Orthonormalize, cholesky_qr

Mode = Literal["whiten", "act"]

_TINY = 1e-30


class EigenbasisState(NamedTuple):
    """Step count, state of the inner transformation, and what is kept for every matrix.

    `squares` has a tuple for every leaf: a `Square` for each side that has a basis, the shorter side first. `nu` is the
    second moment of the turned gradient (mode "whiten"), and `optax.MaskedNode()` where there is none.
    """

    count: Int[Array, ""]
    inner_state: optax.OptState
    squares: Updates
    nu: Updates


def in_eigenbasis(
    inner: optax.GradientTransformation,
    decay: ArrayLike = 0.95,
    sides: Sides = "one",
    every: int = 1,
    *,
    mode: Mode = "whiten",
    second_moment_decay: ArrayLike | None = None,
    eps: ArrayLike = 1e-8,
    max_size: int = 8192,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    orthonormalize: Orthonormalize = cholesky_qr,
    precision: Any = None,
    sharding: LeafShardings = None,
) -> optax.GradientTransformationExtraArgs:
    """Lets a direction be whitened, or act, in the eigenbasis of the gradients' covariance.

    With G the gradient of a matrix, seen so that its short side are the rows, and Q a basis of that side:

    - `"whiten"` (SOAP): U is the inner direction, V <- c V + (1 - c) (Q^T G)^2, D = Q ((Q^T U) / sqrt(V + e)), with e =
      `eps` mean(V); the update is D times ||U|| / ||D||. The inner direction should be a momentum (`mix_momenta`,
      `optax.trace`): what is adaptive already must not be whitened again.
    - `"act"`: the inner transformation sees Q^T G and Q^T W in place of gradient G and parameter W, and its direction
      is turned back by Q. An inner direction that divides by a root mean square, entry by entry, is whitened by that.

    After the step the basis follows the covariance, L <- b L + (1 - b) G G^T, by one step of power iteration (see
    `next_basis`), and in mode "act" the first moments of the inner transformation turn with it. The first step is
    plain: the basis starts as the identity, and nothing is divided.

    In mode "act" an array in the inner state belongs to a matrix if it has its path and shape, and the field that holds
    it says what it is: `mu`, `trace`, `m1` and `m2` are first moments, which turn; `nu`, `diag` and `sum_of_squares`
    are second moments, which stay, since every column of the basis keeps its place; so do the factored `row` and
    `col`. Other names are refused.

    Vectors and matrices whose short side is longer than `max_size` get the inner direction as it is.

    Args:
        inner: The transformation that gives the direction. Its state is made for float32 parameters.
        decay: The decay b of the covariance.
        sides: "one" for the short side of every matrix, "both" for Q_L^T G Q_R, as SOAP has it.
        every: The number of steps from one basis to the next. The covariance follows in every step.
        mode: "whiten" or "act".
        second_moment_decay: The decay c of the second moment in the basis; None is `decay`.
        eps: The part of the mean second moment that is added under the root. Directions in which there is nothing but
            rounding are left small by it.
        max_size: The longest side that gets a basis.
        weight_dimension_numbers: How leaves are seen as matrices (see `celo2_direction`).
        orthonormalize: How the columns of a basis are made orthonormal: `cholesky_qr`, or a function like
            `lambda y: jax.numpy.linalg.qr(y)[0]`.
        precision: The precision of the products that turn gradients, parameters and momenta, as in `orthogonalize`.
            Covariances and bases are always made at the highest.
        sharding: How the updates lie on a mesh (see `orthogonalize`). The second moment is placed like them;
            covariances and bases lie on every device, and the matrices of one size are shared out among the devices
            when new bases are made, whose results one all-gather collects.

    Returns:
        An `optax.GradientTransformationExtraArgs`; the inner transformation gets further arguments. Its own state is
        float32: in mode "whiten" the parameters once, and in both modes two n x n squares for a side of length n.
        Updates keep the gradient's dtype. A matrix with a gradient that is not finite gets update zero, its basis and
        second moment stay, and the inner transformation sees zero. Gradients of zero give no update, unless the inner
        transformation does.

    Raises:
        ValueError: If `mode` or `sides` is unknown; in `init`, if the name of a field of the inner state does not say
            whether it turns; in `update`, if a view does not fit its leaf, or `params` is another tree.

    Example:
        >>> from celo2_harness import mix_momenta, normalize_rms, orthogonalize
        >>> tx = optax.chain(in_eigenbasis(mix_momenta((0.95,))), orthogonalize(), normalize_rms())
        >>> params = {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}
        >>> state = tx.init(params)
        >>> state[0].squares["w"][0].basis.shape, state[0].nu["w"].shape
        ((4, 4), (4, 8))

    References:
        SOAP, arXiv 2409.11321; before Newton-Schulz, NVIDIA-NeMo/Emerging-Optimizers and
        KellerJordan/modded-nanogpt (optimization track).
    """
    for name, value, known in (("mode", mode, get_args(Mode)), ("sides", sides, get_args(Sides))):
        if value not in known:
            raise ValueError(f"in_eigenbasis: {name} = {value!r}, expected {' or '.join(map(repr, known))}.")
    inner = optax.with_extra_args_support(inner)
    kept_decay = decay if second_moment_decay is None else second_moment_decay

    def axes_of(view: MatrixView) -> tuple[int, ...]:
        return axes_with_basis(view, sides, max_size) if math.prod(view.shape) else ()

    def pack(treedef: Any, squares: Sequence[tuple[Square, ...]], places: Any) -> Updates:
        """A tree of the squares of every leaf; on a mesh they lie on every device."""
        return bare_structure(treedef).unflatten(_everywhere(squares, places) if places else squares)

    def init_fn(params: Params) -> EigenbasisState:
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        views = matrix_views(params, weight_dimension_numbers)
        places = leaf_shardings(params, sharding)
        axes = list(map(axes_of, views))

        def first_square(view: MatrixView, axis: int) -> Square:
            shape = (*view.viewed[:-2], view.viewed[axis], view.viewed[axis])
            identity = jnp.broadcast_to(jnp.eye(shape[-1], dtype=jnp.float32), shape)
            return Square(jnp.zeros(shape, jnp.float32), identity)

        squares = [tuple(first_square(view, axis) for axis in chosen) for view, chosen in zip(views, axes, strict=True)]
        nu = [
            jnp.zeros(view.shape, jnp.float32) if chosen and mode == "whiten" else optax.MaskedNode()
            for view, chosen in zip(views, axes, strict=True)
        ]
        inner_state = inner.init(_float32(params))
        if mode == "act":
            turned = {path: view.shape for (path, _), view, chosen in zip(flat, views, axes, strict=True) if chosen}
            refuse_unknown_fields(inner_state, turned)
        return EigenbasisState(
            count=jnp.zeros([], jnp.int32),
            inner_state=inner_state,
            squares=pack(treedef, squares, places),
            nu=treedef.unflatten(_placed(nu, places)),
        )

    def whitened(matrices: Turning, u: Array, old: Array, first: Array) -> tuple[Array, Array]:
        """The direction, whitened, and the new second moment."""
        in_basis = lambda x: turn(x, matrices.sides, precision=precision)
        new = kept_decay * old + (1.0 - kept_decay) * jnp.square(in_basis(matrices.gradient))
        # The identity is no basis yet: the first gradient does not enter, and nothing is divided by it.
        nu = jnp.where(matrices.finite & ~first, new, old)
        d = turn(_over_root(in_basis(u), nu, eps), matrices.sides, back=True, precision=precision)
        d = d * (_norm(u) / jnp.maximum(_norm(d), _TINY))
        return jnp.where(matrices.finite, jnp.where(first, u, d), 0.0), nu

    def update_fn(
        updates: Updates, state: EigenbasisState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, EigenbasisState]:
        if params is not None:
            require_like_params("in_eigenbasis", updates, params)
        flat, treedef = jax.tree_util.tree_flatten_with_path(updates)
        paths = [path for path, _ in flat]
        gradients = [x.astype(jnp.float32) for _, x in flat]
        views = matrix_views(updates, weight_dimension_numbers)
        places = leaf_shardings(updates, sharding)
        squares = list(map(unboxed, bare_structure(treedef).flatten_up_to(state.squares)))
        turning = turning_together(views, gradients, squares, axes_of, places or [None] * len(views))

        def turned(matrices: Turning, x: Array) -> list[Array]:
            return [turn(x, matrices.sides, precision=precision)]

        def turned_back(matrices: Turning, x: Array) -> list[Array]:
            return [jnp.where(matrices.finite, turn(x, matrices.sides, back=True, precision=precision), 0.0)]

        (gradients,) = map_turning(lambda matrices, _: [matrices.gradient], turning, gradients)
        weights = None if params is None else _float32(params)
        nu = treedef.flatten_up_to(state.nu)
        if mode == "act":
            in_basis = lambda leaves: treedef.unflatten(map_turning(turned, turning, leaves)[0])
            weights = None if weights is None else in_basis(jax.tree.leaves(weights))
            direction, inner_state = inner.update(in_basis(gradients), state.inner_state, weights, **extra_args)
            (outputs,) = map_turning(turned_back, turning, treedef.flatten_up_to(direction))
        else:
            direction, inner_state = inner.update(
                treedef.unflatten(gradients), state.inner_state, weights, **extra_args
            )
            whiten = functools.partial(whitened, first=state.count == 0)
            outputs, nu = map_turning(whiten, turning, treedef.flatten_up_to(direction), nu)

        turning = [with_gradient(matrices, decay) for matrices in turning]
        if places:
            everywhere = lambda side: Side(side.axis, *_everywhere(side[1:], places))
            turning = [matrices._replace(sides=list(map(everywhere, matrices.sides))) for matrices in turning]
        shapes = {path: view.shape for path, view, of_leaf in zip(paths, views, squares, strict=True) if of_leaf}

        def refresh(inner_state: optax.OptState) -> tuple[list[list[Array]], optax.OptState]:
            bases = next_bases(turning, orthonormalize, places[0].mesh if places else None)
            from_old = [from_old_basis(matrices, new) for matrices, new in zip(turning, bases, strict=True)]

            def function(moments: Mapping[Any, Array]) -> dict[Any, Array]:
                # Where a leaf has no such moment, its gradient stands in.
                leaves = [moments.get(path, g).astype(jnp.float32) for path, g in zip(paths, gradients, strict=True)]
                return dict(zip(paths, map_turning(turned, from_old, leaves)[0], strict=True))

            return bases, map_first_moments(inner_state, shapes, function) if mode == "act" else inner_state

        def keep(inner_state: optax.OptState) -> tuple[list[list[Array]], optax.OptState]:
            return [[side.basis for side in matrices.sides] for matrices in turning], inner_state

        if every == 1:
            bases, inner_state = refresh(inner_state)
        else:
            bases, inner_state = jax.lax.cond(state.count % every == 0, refresh, keep, inner_state)
        outputs = [u.astype(x.dtype) for u, (_, x) in zip(outputs, flat, strict=True)]
        squares = squares_by_leaf(len(flat), turning, bases)
        return treedef.unflatten(outputs), EigenbasisState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            inner_state=inner_state,
            squares=pack(treedef, squares, places),
            nu=treedef.unflatten(_placed(nu, places)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))


def _over_root(x: Array, second_moment: Array, eps: ArrayLike) -> Array:
    """x / sqrt(v + e), up to a factor for each matrix."""
    mean = jnp.mean(second_moment, axis=(-2, -1), keepdims=True)
    # Relative to the mean, so that neither tiny nor huge gradients leave float32.
    return x * jax.lax.rsqrt(second_moment / jnp.maximum(mean, _TINY) + eps)


def _everywhere(tree: Any, places: Sequence[NamedSharding]) -> Any:
    """Arrays that lie on every device of the mesh."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(places[0].mesh, PartitionSpec()))


def _placed(leaves: Sequence[Any], places: Sequence[NamedSharding] | None) -> list[Any]:
    """Leaves that lie like the updates, on a mesh; those that are no arrays have no place."""
    if not places:
        return list(leaves)
    place = lambda x, there: jax.lax.with_sharding_constraint(x, there) if isinstance(x, jax.Array) else x
    return [place(x, there) for x, there in zip(leaves, places, strict=True)]


def _float32(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
