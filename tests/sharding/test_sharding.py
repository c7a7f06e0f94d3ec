"""Training on meshes: the numbers of one device, state where the parameters are, and few collectives."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import celo2_harness as c2
from celo2_harness import harness
from celo2_harness.lab.bench import MODEL_SHAPES, estimate_update
from celo2_harness.sharding import make_mesh, parameter_shardings

HERE = Path(__file__).parent
IN_EIGENBASIS = ("celo2", "modern_muon")
PRESETS = (*IN_EIGENBASIS, "celo2_ortho", "celo2_base", "celo2_muon", "muon", "adamw", "velo")
# The orthonormalisation of a basis may stop a pass earlier or later for another rounding.
EIGENBASIS = 1e-2


def start(program, *words):
    path = os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(HERE / program), *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output(process):
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    return text


@pytest.fixture(scope="module", params=[pytest.param(size, marks=pytest.mark.slow) for size in ("tiny", "published")])
def found(request, tmp_path_factory):
    """What one process on eight devices finds, with a rule of few features or the published one."""
    out = tmp_path_factory.mktemp(request.param) / "found.json"
    output(start("sharded_updates.py", out, 8, request.param))
    return json.loads(out.read_text()) | {"rule": request.param}


def on_mesh(found):
    return {name: result for name, result in found.items() if name.split()[0] in PRESETS}


def check_updates(found):
    results = on_mesh(found)
    assert {name.split()[0] for name in results} == set(PRESETS) and found["devices"] == 8
    for name, result in results.items():
        tolerance = EIGENBASIS if name.split()[0] in IN_EIGENBASIS else 1e-5
        assert result["error"] <= tolerance and result["state_error"] <= tolerance, (name, result)
        assert result["state_like_parameters"] and result["placed"] >= result["leaves"], (name, result)
        assert result["stays"] and result["compilations"] == 1, (name, result)


def test_updates_are_those_of_one_device_and_state_lies_like_the_parameters(found):
    check_updates(found)


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    files = [tmp_path / f"{k}.json" for k in range(2)]
    for process in [start("sharded_updates.py", file, 4, "tiny", address, k) for k, file in enumerate(files)]:
        output(process)
    for file in files:
        check_updates(json.loads(file.read_text()))


def test_modern_blocks(found):
    for name, result in found["blocks"].items():
        tolerance = EIGENBASIS if "eigenbasis" in name else 1e-5
        assert result["error"] <= tolerance and result["state_error"] <= tolerance, (name, result)
        assert result.get("everywhere", True), (name, result)
        counts = result["counts"]
        if name in ("mix_momenta", "look_ahead", "average_tail"):  # entry by entry
            assert not counts, (name, result)
        if name == "linear_direction":  # two means of each of eight matrices
            assert set(counts) == {"all-reduce"} and counts["all-reduce"] <= 2 * 8, (name, result)
            assert result["largest"] <= 9, (name, result)
        if name == "control_norm":  # three norms of each of eight matrices, and what of them goes over two mesh axes
            assert set(counts) == {"all-reduce"} and counts["all-reduce"] <= 4 * 8, (name, result)
            assert result["largest"] <= 9, (name, result)
        if "eigenbasis" in name:  # parts of matrices and squares are sent; no leaf of 384 or 1,024 entries is gathered
            # The published rule, acting in the basis, has means of more features than the small one.
            most = 9 if name == "in_eigenbasis" else 18 if found["rule"] == "published" else 14
            assert sum(counts.values()) <= most * result["leaves"], (name, result)
            assert result["largest"] <= 16 * 16, (name, result)


def test_statistics_take_a_few_thin_collectives_per_leaf(found):
    """No leaf is gathered: what is sent is thinner than the parts of the leaves that lie on a device."""
    results = on_mesh(found)
    # XLA sends the sums of VeLO one by one; in the eigenbasis matrices are turned, which needs parts of them.
    for name in ("velo", *IN_EIGENBASIS):
        del results[f"{name} ['data', 'fsdp', 'tensor']"]
    for name, result in results.items():
        counts = result["counts"]
        thin = sum(count for kind, count in counts.items() if kind != "all-to-all")
        # Ten leaves, eight of them matrices; over three mesh axes a sum takes up to two all-reduces.
        assert thin <= (4 if "fsdp'" in name and "tensor" not in name else 7) * result["leaves"], (name, counts)
        assert result["largest"] <= 120, (name, result)
    assert not found["adamw ['data', 'fsdp', 'tensor']"]["counts"]


def test_newton_schulz_communicates_before_and_after_and_never_between(found):
    cases = dict(found["orthogonalization"])
    by_xla, eager = cases.pop("by XLA"), cases.pop("eager")
    assert sum(by_xla["5"].values()) > 2 * sum(by_xla["2"].values())  # what this is for
    assert eager <= 1e-5
    for name, case in cases.items():
        two = case.pop("two")
        whole, parts = (case[key] for key in sorted(case, key=int, reverse=True))
        assert two == whole["counts"] and set(two) <= {"all-to-all", "all-gather"}, name
        for result in (whole, parts):
            assert result["error"] <= 1e-5, (name, result)
            assert [sum(result["counts"].values()), result["sent"]] == result["planned"], (name, result)
    assert cases["rows and columns"]["100"]["rounds"] == 2


def test_plans_are_what_a_compiled_update_takes(found):
    for preset, result in found["plans"].items():
        plan, estimate = result["plan"], result["estimate"]
        assert plan["total"] == pytest.approx(result["measured"], rel=0.1), preset
        assert (plan["parameters"], result["sent"]) == (estimate["parameters"], estimate["sent"]), preset
        if preset == "adamw" or found["rule"] == "published":  # the estimate is of the published rule's state
            assert plan["state"] == estimate["state"], preset
    assert found["plans"]["celo2_ortho"]["estimate"]["collectives"] == 8  # two for each of four shapes


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in ("loss", "validation_loss") if name in line]


def check_training(folder, steps, *weights):
    text = output(start("sharded_train.py", folder, steps, *weights))
    assert "parameters: P('fsdp',) P() P(None, 'fsdp')" in text and f"goes on from step {steps // 2}" in text
    assert "batch = 12: expected a multiple of 8" in text and not (folder / "odd").exists()
    one, mesh = losses(folder / "one"), losses(folder / "mesh")
    assert len(one) == steps + 2 and one[-1] < one[0] - 0.3
    assert mesh == pytest.approx(one, abs=1e-4)


@pytest.mark.slow
def test_training_on_a_mesh_and_resuming_on_another(tmp_path):
    from helpers import TINY

    c2.save_weights(tmp_path / "tiny.celo2", TINY)
    check_training(tmp_path, 6, tmp_path / "tiny.celo2")


@pytest.mark.slow
def test_a_hundred_steps_on_a_mesh(tmp_path):
    check_training(tmp_path, 100)


def test_the_longest_axis_that_divides_is_split():
    mesh = AbstractMesh((2, 4, 3), ("data", "fsdp", "tensor"))
    shapes = {"a": (6, 8), "b": (12, 9), "c": (5, 7), "d": (16,), "e": (4, 3, 24), "f": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    wanted = {
        "a": ("tensor", "fsdp"),
        "b": ("fsdp", "tensor"),
        "c": (),
        "d": (),
        "e": (None, "tensor", "fsdp"),
        "f": (),
    }
    assert {name: tuple(place.spec) for name, place in parameter_shardings(tree, mesh).items()} == wanted


SIDES = {"up": (64, 256), "square": (64, 64)}


def test_estimates_by_hand():
    """One matrix of 64 x 256 in four rows each: 16 KB a device, three momenta and a second moment as much again each,
    row moments (64 numbers, split no more) or column moments (256, split) three times."""
    shapes = {f"block_{i}": {"mlp": {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)}} for i in range(6)}
    got = estimate_update(harness.build("celo2_ortho"), shapes, {"data": 2, "fsdp": 4}, orthogonalized=True)
    part = 64 * 256 * 4 // 4
    assert got[:2] == (6 * part, 6 * part)
    assert got.state == 6 * (4 * part + 3 * 4 * (64 + 256 // 4)) + 4  # and AdamW's step count
    # Six matrices are padded to eight: two each after an all-to-all, which two devices with the same ones divide.
    assert (got.collectives, got.sent, got.matrices) == (3, 2 * 8 * part + 4 * part, 1)


def test_estimates_of_squares_by_hand():
    """Covariance and basis lie whole on every device, those of a square matrix too; the other state is divided."""
    shapes = {"mlp": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SIDES.items()}}
    got = estimate_update(harness.build("modern_muon"), shapes, {"fsdp": 4}, orthogonalized=True)
    part = (64 * 256 + 64 * 64) * 4 // 4
    momenta_and_second_moment, squares = 3 * part, 2 * 2 * 64 * 64 * 4
    assert got.state == momenta_and_second_moment + squares + 2 * 4 + 2 * 4  # counts: two of the blocks, two of AdamW


def test_estimates_of_flax_models():
    """A tree of nnx variables, whose attributes look like those of what they hold."""
    got = estimate_update(harness.build("celo2_ortho"), MODEL_SHAPES["nano"](), {"fsdp": 2}, orthogonalized=True)
    assert got.collectives == 2 * 4 and got.parameters < 2 * 0.9e6 + 1e5


def test_models_of_the_page_have_their_sizes():
    count = lambda name: sum(x.size for x in jax.tree.leaves(MODEL_SHAPES[name]()))
    assert count("gpt3-1.3b") == pytest.approx(1.316e9, rel=1e-3)
    assert count("llama-70b") == pytest.approx(68.98e9, rel=1e-3)


def test_wrong_meshes_and_shardings_are_named():
    with pytest.raises(ValueError, match="mesh axis 'model': expected one of data, fsdp, tensor"):
        make_mesh({"model": 1})
    with pytest.raises(ValueError, match="mesh of 1000 devices: there are .* CPU devices.*jax_num_cpu_devices"):
        make_mesh({"data": 500, "fsdp": 2})
    with pytest.raises(ValueError, match="fsdp = 0"):
        make_mesh({"fsdp": 0})
    params = {"w": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match="axes of the mesh are Explicit; expected Auto"):
        harness.build("adamw", sharding=jax.make_mesh((1,), ("fsdp",))).init(params)
    with pytest.raises(ValueError, match=r"sharding\['w'\] is P.*: expected a mesh"):
        harness.build("adamw", sharding={"w": PartitionSpec()}).init(params)
    two = AbstractMesh((2,), ("fsdp",))
    tx = c2.orthogonalize(sharding={"w": NamedSharding(two, PartitionSpec("fsdp"))})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\['w'\] of shape \(3, 4\): .* splits axis 0 over 2 devices"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"\['w'\]: its sharding is None"):
        c2.orthogonalize(sharding={}).update(params, None)
