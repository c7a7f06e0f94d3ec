"""`celo2 metatrain`: a run from the first option to the selected weights, interruptions, and what is refused."""

import dataclasses
import importlib.util
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tyro
from helpers import META_IMAGES, META_LABELS, TINY, assert_trees_equal

import celo2_harness as c2
from celo2_harness.lab.cli import metatrain
from celo2_harness.lab.cli.main import main
from celo2_harness.lab.metatrain import MetaTrainConfig
from celo2_harness.lab.training.locks import lock_folder

# As META_CONFIG, so that compiled programs are shared with other files.
OPTIONS = """
    --variant base --features gradient momentum --momentum-decays 0.9 --factored-decays 0.9 --hidden 2 --widths 64-10
    --batch 4 --tasks-per-set 2 --truncation 5 --shortest-unroll 5 --longest-unroll 20 --iterations 3
    --outer-learning-rate 1e-2 --log-every 1
"""
SMALL = OPTIONS.split()


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    from celo2_harness.lab.tasks import MODELS, GPTConfig

    monkeypatch.setitem(MODELS, "nano", GPTConfig(width=16, layers=1, heads=2, context=8))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, part in (("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
        np.savez(folder / f"{name}_8x8.npz", train_images=META_IMAGES[part], train_labels=META_LABELS[part])
    return str(folder)


@pytest.mark.slow
def test_from_options_to_selected_weights(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    words = ["metatrain", "--data", data, *SMALL, "--out", str(out)]
    (tmp_path / "text").write_text("abracadabra, " * 50)
    words += ["--eval-every", "2", "--eval-steps", "2", "--text", str(tmp_path / "text")]
    # Ctrl-C comes after the first iteration.
    update = metatrain.Display.update
    interrupt = lambda self, now: (update(self, now), signal.raise_signal(signal.SIGINT) if now.step == 1 else None)
    monkeypatch.setattr(metatrain.Display, "update", interrupt)
    assert main(words) == 130
    printed = capsys.readouterr()
    assert printed.err == f"saved; go on with: celo2 metatrain --resume --out {out}\n"
    assert "metatrain: step 0/3  score 5." in printed.out
    assert (out / "meta-loss.png").exists() and not (out / "weights.celo2").exists()

    # No option needs repeating.
    monkeypatch.setattr(metatrain.Display, "update", update)
    assert main(["metatrain", "--resume", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("metatrain: goes on from step 1\n") and "step 3/3  even 2." in printed.out
    assert f"weights: {out}/weights.celo2\npicture: {out}/meta-loss.png\n" in printed.out and not printed.err
    header, *lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["kind"] == "evaluation"]
    assert [record["step"] for record in records] == [0, 2, 3]
    assert header["settings"]["evaluation"]["preset"] == "celo2_base"
    assert header["settings"]["config"]["widths"] == ["64-10"]

    assert main(["metatrain", "select", str(out)]) == 0
    best = min(records, key=lambda record: record["score"])
    expected = f"iteration {best['step']}: score {best['score']:.4f}, the best of 3\nweights: {out}/weights.celo2\n"
    assert capsys.readouterr().out == expected
    chosen = c2.load_weights(out / "weights.celo2")
    assert_trees_equal(chosen.theta, c2.load_weights(out / best["snapshot"]).theta)
    assert f"theta of iteration {best['step']} of 3" in (out / "weights.md").read_text()


@pytest.mark.slow
def test_the_score_is_that_of_a_training_run():
    """The same as training with the package's own loop, by hand."""
    from celo2_harness import harness
    from celo2_harness.lab.metatrain.language_score import language_evaluation
    from celo2_harness.lab.tasks import make_language_model
    from celo2_harness.lab.training import loop

    stopped = False
    evaluation = language_evaluation(
        MetaTrainConfig(), every=1, steps=3, learning_rates=(1e-2, 1e-3), should_stop=lambda: stopped
    )
    weights = TINY  # compiles soon
    task = make_language_model("nano", None, 16)
    losses = []
    for rate in (1e-2, 1e-3):
        tx = harness.build(preset="celo2_ortho", weights=weights, learning_rate=rate, total_steps=3, weight_decay=0.1)
        *_, last = loop.train_steps(task, tx, loop.init_state(task, tx, 0), steps=3, seed=0, eval_every=3)
        losses.append(last.validation_loss)
    assert losses[0] != losses[1] and evaluation.score(weights) == min(losses)
    stopped = True
    with pytest.raises(KeyboardInterrupt):
        evaluation.score(weights)


def test_the_score_is_that_of_the_stack_that_the_rule_is_for():
    from celo2_harness.lab.metatrain.language_score import language_evaluation

    for eigenbasis, preset in ((False, "celo2_ortho"), (True, "celo2")):
        assert language_evaluation(MetaTrainConfig(eigenbasis=eigenbasis), every=1).settings["preset"] == preset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data {}/none", "data = '{}/none': there is no such folder or file."),
        ("--data {}/bad", "{}/bad/bad_8x8.npz: train_labels must be integers from 0 to 9; 1 of 2 are not"),
        ("--sets mnist", "data = '{}/images': found sets ['even', 'odd'], missing ['mnist']"),
        ("--resume", "resume: {}/out holds no run"),
        ("--start-from {}/none", "{}/none: cannot be read"),
        ("--devices -1", "devices = -1: expected 0 for all, or a number"),
        ("--devices 99", "devices = 99: JAX has 1 of the platform cpu"),
        ("--log-every 0", "log_every = 0: expected at least 1"),
        ("--out {}/bad/bad_8x8.npz/out", "out: cannot write to {}/bad/bad_8x8.npz/out"),
        ("--eval-every 1 --eval-model huge", "model = 'huge': expected one of "),
        ("--eval-every 1 --text {}/none", "text: there is no file {}/none"),
        ("--eval-every 1 --eval-learning-rates 0", "eval_learning_rates = (0.0,): expected numbers above 0"),
        ("select {}/images", "resume: {}/images holds no run"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(options, message, data, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    np.savez(tmp_path / "bad" / "bad_8x8.npz", train_images=META_IMAGES[:2], train_labels=np.array([0, 10]))
    words = [word.format(tmp_path) for word in options.split()]
    more = ["--data", data] * ("--data" not in words) + ["--out", str(tmp_path / "out")] * ("--out" not in words)
    assert main(["metatrain", *words, *(more if words[0] != "select" else [])]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("celo2: error: " + message.format(tmp_path))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_two_processes_in_one_folder(data, tmp_path, capsys):
    with lock_folder(tmp_path):
        assert main(["metatrain", "--data", data, *SMALL, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"celo2: error: out = '{tmp_path}': another process works in this folder (process ")


def test_a_recipe_that_cannot_be(capsys):
    assert main(["metatrain", "--truncation", "200"]) == 2  # told in the form of the option parser
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "truncation = 200, expected 1 to shortest_unroll = 100" in error and "Traceback" not in error


def test_every_field_of_the_recipe_is_an_option(capsys):
    assert main(["metatrain", "--help"]) == 0
    text = capsys.readouterr().out
    names = [field.name for kind in (MetaTrainConfig, c2.RuleConfig) for field in dataclasses.fields(kind)]
    names.remove("rule")  # its fields are options
    assert [name for name in names if f"--{name.replace('_', '-')} " not in text] == []


def test_several_networks_and_rates(capsys):
    parse = lambda words: tyro.cli(metatrain.Config, args=words.split()).config
    assert parse("").networks == ((64, 32, 10),)
    assert parse("--widths 64-32-10 64-10").networks == ((64, 32, 10), (64, 10))
    assert parse("--inner-learning-rates 1e-4 1e-2").inner_learning_rates == (1e-4, 1e-2)
    assert main(["metatrain", "--widths", "64-32-10", "10"]) == 2
    assert "widths = 10: expected layers from 64 inputs" in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_takes_as_many_devices(data, tmp_path):
    """Their number is in the bits, and the machine may have got more cores, or fewer."""
    assert main(["metatrain", "--data", data, *SMALL, "--iterations", "1", "--out", str(tmp_path)]) == 0
    config = metatrain.defaults(metatrain.Config(out=tmp_path, resume=True))
    assert config.devices == 1 and config.config.iterations == 1 and config.sets == ("even", "odd")


# Commands of the page that are not run, and why.
NOT_RUN = {
    "celo2 data prepare /usr/share/datasets/fashion-mnist --out images": "needs a package of Debian",
}
# What makes the others small; the last of two equal options holds.
SHRUNK = {
    "celo2 metatrain select": "",
    "celo2 metatrain": f"{OPTIONS} --outer-schedule constant --eval-steps 2 --eval-learning-rates 1e-3 --text-batch 2",
    "celo2 compare": "--steps 2 --learning-rates 1e-3 --seeds 0",
    "python benchmarks/reproduce_weights.py": "",
}


@pytest.mark.slow
def test_shell_examples_of_the_page(data, tmp_path, monkeypatch):
    """Every command in a block of the page on meta-training does its work at a small size, in the order of the page."""
    root = Path(__file__).parents[3]
    blocks = re.findall(
        r"^```sh\n(.*?)^```", (root / "docs" / "research" / "meta-training.md").read_text(), re.MULTILINE | re.DOTALL
    )
    commands = [line for block in blocks for line in block.splitlines()]
    assert set(NOT_RUN) <= set(commands)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("abracadabra, " * 50)
    spec = importlib.util.spec_from_file_location("reproduce", root / "benchmarks" / "reproduce_weights.py")
    reproduce = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reproduce)
    for command in commands:
        if command in NOT_RUN:
            continue
        name = next(name for name in SHRUNK if command.startswith(name))
        words = [*command.replace("FOLDER", data).split(), *SHRUNK[name].split()]
        if name == "celo2 metatrain":  # several examples call their folder the same
            out = words[words.index("--out") + 1] if "--out" in words else "runs/metatrain"
            shutil.rmtree(out, ignore_errors=True)
        if words[0] == "python":
            monkeypatch.setattr("sys.argv", words[1:])
            assert reproduce.main() == 0, command
        else:
            assert main(words[1:]) == 0, command


def test_the_rule_is_a_word_about_the_variant(capsys):
    assert metatrain._recipe(metatrain.Config(rule="velo_s")) == MetaTrainConfig(variant="velo_s")
    assert metatrain._recipe(metatrain.Config(rule="celo2")) == MetaTrainConfig()
    assert main(["metatrain", "--rule", "celo2", "--variant", "velo_s"]) == 2
    assert "rule = celo2, but the variant is velo_s" in capsys.readouterr().err
