"""VeLO as an Optax transformation: what it asks for, what it survives, its parts by hand, and the preset."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import LOSS, VELO_TINY, assert_trees_close, assert_trees_equal, jitted, normal, random_velo

from celo2_harness import harness
from celo2_harness.velo import VeloWeights, load_velo_weights, velo
from celo2_harness.velo.config import NETWORK_SHAPES, VELO, VELO_S, init_theta, join_networks, split_networks
from celo2_harness.velo.loss import add_loss, init_losses, loss_decays, loss_features
from celo2_harness.velo.lstm import lstm_inputs, summarize_leaf

TX = velo(VELO_TINY, num_steps=10)
SHAPES = {"scalar": (), "vector": (6,), "row": (1, 5), "matrix": (4, 6), "stack": (3, 4, 6)}


@pytest.fixture
def params(key):
    return normal(key, SHAPES)


@pytest.fixture
def gradients(key):
    return normal(jax.random.fold_in(key, 1), SHAPES)


@jax.jit
def update(gradients, state, params, loss):
    return TX.update(gradients, state, params, value=loss)


# ------------------------------------------------------------------------------------------------------- what it asks


def test_what_is_missing_is_named(params, gradients):
    state = TX.init(params)
    with pytest.raises(ValueError, match="without value. The rule watches the training loss"):
        TX.update(gradients, state, params)
    with pytest.raises(ValueError, match="called without params"):
        TX.update(gradients, state, value=LOSS)
    with pytest.raises(ValueError, match=r"value has shape \(2,\), expected the loss, a scalar"):
        TX.update(gradients, state, params, value=jnp.ones(2))


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, True, None])
def test_lengths_that_are_none(num_steps):
    with pytest.raises(ValueError, match="num_steps = .* expected the length of the run"):
        velo.__wrapped__(VELO_TINY, num_steps=num_steps)


def test_state(params):
    """A leaf keeps momenta, second moment, factored or full moments, and a row of the LSTM's state."""
    state = TX.init(params)
    nothing = optax.MaskedNode()
    shapes = lambda tree: {k: x if x == nothing else x.shape for k, x in tree.items()}
    assert shapes(state.nu) == SHAPES and len(state.mu) == len(state.row) == 3
    assert shapes(state.row[0]) == {"scalar": nothing, "vector": nothing, "row": (1,), "matrix": (4,), "stack": (3, 4)}
    assert shapes(state.col[2]) == {"scalar": nothing, "vector": nothing, "row": (5,), "matrix": (6,), "stack": (3, 6)}
    assert shapes(state.diag[1]) == SHAPES | dict.fromkeys(("row", "matrix", "stack"), nothing)
    for leaf in SHAPES:
        np.testing.assert_array_equal(state.hidden[leaf], VELO_TINY.theta.hidden)
        np.testing.assert_array_equal(state.cell[leaf], VELO_TINY.theta.cell)
    assert optax.tree.get(state, "count") is not None and optax.tree.get(state, "nu") is state.nu


# --------------------------------------------------------------------------------------------------- what it survives


def test_nan_gradients_count_as_zero_and_infinite_ones_as_1000(params, gradients):
    bad = gradients | {"matrix": gradients["matrix"].at[0, 0].set(jnp.nan).at[1, 1].set(-jnp.inf)}
    good = gradients | {"matrix": gradients["matrix"].at[0, 0].set(0.0).at[1, 1].set(-1000.0)}
    state = TX.init(params)
    assert_trees_equal(update(bad, state, params, LOSS), update(good, state, params, LOSS))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite(loss, first, params, gradients):
    """The first is left out; later ones count as twice the largest running mean, as an infinite one always did."""
    before = TX.init(params)
    if not first:
        _, before = update(gradients, before, params, 2.0)
    updates, state = update(gradients, before, params, loss)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
    if first:
        assert_trees_equal(state.losses, before.losses)
    else:
        # One loss of 2: the means are (1 - d) 2, and the bound takes the exponent of the next count.
        largest = float(np.max((1 - np.float64(loss_decays(10))) * 2 / (1 - np.float64(loss_decays(10)) ** 2)))
        assert_trees_close(state.losses, update(gradients, before, params, 2 * largest)[1].losses, 1e-5)


def test_a_nan_parameter_stays_in_its_leaf(params, gradients):
    bad = params | {"vector": params["vector"].at[0].set(jnp.nan)}
    state = TX.init(bad)
    for _ in range(2):
        updates, state = update(gradients, state, bad, LOSS)
    assert all(np.all(np.isfinite(x)) for name, x in updates.items() if name != "vector")
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_beyond_the_end_updates_go_on(params, gradients):
    state = TX.init(params)
    late = state._replace(count=jnp.array(50, jnp.int32))
    after, state = update(gradients, late, params, LOSS)
    assert int(state.count) == 51 and all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))
    # Later still, the time features have saturated.
    later, _ = update(gradients, late._replace(count=jnp.array(70, jnp.int32)), params, LOSS)
    assert_trees_close(after, later, 1e-6)


@pytest.mark.slow
def test_leaves_depend_on_each_other(params, gradients):
    tx = velo(random_velo(lstm=16), num_steps=10)
    alone = lambda tree: {"matrix": tree["matrix"]}
    together = tx.update(gradients, tx.init(params), params, value=LOSS)[0]
    single = tx.update(alone(gradients), tx.init(alone(params)), alone(params), value=LOSS)[0]
    assert np.any(together["matrix"] != single["matrix"])


@pytest.mark.slow
def test_the_kernel_in_tiles_agrees(params, gradients):
    tiles = velo(VELO_TINY, num_steps=10, kernel="pallas")
    state = TX.init(params)
    for _ in range(2):
        updates, new = update(gradients, state, params, LOSS)
        assert_trees_close(jitted(tiles)(gradients, state, params)[0], updates, 1e-4)
        state = new


# -------------------------------------------------------------------------------------------------- its parts by hand


def cla(x):
    return 0.5 * np.clip(np.log(1e-8 + np.abs(10 * x)), -5, 5)


@pytest.mark.parametrize("case", ["ordinary", "constant", "far from zero", "zero parameters", "scalar", "five axes"])
def test_what_the_lstm_is_told(case, key):
    """Against float64."""
    shape = {"scalar": (), "five axes": (2,) * 5}.get(case, (7, 1, 5))
    rng = np.random.default_rng(0)
    p, nu, *mu = (rng.normal(size=shape) for _ in range(5))
    nu, mu = 0.01 * nu**2, [0.1 * m for m in mu]
    if case == "constant":
        mu = [0.1 + 0 * m for m in mu]
    if case == "far from zero":  # with a spread that float32 can tell, and that the mean square would swallow
        mu = [100 + m for m in mu]
    if case == "zero parameters":
        p = 0 * p
    p, nu, mu = np.float32(p), np.float32(nu), [np.float32(m) for m in mu]
    got = summarize_leaf(jnp.asarray(p), [jnp.asarray(m) for m in mu], jnp.asarray(nu))
    p, nu, mu = np.float64(p), np.float64(nu), [np.float64(m) for m in mu]
    q = 1 / np.sqrt(max(np.mean(p**2), 1e-9))
    rank = {"scalar": [1, 0, 0, 0, 0], "five axes": [0] * 5}.get(case, [0, 0, 1, 0, 0])
    wanted = [cla(q * np.mean(nu)), *rank]
    wanted += [cla(np.mean((q * m - np.mean(q * m)) ** 2)) for m in mu]
    wanted += [cla(np.mean((q * nu - np.mean(q * m)) ** 2)) for m in mu]
    np.testing.assert_allclose(got.inputs, wanted, atol=2e-4)
    np.testing.assert_allclose(got.mean_square, np.mean(p**2), rtol=1e-6)
    inputs = lstm_inputs([got], jnp.arange(9.0), jnp.array(0.25))
    times = np.tanh(10 * (0.25 - np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1])))
    np.testing.assert_allclose(inputs[0, :18], [*times, *range(9)], atol=1e-6)


@pytest.mark.parametrize("num_steps", [5, 1000])
def test_losses_by_hand(num_steps):
    """Against float64, within what 1 - d^n costs in float32; a spike is cut."""
    rng = np.random.default_rng(0)
    losses = 2 * np.exp(-0.05 * np.arange(30)) + 0.1 * rng.random(30)
    losses[12] = 1e6
    half_lives = 10 ** np.linspace(1, np.log10(num_steps), 10)
    d, means, lowest = np.exp(-1 / half_lives), np.zeros(10), np.full(10, 999999999999.0)
    buffer, decays = init_losses(), loss_decays(num_steps)
    add, read = jax.jit(add_loss), jax.jit(loss_features)
    for n, loss in enumerate(losses):
        bound = loss if n == 0 else np.max(means / (1 - d ** (n + 1)))
        means = d * means + (1 - d) * min(loss, 2 * abs(bound))
        u = means / (1 - d ** (n + 1))
        lowest = np.minimum(lowest, u)
        wanted = np.clip((u[:-1] - lowest[:-1]) / np.maximum(1e-8, u[1:] - lowest[:-1]) - 1, -1, 1) if n > 1 else 0
        buffer = add(buffer, decays, jnp.float32(loss))
        np.testing.assert_allclose(read(buffer, decays), np.broadcast_to(wanted, 9), atol=2e-3, err_msg=str(n))
    np.testing.assert_allclose(buffer.means, means, rtol=1e-4)
    np.testing.assert_allclose(decays, d, rtol=1e-6)
    assert int(buffer.seen) == 30


@pytest.mark.slow
def test_bugged_loss_features_think_that_a_run_has_ten_steps(params, gradients):
    bugged = dataclasses.replace(VELO_TINY, config=dataclasses.replace(VELO_TINY.config, bugged_loss_features=True))
    tx = velo(bugged, num_steps=1000)
    state = tx.init(params)
    _, state = tx.update(gradients, state, params, value=2.0)
    d = np.exp(-0.1)
    np.testing.assert_allclose(state.losses.means, np.full(10, (1 - d) * 2), rtol=1e-6)


def test_rows_of_the_bank_are_networks():
    rows = jnp.arange(2 * 159.0).reshape(2, 159)
    networks = split_networks(rows)
    assert [x.shape for x in networks] == [(2, *shape) for shape in NETWORK_SHAPES]
    np.testing.assert_array_equal(join_networks(networks), rows)
    np.testing.assert_array_equal(networks.w0[1, 2], rows[1, 8:12])


# --------------------------------------------------------------------------------------------------------- the preset

PRESET = dataclasses.replace(harness.presets()["velo"], load=load_velo_weights)
MODEL = {"embedding": {"table": (7, 4)}, "layer": {"kernel": (4, 6), "bias": (6,)}}


def build(learning_rate=1.0, **options):
    return harness.build(PRESET, learning_rate, **{"weights": VELO_TINY, "total_steps": 10} | options)


def steps(tx, params, gradients, count=2):
    state = tx.init(params)
    for _ in range(count):
        updates, state = jitted(tx)(gradients, state, params)
    return updates


@pytest.mark.slow
def test_the_preset_is_velo_on_all_leaves_together(key):
    params, gradients = normal(key, MODEL), normal(jax.random.fold_in(key, 1), MODEL)
    wanted = steps(velo(VELO_TINY, num_steps=10), params, gradients)
    assert_trees_equal(steps(build(), params, gradients), wanted)
    assert_trees_close(steps(build(0.5), params, gradients), jax.tree.map(lambda u: 0.5 * u, wanted), 1e-6)
    # Decay: 0.001 of what is asked for, by label.
    decayed = steps(build(weight_decay=2.0, rest_weight_decay=3.0), params, gradients)
    for (name, part), w in ((("embedding", "table"), 3), (("layer", "kernel"), 2), (("layer", "bias"), 3)):
        got = np.asarray(decayed[name][part]) - np.asarray(wanted[name][part])
        np.testing.assert_allclose(got, -1e-3 * w * params[name][part], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_frozen_leaves_are_not_seen(key):
    params, gradients = normal(key, MODEL), normal(jax.random.fold_in(key, 1), MODEL)
    part = lambda tree: {"layer": tree["layer"]}
    updates = steps(build(rules=[("embedding/table", "frozen")]), params, gradients)
    assert not np.any(updates["embedding"]["table"])
    wanted = steps(velo(VELO_TINY, num_steps=10), part(params), part(gradients))
    assert_trees_equal(part(updates), wanted)


def test_what_the_preset_cannot_do_without():
    with pytest.raises(ValueError, match="preset velo: total_steps is missing"):
        harness.build(PRESET, weights=VELO_TINY)
    with pytest.raises(ValueError, match="preset velo_s: weights is missing"):
        harness.build("velo_s", total_steps=10)
    with pytest.raises(ValueError, match="lstm = 3, expected 64"):
        harness.build("velo_s", total_steps=10, weights=VELO_TINY)
    with pytest.raises(ValueError, match="rest_learning_rate_factor = 2.0: preset velo has one learning rate"):
        build(rest_learning_rate_factor=2.0)
    with pytest.raises(ValueError, match="without value"):
        build().update({"w": jnp.ones(2)}, build().init({"w": jnp.ones(2)}), {"w": jnp.ones(2)})


def test_the_report(key):
    report = harness.describe(normal(key, MODEL), PRESET, weights=VELO_TINY, weight_decay=2.0, rest_weight_decay=3.0)
    kernel = next(line for line in report.splitlines() if line.startswith("layer/kernel"))
    # Three momenta, a second moment, three rows and columns, and two vectors of the LSTM.
    assert "velo" in kernel and "0.002" in kernel and str(4 * (4 * 24 + 3 * (4 + 6) + 2 * 3)) in kernel


# ------------------------------------------------------------------------------------------------------ random numbers


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (VELO_S, 3.0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((dataclasses.replace(VELO_S, ff_mult=7.0), 3.0), (VELO, 6.25))
        ),
    ],
)
def test_first_networks_have_a_size_whatever_the_factor(config, size):
    """The mixed network of a given hidden state: mean square by hand, of independent entries with known variances."""
    theta = init_theta(config, jax.random.key(3))
    hidden = np.random.default_rng(0).normal(size=(64, config.lstm)) / np.sqrt(config.lstm)
    # A float64 program of its own; the variance of a normal cut off at 2 sigma is 0.774 sigma^2.
    coefficients = hidden @ np.asarray(theta.controls.w, np.float64) + np.asarray(theta.controls.b)
    networks = config.ff_mult * np.mean(coefficients[:, :, None] * np.asarray(theta.bank, np.float64), axis=1)
    w1 = split_networks(networks).w1
    expected = size**2 * (0.774 / config.lstm) * (0.774 / NETWORK_SHAPES.w1[0])
    np.testing.assert_allclose(np.mean(np.square(w1)), expected, rtol=0.35)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_random_numbers_move_parameters(key, seed):
    """Else meta-training from them has no gradient: float32 rounds steps below 6e-8 of a parameter away."""
    tx = velo(VeloWeights(init_theta(VELO_S, jax.random.key(seed)), VELO_S), num_steps=10)
    params = normal(key, {"w": (16, 32)})
    state, update = tx.init(params), jitted(tx)
    for t in range(3):
        before = params["w"]
        updates, state = update(normal(jax.random.fold_in(key, t), {"w": (16, 32)}), state, params)
        params = optax.apply_updates(params, updates)
    step = float(jnp.sqrt(jnp.mean(jnp.square(params["w"] - before))))
    assert 1e-7 < step < 1e-3  # their mean square is 1
