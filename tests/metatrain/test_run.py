"""A whole run on disk: files, stop and resume, refusals."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import META_CONFIG as CONFIG
from helpers import META_IMAGES, META_LABELS, assert_trees_equal

import celo2_harness as c2
from celo2_harness.metatrain import RunError, run_metatrain


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, part in (("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
        np.savez(folder / f"{name}_8x8.npz", train_images=META_IMAGES[part], train_labels=META_LABELS[part])
    return str(folder)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    logged = []
    weights = run_metatrain(CONFIG, images, out, log_every=1, on_log=logged.append)
    return out, weights, logged


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_files(whole):
    out, weights, logged = whole
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.msgpack", "metrics.jsonl", "weights.celo2"]
    header, *rest = lines(out)
    assert header["sets"] == ["even", "odd"] and header["config"]["iterations"] == 3 and header["versions"]["jax"]
    assert [line["iteration"] for line in rest] == [1, 2, 3] and rest == logged
    assert set(rest[0]["meta_loss"]) == {"even", "odd"} and rest[0]["gradient_norm"] > 0
    loaded = c2.load_weights(out / "weights.celo2", expect=CONFIG.rule)
    assert_trees_equal(loaded.theta, weights.theta)
    assert loaded.provenance["iterations"] == 3 and loaded.provenance["final_meta_loss"] == rest[-1]["meta_loss"]


def test_a_stopped_run_goes_on_as_if_it_had_not(whole, images, tmp_path):
    assert run_metatrain(CONFIG, images, tmp_path / "run", log_every=1, stop=lambda: True) is None
    assert not (tmp_path / "run" / "weights.celo2").exists()
    # A kill may cut the last line short, and leave lines after the checkpoint.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 2, "meta_loss": {"even": 0.0}}) + "\n" + '{"iteration": 3, "meta')
    weights = run_metatrain(CONFIG, images, tmp_path / "run", log_every=1, resume=True)
    assert_trees_equal(weights.theta, whole[1].theta)
    pick = lambda out: [(line["iteration"], line["meta_loss"]) for line in lines(out)[1:]]
    assert pick(tmp_path / "run") == pick(whole[0])


def test_a_finished_run_resumes_to_the_same_weights(whole, images):
    out, weights, _ = whole
    before = (out / "metrics.jsonl").read_text()
    assert_trees_equal(run_metatrain(CONFIG, images, out, resume=True).theta, weights.theta)
    assert (out / "metrics.jsonl").read_text() == before


def test_refusals(whole, images, tmp_path):
    out = whole[0]
    with pytest.raises(RunError, match="already holds a run; resume it"):
        run_metatrain(CONFIG, images, out)
    with pytest.raises(RunError, match="nothing to resume.*checkpoint.msgpack is missing"):
        run_metatrain(CONFIG, images, tmp_path, resume=True)
    with pytest.raises(RunError, match="made with config = "):
        run_metatrain(dataclasses.replace(CONFIG, seed=1), images, out, resume=True)
    other = tmp_path / "images"
    other.mkdir()
    for name in ("even", "odd"):
        np.savez(other / f"{name}_8x8.npz", train_images=np.zeros((2, 8, 8), np.uint8), train_labels=np.zeros(2, int))
    with pytest.raises(RunError, match="made with sets = "):
        run_metatrain(CONFIG, images, out, sets=("even",), resume=True)
    with pytest.raises(RunError, match="made with data_sha256 = "):
        run_metatrain(CONFIG, str(other), out, resume=True)


def test_a_damaged_checkpoint_is_named(whole, images, tmp_path):
    for name in ("metrics.jsonl", "checkpoint.msgpack"):
        (tmp_path / name).write_bytes((whole[0] / name).read_bytes()[:-100])
    with pytest.raises(RunError, match="the checkpoint cannot be read"):
        run_metatrain(CONFIG, images, tmp_path, resume=True)


@pytest.mark.slow
def test_digits_by_name(tmp_path):
    pytest.importorskip("sklearn")
    config = dataclasses.replace(CONFIG, iterations=1)
    weights = run_metatrain(config, "digits", tmp_path / "run")
    assert weights.provenance["sets"] == ["digits"] and all(np.all(np.isfinite(x)) for x in weights.theta)
