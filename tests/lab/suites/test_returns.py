"""Returns of reinforcement-learning runs: read, put together over seeds, shown."""

import json

import numpy as np
import pytest

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites import read_records, return_curves
from celo2_harness.lab.suites.plots import plot_returns
from celo2_harness.lab.suites.returns import bootstrap_interval
from celo2_harness.lab.suites.tables import common_table, runs_table


def write_run(folder, game="freeway", preset="adamw", seed=0, episodes=(), end="finished", weights=None, updates=()):
    folder.mkdir(parents=True)
    optimizer = {"preset": preset, "learning_rate": 0.001, "weights": weights}
    run = {"steps": 1000, "seed": seed}
    settings = {"environment": {"game": game}, "ppo": {}, "optimizer": optimizer, "run": run}
    records = [{"kind": "header", "settings": settings, "device": "cpu"}]
    records += [{"kind": "episode", "step": step, "return": total} for step, total in episodes]
    records += [{"kind": "update", "step": step} for step in updates]
    records += [{"kind": "end", "step": 1024, "status": end}] if end else []
    lines = ({"seconds": 1.0, **record} for record in records)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_becomes_a_record(tmp_path):
    write_run(tmp_path / "a", seed=3, episodes=[(40, 1.0), (60, 3.0)], end=None, updates=[64])
    (record,) = read_records([tmp_path])
    assert record.is_agent and (record.name, record.learning_rate, record.seed) == ("adamw", 0.001, 3)
    assert (record.status, record.reached, record.steps) == ("unfinished", 64, 1000)
    assert (record.episode_steps, record.returns, record.device) == ((40, 60), (1.0, 3.0), "cpu")


@pytest.fixture
def three_runs(tmp_path):
    """Points every 20 steps, windows of 100."""
    write_run(tmp_path / "a", episodes=[(40, 1.0), (60, 3.0), (155, 5.0), (1008, 7.0)])
    write_run(tmp_path / "deep" / "b", seed=1, episodes=[(20, 10.0), (905, 20.0)], end=None, updates=[960])
    write_run(tmp_path / "c", preset="muon", episodes=[(500, 4.0)], end="diverged")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text('{"kind": "header", "settings": {"model": {}}}\n')
    return return_curves(read_records([tmp_path]))


def test_curves_are_means_over_windows_and_seeds(three_runs):
    adamw, muon = three_runs
    assert (adamw.game, adamw.label, adamw.seeds) == ("freeway", "adamw, learning rate 0.001", [0, 1])
    assert adamw.statuses == ["finished", "unfinished"] and muon.statuses == ["diverged"]
    at = {step: (adamw.mean[i], adamw.low[i], adamw.high[i]) for i, step in enumerate(adamw.steps)}
    assert at[40] == (5.5, 1.0, 10.0)
    assert at[60] == at[100] == (6.0, 2.0, 10.0)
    assert np.isnan(at[20]).all() and np.isnan(at[120]).all()  # one of the runs had no episode there
    assert np.isnan(at[1000]).all()  # nor was one of them there
    # With the episode of the last, rounded-up update.
    assert adamw.runs[0, -1] == 7.0
    assert np.isnan(adamw.runs[1, 44]) and adamw.runs[1, 45] == adamw.runs[1, 47] == 20.0
    assert muon.mean[24] == muon.low[24] == muon.high[24] == 4.0


def test_tables_say_where_runs_were(three_runs, tmp_path):
    table = runs_table(three_runs)
    assert table.rows == [
        ["freeway", "adamw, learning rate 0.001", "0", "finished", "1,000", "7.0"],
        ["freeway", "adamw, learning rate 0.001", "1", "unfinished", "960", "20.0"],
        ["freeway", "muon, learning rate 0.001", "0", "diverged", "580", "4.0"],
    ]
    # At step 580 neither of the first two has had an episode within the window.
    assert common_table(three_runs).rows == [["freeway", "580", "-", "4.0"]]
    plot_returns(three_runs, tmp_path / "returns.png")
    assert (tmp_path / "returns.png").read_bytes().startswith(b"\x89PNG")


def test_optimizers_are_compared_as_far_as_all_runs_have_come(tmp_path):
    every = lambda value, upto: [(step, value) for step in range(10, upto + 1, 10)]
    write_run(tmp_path / "a", episodes=every(1.0, 1000))
    write_run(tmp_path / "b", seed=1, episodes=every(4.0, 500), end=None)
    write_run(
        tmp_path / "c", preset="muon", episodes=[*every(2.0, 410), *[(s, 9.0) for s in range(420, 710, 10)]], end=None
    )
    write_run(tmp_path / "d", game="asterix", episodes=[], end=None)
    table = common_table(return_curves(read_records([tmp_path])))
    assert table.headings[2:] == ["adamw, learning rate 0.001", "muon, learning rate 0.001"]
    # Of the ten episodes from 401 to 500 the first ended with 2.
    assert table.rows == [["asterix", "0", "-", "-"], ["freeway", "500", "2.5 (1.0, 4.0)", "8.3"]]


def test_runs_that_differ_in_more_than_their_seed_are_told_apart(tmp_path):
    write_run(tmp_path / "a", episodes=[(900, 1.0)])
    write_run(tmp_path / "b", episodes=[(900, 2.0)], weights="mine")
    curves = return_curves(read_records([tmp_path]))
    assert [curve.label for curve in curves] == [f"adamw, learning rate 0.001 ({i})" for i in (1, 2)]


def test_of_two_runs_with_the_same_settings_the_one_at_its_end_counts(tmp_path):
    write_run(tmp_path / "a", episodes=[(900, 1.0)])
    write_run(tmp_path / "b", episodes=[(90, 2.0)], end=None)
    (record,) = read_records([tmp_path])
    assert record.status == "finished"


def test_folders_without_runs_and_damaged_files_are_named(tmp_path):
    with pytest.raises(InputError, match="holds no results; .*runs of celo2 reinforce"):
        read_records([tmp_path])
    write_run(tmp_path / "a", episodes=[(900, 1.0)])
    content = (tmp_path / "a" / "metrics.jsonl").read_text()
    (tmp_path / "a" / "metrics.jsonl").write_text(content.replace('"return"', '"retur"'))
    with pytest.raises(InputError, match="metrics.jsonl: its metrics are damaged: 'return' is missing"):
        read_records([tmp_path])


def test_the_interval_is_that_of_the_bootstrap():
    values = np.random.default_rng(0).normal(size=(40, 1))
    low, high = bootstrap_interval(values)
    # Of many runs it is the interval of the normal distribution.
    half = 1.96 * values.std() / np.sqrt(40)
    assert [low[0], high[0]] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.05)
    low, high = bootstrap_interval(np.array([[2.0, np.nan]]))
    assert low[0] == high[0] == 2.0 and np.isnan([low[1], high[1]]).all()


def test_a_curve_ends_where_its_run_stopped(tmp_path):
    """Points every 20 of 1,000 steps, a window of 100; the run stopped after 50."""
    write_run(tmp_path / "a", episodes=[(10, 1.0), (30, 2.0), (50, 9.0)], end=None)
    (curve,) = return_curves(read_records([tmp_path]))
    assert np.flatnonzero(np.isfinite(curve.mean)).tolist() == [0, 1]
    assert curve.mean[:2].tolist() == [1.0, 1.5]
