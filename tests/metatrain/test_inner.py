"""The inner loop: augmentation, both variants, and what a fresh task looks like."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, TINY_CONFIG, assert_trees_close

import celo2_harness as c2
from celo2_harness.metatrain import MetaTrainConfig
from celo2_harness.metatrain.inner import fresh_unroll, inner_step
from celo2_harness.rule import Moments
from celo2_harness.tasks.image_mlp import init_mlp, mlp_loss

CONFIG = MetaTrainConfig(rule=TINY_CONFIG, hidden=2, batch=4, widths=(64, 3, 10))


def batch(key):
    return jax.random.uniform(key, (4, 64)), jnp.arange(4)


def test_alpha_changes_the_parameters_but_not_the_loss(key):
    losses = []
    for augmentation in (1.0, 1000.0):
        config = dataclasses.replace(CONFIG, augmentation=augmentation)
        unroll, clock = fresh_unroll(config, key)
        assert 1 / augmentation <= float(unroll.alpha) <= augmentation and int(clock.step) == 0
        scaled_back = jax.tree.map(lambda p: p * unroll.alpha, unroll.params)  # noqa: B023
        losses.append(float(mlp_loss(scaled_back, *batch(key))))
        wanted = jax.tree.map(lambda p: p / unroll.alpha, init_mlp(jax.random.split(key, 3)[0], config.widths))  # noqa: B023
        assert_trees_close(unroll.params, wanted, 1e-6)
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_alpha_and_length_are_log_uniform():
    draw = jax.jit(jax.vmap(lambda k: (lambda unroll, clock: (unroll.alpha, clock.length))(*fresh_unroll(CONFIG, k))))
    alpha, length = draw(jax.random.split(jax.random.key(0), 2000))
    assert length.min() >= 100 and length.max() <= 2000
    for values, low, high in ((alpha, 1e-3, 1e3), (length, 100, 2000)):
        place = np.log(np.asarray(values) / low) / np.log(high / low)
        # Of a uniform number: mean 1/2, deviation 0.289; four standard errors of 2000 samples.
        assert abs(place.mean() - 0.5) < 0.026 and abs(place.std() - 0.289) < 0.02


def blocks_of(config):
    """The same update from the public blocks."""
    learned = c2.scale_by_celo2(TINY, orthogonalize=config.variant == "ortho")
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


@pytest.mark.parametrize("variant", ["ortho", "base"])
def test_steps_are_those_of_the_blocks(variant, key):
    config = dataclasses.replace(CONFIG, variant=variant, augmentation=10.0)
    tx = blocks_of(config)
    unroll, _ = fresh_unroll(config, key)
    assert [isinstance(s, Moments) for s in unroll.state] == [
        leaf.ndim > 1 or variant == "base" for leaf in jax.tree.leaves(unroll.params)
    ]

    @jax.jit
    def both(unroll, params, state, images, labels):
        loss, gradients = jax.value_and_grad(
            lambda p: mlp_loss(jax.tree.map(lambda x: x * unroll.alpha, p), images, labels)
        )(params)
        updates, state = tx.update(gradients, state, params)
        new, ours = inner_step(config, TINY.theta, unroll, images, labels)
        return new, ours, optax.apply_updates(params, jax.tree.map(lambda u: -1e-3 * u, updates)), state, loss

    params, state = unroll.params, tx.init(unroll.params)
    for t in range(3):
        images, labels = batch(jax.random.fold_in(key, t))
        unroll, ours, params, state, loss = both(unroll, params, state, images, labels)
        np.testing.assert_allclose(ours, loss, rtol=1e-5)
        assert_trees_close(unroll.params, params, 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truncation": 200}, "truncation = 200 must not exceed shortest_unroll"),
        ({"hidden": 0}, "hidden = 0"),
        ({"iterations": 0}, "iterations = 0"),
        ({"sigma": 0.0}, "sigma > 0"),
        ({"sigma": float("nan")}, "sigma > 0"),
        ({"augmentation": 0.5}, "augmentation >= 1"),
        ({"longest_unroll": 50}, "longest_unroll"),
        ({"widths": (784, 10)}, "widths = "),
        ({"rule": dataclasses.replace(TINY_CONFIG, normalization="rolling")}, "normalization = 'rolling'"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
