"""Suites run: every run once, whatever happens."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites import Suite, run_suite
from celo2_harness.lab.suites.record import read_records
from celo2_harness.lab.training.optimizers import OptimizerSpec
from celo2_harness.lab.training.reading import read

SUITE = {
    "name": "test",
    "tasks": [{"name": "language_model", "size": "tiny", "steps": 6, "eval_every": 2, "label": "tiny"}],
    "search": {"learning_rates": [0.01, 0.1], "weight_decays": [0.0], "selection_seeds": [0], "report_seeds": [1]},
    "optimizers": [{"optax": "sgd", "label": name} for name in ("sgd", "broken", "raising")],
}
BROKEN = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u * jnp.nan, updates))


def _refuse(updates, params):
    raise RuntimeError("no update today\nsecond line")


# One object per optimizer and rate, so that all tests share the compiled steps.
OPTIMIZERS = {("sgd", rate): optax.sgd(rate) for rate in (0.01, 0.1)}
OPTIMIZERS |= {("broken", rate): BROKEN for rate in (0.01, 0.1)}
OPTIMIZERS |= {("raising", rate): optax.stateless(_refuse) for rate in (0.01, 0.1)}


def make_spec(suite, optimizer, rate, decay, steps):
    settings = {"optax": optimizer.label, "learning_rate": rate, "weight_decay": decay, "total_steps": steps}
    return OptimizerSpec(optimizer.label, OPTIMIZERS[optimizer.label, rate], lambda step: rate, settings)


@pytest.fixture(scope="module")
def run(task):
    def run(folder, suite=SUITE, **arguments):
        arguments = {"make_task": lambda _: task, "make_spec": make_spec, **arguments}
        return run_suite(read(Suite, suite), folder, **arguments)

    return run


def records(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_a_suite_from_the_first_run_to_the_last(run, tmp_path):
    states, ended = [], []
    assert run(tmp_path, on_state=states.append, on_end=lambda run, record: ended.append(run.trial.optimizer))
    lines = records(tmp_path)
    found = read_records([tmp_path])
    runs = [(record.name, record.learning_rate, record.seed, record.status) for record in found]
    assert runs[:2] == [("sgd", 0.01, 0, "finished"), ("sgd", 0.1, 0, "finished")]
    better = min(lines[:2], key=lambda line: line["validation"][-1][1])["settings"]["optimizer"]["learning_rate"]
    assert runs[2] == ("sgd", better, 1, "finished")
    # Nothing was found for these, so there is nothing to report.
    assert runs[3:] == [
        ("broken", 0.01, 0, "diverged"), ("broken", 0.1, 0, "diverged"),
        ("raising", 0.01, 0, "failed"), ("raising", 0.1, 0, "failed"),
    ]  # fmt: skip
    assert lines[-1]["error"] == "RuntimeError: no update today"
    assert ended == [name for name, *_ in runs]
    assert (states[-1].runs, states[-1].total, states[-1].total_steps) == (7, 9, 54)
    first = lines[0]
    assert [step for step, _ in first["validation"]] == [0, 2, 4, 6]
    assert [step for step, _ in first["training"]] == [step for step, _ in first["training_peak"]] == [2, 4, 6]
    assert all(peak >= mean for (_, mean), (_, peak) in zip(first["training"], first["training_peak"], strict=True))
    assert first["seconds"] > 0 and found[0].unit == "nats per byte"
    assert {"settings", "versions", "device", "selection_seeds", "parameter_bytes", "step_milliseconds"} <= set(first)
    before = (tmp_path / "runs.jsonl").read_text()
    assert run(tmp_path) and (tmp_path / "runs.jsonl").read_text() == before
    # Only on request, and then once.
    assert run(tmp_path, retry_failed=True)
    assert [line["status"] for line in records(tmp_path)[7:]] == ["failed", "failed"]


def test_a_stopped_suite_goes_on_and_half_a_line_is_no_run(run, tmp_path):
    calls = iter(range(100))
    assert not run(tmp_path, only="sgd", should_stop=lambda: next(calls) >= 9)
    assert len(records(tmp_path)) == 1
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"task": "ti')  # as a kill would leave it
    starts = []
    assert run(tmp_path, only="sgd", on_start=lambda run: starts.append((run.trial.learning_rate, run.seed)))
    assert len(records(tmp_path)) == 3 and starts[0] == (0.1, 0)


def test_a_pattern_that_fits_nothing(run, tmp_path):
    with pytest.raises(InputError, match=r"only = 'adam': expected a part of tiny/sgd, "):
        run(tmp_path, only="adam")


def test_a_run_that_goes_on_from_a_checkpoint_ends_where_it_would_have(run, tmp_path):
    """Stopped twice in the middle of a run and between evaluations, the record is that of a run that never was."""
    suite = SUITE | {"checkpoint_every": 2, "optimizers": SUITE["optimizers"][:1]}
    suite["search"] = SUITE["search"] | {"learning_rates": [0.1], "report_seeds": [0]}
    (whole,) = run(tmp_path / "whole", suite)
    seen = []

    def stop_at(step):
        return run(
            tmp_path / "part",
            suite,
            should_stop=lambda: bool(seen) and seen[-1] == step,
            on_progress=lambda now: seen.append(now.step),
        )

    assert stop_at(3) is None and stop_at(5) is None
    (resumed,) = stop_at(None)
    assert seen == [*range(4), 4, 5, 6] and not list((tmp_path / "part" / "unfinished").iterdir())
    for curve in ("validation", "parameter_rms", "training", "training_peak", "status"):
        assert getattr(resumed, curve) == getattr(whole, curve)
