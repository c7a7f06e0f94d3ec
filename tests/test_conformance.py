"""What every block and every preset owes to Optax: one row each, all tests for all rows. A new block is a new row."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    LOSS,
    PRESETS,
    SHAPES,
    TINY,
    VELO_TINY,
    arguments,
    assert_trees_close,
    assert_trees_equal,
    decaying,
    jitted,
    normal,
    signature,
)

import celo2_harness as c2
from celo2_harness import harness
from celo2_harness.velo import velo


def preset(name, learning_rate=0.01, **options):
    return harness.build(learning_rate=learning_rate, **arguments(name) | options)


TABLE = {
    "celo2_direction": c2.celo2_direction(TINY),
    "celo2_direction, bfloat16 state": c2.celo2_direction(TINY, state_dtype="bfloat16"),
    "linear_direction": c2.linear_direction(),
    "linear_direction, bfloat16 state": c2.linear_direction(total_steps=10, state_dtype="bfloat16"),
    "orthogonalize": c2.orthogonalize(),
    "normalize_rms per_step": c2.normalize_rms("per_step"),
    "normalize_rms rolling": c2.normalize_rms("rolling"),
    "normalize_rms clip": c2.normalize_rms("clip"),
    "normalize_rms none": c2.normalize_rms("none"),
    "scale_by_celo2": c2.scale_by_celo2(TINY, orthogonalize=True),
    "scale_by_shape": c2.scale_by_shape(),
    "scale_by_width": c2.scale_by_width(),
    "mix_momenta": c2.mix_momenta((0.9, 0.99), (0.7, 0.3)),
    "mix_momenta on schedules, bfloat16 state": c2.mix_momenta(
        (0.9, 0.99), (lambda count: 1 / (1 + count), 0.3), lambda count: 0.9, state_dtype="bfloat16"
    ),
    "look_ahead": c2.look_ahead(0.5, 0.9, 0.0, total_steps=10),
    "control_norm hyperball": c2.control_norm("hyperball", 0.1),
    "control_norm radial": c2.control_norm("radial"),
    "control_norm rows": c2.control_norm("rows"),
    "average_tail": c2.average_tail(0.1, total_steps=10),
    "average_tail masked": c2.average_tail(
        0.1, total_steps=10, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    ),
    "in_eigenbasis": c2.in_eigenbasis(c2.mix_momenta()),
    "in_eigenbasis, both sides, every second step": c2.in_eigenbasis(c2.mix_momenta(), sides="both", every=2),
    "in_eigenbasis act, linear": c2.in_eigenbasis(c2.linear_direction(total_steps=10), mode="act"),
    "in_eigenbasis act": c2.in_eigenbasis(c2.celo2_direction(TINY), mode="act"),
    "add_decayed_weights": c2.add_decayed_weights(0.1),
    "add_decayed_weights scheduled": c2.add_decayed_weights(lambda count: 0.1 * count, "cautious"),
    "add_decayed_weights masked": c2.add_decayed_weights(
        0.1, "independent", mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    ),
    "velo": velo(VELO_TINY, num_steps=10),
    "velo, bfloat16 state": velo(VELO_TINY, num_steps=10, state_dtype="bfloat16"),
    "guard_updates": c2.guard_updates(optax.adam(0.01), spike_factor=5.0),
    "guard_updates clip": c2.guard_updates(c2.scale_by_celo2(TINY), spike_factor=5.0, spike_action="clip"),
    **{f"preset {name}": decaying(name) for name in PRESETS},
    "preset on a schedule": preset("adamw", total_steps=100, weight_decay=lambda count: 0.1),
}
# Rows whose state is (in part) that of Optax's Adam or Muon, which keep arrays for empty leaves too.
OPTAX_STATE = ("adam", "muon", "celo2_ortho", "schedule", "guard_updates")
# These differ from rows beside them in one option, and run in .ci/run.
SLOW_ROWS = (
    "celo2_direction, bfloat16 state",
    "in_eigenbasis, both sides, every second step",
    "velo, bfloat16 state",
    "preset celo2_muon",
)
rows = pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] * (row in SLOW_ROWS)) for row in TABLE]
)
# The others differ in their directions, which have rows of their own, and compile long.
FAST = ("celo2_ortho", "adamw", "velo")
SOME_SLOW = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]


@pytest.fixture
def params(key):
    return normal(key, SHAPES)


@pytest.fixture
def gradients(key):
    return normal(jax.random.fold_in(key, 1), SHAPES)


def update_of(tx):
    """`tx.update` with a loss, for those that watch it."""
    return lambda g, s, p: optax.with_extra_args_support(tx).update(g, s, p, value=LOSS)


def update(row, gradients, state, params):
    return jitted(TABLE[row])(gradients, state, params)


@rows
def test_one_trace_and_a_stable_signature(row, params, gradients):
    tx = TABLE[row]
    state = tx.init(params)
    before = signature(state)
    for _ in range(3):
        updates, state = update(row, gradients, state, params)
        assert signature(state) == before
        assert signature(updates)[0] == signature(params)[0]
        params = optax.apply_updates(params, updates)
    assert len(jitted(tx).traces) == 1
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))


def donated_scan(row, params, gradients):
    """Three steps of bfloat16 parameters, the second of them skipped, and what they start from."""
    tx = optax.with_extra_args_support(TABLE[row])
    params, gradients = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, gradients))

    def step(carry, skip):
        def go(carry):
            params, state = carry
            updates, state = tx.update(gradients, state, params, value=LOSS)
            assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
            return optax.apply_updates(params, updates), state

        return jax.lax.cond(skip, lambda carry: carry, go, carry), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.array([False, True, False]))[0], donate_argnums=0)
    return run, (params, tx.init(params))


@rows
def test_bfloat16_parameters_in_a_donated_scan_with_a_branch(row, params, gradients):
    run, carry = donated_scan(row, params, gradients)
    state_dtypes = {x.dtype for x in jax.tree.leaves(carry[1]) if jnp.issubdtype(x.dtype, jnp.floating)}
    if "bfloat16" not in row and row != "guard_updates":  # Optax's Adam, bare, follows the parameters
        assert state_dtypes <= {jnp.dtype("float32")}
    assert signature(jax.eval_shape(run, carry)) == signature(carry)
    run.lower(carry)  # which warns of what is given away and finds no place


@pytest.mark.slow
@rows
def test_a_donated_scan_runs(row, params, gradients):
    run, carry = donated_scan(row, params, gradients)
    before = signature(carry)
    after = run(carry)
    assert signature(after) == before
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))


@rows
def test_abstract_init(row, params):
    tx = TABLE[row]
    plain = lambda tree: (jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)])
    state = tx.init(params)
    assert plain(jax.eval_shape(tx.init, params)) == plain(state)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert plain(jax.eval_shape(tx.init, shapes)) == plain(state)
    if row.startswith("preset"):
        assert_trees_equal(jax.jit(tx.init)(params), state)


@rows
def test_map_params_reaches_what_has_the_shape_of_parameters(row, params):
    tx = TABLE[row]
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert signature(mapped)[0] == signature(state)[0]
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(mapped), strict=True):
        # Scalars are counters, Optax's Muon keeps its three coefficients, and VeLO means and minima of the loss;
        # everything else belongs to a parameter.
        of_the_run = before.shape in ((), (10,)) or (before.shape == (3,) and "velo" not in row)
        np.testing.assert_array_equal(after, before if of_the_run else before + 1)


@rows
def test_unknown_extra_arguments_are_ignored(row, params, gradients):
    tx = optax.with_extra_args_support(TABLE[row])
    program = lambda **extra: str(
        jax.make_jaxpr(lambda g, p: tx.update(g, tx.init(p), p, value=LOSS, **extra))(gradients, params)
    )
    assert program(loss=1.0, key=None) == program()


@rows
@pytest.mark.parametrize(
    "tree",
    [{}, {"a": None}, (), {"a": {}, "layer": {"kernel": np.ones((0, 4), np.float32), "bias": np.ones(0, np.float32)}}],
    ids=["empty", "none", "tuple", "zero size"],
)
def test_trees_without_numbers(row, tree):
    tx = TABLE[row]
    tree = jax.tree.map(jnp.asarray, tree)
    state = jax.eval_shape(tx.init, tree)
    updates, after = jax.eval_shape(update_of(tx), tree, state, tree)
    assert signature(updates) == signature(jax.eval_shape(lambda: tree)) and signature(after) == signature(state)
    if row != "preset celo2" and not any(word in row for word in OPTAX_STATE):
        assert all(x.size for x in jax.tree.leaves(state))


@rows
def test_no_empty_arrays_in_the_state(row, params):
    assert all(x.size for x in jax.tree.leaves(jax.eval_shape(TABLE[row].init, params)))


@rows
def test_masked(row, params, gradients):
    mask = {"embedding": {"table": False}, "layer": {"kernel": True, "bias": True}}
    tx = optax.masked(TABLE[row], mask)
    abstract = jax.eval_shape(lambda g, p: update_of(tx)(g, tx.init(p), p)[0], gradients, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    # Arrays of the excluded leaf appear nowhere in the state (no other leaf has an axis of 7).
    assert all(7 not in x.shape for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))


@rows
def test_none_leaves_pass(row, params, gradients):
    tx = TABLE[row]
    params, gradients = params | {"absent": None}, gradients | {"absent": None}
    updates = jax.eval_shape(lambda g, p: update_of(tx)(g, tx.init(p), p)[0], gradients, params)
    assert updates["absent"] is None


@pytest.mark.parametrize("row", ["scale_by_celo2", "normalize_rms rolling", "guard_updates", "velo"])
def test_vmap_over_runs(row, params, gradients):
    tx = TABLE[row]
    double = lambda tree: jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree)
    params, gradients = double(params), double(gradients)
    gradients["layer"]["bias"] = gradients["layer"]["bias"].at[1].set(0.0)  # a branch taken by one of the two
    state = jax.vmap(tx.init)(params)
    together = jax.jit(jax.vmap(update_of(tx)))(gradients, state, params)
    for i in range(2):
        one = update(row, *jax.tree.map(lambda x: x[i], (gradients, state, params)))  # noqa: B023
        assert_trees_close(jax.tree.map(lambda x: x[i], together), one, 1e-4)  # noqa: B023


@pytest.mark.parametrize("name", SOME_SLOW)
def test_multi_steps(name, params, gradients):
    tx = TABLE[f"preset {name}"]
    every_second = optax.MultiSteps(tx, 2)
    step = jax.jit(lambda g, s, p: every_second.update(g, s, p, value=LOSS))
    state = every_second.init(params)
    first, state = step(gradients, state, params)
    assert not any(np.any(u) for u in jax.tree.leaves(first))
    before = signature(state)
    second, state = step(gradients, state, params)
    assert signature(state) == before
    assert_trees_close(second, update(f"preset {name}", gradients, tx.init(params), params)[0], 1e-5)


@pytest.mark.parametrize("name", SOME_SLOW)
def test_inject_hyperparams(name, params, gradients):
    # On a schedule only where it costs little; it is the same for all presets.
    run = {"total_steps": 10, "schedule": "linear"} if name == "adamw" else {}
    build = optax.inject_hyperparams(harness.build, static_args=harness.STATIC_ARGS)
    tx = build(learning_rate=0.01, weight_decay=0.1, warmup=0, **arguments(name) | run)
    state = tx.init(params)
    assert set(state.hyperparams) >= {"learning_rate", "weight_decay"}
    step = jax.jit(update_of(tx))
    updates, _ = step(gradients, state, params)
    plain = TABLE[f"preset {name}"]
    # Newton-Schulz stretches rounding: another learning rate type, another fusion.
    assert_trees_close(updates, update(f"preset {name}", gradients, plain.init(params), params)[0], 1e-4)
    state.hyperparams["learning_rate"] = jnp.asarray(0.02)
    doubled, _ = step(gradients, state, params)
    assert_trees_close(doubled, jax.tree.map(lambda u: 2 * u, updates), 1e-5)


# Blocks beyond the presets' own, with what of them is not a number that may change during a run.
MODERN = {
    "mix_momenta": (c2.mix_momenta, {"nesterov": 0.9}, ()),
    "in_eigenbasis": (
        lambda decay, eps: c2.in_eigenbasis(optax.trace(0.9), decay, eps=eps),
        {"decay": 0.9, "eps": 1e-6},
        (),
    ),
    "in_eigenbasis act": (
        lambda decay: c2.in_eigenbasis(c2.mix_momenta((0.9, 0.99)), decay, mode="act", sides="both"),
        {"decay": 0.9},
        (),
    ),
    "look_ahead": (c2.look_ahead, {"strength": 0.5, "start": 0.0, "total_steps": 10}, ("total_steps",)),
    "control_norm": (c2.control_norm, {"learning_rate": 0.1}, ()),
    "average_tail": (c2.average_tail, {"start": 0.0, "horizon": 0.5, "total_steps": 10}, ("total_steps",)),
}


@pytest.mark.parametrize("name", MODERN)
def test_modern_blocks_in_multi_steps_and_inject_hyperparams(name, params, gradients):
    make, options, static = MODERN[name]
    tx = make(**options)
    wanted, state = tx.init(params), tx.init(params)
    for _ in range(2):
        wanted, state = jitted(tx)(gradients, state, params)
    every_second = optax.MultiSteps(tx, 2)
    injected = optax.inject_hyperparams(make, static_args=static)(**options)
    for wrapped, steps in ((every_second, 4), (injected, 2)):
        state, step = wrapped.init(params), jax.jit(wrapped.update)
        before = signature(state)
        for _ in range(steps):
            got, state = step(gradients, state, params)
        assert signature(state) == before
        assert_trees_close(got, wanted, 1e-4)


def test_inject_hyperparams_without_static_arguments(params):
    build = optax.inject_hyperparams(harness.build)
    jax.eval_shape(build("adamw", learning_rate=0.01).init, params)
    with pytest.raises(ValueError, match="static_args=harness.STATIC_ARGS"):
        build("adamw", learning_rate=0.01, total_steps=10).init(params)


@pytest.mark.parametrize("name", ["celo2_ortho", "adamw"])
def test_a_schedule_equals_its_number(name, params, gradients):
    as_number, as_schedule = TABLE[f"preset {name}"], preset(name, lambda count: 0.01, weight_decay=lambda count: 0.1)
    state, other = as_number.init(params), as_schedule.init(params)
    for _ in range(2):
        updates, state = jitted(as_number)(gradients, state, params)
        others, other = jitted(as_schedule)(gradients, other, params)
        assert_trees_close(updates, others, 1e-6)


WITH_STATE = [row for row, tx in TABLE.items() if jax.tree.leaves(jax.eval_shape(tx.init, {"w": jnp.ones((2, 3))}))]


@pytest.mark.parametrize("row", WITH_STATE)
def test_orbax_round_trip(row, params, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    state = TABLE[row].init(params)
    leaves, treedef = jax.tree.flatten(state)
    state = treedef.unflatten([x + i for i, x in enumerate(leaves)])  # nothing equal to its initial value
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="orbax")
        with checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert_trees_equal(restored, state)
