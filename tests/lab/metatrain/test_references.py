"""Meta-losses relative to Muon: by hand, on the same starts and batches, and through a stop."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import META_CONFIG, assert_trees_close, assert_trees_equal

import celo2_harness as c2
from celo2_harness.lab.metatrain import TaskGroup, init_metatrain, run_metatrain, with_references
from celo2_harness.lab.metatrain.estimators import ESTIMATORS, draw_perturbation
from celo2_harness.lab.metatrain.image_problem import ImageProblem, mlp_loss
from celo2_harness.lab.metatrain.muon_rule import Muon
from celo2_harness.lab.metatrain.problem import Clock

CONFIG = dataclasses.replace(
    META_CONFIG, truncation=6, shortest_unroll=6, longest_unroll=6, instances=3, reference="muon"
)
THETA = {"b": jnp.array(0.3)}


@dataclasses.dataclass(frozen=True)
class Ramp:
    """The loss rises from 1 by b a step, under the reference by 1/2."""

    rule: object = None
    loss_bound: float = math.inf

    def fresh(self, key):
        del key
        return jnp.ones([])

    def sample(self, data, which, key):
        del data, which, key

    def step(self, theta, state, clock, data, batch):
        del clock, data, batch
        return state + (theta["b"] if self.rule is None else 0.5), state


@dataclasses.dataclass(frozen=True)
class Chance(Ramp):
    """The loss is a number of the start plus one of the batch, whatever the rule does."""

    def fresh(self, key):
        return 1.0 + jax.random.uniform(key)

    def sample(self, data, which, key):
        return jax.random.uniform(key)

    def step(self, theta, state, clock, data, batch):
        return state, state + batch


def started(config, problem):
    """The estimator's state of one task, its references measured."""
    groups = (TaskGroup(problem, (0,), (0,)),)
    state = init_metatrain(config, 1, theta=THETA, groups=groups)
    (task,) = with_references(config, state, None, groups).tasks
    return jax.tree.map(lambda x: x[0], task)


def test_a_whole_unroll_by_hand():
    config = dataclasses.replace(CONFIG, estimator="full", meta_loss="last", last_part=0.5)
    task, key = started(config, Ramp()), jax.random.key(3)
    # Losses of the reference: 1, 1.5, 2, 2.5, 3, 3.5.
    np.testing.assert_allclose(task.instances.references, [3.0] * 3, rtol=1e-6)
    got = ESTIMATORS["full"].estimate(config, Ramp(), THETA, task, None, jnp.array(0), key)
    eps = float(draw_perturbation(config.sigma, THETA, jax.random.split(key, 3)[0])["b"])
    # Each of the last three steps counts twice; l+ - l- is 2 eps t.
    assert float(got.gradient["b"]) == pytest.approx(
        2 * 2 * eps * (3 + 4 + 5) * eps / 3.0 / (2 * config.sigma**2 * 6), rel=1e-4
    )
    assert float(got.meta_loss) == pytest.approx((1 + 0.3 * 4) / 3.0, rel=1e-5)
    assert_trees_equal(got.state, task)


def test_a_truncation_by_hand():
    config = dataclasses.replace(CONFIG, truncation=4)
    task, key = started(config, Ramp()), jax.random.key(3)
    np.testing.assert_allclose(task.instances.references, [2.25] * 3, rtol=1e-6)
    task = task._replace(clock=Clock(jnp.array(0), jnp.array(6)))
    got = ESTIMATORS["pes"].estimate(config, Ramp(), THETA, task, None, jnp.array(0), key)
    eps = float(draw_perturbation(config.sigma, THETA, jax.random.split(key, 3)[0])["b"])
    wanted = 2 * eps * (0 + 1 + 2 + 3) * eps / 2.25 / (2 * config.sigma**2 * 4)
    assert float(got.gradient["b"]) == pytest.approx(wanted, rel=1e-4)
    assert float(got.meta_loss) == pytest.approx((1 + 0.3 * 1.5) / 2.25, rel=1e-5)


@pytest.mark.parametrize("estimator", ["pes", "full"])
def test_the_reference_has_the_same_start_and_the_same_batches(estimator):
    """Where rules make no difference the relative loss of every unroll is one; unrolls differ."""
    config = dataclasses.replace(CONFIG, estimator=estimator)
    state = started(config, Chance())
    references = np.asarray(state.instances.references)
    assert len(set(references.tolist())) == 3
    if estimator == "pes":  # the first iteration ends an unroll that began in the middle
        state = state._replace(clock=Clock(jnp.array(6), jnp.array(6)))
    for k in range(4):
        got = ESTIMATORS[estimator].estimate(config, Chance(), THETA, state, None, jnp.array(0), jax.random.key(k))
        assert float(got.meta_loss) == pytest.approx(1.0, abs=1e-5)
        state = got.state


def test_muon_is_the_blocks(inner_data, key):
    config = dataclasses.replace(CONFIG, variant="ortho", widths=("64-3-10",), augmentation=1.0)
    problem = ImageProblem(config, (64, 3, 10), Muon(config.adam_factor))
    unroll, images = problem.fresh(key), inner_data.images
    hidden = optax.chain(c2.mix_momenta((0.95,)), c2.orthogonalize(), c2.normalize_rms(), optax.scale(-1e-3))
    state = hidden.init([layer.kernel.T for layer in unroll.params])
    for t in range(3):
        rows = problem.sample(images, jnp.array(0), jax.random.fold_in(key, t))
        pixels, labels = images.images[rows] / 255.0, images.labels[rows]
        gradients = jax.grad(mlp_loss)(unroll.params, pixels, labels)
        updates, state = hidden.update([layer.kernel.T for layer in gradients], state)
        kernels = [layer.kernel.T + u for layer, u in zip(unroll.params, updates, strict=True)]
        unroll, _ = problem.step(None, unroll, Clock(jnp.array(t), jnp.array(6)), images, rows)
        assert_trees_close([layer.kernel.T for layer in unroll.params], kernels, 1e-5)


@pytest.mark.slow
def test_a_run_judged_by_its_end_goes_on_after_a_stop(data, tmp_path):
    """References are measured once and lie in the checkpoint."""
    config = dataclasses.replace(
        CONFIG, variant="ortho", truncation=3, shortest_unroll=5, longest_unroll=9, meta_loss="last", iterations=4
    )
    every = {"log_every": 1, "checkpoint_every": 1}
    whole = run_metatrain(config, data, tmp_path / "whole", **every)
    seen = []
    stop = {"on_progress": lambda now: seen.append(now.step), "should_stop": lambda: seen[-1] == 2}
    assert run_metatrain(config, data, tmp_path / "run", **every, **stop) is None
    again = run_metatrain(config, data, tmp_path / "run", **every, resume=True)
    assert_trees_equal(whole.theta, again.theta)
    losses = lambda name: [
        line["meta_loss"]
        for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == "progress"
    ]
    assert losses("whole") == losses("run") and len(losses("run")) == 4
