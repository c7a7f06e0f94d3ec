"""Inner tasks on text."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import META_CONFIG, TINY_CONFIG, assert_trees_equal

import celo2_harness as c2
from celo2_harness.lab.errors import InputError
from celo2_harness.lab.metatrain import (
    InnerProblem,
    MetaTrainConfig,
    init_metatrain,
    load_data,
    metatrain_step,
    run_groups,
    run_metatrain,
)
from celo2_harness.lab.metatrain.adam import AdamState
from celo2_harness.lab.metatrain.celo2_rule import LearnedState
from celo2_harness.lab.metatrain.problem import Clock
from celo2_harness.lab.metatrain.text_problem import TextProblem, TinyGPTConfig, init_tiny_gpt, tiny_gpt_losses
from celo2_harness.lab.tasks import GPTConfig, byte_classes, gpt_loss, init_gpt, split_text

SMALL = TinyGPTConfig(width=4, layers=1, heads=2, context=3, classes=8)
CONFIG = MetaTrainConfig(rule=TINY_CONFIG, hidden=2, batch=4, text_batch=4)
TEXT = jnp.asarray(np.random.default_rng(0).integers(0, 8, 200, dtype=np.uint8))


def test_classes_of_bytes():
    text = split_text(b"the cat sat on the mat. " * 40, "cats", 8)
    classes = byte_classes(text.train, 6)
    counts = np.bincount(text.train, minlength=256)
    most = sorted(range(256), key=lambda byte: (-counts[byte], byte))
    assert [sorted(set(text.train[classes == k].tolist())) for k in range(5)] == [[byte] for byte in most[:5]]
    assert set(text.train[classes == 5].tolist()) == set(most[5:]) & set(text.train.tolist())


@pytest.mark.slow
def test_the_tiny_model_is_the_large_one_with_other_sizes(key):
    """The same parameters in the flax model, whose kernels are inputs x outputs and whose bytes are 256."""
    large = GPTConfig(width=4, layers=1, heads=2, context=3)
    small = dataclasses.replace(SMALL, classes=256)
    params = init_tiny_gpt(small, key)
    (block,) = params.blocks
    state = nnx.to_pure_dict(init_gpt(large, key))
    (theirs,) = state["blocks"].values()
    theirs["attention"]["qkv"]["kernel"] = block.qkv.T
    theirs["attention"]["projection"]["kernel"] = 30.0 * block.projection.T
    theirs["mlp"]["up"]["kernel"], theirs["mlp"]["down"]["kernel"] = 30.0 * block.up.T, 30.0 * block.down.T
    state["token_embedding"]["embedding"] = params.tokens
    state["position_embedding"]["embedding"] = params.positions
    state["head"]["kernel"] = params.head.T
    whole = init_gpt(large, key)
    nnx.replace_by_pure_dict(whole, state)
    # Scaled up, so that no part is small.
    block = block._replace(projection=30.0 * block.projection, up=30.0 * block.up, down=30.0 * block.down)
    params = params._replace(blocks=(block,))
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 256, (5, 4)))
    losses = jax.jit(tiny_gpt_losses, static_argnums=0)(small, params, windows)
    assert losses.shape == (5,)
    wanted = jax.jit(gpt_loss, static_argnums=0)(large, whole, windows)
    np.testing.assert_allclose(jnp.mean(losses), wanted, rtol=1e-5)


@pytest.mark.parametrize("variant", ["ortho", "base"])
def test_who_gets_which_leaf(variant):
    problem = TextProblem(dataclasses.replace(CONFIG, variant=variant), SMALL)
    assert isinstance(problem, InnerProblem)
    unroll = jax.eval_shape(problem.fresh, jax.random.key(0))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(unroll.params)]
    learned = [path for path, s in zip(paths, unroll.state, strict=True) if isinstance(s, LearnedState)]
    hidden = [f".blocks[0].{name}" for name in ("qkv", "projection", "up", "down")]
    assert learned == (hidden if variant == "ortho" else paths)


@pytest.mark.slow
def test_text_is_learned_by_a_sensible_rule():
    """Newton-Schulz of the gradient is Muon without momentum, which learns to count to five."""
    config = dataclasses.replace(CONFIG, augmentation=1.0, inner_learning_rates=(3e-3, 3e-3), adam_factor=5.0)
    problem = TextProblem(config, SMALL)
    text = jnp.asarray(np.tile(np.arange(5, dtype=np.uint8), 40))
    # A rule by hand, whose direction is its first feature.
    assert TINY_CONFIG.features[0] == "gradient"
    sign = jnp.array([1.0, -1.0])
    theta = c2.Theta(
        w0=jnp.zeros((4, 2)).at[0].set(sign),
        b0=jnp.zeros(2),
        w1=jnp.eye(2),
        b1=jnp.zeros(2),
        w2=jnp.zeros((2, 3)).at[:, 0].set(sign),
        b2=jnp.zeros(3),
    )

    @jax.jit
    def run(key):
        def step(unroll, t):
            batch = problem.sample(text, jnp.array(0), jax.random.fold_in(key, t))
            return problem.step(theta, unroll, Clock(t, jnp.array(200)), text, batch)

        return jax.lax.scan(step, problem.fresh(key), jnp.arange(200))

    unroll, losses = run(jax.random.key(0))
    assert float(losses[0]) == pytest.approx(math.log(8), abs=0.05)
    assert float(losses[-5:].mean()) < 0.5  # without the context: ln 5 = 1.6
    assert isinstance(unroll.state[0], AdamState)


def test_windows_lie_in_the_text(key):
    problem = TextProblem(dataclasses.replace(CONFIG, text_batch=400), SMALL)
    starts = problem.sample(TEXT[:10], jnp.array(7), key)
    assert set(np.asarray(starts).tolist()) == set(range(7))  # the last window has bytes 6 to 9


def test_text_counts_as_one_more_set():
    config = dataclasses.replace(META_CONFIG, text_tasks=3)
    images, text = run_groups(config, 2)
    assert (images.part, images.tasks, images.sets) == ("images", (0, 1, 2, 3), (0, 0, 1, 1))
    assert (text.part, text.tasks, text.sets) == ("text", (4, 5, 6), (2, 2, 2))
    assert len(run_groups(META_CONFIG, 2)) == 1


@pytest.mark.slow
def test_an_iteration_with_text_and_its_images_alone(inner_data):
    """The image tasks do what they do without text."""
    config = dataclasses.replace(META_CONFIG, text_tasks=2, text_batch=2)
    image, text = run_groups(config, 2)
    # Adam for most leaves, which compiles sooner.
    groups = (image, text._replace(problem=TextProblem(dataclasses.replace(config, variant="ortho"), SMALL)))
    state = init_metatrain(config, 2, groups=groups)
    assert len(state.tasks) == 2
    state, metrics = metatrain_step(config, state, inner_data._replace(text=TEXT), groups=groups)
    assert metrics.tasks.meta_loss.shape == (3,) and float(metrics.gradient_norm) > 0
    assert 0 < float(metrics.tasks.meta_loss[2]) <= 1.5 * math.log(8)
    alone, others = metatrain_step(META_CONFIG, init_metatrain(META_CONFIG, 2), inner_data)
    np.testing.assert_allclose(metrics.tasks.meta_loss[:2], others.tasks.meta_loss, rtol=1e-5)
    assert_trees_equal(state.tasks[0].clock, alone.tasks[0].clock)


@pytest.mark.slow
def test_a_run_with_text(images, tmp_path):
    """Metrics name the text, the header has its digest, and a resumed run has to be given the same."""
    config = dataclasses.replace(META_CONFIG, text_tasks=1, text_batch=2, iterations=1)
    for name, word in (("text", "abracadabra, "), ("other", "simsalabim, ")):
        (tmp_path / name).write_text(word * 50)
    data, other = (load_data(config, images, text=tmp_path / name) for name in ("text", "other"))
    weights = run_metatrain(config, data, tmp_path / "run")
    assert set(weights.provenance["final_meta_loss"]) == {"even", "odd", "text"}
    assert weights.provenance["text_sha256"] == data.digests["text_sha256"]
    assert f"| text | SHA-256 `{data.digests['text_sha256']}` |" in (tmp_path / "run" / "weights.md").read_text()
    with pytest.raises(InputError, match="text_sha256 is "):
        run_metatrain(config, other, tmp_path / "run", resume=True)


def test_a_text_that_nobody_asked_for(images, tmp_path):
    with pytest.raises(ValueError, match="no tasks are on text; give text_tasks, 8 for instance"):
        load_data(META_CONFIG, images, text="text")
    config = dataclasses.replace(META_CONFIG, text_tasks=1)
    (tmp_path / "text_8x8.npz").write_bytes((tmp_path.__class__(images) / "odd_8x8.npz").read_bytes())
    with pytest.raises(ValueError, match="an image set is called 'text'"):
        load_data(config, tmp_path)
    with pytest.raises(ValueError, match="text: there is no file"):
        load_data(config, images, text=tmp_path / "none")
