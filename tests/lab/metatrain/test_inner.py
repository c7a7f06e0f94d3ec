"""The inner problem of the paper: augmentation, schedules, and both variants judged by the public blocks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, TINY_CONFIG, assert_trees_close, random_theta

import celo2_harness as c2
from celo2_harness.blocks import in_eigenbasis
from celo2_harness.lab.metatrain import InnerProblem, MetaTrainConfig, run_groups
from celo2_harness.lab.metatrain.celo2_rule import LearnedState
from celo2_harness.lab.metatrain.image_problem import ImageProblem, Layer, init_mlp, mlp_loss
from celo2_harness.lab.metatrain.problem import Clock
from celo2_harness.lab.metatrain.unroll import kernel_view, step_size_factor
from celo2_harness.lab.tasks import ImageSets
from celo2_harness.rule import default_view

CONFIG = MetaTrainConfig(rule=TINY_CONFIG, hidden=2, batch=4, widths=("64-3-10",))
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 64), dtype=np.uint8)
DATA = ImageSets(
    images=jnp.asarray(PIXELS),
    labels=jnp.arange(12, dtype=jnp.int32) % 10,
    starts=jnp.array([0, 7], jnp.int32),
    sizes=jnp.array([7, 5], jnp.int32),
)
CLOCK = Clock(jnp.array(0), jnp.array(100))


def problem_of(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return ImageProblem(config, config.networks[0])


def loss_of(unroll, images, labels):
    leaves, treedef = jax.tree.flatten(unroll.params)
    return mlp_loss(treedef.unflatten([leaf * unroll.alpha for leaf in leaves]), images, labels)


def test_mlp_initial_values(key):
    params = init_mlp(key, (64, 32, 10))
    assert [layer.kernel.shape for layer in params] == [(32, 64), (10, 32)]
    assert not any(np.any(layer.bias) for layer in params)
    for layer in params:
        scaled = np.asarray(layer.kernel) * np.sqrt(layer.kernel.shape[1])
        # Cut off at 2 sigma and not rescaled: standard deviation 0.880; 2048 and 320 samples.
        assert np.abs(scaled).max() <= 2.0 and abs(scaled.std() - 0.880) < 0.08


def test_mlp_loss_by_hand():
    """Two layers on one pixel: hidden relu(1, -1) = (1, 0); logits (2, 0, ...)."""
    first = Layer(jnp.zeros((2, 64)).at[:, 0].set(jnp.array([1.0, -1.0])), jnp.zeros(2))
    second = Layer(jnp.zeros((10, 2)).at[0, 0].set(2.0).at[1, 1].set(5.0), jnp.zeros(10))
    loss = mlp_loss((first, second), jnp.zeros((1, 64)).at[0, 0].set(1.0), jnp.zeros(1, int))
    np.testing.assert_allclose(loss, np.log(np.exp(2.0) + 9) - 2, rtol=1e-6)


def test_alpha_changes_the_parameters_but_not_the_loss(key):
    images, labels = DATA.images[:4] / 255.0, DATA.labels[:4]
    plain, unroll = problem_of(augmentation=1.0).fresh(key), problem_of().fresh(key)
    assert isinstance(problem_of(), InnerProblem)
    np.testing.assert_allclose(loss_of(unroll, images, labels), loss_of(plain, images, labels), rtol=1e-5)
    assert_trees_close(plain.params, init_mlp(jax.random.split(key, 3)[0], (64, 3, 10)), 1e-6)
    assert_trees_close(jax.tree.map(lambda x: x * unroll.alpha, unroll.params), plain.params, 1e-5)
    alphas = jax.jit(jax.vmap(lambda k: problem_of().fresh(k).alpha))(jax.random.split(key, 2000))
    logarithms = np.log(np.asarray(alphas)) / math.log(1000.0)
    # Of a number that is uniform in [-1, 1]: mean 0, deviation 0.577; four standard errors of 2000 samples.
    assert np.abs(logarithms).max() <= 1.0001
    assert abs(logarithms.mean()) < 0.052 and abs(logarithms.std() - 0.577) < 0.04


def test_step_sizes_are_log_uniform(key):
    assert float(problem_of().fresh(key).learning_rate) == pytest.approx(1e-3)
    problem = problem_of(inner_learning_rates=(1e-4, 1e-2))
    rates = jax.jit(jax.vmap(lambda k: problem.fresh(k).learning_rate))(jax.random.split(key, 2000))
    place = np.log(np.asarray(rates) / 1e-4) / np.log(100)
    # Of a uniform number: mean 1/2, deviation 0.289; four standard errors of 2000 samples.
    assert abs(place.mean() - 0.5) < 0.026 and abs(place.std() - 0.289) < 0.02


@pytest.mark.slow
def test_schedule_over_an_unroll():
    steps = jnp.arange(200)
    factor = lambda schedule: step_size_factor(
        dataclasses.replace(CONFIG, inner_schedule=schedule), Clock(steps, jnp.full(200, 200))
    )
    wanted = optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 200)(steps)
    np.testing.assert_allclose(factor("warmup_cosine"), wanted, atol=1e-6)
    np.testing.assert_array_equal(factor("constant"), 1.0)
    # It scales what a step does, for both kinds of leaves.
    problem = problem_of(inner_schedule="warmup_cosine", augmentation=1.0)
    unroll = problem.fresh(jax.random.key(0))
    moves = []
    for step in (5, 10):
        new, _ = problem.step(TINY.theta, unroll, Clock(jnp.array(step), jnp.array(200)), DATA, jnp.arange(4))
        moves.append(jax.tree.map(jnp.subtract, new.params, unroll.params))
    assert_trees_close(jax.tree.map(lambda x: 2 * x, moves[0]), moves[1], 1e-2)


def test_batches_come_from_the_set_asked_for(key):
    problem = problem_of(batch=64)
    for which, rows in enumerate((range(7), range(7, 12))):
        assert set(np.asarray(problem.sample(DATA, jnp.array(which), key)).tolist()) == set(rows)


def transposed(params):
    return tuple(Layer(layer.kernel.T, layer.bias) for layer in params)


def blocks_of(config):
    """The same update from the public blocks, on kernels inputs x outputs."""
    direction = c2.celo2_direction(TINY)
    learned = optax.chain(
        in_eigenbasis(direction, mode="act") if config.eigenbasis else direction,
        *([c2.orthogonalize()] if config.variant == "ortho" else []),
        c2.normalize_rms(config.rule.normalization),
    )
    if config.variant == "base":
        return learned
    # Without bias correction and with the floor under the root.
    adam = optax.chain(
        optax.GradientTransformation(
            lambda p: (p * 0, p * 0),
            lambda g, s, p=None: (
                (m := 0.9 * s[0] + 0.1 * g) / jnp.sqrt((v := 0.95 * s[1] + 0.05 * g**2) + 1e-8),
                (m, v),
            ),
        ),
        optax.scale(20.0),
    )

    def init(params):
        return [(learned if p.ndim > 1 else adam).init(p) for p in jax.tree.leaves(params)]

    def update(gradients, state, params):
        leaves, treedef = jax.tree.flatten(gradients)
        pairs = [
            (learned if g.ndim > 1 else adam).update(g, s, p)
            for g, s, p in zip(leaves, state, jax.tree.leaves(params), strict=True)
        ]
        return treedef.unflatten([u for u, _ in pairs]), [s for _, s in pairs]

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
    ("variant", "normalization", "widths", "eigenbasis"),
    [
        pytest.param("ortho", "per_step", (64, 3, 10), False, marks=pytest.mark.slow),
        ("ortho", "per_step", (64, 3, 10), True),
        ("base", "per_step", (64, 3, 10), False),
        # A square kernel: its last axis counts as the larger one.
        pytest.param("ortho", "none", (64, 4, 4, 10), False, marks=pytest.mark.slow),
        pytest.param("base", "clip", (64, 10), False, marks=pytest.mark.slow),
        pytest.param("base", "rolling", (64, 10), False, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_the_blocks(variant, normalization, widths, eigenbasis, key):
    """Two unrolls at once, as estimators run them, against one of them by the blocks."""
    problem = problem_of(
        variant=variant,
        widths=("-".join(map(str, widths)),),
        augmentation=10.0,
        eigenbasis=eigenbasis,
        rule=dataclasses.replace(TINY_CONFIG, normalization=normalization),
    )
    tx = blocks_of(problem.config)
    unrolls = jax.vmap(problem.fresh)(jax.random.split(key))
    assert [isinstance(s, LearnedState) for s in unrolls.state] == [
        leaf.ndim > 2 or variant == "base" for leaf in jax.tree.leaves(unrolls.params)
    ]
    second = jax.tree.map(lambda x: x[1], unrolls)

    @jax.jit
    def both(unrolls, params, state, rows, step):
        images, labels = DATA.images[rows] / 255.0, DATA.labels[rows]
        as_problem = lambda p: second._replace(params=transposed(p))
        loss, gradients = jax.value_and_grad(lambda p: loss_of(as_problem(p), images, labels))(params)
        updates, state = tx.update(gradients, state, params)
        clock = Clock(step, jnp.array(100))
        new, ours = jax.vmap(lambda u: problem.step(TINY.theta, u, clock, DATA, rows))(unrolls)
        return new, ours[1], optax.apply_updates(params, jax.tree.map(lambda u: -1e-3 * u, updates)), state, loss

    params = transposed(second.params)
    state = tx.init(params)
    for t in range(3):
        rows = problem.sample(DATA, jnp.array(0), jax.random.fold_in(key, t))
        unrolls, ours, params, state, loss = both(unrolls, params, state, rows, jnp.array(t))
        np.testing.assert_allclose(ours, loss, rtol=1e-5)
        assert_trees_close(jax.tree.map(lambda x: x[1], unrolls.params), transposed(params), 1e-4)


def test_a_rule_sees_the_fraction_of_its_unroll(key):
    """After a quarter the channel is -1/2, a part of the bias."""
    features = (*TINY_CONFIG.features, "training_fraction")
    theta = random_theta(5, 2)
    timed = problem_of(rule=dataclasses.replace(TINY_CONFIG, features=features))
    at_quarter = theta._replace(w0=theta.w0[:4], b0=theta.b0 - 0.5 * theta.w0[4])
    clock = Clock(jnp.array(5), jnp.array(20))
    stepped = [
        jax.jit(problem.step)(numbers, timed.fresh(key), clock, DATA, jnp.arange(4))[0].params
        for problem, numbers in ((timed, theta), (problem_of(), at_quarter))
    ]
    assert_trees_close(*stepped, 1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_the_view_of_a_transposed_kernel(shape):
    """Factored over the same axes as the default view of inputs x outputs."""
    view, default = kernel_view(shape), default_view(shape[::-1])
    assert view.viewed == shape and view.permutation == (0, 1)
    assert view.factored == tuple(1 - axis for axis in default.factored)


def test_networks_share_the_tasks_of_every_set():
    config = dataclasses.replace(CONFIG, widths=("64-10", "64-3-10"), tasks_per_set=4)
    groups = run_groups(config, 2)
    assert [group.problem.widths for group in groups] == [(64, 10), (64, 3, 10)]
    assert [group.tasks for group in groups] == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert [group.sets for group in groups] == [(0, 0, 1, 1)] * 2
    *_, text = run_groups(dataclasses.replace(config, text_tasks=3, text_width=32, text_layers=2), 2)
    assert (text.problem.model.width, text.problem.model.layers, text.tasks) == (32, 2, (8, 9, 10))
    (single,) = run_groups(MetaTrainConfig(), 4)
    assert single.tasks == tuple(range(32)) and single.sets == tuple(np.repeat(range(4), 8).tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "other"}, "variant = 'other', expected one of ortho, base"),
        ({"estimator": "reinforce"}, "estimator = 'reinforce', expected one of pes, es, full"),
        ({"meta_loss": "median"}, "meta_loss = 'median'"),
        ({"inner_schedule": "linear"}, "inner_schedule = 'linear'"),
        ({"outer_schedule": "step"}, "outer_schedule = 'step'"),
        ({"truncation": 200}, "truncation = 200, expected 1 to shortest_unroll = 100"),
        ({"hidden": 0}, "hidden = 0"),
        ({"text_batch": 0}, "text_batch = 0"),
        ({"text_width": 15}, "text_width = 15, expected an even number"),
        ({"text_tasks": -1}, "text_tasks = -1, expected a finite number, at least 0"),
        ({"iterations": 0}, "iterations = 0"),
        ({"sigma": 0.0}, "sigma = 0.0, expected above 0"),
        ({"sigma": float("nan")}, "sigma = nan"),
        ({"augmentation": 0.5}, "augmentation = 0.5, expected at least 1"),
        ({"last_part": 0.0}, "last_part = 0.0"),
        ({"variant": "base", "eigenbasis": True}, "eigenbasis = True, expected False in other variants than ortho"),
        ({"reference": "muon"}, "reference = muon, expected none, or at least one of instances"),
        ({"inner_learning_rates": (0.1, 0.01)}, "inner_learning_rates = .* in order"),
        ({"longest_unroll": 50}, "longest_unroll = 50, expected at least shortest_unroll = 100"),
        ({"widths": ("784-10",)}, "widths = 784-10: expected layers from 64 inputs"),
        ({"widths": ()}, "cannot be spread over 0 networks"),
        ({"widths": ("64-10", "64-32-7")}, "widths = 64-32-7"),
        ({"widths": ("64-10",) * 3}, "tasks_per_set = 8 cannot be spread over 3 networks"),
        ({"rule": dataclasses.replace(TINY_CONFIG, second_moment_decay=2.0)}, "decays must be numbers in"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        # Past the type checks of the test suite, which would speak first.
        values = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)} | change
        config = object.__new__(MetaTrainConfig)
        for name, value in values.items():
            object.__setattr__(config, name, value)
        config.__post_init__()
