"""Suites run: every run once, whatever happens."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from celo2_harness.blocks import guard_updates
from celo2_harness.lab.suites import Contender, InputError, read_suite, run_suite
from celo2_harness.lab.suites.claims import Claims
from celo2_harness.lab.suites.records import append_record
from celo2_harness.lab.suites.single import parameter_rms, run_once, run_settings

SUITE = {
    "name": "test",
    "tasks": [{"name": "language_model", "size": "tiny", "steps": 6, "eval_every": 2, "label": "tiny"}],
    "search": {"learning_rates": [0.01, 0.1], "weight_decays": [0.0], "selection_seeds": [0], "report_seeds": [1]},
    "optimizers": [{"optax": "sgd", "label": name} for name in ("sgd", "broken", "raising")],
}
BROKEN = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u * jnp.nan, updates))


def _refuse(updates, params):
    raise RuntimeError("no update today\nsecond line")


def contender(optimizer, rate, decay, steps):
    tx = {"sgd": optax.sgd(rate), "broken": BROKEN, "raising": optax.stateless(_refuse)}[optimizer.label]
    settings = {"optax": optimizer.label, "learning_rate": rate, "weight_decay": decay, "total_steps": steps}
    return Contender(optimizer.label, rate, tx, settings)


@pytest.fixture(scope="module")
def run(task):
    def run(folder, **arguments):
        return run_suite(
            read_suite(SUITE), folder, make_task=lambda task_of: task, make_contender=contender, **arguments
        )

    return run


def records(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_a_suite_from_the_first_run_to_the_last(run, tmp_path):
    states, ended = [], []
    assert run(tmp_path, on_state=states.append, on_end=lambda run, record: ended.append(run.trial.optimizer))
    lines = records(tmp_path)
    runs = [(line["name"], line["learning_rate"], line["seed"], line["status"]) for line in lines]
    assert runs[:2] == [("sgd", 0.01, 0, "finished"), ("sgd", 0.1, 0, "finished")]
    better = min(lines[:2], key=lambda line: line["validation_loss"])["learning_rate"]
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
    assert first["unit"] == "nats per byte" and first["seconds"] > 0
    assert {"settings", "versions", "device", "commit", "suite", "selection_seeds"} <= set(first)
    before = (tmp_path / "runs.jsonl").read_text()
    assert run(tmp_path) and (tmp_path / "runs.jsonl").read_text() == before
    # Only on request, and then once.
    assert run(tmp_path, retry_failed=True)
    assert [line["status"] for line in records(tmp_path)[7:]] == ["failed", "failed"]


def test_the_size_of_the_parameters_by_hand(task, run, tmp_path):
    params = task.init(jax.random.key(0))
    flat = [float(x) for leaf in jax.tree.leaves(params) for x in leaf.ravel().tolist()]
    expected = math.sqrt(sum(x * x for x in flat) / len(flat))
    assert float(parameter_rms(params)) == pytest.approx(expected, rel=1e-5)
    run(tmp_path, only="tiny/sgd")
    assert records(tmp_path)[0]["parameter_rms"][0] == [0, pytest.approx(expected, rel=1e-5)]


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


def test_a_line_of_another_process_is_not_run_into(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_record(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": ')
    append_record(path, {"c": 2})
    assert path.read_text() == '{"a": 1}\n{"c": 2}\n'


def test_claims_are_of_one_process_and_end_with_it(tmp_path):
    claims = Claims(tmp_path / "claims")
    assert claims.take("run 1")
    other = (
        "import sys; from celo2_harness.lab.suites.claims import Claims; claims = Claims(sys.argv[1])\n"
        "print(claims.take('run 1'), claims.take('run 2'))\n"
    )
    for expected in ("False True\n", "False True\n"):  # the first one's claim on run 2 ended with it
        done = subprocess.run(
            [sys.executable, "-c", other, str(tmp_path / "claims")], capture_output=True, text=True, check=True
        )
        assert done.stdout == expected
    claims.release("run 1")
    done = subprocess.run(
        [sys.executable, "-c", other, str(tmp_path / "claims")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True True\n"
    claims.close()
    assert os.path.getsize(tmp_path / "claims") == 0


@pytest.mark.filterwarnings("ignore::UserWarning:orbax", "ignore::DeprecationWarning")
def test_a_run_that_goes_on_from_a_checkpoint_ends_where_it_would_have(task, tmp_path):
    one = Contender("adam", 0.01, optax.adam(0.01), {"name": "adam"})
    settings = run_settings({}, one, steps=9, seed=3, eval_every=4)
    whole = run_once(task, one, settings)
    seen = []

    def resume(stop_at):
        arguments = {"folder": tmp_path / "run", "checkpoint_every": 3}
        return run_once(
            task,
            one,
            settings,
            should_stop=lambda: bool(seen) and seen[-1] == stop_at,
            on_progress=lambda progress: seen.append(progress.state.step),
            **arguments,
        )

    assert resume(5) is None
    assert resume(7) is None
    resumed = resume(None)
    assert seen == [*range(6), *range(6, 8), *range(8, 10)]
    curves = ("validation", "parameter_rms", "training", "training_peak", "validation_loss", "status")
    assert resumed is not None and whole is not None
    assert {name: resumed[name] for name in curves} == {name: whole[name] for name in curves}
    # The record is not written yet: a kill now must find something to go on from.
    assert (tmp_path / "run").exists()


def test_steps_on_which_a_guard_acted_are_counted(task):
    """Gradients that are NaN at the third of four steps: one step is skipped, and without a guard nothing is said."""

    def fail_once(updates, state, params=None):
        return jax.tree.map(lambda u: jnp.where(state == 2, jnp.nan, u), updates), state + 1

    broken = optax.GradientTransformation(lambda params: jnp.zeros([], int), fail_once)
    tx = optax.chain(broken, guard_updates(optax.sgd(0.1)))
    for optimizer, expected in ((tx, 1), (optax.sgd(0.1), None)):
        contender = Contender("sgd", 0.1, optimizer, {"learning_rate": 0.1})
        settings = run_settings(task.describe(), contender, steps=4, seed=0, eval_every=4)
        record = run_once(task, contender, settings)
        assert record["status"] == "finished" and record.get("guarded_steps") == expected
