"""How much of a training step is the optimizer's."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from celo2_harness.lab.bench.timing import interleave
from celo2_harness.lab.tasks import Task

GRADIENT = "gradient alone"


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
        optimizers: By name.
        rounds: Timed steps of each, in turn.
        seed: Of parameters and batches.
        on_round: Called with the number of rounds done.

    Returns:
        Seconds per round by name; the entry `GRADIENT` is the step without an optimizer.
    """
    batch = task.batch(seed, 0)
    params = task.init(jax.random.key(seed))
    gradient = jax.jit(jax.value_and_grad(task.loss))
    calls: dict[str, Callable[[], Any]] = {GRADIENT: lambda: gradient(params, batch)}
    calls |= {name: _Trainer(task, tx, jax.tree.map(jax.numpy.copy, params), batch) for name, tx in optimizers.items()}
    return interleave(calls, rounds, on_round=on_round)


class _Trainer:
    """Takes training steps from where the last one ended."""

    def __init__(self, task: Task, tx: optax.GradientTransformation, params: Any, batch: Any):
        def step(params: Any, state: Any) -> tuple[Any, Any]:
            loss, gradients = jax.value_and_grad(task.loss)(params, batch)
            updates, state = optax.with_extra_args_support(tx).update(gradients, state, params, value=loss)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.params, self.state = params, jax.jit(tx.init)(params)

    def __call__(self) -> Any:
        self.params, self.state = self.step(self.params, self.state)
        return self.params, self.state
