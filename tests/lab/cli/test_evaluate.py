"""`celo2 evaluate` and `celo2 report`: a kill, several processes, optimizers of all kinds, what is refused."""

import dataclasses
import os
import signal
import subprocess
import sys

import jax
import pytest

from celo2_harness.lab.cli.main import main
from celo2_harness.lab.suites.record import read_file

MODULE = '''
"""An optimizer that writes down its steps, and once sends its process a signal."""

import os
from pathlib import Path

import jax
import optax

HERE = Path(__file__).parent


def make(learning_rate, weight_decay, total_steps, number=0):
    inner = optax.chain(optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate))

    def note(count):
        with (HERE / "steps").open("a") as file:
            file.write(f"{int(count)}\\n")
        if int(count) == total_steps - 3 and not (HERE / "killed").exists():
            (HERE / "killed").touch()
            os.kill(os.getpid(), number)

    def update(updates, state, params=None):
        count, inner_state = state
        if number:
            jax.debug.callback(note, count)
        updates, inner_state = inner.update(updates, inner_state, params)
        return updates, (count + 1, inner_state)

    return optax.GradientTransformation(lambda params: (jax.numpy.zeros([], int), inner.init(params)), update)


def nothing(learning_rate, weight_decay, total_steps):
    return None
'''
SUITE = """
name = "short"
checkpoint_every = 4
[[tasks]]
name = "language_model"
size = "tiny"
batch = 2
steps = 12
eval_every = 6
[search]
learning_rates = [0.1]
weight_decays = [0.1]
selection_seeds = [0, 1]
"""
PLAIN = '[[optimizers]]\nmake = "an_optimizer:make"\nlabel = "first"\n'
DEADLY = '[[optimizers]]\nmake = "an_optimizer:make"\nlabel = "second"\noptions = {number = 9}\n'
LAST = '[[optimizers]]\noptax = "lion"\nguard = {}\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "an_optimizer.py").write_text(MODULE)
    (tmp_path / "suite.toml").write_text(SUITE + PLAIN + DEADLY + LAST)
    yield tmp_path
    sys.modules.pop("an_optimizer", None)


def records(folder):
    return read_file(folder / "runs.jsonl")


def without_times(record):
    return dataclasses.replace(record, step_milliseconds=None, seconds=None)


@pytest.mark.slow
def test_a_killed_suite_goes_on_and_neither_repeats_nor_loses_a_run(folder, capsys):
    words = [sys.executable, "-m", "celo2_harness.lab.cli.main", "evaluate", "suite.toml", "--out", "out"]
    killed = subprocess.run(words, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = records(folder / "out")
    assert [(record.name, record.seed) for record in before] == [("first", 0), ("first", 1)]
    assert (folder / "steps").read_text().split() == [*map(str, range(10))]
    assert main(["evaluate", "suite.toml", "--out", "out"]) == 0
    after = records(folder / "out")
    assert after[:2] == before
    runs = [(record.name, record.seed, record.status) for record in after]
    assert runs == [(name, seed, "finished") for name in ("first", "second", "lion") for seed in (0, 1)]
    # The checkpoint of step 8 was the last one: the killed run was not begun again.
    assert (folder / "steps").read_text().split()[10:] == [*map(str, range(8, 12)), *map(str, range(12))]
    assert not list((folder / "out" / "unfinished").iterdir())
    # The numbers are those of a run that was never killed: the first optimizer is the same one.
    for alive, killed in zip(after[:2], after[2:4], strict=True):
        assert alive.validation == killed.validation and alive.training == killed.training
    assert main(["evaluate", "suite.toml", "--out", "out"]) == 0
    assert records(folder / "out") == after and "6 of 6 runs are done" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_suite_is_saved_and_goes_on(folder, capsys):
    (folder / "suite.toml").write_text(SUITE + DEADLY.replace("number = 9", f"number = {int(signal.SIGINT)}"))
    assert main(["evaluate", "suite.toml", "--out", "out"]) == 130
    jax.effects_barrier()
    assert "interrupted; the same command goes on from there" in capsys.readouterr().err
    assert main(["evaluate", "suite.toml", "--out", "out"]) == 0
    jax.effects_barrier()
    assert [record.seed for record in records(folder / "out")] == [0, 1]
    # No step was taken twice, although no checkpoint was due where it was stopped.
    assert (folder / "steps").read_text().split() == 2 * [*map(str, range(12))]


@pytest.mark.slow
def test_several_processes_share_the_runs(folder):
    text = SUITE.replace("checkpoint_every = 4", "").replace("[0, 1]", "[0, 1, 2]") + PLAIN
    (folder / "suite.toml").write_text(text)
    assert main(["evaluate", "suite.toml", "--out", "out", "--processes", "2"]) == 0
    lines = records(folder / "out")
    assert sorted(line.seed for line in lines) == [0, 1, 2]  # each once, whoever did it
    assert main(["evaluate", "suite.toml", "--out", "alone"]) == 0
    alone = {line.seed: without_times(line) for line in records(folder / "alone")}
    assert {line.seed: without_times(line) for line in lines} == alone


@pytest.mark.slow
def test_from_a_suite_to_a_page(folder, capsys):
    pytest.importorskip("matplotlib")
    text = SUITE.replace("eval_every = 6", "eval_every = 3")
    text = text.replace("checkpoint_every = 4", 'baseline = "adamw"\nreference = "sgd"') + (
        '[[optimizers]]\npreset = "adamw"\n[[optimizers]]\noptax = "sgd"\n'
    )
    (folder / "suite.toml").write_text(text)
    (folder / "text.txt").write_text("abracadabra, " * 100)
    options = ["--data", "language_model=text.txt", "--only", "sgd"]
    assert main(["evaluate", "suite.toml", "--out", "out", *options]) == 0
    assert len(records(folder / "out")) == 2
    more = [
        "--data",
        "language_model tiny=text.txt",
        "--data",
        "language_model=none.txt",
        "--optimizer",
        "an_optimizer:make",
    ]
    assert main(["evaluate", "suite.toml", "--out", "out", *more]) == 0
    lines = records(folder / "out")
    assert [line.name for line in lines] == ["sgd"] * 2 + ["adamw"] * 2 + ["an_optimizer:make"] * 2
    assert {line.settings["text"]["bytes"] for line in lines} == {1300}
    assert lines[2].settings["optimizer"]["preset"] == "adamw" and lines[2].parameter_rms
    capsys.readouterr()
    (folder / "page.md").write_text("<!-- report: language_model tiny -->\n<!-- end of report -->\n")
    assert main(["report", "out", "--out", "report", "--markdown", "page.md", "--keep", "kept.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert "minus sgd, paired" in printed and "page: report/report.html" in printed
    names = {path.name for path in (folder / "report").iterdir()}
    pictures = {f"language-model-tiny-12-{kind}.png" for kind in ("curves", "training", "parameters")}
    assert names == {"report.html"} | pictures
    page, tables = (folder / "report" / "report.html").read_text(), (folder / "page.md").read_text()
    assert page.count("data:image/png;base64,") == 3 and 'src="' in page and "an_optimizer:make" in page
    # Nothing but the file is needed: the same tables come from it, elsewhere.
    os.rename("kept.jsonl", "report/elsewhere.jsonl")
    (folder / "page.md").write_text("<!-- report: * -->\n<!-- end of report -->\n")
    assert main(["report", "report/elsewhere.jsonl", "--out", "again", "--markdown", "page.md"]) == 0
    assert (folder / "page.md").read_text() == tables.replace("report: language_model tiny", "report: *")


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ('preset = "adam"', "preset = 'adam': expected one of "),
        ('preset = "adamw"\noptions = {speed = 3}', "adamw: options.speed: there is none; expected some of "),
        ('preset = "celo2_ortho"\nweights = "none.celo2"', "none.celo2: cannot be read (No such file "),
        ('preset = "adamw"\nweights = "celo2"', "weights = 'celo2': preset adamw has no learned rule"),
        ('preset = "adamw"\nguard = {spike_factor = 0.5}', "guard_updates: spike_factor = 0.5, expected "),
        ('optax = "adam"', "optax = 'adam': expected one of adamw, "),
        ('optax = "sgd"\noptions = {speed = 3}', "optax = 'sgd' with options {'speed': 3}: "),
        ('make = "an_optimizer"', "make = 'an_optimizer': expected an import path such as "),
        ('make = "no_module:make"', "make = 'no_module:make': No module named 'no_module'; the module must be "),
        ('make = "an_optimizer:other"', "make = 'an_optimizer:other': module 'an_optimizer' has no attribute 'other'"),
        ('make = "an_optimizer:nothing"', "make = 'an_optimizer:nothing' returned a NoneType: expected an optax."),
        ('make = "an_optimizer:make"\noptions = {x = 1}', "make = 'an_optimizer:make' refuses its arguments: "),
    ],
)
def test_a_wrong_optimizer_is_refused_before_anything_runs(folder, capsys, optimizer, message):
    (folder / "suite.toml").write_text(SUITE + f'[[optimizers]]\noptax = "lion"\n[[optimizers]]\n{optimizer}\n')
    assert main(["evaluate", "suite.toml", "--out", "out"]) == 2
    assert capsys.readouterr().err.startswith("celo2: error: " + message)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate nanno", "suite = 'nanno': expected one of fashion, long, nano, "),
        ("evaluate smoke --processes 0", "processes = 0: expected at least 1"),
        ("evaluate smoke --data text.txt", "data = 'text.txt': expected NAME=PATH"),
        ("evaluate smoke --data lm=text.txt", "data: there is no task 'lm'; expected some of language_model tiny, "),
        ("evaluate smoke --data language_model=none", "text: there is no file none"),
        ("evaluate smoke --only muon", "only = 'muon': expected a part of language_model tiny/adamw, "),
        ("evaluate smoke --optimizer an_optimizer:make", "optimizers have different numbers of trials"),
        ("report none", "none: there is no such folder or file"),
        ("report .", ". holds no results; expected runs.jsonl, "),
    ],
)
def test_wrong_input_is_one_line_and_status_2(folder, capsys, words, message):
    if "optimizer" in words:
        words = words.replace("smoke", "unequal.toml")
        (folder / "unequal.toml").write_text(SUITE + '[[optimizers]]\noptax = "sgd"\nlearning_rates = [0.1, 0.2]\n')
    assert main([*words.split(), *(["--out", "out"] if words.startswith("evaluate") else [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("celo2: error: ") and message in error and error.count("\n") == 1
    assert not (folder / "out").exists()


def test_the_leaves_that_decay_are_those_that_presets_call_hidden():
    from celo2_harness.lab.suites.optimizers import _is_hidden
    from celo2_harness.lab.tasks import make_task
    from celo2_harness.routing import label_params

    params = jax.eval_shape(make_task("language_model", "tiny").init, jax.random.key(0))
    labels = jax.tree.leaves(label_params(params))
    assert jax.tree.leaves(_is_hidden(params)) == [label == "hidden" for label in labels]
    assert labels.count("hidden") == 4  # of one block: attention in and out, MLP up and down


def test_records_tell_weights_by_their_numbers(folder):
    from celo2_harness import load_weights, save_weights
    from celo2_harness.lab.suites import load_suite, make_spec

    weights = load_weights("celo2")
    (folder / "sub").mkdir()
    save_weights(folder / "sub" / "weights.celo2", weights)
    changed = weights.theta._replace(b2=weights.theta.b2 + 1)
    save_weights(folder / "weights.celo2", dataclasses.replace(weights, theta=changed))
    text = '[[optimizers]]\npreset = "celo2_ortho"\nlabel = "{0}"\n{1}'
    sources = ("", 'weights = "sub/weights.celo2"', 'weights = "weights.celo2"')
    optimizers = "\n".join(text.format(*pair) for pair in enumerate(sources))
    (folder / "suite.toml").write_text(f'{SUITE}{optimizers}\n[[optimizers]]\npreset = "muon"\nguard = {{}}\n')
    suite = load_suite("suite.toml")
    default, same, other, muon = (make_spec(suite, o, 0.1, 0.2, 12).settings for o in suite.optimizers)
    assert default["weights"] == "celo2" and same["weights"] == other["weights"] == "weights.celo2"
    assert default["weights_sha256"] == same["weights_sha256"] != other["weights_sha256"]
    assert muon == {
        "preset": "muon", "learning_rate": 0.1, "weight_decay": 0.2, "total_steps": 12, "schedule": "warmup_cosine",
        "warmup": 0.05, "guard": {},
    }  # fmt: skip


@pytest.mark.slow
def test_records_tell_the_weights_of_a_velo(tmp_path):
    """A preset without weights of its own: two files are two optimizers."""
    from celo2_harness.lab.suites import load_suite, make_spec
    from celo2_harness.velo import VELO_S, VeloWeights, init_theta, save_velo_weights

    text = SUITE
    for seed in (0, 1):
        weights = VeloWeights(init_theta(VELO_S, jax.random.key(seed)), VELO_S)
        save_velo_weights(tmp_path / f"{seed}.velo", weights)
        text += f'[[optimizers]]\npreset = "velo_s"\nweights = "{seed}.velo"\nlabel = "{seed}"\n'
    (tmp_path / "suite.toml").write_text(text)
    suite = load_suite(tmp_path / "suite.toml")
    one, two = (make_spec(suite, optimizer, 1.0, 0.0, 12).settings for optimizer in suite.optimizers)
    assert one["weights"] == "0.velo" and one["weights_sha256"] != two["weights_sha256"]
