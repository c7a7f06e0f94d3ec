"""Newton-Schulz as one Pallas kernel beside the plain one; without a GPU its body is interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from celo2_harness.rule import newton_schulz
from celo2_harness.rule.newton_schulz_kernel import newton_schulz_in_registers


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (10, 32), (32, 10), (5, 5), (1, 7), (16, 16)])
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
def test_it_agrees_with_the_plain_one(shape, coefficients):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    got = newton_schulz_in_registers(x, coefficients)
    assert got.shape == shape
    assert relative_error(got, newton_schulz(x, coefficients)) <= 5e-5


def test_batches_are_mapped_and_zeros_stay_zero():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 10, 32)), jnp.float32).at[1, 1].set(0.0)
    got = jax.vmap(jax.vmap(newton_schulz_in_registers))(x)
    assert relative_error(got, newton_schulz(x)) <= 1e-5
    np.testing.assert_array_equal(got[1, 1], 0.0)


def test_a_large_matrix_is_refused():
    with pytest.raises(ValueError, match=r"shape \(129, 4\), expected at most 128 x 128"):
        newton_schulz_in_registers(jnp.zeros((129, 4)))


# Newer versions of JAX announce that Pallas will leave Triton for Mosaic.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_it_lowers_for_a_gpu():
    x = jnp.zeros((4, 10, 32))  # made before the mesh, which has no device to make it on
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    automatic = (jax.sharding.AxisType.Auto,)  # nothing is split, also not inside of the kernel
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=automatic, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.vmap(lambda x: newton_schulz_in_registers(x, interpret=False))).trace(x)
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
