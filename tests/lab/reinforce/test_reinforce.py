"""Reinforcement-learning runs: PPO learns, folders resume."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.reinforce import (
    ActorCriticConfig,
    ConvolutionConfig,
    PPOConfig,
    ReinforceConfig,
    init_agent,
    make_environments,
    reinforce,
    train_agent,
)
from celo2_harness.lab.training.locks import lock_folder
from celo2_harness.lab.training.optimizers import OptimizerSpec

# One shape and one optimizer for nearly all tests: compiling takes longer than running.
PPO = PPOConfig(environments=8, rollout=32, clip=0.2)
NETWORK = ActorCriticConfig((10, 5, 1), 3, (), hidden=32)
TX = optax.adamw(3e-3)
SPEC = OptimizerSpec("adamw", TX, lambda step: 3e-3, {"preset": "adamw", "learning_rate": 3e-3})
CONFIG = ReinforceConfig(steps=5 * 256, seed=1, checkpoint_every=2)


def run(folder, config=CONFIG, spec=SPEC, ppo=PPO, **arguments):
    return reinforce(make_environments("catch", 8), NETWORK, ppo, spec, config, folder, **arguments)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder):
    """The metrics without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "steps_per_second")} for line in lines(folder)]


def stop_after(updates):
    calls = iter(range(10**6))
    return lambda: next(calls) >= updates - 1


@pytest.mark.slow
def test_ppo_learns_to_catch():
    """Doing anything at random catches one ball in five, a return of -0.6; more than 9 in 10 caught is 0.8."""
    totals = []
    state = init_agent(NETWORK, TX, 0)
    for progress in train_agent(make_environments("catch", 8), NETWORK, PPO, TX, state, updates=80, seed=0):
        totals += [episode.total for episode in progress.episodes]
    assert len(totals) == 8 * (80 * 32 // 9)
    assert np.mean(totals[:200]) < -0.2
    assert np.mean(totals[-200:]) > 0.8


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder).status == "finished"
    return folder


def test_a_run_writes_a_header_episodes_updates_and_checkpoints(finished):
    header, *body = lines(finished)
    assert header["settings"]["environment"]["game"] == "catch"
    assert header["settings"]["ppo"]["clip"] == 0.2 and header["settings"]["run"] == {"steps": 1280, "seed": 1}
    assert {"python", "jax", "optax"} <= set(header["versions"])
    updates = [line for line in body if line["kind"] == "update"]
    assert [line["step"] for line in updates] == [256, 512, 768, 1024, 1280]
    assert "steps_per_second" not in updates[0] and updates[1]["steps_per_second"] > 0
    episodes = [line for line in body if line["kind"] == "episode"]
    # Nine steps each, in eight copies at once.
    assert [line["step"] for line in episodes] == [72 * (i // 8 + 1) for i in range(1280 // 72 * 8)]
    assert {line["return"] for line in episodes} == {-1.0, 1.0} and {line["length"] for line in episodes} == {9}
    assert body[-1] == {"kind": "end", "step": 1280, "status": "finished", "seconds": body[-1]["seconds"]}
    assert updates[0]["learning_rate"] == 3e-3
    assert sorted(int(path.stem) for path in (finished / "checkpoints").iterdir()) == [1024, 1280]


def test_runs_with_one_seed_have_the_same_numbers(finished, tmp_path):
    result = run(tmp_path)
    assert numbers(tmp_path)[1:] == numbers(finished)[1:]
    returns = [line["return"] for line in lines(tmp_path) if line["kind"] == "episode"][-100:]
    assert (result.score, result.episodes) == (pytest.approx(np.mean(returns)), 100)


def test_a_stopped_run_goes_on_with_new_games(finished, tmp_path):
    result = run(tmp_path, should_stop=stop_after(3))
    assert (result.status, result.step) == ("interrupted", 768)
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        run(tmp_path)
    before = numbers(tmp_path)
    starts = []
    assert run(tmp_path, resume=True, on_start=starts.append).status == "finished"
    assert starts == [768]
    after = numbers(tmp_path)
    assert after[: len(before)] == before
    # Until then the numbers were those of the other run.
    assert before[1:] == numbers(finished)[1 : len(before)]
    updates = [line for line in after if line["kind"] == "update"]
    assert [line["step"] for line in updates] == [256, 512, 768, 1024, 1280]
    # What was under way is lost: the next episodes end nine steps after the start.
    assert [line["step"] for line in after if line["kind"] == "episode" and line["step"] > 768][0] == 768 + 72


def test_a_killed_run_goes_back_to_its_checkpoint(tmp_path):
    class Killed(BaseException):
        pass

    def kill(progress):
        if progress.step == 3 * 256:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, on_progress=kill)
    starts = []
    assert run(tmp_path, resume=True, on_start=starts.append).status == "finished"
    assert starts == [512]
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "update"] == [256, 512, 768, 1024, 1280]


def test_other_settings_and_a_second_process_are_refused(finished, tmp_path):
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="optimizer.preset is adamw there and muon here"):
        run(finished, resume=True, spec=SPEC._replace(settings={"preset": "muon"}))
    with pytest.raises(InputError, match="ppo.clip is 0.2 there and 0.3 here"):
        run(finished, resume=True, ppo=PPOConfig(environments=8, rollout=32, clip=0.3))
    with lock_folder(finished), pytest.raises(InputError, match="another process works in this folder"):
        run(finished, resume=True)
    assert run(finished, resume=True).step == 1280  # there is nothing left to do
    assert (finished / "metrics.jsonl").read_bytes() == before
    with pytest.raises(InputError, match="holds no run"):
        run(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_diverged_run_says_so(tmp_path):
    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: jnp.where(state < 20, 0 * u, jnp.nan), updates), state + 1

    broken = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    result = run(tmp_path, spec=SPEC._replace(tx=broken))
    assert (result.status, result.step) == ("diverged", 512)  # sixteen optimizer steps are an update
    *_, bad, end = lines(tmp_path)
    assert bad["loss"] is None and end["status"] == "diverged"
    assert run(tmp_path, spec=SPEC._replace(tx=broken), resume=True).status == "diverged"


def test_optimizers_get_the_loss_and_clipped_gradients():
    """An optimizer that puts what it sees into its state: the norm of the gradient, and `value`."""

    def update(updates, state, params=None, *, value, **extra):
        del state, params, extra
        return jax.tree.map(jnp.zeros_like, updates), jnp.stack([optax.tree.norm(updates), value])

    probe = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(2), update)
    ppo = PPOConfig(environments=8, rollout=32, clip=0.2, max_gradient_norm=1e-3, epochs=1, minibatches=1)
    (progress,) = train_agent(
        make_environments("catch", 8), NETWORK, ppo, probe, init_agent(NETWORK, probe, 0), updates=1, seed=0
    )
    norm, value = map(float, progress.state.opt_state)
    assert norm == pytest.approx(1e-3, rel=1e-4)
    assert value == pytest.approx(float(progress.losses.loss), rel=1e-6)


@pytest.mark.parametrize("change", [{"steps": 0}, {"seed": -1}, {"checkpoint_every": 0}])
def test_wrong_configs_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(InputError, match=f"^{name} = {value}: expected "):
        ReinforceConfig(**{"steps": 1} | change)


@pytest.mark.slow
def test_an_update_on_a_real_game(tmp_path):
    pytest.importorskip("ale_py.vector_env", reason="the extra atari (ale-py and gymnasium) is not installed")
    ppo = PPOConfig(environments=2, rollout=4, epochs=1, minibatches=2)
    network = ActorCriticConfig((84, 84, 4), 3, (ConvolutionConfig(2, 8, 8),), hidden=4)
    environments = make_environments("freeway", 2)
    result = reinforce(environments, network, ppo, SPEC, ReinforceConfig(8), tmp_path)
    environments.close()
    assert (result.status, result.step, result.score) == ("finished", 8, None)
    (update,) = [line for line in lines(tmp_path) if line["kind"] == "update"]
    assert update["entropy"] == pytest.approx(np.log(3), abs=1e-2)
    assert [path.stem for path in (tmp_path / "checkpoints").iterdir()] == ["00000008"]
