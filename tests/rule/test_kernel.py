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
    jax.tree.map(np.testing.assert_array_equal, same, new)


# Newer versions of JAX announce that Pallas will leave Triton for Mosaic.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_the_kernel_lowers_for_a_gpu():
    # Lowering needs no GPU; it is where unsupported operations and tiles are refused.
    view = VIEWS["several tiles"]
    arguments = (jnp.zeros(view.shape), jnp.zeros(view.shape), init_moments(CELO2_CONFIG, view))

    def direction(g, p, moments):
        groups = channel_groups(CELO2_CONFIG, view, leaf_statistics(view, g, p, moments))
        layer = first_layer(THETA, view, groups, input_scales(view, groups))
        return network_in_tiles(view, THETA, layer, groups[0], interpret=False)

    # JAX 0.12 asks for which one.
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(direction).trace(*arguments)
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel = 'cuda': expected one of xla, pallas"):
        harness.build("celo2_ortho", kernel="cuda")
