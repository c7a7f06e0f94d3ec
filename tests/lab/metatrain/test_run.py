"""A whole run on disk: files, stop and resume, refusals."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import META_CONFIG as CONFIG
from helpers import assert_trees_close, assert_trees_equal

import celo2_harness as c2
from celo2_harness.lab.errors import InputError
from celo2_harness.lab.metatrain import RunError, run_metatrain, saved_run, task_mesh
from celo2_harness.lab.metatrain import run as run_module
from celo2_harness.lab.training.locks import lock_folder


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    logged = []
    weights = run_metatrain(CONFIG, images, out, log_every=1, on_log=logged.append, options={"data": images})
    return out, weights, logged


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_files(whole, images):
    out, weights, logged = whole
    assert {path.name for path in out.iterdir()} == {
        "checkpoints",
        "lock",
        "metrics.jsonl",
        "portable.msgpack",
        "weights.celo2",
        "weights.md",
    }
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["00000000.msgpack", "00000003.msgpack"]
    header, *rest = lines(out)
    assert header["sets"] == ["even", "odd"] and header["config"]["iterations"] == 3 and header["versions"]["jax"]
    assert len(header["data_sha256"]) == 64 and "commit" in header and header["device"]
    assert saved_run(out) == (CONFIG, {"data": images}, header["devices"]) and header["devices"] == 1
    assert [line["iteration"] for line in rest] == [1, 2, 3] and rest == logged
    assert set(rest[0]["meta_loss"]) == {"even", "odd"} and rest[0]["gradient_norm"] > 0
    assert rest[0]["iterations_per_second"] is None and rest[2]["iterations_per_second"] > 0
    loaded = c2.load_weights(out / "weights.celo2", expect=CONFIG.rule)
    assert_trees_equal(loaded.theta, weights.theta)
    assert loaded.provenance["iterations"] == 3 and loaded.provenance["final_meta_loss"] == rest[-1]["meta_loss"]
    card = (out / "weights.md").read_text()
    assert "| iterations | theta of iteration 3 of 3, seed 0 |" in card and header["data_sha256"] in card
    assert "| choice | the last theta, no selection |" in card and f"even {rest[-1]['meta_loss']['even']:.3f}" in card


def test_the_same_config_and_seed_give_the_same_theta(whole, images, tmp_path):
    """Bit for bit; with a constant outer rate, of a longer run's first iterations too, whatever is logged and saved."""
    again = run_metatrain(CONFIG, images, tmp_path / "again", log_every=2, checkpoint_every=1)
    assert_trees_equal(again.theta, whole[1].theta)
    longer = dataclasses.replace(CONFIG, iterations=5)
    seen = []
    run_metatrain(longer, images, tmp_path / "longer", log_every=1, on_log=seen.append)
    numbers = lambda line: {name: line[name] for name in ("iteration", "meta_loss", "gradient_norm", "theta_norm")}
    assert [numbers(line) for line in seen[:3]] == [numbers(line) for line in whole[2]]


def test_a_stopped_run_goes_on_as_if_it_had_not(whole, images, tmp_path):
    assert run_metatrain(CONFIG, images, tmp_path / "run", log_every=1, stop=lambda: True) is None
    assert not (tmp_path / "run" / "weights.celo2").exists()
    # A kill may cut the last line short, and leave lines after the checkpoint.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 2, "meta_loss": {"even": 0.0}}) + "\n" + '{"iteration": 3, "meta')
    started = []
    weights = run_metatrain(CONFIG, images, tmp_path / "run", log_every=1, resume=True, on_start=started.append)
    assert started == [1]
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
    with pytest.raises(RunError, match="nothing to resume.*metrics.jsonl is missing"):
        run_metatrain(CONFIG, images, tmp_path, resume=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunError, match="made with config.seed = 0, asked for 1"):
        run_metatrain(dataclasses.replace(CONFIG, seed=1), images, out, resume=True)
    with pytest.raises(RunError, match="made with start_from = None, asked for celo2"):
        run_metatrain(CONFIG, images, out, resume=True, start_from="celo2")
    other = tmp_path / "images"
    other.mkdir()
    for name in ("even", "odd"):
        np.savez(other / f"{name}_8x8.npz", train_images=np.zeros((2, 8, 8), np.uint8), train_labels=np.zeros(2, int))
    with pytest.raises(RunError, match="made with sets = "):
        run_metatrain(CONFIG, images, out, sets=("even",), resume=True)
    with pytest.raises(RunError, match="made with data_sha256 = "):
        run_metatrain(CONFIG, str(other), out, resume=True)
    for name in ("checkpoint_every", "log_every"):
        with pytest.raises(RunError, match=f"{name} = 0: expected at least 1"):
            run_metatrain(CONFIG, images, tmp_path / "run", **{name: 0})
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match="does not start with the header of a run"):
        run_metatrain(CONFIG, images, tmp_path, resume=True)


def test_one_process_per_folder(images, tmp_path):
    """flock is of the open file, so that a second one in this process stands for another process."""
    with (
        lock_folder(tmp_path),
        pytest.raises(InputError, match=r"another process works in this folder .process \d+\)"),
    ):
        run_metatrain(CONFIG, images, tmp_path)
    assert run_metatrain(CONFIG, images, tmp_path, stop=lambda: True) is None


def test_devices_that_the_tasks_do_not_fill():
    """Of one device given three times: four tasks go to two of them."""
    mesh = task_mesh(jax.devices()[:1] * 3)
    warned = []
    assert run_module._mesh(mesh, CONFIG, 2, warned.append).size == 2
    assert len(warned) == 1 and "cannot be spread evenly over 3 devices; 2 are used" in warned[0]
    assert run_module._mesh(None, CONFIG, 2, warned.append) is None
    assert run_module._mesh(task_mesh(), CONFIG, 2, warned.append) == task_mesh() and len(warned) == 1


def part(images, out, devices, stop, *distributed):
    """`run_part.py` in a process of its own."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parents[2] / "src"), str(tests.parents[1]), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, str(tests / "run_part.py"), images, str(out), str(devices), str(stop), *distributed]
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def printed(*processes):
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), texts
    return texts


@pytest.mark.slow
def test_a_run_moves_to_other_devices_and_processes(whole, images, tmp_path):
    """One iteration on four devices, one in two processes with two each, one on one device."""
    out = tmp_path / "run"
    assert printed(part(images, out, 4, 1)) == ["iteration 1\n"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    first, second = printed(*(part(images, out, 2, 2, address, str(k)) for k in range(2)))
    assert "iteration 2\n" in first and "iteration" not in second
    assert printed(part(images, out, 1, 9)) == ["iteration 3\n"]
    loaded = c2.load_weights(out / "weights.celo2")
    assert_trees_close(loaded.theta, whole[1].theta, 1e-5)
    numbers = lambda line: [line["iteration"], *line["meta_loss"].values(), line["gradient_norm"]]
    np.testing.assert_allclose(list(map(numbers, lines(out)[1:])), list(map(numbers, lines(whole[0])[1:])), rtol=1e-5)
    assert lines(out)[0]["devices"] == 4


@pytest.mark.slow
def test_digits_by_name(tmp_path):
    pytest.importorskip("sklearn")
    config = dataclasses.replace(CONFIG, iterations=1)
    weights = run_metatrain(config, "digits", tmp_path / "run")
    assert weights.provenance["sets"] == ["digits"] and all(np.all(np.isfinite(x)) for x in weights.theta)
