"""Rules made by hand as a start: they are the blocks that they stand for, and leave room to learn."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import META_CONFIG, assert_trees_close, assert_trees_equal, normal

import celo2_harness as c2
from celo2_harness import harness
from celo2_harness.blocks import in_eigenbasis
from celo2_harness.lab.metatrain import MetaTrainConfig, init_metatrain, run_metatrain, starting_theta
from celo2_harness.rule import CELO2_CONFIG, default_view, init_moments, leaf_direction

CONFIG = MetaTrainConfig()
SOAP = MetaTrainConfig(eigenbasis=True)
DECAYS = CELO2_CONFIG.momentum_decays
SHAPES = {"layer": {"kernel": (6, 8)}}


def weights_of(source, config=CONFIG):
    theta = config.learned.init(jax.random.key(3))
    return c2.Weights(jax.tree.map(np.asarray, starting_theta(config, theta, source)), config.rule)


def gradients_of(key, count=5):
    """Of several steps, each of another size."""
    return [jax.tree.map(lambda x, k=k: 3.0**k * x, normal(jax.random.fold_in(key, k), SHAPES)) for k in range(count)]


def updates_of(tx, gradients, params):
    state, updates = tx.init(params), []
    for gradient in gradients:
        update, state = jax.jit(tx.update)(gradient, state, params)
        updates.append(update)
    return updates


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def mixed(gradients, weights):
    """`mix_momenta` whose weights are divided by the RMS of what they weigh, in float64 beforehand."""
    momenta, ahead, tables = [0.0] * len(DECAYS), [], []
    for gradient in gradients:
        g = np.asarray(gradient["layer"]["kernel"], np.float64)
        momenta = [b * m + (1.0 - b) * g for b, m in zip(DECAYS, momenta, strict=True)]
        parts = [w / rms(x) for w, x in zip(weights, (g, *momenta), strict=True)]
        # The scale of a direction does not matter after Newton-Schulz.
        ahead.append(sum(parts[1:]) / sum(parts))
        tables.append([part / sum(parts[1:]) for part in parts[1:]])
    at = lambda column: lambda count: jnp.asarray(column, jnp.float32)[count]
    return c2.mix_momenta(DECAYS, [at([row[k] for row in tables]) for k in range(len(DECAYS))], at(ahead))


@pytest.mark.parametrize("weights", [(1.0, 1.9, 0.76, 0.0), (0.05, 0.3, 0.0, 0.65)])
def test_the_preset_is_muon_of_normalised_momenta(weights, key):
    """`celo2_ortho` with the theta is `mix_momenta` and Newton-Schulz, the network's channels being normalised."""
    source = "muon" if weights[0] == 1.0 else "muon:" + ",".join(map(str, weights))
    gradients, params = gradients_of(key), normal(key, SHAPES)
    preset = harness.build("celo2_ortho", 1.0, weights=weights_of(source))
    chain = optax.chain(mixed(gradients, weights), c2.orthogonalize(), c2.normalize_rms(), optax.scale(-1.0))
    assert_trees_close(updates_of(preset, gradients, params), updates_of(chain, gradients, params), 1e-4)


def test_one_momentum_is_muon_itself(key):
    """A single channel leaves nothing for its normalisation to do."""
    gradients, params = gradients_of(key), normal(key, SHAPES)
    preset = harness.build("celo2_ortho", 1.0, weights=weights_of("muon:0,1"))
    momentum = c2.mix_momenta((0.9,), nesterov=False)
    chain = optax.chain(momentum, c2.orthogonalize(), c2.normalize_rms(), optax.scale(-1.0))
    assert_trees_close(updates_of(preset, gradients, params), updates_of(chain, gradients, params), 1e-4)


class OverRMSState(NamedTuple):
    """The momenta and the second moment."""

    mu: Any
    nu: Any


def over_rms(weights):
    """The weighed sum of gradient and momenta over the root of the second moment, each normalised."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return OverRMSState((zeros,) * len(DECAYS), zeros)

    def update(gradient, state, params=None):
        mean = lambda b, old, new: jax.tree.map(lambda x, y: b * x + (1.0 - b) * y, old, new)
        mu = tuple(mean(b, m, gradient) for b, m in zip(DECAYS, state.mu, strict=True))
        nu = mean(CELO2_CONFIG.second_moment_decay, state.nu, jax.tree.map(jnp.square, gradient))

        def direction(v, *parts):
            channels = [part / jnp.sqrt(v + 1e-8) for part in parts]
            return sum(w * x / jnp.sqrt(jnp.mean(x**2) + 1e-9) for w, x in zip(weights, channels, strict=True))

        return jax.tree.map(direction, nu, gradient, *mu), OverRMSState(mu, nu)

    return optax.GradientTransformation(init, update)


def test_soap_is_the_block_in_the_eigenbasis(key):
    gradients, params = gradients_of(key), normal(key, SHAPES)
    stack = lambda direction: optax.chain(in_eigenbasis(direction, mode="act"), c2.orthogonalize(), c2.normalize_rms())
    learned = stack(c2.celo2_direction(weights_of("soap", SOAP)))
    block = stack(over_rms((1.0, 1.9, 0.76, 0.0)))
    assert_trees_close(updates_of(learned, gradients, params), updates_of(block, gradients, params), 1e-3)


def test_the_other_units_are_random_and_silent(key):
    config = dataclasses.replace(CONFIG, rule=dataclasses.replace(CELO2_CONFIG, features=("gradient", "momentum")))
    random = config.learned.init(key)
    theta = starting_theta(config, random, "muon:1,2,3,4")
    np.testing.assert_array_equal(theta.w0[:, :2].T, [[1, 2, 3, 4], [-1, -2, -3, -4]])
    np.testing.assert_array_equal(theta.w0[:, 2:], random.w0[:, 2:])
    np.testing.assert_array_equal(theta.w1[:, 2:], random.w1[:, 2:])
    # What reading them would bring: the derivative by their weights in the last layer is not zero.
    view, gradient = default_view((6, 8)), jax.random.normal(key, (6, 8))
    start = init_moments(config.rule, view)
    direction = lambda theta: leaf_direction(theta, config.rule, view, gradient, gradient, start).direction
    output = lambda theta: jnp.sum(direction(theta) ** 2)
    slopes = jax.grad(output)(theta)
    assert np.sum(np.abs(np.asarray(slopes.w2[2:, 0])) > 1e-3) >= 2
    assert np.any(np.abs(np.asarray(slopes.w1[2:, :2])) > 1e-3)


@pytest.mark.slow
def test_a_run_starts_there_and_resumes(data, tmp_path):
    config = dataclasses.replace(META_CONFIG, outer_learning_rate=0.0, iterations=2)
    stop = {"should_stop": lambda: True}
    assert run_metatrain(config, data, tmp_path / "run", start_from="muon:1,2", **stop) is None
    weights = run_metatrain(config, data, tmp_path / "run", start_from="muon:1,2", resume=True)
    assert weights.provenance["start_from"] == "muon:1,2"
    wanted = starting_theta(config, init_metatrain(config, 2).theta, "muon:1,2")
    assert_trees_equal(weights.theta, jax.tree.map(np.asarray, wanted))


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("soap", {}, "start_from = 'soap': it acts in the eigenbasis; give eigenbasis"),
        ("muon:1,x", {}, "start_from = 'muon:1,x': expected weights of the gradient and the momenta"),
        ("muon:1,2,3,4,5", {}, "5 weights of the features gradient and momentum, but the rule has .* momentum_decays"),
        ("muon", {"variant": "velo_s"}, "a rule of variant velo_s cannot be set by hand"),
        ("muon", {"hidden": 1}, "takes two hidden units, hidden is 1"),
        (
            "soap",
            {"eigenbasis": True, "rule": c2.RuleConfig(("gradient", "momentum"))},
            "features gradient_over_rms and momentum_over_rms, but the rule has the features gradient, momentum",
        ),
    ],
)
def test_what_cannot_be_set_by_hand_is_refused(source, change, message, key):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ValueError, match=message):
        starting_theta(config, config.learned.init(key), source)
