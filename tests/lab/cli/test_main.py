"""The `celo2` command: what is refused and how, and one run from the first step to the last."""

import dataclasses
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import random_velo

from celo2_harness.lab.cli import compare
from celo2_harness.lab.cli.main import COMMANDS, main

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
    ("options", "message"),
    [
        ("train --text {}/none", "text: there is no file {}/none"),
        ("train --text {}/sub", "text: {}/sub is a folder"),
        ("train --text {}/empty", "text: {}/empty is empty"),
        ("train --text {}/short", "text: {}/short has 5 bytes, but a context of 64 needs at least 650"),
        ("train --preset adam", "preset = 'adam': expected one of "),
        ("train --model huge", "model = 'huge': expected one of nano, "),
        ("train --dtype int8", "dtype = 'int8': expected one of float32, bfloat16"),
        ("train --learning-rate 0", "learning_rate = 0.0: expected "),
        ("train --learning-rate -1", "learning_rate = -1.0: expected "),
        ("train --learning-rate nan", "learning_rate = nan: expected "),
        ("train --steps 0", "steps = 0: expected at least 1"),
        ("train --batch 0", "batch = 0: expected at least 1"),
        ("train --context 0", "context = 0: expected at least 1"),
        ("train --seed -1", "seed = -1: expected "),
        ("train --eval-every 0", "eval_every = 0: expected "),
        ("train --schedule none", "schedule = 'none': expected one of "),
        ("train --warmup -1", "warmup = -1.0: expected "),
        ("train --weight-decay -1", "weight_decay = -1.0: expected "),
        ("train --resume", "resume: {}/out holds no run"),
        ("train --out {}/empty/out", "out: cannot write to {}/empty/out: "),
        ("compare --preset adamw adam", "preset = 'adam': expected one of "),
        ("compare --preset adamw adamw", "preset = ['adamw', 'adamw']: expected "),
        ("compare --learning-rate 1e-3 0", "learning_rate = 0.0: expected "),
        ("compare --learning-rate 1 1", "learning_rate = [1.0, 1.0]: expected "),
        ("compare --preset adamw muon --weights celo2", "weights = 'celo2': none of the presets has a learned rule"),
        ("train --preset adamw --weights celo2", "weights = 'celo2': preset adamw has no learned rule; leave it out"),
        ("compare --seed 1 1", "seeds = [1, 1]: expected "),
        ("compare --out {}/empty/out", "out: cannot write to {}/empty/out: "),
        ("compare --text {}/none", "text: there is no file {}/none"),
        ("data prepare {}/none", "data = '{}/none': there is no such folder or file. Expected one of: 'digits'; "),
        ("data prepare {}/sub", "data = '{}/sub': it holds none of these"),
        (
            "data prepare {}/short",
            "{}/short: not an IDX file of images: it starts with 73 68 6f 72, ",
        ),
        ("data prepare digits --out {}/empty/out", "[Errno 20] Not a directory: '{}/empty/out'"),
        ("data", "there is no command 'data'; expected one of "),
        ("reinforce --game pong", "game = 'pong': expected one of asterix, "),
        ("reinforce --game catch --preset adam", "preset = 'adam': expected one of "),
        ("reinforce --game catch --learning-rate 0", "learning_rate = 0.0: expected "),
        ("reinforce --game catch --steps 0", "steps = 0: expected at least 1"),
        ("reinforce --game catch --hidden 0", "hidden = 0: expected at least 1"),
        ("reinforce --resume", "resume: {}/out holds no run"),
        ("unknown", "there is no command 'unknown'; expected one of "),
    ],
)
def test_wrong_input_is_one_line_and_status_2(folder, capsys, options, message):
    words = [word.format(folder) for word in options.split()]
    preset = [] if "--preset" in words or words[0] not in ("train", "compare") else ["--preset", "adamw"]
    out = [] if "--out" in words or len(words) == 1 else ["--out", str(folder / "out")]
    assert main([*words, *preset, *out]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("celo2: error: " + message.format(folder))
    assert printed.err.count("\n") == 1
    assert not (folder / "out").exists()


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


@pytest.mark.parametrize("package", ["orbax", "rich"])
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


def test_data_prepare(folder, capsys):
    pytest.importorskip("sklearn")
    assert main(["data", "prepare", "digits", "--out", str(folder / "out")]) == 0
    assert capsys.readouterr().out == f"{folder}/out/digits_8x8.npz: 1,797 train\n"


def test_compare_prints_a_table_and_does_not_repeat_runs(folder, capsys):
    words = ["compare", *SMALL, "--preset", "adamw", "--steps", "3", "--out", str(folder / "out")]
    words += ["--learning-rate", "1e-3", "1e-2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("adamw ") and "best of 2" in line)
    assert "5." in row and "KiB" in row
    assert main(words) == 0
    assert "2 of 2 runs were in" in capsys.readouterr().out
    lines = (folder / "out" / "compare.jsonl").read_text().splitlines()
    assert [json.loads(line)["learning_rate"] for line in lines] == [0.001, 0.01]
    assert (folder / "out" / "compare.png").exists()


def test_weights_of_compare_are_those_of_the_learned_rules():
    config = compare.Config(preset=("celo2_base", "adamw"), weights="celo2")
    assert [contender.settings["weights"] for contender in compare._contenders(config)] == ["celo2", None]


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


def test_a_signal_saves_and_the_run_goes_on_later(folder):
    out = folder / "out"
    # Far more steps than there is time for, so that the signal always comes in the middle.
    words = ["train", "--preset", "adamw", "--context", "8", "--batch", "2", "--steps", "1000000", "--eval-every", "5"]
    status, error = start_and_signal([*words, "--out", str(out)], signal.SIGINT, "step 5/1000000")
    assert status == 130
    saved = int(error.split()[3].rstrip(";"))
    assert error == f"saved at step {saved}; go on with: celo2 train --resume --out {out}\n"
    assert max(int(path.name) for path in (out / "checkpoints").iterdir()) == saved >= 5
    status, error = start_and_signal(["train", "--resume", "--out", str(out)], signal.SIGTERM, f"from step {saved}")
    assert status == 130 and int(error.split()[3].rstrip(";")) > saved


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
    shutil.rmtree(out / "checkpoints" / "4")
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert numbers() == whole and len(whole) >= 4
