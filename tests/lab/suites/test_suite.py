"""Suites: what is read, what is refused, and which runs they need."""

import copy
import math

import pytest

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites import Run, Suite, best_trial, grids, load_suite, plan, suites, total_steps
from celo2_harness.lab.training.reading import read

GOOD = {
    "name": "test",
    "tasks": [{"name": "language_model", "size": "tiny", "steps": 40}],
    "search": {"learning_rates": [0.1, 0.2], "weight_decays": [0.0, 1.0], "selection_seeds": [0, 1]},
    "optimizers": [{"optax": "sgd"}, {"preset": "adamw"}],
}


def read_suite(content):
    return read(Suite, content)


def changed(**places):
    content = copy.deepcopy(GOOD)
    for place, value in places.items():
        *path, last = (int(name) if name.isdigit() else name for name in place.split("__"))
        table = content
        for name in path:
            table = table[name]
        if value is None:
            del table[last]
        else:
            table[last] = value
    return content


def test_what_a_suite_says_and_what_it_leaves_out():
    suite = read_suite(changed(optimizers__0__learning_rates=[1, 2]))
    (task,) = suite.tasks
    assert (task.label, task.eval_every, task.batch, task.data) == ("language_model tiny", 2, None, None)
    assert suite.search.report_seeds == suite.search.selection_seeds == (0, 1)
    sgd, adamw = suite.optimizers
    assert (sgd.label, sgd.kind, sgd.learning_rates, sgd.weight_decays) == ("sgd", "optax", (1.0, 2.0), (0.0, 1.0))
    assert adamw.learning_rates == (0.1, 0.2) and adamw.guard is None


def test_built_in_suites():
    assert set(suites()) == {"fashion", "long", "nano", "smoke", "stability", "widths"}
    for name, description in suites().items():
        suite = load_suite(name)
        assert suite.name == name and description and total_steps(suite)[0] > 1
    assert total_steps(load_suite("nano")) == (10 * 4 * 3, 120000)
    assert total_steps(load_suite("long")) == (2, 40000)
    assert [task.size for task in load_suite("widths").tasks] == ["nano-64", "nano", "nano-256", "nano-512"]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"speed": 1}, "speed: there is no such key; expected some of name, "),
        ({"name": None}, "name is missing"),
        ({"tasks": []}, "tasks = []: expected one or more tables"),
        ({"tasks__0__name": "lm"}, "tasks[0]: name = 'lm': expected one of language_model"),
        ({"tasks__0__size": "huge"}, "tasks[0]: size = 'huge': language_model comes as nano, "),
        ({"tasks__0__steps": 0}, "tasks[0]: steps = 0: expected at least 1"),
        ({"tasks__0__steps": True}, "tasks[0].steps = True: expected a whole number"),
        ({"tasks__0__epochs": 3}, "tasks[0].epochs: there is no such key"),
        ({"tasks": [GOOD["tasks"][0]] * 2}, "tasks: two of them are called 'language_model tiny'"),
        ({"search__learning_rates": []}, "search: learning_rates = []: expected one or more different"),
        ({"search__learning_rates": [0.1, 0.1]}, "search: learning_rates = [0.1, 0.1]: expected"),
        ({"search__learning_rates": [0.0]}, "search: learning_rates = [0.0]: expected"),
        ({"search__weight_decays": [-1.0]}, "search: weight_decays = [-1.0]: expected"),
        ({"search__selection_seeds": [0.5]}, "search.selection_seeds[0] = 0.5: expected"),
        (
            {"search__report_seeds": [1, 2]},
            "search: report_seeds = [1, 2]: expected those of the selection, [0, 1]",
        ),
        ({"optimizers__0": {}}, "optimizers[0]: got none of preset, optax, make; expected exactly one"),
        ({"optimizers__0__preset": "muon"}, "optimizers[0]: got preset and optax of"),
        ({"optimizers__0__weights": "celo2"}, "optimizers[0]: weights = 'celo2': only a preset has weights"),
        ({"optimizers__1": {"optax": "sgd"}}, "optimizers: two of them are called 'sgd'"),
        ({"optimizers__0__learning_rates": [0.1]}, "optimizers have different numbers of trials (sgd 2, adamw 4)"),
        ({"baseline": "adam"}, "baseline = 'adam': expected one of sgd, adamw"),
        ({"checkpoint_every": -1}, "checkpoint_every = -1: expected at least 0"),
    ],
)
def test_a_broken_suite_is_refused_by_key(places, message):
    with pytest.raises(InputError) as refused:
        read_suite(changed(**places))
    assert str(refused.value).startswith(message)


def test_unequal_trials_have_to_be_asked_for():
    places = {"optimizers__0__learning_rates": [0.1], "search__equal_trials": False}
    assert total_steps(read_suite(changed(**places)))[0] == (2 + 4) * 2


def test_files(tmp_path):
    with pytest.raises(InputError, match=r"suite = 'nanno': expected one of fashion, long, nano, .* or a \.toml file"):
        load_suite("nanno")
    with pytest.raises(InputError, match=r"none\.toml cannot be read: No such file"):
        load_suite(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(InputError, match=r"broken\.toml is no TOML: "):
        load_suite(tmp_path / "broken.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(InputError, match=r"suite .*empty\.toml: name is missing"):
        load_suite(tmp_path / "empty.toml")


def test_data_and_weights_are_beside_the_suite(tmp_path):
    (tmp_path / "mine.celo2").touch()
    (tmp_path / "suite.toml").write_text(
        'name = "s"\n[[tasks]]\nname = "language_model"\nsteps = 5\ndata = "text.txt"\n'
        "[search]\nlearning_rates = [1]\n"
        '[[optimizers]]\npreset = "celo2_ortho"\nweights = "mine.celo2"\n'
        '[[optimizers]]\npreset = "celo2_base"\nweights = "celo2_base"\n'
    )
    suite = load_suite(tmp_path / "suite.toml")
    assert suite.tasks[0].data == tmp_path / "text.txt"
    assert [optimizer.weights for optimizer in suite.optimizers] == [str(tmp_path / "mine.celo2"), "celo2_base"]


def test_selection_by_hand():
    """Means over the seeds of the selection are 2.0, 1.9, infinite, 1.9: the earlier one of the two best."""
    (grid, other) = grids(read_suite(GOOD))
    assert [(t.learning_rate, t.weight_decay) for t in grid] == [(0.1, 0.0), (0.1, 1.0), (0.2, 0.0), (0.2, 1.0)]
    losses = [(1.0, 3.0), (1.9, 1.9), (0.1, math.inf), (1.8, 2.0)]
    final = {Run(t, seed): loss[seed] for t, loss in zip(grid, losses, strict=True) for seed in (0, 1)}
    assert best_trial(grid, (0, 1), final) == grid[1]
    assert best_trial(grid, (0,), final) == grid[2]
    assert best_trial(other, (0, 1), final) is None  # not run yet
    assert best_trial(grid[2:3], (0, 1), final) is None  # nothing to choose


def test_only_the_best_trial_runs_on_the_seeds_of_the_report():
    suite = read_suite(changed(search__report_seeds=[7, 8, 9]))
    assert total_steps(suite) == (2 * (4 * 2 + 3), 22 * 40)
    sgd, adamw = grids(suite)
    searched = [Run(trial, seed) for trial in sgd + adamw for seed in (0, 1)]
    assert plan(suite, {}) == searched
    final = {Run(trial, seed): 5.0 - (trial == sgd[3]) for trial in sgd for seed in (0, 1)}
    winners = [Run(sgd[3], seed) for seed in (7, 8, 9)]
    assert plan(suite, final) == searched[:8] + winners + searched[8:]
    assert plan(suite, dict.fromkeys(searched[:8], math.inf)) == searched
    assert plan(suite, final, only="*sgd") == searched[:8] + winners
    assert plan(suite, {}, only="adamw") == searched[8:]
