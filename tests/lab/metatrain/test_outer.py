"""The outer loop: state, seeds, optimizers and schedules, several networks, other problems, several devices."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import META_CONFIG as CONFIG, assert_trees_close, assert_trees_equal

from celo2_harness.lab.metatrain import (
    MetaTrainConfig,
    TaskGroup,
    fitting_mesh,
    init_metatrain,
    metatrain_step,
    place_data,
    run_groups,
    task_mesh,
)
from celo2_harness.lab.metatrain.groups import tasks_gradient
from celo2_harness.lab.metatrain.outer import outer_optimizer


def test_initial_state():
    state = init_metatrain(CONFIG, 2)
    assert [x.shape for x in state.theta] == [(2, 2), (2,), (2, 2), (2,), (2, 3), (3,)]
    (tasks,) = state.tasks
    assert [x.shape for x in tasks.xi] == [(4, *x.shape) for x in state.theta]
    assert all(x.shape[:2] == (4, 2) for x in jax.tree.leaves(tasks.unrolls))
    assert not any(np.any(x) for x in tasks.xi) and not np.any(state.theta.b0)
    first, second = (jax.tree.map(lambda x: x[:, sign], tasks.unrolls) for sign in (0, 1))  # noqa: B023
    assert_trees_equal(first, second)
    kernels = tasks.unrolls.params[0].kernel[:, 0]
    assert len({float(x) for x in kernels[:, 0, 0]}) == 4  # each task has its own
    paper = jax.eval_shape(lambda: init_metatrain(MetaTrainConfig(), 4))
    assert sum(x.size for x in paper.theta) == 347 and paper.tasks[0].clock.step.shape == (32,)


@pytest.fixture(scope="module")
def run(inner_data):
    def run(config, steps=1, **options):
        state = init_metatrain(config, 2, **options)
        for _ in range(steps):
            state, metrics = metatrain_step(config, state, inner_data, **options)
        return state, metrics

    return run


def test_one_seed_one_theta(run):
    first, metrics = run(CONFIG, steps=3)
    assert int(first.iteration) == 3 and float(metrics.gradient_norm) > 0
    again, _ = run(CONFIG, steps=3)
    assert_trees_equal(again.theta, first.theta)
    assert np.any(np.asarray(first.theta.w0) != np.asarray(init_metatrain(CONFIG, 2).theta.w0))


@pytest.mark.slow
def test_any_optimizer_of_optax(run):
    """One step of plain descent moves theta by the gradient; the recipe's optimizer is AdamW."""
    theta = init_metatrain(CONFIG, 2).theta
    descent, metrics = run(CONFIG, optimizer=optax.sgd(1.0))
    gradient = jax.tree.map(jnp.subtract, theta, descent.theta)
    assert float(optax.tree.norm(gradient)) == pytest.approx(float(metrics.gradient_norm), rel=1e-4)
    wanted, _ = optax.adamw(1e-2, weight_decay=1e-4).update(gradient, optax.adamw(1e-2).init(theta), theta)
    state, _ = run(CONFIG)
    assert_trees_close(state.theta, jax.tree.map(jnp.add, theta, wanted), 1e-4)


def test_the_outer_schedule_reaches_the_optimizer():
    """AdamW's first steps have the size of the learning rate; of a hundred iterations two are warm-up."""
    theta = {"x": jnp.array([1.0, -1.0])}

    def step_sizes(schedule):
        config = MetaTrainConfig(
            outer_schedule=schedule, iterations=100, outer_learning_rate=2.0, outer_weight_decay=0.0
        )
        tx, sizes = outer_optimizer(config), []
        state = tx.init(theta)
        for _ in range(100):
            updates, state = tx.update(theta, state, theta)
            sizes.append(-float(updates["x"][0]))
        return sizes

    np.testing.assert_allclose(step_sizes("constant"), 2.0, rtol=1e-4)
    sizes = step_sizes("cosine")
    assert sizes[0] == 0 and sizes[1:3] == pytest.approx([1.0, 2.0], rel=1e-4)
    assert sizes[51] == pytest.approx(1.0, rel=1e-4) and 0 < sizes[99] < 1e-2


@pytest.mark.slow
def test_several_networks(run):
    config = dataclasses.replace(CONFIG, widths=("64-10", "64-3-10"))
    state, metrics = run(config)
    assert [len(tasks.unrolls.params) for tasks in state.tasks] == [1, 2]
    assert metrics.tasks.meta_loss.shape == (2,) and np.all(np.isfinite(metrics.tasks.meta_loss))
    assert float(metrics.gradient_norm) > 0
    # The first network's tasks have the randomness that they would have alone.
    alone, _ = run(CONFIG)
    for which, task in enumerate((0, 2)):
        mine, theirs = (
            jax.tree.map(lambda x, place=place: x[place], tasks.clock)
            for tasks, place in ((state.tasks[0], which), (alone.tasks[0], task))
        )
        assert_trees_equal(mine, theirs)


@pytest.mark.slow
def test_whole_unrolls_leave_no_state(run):
    """The other estimators, and their meta-losses, are judged where they are."""
    state, metrics = run(dataclasses.replace(CONFIG, estimator="full", meta_loss="last"))
    assert float(metrics.gradient_norm) > 0 and np.all(np.isfinite(metrics.tasks.meta_loss))
    assert state.tasks == (None,)


@dataclasses.dataclass(frozen=True)
class Valley:
    """x <- theta; the loss is the squared distance of theta to the centre of the data set. No network anywhere."""

    loss_bound: float = 100.0

    def fresh(self, key):
        return jnp.zeros(2)

    def sample(self, data, which, key):
        return data[which]

    def step(self, theta, state, clock, data, batch):
        return theta["x"], jnp.sum(jnp.square(theta["x"] - batch))


def test_other_problems():
    """Any problem and any theta: meta-training finds the mean of two centres."""
    centres = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    groups = (TaskGroup(Valley(), tuple(range(8)), (0, 1) * 4),)
    options = {"groups": groups, "optimizer": optax.adam(0.1)}
    state = init_metatrain(CONFIG, 2, theta={"x": jnp.zeros(2)}, **options)
    for _ in range(100):
        state, metrics = metatrain_step(CONFIG, state, centres, **options)
    np.testing.assert_allclose(state.theta["x"], [0.5, 1.0], atol=0.1)
    np.testing.assert_allclose(metrics.tasks.meta_loss, [1.25, 1.25], atol=0.4)


def test_tasks_that_cannot_be_spread():
    """Of one device given three times: four tasks go to two of them, and three are refused."""
    mesh = task_mesh(jax.devices()[:1] * 3)
    fitting = fitting_mesh(mesh, run_groups(CONFIG, 2))
    assert fitting.size == 2 and fitting_mesh(fitting, run_groups(CONFIG, 2)) == fitting
    (group,) = run_groups(CONFIG, 2)
    with pytest.raises(ValueError, match="4 tasks of ImageProblem.* cannot be spread over 3 devices"):
        tasks_gradient(CONFIG, (group._replace(part=None),), None, (None,), None, jax.random.key(0), mesh)


@pytest.mark.slow
def test_a_mesh_of_one_device(run, inner_data):
    mesh = task_mesh()
    state = init_metatrain(CONFIG, 2, mesh=mesh)
    state, _ = metatrain_step(CONFIG, state, place_data(inner_data, mesh), mesh=mesh)
    assert_trees_close(state.theta, run(CONFIG)[0].theta, 1e-5)


def start(out, devices, *distributed):
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parents[2] / "src"), str(tests.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(tests / "spread.py"), str(out), str(devices), *distributed]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(*processes):
    """What the processes wrote, as dicts."""
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    files = [np.load(process.args[2]) for process in processes]
    return [{name: file[name] for name in file.files} for file in files]


def assert_same(got, wanted):
    for name, value in wanted.items():
        if name != "devices":
            np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_devices_and_processes_do_not_change_the_result(tmp_path):
    """One device, eight, and two processes with four each."""
    one, eight = results(start(tmp_path / "one.npz", 1), start(tmp_path / "eight.npz", 8))
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert_same(eight, one)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    pair = results(*(start(tmp_path / f"{k}.npz", 4, address, str(k)) for k in range(2)))
    for result in pair:
        assert result["devices"] == 8
        assert_same(result, one)
