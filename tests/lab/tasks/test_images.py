"""Image sets: what loads, how batches are drawn, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo2_harness.lab.tasks.images import DataError, load_image_sets


def arrays(count=5, value=0):
    images = np.full((count, 8, 8), value, np.uint8)
    return {"train_images": images, "train_labels": np.arange(count) % 10}


def save(folder, name, **content):
    np.savez(folder / f"{name}_8x8.npz", **content)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, "black", **arrays(5, 0))
    save(tmp_path, "white", **arrays(3, 255))
    return tmp_path


def test_sets_lie_side_by_side(folder):
    sets, names = load_image_sets(folder)
    assert names == ("black", "white")
    assert sets.starts.tolist() == [0, 5] and sets.sizes.tolist() == [5, 3]
    assert sets.images.shape == (8, 64) and sets.images.dtype == jnp.uint8
    assert sets.labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_names_choose_sets_in_their_order(folder):
    sets, names = load_image_sets(folder, ["white", "black"])
    assert names == ("white", "black") and sets.starts.tolist() == [0, 3]
    with pytest.raises(DataError, match=r"found sets \['black', 'white'\], missing \['grey'\]"):
        load_image_sets(folder, ["grey"])


def test_batches_stay_in_their_set(folder, key):
    sets, _ = load_image_sets(folder)
    draw = jax.jit(sets.batch, static_argnums=2)
    for which, value, size in ((0, 0.0, 5), (1, 1.0, 3)):
        images, labels = draw(jnp.asarray(which), key, 200)
        assert images.shape == (200, 64) and images.dtype == jnp.float32 and np.all(images == value)
        assert set(labels.tolist()) == set(range(size))
    again, _ = draw(jnp.asarray(0), key, 200)
    np.testing.assert_array_equal(again, draw(jnp.asarray(0), key, 200)[0])


def test_digits():
    pytest.importorskip("sklearn")
    sets, names = load_image_sets("digits")
    assert names == ("digits",) and sets.images.shape == (1797, 64)
    assert int(sets.images.max()) == 255 and set(sets.labels.tolist()) == set(range(10))
    with pytest.raises(DataError, match=r"found sets \['digits'\], missing \['mnist'\]"):
        load_image_sets("digits", ["mnist"])


FAULTS = {
    "wrong size": ({"train_images": np.zeros((5, 28, 28), np.uint8)}, r"train_images is uint8 \(5, 28, 28\), expected"),
    "flat": ({"train_images": np.zeros((5, 64), np.uint8)}, "expected uint8"),
    "floats": ({"train_images": np.zeros((5, 8, 8))}, "train_images is float64"),
    "empty": ({"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0, int)}, "train_images is"),
    "label too large": ({"train_labels": np.full(5, 10)}, "integers from 0 to 9"),
    "negative label": ({"train_labels": np.full(5, -1)}, "integers from 0 to 9"),
    "fractional labels": ({"train_labels": np.zeros(5)}, "integers from 0 to 9"),
    "too few labels": ({"train_labels": np.zeros(4, int)}, r"train_labels has shape \(4,\), expected \(5,\)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_unfit_arrays_are_named(name, tmp_path):
    change, message = FAULTS[name]
    save(tmp_path, "bad", **arrays() | change)
    with pytest.raises(DataError, match=f"bad_8x8.npz.*{message}"):
        load_image_sets(tmp_path)


def truncated_archive():
    import io

    buffer = io.BytesIO()
    np.savez(buffer, **arrays())
    return buffer.getvalue()


def lone_array():
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


CORRUPT = {
    "empty": b"",
    "text": b"not an archive",
    "half an archive": truncated_archive()[:400],
    "head of an archive": b"PK\x03\x04 and no more",
    "one array": lone_array(),
    "another archive": None,
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_files_are_named(name, tmp_path):
    if CORRUPT[name] is None:
        save(tmp_path, "bad", other=np.zeros(3))
    else:
        (tmp_path / "bad_8x8.npz").write_bytes(CORRUPT[name])
    with pytest.raises(DataError, match="bad_8x8.npz: cannot be read as an image set"):
        load_image_sets(tmp_path)


def test_damaged_bytes_inside_are_named(tmp_path):
    np.savez_compressed(tmp_path / "bad_8x8.npz", **arrays(500, 7))
    data = bytearray((tmp_path / "bad_8x8.npz").read_bytes())
    data[60:80] = bytes(20)
    (tmp_path / "bad_8x8.npz").write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
        load_image_sets(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder or file. Expected one of: 'digits'; a folder with files NAME"):
        load_image_sets(tmp_path / "nowhere")
    with pytest.raises(DataError, match="it holds none of these"):
        load_image_sets(tmp_path)
