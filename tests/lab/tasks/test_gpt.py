"""The model: sizes, names, causality, number formats."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from celo2_harness.lab.tasks import GPT, MODELS, GPTConfig, LanguageModel, Task, default_text, gpt_loss, init_gpt

TINY = GPTConfig(width=16, layers=2, heads=2, context=8)


def _paths(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path[:-1], simple=True, separator="/") for path, _ in leaves}


@pytest.fixture(scope="module")
def params():
    return init_gpt(TINY, jax.random.key(0))


def test_parameters_have_the_usual_names(params):
    block = {"attention/qkv/kernel", "attention/projection/kernel", "mlp/up/kernel", "mlp/down/kernel"}
    block |= {f"{norm}/{part}" for norm in ("attention_norm", "mlp_norm") for part in ("scale", "bias")}
    rest = {"token_embedding/embedding", "position_embedding/embedding", "norm/scale", "norm/bias", "head/kernel"}
    assert _paths(params) == rest | {f"blocks/{i}/{name}" for i in range(2) for name in block}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("nano", 0.9), ("small", 11), ("gpt2", 86), pytest.param("gpt3-xl", 1213, marks=pytest.mark.slow)],
)
def test_models_have_the_sizes_that_the_help_says(name, millions):
    shapes = jax.eval_shape(lambda key: init_gpt(MODELS[name], key), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert round(count, 1 if count < 1 else None) == millions


def test_a_new_model_guesses_evenly(params):
    windows = np.arange(9, dtype=np.uint8)[None]
    assert float(gpt_loss(TINY, params, jnp.asarray(windows))) == pytest.approx(math.log(256), abs=0.1)


def test_no_prediction_sees_what_comes_after_it():
    model = GPT(TINY, nnx.Rngs(0))
    windows = jnp.arange(8, dtype=jnp.uint8)[None]
    before, after = nnx.jit(model)(windows)[0], nnx.jit(model)(windows.at[0, 5].set(200))[0]
    np.testing.assert_array_equal(before[:5], after[:5])
    assert (before[5:] != after[5:]).any(axis=1).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_the_loss_is_float32_whatever_the_model_is(dtype, param_dtype, params):
    config = dataclasses.replace(TINY, dtype=dtype, param_dtype=param_dtype)
    cast = jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)
    made = jax.eval_shape(lambda key: init_gpt(config, key), jax.random.key(0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(made)} == {param_dtype}
    windows = jnp.arange(27, dtype=jnp.uint8).reshape(3, 9)
    loss_of = jax.jit(gpt_loss, static_argnums=0)
    exact, loss = loss_of(TINY, params, windows), loss_of(config, cast, windows)
    # Eight bits of bfloat16 in logits of about 0.1 in size leave the loss right to a few thousandths.
    assert loss.dtype == jnp.float32 and float(loss) == pytest.approx(float(exact), abs=1e-2)


def test_recomputing_blocks_changes_nothing(params):
    windows = jnp.arange(27, dtype=jnp.uint8).reshape(3, 9)
    remat = dataclasses.replace(TINY, remat=True)
    plain = jax.jit(jax.grad(lambda p: gpt_loss(TINY, p, windows)))(params)
    again = jax.jit(jax.grad(lambda p: gpt_loss(remat, p, windows)))(params)
    # Another order of the same float32 operations.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads = 3: expected a divisor of the width 16"),
        ({"layers": 0}, "layers = 0: expected at least 1"),
        ({"dtype": "int8"}, "dtype = 'int8': expected one of float32, bfloat16"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_windows_longer_than_the_context_are_refused(params):
    with pytest.raises(ValueError, match="windows of 9 tokens, the model's context is 8"):
        gpt_loss(TINY, params, jnp.zeros((1, 10), jnp.uint8))


def test_the_language_model_is_a_task():
    task = LanguageModel(TINY, default_text(8), batch_size=3)
    assert isinstance(task, Task)
    assert hash(task) == hash(task)
    assert task.tokens_per_batch == 24
    assert task.validation().shape == (2048, 9)
    np.testing.assert_array_equal(task.validation(), LanguageModel(TINY, default_text(8), batch_size=5).validation())
