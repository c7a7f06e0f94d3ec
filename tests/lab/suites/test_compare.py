"""Comparisons: which runs are made, and what the table says of them."""

import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest

from celo2_harness.lab.suites import CompareConfig, Contender, InputError, compare, plot_comparison, summarize

CONFIG = CompareConfig(steps=8, seeds=(0, 1), eval_every=3)


def contender(name, rate, tx):
    return Contender(name, rate, tx, {"preset": name, "learning_rate": rate})


@pytest.fixture(scope="module")
def contenders():
    broken = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u * jnp.nan, updates))
    return [
        contender("sgd", 0.1, optax.sgd(0.1)),
        contender("broken", 0.1, broken),
        contender("adamw", 1e-2, optax.adamw(1e-2)),
        contender("adamw", 1e-6, optax.adamw(1e-6)),
    ]


@pytest.fixture(scope="module")
def folder(task, contenders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    comparison = compare(task, contenders, CONFIG, folder, settings={})
    assert comparison.complete and comparison.found == 0 and len(comparison.runs) == 8
    return folder


def records(folder):
    return [json.loads(line) for line in (folder / "compare.jsonl").read_text().splitlines()]


def test_every_run_has_its_line(folder):
    runs = records(folder)
    assert [(run["name"], run["learning_rate"], run["seed"]) for run in runs[4:]] == [
        ("adamw", 0.01, 0), ("adamw", 0.01, 1), ("adamw", 1e-6, 0), ("adamw", 1e-6, 1)
    ]  # fmt: skip
    assert [step for step, _ in runs[0]["validation"]] == [0, 3, 6, 8]
    assert runs[0]["step_milliseconds"] > 0
    assert runs[4]["state_bytes"] == 2 * runs[4]["parameter_bytes"] + 4  # two moments and a count
    assert {run["status"] for run in runs if run["name"] == "broken"} == {"diverged"}
    assert {"settings", "versions", "device"} <= set(runs[0])


def test_finished_runs_are_not_repeated(task, contenders, folder):
    before = records(folder)
    starts = []
    again = compare(task, contenders, CONFIG, folder, settings={}, on_start=lambda contender, seed: starts.append(seed))
    assert not starts and again.found == 8 and again.runs == before == records(folder)


def test_more_seeds_add_runs_and_other_settings_do_not_mix(task, contenders, folder):
    starts = []

    def note(contender, seed):
        starts.append((contender.name, seed))

    config = CompareConfig(steps=8, seeds=(1, 2), eval_every=3)
    assert len(compare(task, contenders[:1], config, folder, settings={}, on_start=note).runs) == 2
    assert starts == [("sgd", 2)]
    compare(task, contenders[:1], config, folder, settings={"model": "another"}, on_start=note)
    assert starts == [("sgd", 2), ("sgd", 1), ("sgd", 2)]


def test_a_stopped_comparison_goes_on_where_it_was(task, contenders, tmp_path):
    calls = iter(range(100))
    stopped = compare(task, contenders[:1], CONFIG, tmp_path, settings={}, should_stop=lambda: next(calls) >= 12)
    assert not stopped.complete and len(stopped.runs) == 1
    with (tmp_path / "compare.jsonl").open("a") as file:
        file.write('{"name": "sg')  # as a kill would leave it
    after = compare(task, contenders[:1], CONFIG, tmp_path, settings={})
    assert after.complete and after.found == 1 and len(records(tmp_path)) == 2


def run_record(name, curve, rate=0.1, seed=0, status="finished"):
    return {
        "name": name, "learning_rate": rate, "seed": seed, "status": status, "validation_loss": curve[-1],
        "validation": [[10 * i, loss] for i, loss in enumerate(curve)],
        "step_milliseconds": 2.0, "state_bytes": 8, "parameter_bytes": 4,
    }  # fmt: skip


def test_a_row_is_the_best_learning_rate_and_the_mean_over_seeds():
    rows = summarize(
        [
            run_record("fast", [5.0, 2.0, 1.0], seed=0),
            run_record("fast", [5.0, 3.0, 2.0], seed=1),
            run_record("fast", [5.0, 4.0, 4.0], rate=0.2, seed=0),
            run_record("fast", [5.0, None], rate=0.2, seed=1, status="diverged"),
            run_record("adamw", [5.0, 3.0, 2.5]),
            run_record("slow", [5.0, 4.5, 4.0]),
            run_record("dead", [5.0, None], status="diverged"),
        ]
    )
    fast, adamw, slow, dead = rows
    assert (fast.name, fast.learning_rate, fast.learning_rates, fast.validation_loss) == ("fast", 0.1, 2, 1.5)
    assert fast.spread == pytest.approx(math.sqrt(0.5))
    assert fast.curve == [(0, 5.0), (10, 2.5), (20, 1.5)]
    assert (fast.low, fast.high) == ([5.0, 2.0, 1.0], [5.0, 3.0, 2.0])
    assert [row.steps_to_baseline for row in rows] == [10, 20, None, None]
    assert (adamw.spread, slow.status, dead.status) == (None, "finished", "diverged")
    assert dead.curve == [(0, 5.0)]


def test_without_the_baseline_nothing_is_timed_to_it():
    assert summarize([run_record("fast", [5.0, 2.0])])[0].steps_to_baseline is None
    diverged = run_record("adamw", [5.0, None], status="diverged")
    assert summarize([run_record("fast", [5.0, 2.0]), diverged])[0].steps_to_baseline is None


def test_any_rows_can_be_drawn(tmp_path):
    dead, fast = run_record("dead", [None], status="diverged"), run_record("fast", [5.0, 2.0, 1.0])
    for runs in ([], [dead], [dead, fast], [fast, run_record("fast", [5.0, 2.5, 1.5], seed=1)]):
        plot_comparison(summarize(runs), tmp_path / "plot.png", "title")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"seeds": ()}, r"seeds = \[\]"),
        ({"seeds": (1, 1)}, r"seeds = \[1, 1\]"),
        ({"seeds": (-1,)}, "seed = -1"),
    ],
)
def test_wrong_configs_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        CompareConfig(**{"steps": 1} | change)


def test_a_damaged_file_is_named(task, contenders, tmp_path):
    (tmp_path / "compare.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(InputError, match=r"compare.jsonl is damaged: line 1"):
        compare(task, contenders, CONFIG, tmp_path, settings={})
