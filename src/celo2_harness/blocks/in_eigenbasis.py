"""SOAP's basis around any direction: the eigenvectors of the gradients' covariance."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Int

from celo2_harness._trees import bare_structure, require_like_params, unboxed
from celo2_harness._types import Params, Updates
from celo2_harness.blocks.views import LeafShardings, WeightDimensionNumbers, leaf_shardings, matrix_views
from celo2_harness.rule import MatrixView
from celo2_harness.rule.eigenbasis import Orthonormalize, cholesky_qr, matmul, next_basis, transposed

Mode = Literal["whiten", "act"]
Sides = Literal["one", "both"]

# Fields of states by what they are, in mode "act". Momenta are vectors and turn with the basis; second moments belong
# to the columns of the basis, one by one, and stay. States say so by Optax's own names.
FIRST_MOMENTS = ("mu", "trace", "m1", "m2")
SECOND_MOMENTS = ("nu", "diag", "row", "col", "sum_of_squares")
_TINY = 1e-30


class EigenbasisState(NamedTuple):
    """Step count, state of the inner transformation, and per side a covariance and a basis for every matrix.

    `covariance` and `basis` hold one tree per side, the shorter one first, with an array (batch axes, n, n) for a
    matrix that is n long on that side; `nu` is the second moment of the turned gradient (mode "whiten"). Elsewhere
    stands `optax.MaskedNode()`.
    """

    count: Int[Array, ""]
    inner_state: optax.OptState
    covariance: tuple[Updates, ...]
    basis: tuple[Updates, ...]
    nu: Updates


class _Side(NamedTuple):
    """A side of the matrices of one leaf that has a basis: the axis of the viewed array, and what is kept for it."""

    axis: int
    covariance: Array
    basis: Array


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
        decay: b, of the covariance.
        sides: "one" for the short side of every matrix, "both" for Q_L^T G Q_R, as SOAP has it.
        every: Steps from one basis to the next. The covariance follows in every step.
        mode: "whiten" or "act".
        second_moment_decay: c, of the second moment in the basis. None: `decay`.
        eps: Part of the mean second moment that is added under the root. Directions in which there is nothing but
            rounding are left small by it.
        max_size: Longest side that gets a basis.
        weight_dimension_numbers: How leaves are seen as matrices (see `celo2_direction`).
        orthonormalize: How the columns of a basis are made orthonormal: `cholesky_qr`, or a function like
            `lambda y: jax.numpy.linalg.qr(y)[0]`.
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
        ValueError: Unknown `mode` or `sides`; in `init`, a field of the inner state whose name does not say whether it
            turns; in `update`, a view that does not fit its leaf, or `params` of another tree than the updates.

    Example:
        >>> from celo2_harness import mix_momenta, normalize_rms, orthogonalize
        >>> tx = optax.chain(in_eigenbasis(mix_momenta((0.95,))), orthogonalize(), normalize_rms())
        >>> params = {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}
        >>> state = tx.init(params)
        >>> state[0].basis[0]["w"].shape, state[0].nu["w"].shape
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
    num_sides = len(_SIDES[sides])

    def axes_of(leaf: Any, view: MatrixView) -> tuple[int, ...]:
        return sides_with_basis(view, sides, max_size) if leaf.size else ()

    def pack(treedef: Any, leaves: Sequence[Sequence[Array]]) -> tuple[Updates, ...]:
        """One tree per side, of a list of arrays per leaf."""
        bare = bare_structure(treedef)
        return tuple(
            bare.unflatten([arrays[k] if k < len(arrays) else optax.MaskedNode() for arrays in leaves])
            for k in range(num_sides)
        )

    def init_fn(params: Params) -> EigenbasisState:
        leaves, treedef = jax.tree.flatten(params)
        views = matrix_views(params, weight_dimension_numbers)
        axes = [axes_of(leaf, view) for leaf, view in zip(leaves, views, strict=True)]

        def squares(make: Callable[[int], Array]) -> tuple[Updates, ...]:
            def of(view: MatrixView, axis: int) -> Array:
                n = view.viewed[axis]
                return jnp.broadcast_to(make(n), (*view.viewed[:-2], n, n))

            return pack(
                treedef, [[of(view, axis) for axis in turned] for view, turned in zip(views, axes, strict=True)]
            )

        nu = [
            jnp.zeros(view.shape, jnp.float32) if turned and mode == "whiten" else optax.MaskedNode()
            for view, turned in zip(views, axes, strict=True)
        ]
        inner_state = inner.init(_float32(params))
        if mode == "act":
            paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
            _refuse_unknown_fields(
                inner_state, {path: view.shape for path, view, turned in zip(paths, views, axes, strict=True) if turned}
            )
        places = leaf_shardings(params, sharding)
        return EigenbasisState(
            count=jnp.zeros([], jnp.int32),
            inner_state=inner_state,
            covariance=_everywhere(squares(lambda n: jnp.zeros((n, n), jnp.float32)), places),
            basis=_everywhere(squares(lambda n: jnp.eye(n, dtype=jnp.float32)), places),
            nu=treedef.unflatten(_placed(nu, places)),
        )

    def update_fn(
        updates: Updates, state: EigenbasisState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, EigenbasisState]:
        if params is not None:
            require_like_params("in_eigenbasis", updates, params)
        leaves, treedef = jax.tree.flatten(updates)
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(updates)[0]]
        views = matrix_views(updates, weight_dimension_numbers)
        places = leaf_shardings(updates, sharding)
        bare = bare_structure(treedef)
        covariances, bases = (
            [[unboxed(part) for part in bare.flatten_up_to(tree)] for tree in trees]
            for trees in (state.covariance, state.basis)
        )
        turned = [
            [_Side(axis, covariances[k][i], bases[k][i]) for k, axis in enumerate(axes_of(leaf, view))]
            for i, (leaf, view) in enumerate(zip(leaves, views, strict=True))
        ]
        with_basis = [i for i, parts in enumerate(turned) if parts]
        gradients = [leaf.astype(jnp.float32) for leaf in leaves]
        viewed, finite = {}, {}
        for i in with_basis:
            x = views[i].apply(gradients[i])
            # A square that overflows would be as bad in the covariance as one that is not a number.
            finite[i] = jnp.isfinite(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
            viewed[i] = jnp.where(finite[i], x, 0.0)
            gradients[i] = views[i].invert(viewed[i])

        def in_basis(tree: Sequence[Array], back: bool = False) -> list[Array]:
            return [
                view.invert(_turn(view.apply(x), parts, back)) if parts else x
                for x, view, parts in zip(tree, views, turned, strict=True)
            ]

        wide = None if params is None else _float32(params)
        if mode == "act" and wide is not None:
            wide = treedef.unflatten(in_basis(treedef.flatten_up_to(wide)))
        seen = in_basis(gradients) if mode == "act" else gradients
        direction, inner_state = inner.update(treedef.unflatten(seen), state.inner_state, wide, **extra_args)
        outputs = treedef.flatten_up_to(direction)

        nu = treedef.flatten_up_to(state.nu)
        if mode == "act":
            outputs = in_basis(outputs, back=True)
        else:
            first = state.count == 0
            for i in with_basis:
                square = jnp.square(_turn(viewed[i], turned[i]))
                old = views[i].apply(nu[i])
                # The identity is no basis yet, so the first gradient does not enter.
                second = jnp.where(finite[i] & ~first, kept_decay * old + (1.0 - kept_decay) * square, old)
                u = views[i].apply(outputs[i])
                d = _turn(_whiten(_turn(u, turned[i]), second, eps), turned[i], back=True)
                d = d * (_norm(u) / jnp.maximum(_norm(d), _TINY))
                outputs[i] = views[i].invert(jnp.where(first, u, d))
                nu[i] = views[i].invert(second)
        for i in with_basis:
            outputs[i] = views[i].invert(jnp.where(finite[i], views[i].apply(outputs[i]), 0.0))
            seen_by = [_with_gradient(side, viewed[i], finite[i], decay) for side in turned[i]]
            turned[i] = [_Side(side.axis, *_everywhere(side[1:], places)) for side in seen_by]

        def refresh(inner_state: optax.OptState) -> tuple[list[list[Array]], optax.OptState]:
            new = _next_bases(turned, orthonormalize, places[0].mesh if places else None)
            if mode == "act":
                turns = {
                    paths[i]: (
                        views[i],
                        [
                            s._replace(basis=matmul(transposed(s.basis), q))
                            for s, q in zip(turned[i], new[i], strict=True)
                        ],
                    )
                    for i in with_basis
                }
                inner_state = _carry_first_moments(inner_state, turns)
            return new, inner_state

        def keep(inner_state: optax.OptState) -> tuple[list[list[Array]], optax.OptState]:
            return [[side.basis for side in parts] for parts in turned], inner_state

        if every == 1:
            new, inner_state = refresh(inner_state)
        else:
            new, inner_state = jax.lax.cond(state.count % every == 0, refresh, keep, inner_state)
        outputs = [u.astype(leaf.dtype) for u, leaf in zip(outputs, leaves, strict=True)]
        return treedef.unflatten(outputs), EigenbasisState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            inner_state=inner_state,
            covariance=pack(treedef, [[side.covariance for side in parts] for parts in turned]),
            basis=pack(treedef, new),
            nu=treedef.unflatten(_placed(nu, places)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


# Of the short and the long side, which may have a basis.
_SIDES = {"one": (0,), "both": (0, 1)}


def sides_with_basis(view: MatrixView, sides: Sides, max_size: int) -> tuple[int, ...]:
    """The axes of the viewed array (-2 rows, -1 columns) that get a basis, the shorter one first; none for vectors."""
    if not view.is_matrix:
        return ()
    rows, columns = view.viewed[-2:]
    by_length = (-2, -1) if rows <= columns else (-1, -2)
    return tuple(by_length[k] for k in _SIDES[sides] if view.viewed[by_length[k]] <= max_size)


def _turn(x: Array, sides: Sequence[_Side], back: bool = False) -> Array:
    """Coordinates in the bases of the sides: Q^T x along the rows, x Q along the columns; or back from them."""
    for side in sides:
        basis = transposed(side.basis) if back else side.basis
        x = matmul(transposed(basis), x) if side.axis == -2 else matmul(x, basis)
    return x


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))


def _whiten(x: Array, second_moment: Array, eps: ArrayLike) -> Array:
    """x / sqrt(v), up to a factor for each matrix."""
    mean = jnp.mean(second_moment, axis=(-2, -1), keepdims=True)
    # Relative to the mean, so that neither tiny nor huge gradients leave float32.
    return x * jax.lax.rsqrt(second_moment / jnp.maximum(mean, _TINY) + eps)


def _with_gradient(side: _Side, gradient: Array, finite: Array, decay: ArrayLike) -> _Side:
    """The side with a covariance that has seen the gradient."""
    x = gradient if side.axis == -2 else transposed(gradient)
    new = decay * side.covariance + (1.0 - decay) * matmul(x, transposed(x))
    return side._replace(covariance=jnp.where(finite, new, side.covariance))


def _next_bases(
    turned: Sequence[Sequence[_Side]], orthonormalize: Orthonormalize, mesh: Mesh | AbstractMesh | None
) -> list[list[Array]]:
    """The next basis of every side; squares of one size go together, whichever leaves they come from."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for i, parts in enumerate(turned):
        for k, side in enumerate(parts):
            groups.setdefault(side.basis.shape[-1], []).append((i, k))
    new = [[side.basis for side in parts] for parts in turned]
    for n, members in groups.items():
        sides = [turned[i][k] for i, k in members]
        covariance = jnp.concatenate([side.covariance.reshape(-1, n, n) for side in sides])
        basis = jnp.concatenate([side.basis.reshape(-1, n, n) for side in sides])
        if mesh is None:
            found = next_basis(covariance, basis, orthonormalize)
        else:
            found = _shared_out(covariance, basis, orthonormalize, mesh)
        start = 0
        for (i, k), side in zip(members, sides, strict=True):
            count = math.prod(side.basis.shape[:-2])
            new[i][k] = found[start : start + count].reshape(side.basis.shape)
            start += count
    return new


def _shared_out(covariance: Array, basis: Array, orthonormalize: Orthonormalize, mesh: Mesh | AbstractMesh) -> Array:
    """`next_basis` of a stack of which every device does a part."""
    count = len(basis)
    # Up to a multiple of the devices by repetition: zeros would take the most passes.
    parts = jnp.arange(count + -count % mesh.size) % count
    spec = PartitionSpec(mesh.axis_names)
    function = lambda covariance, basis: next_basis(covariance, basis, orthonormalize)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    found = jax.jit(mapped)(covariance[parts], basis[parts])
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec()))[:count]


def _everywhere(tree: Any, places: Sequence[NamedSharding] | None) -> Any:
    """Arrays that lie on every device of the mesh, if there is one."""
    if not places:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(places[0].mesh, PartitionSpec()))


def _placed(leaves: Sequence[Any], places: Sequence[NamedSharding] | None) -> list[Any]:
    """Leaves that lie like the updates; those that are no arrays have no place."""
    if not places:
        return list(leaves)
    place = lambda x, there: jax.lax.with_sharding_constraint(x, there) if isinstance(x, jax.Array) else x
    return [place(x, there) for x, there in zip(leaves, places, strict=True)]


def _field(path: Any, suffix: Any) -> str | None:
    """The name of the innermost field that holds a leaf of state, before the path of its parameter begins."""
    before = path[: len(path) - len(suffix)]
    names = [entry.name for entry in before if isinstance(entry, jax.tree_util.GetAttrKey)]
    return names[-1] if names else None


def _owner(path: Any, shape: Any, shapes: Mapping[Any, Any]) -> Any:
    """The path of the parameter that a leaf of state belongs to; None if there is none."""
    ends = (path[start:] for start in range(len(path) + 1))
    return next((end for end in ends if shapes.get(end) == shape), None)


def _refuse_unknown_fields(inner_state: optax.OptState, shapes: Mapping[Any, Any]) -> None:
    for path, x in jax.tree_util.tree_flatten_with_path(inner_state)[0]:
        owner = _owner(path, x.shape, shapes)
        if owner is not None and _field(path, owner) not in FIRST_MOMENTS + SECOND_MOMENTS:
            raise ValueError(
                f"in_eigenbasis: inner_state{jax.tree_util.keystr(path)} of shape {x.shape} belongs to a matrix, but"
                f" its name does not say whether it turns with the basis. Call the field {' or '.join(FIRST_MOMENTS)}"
                f" (a first moment, which turns) or {' or '.join(SECOND_MOMENTS)} (a second moment, which stays)."
            )


def _carry_first_moments(
    inner_state: optax.OptState, turns: Mapping[Any, tuple[MatrixView, Sequence[_Side]]]
) -> optax.OptState:
    """The inner state with its first moments in the coordinates of the new basis."""
    shapes = {path: view.shape for path, (view, _) in turns.items()}

    def carry(path: Any, x: Array) -> Array:
        owner = _owner(path, x.shape, shapes)
        if owner is None or _field(path, owner) not in FIRST_MOMENTS:
            return x
        view, sides = turns[owner]
        return view.invert(_turn(view.apply(x.astype(jnp.float32)), sides)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(carry, inner_state)


def _float32(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
