"""One step of the learned rule on one leaf, or on a batch of leaves: gradients in, directions and accumulators out."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from celo2_harness.rule.accumulators import Moments, clip_gradient, mean_square, update_moments
from celo2_harness.rule.batches import Batch, stackable
from celo2_harness.rule.channels import ChannelGroup, channel_groups, input_scales
from celo2_harness.rule.config import RuleConfig, Theta
from celo2_harness.rule.features import leaf_statistics
from celo2_harness.rule.network import FirstLayer, Head, first_layer, first_output, network
from celo2_harness.rule.view import MatrixView


def _network_in_tiles(
    view: MatrixView, theta: Theta, layer: FirstLayer, group: ChannelGroup, head: Head = first_output
) -> Float[Array, "..."]:
    # Imported where it is used: Pallas takes a good part of the package's import time.
    from celo2_harness.rule.kernel import network_in_tiles

    return network_in_tiles(view, theta, layer, group, head)


# How the network alone is evaluated: name -> function. All agree to rounding.
KERNELS = {"xla": network, "pallas": _network_in_tiles}

# What users may ask for.
KERNEL_NAMES = ("auto", *KERNELS)


class LeafResult(NamedTuple):
    """The raw direction in the leaf's view (float32, to be subtracted), the new accumulators, and a number that exists
    only once the direction does (see `leaf_direction`)."""

    direction: Float[Array, "..."]
    moments: Moments
    done: Float[Array, ""]


class BatchResult(NamedTuple):
    """Per leaf the raw direction (float32, to be subtracted) and the new accumulators; `done` as in `LeafResult`."""

    directions: list[Float[Array, "..."]]
    moments: list[Moments]
    done: Float[Array, ""]


def resolve_kernel(name: str) -> str:
    """Checks the name of a kernel.

    Args:
        name: The name.

    Returns:
        The name.

    Raises:
        ValueError: If it is not in `KERNEL_NAMES`.
    """
    if name not in KERNEL_NAMES:
        raise ValueError(f"kernel = {name!r}: expected one of {', '.join(KERNEL_NAMES)}.")
    return name


def kernel_here(name: str = "auto") -> str:
    """Returns what "auto" stands for: "pallas" where JAX runs on one GPU, or "xla".

    On several devices XLA would gather what is split for a kernel, which it cannot split.

    Args:
        name: The name of a kernel; others than "auto" stand for themselves.
    """
    if name != "auto":
        return name
    alone = jax.default_backend() == "gpu" and jax.device_count() == 1
    return "pallas" if alone and importlib.util.find_spec("jax.experimental.pallas.triton") is not None else "xla"


def leaf_direction(
    theta: Theta,
    config: RuleConfig,
    view: MatrixView,
    gradient: Float[Array, "*leaf"],
    parameter: Float[Array, "*leaf"],
    moments: Moments,
    kernel: str = "auto",
    after: Float[Array, ""] | float = 0.0,
    column_parts: int = 1,
) -> LeafResult:
    """Updates the accumulators with the gradient, then evaluates the network on them.

    A matrix (or vector) of the leaf whose gradients have all been zero so far gets direction zero: the network would
    otherwise turn its biases and the parameter feature into an update.

    Leaves can be put in order: with the `done` of one leaf as the `after` of the next, a compiler has to finish the
    first before it starts the second, and their temporaries share memory. It changes no number.

    Args:
        theta: The network's numbers (float32 arrays, traced ones too).
        config: What theta was trained with.
        view: How the leaf is seen as matrices.
        gradient: Any float dtype; clipped to [-1000, 1000], NaN entries count as zero.
        parameter: The leaf before this step.
        moments: The accumulators before this step.
        kernel: How it is computed, out of `KERNEL_NAMES`: by XLA, or in three Pallas kernels; see `kernel_here`.
        after: The `done` of the leaf that goes before this one; the kernels need no order.
        column_parts: Devices that the last axis of the view is split over. XLA communicates once per output of a
            reduction with many outputs, if it runs along a split axis; so the devices' parts are summed first.

    Returns:
        A `LeafResult`; its accumulators have the dtypes of `moments`.
    """

    def by_xla(theta: Theta, gradient: Array, parameter: Array, moments: Moments, after: Any) -> LeafResult:
        # `done` is never negative, but no compiler knows.
        gradient = clip_gradient(jnp.where(after < 0.0, jnp.zeros_like(gradient), gradient))
        new = update_moments(config, view, gradient, moments)
        seen = _seen(config, view, gradient, new)
        raw, done = _direction(theta, config, view, seen, gradient, parameter, new, kernel, column_parts)
        return LeafResult(raw, _rounded(new, moments), done)

    def in_tiles(theta: Theta, gradient: Array, parameter: Array, moments: Moments, after: Any) -> LeafResult:
        lift = view.apply
        viewed = Moments(
            tuple(map(lift, moments.mu)),
            lift(moments.nu),
            moments.row,
            moments.col,
            None if moments.diag is None else tuple(map(lift, moments.diag)),
        )
        raw, new = _direction_in_tiles(theta, config, view, lift(gradient), lift(parameter), viewed)
        new = new._replace(
            mu=tuple(map(view.invert, new.mu)),
            nu=view.invert(new.nu),
            diag=None if new.diag is None else tuple(map(view.invert, new.diag)),
        )
        return LeafResult(raw, new, jnp.asarray(after, jnp.float32))

    # Neither axes of a batch that are factored, nor statistics of several matrices together, fit the kernels.
    choose = _choose(kernel, in_tiles if stackable(view) else by_xla, by_xla)
    return choose(Theta(*theta), gradient, parameter, moments, jnp.asarray(after, jnp.float32))


def _choose(kernel: str, in_tiles: Callable[..., Any], by_xla: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a kernel. What "auto" chooses on a GPU may yet be compiled for another device."""
    if kernel == "auto" and kernel_here() == "pallas":
        return lambda *arrays: jax.lax.platform_dependent(*arrays, cuda=in_tiles, default=by_xla)
    return in_tiles if kernel == "pallas" else by_xla


def _direction_in_tiles(*arguments: Any, **options: Any) -> tuple[Array, Moments]:
    # Imported where it is used, as above.
    from celo2_harness.rule.kernel_direction import direction_in_tiles

    return direction_in_tiles(*arguments, **options, interpret=jax.default_backend() != "gpu")


def batch_direction(
    theta: Theta,
    config: RuleConfig,
    batch: Batch,
    gradients: Sequence[Float[Array, "..."]],
    parameters: Sequence[Float[Array, "..."]],
    moments: Sequence[Moments],
    kernel: str = "auto",
    after: Float[Array, ""] | float = 0.0,
) -> BatchResult:
    """What `leaf_direction` does for each leaf of a batch, with one evaluation of the network.

    Args:
        theta: The network's numbers, as in `leaf_direction`.
        config: What theta was trained with.
        batch: The leaves' views, and how they are stacked.
        gradients: Per leaf.
        parameters: Per leaf.
        moments: Per leaf.
        kernel: As in `leaf_direction`.
        after: The `done` of what goes before.

    Returns:
        A `BatchResult`; directions have their leaves' shapes.
    """

    def by_xla(theta: Theta, gradient: Array, parameter: Array, stacked: Moments) -> LeafResult:
        gradient = clip_gradient(gradient)
        stacked = update_moments(config, batch.view, gradient, stacked, batch.lengths)
        seen = _any_momentum(config, batch.view, stacked)
        raw, done = _direction(theta, config, batch.view, seen, gradient, parameter, stacked, kernel, 1, batch.lengths)
        return LeafResult(raw, stacked, done)

    def in_tiles(theta: Theta, gradient: Array, parameter: Array, stacked: Moments) -> LeafResult:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), stacked)
        raw, new = _direction_in_tiles(theta, config, batch.view, gradient, parameter, wide, lengths=batch.lengths)
        return LeafResult(raw, new, jnp.asarray(after, jnp.float32))

    first, *others = [x.astype(jnp.float32) for x in gradients]
    gradient = batch.stack([jnp.where(after < 0.0, jnp.zeros_like(first), first), *others])
    parameter = batch.stack([x.astype(jnp.float32) for x in parameters])
    choose = _choose(kernel, in_tiles, by_xla)
    raw, stacked, done = choose(Theta(*theta), gradient, parameter, _stack_moments(batch, moments))
    raw, stacked = batch.cut((raw, stacked))
    return BatchResult(batch.unstack(raw), list(map(_rounded, _unstack_moments(batch, stacked), moments)), done)


def _stack_moments(batch: Batch, moments: Sequence[Moments]) -> Moments:
    """The accumulators of a batch, out of those of its leaves."""
    short, long = (1, 0) if batch.tall else (0, 1)

    def per_decay(field: str, stack: Callable[[Sequence[Array]], Array]) -> Any:
        fields = [getattr(m, field) for m in moments]
        return None if fields[0] is None else tuple(map(stack, zip(*fields, strict=True)))

    return Moments(
        mu=per_decay("mu", batch.stack),
        nu=batch.stack([m.nu for m in moments]),
        row=per_decay("row", lambda rows: batch.stack_thin(rows, short)),
        col=per_decay("col", lambda columns: batch.stack_thin(columns, long)),
        diag=per_decay("diag", batch.stack),
    )


def _unstack_moments(batch: Batch, moments: Moments) -> list[Moments]:
    """The accumulators of the leaves of a batch, out of those of the batch, which are cut in pieces."""
    short, long = (1, 0) if batch.tall else (0, 1)

    def per_leaf(field: Any, unstack: Callable[[Any], list[Array]]) -> list[Any]:
        return [None] * len(batch.views) if field is None else list(zip(*map(unstack, field), strict=True))

    return list(
        map(
            Moments,
            per_leaf(moments.mu, batch.unstack),
            batch.unstack(moments.nu),  # type: ignore[arg-type]
            per_leaf(moments.row, lambda x: batch.unstack_thin(x, short)),
            per_leaf(moments.col, lambda x: batch.unstack_thin(x, long)),
            per_leaf(moments.diag, batch.unstack),
        )
    )


def _rounded(new: Moments, old: Moments) -> Moments:
    """The new accumulators with the dtypes of the old ones."""
    return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


def _direction(
    theta: Theta,
    config: RuleConfig,
    view: MatrixView,
    seen: Array,
    gradient: Array,
    parameter: Array,
    moments: Moments,
    kernel: str,
    column_parts: int = 1,
    lengths: np.ndarray | None = None,
) -> tuple[Array, Array]:
    """The raw direction from the accumulators of now, and `done`."""

    def evaluate(gradient: jax.Array, parameter: jax.Array, moments: Moments) -> tuple[jax.Array, jax.Array]:
        statistics = leaf_statistics(view, gradient, parameter, moments, lengths=lengths)
        groups = channel_groups(config, view, statistics)
        scales = input_scales(view, groups, column_parts=column_parts, lengths=lengths)
        evaluate = KERNELS.get(kernel, network)
        raw = evaluate(view, theta, first_layer(theta, view, groups, scales), groups[0])
        return raw if seen.size == 1 else jnp.where(seen, raw, 0.0), jnp.max(scales[0][0])

    def nothing(*_: object) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(view.viewed, jnp.float32), jnp.zeros([], jnp.float32)

    # The branch also keeps XLA from fusing the accumulators into what reads them: then old and new ones would both be
    # needed, and on CPU the hidden units would become planes (docs/research/negative-results.md).
    return jax.lax.cond(jnp.any(seen), evaluate, nothing, gradient, parameter, moments)


def _any_momentum(config: RuleConfig, view: MatrixView, moments: Moments) -> Array:
    """Returns whether each matrix (or vector) has had a gradient, by its slowest momentum.

    It is nonzero as soon as one gradient was; the factored moments have a floor and cannot tell.
    """
    slowest = moments.mu[max(range(len(moments.mu)), key=config.momentum_decays.__getitem__)]
    # A sum costs a third of jnp.any on a CPU.
    return jnp.sum(jnp.abs(view.apply(slowest)), axis=view.axes, keepdims=True) > 0.0


def _seen(config: RuleConfig, view: MatrixView, gradient: Array, moments: Moments) -> Array:
    """Returns what `_any_momentum` tells, with less to read where the gradient's mean squares are known."""
    momentum = lambda moments: _any_momentum(config, view, moments)
    if view.factored is None or view.factored[1] < len(view.viewed) - 2:
        return momentum(moments)
    # Nearly always this step's gradient is enough, whose mean squares the factored moments have asked for already.
    now = jnp.sum(mean_square(view, gradient), axis=view.axes, keepdims=True) > 0.0
    return jax.lax.cond(jnp.all(now), lambda moments: now, momentum, moments)
