"""8x8 image sets: the area mean, npz and IDX files, files made from them, and what is refused."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given, strategies as st

from celo2_harness.lab.tasks import DataError, find_sets, load_image_sets, prepare_image_sets, shrink

RNG = np.random.default_rng(0)
LARGE = RNG.integers(0, 256, (30, 28, 28), dtype=np.uint8)
LABELS = (np.arange(30) % 10).astype(np.uint8)


@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 2**32 - 1))
def test_area_mean_is_exact(height, width, seed):
    """Repeating every pixel 8 times along both axes makes all areas whole: then it is a mean over blocks."""
    image = np.random.default_rng(seed).integers(0, 256, (1, height, width), dtype=np.uint8)
    repeated = image.repeat(8, axis=1).repeat(8, axis=2).astype(np.int64)
    total = repeated.reshape(8, height, 8, width).sum(axis=(1, 3))
    rounded = (2 * total + height * width) // (2 * height * width)  # half up, in whole numbers
    np.testing.assert_array_equal(shrink(image, "image")[0], rounded)


def test_shrink_leaves_8x8_and_refuses_smaller():
    small = LARGE[:, :8, :8]
    np.testing.assert_array_equal(shrink(small, "x"), small)
    with pytest.raises(DataError, match=r"^x is uint8 \(30, 7, 28\), expected uint8 \(N, height, width\)"):
        shrink(LARGE[:, :7], "x")
    with pytest.raises(DataError, match="^x is float64"):
        shrink(LARGE.astype(float), "x")


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
    assert sets.images.shape == (8, 64) and sets.images.dtype == np.uint8
    assert sets.labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_names_choose_sets_in_their_order(folder):
    sets, names = load_image_sets(folder, ["white", "black"])
    assert names == ("white", "black") and sets.starts.tolist() == [0, 3]
    with pytest.raises(DataError, match=r"found sets \['black', 'white'\], missing \['grey'\]"):
        load_image_sets(folder, ["grey"])


def test_digits():
    pytest.importorskip("sklearn")
    sets, names = load_image_sets("digits")
    assert names == ("digits",) and sets.images.shape == (1797, 64)
    assert int(sets.images.max()) == 255 and set(sets.labels.tolist()) == set(range(10))


FAULTS = {
    "flat": ({"train_images": np.zeros((5, 64), np.uint8)}, "expected uint8"),
    "too small": ({"train_images": np.zeros((5, 7, 8), np.uint8)}, "expected uint8"),
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
    with pytest.raises(DataError, match=f"bad.*{message}"):
        load_image_sets(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 and no more", None])
def test_corrupt_files_are_named(content, tmp_path):
    if content is None:
        save(tmp_path, "bad", other=np.zeros(3))
    else:
        (tmp_path / "bad_8x8.npz").write_bytes(content)
    with pytest.raises(DataError, match="bad_8x8.npz: cannot be read as an image set"):
        load_image_sets(tmp_path)


def idx(array):
    """The bytes of an IDX file, written by hand."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, images=LARGE, labels=LABELS, part="train", zipped=True, prefix=""):
    folder.mkdir(exist_ok=True)
    for kind, content in (("images-idx3", idx(images)), ("labels-idx1", idx(labels))):
        name = f"{prefix}{part}-{kind}-ubyte" + ".gz" * zipped
        (folder / name).write_bytes(gzip.compress(content) if zipped else content)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_folder(tmp_path, zipped):
    folder = write_idx(tmp_path / "letters", zipped=zipped)
    write_idx(folder, LARGE[:3], LABELS[:3], "t10k", zipped)
    sets, names = load_image_sets(folder)
    assert names == ("letters",) and sets.labels.tolist() == LABELS.tolist()
    np.testing.assert_array_equal(sets.images, shrink(LARGE, "x").reshape(-1, 64))
    _, labels = find_sets(folder)["letters"]()["test"]
    assert len(labels) == 3


def test_idx_prefixes_are_sets(tmp_path):
    write_idx(tmp_path, prefix="b-")
    write_idx(tmp_path, LARGE[:5], LABELS[:5], prefix="a-")
    sets, names = load_image_sets(tmp_path)
    assert names == ("a", "b") and sets.sizes.tolist() == [5, 30]
    assert load_image_sets(tmp_path, ["b"])[1] == ("b",)


IDX_FAULTS = {
    "cut short": ("train-images", lambda b: b[:-1], "images of shape .* take 23536 bytes .* has 23535: cut short"),
    "too long": ("train-labels", lambda b: b + b"x", r"labels of shape \(30,\).*has 39: too long"),
    "header only": ("train-images", lambda b: b[:10], "not an IDX file of images"),
    "empty": ("train-labels", lambda b: b"", "not an IDX file of labels: it starts with nothing, expected 00 00 08 01"),
    "labels for images": (
        "train-images",
        lambda b: idx(LABELS),
        "not an IDX .*with 00 00 08 01, expected 00 00 08 03",
    ),
    "half a gzip file": ("train-images", lambda b: gzip.compress(b)[:-50], "images cannot be read .EOFError"),
    "damaged gzip file": ("train-labels", lambda b: b"\x1f\x8b\x08" + bytes(40), "labels cannot be read"),
    "label out of range": (
        "train-labels",
        lambda b: idx(np.where(LABELS == 9, np.uint8(10), LABELS)),
        "labels must be integers from 0 to 9; 3 of 30 are not, the first is 10 at 9",
    ),
    "other count": ("train-labels", lambda b: idx(LABELS[1:]), r"labels has shape \(29,\), expected \(30,\)"),
}


@pytest.mark.parametrize("name", IDX_FAULTS)
def test_idx_faults_name_file_and_array(tmp_path, name):
    start, change, message = IDX_FAULTS[name]
    folder = write_idx(tmp_path / "set", zipped=False)
    path = next(folder.glob(f"{start}*"))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path}: {message}"):
        load_image_sets(folder)


def test_idx_without_labels(tmp_path):
    folder = write_idx(tmp_path / "set")
    next(folder.glob("train-labels*")).unlink()
    with pytest.raises(DataError, match="set/train-labels-idx1-ubyte: no labels for train-images-idx3-ubyte.gz"):
        load_image_sets(folder)


def test_prepared_files_are_the_same_sets(tmp_path):
    folder = write_idx(tmp_path / "letters")
    write_idx(folder, LARGE[:3], LABELS[:3], "t10k")
    seen = []
    files = prepare_image_sets(str(folder), tmp_path / "small" / "sets", lambda path, counts: seen.append(counts))
    assert [path.name for path in files] == ["letters_8x8.npz"] and seen == [{"train": 30, "test": 3}]
    with np.load(files[0]) as content:
        assert sorted(content) == ["test_images", "test_labels", "train_images", "train_labels"]
        assert all(array.dtype == np.uint8 for array in content.values())
    for got, wanted in zip(load_image_sets(tmp_path / "small" / "sets")[0], load_image_sets(folder)[0], strict=True):
        np.testing.assert_array_equal(got, wanted)
    # A file alone is a source too, and preparing again changes nothing.
    before = files[0].read_bytes()
    assert prepare_image_sets(str(files[0]), tmp_path / "small" / "sets") == files
    assert files[0].read_bytes() == before


def test_fashion_mnist_agrees_with_the_reference(shared, tmp_path):
    """Debian's dataset-fashion-mnist, where installed, shrinks to the reference material byte for byte."""
    from pathlib import Path

    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("the package dataset-fashion-mnist is not installed")
    (file,) = prepare_image_sets(str(folder), tmp_path)
    with np.load(file) as got, np.load(shared / "data" / "fashion_mnist_8x8.npz") as wanted:
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            np.testing.assert_array_equal(got[name], wanted[name])


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder or file. Expected one of: 'digits'; a folder with files NAME"):
        load_image_sets(tmp_path / "nowhere")
    with pytest.raises(DataError, match="it holds none of these"):
        load_image_sets(tmp_path)
