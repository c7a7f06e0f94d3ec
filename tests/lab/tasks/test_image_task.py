"""Image tasks: what is computed, what is seen in which order, where parameters go, what bad data are told."""

import dataclasses
import gzip
import json
import math
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import celo2_harness as c2
from celo2_harness.lab.tasks import FORMATS, TASKS, ImageFormat, ImageTask, Task, load_images, make_task
from celo2_harness.lab.tasks.image_models import (
    IMAGE_MODELS,
    AutoencoderConfig,
    ConvConfig,
    ImageMLPConfig,
    ViT,
    ViTConfig,
)
from celo2_harness.lab.training.loop import evaluate, init_state, train_step

KINDS = ("image_mlp", "conv", "vit", "autoencoder")
SMALL = ImageFormat(4, 4, 3, 5, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tasks():
    return {kind: make_task(kind, "digits", batch=32) for kind in KINDS}


# The others compile long.
@pytest.mark.parametrize(
    "kind", [kind if kind == "image_mlp" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_loss_falls_and_evaluation_is_the_mean(kind, tasks):
    task = tasks[kind]
    tx = optax.adam(1e-2)
    state = init_state(task, tx, seed=0)
    held_out = task.validation()
    assert len(held_out.labels) == 299
    before = float(evaluate(task, state.params, held_out))
    # A new model knows nothing: of ten classes, or of pixels between black and white.
    assert before == pytest.approx(math.log(2) if kind == "autoencoder" else math.log(10), rel=0.2)
    # Mapped over images in small batches, or all at once.
    assert before == pytest.approx(float(jax.jit(task.loss)(state.params, held_out)), rel=1e-5)
    params, opt_state = state.params, state.opt_state
    for step in range(60):
        params, opt_state, _ = train_step(task, tx, params, opt_state, task.batch(0, step))
    # Measured: 0.17 (mlp), 0.51 (conv), 0.74 (vit), 0.45 (autoencoder) of the loss before.
    assert float(evaluate(task, params, held_out)) < 0.85 * before


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_a_function_of_seed_and_step(kind, tasks):
    task, again = tasks[kind], make_task(kind, "digits", batch=32)
    first = task.batch(3, 7)
    np.testing.assert_array_equal(first.images, again.batch(3, 7).images)
    np.testing.assert_array_equal(first.labels, again.batch(3, 7).labels)
    for other in (task.batch(3, 8), task.batch(4, 7)):
        assert (first.images != other.images).any()


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_are_tasks(kind, tasks):
    task = tasks[kind]
    assert isinstance(task, Task) and len({task, task}) == 1 and task.tokens_per_batch == 32
    assert task.unit == ("nats per pixel" if kind == "autoencoder" else "nats per image")
    described = task.describe()
    assert json.loads(json.dumps(described)) == described
    assert described == make_task(kind, "digits", batch=32).describe()
    assert described != make_task(kind, "digits", batch=31).describe()
    others = [tasks[other].describe() for other in KINDS if other != kind]
    assert described not in others


def test_descriptions_tell_data_apart():
    task = make_task("image_mlp", "digits", batch=2)
    flipped = dataclasses.replace(task.data, labels=task.data.labels[::-1])
    assert dataclasses.replace(task, data=flipped).describe() != task.describe()


def test_parts_do_not_overlap(tasks):
    data = tasks["image_mlp"].data
    assert len(data.labels) + len(data.held_out_labels) == 1797
    train = {image.tobytes() for image in data.images}
    assert not train & {image.tobytes() for image in data.held_out_images}


def test_formats_state_the_statistics_of_the_training_images(tasks):
    pixels = tasks["image_mlp"].data.images / 255.0
    assert FORMATS["digits"].mean == pytest.approx((pixels.mean(),), abs=1e-4)
    assert FORMATS["digits"].deviation == pytest.approx((pixels.std(),), abs=1e-4)


def _small_task(model, objective="classification"):
    data = load_images(None, FORMATS["digits"])  # not used: the batch below has another format
    return ImageTask(model, SMALL, data, 2, objective)


def _small_batch():
    images = RNG.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    batch = make_task("image_mlp", batch=2).batch(0, 0)
    return batch._replace(images=images, labels=np.array([1, 4], np.int32))


def _plain(params):
    """Names -> float64 arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p[:-1], simple=True, separator="/"): np.asarray(x, np.float64) for p, x in leaves}


def _affine(p, name, x):
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def test_mlp_by_hand():
    task, batch = _small_task(ImageMLPConfig((6, 7))), _small_batch()
    params = task.init(jax.random.key(0))
    p = _plain(params)
    x = ((batch.images / 255.0 - SMALL.mean) / SMALL.deviation).reshape(2, 48)
    for layer in ("layers/0", "layers/1"):
        x = np.maximum(_affine(p, layer, x), 0)
    logits = _affine(p, "head", x)
    expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[[0, 1], batch.labels])
    assert float(task.loss(params, batch)) == pytest.approx(expected, rel=1e-5)


def test_convolutional_net_by_hand():
    """One 3x3 layer with stride 1: every position sees its neighbours, and zeros outside the image."""
    task, batch = _small_task(ConvConfig((6,), (1,))), _small_batch()
    params = task.init(jax.random.key(0))
    p = _plain(params)
    x = np.pad((batch.images / 255.0 - SMALL.mean) / SMALL.deviation, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = p["convolutions/0/kernel"]
    y = sum(x[:, i : i + 4, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3))
    logits = _affine(p, "head", np.maximum(y + p["convolutions/0/bias"], 0).mean((1, 2)))
    expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[[0, 1], batch.labels])
    assert float(task.loss(params, batch)) == pytest.approx(expected, rel=1e-5)


def test_autoencoder_by_hand():
    task, batch = _small_task(AutoencoderConfig((6, 2)), "reconstruction"), _small_batch()
    params = task.init(jax.random.key(0))
    p = _plain(params)
    brightness = (batch.images / 255.0).reshape(2, 48)
    x = ((batch.images / 255.0 - SMALL.mean) / SMALL.deviation).reshape(2, 48)
    code = _affine(p, "encoder/1", np.maximum(_affine(p, "encoder/0", x), 0))
    logits = _affine(p, "output", np.maximum(_affine(p, "decoder/0", code), 0))
    chance = 1 / (1 + np.exp(-logits))
    expected = -np.mean(brightness * np.log(chance) + (1 - brightness) * np.log(1 - chance))
    assert float(task.loss(params, batch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_vision_transformer_sees_all_patches_and_knows_order_by_positions_alone():
    """Patches and positions moved together leave the logits; a causal mask or a wrong cut would not."""
    model = ViT(ViTConfig(patch=2, width=8, layers=2, heads=2), SMALL, nnx.Rngs(0))
    images = jnp.asarray(RNG.normal(size=(2, 4, 4, 3)), jnp.float32)
    logits = model(images)
    swapped = jnp.concatenate([images[:, 2:], images[:, :2]], axis=1)  # the lower two patches first
    assert not np.allclose(model(swapped), logits, atol=1e-5)
    table = model.position_embedding.embedding
    table[...] = table[...][jnp.array([2, 3, 0, 1])]
    np.testing.assert_allclose(model(swapped), logits, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "size", "count"),
    [("vit", "digits", 26e3), ("vit", "fashion", 0.2e6), ("conv", "digits", 5e3), ("conv", "fashion", 24e3)],
)
def test_models_have_the_sizes_that_the_table_says(kind, size, count):
    build = IMAGE_MODELS[kind][size].build
    shapes = jax.eval_shape(lambda: nnx.state(build(FORMATS[size], nnx.Rngs(0)), nnx.Param))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(count, rel=0.03)


# What build() sees: hidden matrices are those between the first tokens and the output.
ROUTES = {
    ImageMLPConfig((6, 7)): {"layers/0/kernel": "hidden", "layers/1/kernel": "hidden", "head/kernel": "head"},
    ConvConfig((6, 7), (1, 2)): {
        "convolutions/0/kernel": "hidden",
        "convolutions/1/kernel": "hidden",
        "head/kernel": "head",
    },
    ViTConfig(2, 8, 1, 2): {
        "patch_embedding/kernel": "embedding",
        "position_embedding/embedding": "embedding",
        "blocks/0/attention/qkv/kernel": "hidden",
        "blocks/0/attention/projection/kernel": "hidden",
        "blocks/0/mlp/up/kernel": "hidden",
        "blocks/0/mlp/down/kernel": "hidden",
        "head/kernel": "head",
    },
    AutoencoderConfig((6, 2)): {
        "encoder/0/kernel": "hidden",
        "encoder/1/kernel": "hidden",
        "decoder/0/kernel": "hidden",
        "output/kernel": "head",
    },
}


@pytest.mark.parametrize("model", ROUTES, ids=lambda model: type(model).__name__)
def test_routing(model):
    params = jax.eval_shape(lambda: nnx.state(model.build(SMALL, nnx.Rngs(0)), nnx.Param))
    labels = jax.tree_util.tree_leaves_with_path(c2.label_params(params))
    labels = {jax.tree_util.keystr(path[:-1], simple=True, separator="/"): label for path, label in labels}
    vectors = {name: label for name, label in labels.items() if name not in ROUTES[model]}
    assert {name: labels[name] for name in ROUTES[model]} == ROUTES[model]
    assert set(vectors.values()) == {"vector"}


def test_convolutions_are_one_matrix_each_and_the_first_on_grey_images_is_no_hidden_one():
    model = ConvConfig((6, 7), (1, 2))
    colour, grey = (
        str(c2.describe(jax.eval_shape(lambda form=form: nnx.state(model.build(form, nnx.Rngs(0)), nnx.Param))))
        for form in (SMALL, FORMATS["digits"])
    )
    row = lambda report, layer: next(x for x in report.splitlines() if x.startswith(f"convolutions/{layer}/kernel"))
    assert "3*3*3 -> 6 " in row(colour, 0) and " hidden " in row(colour, 0)
    assert "3*3*6 -> 7 " in row(colour, 1) and " hidden " in row(colour, 1)
    assert "3*3*1 -> 6 " in row(grey, 0) and " other " in row(grey, 0)
    assert " hidden " in row(grey, 1)


def write_idx(folder, images, labels, part="train", prefix=""):
    folder.mkdir(exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
        (folder / f"{prefix}{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    return folder


def _fashion(folder, count=12):
    images, labels = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8), (np.arange(count) % 10).astype(np.uint8)
    return write_idx(folder, images, labels), images, labels


def test_idx_folder(tmp_path):
    folder, images, labels = _fashion(tmp_path / "fashion")
    held_out = RNG.integers(0, 256, (3, 28, 28), dtype=np.uint8)
    write_idx(folder, held_out, labels[:3], "t10k")
    task = make_task("vit", "fashion", folder, batch=4)
    np.testing.assert_array_equal(task.data.images[..., 0], images)
    np.testing.assert_array_equal(task.data.labels, labels)
    np.testing.assert_array_equal(task.validation().images[..., 0], held_out)
    assert jax.eval_shape(task.loss, task.init(jax.random.key(0)), task.batch(0, 0)).shape == ()


def test_validation_is_at_most_2000_images_evenly_spread(tasks):
    data = tasks["image_mlp"].data
    many = dataclasses.replace(
        data, held_out_images=data.images[np.arange(5001) % 1498], held_out_labels=np.arange(5001, dtype=np.int32)
    )
    labels = many.validation().labels
    assert len(labels) == 2000 and labels[0] == 0 and labels[-1] == 5000
    assert set(np.diff(labels)) == {2, 3}


def test_npz_in_colour(tmp_path):
    images, labels = RNG.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8), np.arange(12) % 5
    np.savez(tmp_path / "colour.npz", train_images=images, train_labels=labels)
    data = load_images(tmp_path / "colour.npz", SMALL)
    np.testing.assert_array_equal(data.images, images[:10])
    np.testing.assert_array_equal(data.validation().images, images[10:])
    assert data.validation().labels.tolist() == [0, 1]


def _refused(match, kind, size, data, batch=None):
    with pytest.raises(ValueError, match=match):
        make_task(kind, size, data, batch)


def test_bad_data_are_told(tmp_path):
    _refused("takes grey images of 28x28 pixels in 10 classes, which do not come with", "vit", "fashion", None)
    _refused("no such folder or file; expected a folder with IDX", "image_mlp", "fashion", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    _refused("empty: no train-images-idx3-ubyte", "image_mlp", "fashion", tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    _refused("notes.txt.*neither a folder nor an npz file", "image_mlp", "fashion", tmp_path / "notes.txt")
    folder, images, labels = _fashion(tmp_path / "good")
    _refused("train images are uint8 .12, 28, 28., but this size takes grey images of 8x8", "conv", "digits", folder)
    write_idx(folder, images, labels, prefix="letters-")
    _refused("several sets: good, letters", "image_mlp", "fashion", folder)
    _refused("expected at least 1", "image_mlp", "digits", None, 0)
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"no zip")
    _refused("bad.npz: cannot be read as an image set", "image_mlp", "digits", bad)
    np.savez(bad, train_images=images[:, :8, :8], train_labels=labels[:5])
    _refused(r"bad.npz: train_labels has shape \(5,\), expected \(12,\)", "image_mlp", "digits", bad)
    np.savez(bad, train_images=images[:, :8, :8], train_labels=labels + 5)
    _refused("train_labels must be integers from 0 to 9", "image_mlp", "digits", bad)
    np.savez(bad, train_images=images[:, :8, :8], train_labels=labels, test_images=images[:, :8, :8])
    _refused("test_labels", "image_mlp", "digits", bad)
    np.savez(bad, train_images=images[:5, :8, :8], train_labels=labels[:5])
    _refused("5 images and no test part; expected at least 6", "image_mlp", "digits", bad)


def test_wrong_models_are_told():
    with pytest.raises(ValueError, match="patch = 3: expected a divisor of 4 and of 4 pixels"):
        ViTConfig(3, 8, 1, 2).build(SMALL, nnx.Rngs(0))
    with pytest.raises(ValueError, match="heads = 3: expected a divisor of the width 8"):
        ViTConfig(2, 8, 1, 3)
    with pytest.raises(ValueError, match="objective = 'x': expected one of classification, reconstruction"):
        _small_task(ImageMLPConfig((4,)), "x")


def test_kinds_list_the_sizes_there_are():
    for kind in KINDS:
        for size in TASKS[kind].sizes:
            with pytest.raises(ValueError, match="no such folder or file"):
                make_task(kind, size, Path("there-is-no-such-folder"))
