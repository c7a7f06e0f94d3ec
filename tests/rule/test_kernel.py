"""The Pallas kernel beside the network as XLA compiles it; without a GPU its body is interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_theta, relative_error

import celo2_harness as c2
from celo2_harness import harness
from celo2_harness.rule import CELO2_CONFIG, default_view, init_moments, leaf_direction, view_from_axes
from celo2_harness.rule.channels import channel_groups, input_scales
from celo2_harness.rule.features import leaf_statistics
from celo2_harness.rule.kernel import network_in_tiles
from celo2_harness.rule.kernel_direction import direction_in_tiles
from celo2_harness.rule.network import first_layer

THETA = c2.Theta(*map(jnp.asarray, random_theta(30, 3)))
VIEWS = {
    "several tiles": default_view((16, 256)),
    "odd sizes": default_view((7, 13)),
    "stacked": view_from_axes((3, 8, 16), 1, 2),
    "batch axis factored": default_view((16, 4, 6)),
    "vector": default_view((24,)),
    "stacked vectors": view_from_axes((3, 16), (), 1),
    "scalar": default_view(()),
}


# The others compile long, and are variants.
SLOW = ("batch axis factored", "stacked vectors", "scalar")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in VIEWS])
def test_both_kernels_agree(name):
    view, rng = VIEWS[name], np.random.default_rng(0)
    g, p = (jnp.asarray(rng.normal(size=view.shape), jnp.float32) for _ in range(2))
    moments = init_moments(CELO2_CONFIG, view)
    step = functools.partial(jax.jit, static_argnums=0)(
        lambda kernel, *arrays: leaf_direction(THETA, CELO2_CONFIG, view, *arrays, kernel)[:2]
    )
    wanted, new = step("xla", g, p, moments)
    got, same = step("pallas", g, p, moments)
    assert relative_error(got, wanted) <= 1e-5
    for field in ("mu", "nu", "diag"):
        jax.tree.map(np.testing.assert_array_equal, getattr(same, field), getattr(new, field))
    # Their sums run in the order of the tiles: a few units in the last place.
    for field in ("row", "col"):
        one_by_one = lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-7)
        jax.tree.map(one_by_one, getattr(same, field), getattr(new, field))


# Newer versions of JAX announce that Pallas will leave Triton for Mosaic.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "kernels"),
    [pytest.param("several tiles", 3, marks=pytest.mark.slow), ("odd sizes", 3), ("stacked vectors", 2)],
)
def test_the_kernels_lower_for_a_gpu(name, kernels):
    # Lowering needs no GPU; it is where unsupported operations and tiles are refused.
    view = VIEWS[name]
    arguments = (jnp.zeros(view.shape), jnp.zeros(view.shape), init_moments(CELO2_CONFIG, view))
    direction = lambda *arguments: direction_in_tiles(THETA, CELO2_CONFIG, view, *arguments)
    text = _lowered_for_a_gpu(direction, *arguments)
    assert text.count("xla.gpu.triton") == kernels and "stablehlo.case" not in text


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_the_network_alone_lowers_for_a_gpu():
    view = VIEWS["several tiles"]

    def direction(g, p, moments):
        groups = channel_groups(CELO2_CONFIG, view, leaf_statistics(view, g, p, moments))
        layer = first_layer(THETA, view, groups, input_scales(view, groups))
        return network_in_tiles(view, THETA, layer, groups[0], interpret=False)

    arguments = (jnp.zeros(view.shape), jnp.zeros(view.shape), init_moments(CELO2_CONFIG, view))
    assert "triton" in _lowered_for_a_gpu(direction, *arguments)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_on_a_gpu_the_kernels_are_the_default(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    view = VIEWS["several tiles"]
    step = lambda *arrays: leaf_direction(THETA, CELO2_CONFIG, view, *arrays)[:2]
    arguments = (jnp.zeros(view.shape), jnp.zeros(view.shape), init_moments(CELO2_CONFIG, view))
    assert _lowered_for_a_gpu(step, *arguments).count("xla.gpu.triton") == 3
    # The same program may yet be compiled for a CPU, which has no such kernels.
    assert "triton" not in jax.jit(step).trace(*arguments).lower(lowering_platforms=("cpu",)).as_text()
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "triton" not in _lowered_for_a_gpu(step, *arguments)


def _lowered_for_a_gpu(function, *arguments):
    # JAX 0.12 asks for which one.
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        # A new function, so that nothing of an earlier trace is taken.
        traced = jax.jit(lambda *arguments: function(*arguments)).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel = 'cuda': expected one of auto, xla, pallas"):
        harness.build("celo2_ortho", kernel="cuda")


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_the_kernels_keep_the_states_dtype_and_ignore_matrices_without_a_gradient(dtype):
    view, rng = VIEWS["stacked"], np.random.default_rng(1)
    g = jnp.asarray(rng.normal(size=view.shape), jnp.bfloat16).at[1].set(0.0).at[0, 0, 0].set(jnp.nan)
    moments = init_moments(CELO2_CONFIG, view, jnp.dtype(dtype))
    found = [leaf_direction(THETA, CELO2_CONFIG, view, g, g, moments, kernel) for kernel in ("xla", "pallas")]
    for got in found:
        assert jax.tree.map(lambda x: x.dtype, got.moments) == jax.tree.map(lambda x: x.dtype, moments)
        assert not np.any(got.direction[1]) and np.any(got.direction[0])
    assert relative_error(found[1].direction, found[0].direction) <= 1e-5


@pytest.mark.slow
def test_leaves_that_share_a_batch_agree_too():
    # Of different shapes, so that some are padded; and one that lies transposed.
    shapes = {"a": (5, 9), "b": (9, 6), "c": (4, 8), "bias": (7,), "scale": (3,)}
    rng = np.random.default_rng(2)
    params, grads = (
        {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()} for _ in range(2)
    )
    found = []
    for kernel in ("xla", "pallas"):
        tx = c2.celo2_direction("celo2", kernel=kernel)
        found.append(jax.jit(tx.update)(grads, tx.init(params), params))
    for name in shapes:
        assert relative_error(found[1][0][name], found[0][0][name]) <= 1e-5
    jax.tree.map(lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-6), found[1][1], found[0][1])


@pytest.mark.slow
def test_the_kernels_run_in_a_batch_of_leaves():
    view, rng = VIEWS["odd sizes"], np.random.default_rng(3)
    g = jnp.asarray(rng.normal(size=(3, *view.shape)), jnp.float32)
    moments = init_moments(CELO2_CONFIG, view)
    found = [
        jax.vmap(lambda g, kernel=kernel: leaf_direction(THETA, CELO2_CONFIG, view, g, g, moments, kernel).direction)(g)
        for kernel in ("xla", "pallas")
    ]
    assert relative_error(found[1], found[0]) <= 1e-5


def test_the_report_says_how_updates_are_computed():
    params = {"fc": {"kernel": jnp.zeros((8, 4))}}
    assert "by XLA (kernel='auto')" in c2.describe(params)
    assert "in Pallas kernels (kernel='pallas')" in c2.describe(params, kernel="pallas")
    assert "precision BF16_BF16_F32" in c2.describe(params, precision="BF16_BF16_F32")
