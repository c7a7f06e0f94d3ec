"""What surrounds an optimizer: metadata of other libraries, meshes, frozen leaves, transformations of JAX."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.training.train_state import TrainState
from helpers import TINY, VELO_TINY, arguments, assert_trees_close, normal
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import celo2_harness as c2
from celo2_harness.velo import velo

NAMES = ("adamw", "muon", "celo2_base", "celo2_ortho")
# Those that take long to compile run in .ci/run.
PRESETS = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("muon", "celo2_base"))) for name in NAMES]
SHAPES = {"layer": {"kernel": (4, 6), "bias": (6,)}}


def build(preset, **options):
    return c2.build(learning_rate=1e-2, **arguments(preset), **options)


# ------------------------------------------------------------------------------------------------------------ metadata


class Layer(nnx.Module):
    def __init__(self, axes):
        init = nnx.initializers.lecun_normal()
        init = nnx.with_partitioning(init, axes) if axes else init
        self.up = nnx.Linear(4, 6, kernel_init=init, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(6, 4, kernel_init=init, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


@pytest.mark.parametrize("preset", PRESETS)
def test_nnx_metadata_changes_no_number(preset):
    def trained(axes):
        model = Layer(axes)
        optimizer = nnx.Optimizer(model, build(preset), wrt=nnx.Param)
        loss = lambda model: jnp.mean(model(jnp.ones((2, 4))) ** 2)
        step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(loss)(model)))
        for _ in range(2):
            step(model, optimizer)
        return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    plain = trained(None)
    with jax.set_mesh(jax.make_mesh((1, 1), ("fsdp", "tensor"), (AxisType.Auto,) * 2)):
        assert_trees_close(trained(("fsdp", "tensor")), plain, 1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_linen_names_axes_of_the_state_that_has_them(preset):
    split = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", "tensor"))
    model = nn.Dense(6, kernel_init=split)
    params = model.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    state = jax.eval_shape(lambda: TrainState.create(apply_fn=model.apply, params=params, tx=build(preset)))
    specs = nn.get_partition_spec(state)
    assert specs.params["kernel"] == PartitionSpec("fsdp", "tensor")
    is_spec = lambda x: isinstance(x, PartitionSpec)
    found = dict(jax.tree_util.tree_flatten_with_path(specs.opt_state, is_leaf=is_spec)[0])
    for path, x in jax.tree_util.tree_flatten_with_path(nn.unbox(state.opt_state))[0]:
        assert found[path] == (PartitionSpec("fsdp", "tensor") if x.shape == (4, 6) else PartitionSpec()), path


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(c2.normalize_rms("rolling"), id="rolling"),
        pytest.param(velo(VELO_TINY, num_steps=10), id="velo", marks=pytest.mark.slow),
    ],
)
def test_blocks_take_boxes(tx, key):
    plain = {"kernel": jax.random.normal(key, (4, 6))}
    boxed = {"kernel": nn.Partitioned(plain["kernel"], ("fsdp", "tensor"))}
    update = lambda tree: optax.with_extra_args_support(tx).update(tree, tx.init(tree), tree, value=jnp.ones(()))[0]
    assert_trees_close(update(boxed)["kernel"].value, update(plain)["kernel"], 1e-5)


# -------------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("inside", [True, False], ids=["mesh set", "mesh not set"])
@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("preset", PRESETS)
def test_explicit_axes(preset, jitted, inside, key):
    mesh = jax.make_mesh((1,), ("fsdp",))
    assert mesh.axis_types == (AxisType.Explicit,)
    plain = normal(key, SHAPES)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))
    params = jax.tree.map(place, plain)
    tx = build(preset)
    update = jax.jit(tx.update) if jitted else tx.update
    wanted, _ = tx.update(plain, tx.init(plain), plain)
    if inside:
        with jax.set_mesh(mesh):
            updates, state = update(params, tx.init(params), params)
    else:
        updates, state = update(params, tx.init(params), params)
    assert all(x.sharding.spec[0] == "fsdp" for x in jax.tree.leaves(updates))
    assert_trees_close(jax.tree.map(np.asarray, updates), jax.tree.map(np.asarray, wanted), 1e-5)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(plain))


# -------------------------------------------------------------------------------------------------------- frozen leaves

FROZEN = {
    "int8": jnp.ones((4, 4), jnp.int8),
    "int4": jnp.ones((4, 4), jnp.int4),
    "float8": jnp.ones((4, 4), jnp.float8_e4m3fn),
    "truth values": jnp.ones(3, bool),
    "complex": jnp.ones(3, jnp.complex64),
    "a key": jax.random.key(0),
    "whole numbers": jnp.arange(3),
}


@pytest.mark.parametrize("preset", ["adamw", "celo2_ortho"])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_leaves_of_any_dtype(name, preset, key):
    rules = [("^base$", "frozen")]
    params = normal(key, SHAPES) | {"base": FROZEN[name]}
    tx = build(preset, rules=rules, weight_decay=0.1, rest_weight_decay=0.1)
    update = lambda tx, params: tx.update(params, tx.init(params), params)[0]
    alone = {"layer": params["layer"]}
    for found in (update(tx, params), update(c2.guard_updates(tx), params)):
        assert_trees_close(found["layer"], update(tx, alone)["layer"], 1e-5)
        assert found["base"].shape == params["base"].shape and found["base"].dtype == params["base"].dtype
        if name != "a key":
            assert not np.any(np.asarray(found["base"]))
            moved = optax.apply_updates(params, found)["base"]
            assert moved.dtype == params["base"].dtype and bool(jnp.all(moved == params["base"]))
    assert "frozen" in c2.describe(params, preset, rules=rules)


def test_gradients_of_frozen_whole_numbers_may_be_none(key):
    """`jax.grad(allow_int=True)` gives whole numbers gradients of dtype float0."""
    params = normal(key, SHAPES) | {"steps": jnp.arange(3)}
    loss = lambda p: jnp.sum(p["layer"]["kernel"] ** 2)
    tx = c2.guard_updates(c2.build("celo2_ortho", 1e-2, rules=[("steps", "frozen")]))
    grads = jax.grad(loss, allow_int=True)(params)
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates["steps"].dtype == jnp.int32 and not np.any(updates["steps"])
    assert np.any(updates["layer"]["kernel"]) and state.nonfinite_count == 0


def test_other_leaves_have_to_be_frozen():
    for leaf, message in ((jnp.ones(3, jnp.complex64), "complex64"), (jax.random.key(0), "key<fry>")):
        with pytest.raises(ValueError, match=f"leaf 'base' has dtype {message}, .*rules=..'base', 'frozen'"):
            c2.build("adamw").init({"base": leaf})


# ----------------------------------------------------------------------------------------------- transformations of JAX


@pytest.mark.parametrize("preset", PRESETS)
def test_derivatives_through_an_update_whose_gradients_are_stopped(preset, key):
    params = normal(key, SHAPES)
    tx = build(preset)
    forward = lambda p: jnp.sum((jnp.ones((2, 4)) @ p["layer"]["kernel"] + p["layer"]["bias"][None]) ** 2)

    def outer(params, rate):
        grads = jax.lax.stop_gradient(jax.grad(forward)(params))
        updates, _ = tx.update(grads, tx.init(params), params)
        return forward(jax.tree.map(lambda p, u: p + rate * u, params, updates))

    found, by_rate = jax.grad(outer, (0, 1))(params, 1.0)
    assert all(np.all(np.isfinite(x)) and np.any(x) for x in jax.tree.leaves(found))
    step = 1e-2
    wanted = (outer(params, 1.0 + step) - outer(params, 1.0 - step)) / (2 * step)
    np.testing.assert_allclose(by_rate, wanted, rtol=1e-2)


def test_derivatives_along_a_direction_agree_with_differences(key):
    """Of the learned rule, whose own reduction has a derivative rule: forward, against a difference quotient."""
    params = normal(key, SHAPES)
    grads, direction = normal(jax.random.fold_in(key, 1), SHAPES), normal(jax.random.fold_in(key, 2), SHAPES)
    tx = c2.celo2_direction(TINY)
    update = lambda p: tx.update(grads, tx.init(p), p)[0]["layer"]["kernel"]
    _, tangent = jax.jvp(update, (params,), (direction,))
    move = lambda t: jax.tree.map(lambda p, d: p + t * d, params, direction)
    wanted = (update(move(1e-2)) - update(move(-1e-2))) / 2e-2
    np.testing.assert_allclose(tangent, wanted, atol=2e-2 * float(jnp.max(jnp.abs(wanted))))


def test_updates_of_many_runs_at_once(key):
    params = jax.tree.map(lambda x: jnp.stack([x, 2.0 * x]), normal(key, SHAPES))
    tx = c2.build("celo2_ortho", 1e-2, weights=TINY)
    together = jax.vmap(lambda p: tx.update(p, tx.init(p), p)[0])(params)
    second = jax.tree.map(lambda x: x[1], params)
    alone = tx.update(second, tx.init(second), second)[0]
    assert_trees_close(jax.tree.map(lambda x: x[1], together), alone, 1e-5)


def test_an_optimizer_can_be_hashed_by_what_it_closes_over():
    """As Optimistix does; and weights can be a static argument of `jax.jit`."""
    for preset in NAMES:
        for function in build(preset, weight_decay={"hidden": 0.1, "embedding": 0.1}):
            for cell in inspect.unwrap(function).__closure__ or ():
                hash(cell.cell_contents)
    size = jax.jit(lambda weights, x: x * weights.theta.b0.size, static_argnums=0)
    assert size(TINY, 1.0) == size(c2.Weights(TINY.theta, TINY.config), 1.0)
    assert size._cache_size() == 1
