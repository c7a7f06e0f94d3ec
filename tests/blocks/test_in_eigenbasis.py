"""SOAP's basis around a direction, against a float64 program written from the formulas, permutations and all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, normal, relative_error
from optax.contrib import MuonDimensionNumbers

import celo2_harness as c2

STEPS = 6
FLOOR = 1e-6  # of the covariance, in parts of its mean eigenvalue


def gradients_of(shape, seed=0, steps=STEPS):
    """Gradients with a covariance that has something to find: rows of different sizes, correlated."""
    rng = np.random.default_rng(seed)
    rows = shape[-2]
    mixing = rng.normal(size=(rows, rows)) * np.geomspace(3, 0.1, rows)
    return [mixing @ rng.normal(size=shape) for _ in range(steps)]


class Basis:
    """One side of one matrix, as SOAP has it: columns sorted by eigenvalue, second moments permuted along."""

    def __init__(self, n):
        self.covariance, self.basis, self.n = np.zeros((n, n)), np.eye(n), n

    def move(self, x, decay):
        """Follows the gradient (n, ...); returns the permutation, and the turn from old to new coordinates."""
        self.covariance = decay * self.covariance + (1 - decay) * x @ x.T
        shifted = self.covariance + FLOOR * np.trace(self.covariance) / self.n * np.eye(self.n)
        order = np.argsort(-np.diag(self.basis.T @ shifted @ self.basis), kind="stable")
        old = self.basis
        self.basis = np.linalg.qr(shifted @ old[:, order])[0]
        return order, self.basis.T @ old


def soap(gradients, direction, decay=0.95, eps=1e-8, sides="one"):
    """Updates of mode "whiten" for a list of wide (or square) matrices."""
    rows, columns = gradients[0].shape
    left, right = Basis(rows), Basis(columns) if sides == "both" else None
    nu, out = np.zeros((rows, columns)), []
    for step, (g, u) in enumerate(zip(gradients, direction, strict=True)):
        other = np.eye(columns) if right is None else right.basis
        if step == 0:
            out.append(u)
        else:
            nu = decay * nu + (1 - decay) * (left.basis.T @ g @ other) ** 2
            d = left.basis @ ((left.basis.T @ u @ other) / np.sqrt(nu + eps * nu.mean())) @ other.T
            out.append(d * np.linalg.norm(u) / np.linalg.norm(d))
        order, _ = left.move(g, decay)
        nu = nu[order]
        if right is not None:
            order, _ = right.move(g.T, decay)
            nu = nu[:, order]
    return out


def momenta(gradients, decay=0.9):
    """Nesterov momentum, as mix_momenta((decay,)) has it."""
    m, out = np.zeros_like(gradients[0]), []
    for g in gradients:
        m = decay * m + (1 - decay) * g
        out.append((1 - decay) * g + decay * m)
    return out


def run(tx, gradients, params=None):
    """All updates, for gradients of one leaf or of a tree."""
    single = isinstance(gradients[0], np.ndarray)
    trees = [{"w": jnp.asarray(g, jnp.float32)} if single else g for g in gradients]
    params = jax.tree.map(jnp.zeros_like, trees[0]) if params is None else params
    state, out, update = tx.init(params), [], jax.jit(tx.update)
    for tree in trees:
        updates, state = update(tree, state, params)
        out.append(updates["w"] if single else updates)
    return out, state


@pytest.mark.parametrize("shape", [(5, 8), (6, 6), (3, 40)])
def test_whitening_is_soap(shape):
    gradients = gradients_of(shape)
    got, _ = run(c2.in_eigenbasis(c2.mix_momenta((0.9,))), gradients)
    for a, b in zip(got, soap(gradients, momenta(gradients)), strict=True):
        # The last step of the orthonormalisation is not triangular, and may turn columns by its tolerance of 1e-3.
        assert relative_error(a, b) <= 5e-3


def test_whitening_with_qr_is_soap_to_rounding():
    gradients = gradients_of((5, 8))
    qr = lambda y: jnp.linalg.qr(y)[0]
    got, _ = run(c2.in_eigenbasis(c2.mix_momenta((0.9,)), decay=0.8, eps=1e-3, orthonormalize=qr), gradients)
    for a, b in zip(got, soap(gradients, momenta(gradients), decay=0.8, eps=1e-3), strict=True):
        assert relative_error(a, b) <= 2e-4


def test_both_sides():
    # Only as many long directions as short ones have had gradients at first; more steps give each side full rank.
    gradients = gradients_of((6, 6), steps=12)
    got, state = run(c2.in_eigenbasis(c2.mix_momenta((0.9,)), sides="both"), gradients)
    for a, b in zip(got, soap(gradients, momenta(gradients), sides="both"), strict=True):
        assert relative_error(a, b) <= 5e-3
    assert [square.basis.shape for square in state.squares["w"]] == [(6, 6), (6, 6)]


def test_the_short_side_may_be_the_columns():
    gradients = gradients_of((5, 8))
    wide, _ = run(c2.in_eigenbasis(c2.mix_momenta()), gradients)
    tall, _ = run(c2.in_eigenbasis(c2.mix_momenta()), [g.T.copy() for g in gradients])
    for a, b in zip(wide, tall, strict=True):
        assert relative_error(b.T, a) <= 1e-4


@pytest.mark.parametrize("inner", [optax.trace(0.9), c2.mix_momenta((0.9, 0.99))], ids=["trace", "mix_momenta"])
@pytest.mark.parametrize("every", [1, 3])
def test_what_is_linear_acts_in_any_basis_alike(inner, every):
    # Momenta that are turned with the basis, between gradients and directions that are turned there and back.
    gradients = gradients_of((5, 8))
    got, _ = run(c2.in_eigenbasis(inner, mode="act", every=every), gradients)
    wanted, _ = run(inner, gradients)
    for a, b in zip(got, wanted, strict=True):
        assert relative_error(a, b) <= 1e-5


def over_rms_rule():
    """A theta whose output is gradient + 1.9 momentum(0.9) + 0.76 momentum(0.99), each over the root second moment and
    of RMS one: of the eight hidden units two pass on the sum and its negative."""
    config = c2.RuleConfig(features=("gradient_over_rms", "momentum_over_rms"), momentum_decays=(0.9, 0.99))
    theta = c2.Theta(*(np.zeros(n, np.float32) for n in ((3, 8), 8, (8, 8), 8, (8, 3), 3)))
    theta.w0[:, 0], theta.w0[:, 1] = (1.0, 1.9, 0.76), (-1.0, -1.9, -0.76)
    theta.w1[0, 0] = theta.w1[1, 1] = 1.0
    theta.w2[0, 0], theta.w2[1, 0] = 1.0, -1.0
    return c2.Weights(theta, config)


def test_a_rule_over_root_mean_squares_acting_in_the_basis_is_soap_with_two_time_scales():
    gradients = gradients_of((5, 8))
    qr = lambda y: jnp.linalg.qr(y)[0]
    got, _ = run(c2.in_eigenbasis(c2.celo2_direction(over_rms_rule()), mode="act", orthonormalize=qr), gradients)
    side, nu, mu = Basis(5), np.zeros((5, 8)), [np.zeros((5, 8))] * 2
    for g, a in zip(gradients, got, strict=True):
        r = side.basis.T @ g
        nu = 0.95 * nu + 0.05 * r**2
        mu = [b * m + (1 - b) * r for b, m in zip((0.9, 0.99), mu, strict=True)]
        channels = [x / np.sqrt(nu + 1e-8) for x in (r, *mu)]
        channels = [x / np.sqrt(np.mean(x**2) + 1e-9) for x in channels]
        wanted = side.basis @ (channels[0] + 1.9 * channels[1] + 0.76 * channels[2])
        assert relative_error(a, wanted) <= 2e-4
        order, turn = side.move(g, 0.95)
        nu, mu = nu[order], [turn @ m for m in mu]


def test_the_inner_transformation_sees_the_turned_parameters():
    seen = optax.GradientTransformation(lambda params: optax.EmptyState(), lambda g, s, p: (p, s))
    gradients, params = gradients_of((5, 8)), {"w": jnp.arange(40.0).reshape(5, 8)}
    tx = c2.in_eigenbasis(seen, mode="act")
    # What is seen turned, and turned back.
    got, state = run(tx, gradients, params)
    np.testing.assert_allclose(got[-1], params["w"], rtol=1e-5, atol=1e-4)
    bare = c2.in_eigenbasis(seen, mode="act", max_size=4)
    assert run(bare, gradients, params)[0][-1] is not None


CONVOLUTION = MuonDimensionNumbers((0, 1, 2), (3,))
HEADS = MuonDimensionNumbers((0,), (2,))


@pytest.mark.parametrize("mode", ["whiten", pytest.param("act", marks=pytest.mark.slow)])
def test_views(key, mode):
    """Convolutions, heads and stacks are as many matrices, each on its own."""
    inner = c2.mix_momenta((0.9,)) if mode == "whiten" else c2.celo2_direction(TINY)
    shapes = {"conv": (3, 3, 2, 4), "heads": (6, 2, 4), "stack": (3, 4, 6), "bias": (5,)}
    views = {"conv": CONVOLUTION, "heads": HEADS, "stack": None, "bias": None}
    trees = [normal(jax.random.fold_in(key, i), shapes) for i in range(3)]
    options = {"weight_dimension_numbers": views} if mode == "act" else {}
    inner_with_views = c2.celo2_direction(TINY, **options) if mode == "act" else inner
    got, state = run(c2.in_eigenbasis(inner_with_views, mode=mode, weight_dimension_numbers=views), trees)
    assert state.squares["conv"][0].basis.shape == (4, 4) and state.squares["heads"][0].basis.shape == (2, 4, 4)
    alone = {
        "conv": lambda x: x.reshape(18, 4),
        "heads": lambda x: x.transpose(1, 0, 2)[1],
        "stack": lambda x: x[2],
    }
    matrices = [{name: f(tree[name]) for name, f in alone.items()} for tree in trees]
    wanted, _ = run(c2.in_eigenbasis(inner, mode=mode), matrices)
    for updates, reference in zip(got, wanted, strict=True):
        for name, f in alone.items():
            assert relative_error(f(updates[name]), reference[name]) <= 1e-3, name
    plain, _ = run(inner, [{"bias": tree["bias"]} for tree in trees])
    np.testing.assert_array_equal(got[-1]["bias"], plain[-1]["bias"])


@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize("mode", ["whiten", "act"])
def test_small_leaves_that_turn_together_turn_as_they_would_alone(key, mode, sides):
    # Wide and tall, stacked, square, and one shape of its own; "plain" has no momentum.
    shapes = {"a": (3, 5), "plain": (3, 5), "tall": (5, 3), "stack": (2, 3, 5), "b": (4, 4), "c": (4, 4), "own": (2, 6)}
    trees = [normal(jax.random.fold_in(key, i), shapes) for i in range(4)]
    trees[2]["a"] = trees[2]["a"].at[0, 0].set(jnp.nan)
    mask = {name: name != "plain" for name in shapes}
    inner = lambda mask: optax.masked(optax.trace(0.9), mask)
    qr = lambda y: jnp.linalg.qr(y)[0]
    options = {"mode": mode, "sides": sides, "orthonormalize": qr, "eps": 1e-3}
    got, state = run(c2.in_eigenbasis(inner(mask), **options), trees)
    for name in shapes:
        tx = c2.in_eigenbasis(inner({name: mask[name]}), **options)
        wanted, reference = run(tx, [{name: tree[name]} for tree in trees])
        for a, b in zip(got, wanted, strict=True):
            assert relative_error(a[name], b[name]) <= 1e-4, name
        for a, b in zip(state.squares[name], reference.squares[name], strict=True):
            np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-5, atol=1e-5)
        if mask[name]:
            momenta = [x.inner_state.inner_state.trace[name] for x in (state, reference)]
            assert relative_error(*momenta) <= 1e-4, name


def test_long_sides_have_no_basis():
    gradients = gradients_of((5, 8))
    got, state = run(c2.in_eigenbasis(c2.mix_momenta(), max_size=4), gradients)
    wanted, _ = run(c2.mix_momenta(), gradients)
    np.testing.assert_array_equal(got[-1], wanted[-1])
    assert not jax.tree.leaves((state.squares, state.nu))
    _, state = run(c2.in_eigenbasis(c2.mix_momenta(), sides="both", max_size=5), gradients)
    assert [square.basis.shape for square in state.squares["w"]] == [(5, 5)]


def test_the_basis_moves_every_so_many_steps():
    _, state = run(c2.in_eigenbasis(c2.mix_momenta(), every=4), gradients_of((5, 8), steps=4))
    _, after_one = run(c2.in_eigenbasis(c2.mix_momenta()), gradients_of((5, 8), steps=1))
    _, each = run(c2.in_eigenbasis(c2.mix_momenta()), gradients_of((5, 8), steps=4))
    np.testing.assert_allclose(state.squares["w"][0].basis, after_one.squares["w"][0].basis, atol=1e-6)
    np.testing.assert_allclose(state.squares["w"][0].covariance, each.squares["w"][0].covariance, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("mode", ["whiten", "act"])
def test_a_matrix_that_is_not_finite_is_skipped(bad, mode):
    gradients = gradients_of((2, 5, 8), steps=3)
    tx = c2.in_eigenbasis(c2.mix_momenta(), mode=mode)
    _, before = run(tx, gradients)
    broken = gradients[0].copy()
    broken[0, 1, 2] = bad
    update = jax.jit(tx.update)
    updates, after = update({"w": jnp.asarray(broken, jnp.float32)}, before, {"w": jnp.zeros((2, 5, 8))})
    wanted, reference = update({"w": jnp.asarray(gradients[0], jnp.float32)}, before, {"w": jnp.zeros((2, 5, 8))})
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, after)))
    assert not np.any(updates["w"][0])
    np.testing.assert_array_equal(after.squares["w"][0].covariance[0], before.squares["w"][0].covariance[0])
    if mode == "whiten":
        np.testing.assert_array_equal(after.nu["w"][0], before.nu["w"][0])
    np.testing.assert_allclose(updates["w"][1], wanted["w"][1], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(after.squares["w"][0].covariance[1], reference.squares["w"][0].covariance[1], rtol=1e-5)


@pytest.mark.parametrize("mode", ["whiten", "act"])
@pytest.mark.parametrize("scale", [0.0, 1e-16, 1e12])
def test_gradients_of_any_size(mode, scale):
    gradients = [scale * g for g in gradients_of((5, 8))]
    got, state = run(c2.in_eigenbasis(c2.mix_momenta(), mode=mode), gradients)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((got, state)))
    assert np.any(got[-1]) == (scale > 0)
    if scale == 0:
        np.testing.assert_allclose(state.squares["w"][0].basis, np.eye(5), atol=1e-6)


def test_rows_without_a_gradient_get_no_update():
    gradients = gradients_of((5, 8))
    for g in gradients:
        g[2] = 0.0
    got, _ = run(optax.chain(c2.in_eigenbasis(c2.mix_momenta()), c2.orthogonalize()), gradients)
    np.testing.assert_allclose(got[-1][2], 0.0, atol=1e-4)


def test_fields_that_do_not_say_what_they_are_are_refused():
    inner = optax.scale_by_belief()  # nu and mu
    c2.in_eigenbasis(inner, mode="act").init({"w": jnp.ones((2, 3))})
    nameless = optax.GradientTransformation(lambda params: {"memory": params}, lambda g, s, p=None: (g, s))
    tx = c2.in_eigenbasis(nameless, mode="act")
    with pytest.raises(ValueError, match=r"inner_state\['memory'\]\['w'\] of shape \(2, 3\) belongs to a matrix"):
        tx.init({"w": jnp.ones((2, 3))})
    tx.init({"b": jnp.ones(3)})  # vectors do not turn
    c2.in_eigenbasis(nameless).init({"w": jnp.ones((2, 3))})


def test_bad_options_are_named():
    function = getattr(c2.in_eigenbasis, "__wrapped__", c2.in_eigenbasis)
    with pytest.raises(ValueError, match="mode = 'whitten', expected 'whiten' or 'act'"):
        function(c2.mix_momenta(), mode="whitten")
    with pytest.raises(ValueError, match="sides = 'two', expected 'one' or 'both'"):
        function(c2.mix_momenta(), sides="two")
