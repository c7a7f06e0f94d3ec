"""Runs in folders: what is written, and resuming to the same numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo2_harness.lab.suites import Checkpoints, InputError, TrainConfig, init_state, train
from celo2_harness.lab.tasks import GPTConfig, LanguageModel

CONFIG = TrainConfig(steps=20, seed=1, eval_every=7, log_every=2, checkpoint_every=6)
SETTINGS = {"model": {"width": 16}}
TX = optax.adamw(1e-2)


def run(task, folder, config=CONFIG, tx=TX, settings=SETTINGS, **arguments):
    return train(task, tx, config, folder, settings=settings, learning_rate=lambda step: 0.01, **arguments)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder):
    """The metrics without what depends on the clock."""
    timings = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timings} for line in lines(folder)]


def stop_after(steps):
    calls = iter(range(10**6))
    return lambda: next(calls) >= steps


def final_state(task, folder):
    header = lines(folder)[0]
    checkpoints = Checkpoints(folder / "checkpoints")
    state = checkpoints.restore(checkpoints.steps()[-1], init_state(task, TX, 0), header["settings"])
    checkpoints.close()
    return state


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert run(task, folder).status == "finished"
    return folder


def test_a_run_writes_a_header_metrics_a_picture_and_checkpoints(finished):
    header, *body = lines(finished)
    assert header["settings"]["run"] == {"steps": 20, "seed": 1, "eval_every": 7, "log_every": 2}
    assert {"python", "jax", "jaxlib", "optax", "flax", "celo2_harness"} <= set(header["versions"])
    assert header["device"]
    assert [line["step"] for line in body if line["kind"] == "validation"] == [0, 7, 14, 20]
    assert [line["step"] for line in body if line["kind"] == "train"] == list(range(2, 21, 2))
    assert all(line["learning_rate"] == 0.01 for line in body if line["kind"] == "train")
    assert body[-1]["kind"] == "end" and body[-1]["status"] == "finished"
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(int(path.name) for path in (finished / "checkpoints").iterdir()) == [12, 18, 20]


@pytest.mark.parametrize("stop", [3, 6, 14])
def test_a_resumed_run_reaches_the_same_numbers(task, finished, tmp_path, stop):
    result = run(task, tmp_path, should_stop=stop_after(stop))
    assert (result.status, result.step) == ("interrupted", stop)
    assert run(task, tmp_path, resume=True).status == "finished"
    assert numbers(tmp_path)[1:] == numbers(finished)[1:]
    jax.tree.map(np.testing.assert_array_equal, final_state(task, tmp_path), final_state(task, finished))


def test_a_killed_run_goes_back_to_its_checkpoint(task, finished, tmp_path):
    class Killed(Exception):
        pass

    def kill(progress):
        if progress.state.step == 11:
            raise Killed

    with pytest.raises(Killed):
        run(task, tmp_path, on_progress=kill)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # cut short by the kill
    starts = []
    assert run(task, tmp_path, resume=True, on_start=starts.append).status == "finished"
    assert starts == [6]
    assert numbers(tmp_path)[1:] == numbers(finished)[1:]


def test_a_run_killed_before_its_first_checkpoint_starts_again(task, finished, tmp_path):
    run(task, tmp_path, should_stop=stop_after(3))
    for path in sorted((tmp_path / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert run(task, tmp_path, resume=True).status == "finished"
    assert numbers(tmp_path)[1:] == numbers(finished)[1:]


def test_a_finished_run_stays_as_it_is(task, finished):
    before = snapshot(finished)
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        run(task, finished)
    assert run(task, finished, resume=True).step == 20
    assert snapshot(finished) == before


def test_a_run_with_other_settings_is_refused(task, finished):
    before = snapshot(finished)
    with pytest.raises(InputError, match="model.width is 16 there and 32 here"):
        run(task, finished, resume=True, settings={"model": {"width": 32}})
    with pytest.raises(InputError, match="run.steps is 20 there and 30 here"):
        run(task, finished, resume=True, config=TrainConfig(steps=30, seed=1, eval_every=7, log_every=2))
    assert snapshot(finished) == before


def test_a_checkpoint_of_another_model_is_refused_leaf_by_leaf(task, tmp_path):
    run(task, tmp_path, should_stop=stop_after(3))
    before = snapshot(tmp_path)
    wider = LanguageModel(GPTConfig(32, 1, 2, context=8), task.data, task.batch_size)
    with pytest.raises(InputError, match=r"checkpoint .*/3 is of another run: .* is float32\[16, 16\] there and"):
        run(wider, tmp_path, resume=True)
    with pytest.raises(InputError, match=r"is absent there|and absent here"):
        run(task, tmp_path, resume=True, tx=optax.sgd(1e-2))
    assert snapshot(tmp_path) == before


def cut_short(path):
    path.write_bytes(path.read_bytes()[:10])


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, change_a_byte, lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_named_whatever_the_damage(task, tmp_path, damage, capfd):
    run(task, tmp_path, should_stop=stop_after(3))
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        damage(path)
        if path.exists() or path.name != "celo2-files.json":
            with pytest.raises(InputError, match=r"checkpoint .*/checkpoints/3 cannot be read .*; remove it"):
                run(task, tmp_path, resume=True)
        path.write_bytes(content)
    assert not capfd.readouterr().err
    assert run(task, tmp_path, resume=True, should_stop=lambda: True).step == 4


def test_a_folder_without_a_run_cannot_be_resumed(task, tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        run(task, tmp_path, resume=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="does not start with the header"):
        run(task, tmp_path, resume=True)


def test_a_diverged_run_says_so(task, tmp_path):
    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: jnp.where(state < 4, u, jnp.nan), updates), state + 1

    broken = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    result = run(task, tmp_path, tx=broken)
    assert result.status == "diverged"
    *_, bad, end = lines(tmp_path)
    assert bad["loss"] is None and bad["step"] == 6
    assert (end["kind"], end["status"]) == ("end", "diverged")
    assert run(task, tmp_path, tx=broken, resume=True).status == "diverged"


@pytest.mark.parametrize("change", [{"steps": 0}, {"eval_every": 0}, {"seed": -1}, {"checkpoint_every": 0}])
def test_wrong_configs_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(InputError, match=f"^{name} = {value}: expected "):
        TrainConfig(**{"steps": 1} | change)
