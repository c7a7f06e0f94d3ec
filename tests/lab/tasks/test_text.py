"""Texts: the split, the windows, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from celo2_harness.lab.tasks import Text, default_text, read_text, split_text


def test_default_text_is_english_and_long_enough_for_every_model():
    text = default_text(context=2048)
    assert len(text.train) > 300_000
    assert b"assignment" in text.train.tobytes()
    assert default_text(64).digest == text.digest


@given(st.integers(20, 5000), st.integers(1, 40))
def test_the_parts_join_to_the_text_and_each_holds_a_window(size, context):
    content = bytes(i % 251 for i in range(size))
    try:
        text = split_text(content, "text", context)
    except ValueError:
        assert int(size * 0.1) < context + 1
    else:
        assert text.train.tobytes() + text.held_out.tobytes() == content
        assert min(len(text.train), len(text.held_out)) >= context + 1


def test_the_size_asked_for_is_the_smallest_that_will_do():
    with pytest.raises(ValueError, match=r"has 169 bytes, but a context of 16 needs at least 170 "):
        split_text(bytes(169), "text", 16)
    assert len(split_text(bytes(170), "text", 16).held_out) == 17


def test_batches_are_a_function_of_seed_and_step():
    text = default_text(64)
    first = text.sample(seed=1, step=7, count=4, context=64)
    np.testing.assert_array_equal(first, text.sample(seed=1, step=7, count=4, context=64))
    assert (first != text.sample(seed=1, step=8, count=4, context=64)).any()
    assert (first != text.sample(seed=2, step=7, count=4, context=64)).any()


def test_training_windows_reach_both_ends_and_never_the_held_out_part():
    text = Text("numbers", np.arange(180, dtype=np.uint8), np.full(20, 200, np.uint8))
    windows = text.sample(seed=0, step=0, count=5000, context=16)
    assert windows.min() == 0 and windows.max() == 179
    assert text.spread(context=16, most=1000).min() == 200


@pytest.mark.parametrize(("size", "most", "count"), [(100, 1000, 11), (100, 30, 3), (10, 1, 1), (11, 1000, 1)])
def test_held_out_windows_are_spread_from_end_to_end(size, most, count):
    windows = Text("numbers", np.zeros(1, np.uint8), np.arange(size, dtype=np.uint8)).spread(context=9, most=most)
    assert windows.shape == (count, 10)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == size - 1 or count == 1
    assert (np.diff(windows[:, 0].astype(int)) >= 9).all()  # no prediction is counted twice


def test_wrong_files_are_refused_by_name(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("short")
    for name, message in {
        "missing": "there is no file",
        ".": "is a folder",
        "empty": "is empty",
        "short": "has 5 bytes, but a context of 8 needs at least 90",
        "empty/inside": "cannot read",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path / name, context=8)


def test_any_bytes_make_a_text(tmp_path):
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 2)
    assert read_text(tmp_path / "binary", context=8).train[255] == 255
