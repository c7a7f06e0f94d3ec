"""The `celo2` command: what is refused and how, and one run from the first step to the last."""

import dataclasses
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import random_velo

from celo2_harness import harness
from celo2_harness.lab.cli import compare
from celo2_harness.lab.cli.main import COMMANDS, main
from celo2_harness.lab.suites import read_records

# The smallest run there is: eight bytes of context, and evaluations only where they must be.
SMALL = ["--context", "8", "--batch", "2", "--eval-every", "1000"]


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    from celo2_harness.lab.tasks import MODELS, GPTConfig

    monkeypatch.setitem(MODELS, "nano", GPTConfig(width=16, layers=1, heads=2, context=64))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("short")
    (tmp_path / "sub").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("train --text {}/none", "text: there is no file {}/none"),
        ("train --text {}/sub", "text: {}/sub is a folder"),
        ("train --text {}/empty", "text: {}/empty is empty"),
        ("train --text {}/short", "text: {}/short has 5 bytes"),
        ("train --model huge", "model = 'huge'"),
        ("train --dtype int8", "dtype = 'int8'"),
        ("train --batch 0", "batch = 0"),
        ("train --context 0", "context = 0"),
        ("train --seed -1", "seed = -1"),
        ("train --eval-every 0", "eval_every = 0"),
        ("train --resume", "resume: {}/out holds no run"),
        ("train --out {}/empty/out", "out: cannot write to {}/empty/out"),
        ("train --mesh data=x", "mesh = 'data=x'"),
        ("compare --preset adamw adam", "preset = 'adam'"),
        ("compare --preset adamw adamw", "optimizers: two of them are called 'adamw'"),
        ("compare --learning-rate 1e-3 0", "learning_rates = [0.001, 0.0]"),
        ("compare --learning-rate 1 1", "learning_rates = [1.0, 1.0]"),
        ("compare --preset adamw muon --weights celo2", "weights = 'celo2': none of the presets has a learned rule"),
        ("compare --seed 1 1", "selection_seeds = [1, 1]"),
        ("compare --steps 0", "steps = 0"),
        ("compare --out {}/empty/out", "out: cannot write to {}/empty/out"),
        ("data prepare {}/none", "data = '{}/none'"),
        ("data", "there is no command 'data'"),
        ("reinforce --game pong", "game = 'pong'"),
        ("reinforce --game catch --steps 0", "steps = 0"),
        ("reinforce --game catch --hidden 0", "hidden = 0"),
        ("reinforce --resume", "resume: {}/out holds no run"),
        ("unknown", "there is no command 'unknown'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(folder, capsys, options, named):
    words = [word.format(folder) for word in options.split()]
    preset = [] if "--preset" in words or words[0] not in ("train", "compare") else ["--preset", "adamw"]
    out = [] if "--out" in words or len(words) == 1 else ["--out", str(folder / "out")]
    assert main([*words, *preset, *out]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("celo2: error: " + named.format(folder))
    assert printed.err.count("\n") == 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"preset": "adam"},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"schedule": "none"},
        {"warmup": -1.0},
        {"weight_decay": -1.0},
        {"weights": "celo2"},
    ],
)
def test_the_command_line_answers_as_build_and_describe(folder, capsys, change):
    arguments = {"preset": "adamw", "learning_rate": 0.1} | change
    with pytest.raises(ValueError) as refused:
        harness.build(total_steps=500, **arguments)
    ((name, value),) = change.items()
    words = [f"--{name.replace('_', '-')}", str(value)]
    preset = [] if name == "preset" else ["--preset", "adamw"]
    assert main(["train", *preset, *words, "--out", str(folder / "out")]) == 2
    assert capsys.readouterr().err == f"celo2: error: {' '.join(str(refused.value).split())}\n"
    assert not (folder / "out").exists()
    if name in ("preset", "weights", "weight_decay"):
        assert main(["describe", *preset, *words]) == 2
        assert capsys.readouterr().err == f"celo2: error: {' '.join(str(refused.value).split())}\n"


def test_words_that_are_no_options_have_status_2(capsys):
    assert main(["train", "--steps", "many"]) == 2
    assert main(["train", "--nonsense"]) == 2
    assert main(["reinforce", "--minibatches", "3"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "compare"])
def test_every_option_is_explained(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(importlib.import_module(COMMANDS[command].module).Config):
        assert f"--{field.name.replace('_', '-')}" in text


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize("package", ["matplotlib", "rich"])
def test_a_missing_extra_is_one_line(package, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    assert main(["train"]) == 2
    error = capsys.readouterr().err
    assert error == f"celo2: error: train needs {package}: pip install 'celo2-harness[cli,train]'\n"


def test_the_package_imports_without_the_extras():
    code = (
        "import sys, celo2_harness, celo2_harness.harness, celo2_harness.lab.suites, celo2_harness.lab.cli\n"
        "assert not {'tyro', 'orbax', 'matplotlib'} & set(sys.modules), set(sys.modules)"  # flax imports rich
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_and_help_import_neither_flax_nor_what_trains():
    code = (
        "import sys\nfrom celo2_harness.lab.cli.main import main\n"
        "assert main(['--version']) == main(['--help']) == 0\n"
        "lab = {name for name in sys.modules if name.startswith('celo2_harness.lab.')}\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('flax', 'rich', 'tyro')]\n"
        "assert lab == {'celo2_harness.lab.' + name for name in ('cli', 'cli.main', 'errors')}, lab\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_train_writes_a_run_and_knows_its_settings_when_resumed(folder, capsys):
    out = str(folder / "out")
    assert main(["train", *SMALL, "--preset", "adamw", "--steps", "4", "--seed", "5", "--out", out]) == 0
    printed = capsys.readouterr()
    assert "final held-out loss: 5." in printed.out and f"curve: {out}/curve.png" in printed.out
    assert "step 4/4" in printed.out and not printed.err
    assert main(["train", *SMALL, "--preset", "adamw", "--steps", "4", "--out", out]) == 2
    assert "holds a run already; add --resume" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", out]) == 0  # no other option needs repeating
    assert main(["train", "--resume", "--out", out, "--steps", "4", "--seed", "5"]) == 0
    for option, value, difference in [
        ("--steps", "9", "optimizer.total_steps is 4 there and 9 here"),
        ("--model", "small", "model.width is 16 there and 384 here"),
        ("--seed", "0", "run.seed is 5 there and 0 here"),  # the default, but said aloud
    ]:
        capsys.readouterr()
        assert main(["train", "--resume", "--out", out, option, value]) == 2
        assert difference in capsys.readouterr().err


@pytest.mark.slow
def test_the_average_is_evaluated_when_asked(folder, capsys):
    words = [*SMALL, "--preset", "adamw", "--steps", "4", "--average-tail", "--out"]
    assert main(["train", *words, str(folder / "train")]) == 0
    assert "final held-out loss of the average: 5." in capsys.readouterr().out
    assert main(["train", "--resume", "--out", str(folder / "train")]) == 0
    assert main(["compare", *words, str(folder / "compare")]) == 0
    (record,) = read_records([folder / "compare"])
    assert record.settings["optimizer"]["average_tail"] == {"start": 0.7, "horizon": 0.05, "weight": 0.6}


def test_data_prepare(folder, capsys):
    pytest.importorskip("sklearn")
    assert main(["data", "prepare", "digits", "--out", str(folder / "out")]) == 0
    assert capsys.readouterr().out == f"{folder}/out/digits_8x8.npz: 1,797 train\n"


def test_compare_prints_a_table_and_does_not_repeat_runs(folder, capsys):
    words = ["compare", *SMALL, "--preset", "adamw", "--steps", "3", "--out", str(folder / "out")]
    words += ["--learning-rate", "1e-3", "1e-2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("adamw "))
    assert "5." in row and row.split()[-6:-4] == ["0.1", "2"]  # Weight decay and trials.
    assert main(words) == 0
    assert "compare: 2 of 2 runs are done" in capsys.readouterr().out
    records = read_records([folder / "out"])
    assert [record.learning_rate for record in records] == [0.001, 0.01]
    assert (folder / "out" / "compare.png").exists()


def test_compare_runs_presets_at_their_own_rates_and_weights():
    suite = compare._suite(compare.Config(preset=("celo2_base", "adamw"), weights="celo2"))
    rates = {name: (preset.learning_rate,) for name, preset in harness.presets().items()}
    assert [(o.weights, o.learning_rates) for o in suite.optimizers] == [
        ("celo2", rates["celo2_base"]),
        (None, rates["adamw"]),
    ]


def start_and_signal(words, number, line):
    """Runs `celo2` in a process of its own and sends it a signal when it has printed a line."""
    code = (
        "import sys\nfrom celo2_harness.lab.cli.main import main\n"
        "from celo2_harness.lab.tasks import MODELS, GPTConfig\n"
        "MODELS['nano'] = GPTConfig(width=16, layers=1, heads=2, context=64); sys.exit(main())"
    )
    command = [sys.executable, "-u", "-c", code, *words]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        printed = next((printed for printed in process.stdout if line in printed), None)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert printed, error
    return process.returncode, error


@pytest.mark.slow
def test_a_signal_saves_and_the_run_goes_on_later(folder):
    out = folder / "out"
    # Far more steps than there is time for, so that the signal always comes in the middle.
    words = ["train", "--preset", "adamw", "--context", "8", "--batch", "2", "--steps", "1000000", "--eval-every", "5"]
    status, error = start_and_signal([*words, "--out", str(out)], signal.SIGINT, "step 5/1000000")
    assert status == 130
    saved = int(error.split()[3].rstrip(";"))
    assert error == f"saved at step {saved}; go on with: celo2 train --resume --out {out}\n"
    assert max(int(path.stem) for path in (out / "checkpoints").iterdir()) == saved >= 5
    status, error = start_and_signal(["train", "--resume", "--out", str(out)], signal.SIGTERM, f"from step {saved}")
    assert status == 130 and int(error.split()[3].rstrip(";")) > saved


@pytest.mark.slow
def test_an_agent_trains_resumes_and_is_drawn(tmp_path, capsys):
    small = ["--game", "catch", "--preset", "adamw", "--hidden", "16", "--environments", "4", "--rollout", "18"]
    assert main(["reinforce", *small, "--steps", "140", "--out", str(tmp_path / "a")]) == 0
    assert "last 16 episodes, 144 agent steps" in capsys.readouterr().out
    # With its own settings, and nothing left to do.
    assert main(["reinforce", "--resume", "--out", str(tmp_path / "a")]) == 0
    assert "last 16 episodes, 144 agent steps" in capsys.readouterr().out
    assert main(["reinforce", *small, "--steps", "140", "--out", str(tmp_path / "a")]) == 2
    assert "holds a run already" in capsys.readouterr().err
    kept = tmp_path / "kept.jsonl"
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report"), "--keep", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert "adamw, learning rate 0.00025" in printed and "catch" in printed
    assert (tmp_path / "report" / "returns.png").read_bytes().startswith(b"\x89PNG")
    # The small form says the same.
    assert main(["report", str(kept), "--out", str(tmp_path / "again")]) == 0
    tables = printed.partition("kept: ")[0]
    assert "catch" in tables and capsys.readouterr().out.startswith(tables)


@pytest.mark.slow
def test_training_by_a_velo_is_resumed(tmp_path, capsys):
    """Interrupted and resumed, with weights from a file: the numbers of a run that was not."""
    from celo2_harness.velo import VELO_S, save_velo_weights

    weights, out = tmp_path / "velo_s.celo2", tmp_path / "run"
    save_velo_weights(weights, random_velo(VELO_S.lstm, VELO_S.bank))
    words = ["train", "--preset", "velo_s", *SMALL, "--steps", "4", "--log-every", "1", "--checkpoint-every", "2"]
    assert main([*words, "--out", str(out)]) == 2
    assert "preset velo_s: weights is missing" in capsys.readouterr().err
    words += ["--weights", str(weights)]
    assert main([*words, "--out", str(out)]) == 0
    lines = lambda: [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    numbers = lambda: [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines()[1:]]
    whole = numbers()
    (out / "checkpoints" / "00000004.checkpoint").unlink()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert numbers() == whole and len(whole) >= 4
