"""The training loop, as a generator: it computes, and whoever iterates decides what to save, show and stop."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from celo2_harness.lab.tasks import Task
from celo2_harness.sharding import state_shardings

_WARMUP_STEPS = 2
# Steps of a call at most, and calls whose batches are made ahead.
_LONGEST_CALL = 32
_CALLS_AHEAD = 2
# Validation examples that are evaluated at once.
_EVALUATION_BATCH = 16


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
        step: The number of steps taken.
        params: The parameters.
        opt_state: The optimizer's state.
    """

    step: int
    params: Any
    opt_state: Any


class Step(NamedTuple):
    """The state and the measures after a training step.

    Attributes:
        state: The state after the step. Its arrays are given away to the next step: use them before iterating on.
        loss: The training loss of this step's batch, before the update, or of every step since the one before; None at
            step 0. Reading it waits for the step.
        validation_loss: The loss on the held-out examples; None where the step is not one for evaluation.
        seconds: How long a step took; None while compiling, and where it cannot be told.
    """

    state: TrainState
    loss: Float[Array, "..."] | None
    validation_loss: float | None
    seconds: float | None


def init_state(task: Task, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first step.

    Args:
        task: The task.
        tx: The optimizer.
        seed: The seed of the initial parameters; optimizers compared on a seed start from the same ones.

    Returns:
        The state at step 0. Where parameters lie on a mesh, so does the optimizer's state, as `state_shardings` says.
    """
    params = task.init(jax.random.key(seed))

    def init(params: Any) -> Any:
        # Weak types would be lost in a checkpoint and the resumed run would compile another program; so drop them here.
        return jax.tree.map(lambda x: jnp.array(x, dtype=x.dtype), tx.init(params))

    shardings = jax.tree.map(lambda x: x.sharding, params)
    kinds = set(map(type, jax.tree.leaves(shardings)))
    if kinds == {NamedSharding}:
        init = jax.jit(init, out_shardings=state_shardings(tx, params, shardings))
    return TrainState(0, params, init(params))


@partial(jax.jit, static_argnames=("task", "tx"), donate_argnames=("params", "opt_state"))
def train_step(
    task: Task, tx: optax.GradientTransformation, params: Any, opt_state: Any, batch: Any
) -> tuple[Any, Any, Float[Array, ""]]:
    """Takes one step; the parameters and the optimizer's state passed in are given away.

    Args:
        task: The task.
        tx: The optimizer. The loss is passed to it as `value`, for those that watch it.
        params: The parameters.
        opt_state: The optimizer's state.
        batch: A training batch.

    Returns:
        The new parameters, the new optimizer state, and the loss before the update.
    """
    loss, grads = jax.value_and_grad(task.loss)(params, batch)
    updates, opt_state = optax.with_extra_args_support(tx).update(grads, opt_state, params, value=loss)
    return optax.apply_updates(params, updates), opt_state, loss


@partial(jax.jit, static_argnames=("task", "tx"), donate_argnames=("params", "opt_state"))
def train_chunk(
    task: Task, tx: optax.GradientTransformation, params: Any, opt_state: Any, batches: Any
) -> tuple[Any, Any, Float[Array, " steps"]]:
    """Takes several steps in one call, so that a fast device need not wait for the host; see `train_step`.

    Args:
        task: The task.
        tx: The optimizer.
        params: The parameters, which are given away.
        opt_state: The optimizer's state, which is given away.
        batches: The batches of the steps, stacked on the first axis.

    Returns:
        The new parameters, the new optimizer state, and the losses before every update.
    """

    def step(state: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], Array]:
        params, opt_state, loss = train_step(task, tx, *state, batch)
        return (params, opt_state), loss

    (params, opt_state), losses = jax.lax.scan(step, (params, opt_state), batches)
    return params, opt_state, losses


def steps_per_call(*intervals: int) -> int:
    """Returns how many steps are taken in one call: on accelerators as many as divide all intervals, 32 at most.

    On a CPU, where a call costs nothing beside a step, it is one.

    Args:
        *intervals: The numbers of steps after which somebody looks at the run.
    """
    if jax.default_backend() == "cpu":
        return 1
    common = math.gcd(*intervals)
    return max(n for n in range(1, _LONGEST_CALL + 1) if common % n == 0)


@partial(jax.jit, static_argnames="task")
def evaluate(task: Task, params: Any, examples: Any) -> Float[Array, ""]:
    """Returns the mean loss over examples.

    Args:
        task: The task.
        params: The parameters.
        examples: Examples stacked on the first axis, all of one size.

    Returns:
        The mean loss.
    """

    def loss_of_one(example):
        return task.loss(params, jax.tree.map(lambda x: x[None], example))

    return jnp.mean(jax.lax.map(loss_of_one, examples, batch_size=_EVALUATION_BATCH))


def train_steps(
    task: Task,
    tx: optax.GradientTransformation,
    state: TrainState,
    *,
    steps: int,
    seed: int,
    eval_every: int,
    eval_params: Callable[[Any, Any], Any] | None = None,
    per_call: int = 1,
) -> Iterator[Step]:
    """Trains from a state up to a number of steps, yielding after every step, or after every few.

    A state restored from a checkpoint continues with the same batches and the same arithmetic as if it had never been
    away. Evaluation happens before the first step, at multiples of `eval_every`, and after the last step.

    Args:
        task: The task.
        tx: The optimizer.
        state: The state to start from; its arrays are given away.
        steps: The total number of steps, those already taken included.
        seed: The seed of the batches.
        eval_every: The number of steps between evaluations.
        eval_params: From the optimizer's state and the parameters to those that are evaluated, as `averaged_params`;
            None for the parameters themselves.
        per_call: How many steps are taken between two yields, on batches that were brought to the device while the
            steps before were running; a divisor of `eval_every`. The last ones may be fewer. See `steps_per_call`.

    Yields:
        A `Step` per call, and one for step 0 when starting there.
    """
    examples = jax.tree.map(jnp.asarray, task.validation())
    chosen = None if eval_params is None else jax.jit(eval_params)

    def held_out(state: TrainState) -> float:
        params = state.params if chosen is None else chosen(state.opt_state, state.params)
        return float(evaluate(task, params, examples))

    if state.step == 0:
        yield Step(state, None, held_out(state), None)
    first_step, started, in_flight = state.step, None, None
    for count, batch in _batches(task, seed, state.step, steps, per_call):
        take = train_step if per_call == 1 else train_chunk
        params, opt_state, loss = take(task, tx, state.params, state.opt_state, batch)
        state = TrainState(state.step + count, params, opt_state)
        # Wait for the call before this one: an accelerator always has the next one queued, and never more than one.
        if in_flight is not None:
            in_flight.block_until_ready()
        now, in_flight = time.perf_counter(), loss
        warm = state.step - first_step > _WARMUP_STEPS * per_call
        seconds = (now - started) / count if started is not None and warm else None
        started = now
        validation_loss = None
        if state.step % eval_every == 0 or state.step == steps:
            validation_loss = held_out(state)
            # The time until the next step holds an evaluation, so it tells nothing about the step.
            started = in_flight = None
        yield Step(state, loss, validation_loss, seconds)


def _batches(task: Task, seed: int, step: int, steps: int, per_call: int) -> Iterator[tuple[int, Any]]:
    """The number of steps and the batches of every call; those of several steps are stacked, and made ahead."""
    if per_call == 1:
        yield from ((1, task.batch(seed, k)) for k in range(step, steps))
        return

    def make(start: int) -> tuple[int, Any]:
        batches = [task.batch(seed, k) for k in range(start, min(start + per_call, steps))]
        return len(batches), jax.device_put(jax.tree.map(lambda *x: np.stack(x), *batches))

    with ThreadPoolExecutor(1) as pool:
        ahead: deque[Future[tuple[int, Any]]] = deque()
        for start in range(step, steps, per_call):
            ahead.append(pool.submit(make, start))
            if len(ahead) > _CALLS_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
