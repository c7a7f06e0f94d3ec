"""Orthogonalisation of trees: which leaves, as which matrices, together or one by one."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
import pytest
from flax import nnx
from helpers import assert_trees_close, normal, relative_error
from optax.contrib import MuonDimensionNumbers

import celo2_harness as c2
from celo2_harness import routing


def apply(tx, tree):
    return tx.update(tree, tx.init(tree))[0]


def test_matrices_of_one_shape_go_together_and_come_back_in_place(key):
    tree = normal(key, {"a": (4, 6), "b": (2, 4, 6), "c": (6, 4), "d": (4, 6), "v": (5,), "s": (), "e": (0, 6)})
    got = apply(c2.orthogonalize(), tree)
    for name in "abcd":
        assert relative_error(got[name], plain.newton_schulz(np.asarray(tree[name]))) <= 3e-5, name
    for name in "vse":
        assert got[name] is tree[name]


def test_one_product_per_shape():
    tree = {"a": jnp.ones((4, 6)), "b": jnp.ones((2, 4, 6)), "d": jnp.ones((4, 6))}
    products = lambda t: str(jax.make_jaxpr(lambda x: apply(c2.orthogonalize(), x))(t)).count("dot_general")
    assert products(tree) == products({"a": tree["a"]}) > 0


def test_views(key):
    leaf = normal(key, (3, 3, 2, 4))
    got = apply(c2.orthogonalize(weight_dimension_numbers=MuonDimensionNumbers((0, 1, 2), (3,))), leaf)
    assert relative_error(got, plain.newton_schulz(np.asarray(leaf).reshape(18, 4)).reshape(leaf.shape)) <= 3e-5
    heads = normal(key, (6, 2, 4))
    got = apply(c2.orthogonalize(weight_dimension_numbers=MuonDimensionNumbers((0,), (2,))), heads)
    wanted = plain.newton_schulz(np.asarray(heads).transpose(1, 0, 2)).transpose(1, 0, 2)
    assert relative_error(got, wanted) <= 3e-5
    vectors = normal(key, (3, 5))
    assert apply(c2.orthogonalize(weight_dimension_numbers=MuonDimensionNumbers((), (1,))), vectors) is vectors


def test_options_reach_the_iteration(key):
    tree = {"w": normal(key, (4, 6))}
    assert_trees_close(
        apply(c2.orthogonalize("polar_express"), tree), {"w": c2.newton_schulz(tree["w"], "polar_express")}, 1e-6
    )
    coarse = apply(c2.orthogonalize(dtype=jnp.bfloat16), tree)["w"]
    assert coarse.dtype == jnp.float32 and relative_error(coarse, c2.newton_schulz(tree["w"])) > 1e-4
    half = apply(c2.orthogonalize(eps=1.0), {"w": tree["w"] / jnp.linalg.norm(tree["w"])})["w"]
    assert relative_error(half, c2.newton_schulz(tree["w"])) > 1e-2  # a floor as large as the matrix is felt
    with pytest.raises(ValueError, match="coefficients = 'quintics'"):
        c2.orthogonalize("quintics")


def test_scale_by_shape():
    tree = {"w": jnp.ones((2, 3, 5)), "b": jnp.ones(5), "s": jnp.ones(())}
    got = apply(c2.scale_by_shape(0.2), tree)
    np.testing.assert_allclose(got["w"], 0.2 * np.sqrt(5.0), rtol=1e-6)
    np.testing.assert_array_equal(got["b"], tree["b"])
    np.testing.assert_array_equal(got["s"], tree["s"])
    got = apply(c2.scale_by_shape(1.0, weight_dimension_numbers=MuonDimensionNumbers((0, 1), (2,))), tree["w"])
    np.testing.assert_allclose(got, np.sqrt(6.0), rtol=1e-6)


def test_steps_shrink_with_the_number_of_inputs(key):
    tree = {"wide": normal(key, (3, 4, 32)), "square": normal(key, (16, 16)), "b": jnp.ones(5)}
    got = apply(optax.chain(c2.normalize_rms(), c2.scale_by_width(16)), tree)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(got["wide"]), axis=(1, 2))), 2.0, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(got["square"]))), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(got["b"], tree["b"])
    got = apply(c2.scale_by_width(6, 1.0, weight_dimension_numbers=MuonDimensionNumbers((0, 1), (2,))), tree["wide"])
    np.testing.assert_allclose(got, tree["wide"] / 2, rtol=1e-6)


@pytest.mark.parametrize(
    "shape, inputs, outputs",
    [
        ((3, 3, 4, 8), (0, 1, 2), 3),  # Flax
        ((3, 3, 8, 4), (0, 1, 3), 2),  # Flax, transposed
        ((8, 4, 3, 3), (1, 2, 3), 0),  # PyTorch
        ((4, 8, 3, 3), (0, 2, 3), 1),  # PyTorch, transposed
        ((5, 3, 3, 3, 4, 8), (1, 2, 3, 4), 5),  # five stacked ones of a volume
        ((2, 2, 8), (0, 1), 2),  # two heads of two
    ],
)
def test_the_taps_of_a_convolution_are_no_inputs(shape, inputs, outputs):
    numbers = MuonDimensionNumbers(inputs, (outputs,))
    got = apply(c2.scale_by_width(1, 1.0, weight_dimension_numbers=numbers), jnp.ones(shape))
    np.testing.assert_allclose(got, 0.25, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_widths_scale_as_the_first_muon_does(shape, key):
    """Its factor of a semi-orthogonal matrix is sqrt(max(1, outputs / inputs))."""
    tree = {"w": normal(key, shape)}
    orthogonal = c2.orthogonalize([(1.5, -0.5, 0.0)] * 20)
    got = apply(optax.chain(orthogonal, c2.normalize_rms(), c2.scale_by_width(1)), tree)["w"]
    inputs, outputs = shape
    wanted = apply(orthogonal, tree)["w"] * max(1.0, outputs / inputs) ** 0.5
    np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_a_semi_orthogonal_matrix_gets_the_rms_asked_for(key):
    tree = {"w": normal(key, (4, 12))}
    got = apply(optax.chain(c2.orthogonalize([(1.5, -0.5, 0.0)] * 20), c2.scale_by_shape(0.2)), tree)["w"]
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(got))), 0.2, rtol=1e-3)


def test_views_of_variables_serve_plain_arrays_and_masked_trees():
    """`nnx.Optimizer` gives `init` variables and `update` the arrays in them; `optax.partition` masks both."""
    model = nnx.Dict(fc=nnx.Linear(4, 6, rngs=nnx.Rngs(0)), head=nnx.Linear(6, 2, rngs=nnx.Rngs(1)))
    params = nnx.state(model, nnx.Param)
    views = routing.view_params(params)
    hidden = c2.orthogonalize(weight_dimension_numbers=views)
    tx = optax.partition({"hidden": hidden, "vector": optax.sgd(1.0), "head": optax.sgd(1.0)}, routing.label_params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = model["fc"].kernel[...]
    optimizer.update(model, params)
    expected = c2.orthogonalize().update({"fc": before}, c2.orthogonalize().init({"fc": before}))[0]["fc"]
    np.testing.assert_allclose(model["fc"].kernel[...] - before, expected, rtol=1e-5, atol=1e-6)


def test_large_matrices_share_batches_on_accelerators(key, monkeypatch):
    tree = normal(key, {"a": (24, 40), "b": (40, 24), "c": (24, 40), "d": (24, 24)})
    products = lambda: str(jax.make_jaxpr(lambda tree: apply(c2.orthogonalize(), tree))(tree)).count("dot_general")
    monkeypatch.setattr(sys.modules[c2.orthogonalize.__module__], "LARGEST_STACKED", 1)
    alone = products()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert products() * 4 == alone
    for name, got in apply(c2.orthogonalize(precision="highest"), tree).items():
        assert relative_error(got, plain.newton_schulz(np.asarray(tree[name]))) <= 3e-5, name
