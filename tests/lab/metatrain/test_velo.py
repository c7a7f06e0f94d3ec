"""Meta-training of a VeLO: inner steps judged by the Optax transformation, and a run on disk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import META_CONFIG, META_IMAGES, assert_trees_close, assert_trees_equal, random_velo

from celo2_harness import harness
from celo2_harness.lab.metatrain import Evaluation, run_metatrain, select_weights
from celo2_harness.lab.metatrain.image_problem import ImageProblem, Layer, mlp_loss
from celo2_harness.lab.metatrain.problem import Clock
from celo2_harness.lab.tasks import ImageSets
from celo2_harness.velo import VELO_S, VeloTheta, load_velo_weights, save_velo_weights, velo

CONFIG = dataclasses.replace(META_CONFIG, variant="velo_s")
WEIGHTS = random_velo(VELO_S.lstm, VELO_S.bank)
DATA = ImageSets(
    images=jnp.asarray(META_IMAGES.reshape(20, 64)),
    labels=jnp.arange(20, dtype=jnp.int32) % 10,
    starts=jnp.zeros(1, jnp.int32),
    sizes=jnp.full(1, 20, jnp.int32),
)


@pytest.mark.slow
def test_inner_steps_are_those_of_the_transformation(key):
    """Two unrolls at once, each under a theta of its own, against one of them by Optax on kernels inputs x outputs."""
    widths, length = (64, 10, 10), 7
    problem = ImageProblem(dataclasses.replace(CONFIG, widths=("64-10-10",), augmentation=10.0), widths)
    unrolls = jax.vmap(problem.fresh)(jax.random.split(key))
    thetas = jax.tree.map(lambda x: jnp.stack([1.1 * x, x]), WEIGHTS.theta)
    tx = velo(WEIGHTS, num_steps=length)
    transposed = lambda params: tuple(Layer(layer.kernel.T, layer.bias) for layer in params)
    second = jax.tree.map(lambda x: x[1], unrolls)
    params = transposed(second.params)
    state = tx.init(params)

    @jax.jit
    def both(unrolls, params, state, rows, step):
        def loss_fn(params):
            scaled = jax.tree.map(lambda x: x * second.alpha, transposed(params))
            return mlp_loss(scaled, DATA.images[rows] / 255.0, DATA.labels[rows])

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(gradients, state, params, value=loss)
        clock = Clock(step, jnp.array(length))
        new, ours = jax.vmap(lambda theta, u: problem.step(theta, u, clock, DATA, rows))(thetas, unrolls)
        return new, ours[1], optax.apply_updates(params, updates), state, loss

    for t in range(4):
        rows = problem.sample(DATA, jnp.array(0), jax.random.fold_in(key, t))
        unrolls, ours, params, state, loss = both(unrolls, params, state, rows, jnp.array(t))
        np.testing.assert_allclose(ours, loss, rtol=1e-5)
        assert_trees_close(jax.tree.map(lambda x: x[1], unrolls.params), transposed(params), 1e-4)
    assert np.all(np.asarray(unrolls.state.count) == 4)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    seen = []
    evaluation = Evaluation(2, {}, lambda weights: seen.append(weights) or float(len(seen)))
    weights = run_metatrain(CONFIG, data, out, log_every=1, evaluation=evaluation)
    return out, weights, seen


@pytest.mark.slow
def test_a_run_makes_weights_that_build_takes(whole):
    out, weights, seen = whole
    assert isinstance(weights.theta, VeloTheta) and weights.config == VELO_S
    loaded = load_velo_weights(out / "weights.celo2", expect=VELO_S)
    assert_trees_equal(loaded.theta, weights.theta)
    assert loaded.provenance["iterations"] == 3 and loaded.provenance["config"]["variant"] == "velo_s"
    assert "| numbers | 46337 |" in (out / "weights.md").read_text()
    # Every number that takes part has moved; the dead layer only by weight decay.
    first = seen[0].theta
    assert np.all(np.any(weights.theta.message.w != first.message.w)) and np.any(weights.theta.bank != first.bank)
    tx = harness.build("velo_s", total_steps=5, weights=str(out / "weights.celo2"))
    params = {"w": jnp.ones((2, 3))}
    assert jax.eval_shape(lambda: tx.update(params, tx.init(params), params, value=1.0)[0])["w"].shape == (2, 3)


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not(whole, data, tmp_path):
    assert run_metatrain(CONFIG, data, tmp_path, should_stop=lambda: (tmp_path / "checkpoints").exists()) is None
    assert_trees_equal(run_metatrain(CONFIG, data, tmp_path, resume=True).theta, whole[1].theta)


@pytest.mark.slow
def test_selecting(whole, tmp_path):
    out, _, seen = whole
    best = select_weights(out, tmp_path / "best.celo2")
    assert_trees_equal(best.theta, seen[0].theta)  # the first score is the lowest
    assert_trees_equal(load_velo_weights(tmp_path / "best.celo2").theta, seen[0].theta)


@pytest.mark.slow
def test_starting_from_weights(data, tmp_path):
    save_velo_weights(tmp_path / "w", WEIGHTS)
    save_velo_weights(tmp_path / "small", random_velo())
    with pytest.raises(ValueError, match="trained with lstm = 64|ff_mult|expected"):
        run_metatrain(CONFIG, data, tmp_path / "refused", start_from=str(tmp_path / "small"))
    config = dataclasses.replace(CONFIG, iterations=1)
    theta = run_metatrain(config, data, tmp_path / "run", start_from=str(tmp_path / "w")).theta
    np.testing.assert_allclose(theta.bank, WEIGHTS.theta.bank, atol=0.05)  # one iteration away
