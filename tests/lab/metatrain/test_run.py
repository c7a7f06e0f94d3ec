"""A whole run in a folder: files, stop, kill and resume, scores along the way, refusals."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import META_CONFIG as CONFIG, assert_trees_close, assert_trees_equal

import celo2_harness as c2
from celo2_harness.lab.errors import InputError
from celo2_harness.lab.metatrain import Evaluation, load_data, run_metatrain, select_weights
from celo2_harness.lab.training.locks import lock_folder

EVERY = {"log_every": 1, "checkpoint_every": 1}


def after(iteration):
    """A stop after an iteration."""
    seen = []
    return {"on_progress": lambda now: seen.append(now.step), "should_stop": lambda: seen[-1] == iteration}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    weights = run_metatrain(CONFIG, data, out, log_every=1, options={"data": "here"})
    return out, weights


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def numbers(out):
    return [
        (line["step"], line["meta_loss"], line["gradient_norm"]) for line in lines(out) if line["kind"] == "progress"
    ]


def test_files(whole):
    out, weights = whole
    names = {path.name for path in out.iterdir()}
    assert names == {"checkpoints", "lock", "metrics.jsonl", "weights.celo2", "weights.md"}
    header, *rest, end = lines(out)
    settings = header["settings"]
    assert settings["sets"] == ["even", "odd"] and settings["config"]["iterations"] == 3
    assert len(settings["data_sha256"]) == 64 and header["options"] == {"data": "here"} and header["versions"]["jax"]
    assert [(line["kind"], line["step"]) for line in rest] == [*(("progress", k) for k in (1, 2, 3)), ("digest", 3)]
    assert (end["kind"], end["status"]) == ("end", "finished")
    assert set(rest[0]["meta_loss"]) == {"even", "odd"} and rest[0]["gradient_norm"] > 0
    loaded = c2.load_weights(out / "weights.celo2", expect=CONFIG.rule)
    assert_trees_equal(loaded.theta, weights.theta)
    assert loaded.provenance["iterations"] == 3 and loaded.provenance["final_meta_loss"] == rest[2]["meta_loss"]
    assert loaded.provenance["theta_digest"] == {"iteration": 3, "sha256": rest[3]["theta_sha256"]}
    card = (out / "weights.md").read_text()
    assert "| iterations | theta of iteration 3 of 3, seed 0 |" in card and settings["data_sha256"] in card
    assert "| choice | the last theta, no selection |" in card and f"even {rest[2]['meta_loss']['even']:.3f}" in card


def test_the_same_config_and_seed_give_the_same_theta(whole, data, tmp_path):
    """Bit for bit; with a constant outer rate, of a longer run's first iterations too, whatever is logged and saved."""
    longer = dataclasses.replace(CONFIG, iterations=5)
    run_metatrain(longer, data, tmp_path / "longer", **EVERY)
    assert numbers(tmp_path / "longer")[:3] == numbers(whole[0])


def test_a_stopped_run_goes_on_as_if_it_had_not(whole, data, tmp_path):
    assert run_metatrain(CONFIG, data, tmp_path / "run", **EVERY, **after(1)) is None
    assert not (tmp_path / "run" / "weights.celo2").exists()
    # A kill may cut the last line short, and leave lines after the checkpoint.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "progress", "step": 2, "seconds": 0.0}) + "\n" + '{"kind": "progress", "st')
    started = []
    weights = run_metatrain(CONFIG, data, tmp_path / "run", **EVERY, resume=True, on_start=started.append)
    assert started == [1]
    assert_trees_equal(weights.theta, whole[1].theta)
    assert numbers(tmp_path / "run") == numbers(whole[0])


def test_a_finished_run_resumes_to_the_same_weights(whole, data):
    out, weights = whole
    before = (out / "metrics.jsonl").read_text()
    assert_trees_equal(run_metatrain(CONFIG, data, out, resume=True).theta, weights.theta)
    assert (out / "metrics.jsonl").read_text() == before
    # A kill between the last line of metrics and the weights leaves nothing out.
    (out / "weights.celo2").unlink()
    assert_trees_equal(run_metatrain(CONFIG, data, out, resume=True).theta, weights.theta)
    assert (out / "weights.celo2").exists()


def part(images, out, devices, stop, *wait):
    """`run_part.py` in a process of its own."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parents[2] / "src"), str(tests.parents[1]), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, str(tests / "run_part.py"), images, str(out), str(devices), str(stop), *wait]
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not(whole, data, images, tmp_path):
    """SIGKILL after the second iteration, of which there are metrics and no checkpoint."""
    with part(images, tmp_path, 1, 2, "wait") as killed:
        assert any(line == "iteration 2\n" for line in killed.stdout)
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "progress"] == [1, 2]
    weights = run_metatrain(CONFIG, data, tmp_path, **EVERY, resume=True)
    assert_trees_equal(weights.theta, whole[1].theta)
    assert numbers(tmp_path) == numbers(whole[0])


@pytest.mark.slow
def test_a_run_moves_to_other_devices(whole, images, tmp_path):
    """One iteration on four devices, the others on one."""
    for devices, stop, wanted in (
        (4, 1, "iteration 0\niteration 1\n"),
        (1, 0, "iteration 1\niteration 2\niteration 3\n"),
    ):
        process = part(images, tmp_path, devices, stop)
        assert process.communicate(timeout=300)[0] == wanted and not process.returncode
    assert_trees_close(c2.load_weights(tmp_path / "weights.celo2").theta, whole[1].theta, 1e-5)


def test_scores_and_selection(whole, data, tmp_path):
    """The score is the size of theta's first row, which anybody can compute again from the snapshots."""
    size = lambda weights: float(np.abs(weights.theta.w0[0]).sum())
    calls = []

    def score(weights):
        calls.append(weights.provenance["iterations"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return float("nan") if len(calls) == 4 else size(weights)

    evaluation = {"evaluation": Evaluation(2, {"steps": 7}, score)}
    with pytest.raises(KeyboardInterrupt):  # in the second evaluation
        run_metatrain(CONFIG, data, tmp_path, **EVERY, **evaluation)
    weights = run_metatrain(CONFIG, data, tmp_path, **EVERY, **evaluation, resume=True)
    assert calls == [0, 2, 2, 3]  # what was interrupted is done again, and nothing else
    assert_trees_equal(weights.theta, whole[1].theta)
    records = [line for line in lines(tmp_path) if line["kind"] == "evaluation"]
    assert [record["step"] for record in records] == [0, 2, 3] and records[2]["score"] is None
    sizes = [size(c2.load_weights(tmp_path / record["snapshot"])) for record in records]
    assert [record["score"] for record in records[:2]] == sizes[:2]

    selected = select_weights(tmp_path)
    best = int(np.argmin(sizes[:2]))
    assert selected.provenance["iterations"] == records[best]["step"]
    written = c2.load_weights(tmp_path / "weights.celo2")
    assert_trees_equal(written.theta, c2.load_weights(tmp_path / records[best]["snapshot"]).theta)
    assert written.provenance["selected"] == {"score": sizes[best], "of": 3, "evaluation": {"every": 2, "steps": 7}}
    assert f"the best of 3 evaluated thetas, score {sizes[best]:.4f}" in (tmp_path / "weights.md").read_text()
    # Resuming a finished run does not undo the choice.
    again = run_metatrain(CONFIG, data, tmp_path, **evaluation, resume=True)
    assert_trees_equal(again.theta, written.theta)
    with pytest.raises(InputError, match=r"evaluation.steps is 7 there and 8 here"):
        run_metatrain(CONFIG, data, tmp_path, evaluation=Evaluation(2, {"steps": 8}, score), resume=True)


def test_starting_from_weights(whole, data, tmp_path):
    source = tmp_path / "start.celo2"
    c2.save_weights(source, whole[1])
    run = lambda **more: run_metatrain(CONFIG, data, tmp_path / "run", start_from=str(source), **more)
    assert run(**after(1)) is None
    source.unlink()  # the run has its own copy of theta
    weights = run(resume=True)
    assert weights.provenance["start_from"] == str(source)
    step = np.abs(weights.theta.w0 - whole[1].theta.w0)
    assert 0 < step.max() < 5 * CONFIG.outer_learning_rate
    c2.save_weights(source, whole[1])
    for change, message in (({"hidden": 3}, "2 hidden units, the run has hidden = 3"), ({}, "already")):
        with pytest.raises(ValueError, match=message):
            out = tmp_path / ("other" if change else "run")
            run_metatrain(dataclasses.replace(CONFIG, **change), data, out, start_from=str(source))


def test_refusals(whole, images, data, tmp_path):
    out = whole[0]
    with pytest.raises(InputError, match="holds a run already"):
        run_metatrain(CONFIG, data, out)
    with pytest.raises(InputError, match="holds no run"):
        run_metatrain(CONFIG, data, tmp_path, resume=True)
    with pytest.raises(InputError, match="config.seed is 0 there and 1 here"):
        run_metatrain(dataclasses.replace(CONFIG, seed=1), data, out, resume=True)
    with pytest.raises(InputError, match="start_from is None there and celo2 here"):
        run_metatrain(CONFIG, data, out, resume=True, start_from="celo2")
    with pytest.raises(InputError, match="sets is "):
        run_metatrain(CONFIG, load_data(CONFIG, images, ("even",)), out, resume=True)
    with pytest.raises(InputError, match="data_sha256 is "):
        run_metatrain(CONFIG, data._replace(digests={"data_sha256": "0"}), out, resume=True)
    with lock_folder(tmp_path), pytest.raises(InputError, match="another process works in this folder"):
        run_metatrain(CONFIG, data, tmp_path)


@pytest.mark.slow
def test_digits_by_name(tmp_path):
    pytest.importorskip("sklearn")
    config = dataclasses.replace(CONFIG, iterations=1)
    weights = run_metatrain(config, load_data(config, "digits"), tmp_path / "run")
    assert weights.provenance["sets"] == ["digits"] and all(np.all(np.isfinite(x)) for x in weights.theta)
