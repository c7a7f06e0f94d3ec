"""Digests of theta along a run, and the script that runs the first iterations again."""

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import META_CONFIG, assert_trees_equal

import celo2_harness as c2
from celo2_harness.lab.metatrain import checkpoints, load_portable, run_metatrain
from celo2_harness.lab.metatrain import run as run_module

ROOT = Path(__file__).parents[3]
CONFIG = dataclasses.replace(META_CONFIG, iterations=4)


@pytest.fixture(autouse=True)
def after_two(monkeypatch):
    monkeypatch.setattr(run_module, "DIGEST_AFTER", 2)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reproduce_weights", ROOT / "benchmarks" / "reproduce_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digests(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
    return {line["iteration"]: line["theta_digest"] for line in lines if "theta_digest" in line}


def test_the_digest_is_of_theta_and_survives_a_stop(images, tmp_path):
    """Stopped after the iteration of the digest, before the line of metrics that tells it."""
    run, done = tmp_path / "run", []
    stop = lambda: done.append(None) or len(done) == 2
    assert run_metatrain(CONFIG, images, run, log_every=3, stop=stop) is None
    saved = load_portable(run / "portable.msgpack")
    assert saved.iteration == 2
    sha256 = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in saved.theta)).hexdigest()
    wanted = {"iteration": 2, "sha256": sha256}
    assert saved.header["theta_digest"] == wanted and digests(run) == {}
    weights = run_metatrain(CONFIG, images, run, log_every=3, resume=True)
    assert weights.provenance["theta_digest"] == wanted and digests(run) == {3: wanted}
    assert f"| SHA-256 of theta at iteration 2 | `{sha256}` |" in (run / "weights.md").read_text()


def test_a_run_is_reproduced(images, tmp_path, script, monkeypatch, capsys):
    out = tmp_path / "run"
    run_metatrain(CONFIG, images, out, log_every=2)
    words = ["script", str(out / "weights.celo2"), "--data", images, "--iterations", "2"]

    def run(*more):
        monkeypatch.setattr("sys.argv", [*words, *more])
        return script.main(), capsys.readouterr().out

    metrics = out / "metrics.jsonl"
    told = "theta at iteration 2: identical to the bit\n"
    assert run("--metrics", str(metrics)) == (
        0,
        told + "meta-losses and norms of 1 lines of metrics: identical to the bit\n",
    )
    # Another loss in the file, and another digest.
    header, line, *_ = metrics.read_text().splitlines()
    changed = json.loads(line)
    changed["meta_loss"]["odd"] += 1e-6
    metrics.write_text(f"{header}\n{json.dumps(changed)}\n")
    status, printed = run("--metrics", str(metrics))
    assert status == 1 and printed.startswith(told) and "first difference at iteration 2" in printed
    assert "the versions and the device are those of the run" in printed
    weights = c2.load_weights(out / "weights.celo2")
    save = lambda facts: c2.save_weights(out / "weights.celo2", dataclasses.replace(weights, provenance=facts))
    other = weights.provenance | {"theta_digest": {"iteration": 2, "sha256": "0" * 64}}
    save(other)
    status, printed = run()
    assert status == 1 and printed.startswith("theta at iteration 2: differs")
    # Other data are told before anything runs, and a file without digest is not guessed about.
    other = {name: value for name, value in weights.provenance.items() if name != "theta_digest"}
    save(other)
    assert run() == (
        2,
        f"{out}/weights.celo2: records no digest of theta up to iteration 2; give --metrics of its run\n",
    )
    save(weights.provenance | {"data_sha256": "none"})
    status, printed = run()
    assert status == 1 and printed.endswith("the run had none\n")
    # What went on from a file needs it.
    save(weights.provenance | {"continue_from": "a"})
    assert run() == (2, "went on from a: give that file with --continue-from\n")


def test_a_continued_run_has_a_digest_of_its_own(images, tmp_path):
    run, done = tmp_path / "first", []
    run_metatrain(CONFIG, images, run, stop=lambda: done.append(None) or len(done) == 1)
    longer = dataclasses.replace(CONFIG, iterations=6)
    go_on = lambda name: run_metatrain(longer, images, tmp_path / name, continue_from=run / "portable.msgpack")
    first, second = go_on("a").provenance, go_on("b").provenance
    assert first["first_iteration"] == 1 and first["theta_digest"]["iteration"] == 3
    assert first["theta_digest"] == second["theta_digest"]


def test_runs_of_earlier_versions_are_resumed(images, tmp_path):
    """Their headers lack the newer fields of the configuration, and their checkpoints what is None now."""
    run, done = tmp_path / "run", []
    run_metatrain(CONFIG, images, run, stop=lambda: done.append(None) or len(done) == 1)
    newer = ("smallest_batch", "text_tasks", "text_batch")

    def older(header):
        header = json.loads(header)
        config = {name: value for name, value in header["config"].items() if name not in newer}
        return json.dumps(
            {name: value for name, value in header.items() if name != "first_iteration"} | {"config": config}
        )

    first, *rest = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in [older(first), *rest]))
    for path in (run / "checkpoints").iterdir():
        content = checkpoints._unpack(path)
        assert content["state"]["tasks"]["0"]["unrolls"].pop("batch_part") is None
        path.write_bytes(checkpoints._pack(content | {"header": older(content["header"])}))
    weights = run_metatrain(CONFIG, images, run, resume=True)
    assert_trees_equal(weights.theta, run_metatrain(CONFIG, images, tmp_path / "whole").theta)
