"""Scripts whose figures the documentation quotes, at small size: memory over many steps, ablations, games."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo2_harness import load_weights
from celo2_harness.lab.cli.reinforce import Config, train
from celo2_harness.lab.suites import load_suite, read_records

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks"
ABLATIONS = ROOT / "meta-training" / "ablations"


def test_the_ablations_are_those_that_were_trained(tmp_path, monkeypatch):
    """The suite is what the script writes, every optimizer has as many trials, and each file has its one change."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import ablations

    for name in ablations.VARIANTS:
        (tmp_path / f"{name}.celo2").touch()  # nothing is left to train
    monkeypatch.setattr(sys, "argv", ["ablations.py", "no-data", "--out", str(tmp_path)])
    assert ablations.main() == 0
    suite = (ABLATIONS / "ablations.toml").read_text()
    assert (tmp_path / "ablations.toml").read_text() == suite
    assert load_suite(ABLATIONS / "ablations.toml").search.equal_trials

    default = load_weights(ABLATIONS / "default.celo2").provenance["config"]
    differences = {}
    for name in ablations.VARIANTS:
        config = load_weights(ABLATIONS / f"{name}.celo2").provenance["config"]
        rule = {key: value for key, value in config["rule"].items() if value != default["rule"][key]}
        rest = {key: value for key, value in config.items() if key != "rule" and value != default[key]}
        differences[name] = rule | rest
    assert differences == {
        "default": {},
        "none": {"normalization": "none"},
        "rolling": {"normalization": "rolling"},
        "clip": {"normalization": "clip"},
        "unaugmented": {"augmentation": 1.0},
        "hidden_4": {"hidden": 4},
        "hidden_16": {"hidden": 16},
        "decay_0.999": {"second_moment_decay": 0.999},
        "base": {"variant": "base"},
    }


def test_the_ablation_without_adamw(monkeypatch):
    """A vector moves by the learned rule: RMS one times the learning rate, where AdamW would have twenty times that."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import ablations

    tx = ablations.make(lambda step: 1e-3, 0.0, 10, str(ABLATIONS / "default.celo2"))
    params = {"layer": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
    gradients = jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(0).normal(size=p.shape), p.dtype), params)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    for update in jax.tree.leaves(updates):
        assert np.sqrt(np.mean(np.square(update))) == pytest.approx(1e-3, rel=1e-3)


def test_the_bundled_linear_rule_is_what_was_searched(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.stacks.linear_weights import searched_weights

    bundled, made = load_weights("celo2_linear"), searched_weights()
    assert bundled == made and bundled.provenance == made.provenance


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_no_memory_is_kept_over_20000_steps():
    words = [sys.executable, str(SCRIPTS / "memory.py"), "--presets", "adamw", "celo2_ortho"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        numbers = [int(word) for word in line.split() if word.lstrip("-").isdecimal() and word != "20000"]
        kibibytes, arrays = numbers[:2]
        # The allocator may take another page or two; a kept scalar per step would be megabytes.
        assert arrays == 0 and kibibytes < 1024, line


@pytest.mark.slow
def test_many_agents_at_once(monkeypatch, tmp_path):
    """Two optimizers and two seeds in threads are the runs of `celo2 reinforce`; again, there is nothing to do."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import atari

    results = atari.play("catch", ["adamw", "muon"], [0, 1], 2048, tmp_path)
    assert list(results) == ["adamw-0", "adamw-1", "muon-0", "muon-1"]
    assert {(result.status, result.step) for result in results.values()} == {("finished", 2048)}
    records = read_records([tmp_path])
    assert sorted((record.name, record.seed) for record in records) == [
        ("adamw", 0),
        ("adamw", 1),
        ("muon", 0),
        ("muon", 1),
    ]
    assert all(len(record.returns) == 2048 // 8 // 9 * 8 for record in records)
    # A run in a thread among others has the numbers of one that is alone.
    alone = train(Config("catch", "muon", steps=2048, seed=1), tmp_path / "alone")
    (record,) = read_records([tmp_path / "alone"])
    assert alone == results["muon-1"] and record.returns == records[-1].returns
    before = {path: path.read_bytes() for path in tmp_path.glob("catch-*/metrics.jsonl")}
    assert atari.play("catch", ["adamw", "muon"], [0, 1], 2048, tmp_path) == results
    assert {path: path.read_bytes() for path in before} == before


def test_rates_are_searched_until_the_best_is_in_the_middle(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import rates

    best = rates.search(lambda pair: (pair.hidden - 3) ** 2 + (pair.rest + 2) ** 2)
    assert best == rates.Pair(3, -2)
    words = ["image_mlp", "--size", "digits", "--presets", "adamw", "muon", "--steps", "4", "--selection-seeds", "1"]
    for _ in range(2):
        assert rates.main([*words, "--seeds", "2", "--out", str(tmp_path)]) == 0
        table = capsys.readouterr().out.splitlines()[-4:]
        lines = (tmp_path / "image_mlp-digits.jsonl").read_text()
    assert [row.split("|")[2].strip() for row in table[2:]] == ["adamw", "muon"]
    # The second command found all runs there.
    assert "phase" not in table[0] and len(lines.splitlines()) == len(set(lines.splitlines()))


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpt2, gpu

    return gpt2, gpu


@pytest.mark.parametrize(
    "item",
    [("updates", "tiny", "optax.adamw"), ("products", "highest"), ("training", "gradient"), ("large", "celo2_ortho")],
)
def test_every_item_for_a_gpu_runs_at_a_tiny_size(scripts, item):
    _, gpu = scripts
    options = gpu.parse(["--tiny"])
    assert item in {(*found,) for found in gpu.items(options)}
    line = gpu.measure(item, options)
    assert line.get("milliseconds", line.get("step_milliseconds")) > 0.0
    assert gpu.with_share({"step_milliseconds": 4.0}, 3.0)["share_of_optimizer"] == 0.25


@pytest.mark.slow
def test_gpt2_trains_is_continued_and_reported_at_a_small_size(scripts, tmp_path, capsys):
    gpt2, _ = scripts
    gpt2.main(["data", "--out", str(tmp_path / "data"), "--megabytes", "1", "--vocabulary", "300"])
    out = ["--out", str(tmp_path / "runs")]
    small = ["--data", str(tmp_path / "data"), "--size", "small", "--dtype", "float32", "--batch", "2", "--steps", "4"]
    for name in ("adamw", "muon", "muon"):  # The second time there is nothing left to do.
        gpt2.main(["train", *out, *small, "--only", name])
    capsys.readouterr()
    gpt2.main(["report", *out])
    table = capsys.readouterr().out
    assert "| adamw |" in table and "| muon |" in table and (tmp_path / "runs" / "gpt2.png").exists()
    assert gpt2.reached([{"validation_loss": 3.0, "step": 0}, {"validation_loss": 1.0, "step": 10}], 2.0, "step") == 5.0
