"""The loop: it learns, it evaluates when it should, and it is deterministic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo2_harness._trees import tree_bytes
from celo2_harness.lab.training.loop import evaluate, init_state, train_step, train_steps


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
