"""Training runs in folders: what is written, and resuming to the same numbers."""

import itertools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo2_harness.blocks import guard_updates
from celo2_harness.lab.errors import InputError
from celo2_harness.lab.training.checkpoints import read_checkpoint
from celo2_harness.lab.training.loop import evaluate
from celo2_harness.lab.training.optimizers import AverageTail, OptimizerSpec, preset_spec, with_average_tail
from celo2_harness.lab.training.train import TrainConfig, parameter_rms, train

CONFIG = TrainConfig(steps=20, seed=1, eval_every=7, log_every=2, checkpoint_every=6)
TIMES = ("seconds", "tokens_per_second", "step_milliseconds")


def spec(tx, **settings):
    return OptimizerSpec("test", tx, lambda step: 0.01 * step, {"learning_rate": 0.01, **settings})


ADAMW = spec(optax.adamw(1e-2))


def run(task, folder, config=CONFIG, optimizer=ADAMW, **arguments):
    return train(task, optimizer, config, folder, **arguments)


def numbers(folder):
    """The metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def stop_after(steps):
    calls = itertools.count()
    return lambda: next(calls) >= steps


def final_arrays(folder):
    return read_checkpoint(max((folder / "checkpoints").iterdir()))[1]


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    result = run(task, folder)
    assert (result.status, result.step) == ("finished", 20) and result.validation_loss < 5
    return folder


def test_a_run_writes_a_header_metrics_a_picture_and_checkpoints(task, finished):
    header, *body = numbers(finished)
    assert header["settings"]["run"] == {"steps": 20, "seed": 1, "eval_every": 7, "log_every": 2}
    assert header["settings"]["optimizer"] == {"learning_rate": 0.01}
    held_out = [line for line in body if "validation_loss" in line]
    assert [line["step"] for line in held_out] == [0, 7, 14, 20] and all(line["parameter_rms"] > 0 for line in held_out)
    assert [line["step"] for line in body if "loss" in line] == [2, 4, 6, 7, 8, 10, 12, 14, 16, 18, 20]
    # The learning rate is that of the step before the line, and the larger of two losses is no smaller than their mean.
    assert all(line["learning_rate"] == 0.01 * (line["step"] - 1) for line in body if "loss" in line)
    assert all(line["largest_loss"] >= line["loss"] for line in body if "loss" in line)
    assert body[0]["state_bytes"] == 2 * body[0]["parameter_bytes"] + 4  # Two moments and a count.
    assert body[0]["parameter_rms"] == float(parameter_rms(task.init(jax.random.key(1))))
    assert body[-1] == {"kind": "end", "step": 20, "status": "finished"}
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_training_loss_is_the_mean_since_the_line_before(task, finished, tmp_path):
    run(task, tmp_path, config=TrainConfig(steps=20, seed=1, eval_every=7, log_every=1, checkpoint_every=0))
    each = {line["step"]: line["loss"] for line in numbers(tmp_path)[1:] if "loss" in line}
    lines = [line for line in numbers(finished)[1:] if "loss" in line]
    for before, line in itertools.pairwise(lines):
        losses = [each[step] for step in range(before["step"] + 1, line["step"] + 1)]
        assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-6) and line["largest_loss"] == max(losses)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("stop", [3, 6, 14])
def test_a_resumed_run_reaches_the_same_numbers(task, finished, tmp_path, stop):
    result = run(task, tmp_path, should_stop=stop_after(stop))
    assert (result.status, result.step) == ("interrupted", stop)
    started = []
    assert run(task, tmp_path, resume=True, on_start=started.append).status == "finished"
    assert started == [stop] and numbers(tmp_path)[1:] == numbers(finished)[1:]
    jax.tree.map(np.testing.assert_array_equal, final_arrays(tmp_path), final_arrays(finished))


def test_the_average_of_the_last_parameters_is_evaluated_and_resumed(task, finished, tmp_path):
    """The steps are those of a run without; the average is that of the parameters after step 14."""
    averaged = with_average_tail(ADAMW, 20, AverageTail(start=0.7, horizon=1.0, weight=1.0))
    seen = []
    keep = lambda now: seen.append(jax.tree.map(np.array, now.state[0]))
    run(task, tmp_path / "whole", optimizer=averaged, on_progress=keep)
    header, *body = numbers(tmp_path / "whole")
    assert header["settings"]["optimizer"]["average_tail"] == {"start": 0.7, "horizon": 1.0, "weight": 1.0}
    plain = numbers(finished)[1:]
    assert [line.get("loss") for line in body] == [line.get("loss") for line in plain]
    held_out = [[line["validation_loss"] for line in lines if "validation_loss" in line] for lines in (body, plain)]
    assert held_out[0][:3] == held_out[1][:3]  # until step 14 there is nothing to average
    mean = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *seen[-6:])
    wanted = float(evaluate(task, mean, jnp.asarray(task.validation())))
    assert held_out[0][3] == pytest.approx(wanted, rel=1e-5) and held_out[0][3] != held_out[1][3]
    run(task, tmp_path / "part", optimizer=averaged, should_stop=stop_after(16))
    assert run(task, tmp_path / "part", optimizer=averaged, resume=True).status == "finished"
    assert numbers(tmp_path / "part")[1:] == body
    with pytest.raises(InputError, match="optimizer.average_tail is .* there and absent here"):
        run(task, tmp_path / "part", resume=True)


def test_a_killed_run_goes_back_to_its_checkpoint(task, finished, tmp_path):
    def kill(progress):
        if progress.step == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(task, tmp_path, on_progress=kill)
    started = []
    assert run(task, tmp_path, resume=True, on_start=started.append).status == "finished"
    assert started == [6] and numbers(tmp_path)[1:] == numbers(finished)[1:]


def test_a_finished_run_stays_as_it_is(task, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        run(task, finished)
    assert run(task, finished, resume=True).step == 20
    with pytest.raises(InputError, match="optimizer.speed is absent there and 3 here"):
        run(task, finished, resume=True, optimizer=spec(optax.adamw(1e-2), speed=3))
    with pytest.raises(InputError, match="run.steps is 20 there and 30 here"):
        run(task, finished, resume=True, config=TrainConfig(steps=30, seed=1, eval_every=7, log_every=2))
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_diverged_run_says_so(task, tmp_path):
    broken = spec(optax.stateless(lambda updates, params: jax.tree.map(lambda u: u * jnp.nan, updates)))
    result = run(task, tmp_path, optimizer=broken)
    assert result.status == "diverged" and math.isnan(result.validation_loss) and result.step == 7
    *_, bad, end = numbers(tmp_path)
    assert bad["validation_loss"] is None and (end["kind"], end["status"]) == ("end", "diverged")
    assert run(task, tmp_path, optimizer=broken, resume=True).status == "diverged"


def test_steps_on_which_a_guard_acted_are_counted(task, tmp_path):
    """Gradients that are NaN at the third of four steps: one step is skipped."""

    def fail_once(updates, state, params=None):
        return jax.tree.map(lambda u: jnp.where(state == 2, jnp.nan, u), updates), state + 1

    broken = optax.GradientTransformation(lambda params: jnp.zeros([], int), fail_once)
    config = TrainConfig(steps=4, eval_every=4, checkpoint_every=0)
    run(task, tmp_path, config=config, optimizer=spec(optax.chain(broken, guard_updates(optax.sgd(0.1)))))
    assert [line["guarded_steps"] for line in numbers(tmp_path) if "guarded_steps" in line] == [0, 1]


@pytest.mark.parametrize("change", [{"steps": 0}, {"eval_every": 0}, {"seed": -1}, {"checkpoint_every": -1}])
def test_wrong_configs_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(InputError, match=f"^{name} = {value}: expected "):
        TrainConfig(**{"steps": 1} | change)


@pytest.mark.parametrize("schedule", ["warmup_cosine", "constant"])
def test_the_schedule_that_is_written_down_is_the_one_that_is_used(schedule):
    """Gradients of ones under SGD-like AdamW: the first steps of a scalar are the learning rate itself."""
    optimizer = preset_spec("adamw", 0.5, total_steps=8, schedule=schedule, warmup=4)
    params = {"kernel": jnp.zeros((2, 2))}
    state = optimizer.tx.init(params)
    for step in range(8):
        updates, state = optimizer.tx.update({"kernel": jnp.ones((2, 2))}, state, params)
        np.testing.assert_allclose(-updates["kernel"], optimizer.schedule(step), rtol=1e-5, atol=1e-7)


def test_settings_tell_weights_by_their_numbers():
    default = preset_spec("celo2_ortho", total_steps=8)
    base = preset_spec("celo2_ortho", 0.1, total_steps=8, weights="celo2_base", state_dtype="bfloat16")
    assert default.settings["weights"] == "celo2" and base.settings["weights"] == "celo2_base"
    assert default.settings["weights_sha256"] != base.settings["weights_sha256"]
    assert base.settings["options"] == {"state_dtype": "bfloat16"} and base.settings["learning_rate"] == 0.1
    with pytest.raises(InputError, match="weights = 'celo2': preset adamw has no learned rule"):
        preset_spec("adamw", total_steps=8, weights="celo2")


def test_a_run_of_several_steps_per_call_is_resumed_to_the_same_numbers(task, tmp_path, monkeypatch):
    """As on an accelerator; checkpoints are written at the first chance after they are due."""
    module = sys.modules[train.__module__]
    monkeypatch.setattr(module, "steps_per_call", lambda *intervals: 4)
    monkeypatch.setattr(module, "share_of_peak", lambda flops, seconds: 0.4)
    config = TrainConfig(steps=22, eval_every=8, log_every=4, checkpoint_every=5)
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(task, whole, config=config).step == 22
    stopped = run(task, part, config=config, should_stop=stop_after(2))
    assert stopped.status == "interrupted" and stopped.step % 4 == 0
    assert run(task, part, config=config, resume=True).status == "finished"
    without = lambda folder: [{k: v for k, v in line.items() if k != "share_of_peak"} for line in numbers(folder)[1:]]
    assert without(whole) == without(part)
    np.testing.assert_equal(final_arrays(whole), final_arrays(part))
    assert '"share_of_peak": 0.4' in (whole / "metrics.jsonl").read_text()
