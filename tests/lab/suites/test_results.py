"""From result files to tables: by hand arithmetic, and what is refused."""

import dataclasses
import json
import math
import statistics

import pytest

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites.plots import draw, plot_curves
from celo2_harness.lab.suites.record import Record, read_records, write_records
from celo2_harness.lab.suites.report import Section, update_markdown
from celo2_harness.lab.suites.results import best_row, results_by_task
from celo2_harness.lab.suites.significance import Difference, paired_difference
from celo2_harness.lab.suites.spikes import SPIKE_FACTOR, peaks
from celo2_harness.lab.suites.tables import (
    Table,
    comparison_table,
    overview_table,
    result_tables,
    search_table,
    spike_table,
)


def record(name, losses, rate=0.1, decay=0.0, seed=0, status="finished", ms=2.0, width=16, optimizer=(), **facts):
    optimizer = {"preset": name, "learning_rate": rate, "weight_decay": decay, "total_steps": 20, **dict(optimizer)}
    run = {"steps": 20, "seed": seed, "eval_every": 10}
    return Record(
        name=name,
        status=status,
        settings={"model": {"width": width}, "optimizer": optimizer, "run": run},
        validation=tuple((10 * i, None if loss is None else float(loss)) for i, loss in enumerate(losses)),
        step_milliseconds=ms,
        **{"task": "task", **facts},
    )


def test_the_best_trial_is_chosen_on_some_seeds_and_shown_on_others():
    lines = [
        record("sgd", [5, 1.0], rate=0.1, seed=0), record("sgd", [5, 3.0], rate=0.1, seed=1),
        record("sgd", [5, 1.9], rate=0.2, seed=0), record("sgd", [5, 1.9], rate=0.2, seed=1),
        record("sgd", [5, 2.5], rate=0.2, seed=7), record("sgd", [5, 2.7], rate=0.2, seed=8),
    ]  # fmt: skip
    split = {"selection_seeds": (0, 1), "report_seeds": (7, 8)}
    row = best_row([dataclasses.replace(line, **split) for line in lines])
    assert (row.learning_rate, row.loss, row.finals) == (0.2, pytest.approx(2.6), {7: 2.5, 8: 2.7})
    assert row.spread == pytest.approx(statistics.stdev([2.5, 2.7])) and row.trials == 2
    # By all seeds: 2.0 over two against 2.25 over four, and a trial with fewer seeds cannot win.
    row = best_row(lines)
    assert (row.learning_rate, row.incomplete) == (0.2, 1)


def test_weight_decays_are_trials_and_failures_are_counted():
    lines = [
        record("sgd", [5, 2.0], decay=0.0), record("sgd", [5, 1.0], decay=0.1),
        record("sgd", [5, None], decay=1.0, status="diverged"), record("sgd", [], decay=9.0, status="failed"),
    ]  # fmt: skip
    row = best_row(lines)
    assert (row.weight_decay, row.trials) == (0.1, 4)
    assert row.failures == {"diverged": 1, "failed": 1}


def test_a_row_is_the_best_learning_rate_and_the_mean_over_seeds():
    (results,) = results_by_task(
        [
            record("fast", [5.0, 2.0, 1.0], seed=0),
            record("fast", [5.0, 3.0, 2.0], seed=1),
            record("fast", [5.0, 4.0, 4.0], rate=0.2, seed=0),
            record("fast", [5.0, None], rate=0.2, seed=1, status="diverged"),
            record("adamw", [5.0, 3.0, 2.5]),
            record("slow", [5.0, 4.5, 4.0]),
            record("dead", [5.0, None], status="diverged"),
        ]
    )
    fast, adamw, slow, dead = results.rows
    assert (fast.name, fast.learning_rate, fast.trials, fast.loss) == ("fast", 0.1, 2, 1.5)
    assert fast.spread == pytest.approx(math.sqrt(0.5)) and adamw.spread is None
    assert fast.points == [(0, [5.0, 5.0]), (10, [2.0, 3.0]), (20, [1.0, 2.0])]
    assert fast.curve == [(0, 5.0), (10, 2.5), (20, 1.5)] and dead.curve == [(0, 5.0)]
    assert results.baseline is adamw and [row.steps_to(adamw.loss) for row in results.rows] == [10, 20, None, None]
    assert (slow.loss, dead.loss, fast.steps_to(dead.loss)) == (4.0, math.inf, None)


def test_any_results_can_be_drawn(tmp_path):
    dead, fast = record("dead", [None], status="diverged"), record("fast", [5.0, 2.0, 1.0])
    for runs in ([dead, fast], [fast, record("fast", [5.0, 2.5, 1.5], seed=1)]):
        assert plot_curves(*results_by_task(runs), tmp_path / "plot.png", "title")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_curves(*results_by_task([dead]), tmp_path / "none.png", "title")
    curves = {"parameter_rms": ((0, 1.0), (10, 2.0), (20, 30.0))}
    curves |= {name: ((10, 3.0), (20, 2.0), (30, 1.0)) for name in ("training", "training_peak")}
    runs = [record("sgd", [5.0, rate + decay], rate, decay, **curves) for rate in (1.0, 2.0) for decay in (0.1, 0.2)]
    assert len(draw(*results_by_task(runs), tmp_path)) == 5


def test_significance_by_hand():
    """Differences -0.3, -0.1, -0.2: mean -0.2, standard error 0.1 / sqrt 3, and Student's t of two degrees 4.3027."""
    others = {0: 2.0, 1: 2.1, 2: 2.2}
    difference = paired_difference({0: 1.7, 1: 2.0, 2: 2.0, 3: 0.0}, others)
    assert difference is not None and difference.seeds == 3
    assert difference.mean == pytest.approx(-0.2) and difference.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert difference.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert difference.verdict == "open"  # 0.248 > 0.2
    verdict = lambda *finals: paired_difference(dict(enumerate(finals)), others).verdict  # type: ignore[union-attr]
    assert verdict(1.79, 1.9, 2.0) == "lower" and verdict(2.5, 2.61, 2.7) == "higher"
    assert verdict(1.99995, 2.09995, 2.19995) == "open"  # too small to matter, however sure
    assert verdict(1.0) == "one seed" and verdict(1.0, math.inf) == "diverged"
    assert paired_difference({5: 1.0}, others) is None
    assert paired_difference({0: math.inf}, {0: math.inf}) == Difference(1, math.inf, None, None, "diverged")


def test_spikes_by_hand():
    """Levels 4, 3, 2.75: 0.5 x 4 + 0.5 x 2 = 3, then 0.5 x 3 + 0.5 x 2.5."""
    training = [[10, 4.0], [20, 2.0], [30, 2.5], [40, 2.0]]
    found = peaks(training, [[10, 9.0], [20, 6.0], [30, 4.6], [40, None]])
    assert [(p.step, p.ratio) for p in found] == [(20, 1.5), (30, pytest.approx(4.6 / 3)), (40, math.inf)]
    assert [p.ratio > SPIKE_FACTOR for p in found] == [False, True, True]
    # A jump enters the level as 1.5 times it: 2 -> 2.5, so 3.8 is a spike, and would be none after a level of 51.
    found = peaks([[1, 2.0], [2, 100.0], [3, 2.0]], [[1, 2.0], [2, 100.0], [3, 3.8]])
    assert [p.ratio > SPIKE_FACTOR for p in found] == [True, True]


def test_the_table_of_spikes_says_what_a_guard_did():
    curves = {"training": ((10, 4.0), (20, 2.0)), "training_peak": ((10, 9.0), (20, 6.0))}
    lines = [record("sgd", [5, 2.0], seed=s, guarded_steps=2 + s, **curves) for s in range(2)]
    lines += [record("adamw", [5, 2.0], **curves)]
    table = spike_table(*results_by_task(lines))
    assert table.rows == [["sgd", "2", "0", "1.50x", "20"], ["adamw", "1", "0", "1.50x", "20"]]
    assert table.notes[1:] == ["sgd: 5 steps skipped or clipped by the guard."]


def test_the_comparison_table_by_hand():
    lines = [
        *(record("adamw", [5, 3.0, 2.0 + 0.1 * s], seed=s, ms=4.0) for s in range(3)),
        *(record("adamw", [5, 4.0, 4.0], rate=0.2, seed=s) for s in range(3)),
        *(record("muon", [5, 2.0, 1.5 + 0.1 * s], rate=0.01, seed=s, ms=6.0) for s in range(3)),
        *(record("muon", [5, None], rate=0.02, seed=s, status="diverged") for s in range(3)),
        *(record("muon", [5, 9.0], rate=0.001, seed=s) for s in range(3)),
    ]
    (results,) = results_by_task(lines)
    table = comparison_table(results)
    by_name = {row[0]: dict(zip(table.headings, row, strict=True)) for row in table.rows}
    assert list(by_name) == ["muon", "adamw"]
    muon, adamw = by_name["muon"], by_name["adamw"]
    assert muon["final loss (nats per byte)"] == "1.6000 ± 0.1000"
    assert adamw["minus muon, paired"].startswith("+0.5000 ± 0.0000, higher") and muon["minus muon, paired"] == "-"
    # The mean of muon is 2.0 at step 10, below adamw's 2.1; 10 steps of 6 ms over 20 of 4.
    assert muon["steps to adamw's loss"] == "10 (50%)" and muon["time to it, of adamw's"] == "0.1 s (75%)"
    assert adamw["steps to adamw's loss"] == "20 (100%)"
    assert (adamw["learning rate"], muon["learning rate"]) == ("0.1*", "0.01")  # * at the edge of those tried
    assert muon["diverged / failed runs"] == "3 / 0"
    notes = " ".join(table.notes)
    assert "3 seeds: weak evidence." in notes and "different numbers of trials" in notes
    search = search_table(results)
    assert search.headings == ["optimizer", "0.001", "0.01", "0.02", "0.1", "0.2"]
    assert search.rows[1] == ["muon", "9.0000", "1.6000", "diverged", "", ""]


def test_tasks_and_weights_are_told_apart():
    lines = [
        record("celo2_ortho", [5, 2.0]),
        record("celo2_ortho", [5, 1.9], optimizer={"weights": "runs/a/weights.celo2"}),
        record("celo2_ortho", [5, 1.8], optimizer={"weights": "runs/b/weights.celo2"}),
        record("celo2_ortho", [5, 1.7], optimizer={"weights": "theta.state"}),
        record("adamw", [5, 2.0]),
        record("adamw", [5, 2.0], seed=1),
        record("adamw", [5, 1.0], width=32),
    ]
    one, two = results_by_task(lines)
    names = ["celo2_ortho", "celo2_ortho (a)", "celo2_ortho (b)", "celo2_ortho (theta)", "adamw"]
    assert [row.name for row in one.rows] == names
    assert [len(row.finals) for row in one.rows] == [1, 1, 1, 1, 2]
    assert (one.title, two.title) == ("task (width 16)", "task (width 32)")
    # The same name for other numbers: the digest tells.
    lines = [record("celo2_ortho", [5, 2.0], optimizer={"weights_sha256": digest}) for digest in ("aa", "bb")]
    (results,) = results_by_task(lines)
    assert [row.name for row in results.rows] == ["celo2_ortho (weights_sha256 aa)", "celo2_ortho (weights_sha256 bb)"]


def test_the_search_is_shown_on_its_own_seeds():
    header = {"selection_seeds": (0,), "report_seeds": (1, 2)}
    lines = [record("sgd", [5, loss], seed=seed, **header) for seed, loss in ((0, 1.0), (1, 3.0), (2, 4.0))]
    (results,) = results_by_task([*lines, record("sgd", [5, 2.0], rate=0.2, **header)])
    assert search_table(results).rows == [["sgd", "1.0000", "2.0000"]]
    assert results.rows[0].loss == 3.5


def test_runs_of_different_selections_do_not_mix():
    split = {"selection_seeds": (0,), "report_seeds": (1,)}
    with pytest.raises(InputError, match="runs of sgd come from suites with different seeds"):
        results_by_task([record("sgd", [5, 1.0], **split), record("sgd", [5, 1.0], seed=1)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": None}, "line 2: validation = None: expected a list"),
        ({"validation": [[0]]}, "line 2: validation[0] = [0]: expected a list of 2"),
        ({"validation": []}, "line 2: a finished run without a final held-out loss"),
        ({"status": "lost"}, "line 2: status = 'lost': expected one of finished, diverged, failed, unfinished"),
        ({"settings": {}}, "line 2: settings: expected `optimizer` with a learning_rate, `run` with steps and seed"),
        ({"name": ...}, "line 2: name is missing"),
        ({"speed": 3}, "line 2: speed: there is no such key"),
        ({"returns": [1.0]}, "line 2: returns and episode_steps differ in length"),
    ],
)
def test_a_broken_record_is_named(tmp_path, change, message):
    good = record("sgd", [5, 1.0]).to_json()
    bad = {name: value for name, value in (good | change).items() if value is not ...}
    (tmp_path / "runs.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    with pytest.raises(InputError) as refused:
        read_records([tmp_path])
    assert f"{tmp_path}/runs.jsonl, {message}" in str(refused.value)


def test_broken_files_and_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="none: there is no such folder or file"):
        read_records([tmp_path / "none"])
    with pytest.raises(InputError, match=r"holds no results; expected runs\.jsonl, other \.jsonl files"):
        read_records([tmp_path])
    (tmp_path / "other.jsonl").write_text("")
    with pytest.raises(InputError, match="no runs there yet"):
        read_records([tmp_path])
    (tmp_path / "other.jsonl").write_text('{"name": \n{}\n')
    with pytest.raises(InputError, match=r"other\.jsonl is damaged: line 1 is not a JSON record"):
        read_records([tmp_path])


def test_a_later_run_replaces_a_failed_one_and_not_the_other_way_round(tmp_path):
    failed, finished = record("sgd", [], status="failed", error="no"), record("sgd", [5, 1.0])
    for lines in ([failed, finished], [finished, failed]):
        write_records(tmp_path / "any.jsonl", lines)
        assert read_records([tmp_path]) == [finished]


def test_the_overview_has_what_was_on_several_tasks():
    lines = [record("sgd", [5, 1.0]), record("adamw", [5, 2.0]), record("adamw", [5, 2.5], seed=1)]
    lines += [record("adamw", [5, 2.0], width=64, task="other"), record("adamw", [5, 2.5], 0.1, 0.0, 1, task="other")]
    lines[-1] = record("adamw", [5, 2.5], seed=1, width=64, task="other")
    table = overview_table(results_by_task([*lines, record("lion", [5, 3.0])]))
    assert table.headings == ["optimizer", "task", "other"]
    assert table.rows == [["adamw", "2.2500 ± 0.3536", "2.2500 ± 0.3536"]]


def test_a_record_is_the_same_after_a_file(tmp_path):
    lines = [
        record("sgd", [5.0, 1.0], seed=s, guarded_steps=s, versions={"jax": "1"}, training=((10, None),))
        for s in (0, 1)
    ]
    write_records(tmp_path / "kept.jsonl", lines)
    read = read_records([tmp_path / "kept.jsonl"])
    assert read == lines and result_tables(*results_by_task(read)) == result_tables(*results_by_task(lines))


def test_a_record_of_the_metrics_of_a_run():
    settings = {"optimizer": {"learning_rate": 0.1}, "run": {"steps": 20, "seed": 3}}
    lines = [
        {"step": 0, "validation_loss": 5.0, "parameter_rms": 0.1, "parameter_bytes": 4, "state_bytes": 8},
        {"step": 10, "loss": 3.00000049, "largest_loss": None, "validation_loss": 2.0, "step_milliseconds": 2.0},
        {"step": 20, "loss": 2.0, "largest_loss": 2.5, "validation_loss": 1.0, "step_milliseconds": 4.0},
        {"step": 20, "kind": "end", "status": "finished"},
    ]
    lines = [{"kind": "progress", "seconds": 1.5, **line} for line in lines]
    made = Record.from_run("sgd", {"settings": settings, "device": "cpu"}, lines, task="t")
    assert made.validation == ((0, 5.0), (10, 2.0), (20, 1.0)) and made.final_loss == 1.0
    assert made.training == ((10, 3.0), (20, 2.0)) and made.training_peak == ((10, None), (20, 2.5))
    assert (made.parameter_bytes, made.state_bytes, made.step_milliseconds, made.seconds) == (4, 8, 3.0, 1.5)
    assert (made.seed, made.steps, made.learning_rate, made.device) == (3, 20, 0.1, "cpu")


def test_tables_go_between_the_markers_of_a_page(tmp_path):
    sections = [Section(t, [Table(t, ["optimizer", "loss"], [["sgd", "1*"]], ["*: edge."])], []) for t in ("a", "b c")]
    page = tmp_path / "page.md"
    page.write_text("# Before\n\n<!-- report: b c -->\nold\n<!-- end of report -->\n\nAfter.\n")
    for _ in range(2):  # again, it changes nothing
        assert update_markdown(page, sections) == []
        assert page.read_text() == (
            "# Before\n\n<!-- report: b c -->\n\n**b c**\n\n| optimizer | loss |\n| --- | ---: |\n| sgd | 1* |\n\n"
            "\\*: edge.\n\n<!-- end of report -->\n\nAfter.\n"
        )
    page.write_text("<!-- report: * -->\n<!-- end of report -->\n")
    update_markdown(page, sections)
    assert page.read_text().index("**a**") < page.read_text().index("**b c**")
    other = "<!-- report: d -->\nof another report\n<!-- end of report -->\n"
    page.write_text("<!-- report: a -->\n<!-- end of report -->\n" + other)
    assert update_markdown(page, sections) == ["d"]
    assert "**a**" in page.read_text() and page.read_text().endswith(other)
    page.write_text(other)
    with pytest.raises(InputError, match="wants 'd'; there is 'a', 'b c'"):
        update_markdown(page, sections)
    page.write_text("nothing")
    with pytest.raises(InputError, match="has no markers"):
        update_markdown(page, sections)
