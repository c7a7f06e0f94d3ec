"""The loop: it learns, it evaluates when it should, and it is deterministic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo2_harness._trees import tree_bytes
from celo2_harness.lab.training.loop import evaluate, init_state, steps_per_call, train_step, train_steps


def test_the_loss_falls(task):
    tx = optax.adamw(1e-2)
    losses = [
        p.validation_loss for p in train_steps(task, tx, init_state(task, tx, 0), steps=60, seed=0, eval_every=30)
    ]
    start, middle, end = [loss for loss in losses if loss is not None]
    assert start > 5 and end < middle < 2.5


def test_evaluation_at_the_start_at_intervals_and_at_the_end(task):
    tx = optax.sgd(1e-2)
    progress = list(train_steps(task, tx, init_state(task, tx, 0), steps=7, seed=0, eval_every=3))
    assert [p.state.step for p in progress] == list(range(8))
    assert [p.state.step for p in progress if p.validation_loss is not None] == [0, 3, 6, 7]
    assert [p.state.step for p in progress if p.loss is None] == [0]


def test_evaluation_is_the_mean_over_all_examples(task):
    params = task.init(jax.random.key(0))
    examples = jnp.asarray(task.validation()[:7])
    by_hand = np.mean([float(task.loss(params, example[None])) for example in examples])
    # Sums of float32 in another order.
    assert float(evaluate(task, params, examples)) == pytest.approx(by_hand, rel=1e-6)


def test_one_seed_gives_one_start_for_all_optimizers(task):
    first, second = init_state(task, optax.sgd(1.0), 3), init_state(task, optax.adam(1.0), 3)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_optimizers_that_watch_the_loss_get_it(task):
    seen = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()), lambda updates, state, params=None, *, value, **extra: (updates, value)
    )
    state = init_state(task, seen, 0)
    _, opt_state, loss = train_step(task, seen, state.params, state.opt_state, task.batch(0, 0))
    assert opt_state == loss


def test_sizes_count_bytes():
    assert tree_bytes({"a": jnp.zeros((2, 3), jnp.bfloat16), "b": [jnp.zeros((), jnp.int32)]}) == 16


def test_several_steps_in_one_call_are_the_same_steps(task):
    """As on an accelerator: losses, parameters and evaluations are those of single steps, up to rounding."""
    tx = optax.adamw(1e-2)
    run = lambda per_call: list(
        train_steps(task, tx, init_state(task, tx, 0), steps=14, seed=0, eval_every=6, per_call=per_call)
    )
    one, several = run(1), run(3)
    assert [p.state.step for p in several] == [0, 3, 6, 9, 12, 14]
    losses = np.concatenate([np.reshape(p.loss, -1) for p in several[1:]])
    np.testing.assert_allclose(losses, [p.loss for p in one[1:]], rtol=1e-5)
    at = lambda progress: {p.state.step: p.validation_loss for p in progress if p.validation_loss is not None}
    assert at(several) == pytest.approx(at(one), rel=1e-5)


def test_how_many_steps_a_call_takes(monkeypatch):
    assert steps_per_call(50, 10) == 1  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [steps_per_call(*x) for x in ((50, 10), (50, 50), (7, 2), (64,))] == [10, 25, 1, 32]
