"""The cost of `tx.update`, jitted, with gradients and state donated."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from celo2_harness.lab.bench.timing import interleave


class StepCost(NamedTuple):
    """What one optimizer costs on one tree.

    Attributes:
        seconds: Per round; empty where only compiled.
        temporary_bytes: Memory beyond arguments and results, as XLA plans it.
        state_bytes: Of the optimizer state.
        parameter_bytes: Of the parameters.
        trace_seconds: Python and lowering.
        compile_seconds: XLA.
    """

    seconds: tuple[float, ...]
    temporary_bytes: int
    state_bytes: int
    parameter_bytes: int
    trace_seconds: float
    compile_seconds: float


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays or shapes of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure_updates(
    optimizers: Mapping[str, optax.GradientTransformation],
    shapes: Any,
    *,
    rounds: int,
    seed: int = 0,
    on_compiled: Callable[[str], None] = lambda _: None,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, StepCost]:
    """Compiles every optimizer's update, then times them in turn.

    The loss that some optimizers ask for is the number 1. Gradients and state are donated, so that an update may
    overwrite them; the updates serve as the gradients of the next call, which costs the same and allocates nothing.

    Args:
        optimizers: What to measure, by name.
        shapes: Tree of `jax.ShapeDtypeStruct`, the parameters.
        rounds: Timed calls of each; 0 compiles only and allocates nothing.
        seed: Of parameters and first gradients.
        on_compiled: Called with every name once it is compiled.
        on_round: Called with the number of rounds done.

    Returns:
        The costs by name.
    """
    costs: dict[str, StepCost] = {}
    calls: dict[str, Callable[[], Any]] = {}
    params = _normal(shapes, seed, 0.02) if rounds else None
    for name, tx in optimizers.items():
        state_shapes = jax.eval_shape(tx.init, shapes)
        started = time.perf_counter()
        lowered = jax.jit(with_loss(tx), donate_argnums=(0, 1)).lower(shapes, state_shapes, shapes)
        traced = time.perf_counter()
        compiled = lowered.compile()
        compile_seconds = time.perf_counter() - traced
        memory = compiled.memory_analysis()
        costs[name] = StepCost(
            (),
            memory.temp_size_in_bytes if memory is not None else 0,
            tree_bytes(state_shapes),
            tree_bytes(shapes),
            traced - started,
            compile_seconds,
        )
        if rounds:
            calls[name] = _Stepper(compiled, _normal(shapes, seed + 1, 1e-3), jax.jit(tx.init)(params), params)
        on_compiled(name)
    for name, seconds in interleave(calls, rounds, on_round=on_round).items():
        costs[name] = costs[name]._replace(seconds=seconds)
    return costs


def with_loss(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """`tx.update` with a loss, for optimizers that watch it."""
    update = optax.with_extra_args_support(tx).update
    return lambda updates, state, params: update(updates, state, params, value=jnp.ones([]))


class _Stepper:
    """Calls a compiled update on its own last results."""

    def __init__(self, compiled: Any, updates: Any, state: Any, params: Any):
        self.compiled, self.updates, self.state, self.params = compiled, updates, state, params

    def __call__(self) -> Any:
        self.updates, self.state = self.compiled(self.updates, self.state, self.params)
        return self.updates, self.state


def _normal(shapes: Any, seed: int, scale: float) -> Any:
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = lambda key, x: (scale * jax.random.normal(key, x.shape, jnp.float32)).astype(x.dtype)
    return treedef.unflatten(list(map(draw, keys, leaves)))
