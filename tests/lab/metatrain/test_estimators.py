"""Evolution strategies on problems so small that the estimate can be written down, or the gradient taken exactly.

Letters as in the module: eps the perturbation of a truncation, xi the sum of them since the unroll began, l+ and l- the
losses of the antithetic pair.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import META_CONFIG, assert_trees_close, assert_trees_equal

from celo2_harness.lab.metatrain import InnerProblem, MetaTrainConfig
from celo2_harness.lab.metatrain.estimators import ESTIMATORS, bounded_loss, draw_perturbation, step_weight
from celo2_harness.lab.metatrain.problem import Clock

CONFIG = dataclasses.replace(META_CONFIG, truncation=4, shortest_unroll=6, longest_unroll=6)
WHICH = jnp.array(0)


@dataclasses.dataclass(frozen=True)
class Line:
    """State x, a step is x <- x + b, the loss x before the step."""

    loss_bound: float = math.inf

    def fresh(self, key):
        del key
        return jnp.zeros([])

    def sample(self, data, which, key):
        del data, which, key

    def step(self, theta, state, clock, data, batch):
        del clock, data, batch
        return state + theta["b"], state


@dataclasses.dataclass(frozen=True)
class Stuck(Line):
    """The loss is the state, which stays."""

    def step(self, theta, state, clock, data, batch):
        return state, state


THETA = {"a": jnp.array([0.1, 0.2]), "b": jnp.array(0.3)}


def first_key(key):
    """Of the perturbation, as the module splits the key of an iteration."""
    return jax.random.split(key, 3)[0]


def estimate(name, config, problem, state, key, theta=THETA, data=None):
    return ESTIMATORS[name].estimate(config, problem, theta, state, data, WHICH, key)


def start(name, problem, step=0, length=6):
    state = ESTIMATORS[name].init(CONFIG, problem, THETA, jax.random.key(0))
    return state._replace(clock=Clock(jnp.array(step), jnp.array(length)))


@pytest.mark.parametrize("name", ["pes", "es"])
def test_accumulation_and_a_restart_inside_a_truncation(name):
    assert isinstance(Line(), InnerProblem)
    state, keys = start(name, Line()), [jax.random.key(k) for k in (1, 2)]
    scale = 2 * CONFIG.sigma**2 * CONFIG.truncation
    e1, e2 = (draw_perturbation(CONFIG.sigma, THETA, first_key(k)) for k in keys)

    # First truncation, steps 0 to 3: x+ - x- = 2 e1 t, and xi = e1.
    got = estimate(name, CONFIG, Line(), state, keys[0])
    difference = 2 * e1["b"] * (0 + 1 + 2 + 3)
    assert_trees_close(got.gradient, jax.tree.map(lambda e: difference * e / scale, e1), 1e-5)
    assert not got.restarted and int(got.state.clock.step) == 4
    assert float(got.meta_loss) == pytest.approx(0.3 * 1.5)

    # Second: steps 4 and 5 end the unroll of length 6, with weight xi = e1 + e2; x+ - x- starts at 8 e1. Then a fresh
    # unroll at zero makes two steps, with weight e2 alone.
    got = estimate(name, CONFIG, Line(), got.state, keys[1])
    before = 8 * e1["b"] + (8 * e1["b"] + 2 * e2["b"])
    after = 0 + 2 * e2["b"]
    weight = {"pes": jax.tree.map(jnp.add, e1, e2), "es": e2}[name]
    wanted = jax.tree.map(lambda x, e: (before * x + after * e) / scale, weight, e2)
    assert_trees_close(got.gradient, wanted, 1e-5)
    assert got.restarted and int(got.state.clock.step) == 2
    np.testing.assert_allclose(got.state.unrolls, 2 * (0.3 + e2["b"] * np.array([1, -1])), rtol=1e-5)
    if name == "pes":
        assert_trees_close(got.state.xi, e2, 1e-6)


def test_a_restart_at_the_start_of_a_truncation_drops_the_past():
    key = jax.random.key(5)
    state = start("pes", Line(), step=4, length=4)
    state = state._replace(xi=jax.tree.map(lambda x: x + 7.0, state.xi), unrolls=state.unrolls + 5.0)
    config = dataclasses.replace(CONFIG, shortest_unroll=4, longest_unroll=4)
    got = estimate("pes", config, Line(), state, key)
    eps = draw_perturbation(CONFIG.sigma, THETA, first_key(key))
    scale = 2 * CONFIG.sigma**2 * CONFIG.truncation
    assert_trees_close(got.gradient, jax.tree.map(lambda e: 12 * eps["b"] * e / scale, eps), 1e-5)
    assert_trees_close(got.state.xi, eps, 1e-6)


def test_a_whole_unroll():
    key = jax.random.key(3)
    got = estimate("full", CONFIG, Line(), None, key)
    eps = draw_perturbation(CONFIG.sigma, THETA, first_key(key))
    difference = 2 * eps["b"] * (0 + 1 + 2 + 3 + 4 + 5)
    scale = 2 * CONFIG.sigma**2 * 6
    assert_trees_close(got.gradient, jax.tree.map(lambda e: difference * e / scale, eps), 1e-5)
    assert got.state is None and got.restarted and float(got.meta_loss) == pytest.approx(0.3 * 2.5)


def test_the_end_of_an_unroll_as_meta_loss():
    config = dataclasses.replace(CONFIG, meta_loss="last", last_part=0.5)
    weights = [float(step_weight(config, Clock(jnp.array(t), jnp.array(6)))) for t in range(6)]
    assert weights == [0, 0, 0, 2, 2, 2]  # their mean is 1
    key = jax.random.key(3)
    eps = draw_perturbation(CONFIG.sigma, THETA, first_key(key))
    got = estimate("full", config, Line(), None, key)
    difference = 2 * 2 * eps["b"] * (3 + 4 + 5)
    wanted = jax.tree.map(lambda e: difference * e / (2 * CONFIG.sigma**2 * 6), eps)
    assert_trees_close(got.gradient, wanted, 1e-5)
    # Of steps 0 to 3 only the last counts.
    got = estimate("pes", config, Line(), start("pes", Line()), key)
    wanted = jax.tree.map(lambda e: 2 * 2 * eps["b"] * 3 * e / (2 * CONFIG.sigma**2 * 4), eps)
    assert_trees_close(got.gradient, wanted, 1e-5)


def test_losses_that_are_not_finite_count_as_the_upper_end():
    top = 1.5 * math.log(10)
    got = bounded_loss(jnp.array([-1.0, 0.0, 1.0, 3.4, 3.5, jnp.inf, -jnp.inf, jnp.nan]), top)
    np.testing.assert_allclose(got, [0, 0, 1, 3.4, top, top, 0, top], rtol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_diverged_pair_adds_nothing_and_stays_finite(name):
    @dataclasses.dataclass(frozen=True)
    class Diverged(Line):
        def step(self, theta, state, clock, data, batch):
            return state + theta["b"], jnp.full([], jnp.nan)

    problem = Diverged(loss_bound=3.0)
    state = None if name == "full" else start(name, problem)
    got = estimate(name, CONFIG, problem, state, jax.random.key(1))
    assert not any(np.any(g) for g in jax.tree.leaves(got.gradient))
    assert float(got.meta_loss) == pytest.approx(3.0)


@pytest.mark.parametrize("name", ["pes", "es"])
def test_a_swapped_pair_flips_the_estimate(name):
    def with_losses(losses):
        state = start(name, Stuck())._replace(unrolls=jnp.array(losses))
        return estimate(name, CONFIG, Stuck(), state, jax.random.key(1)).gradient

    gradient = with_losses([1.0, 0.25])
    assert all(np.any(g) for g in jax.tree.leaves(gradient))
    assert_trees_equal(with_losses([0.25, 1.0]), jax.tree.map(jnp.negative, gradient))
    assert not any(np.any(g) for g in jax.tree.leaves(with_losses([1.0, 1.0])))


def test_step_counters_start_at_random_offsets():
    config = dataclasses.replace(MetaTrainConfig(), estimator="pes")
    init = lambda k: ESTIMATORS["pes"].init(config, Line(), THETA, k)
    state = jax.vmap(init)(jax.random.split(jax.random.key(0), 2000))
    assert not any(np.any(x) for x in jax.tree.leaves(state.xi))
    offsets, lengths = np.asarray(state.clock.step), np.asarray(state.clock.length)
    assert lengths.min() >= 100 and lengths.max() <= 2000 and offsets.min() >= 0 and offsets.max() < 2000
    for place in (offsets / 2000, np.log(lengths / 100) / np.log(20)):
        # Of a uniform number: mean 1/2, deviation 0.289; four standard errors of 2000 samples.
        assert abs(place.mean() - 0.5) < 0.026 and abs(place.std() - 0.289) < 0.02


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """Gradient descent with momentum on sum(curvature x^2) / 2; theta holds step size and decay of the momentum.

    The loss is smooth in theta but not linear, and truncations see only what theta does within them.
    """

    loss_bound: float = math.inf

    def fresh(self, key):
        del key
        return {"x": jnp.array([1.0, 1.0]), "m": jnp.zeros(2)}

    def sample(self, data, which, key):
        """Noise of one step's gradient."""
        del data, which
        return 0.02 * jax.random.normal(key, (2,))

    def step(self, theta, state, clock, data, batch):
        del clock
        gradient = data * state["x"] + batch
        m = theta["decay"] * state["m"] + gradient
        loss = 0.5 * jnp.sum(data * jnp.square(state["x"]))
        return {"x": state["x"] - theta["rate"] * m, "m": m}, loss


@dataclasses.dataclass(frozen=True)
class Balance:
    """Theta pays at once and costs later: x <- 0.9 x + theta, loss x - 4 theta.

    Within five steps the loss falls with theta, in the long run it rises: truncated gradients have the wrong sign.
    """

    loss_bound: float = math.inf

    def fresh(self, key):
        del key
        return jnp.zeros([])

    def sample(self, data, which, key):
        del data, which, key

    def step(self, theta, state, clock, data, batch):
        del clock, data, batch
        # Positive throughout, as bounded losses are.
        return 0.9 * state + theta["a"], state - 4.0 * theta["a"] + 20.0


LENGTH, TRUNCATION = 40, 5
CASES = {
    "quadratic": (Quadratic(), {"rate": jnp.array(0.05), "decay": jnp.array(0.5)}, jnp.array([1.0, 0.2])),
    "balance": (Balance(), {"a": jnp.array(0.7)}, None),
}


def exact(problem, theta, data):
    """The gradient of the mean loss of an unroll by backpropagation; noise of the steps left out (its mean is zero and,
    the loss being quadratic in it, it shifts the gradient by less than the tolerance used here)."""

    def meta_loss(theta):
        def step(state, t):
            batch = jax.tree.map(jnp.zeros_like, problem.sample(data, WHICH, jax.random.key(0)))
            return problem.step(theta, state, Clock(t, jnp.array(LENGTH)), data, batch)

        return jnp.mean(jax.lax.scan(step, problem.fresh(jax.random.key(0)), jnp.arange(LENGTH))[1])

    return jax.grad(meta_loss)(theta)


def average(name, problem, theta, data, tasks=20_000):
    """Mean estimate over whole unrolls of many tasks, and its standard error."""
    config = dataclasses.replace(
        CONFIG, truncation=TRUNCATION, shortest_unroll=LENGTH, longest_unroll=LENGTH, sigma=0.003, estimator=name
    )

    @jax.jit
    def unroll(key):
        def one(key):
            init_key, key = jax.random.split(key)
            state = ESTIMATORS[name].init(config, problem, theta, init_key)
            if name == "full":
                return estimate(name, config, problem, None, key, theta, data).gradient
            state = state._replace(clock=Clock(jnp.array(0), jnp.array(LENGTH)))

            def truncation(state, key):
                got = estimate(name, config, problem, state, key, theta, data)
                return got.state, got.gradient

            _, gradients = jax.lax.scan(truncation, state, jax.random.split(key, LENGTH // TRUNCATION))
            return jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)

        return jax.vmap(one)(jax.random.split(key, tasks))

    gradients = unroll(jax.random.key(0))
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
    return mean, jax.tree.map(lambda g: jnp.std(g, axis=0) / math.sqrt(tasks), gradients)


# The other case shows the same, and costs as much again.
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case != "quadratic")) for case in CASES]
)
def test_unbiased_where_truncation_hurts(case):
    """PES and whole unrolls agree with exact meta-gradients; truncated ES does not."""
    problem, theta, data = CASES[case]
    wanted = exact(problem, theta, data)
    bias = {}
    for name in ESTIMATORS:
        mean, error = average(name, problem, theta, data)
        for key, gradient in wanted.items():
            deviation = float(mean[key] - gradient)
            if name != "es":
                # Four standard errors, and 1% for what sigma and the noise add.
                assert abs(deviation) < 4 * float(error[key]) + 0.01 * abs(float(gradient)), (name, key)
                # The standard error is small enough to tell.
                assert float(error[key]) < 0.1 * abs(float(gradient)), (name, key)
            bias[name, key] = abs(deviation)
    for key, gradient in wanted.items():
        assert bias["es", key] > 0.3 * abs(float(gradient)) > 2 * bias["pes", key]
    if case == "balance":
        assert float(average("es", problem, theta, data)[0]["a"]) < 0 < float(wanted["a"])
