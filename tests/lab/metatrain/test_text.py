"""Tasks on text, and batches of several sizes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import META_CONFIG, META_IMAGES, META_LABELS, TINY, TINY_CONFIG, assert_trees_close, assert_trees_equal

import celo2_harness as c2
from celo2_harness.lab.metatrain import (
    InnerProblem,
    MetaTrainConfig,
    RunError,
    init_metatrain,
    metatrain_step,
    run_metatrain,
)
from celo2_harness.lab.metatrain.groups import InnerData, image_sets_of, run_groups
from celo2_harness.lab.metatrain.inner import ImageProblem, batch_weights
from celo2_harness.lab.metatrain.problem import Clock
from celo2_harness.lab.metatrain.text import TEXT_MODEL, TextProblem, text_classes
from celo2_harness.lab.metatrain.update import AdamState, LearnedState
from celo2_harness.lab.tasks import GPTConfig, ImageSets, gpt_loss, init_gpt, split_text
from celo2_harness.lab.tasks.text import byte_classes
from celo2_harness.lab.tasks.tiny_gpt import TinyGPTConfig, init_tiny_gpt, tiny_gpt_losses

SMALL = TinyGPTConfig(width=4, layers=1, heads=2, context=3, classes=8)
CONFIG = MetaTrainConfig(rule=TINY_CONFIG, hidden=2, batch=4, text_batch=4)
CLOCK = Clock(jnp.array(0), jnp.array(100))
IMAGES = ImageSets(
    images=jnp.asarray(META_IMAGES.reshape(20, 64)),
    labels=jnp.asarray(META_LABELS, jnp.int32),
    starts=jnp.array([0, 10], jnp.int32),
    sizes=jnp.array([10, 10], jnp.int32),
)
TEXT = jnp.asarray(np.random.default_rng(0).integers(0, 8, 200, dtype=np.uint8))


def test_classes_of_bytes():
    text = split_text(b"the cat sat on the mat. " * 40, "cats", 8)
    classes = byte_classes(text.train, 6)
    counts = np.bincount(text.train, minlength=256)
    most = sorted(range(256), key=lambda byte: (-counts[byte], byte))
    assert [sorted(set(text.train[classes == k].tolist())) for k in range(5)] == [[byte] for byte in most[:5]]
    assert set(text.train[classes == 5].tolist()) == set(most[5:]) & set(text.train.tolist())
    on_device = text_classes(text)
    assert on_device.dtype == jnp.uint8 and int(on_device.max()) < TEXT_MODEL.classes


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
    losses = tiny_gpt_losses(small, params, windows)
    assert losses.shape == (5,)
    np.testing.assert_allclose(jnp.mean(losses), gpt_loss(large, whole, windows), rtol=1e-5)


@pytest.mark.parametrize("variant", ["ortho", "base"])
def test_who_gets_which_leaf(variant):
    problem = TextProblem(dataclasses.replace(CONFIG, variant=variant), SMALL)
    assert isinstance(problem, InnerProblem)
    unroll = jax.eval_shape(problem.fresh, jax.random.key(0))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(unroll.params)]
    learned = [path for path, s in zip(paths, unroll.state, strict=True) if isinstance(s, LearnedState)]
    hidden = [f".blocks[0].{name}" for name in ("qkv", "projection", "up", "down")]
    assert learned == (hidden if variant == "ortho" else paths)
    views = dict(zip(paths, problem.views(), strict=True))
    # A kernel outputs x inputs has the factored axes of inputs x outputs: of a square the last one counts as larger.
    assert views[".blocks[0].projection"].factored == (1, 0)
    assert views[".tokens"] is None or views[".tokens"].factored == (1, 0)


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
    assert isinstance(unroll.state[0], AdamState) and unroll.batch_part is None


def test_windows_lie_in_the_text(key):
    problem = TextProblem(dataclasses.replace(CONFIG, text_batch=400), SMALL)
    starts = problem.sample(TEXT[:10], jnp.array(7), key)
    assert set(np.asarray(starts).tolist()) == set(range(7))  # the last window has bytes 6 to 9


def test_sizes_of_batches_are_log_uniform(key):
    problem = ImageProblem(dataclasses.replace(CONFIG, batch=64, smallest_batch=4), (64, 10))
    parts = jax.jit(jax.vmap(lambda k: problem.fresh(k).batch_part))(jax.random.split(key, 2000))
    place = np.log(np.asarray(parts) * 16) / np.log(16)
    assert place.min() >= -1e-5 and place.max() <= 1 + 1e-5
    # Of a uniform number: mean 1/2, deviation 0.289; four standard errors of 2000 samples.
    assert abs(place.mean() - 0.5) < 0.026 and abs(place.std() - 0.289) < 0.02
    sizes = [int(np.count_nonzero(batch_weights(part, 64))) for part in parts[:100]]
    assert sizes == np.round(np.asarray(parts[:100]) * 64).tolist() and min(sizes) >= 4
    assert all(float(jnp.sum(batch_weights(part, 64))) == pytest.approx(1.0) for part in parts[:20])
    assert np.count_nonzero(batch_weights(jnp.array(0.01), 8)) == 1  # text is never without a window
    assert batch_weights(None, 64) is None


def test_what_else_a_task_draws_does_not_depend_on_it(key):
    configs = (dataclasses.replace(CONFIG, smallest_batch=smallest) for smallest in (None, 1))
    plain, noisy = (ImageProblem(config, (64, 10)).fresh(key) for config in configs)
    assert plain.batch_part is None and noisy.batch_part is not None
    assert_trees_equal(noisy._replace(batch_part=None), plain)


def test_a_small_batch_is_the_first_part_of_a_full_one(key):
    half = jnp.array(0.5)
    noisy = dataclasses.replace(CONFIG, smallest_batch=1)
    small = dataclasses.replace(CONFIG, batch=2, text_batch=2)
    image, text = ImageProblem(noisy, (64, 10)), TextProblem(noisy, SMALL)
    pairs = [
        (image, ImageProblem(small, (64, 10)), IMAGES, jnp.array([3, 1, 4, 15])),
        (text, TextProblem(small, SMALL), TEXT, jnp.array([30, 10, 40, 15])),
    ]
    for problem, wanted, data, batch in pairs:
        unroll = problem.fresh(key)._replace(batch_part=half)
        got, loss = jax.jit(problem.step)(TINY.theta, unroll, CLOCK, data, batch)
        other, loss_there = jax.jit(wanted.step)(TINY.theta, unroll._replace(batch_part=None), CLOCK, data, batch[:2])
        assert float(loss) == pytest.approx(float(loss_there), rel=1e-5)
        assert_trees_close(got.params, other.params, 1e-4)


def test_text_counts_as_one_more_set():
    config = dataclasses.replace(META_CONFIG, text_tasks=3)
    images, text = run_groups(config, 2)
    assert (images.part, images.tasks, images.sets) == ("images", (0, 1, 2, 3), (0, 0, 1, 1))
    assert (text.part, text.tasks, text.sets) == ("text", (4, 5, 6), (2, 2, 2))
    assert run_groups(META_CONFIG, 2)[0].part is None and len(run_groups(META_CONFIG, 2)) == 1
    assert image_sets_of(config, InnerData(IMAGES, TEXT)) == image_sets_of(META_CONFIG, IMAGES) == 2
    with pytest.raises(ValueError, match=r"data: text_tasks = 3 needs InnerData\(images, text\), got ImageSets"):
        image_sets_of(config, IMAGES)
    with pytest.raises(ValueError, match="data: text_tasks = 0 needs ImageSets, got InnerData"):
        image_sets_of(META_CONFIG, InnerData(IMAGES, TEXT))


@pytest.mark.slow
def test_an_iteration_with_text_and_its_images_alone():
    """The image tasks do what they do without text."""
    config = dataclasses.replace(META_CONFIG, text_tasks=2, text_batch=2)
    image, text = run_groups(config, 2)
    # Adam for most leaves, which compiles sooner.
    groups = (image, text._replace(problem=TextProblem(dataclasses.replace(config, variant="ortho"), SMALL)))
    state = init_metatrain(config, 2, groups=groups)
    assert len(state.tasks) == 2
    state, metrics = metatrain_step(config, state, InnerData(IMAGES, TEXT), groups=groups)
    assert metrics.tasks.meta_loss.shape == (3,) and float(metrics.gradient_norm) > 0
    assert 0 < float(metrics.tasks.meta_loss[2]) <= 1.5 * math.log(8)
    alone, others = metatrain_step(META_CONFIG, init_metatrain(META_CONFIG, 2), IMAGES)
    np.testing.assert_allclose(metrics.tasks.meta_loss[:2], others.tasks.meta_loss, rtol=1e-5)
    assert_trees_equal(state.tasks[0].clock, alone.tasks[0].clock)


@pytest.mark.slow
def test_a_run_with_text(images, tmp_path):
    """Metrics name the text, the header has its digest, and a resumed run has to be given the same."""
    config = dataclasses.replace(META_CONFIG, text_tasks=1, text_batch=2, iterations=2)
    text = tmp_path / "text"
    text.write_text("abracadabra, " * 50)
    lines, stops = [], iter([True])
    options = {"inner_text": text, "log_every": 1, "on_log": lines.append}
    assert run_metatrain(config, images, tmp_path / "run", stop=lambda: next(stops, False), **options) is None
    other = tmp_path / "other"
    other.write_text("simsalabim, " * 50)
    with pytest.raises(RunError, match="made with text_sha256 = "):
        run_metatrain(config, images, tmp_path / "run", resume=True, inner_text=other)
    weights = run_metatrain(config, images, tmp_path / "run", resume=True, **options)
    assert [set(line["meta_loss"]) for line in lines] == [{"even", "odd", "text"}] * 2
    assert len(weights.provenance["text_sha256"]) == 64
    assert f"| text | SHA-256 `{weights.provenance['text_sha256']}` |" in (tmp_path / "run" / "weights.md").read_text()


def test_a_text_that_nobody_asked_for(images, tmp_path):
    with pytest.raises(RunError, match="no tasks are on text; give text_tasks, 8 for instance"):
        run_metatrain(META_CONFIG, images, tmp_path / "run", inner_text="text")
    (tmp_path / "text_8x8.npz").write_bytes((tmp_path.__class__(images) / "odd_8x8.npz").read_bytes())
    with pytest.raises(RunError, match="an image set is called 'text'"):
        run_metatrain(dataclasses.replace(META_CONFIG, text_tasks=1), str(tmp_path), tmp_path / "run")
    with pytest.raises(ValueError, match="text: there is no file"):
        run_metatrain(
            dataclasses.replace(META_CONFIG, text_tasks=1), images, tmp_path / "run", inner_text=tmp_path / "none"
        )
