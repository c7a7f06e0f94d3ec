"""Kinds of image sources: the area mean, IDX files, data sets of the datasets library, and files made from them."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celo2_harness.lab.tasks.images import DataError, find_sets, load_image_sets, prepare_image_sets, shrink

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
def test_idx_folder_and_file(tmp_path, zipped):
    folder = write_idx(tmp_path / "letters", zipped=zipped)
    write_idx(folder, LARGE[:3], LABELS[:3], "t10k", zipped)
    file = next(folder.glob("train-images*"))
    for source in (folder, file):
        sets, names = load_image_sets(source)
        assert names == ("letters",) and sets.labels.tolist() == LABELS.tolist()
        np.testing.assert_array_equal(sets.images, shrink(LARGE, "x").reshape(-1, 64))
    test = find_sets(folder)["letters"]("test")
    assert test is not None and len(test.labels) == 3


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
    "too small": ("train-images", lambda b: idx(LARGE[:, :7, :7].copy()), r"images is uint8 \(30, 7, 7\)"),
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
    (tmp_path / "other").write_bytes(idx(LARGE))
    with pytest.raises(DataError, match="other: the labels of an IDX file are looked for"):
        load_image_sets(tmp_path / "other")


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


def test_hub_names():
    assert list(find_sets("hf://ylecun/mnist")) == list(find_sets("hf://mnist")) == ["mnist"]
    assert list(find_sets("hf://svhn")) == list(find_sets("hf://owner/svhn/cropped_digits")) == ["svhn"]
    with pytest.raises(DataError, match="data = 'hf://imagenet': expected hf://owner/name, .* one of mnist, fashion"):
        find_sets("hf://imagenet")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'celo2-harness\[hf\]'"):
        load_image_sets("hf://mnist")
    (tmp_path / "state.json").touch()
    with pytest.raises(ImportError, match="celo2-harness"):
        prepare_image_sets(str(tmp_path), tmp_path / "out")


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    # The library writes caches where these say, and asks the network where it may.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets")


def saved(datasets, folder, images, labels, *, classes=True, column="img"):
    features = datasets.Features(
        {column: datasets.Image(), "label": datasets.ClassLabel(num_classes=10) if classes else datasets.Value("int64")}
    )
    part = datasets.Dataset.from_dict({column: images, "label": labels}, features=features)
    datasets.DatasetDict({"train": part, "test": part.select(range(2))}).save_to_disk(str(folder))
    return folder


# Slow, because a plain test installation has no such library.
@pytest.mark.slow
def test_saved_data_set(datasets, tmp_path):
    image = pytest.importorskip("PIL.Image")
    colour = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    labels = [0, 9, 3, 4, 5, 1]
    folder = saved(datasets, tmp_path / "pictures", [image.fromarray(x) for x in colour], labels)
    sets, names = load_image_sets(folder)
    assert names == ("pictures",) and sets.labels.tolist() == labels
    # ITU-R 601 luma in 16-bit fixed point, as Pillow defines it, then means over 4x4 blocks rounded half up.
    grey = (colour @ np.array([19595, 38470, 7471]) + 0x8000) >> 16
    wanted = (grey.reshape(6, 8, 4, 8, 4).sum(axis=(2, 4)) + 8) // 16
    np.testing.assert_array_equal(sets.images, wanted.reshape(6, 64))
    (file,) = prepare_image_sets(str(folder), tmp_path / "out")
    with np.load(file) as content:
        assert file.name == "pictures_8x8.npz" and content["test_labels"].tolist() == labels[:2]


@pytest.mark.slow
def test_saved_data_set_of_arrays_without_parts(datasets, tmp_path):
    features = datasets.Features({"x": datasets.Array2D((28, 28), "uint8"), "label": datasets.Value("int64")})
    content = {"x": list(LARGE), "label": LABELS.tolist()}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(str(tmp_path / "arrays"))
    sets, _ = load_image_sets(tmp_path / "arrays")
    np.testing.assert_array_equal(sets.images, shrink(LARGE, "x").reshape(-1, 64))
    assert find_sets(tmp_path / "arrays")["arrays"]("test") is None


@pytest.mark.slow
def test_saved_data_set_faults(datasets, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pictures = [image.fromarray(x) for x in LARGE[:3]]
    folder = saved(datasets, tmp_path / "labels", pictures, [0, 12, 3], classes=False)
    with pytest.raises(DataError, match="labels: train, column 'label' must be integers from 0 to 9; .* 12 at 1"):
        load_image_sets(folder)
    folder = saved(datasets, tmp_path / "small", [pictures[0], image.fromarray(LARGE[0, :5, :5])], [0, 1])
    with pytest.raises(DataError, match=r"small: train, column 'img' \[1\] is uint8 \(1, 5, 5\)"):
        load_image_sets(folder)
    (tmp_path / "small" / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match="small: cannot be read as a saved data set"):
        load_image_sets(folder)
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(DataError, match=r"expected one column of images .* there are text \(Value\), label \(Value\)"):
        load_image_sets(tmp_path / "text")
