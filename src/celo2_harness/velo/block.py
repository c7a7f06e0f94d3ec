"""VeLO as an Optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from celo2_harness._types import Params, Updates
from celo2_harness.blocks.moments import NOTHING, pack_moments, unpack_moments
from celo2_harness.rule import init_moments, resolve_kernel, resolve_state_dtype
from celo2_harness.velo.config import RULE, VeloTheta
from celo2_harness.velo.leaf import velo_view
from celo2_harness.velo.loss import LossBuffer, init_losses
from celo2_harness.velo.step import StepState, velo_step
from celo2_harness.velo.weights_file import VeloWeights, load_velo_weights


class VeloState(NamedTuple):
    """Steps done, accumulators, the LSTM's state, and the running means of losses.

    All fields but the first and the last are trees like the parameters, or one such tree per decay. `hidden` and `cell`
    hold a vector per leaf; `row` and `col` hold arrays for matrices, `diag` for vectors and scalars; elsewhere stands
    `optax.MaskedNode()`.
    """

    count: Int[Array, ""]
    mu: tuple[Updates, ...]
    nu: Updates
    row: tuple[Updates, ...]
    col: tuple[Updates, ...]
    diag: tuple[Updates, ...]
    hidden: Updates
    cell: Updates
    losses: LossBuffer


def velo(
    weights: VeloWeights | str, *, num_steps: int, state_dtype: Any = "float32", kernel: str = "auto"
) -> optax.GradientTransformationExtraArgs:
    """The update of VeLO: p <- p - 0.001 s RMS(p) d exp(0.001 e).

    An LSTM over all leaves, told of the time, the loss and the accumulators, mixes for each leaf a network of 159
    numbers (30 -> 4 -> 4 -> 3) out of a bank, and gives the factor s; the network makes d and e out of 30 features of
    each parameter. There is no learning rate and no schedule: the rule knows how much of the run is left.

    Every leaf's update depends on every other leaf: give it the whole tree, and mask frozen leaves (zero gradients
    still move parameters).

    Args:
        weights: `VeloWeights`, or what `load_velo_weights` takes; files in the published layout are taken to have the
            configuration of the released weights.
        num_steps: The length of the run in steps. Further steps are possible; for the rule the run is then over.
        state_dtype: The dtype of momenta and second moment, float32 or bfloat16. All other state is float32. Updates
            have the parameter's dtype; all arithmetic is float32.
        kernel: How the small networks are evaluated (see `celo2_direction`).

    Returns:
        An `optax.GradientTransformationExtraArgs`. `update` needs `params`, and `value`, the loss of the batch that the
        gradients are of, reduced over devices like the gradients. NaN entries of gradients count as zero, entries
        beyond +-1000 as +-1000. A loss that is not finite counts as twice the largest running mean of the losses.

    Raises:
        WeightsError: If the weights cannot be loaded.
        ValueError: If `num_steps` is no whole number above 0, or `state_dtype` or `kernel` is unknown; in `update`,
            without `params` or `value`, or if `value` is no scalar.

    Example:
        >>> from celo2_harness.velo import VELO_S, VeloWeights, init_theta
        >>> tx = velo(VeloWeights(init_theta(VELO_S, jax.random.key(0)), VELO_S), num_steps=100)
        >>> params = {"w": jnp.ones((4, 8))}
        >>> loss, grads = jax.value_and_grad(lambda p: jnp.sum(p["w"] ** 2))(params)
        >>> updates, state = tx.update(grads, tx.init(params), params, value=loss)
        >>> updates["w"].shape, state.hidden["w"].shape
        ((4, 8), (64,))

    References:
        arXiv 2211.09760 (VeLO); constants from the published program (class HyperV2).
    """
    weights = load_velo_weights(weights)
    config = weights.config
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"velo: num_steps = {num_steps!r}: expected the length of the run, a whole number >= 1.")
    state_dtype = resolve_state_dtype(state_dtype)
    kernel = resolve_kernel(kernel)

    def init_fn(params: Params) -> VeloState:
        leaves, treedef = jax.tree.flatten(params)
        # Nothing is kept for empty leaves: Orbax refuses arrays of size zero.
        moments = [init_moments(RULE, velo_view(x.shape), state_dtype) if x.size else NOTHING for x in leaves]

        def rows(start: Any) -> Updates:
            start = jnp.asarray(start, jnp.float32)
            return treedef.unflatten([jnp.copy(start) if x.size else optax.MaskedNode() for x in leaves])

        return VeloState(
            count=jnp.zeros([], jnp.int32),
            **pack_moments(treedef, moments, RULE),
            hidden=rows(weights.theta.hidden),
            cell=rows(weights.theta.cell),
            losses=init_losses(),
        )

    def update_fn(
        updates: Updates, state: VeloState, params: Params | None = None, *, value: Any = None, **extra_args: Any
    ) -> tuple[Updates, VeloState]:
        del extra_args
        if params is None:
            raise ValueError(
                "velo: update(updates, state, params, value=loss) was called without params. The rule reads the"
                " parameters; pass the tree that you will apply the updates to."
            )
        if value is None:
            raise ValueError(
                "velo: update(updates, state, params, value=loss) was called without value. The rule watches the"
                " training loss; pass that of the batch that the gradients are of (jax.value_and_grad gives both)."
            )
        if jnp.shape(value) != ():
            raise ValueError(f"velo: value has shape {jnp.shape(value)}, expected the loss, a scalar.")
        gradients, treedef = jax.tree.flatten(updates)
        parameters = treedef.flatten_up_to(params)
        moments = unpack_moments(treedef, state)
        filled = [i for i, g in enumerate(gradients) if g.size]
        if not filled:
            return updates, state._replace(count=jnp.asarray(optax.safe_increment(state.count)))
        stacked = lambda tree: jnp.stack([row for row in treedef.flatten_up_to(tree) if hasattr(row, "shape")])
        new, after, _ = velo_step(
            config,
            VeloTheta(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tuple(weights.theta))),
            [velo_view(gradients[i].shape) for i in filled],
            [gradients[i] for i in filled],
            [parameters[i] for i in filled],
            StepState(
                state.count, [moments[i] for i in filled], stacked(state.hidden), stacked(state.cell), state.losses
            ),
            jnp.asarray(value, jnp.float32),
            num_steps,
            kernel,
        )
        hidden: list[Any] = [optax.MaskedNode()] * len(gradients)
        cell = list(hidden)
        for row, (i, update) in enumerate(zip(filled, new, strict=True)):
            gradients[i] = update.astype(parameters[i].dtype)
            moments[i] = after.moments[row]
            hidden[i], cell[i] = after.hidden[row], after.cell[row]
        return treedef.unflatten(gradients), VeloState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            **pack_moments(treedef, moments, RULE),
            hidden=treedef.unflatten(hidden),
            cell=treedef.unflatten(cell),
            losses=after.losses,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]
