"""What optimizers cost in time and memory: their updates, whole training steps, and Newton-Schulz.

A busy machine hits all alike, since calls alternate (A B C A B C) and ratios are taken within a round.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib._muon import orthogonalize_via_newton_schulz

from celo2_harness._trees import tree_bytes
from celo2_harness.lab.tasks import Task
from celo2_harness.lab.training.loop import init_state, train_step
from celo2_harness.rule import newton_schulz
from celo2_harness.rule.newton_schulz import COEFFICIENTS

GRADIENT = "gradient alone"
"""The name of a training step without an optimizer."""


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, tuple[float, ...]]:
    """Times every call once per round, in turn.

    Args:
        calls: What to time, by name; what they return is waited for.
        rounds: The number of rounds, after a first one that is not timed and warms caches and allocators.
        clock: A function that returns the time in seconds.
        on_round: Called with the number of rounds done.

    Returns:
        The seconds of each round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            jax.block_until_ready(call())
            if done:
                seconds[name].append(clock() - start)
        on_round(done)
    return {name: tuple(values) for name, values in seconds.items()}


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


class StepCost(NamedTuple):
    """The costs of an update of an optimizer on a tree.

    Attributes:
        seconds: The time of each round; empty where the update is only compiled.
        temporary_bytes: The memory beyond arguments and results, as XLA plans it.
        state_bytes: The size of the optimizer state.
        parameter_bytes: The size of the parameters.
        trace_seconds: The time in Python, tracing and lowering.
        compile_seconds: The time in XLA.
    """

    seconds: tuple[float, ...]
    temporary_bytes: int
    state_bytes: int
    parameter_bytes: int
    trace_seconds: float
    compile_seconds: float


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
        optimizers: The optimizers by name.
        shapes: The parameters, a tree of `jax.ShapeDtypeStruct`.
        rounds: The number of timed calls of each; 0 compiles only and allocates nothing.
        seed: The seed of parameters and first gradients.
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
    """Returns `tx.update` with a loss, for optimizers that watch it."""
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


def measure_training(
    task: Task,
    optimizers: Mapping[str, optax.GradientTransformation],
    *,
    rounds: int,
    seed: int = 0,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, tuple[float, ...]]:
    """Times whole training steps (loss, gradient, update), and the loss and gradient without an update.

    Args:
        task: What is trained.
        optimizers: The optimizers by name.
        rounds: The number of timed steps of each, in turn.
        seed: The seed of parameters and batches.
        on_round: Called with the number of rounds done.

    Returns:
        The seconds of each round by name; the entry `GRADIENT` is the step without an optimizer.
    """
    batch, params = task.batch(seed, 0), task.init(jax.random.key(seed))
    gradient = jax.jit(jax.value_and_grad(task.loss))

    def stepper(tx: optax.GradientTransformation) -> Callable[[], Any]:
        state = init_state(task, tx, seed)

        def step() -> Any:
            nonlocal state
            params, opt_state, _ = train_step(task, tx, state.params, state.opt_state, batch)
            state = state._replace(params=params, opt_state=opt_state)
            return params

        return step

    calls = {GRADIENT: lambda: gradient(params, batch), **{name: stepper(tx) for name, tx in optimizers.items()}}
    return interleave(calls, rounds, on_round=on_round)


class NewtonSchulzCost(NamedTuple):
    """The costs of Newton-Schulz here and in Optax.

    Attributes:
        ours: The seconds of each round of this package's.
        optax: The seconds of each round of Optax's.
        difference: The relative difference of the results, ||ours - optax's|| / ||optax's||.
    """

    ours: tuple[float, ...]
    optax: tuple[float, ...]
    difference: float


def measure_newton_schulz(
    shape: tuple[int, int], *, rounds: int, seed: int = 0, on_round: Callable[[int], None] = lambda _: None
) -> NewtonSchulzCost:
    """Times five quintic iterations on a normal float32 matrix.

    Args:
        shape: Rows and columns.
        rounds: The number of timed calls of each.
        seed: The seed of the matrix.
        on_round: Called with the number of rounds done.

    Returns:
        The times and the relative difference of the results.
    """
    x = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    triples = COEFFICIENTS["quintic"]
    ours = jax.jit(newton_schulz)
    theirs = jax.jit(lambda x: orthogonalize_via_newton_schulz(x, jnp.asarray(triples[0]), len(triples)))
    a, b = ours(x), theirs(x)
    seconds = interleave({"ours": lambda: ours(x), "optax": lambda: theirs(x)}, rounds, on_round=on_round)
    return NewtonSchulzCost(seconds["ours"], seconds["optax"], float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)))
