"""The learned direction as an Optax transformation."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from celo2_harness._arguments import run_length
from celo2_harness._trees import require_like_params
from celo2_harness._types import Params, Updates
from celo2_harness.blocks.moments import NOTHING, pack_moments, unpack_moments
from celo2_harness.blocks.small import SMALL, small_batches
from celo2_harness.blocks.views import (
    LeafShardings,
    WeightDimensionNumbers,
    leaf_shardings,
    matrix_views,
    viewed_axes,
)
from celo2_harness.rule import (
    MatrixView,
    Moments,
    Theta,
    at_training_fraction,
    batch_direction,
    init_moments,
    leaf_direction,
    resolve_kernel,
    resolve_state_dtype,
    sees_training_fraction,
)
from celo2_harness.weights import Weights, load_weights


class Celo2State(NamedTuple):
    """Accumulators of the learned rule; every field is a tree like the parameters, or one such tree per decay.

    `row` and `col` hold arrays for matrices, `diag` for vectors; elsewhere stands `optax.MaskedNode()`.
    """

    mu: tuple[Updates, ...]
    nu: Updates
    row: tuple[Updates, ...]
    col: tuple[Updates, ...]
    diag: tuple[Updates, ...]


class TimedCelo2State(NamedTuple):
    """The state of a rule that sees the training fraction: the step count, and the accumulators."""

    count: Int[Array, ""]
    accumulators: Celo2State


# Leaves of one view are traced once, and run as one call each outside of jit.
_leaf_direction = jax.jit(leaf_direction, static_argnums=(1, 2, 6, 8))
_batch_direction = jax.jit(batch_direction, static_argnums=(1, 2, 6))


def _column_parts(view: MatrixView, place: NamedSharding | None) -> int:
    """Returns how many devices split the last axis of the view."""
    return 1 if place is None else math.prod(place.mesh.shape[name] for name in viewed_axes(view, place)[-1])


def moment_shardings(view: MatrixView, place: NamedSharding) -> Moments:
    """Where the accumulators of a leaf lie: split like it, row and column moments along the axes that they keep.

    Returns:
        `Moments` with one `NamedSharding` per field; `row` and `col` hold for matrices, `diag` for vectors.
    """
    axes = viewed_axes(view, place)

    def without(axis: int) -> NamedSharding:
        spec = PartitionSpec(*(names or None for i, names in enumerate(axes) if i != axis))
        return NamedSharding(place.mesh, spec)

    row, col = (place, place) if view.factored is None else map(without, reversed(view.factored))
    return Moments(mu=place, nu=place, row=row, col=col, diag=place)  # type: ignore[arg-type]


def _placed(view: MatrixView, place: NamedSharding | None, moments: Moments) -> Moments:
    """The accumulators, on a mesh placed."""
    if place is None:
        return moments
    # A field may hold several arrays, or none.
    constrain = lambda field, place: jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), field)
    return Moments(*map(constrain, moments, moment_shardings(view, place)))


def celo2_direction(
    weights: Weights | str = "celo2",
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    state_dtype: Any = "float32",
    kernel: str = "auto",
    sharding: LeafShardings = None,
    total_steps: int | None = None,
) -> optax.GradientTransformation:
    """The learned update direction, raw: not orthogonalised, not normalised, not scaled.

    Per parameter, d = f_theta(x / sqrt(mean(x^2) + 1e-9)), with x the 30 features of gradient, parameter and running
    statistics (15 for vectors), the mean over its matrix, and f_theta a network of 347 numbers.

    Args:
        weights: `Weights`, or what `load_weights` takes.
        weight_dimension_numbers: How leaves are seen as matrices: a tree of `optax.contrib.MuonDimensionNumbers`, or a
            function of the updates returning one. None, or None at a leaf: the last two axes, as published.
        state_dtype: The dtype of momenta and second moment, float32 or bfloat16. Row and column moments stay float32.
            Updates have the parameter's dtype; all arithmetic is float32.
        kernel: How the learned rule is computed: "auto" (three Pallas kernels a leaf where JAX runs on one GPU, else
            XLA), "xla" or "pallas" (without a GPU it is interpreted, which is slow and meant for tests).
        sharding: How the updates lie on a mesh (see `orthogonalize`). The state is placed like them, row and column
            moments along the axis that they keep, and the statistics of split leaves take few collectives. It changes
            no number but by rounding.
        total_steps: The length of the run in steps, for weights that see the training fraction. The state then counts
            steps.

    Returns:
        An `optax.GradientTransformation`; `update` needs `params`. A matrix (or vector) whose gradients have all been
        zero gets direction zero. NaN entries of gradients count as zero, infinite ones as +-1000.

    Raises:
        WeightsError: If the weights cannot be loaded, or are no network.
        ValueError: If `state_dtype` or `kernel` is unknown, or `total_steps` is missing for weights that need it; in
            `update`, if `params` is None or another tree than the updates; in `init` and `update`, if a view does not
            fit its leaf.

    Example:
        >>> from celo2_harness import normalize_rms
        >>> tx = optax.chain(celo2_direction("celo2"), normalize_rms(), optax.scale_by_learning_rate(1e-3))
        >>> params = {"w": jnp.ones((4, 8))}
        >>> updates, state = tx.update({"w": jnp.ones((4, 8))}, tx.init(params), params)
        >>> updates["w"].shape
        (4, 8)

    References:
        arXiv 2602.19142 (Celo2), section 3.
    """
    weights = load_weights(weights, kind=Weights)
    config = weights.config
    state_dtype = resolve_state_dtype(state_dtype)
    kernel = resolve_kernel(kernel)
    timed = sees_training_fraction(config)
    if timed and total_steps is None:
        raise ValueError(
            "celo2_direction: total_steps is missing. The weights see the training fraction, so they need the length of"
            " the run in steps."
        )
    steps = run_length(total_steps) if timed else 1

    def init_fn(params: Params) -> Celo2State | TimedCelo2State:
        leaves, treedef = jax.tree.flatten(params)
        views = matrix_views(params, weight_dimension_numbers)
        places = leaf_shardings(params, sharding) or [None] * len(views)
        # Nothing is kept for empty leaves: Orbax refuses arrays of size zero.
        moments = [
            _placed(view, place, init_moments(config, view, state_dtype)) if leaf.size else NOTHING
            for leaf, view, place in zip(leaves, views, places, strict=True)
        ]
        accumulators = Celo2State(**pack_moments(treedef, moments, config))
        return TimedCelo2State(jnp.zeros([], jnp.int32), accumulators) if timed else accumulators

    def update_fn(
        updates: Updates, state: Celo2State | TimedCelo2State, params: Params | None = None
    ) -> tuple[Updates, Celo2State | TimedCelo2State]:
        if params is None:
            raise ValueError(
                "celo2_direction: update(updates, state, params) was called without params. The learned rule reads the"
                " parameters; pass the tree that you will apply the updates to."
            )
        require_like_params("celo2_direction", updates, params)
        theta = Theta(*(jnp.asarray(x, jnp.float32) for x in weights.theta))
        count = None
        if isinstance(state, TimedCelo2State):
            theta = at_training_fraction(theta, config, state.count / steps)
            count, state = jnp.asarray(optax.safe_increment(state.count)), state.accumulators
        gradients, treedef = jax.tree.flatten(updates)
        parameters = treedef.flatten_up_to(params)
        views = matrix_views(updates, weight_dimension_numbers)
        places = leaf_shardings(updates, sharding) or [None] * len(views)
        moments: list[Any] = unpack_moments(treedef, state)
        directions = list(gradients)
        # One after the other, so that their temporaries share memory.
        done = jnp.zeros([], jnp.float32)
        batches, alone = small_batches(views, gradients, places, SMALL)
        for batch in batches:
            pick = lambda x, batch=batch: [x[i] for i in batch.members]
            raws, news, done = _batch_direction(
                theta, config, batch, pick(gradients), pick(parameters), pick(moments), kernel, done
            )
            for i, raw, new in zip(batch.members, raws, news, strict=True):
                directions[i], moments[i] = raw.astype(parameters[i].dtype), _placed(views[i], places[i], new)
        for i in alone:
            view, place = views[i], places[i]
            parts = _column_parts(view, place)
            raw, new, done = _leaf_direction(
                theta, config, view, gradients[i], parameters[i], moments[i], kernel, done, parts
            )
            directions[i], moments[i] = view.invert(raw).astype(parameters[i].dtype), _placed(view, place, new)
        accumulators = Celo2State(**pack_moments(treedef, moments, config))
        return treedef.unflatten(directions), accumulators if count is None else TimedCelo2State(count, accumulators)

    return optax.GradientTransformation(init_fn, update_fn)  # type: ignore[arg-type]
