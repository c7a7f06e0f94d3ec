"""Digests of theta along a run, and the script that runs the first iterations again."""

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import META_CONFIG as CONFIG

import celo2_harness as c2
from celo2_harness.lab.metatrain import init_metatrain, metatrain_step, run_metatrain
from celo2_harness.lab.metatrain.loop import theta_digest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reproduce_weights", ROOT / "benchmarks" / "reproduce_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, run_metatrain(CONFIG, data, out, log_every=3)


def test_the_digest_is_of_theta(run, data):
    """Of the last theta, in a run this short; the steps by hand have the same bits."""
    weights = run[1]
    state = init_metatrain(CONFIG, 2)
    for _ in range(3):
        state, _ = metatrain_step(CONFIG, state, data.inner)
    sha256 = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in state.theta)).hexdigest()
    assert weights.provenance["theta_digest"] == {"iteration": 3, "sha256": sha256}
    assert f"| SHA-256 of theta at iteration 3 | `{sha256}` |" in (run[0] / "weights.md").read_text()
    assert theta_digest({"a": jnp.ones(2), "b": jnp.zeros(1)}) == theta_digest([np.ones(2, "f4"), np.zeros(1, "f4")])


def test_a_run_is_reproduced(run, images, script, monkeypatch, capsys):
    out, weights = run
    metrics = out / "metrics.jsonl"

    def reproduce(*more):
        monkeypatch.setattr("sys.argv", ["script", str(out / "weights.celo2"), "--data", images, *more])
        return script.main(), capsys.readouterr().out

    told = "theta at iteration 3: identical to the bit\n"
    same = "meta-losses and norms of 1 lines of metrics: identical to the bit\n"
    assert reproduce("--metrics", str(metrics)) == (0, told + same)
    # Another loss in the file, and another digest.
    header, line, *_ = metrics.read_text().splitlines()
    changed = json.loads(line)
    changed["meta_loss"]["odd"] += 1e-6
    metrics.write_text(f"{header}\n{json.dumps(changed)}\n")
    status, printed = reproduce("--metrics", str(metrics))
    assert status == 1 and printed.startswith(told) and "first difference at iteration 3" in printed
    assert "the versions and the device are those of the run" in printed
    facts = weights.provenance
    save = lambda facts: c2.save_weights(out / "weights.celo2", dataclasses.replace(weights, provenance=facts))
    save(facts | {"theta_digest": {"iteration": 3, "sha256": "0" * 64}})
    status, printed = reproduce()
    assert status == 1 and printed.startswith("theta at iteration 3: differs")
    # Other data are told before anything runs, and a file without digest is not guessed about.
    save({name: value for name, value in facts.items() if name != "theta_digest"})
    assert reproduce()[0] == 2
    save(facts | {"data_sha256": "none"})
    status, printed = reproduce()
    assert status == 1 and printed.endswith("the run had none\n")


@pytest.mark.parametrize("name", ["celo2", "celo2_base"])
def test_the_bundled_weights_say_how_they_are_made(name):
    """Their provenance is a recipe of now, and the kept metrics are those of the run."""
    from celo2_harness.lab.metatrain import config_from

    facts = c2.load_weights(name).provenance
    config = config_from(facts["config"])
    assert config.learned.load(name).theta.w0.shape == (30, 8) and facts["theta_digest"]["iteration"] == 100
    header = json.loads((ROOT / "meta-training" / f"{name}.jsonl").read_text().splitlines()[0])
    assert config_from(header["settings"]["config"]) == config
    assert header["settings"]["data_sha256"] == facts["data_sha256"]
