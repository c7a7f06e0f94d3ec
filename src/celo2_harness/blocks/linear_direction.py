"""A learned linear rule as an Optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from celo2_harness._arguments import run_length
from celo2_harness._types import Params, Updates
from celo2_harness.blocks.small import map_batches
from celo2_harness.blocks.views import (
    LeafShardings,
    WeightDimensionNumbers,
    leaf_shardings,
    matrix_views,
    zeros_like_params,
)
from celo2_harness.rule import MatrixView, linear_leaf_direction, resolve_state_dtype
from celo2_harness.weights import LinearWeights, load_weights


class LinearState(NamedTuple):
    """Step count, per decay a momentum of every parameter, and a second moment of each."""

    count: Int[Array, ""]
    mu: tuple[Updates, ...]
    nu: Updates


# Leaves of one view are traced once, and run as one call each outside of jit.
_leaf_direction = jax.jit(linear_leaf_direction, static_argnums=(1, 2))


def linear_direction(
    weights: LinearWeights | str = "celo2_linear",
    total_steps: int | None = None,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    state_dtype: Any = "float32",
    sharding: LeafShardings = None,
) -> optax.GradientTransformation:
    """A weighted sum of gradient and momenta, each whitened, with weights that change over the run.

    m_k <- b_k m_k + (1 - b_k) g,  v <- b v + (1 - b) g^2;
    u = sum over k of w_k exp(s_k (t - 1/2)) c_k / RMS(c_k),  c_k = m_k / (v / mean(v) + floor)^power,  m_0 = g,

    with t the fraction of the run, and means over one matrix or vector. The direction does not depend on the unit of
    the gradient. The bundled rule was searched inside of `in_eigenbasis(..., mode="act")`, where second moments belong
    to the columns of the basis.

    Args:
        weights: `LinearWeights`, or what `load_weights` takes.
        total_steps: The length of the run in steps; after it t stays at 1. None: t is 1 from the start, which is the
            rule at the end of a run, with the longest average. It suits a constant learning rate.
        weight_dimension_numbers: How leaves are seen as matrices (see `celo2_direction`).
        state_dtype: The dtype of momenta and second moment, float32 or bfloat16. Arithmetic is float32.
        sharding: How the updates lie on a mesh (see `orthogonalize`). Leaves that are not split share batches.

    Returns:
        An `optax.GradientTransformation` whose state is one more than the number of momenta times the parameters; three
        for the bundled rule. Updates keep the gradient's dtype. A matrix whose gradients have all been zero gets
        direction zero; one whose gradient (or its square) is not finite too, and its state stays.

    Raises:
        WeightsError: If the weights cannot be loaded, or are no linear rule.
        ValueError: If `state_dtype` is unknown, or `total_steps` is below one; in `update`, if a view does not fit its
            leaf.

    Example:
        >>> tx = linear_direction("celo2_linear", total_steps=100)
        >>> params = {"w": jnp.ones((4, 8))}
        >>> updates, state = tx.update({"w": jnp.ones((4, 8))}, tx.init(params))
        >>> len(state.mu), round(float(updates["w"][0, 0]), 3)  # at the start little but the gradient
        (2, 0.354)
    """
    weights = load_weights(weights, kind=LinearWeights)
    config = weights.config
    dtype = resolve_state_dtype(state_dtype)
    steps = None if total_steps is None else run_length(total_steps)

    def init_fn(params: Params) -> LinearState:
        momenta = tuple(zeros_like_params(params, dtype) for _ in config.momentum_decays)
        return LinearState(jnp.zeros([], jnp.int32), momenta, zeros_like_params(params, dtype))

    def update_fn(updates: Updates, state: LinearState, params: Params | None = None) -> tuple[Updates, LinearState]:
        del params
        gradients, treedef = jax.tree.flatten(updates)
        views = matrix_views(updates, weight_dimension_numbers)
        fraction = jnp.ones([]) if steps is None else jnp.minimum(state.count / steps, 1.0)

        def step(view: MatrixView, lengths: Any, gradient: Array, nu: Array, *mu: Array) -> list[Array]:
            u, mu, nu = _leaf_direction(weights.theta, config, view, gradient, mu, nu, fraction, lengths)
            return [u.astype(gradient.dtype), nu.astype(dtype), *(m.astype(dtype) for m in mu)]

        places = leaf_shardings(updates, sharding)
        moments = map(treedef.flatten_up_to, (state.nu, *state.mu))
        directions, nu, *mu = map(treedef.unflatten, map_batches(step, views, places, gradients, *moments))
        return directions, LinearState(jnp.asarray(optax.safe_increment(state.count)), tuple(mu), nu)

    return optax.GradientTransformation(init_fn, update_fn)  # type: ignore[arg-type]
