"""Broken input of every kind. Each case draws some, gives it to the package, and says what came of it.

An error of the package's own is fine, and so is a right result; anything else raises out of the case.
`test_fuzz.py` runs some hundred of them, `benchmarks/fuzz.py` as many as one likes.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import LOSS, META_CONFIG, PRESETS, RANDOM, TINY, VELO_TINY, arguments, signature
from hypothesis import strategies as st

import celo2_harness as c2
from celo2_harness import harness
from celo2_harness.lab.cli.main import main
from celo2_harness.lab.errors import InputError
from celo2_harness.lab.metatrain import RunError, checkpoints, load_portable, read_evaluations, saved_run
from celo2_harness.lab.metatrain.outer import init_metatrain
from celo2_harness.lab.metatrain.run import _iteration
from celo2_harness.lab.suites import load_suite, make_spec, read_records
from celo2_harness.lab.suites.report import report_sections
from celo2_harness.lab.training.checkpoints import read_checkpoint, write_checkpoint
from celo2_harness.lab.training.folder import open_run
from celo2_harness.lab.training.train import TrainResult
from celo2_harness.velo import load_velo_weights, save_velo_weights

# ------------------------------------------------------------------------------------------------------------ mutations


@st.composite
def mutations(draw, content: bytes) -> bytes:
    """Bytes with one to four faults: cut, changed, put in, left out, doubled, or swapped for others altogether."""
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("cut", "flip", "insert", "delete", "double", "bit", "other")))
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(1, 40))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip":
            content = content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at + 1 :]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(min_size=1, max_size=length)) + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + length :]
        elif kind == "double":
            content = content[: at + length] + content[at:]
        elif kind == "bit" and content:
            content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        elif kind == "other" and draw(st.integers(0, 9)) == 0:
            content = draw(st.binary(max_size=200))
    return content


NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, 10**30, 10**400, -(10**400)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
)
JSON = st.recursive(
    st.none() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ARRAYS = st.builds(
    lambda shape, dtype, value: np.full(shape, value).astype(dtype),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(["float32", "float64", "float16", "int32", "bool", "complex64", "uint8"]),
    st.sampled_from([0.0, 1.0, 0.5]),
)
PACKED = st.one_of(st.none(), st.integers(-(2**63), 2**63), st.floats(), st.text(max_size=8), st.binary(max_size=8))
PACKED = PACKED | st.lists(PACKED, max_size=3) | st.dictionaries(st.text(max_size=5), PACKED, max_size=3) | ARRAYS


@st.composite
def edits(draw, tree: Any, values: st.SearchStrategy) -> Any:
    """A nested record with one to three entries replaced, left out, doubled or renamed."""
    for _ in range(draw(st.integers(1, 3))):
        tree = _edit(draw, tree, values)
    return tree


def _edit(draw: Callable, tree: Any, values: st.SearchStrategy) -> Any:
    if isinstance(tree, (dict, list, tuple)) and len(tree) and draw(st.integers(0, 9)):
        is_table = isinstance(tree, dict)
        items = dict(tree) if is_table else dict(enumerate(tree))
        key = draw(st.sampled_from(sorted(items)))
        kind = draw(st.sampled_from(("inside", "inside", "inside", "leave out", "double", "rename")))
        if kind == "inside":
            items[key] = _edit(draw, items[key], values)
        elif kind == "leave out":
            del items[key]
        elif kind == "double":
            items[f"{key}2" if is_table else len(items)] = items[key]
        elif is_table:
            items[draw(st.text(max_size=6))] = items.pop(key)
        return items if is_table else list(items.values())
    return draw(values)


# -------------------------------------------------------------------------------------------------------------- weights

SHAPES = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": jax.ShapeDtypeStruct((2,), jnp.float32)}


@functools.cache
def weight_bytes(kind: str, layout: str, folder: Path) -> bytes:
    path = folder / "weights-of-the-case"
    if kind == "celo2":
        c2.save_weights(path, TINY if layout == "celo2-harness" else RANDOM, layout=layout)
    else:
        save_velo_weights(path, VELO_TINY, layout=layout)
    return path.read_bytes()


def load(kind: str, path: Path) -> Any:
    if kind == "celo2":
        return c2.load_weights(path)
    return load_velo_weights(path, published_as=VELO_TINY.config)


def equal(one: Any, other: Any) -> bool:
    leaves = zip(jax.tree.leaves(one.theta), jax.tree.leaves(other.theta), strict=True)
    same = all(np.shape(a) == np.shape(b) and np.array_equal(a, b) for a, b in leaves)
    return same and (one.config, dict(one.provenance)) == (other.config, dict(other.provenance))


def loads(kind: str, path: Path) -> Any:
    """The weights that a file holds, finite and fit to be used; None if it is refused."""
    try:
        weights = load(kind, path)
    except c2.WeightsError as error:
        assert str(path) in str(error)
        return None
    assert all(np.all(np.isfinite(x)) and x.dtype == np.float32 for x in jax.tree.leaves(weights.theta))
    return weights


def weight_file_bytes(data: Any, folder: Path) -> str:
    kind = data.draw(st.sampled_from(("celo2", "velo")))
    layout = data.draw(st.sampled_from(("celo2-harness", "published")))
    content = weight_bytes(kind, layout, folder)
    path = folder / "mutated.celo2"
    path.write_bytes(data.draw(mutations(content)))
    weights = loads(kind, path)
    if weights is None:
        return "refused"
    if layout == "celo2-harness":
        # It has a checksum: whatever loads is what was written.
        assert equal(weights, TINY if kind == "celo2" else VELO_TINY)
        return "harmless"
    return "other numbers, in a layout without a checksum"


def weight_file_structure(data: Any, folder: Path) -> str:
    """Whole files with wrong content, without a checksum, as anybody can write them."""
    kind = data.draw(st.sampled_from(("celo2", "velo")))
    tree = flax.serialization.msgpack_restore(weight_bytes(kind, "celo2-harness", folder))
    del tree["sha256"]
    if data.draw(st.booleans()):
        header = data.draw(edits(json.loads(tree["config"]), JSON))
        tree["config"] = json.dumps(header)
    else:
        tree = data.draw(edits(tree, PACKED))
    path = folder / "edited.celo2"
    try:
        path.write_bytes(flax.serialization.msgpack_serialize(tree))
    except Exception:  # nothing that a file could hold
        return "no file"
    weights = loads(kind, path)
    if weights is None:
        return "refused"
    if kind == "celo2":
        # What loads can be built with.
        tx = c2.scale_by_celo2(weights)
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), SHAPES)
    return "loaded"


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def pickles(data: Any, folder: Path) -> str:
    """Nothing that reads a file unpickles it."""
    ran = folder / "code-has-run"
    payload: Any = Opens(ran)
    for wrap in data.draw(st.lists(st.sampled_from(("list", "dict", "array")), max_size=3)):
        payload = {"list": [payload], "dict": {"theta": payload}}.get(wrap) or np.array([payload], object)
    protocol = data.draw(st.integers(0, pickle.HIGHEST_PROTOCOL))
    content = pickle.dumps(payload, protocol)
    shape = data.draw(st.sampled_from(("plain", "npy", "inside msgpack", "after the title")))
    if shape == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.array([payload], object), allow_pickle=True)
        content = buffer.getvalue()
    elif shape == "inside msgpack":
        content = flax.serialization.msgpack_serialize({"format": "celo2-harness weights", "theta": content})
    elif shape == "after the title":
        content = checkpoints._TITLE + content
    path = folder / "pickled"
    path.write_bytes(content)
    for read in (c2.load_weights, load_velo_weights, load_portable):
        with contextlib.suppress(c2.WeightsError, RunError):
            read(path)
            raise AssertionError("a pickle was loaded")
    assert not ran.exists()
    return "refused"


# ---------------------------------------------------------------------------------------------------------- run folders


@functools.cache
def meta_state():
    state = jax.tree.map(np.asarray, init_metatrain(META_CONFIG, 2))
    header = {"config": dataclasses.asdict(META_CONFIG), "sets": ["even", "odd"], "data_sha256": "0"}
    return state, jax.eval_shape(lambda: init_metatrain(META_CONFIG, 2)), header


@functools.cache
def meta_files(folder: Path) -> tuple[bytes, bytes]:
    """A checkpoint and the portable form of a run before its first iteration."""
    state, _, header = meta_state()
    checkpoints.save_state(folder / "meta-files", state, header)
    return tuple(
        (folder / "meta-files" / name).read_bytes() for name in ("checkpoints/00000000.msgpack", "portable.msgpack")
    )


def assert_same(got: Any, wanted: Any) -> None:
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(wanted)))


def metatrain_checkpoint(data: Any, folder: Path) -> str:
    """A damaged one is refused; whatever is read is what was written."""
    state, like, _ = meta_state()
    whole, portable = meta_files(folder)
    if data.draw(st.booleans()):
        path = folder / "mutated.msgpack"
        path.write_bytes(data.draw(mutations(portable)))
        try:
            saved = load_portable(path)
        except RunError as error:
            assert str(path) in str(error)
            return "refused"
        assert saved.config == META_CONFIG
        assert_same(saved.theta, state.theta)
        return "harmless"
    out = folder / "meta-run"
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    path = out / "checkpoints" / "00000000.msgpack"
    path.write_bytes(data.draw(mutations(whole)))
    warned: list[str] = []
    try:
        got, _ = checkpoints.restore_state(out, like, warned.append)
    except RunError:
        assert warned
        return "refused"
    assert_same(got, state)
    return "harmless"


def portable_structure(data: Any, folder: Path) -> str:
    """Whole files (with a right checksum) whose content is not that of a run."""
    _, like, header = meta_state()
    content = checkpoints._unpack(folder / "meta-files" / "portable.msgpack") if meta_files(folder) else {}
    if data.draw(st.booleans()):
        content["header"] = json.dumps(data.draw(edits(json.loads(content["header"]), JSON)))
    else:
        content = data.draw(edits(content, PACKED))
    path = folder / "edited.msgpack"
    try:
        path.write_bytes(checkpoints._pack(content))
    except Exception:
        return "no file"
    try:
        saved = load_portable(path)
        theta = checkpoints.fit_to(like.theta, flax.serialization.to_state_dict(saved.theta), str(path))
        checkpoints.fit_to(like.outer, saved.outer, str(path))
    except RunError as error:
        assert str(path) in str(error)
        return "refused"
    assert [x.shape for x in theta] == [x.shape for x in like.theta]
    assert isinstance(saved.config.hidden, int)
    return "loaded"


def train_checkpoint(data: Any, folder: Path) -> str:
    """A checkpoint of a run is damaged."""
    path = folder / "a.checkpoint"
    write_checkpoint(path, {"w": jnp.arange(6.0)}, {"settings": {"a": 1}})
    content = path.read_bytes()
    path.write_bytes(data.draw(mutations(content)))
    try:
        facts, arrays = read_checkpoint(path)
    except InputError as error:
        assert "cannot be read" in str(error)
        return "refused"
    assert path.read_bytes() == content and facts == {"settings": {"a": 1}} and len(arrays) == 1
    return "harmless"


RECORD = {
    "name": "adamw",
    "status": "finished",
    "validation": [[0, 2.0], [4, 1.0]],
    "settings": {
        "optimizer": {"preset": "adamw", "learning_rate": 0.1},
        "run": {"steps": 4, "seed": 0, "eval_every": 2},
        "batch": 2,
    },
}
PLAYED = {"environment": {"game": "catch"}, "ppo": {}, "optimizer": {"preset": "adamw", "learning_rate": 0.01}}
LINES = {
    "metrics of reinforce": [
        {"kind": "header", "settings": PLAYED | {"run": {"steps": 90, "seed": 0}}, "options": {}, "device": "cpu"},
        {"kind": "episode", "step": 9, "return": 1.0, "length": 9, "seconds": 0.1},
        {"kind": "progress", "step": 10, "loss": 2.0, "seconds": 0.1},
    ],
    "metrics of train": [
        {"kind": "header", "settings": {"a": 1}, "options": {"steps": 4}},
        {"kind": "progress", "step": 1, "loss": 2.0, "seconds": 0.1},
        {"kind": "end", "step": 4, "status": "finished", "seconds": 0.2},
    ],
    "metrics of metatrain": [
        {"config": dataclasses.asdict(META_CONFIG), "options": {"out": "here"}},
        {"iteration": 1, "meta_loss": {"even": 2.0}, "seconds": 0.1},
    ],
    "runs": [
        RECORD,
        RECORD | {"seed": 1, "settings": RECORD["settings"] | {"batch": 3}},
        {
            "name": "adamw",
            "status": "unfinished",
            "reached": 20,
            "episode_steps": [9, 18],
            "returns": [1.0, -1],
            "settings": PLAYED | {"run": {"steps": 90, "seed": 0}},
        },
    ],
    "evaluations": [
        {"iteration": 0, "score": 2.0, "snapshot": "snapshots/0.celo2", "evaluation": {"steps": 7}},
        {"iteration": 2, "score": None, "snapshot": "snapshots/2.celo2", "evaluation": {"steps": 7}},
    ],
}


def json_lines(data: Any, folder: Path) -> str:
    """The text files of run folders, which have no checksum: read as what they say, or refused with their name."""
    kind = data.draw(st.sampled_from(sorted(LINES)))
    records: list[Any] = json.loads(json.dumps(LINES[kind]))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(records) - 1))
        records[at] = data.draw(edits(records[at], JSON))
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if data.draw(st.booleans()):
        content = data.draw(mutations(content))
    name = {"runs": "runs.jsonl", "evaluations": "evaluations.jsonl"}.get(kind, "metrics.jsonl")
    path = folder / name
    path.write_bytes(content)
    try:
        if kind == "metrics of train":
            with open_run(folder, {"a": 1}, resume=True) as run:
                assert all(isinstance(line["step"], int) for line in run.lines)
        elif kind == "metrics of metatrain":
            assert saved_run(folder).config.hidden >= 1
            for line in path.read_text(errors="replace").splitlines():
                assert _iteration(line) >= 0 or isinstance(_iteration(line), int)
        elif kind == "runs":
            report_sections(read_records([path]))
        elif kind == "metrics of reinforce":
            report_sections(read_records([folder]))
        else:
            read_evaluations(folder)
    except (InputError, RunError) as error:
        assert str(folder) in str(error) or "runs" in str(error) or "seed" in str(error), error
        return "refused"
    finally:
        path.unlink()
    return "read"


# ------------------------------------------------------------------------------------------------------- configurations

SUITE = """
name = "short"
[[tasks]]
name = "language_model"
size = "tiny"
batch = 2
steps = 12
[search]
learning_rates = [0.1, 0.01]
weight_decays = [0.1]
selection_seeds = [0, 1]
[[optimizers]]
preset = "adamw"
options = {state_dtype = "bfloat16"}
guard = {spike_factor = 5.0}
[[optimizers]]
optax = "sgd"
"""


def toml(value: Any) -> str:
    """JSON is TOML but for tables, words and numbers without end."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return "''" if value is None else json.dumps(value)


def suite_file(data: Any, folder: Path) -> str:
    path = folder / "suite.toml"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(mutations(SUITE.encode())))
    else:
        content = data.draw(edits(tomllib.loads(SUITE), JSON))
        if not isinstance(content, dict):
            content = {"name": content}
        lines = [f"{json.dumps(name)} = {toml(item)}\n" for name, item in content.items()]
        path.write_text("".join(lines), encoding="utf-8", errors="replace")
    try:
        suite = load_suite(path)
        for optimizer in suite.optimizers:
            if optimizer.kind != "make":  # which imports what it is told
                make_spec(suite, optimizer, optimizer.learning_rates[0], optimizer.weight_decays[0], 12)
    except InputError as error:
        assert "\n" not in str(error)
        return "refused"
    assert suite.tasks and suite.optimizers and all(task.steps >= 1 for task in suite.tasks)
    return "read"


def recipe(data: Any, folder: Path) -> str:
    """The configuration of meta-training as JSON."""
    record = data.draw(edits(json.loads(json.dumps(dataclasses.asdict(META_CONFIG))), JSON))
    try:
        config = checkpoints.config_from(record, str(folder))
    except RunError as error:
        assert str(folder) in str(error)
        return "refused"
    # What is accepted can be begun.
    if max(config.hidden, config.batch, config.tasks_per_set) <= 70:
        jax.eval_shape(lambda: init_metatrain(config, 2))
    return "read"


# --------------------------------------------------------------------------------------------------------- command line

VALUES = st.one_of(
    NUMBERS.map(str),
    st.text(max_size=8),
    st.sampled_from(["adamw", "celo2_base", "tiny", "linear", "float32", "data=2", "celo2", "1e-3", "/dev/null", "-"]),
)
OPTIONS = {
    "train": "--preset --learning-rate --steps --batch --context --seed --schedule --warmup --weight-decay --weights"
    " --dtype --param-dtype --mesh --eval-every --log-every --checkpoint-every --resume --model --text",
    "metatrain": "--data --sets --start-from --continue-from --devices --checkpoint-every --log-every --rule --variant"
    " --features --momentum-decays --hidden --widths --batch --sigma --estimator --iterations --seed --resume",
    "evaluate": "--processes --data --only --optimizer --retry-failed",
    "weights": "--layout",
    "presets": "",
    "report": "--markdown",
}
POSITIONAL = {"evaluate": ("smoke", "nano", "none"), "weights": ("celo2", "none"), "report": ("none", "/dev/null")}


def command_line(data: Any, folder: Path) -> str:
    """Words after `celo2`: status 0, 1, 2 or 130, and one line that says what is wrong. What trains is left out."""
    command = data.draw(st.sampled_from(sorted(OPTIONS)))
    words = [command]
    if command in POSITIONAL:
        words.append(data.draw(st.sampled_from(POSITIONAL[command]) | st.text(max_size=6)))
    for _ in range(data.draw(st.integers(0, 3))):
        if options := OPTIONS[command].split():
            words.append(data.draw(st.sampled_from(options)))
        words += data.draw(st.lists(VALUES, min_size=0, max_size=2))
    if command in ("train", "metatrain", "evaluate", "report"):
        words += ["--out", str(folder / "out")]
    out, err = io.StringIO(), io.StringIO()
    never = {
        "celo2_harness.lab.cli.train.train": lambda *a, **k: TrainResult("interrupted", 1, 1.0, folder),
        "celo2_harness.lab.cli.metatrain.run_metatrain": lambda *a, **k: None,
        "celo2_harness.lab.cli.metatrain._draw": lambda config: None,
        "celo2_harness.lab.cli._suites.run_suite": lambda *a, **k: None,
    }
    with contextlib.ExitStack() as stack:
        for name, function in never.items():
            stack.enter_context(mock.patch(name, function))
        stack.enter_context(mock.patch.dict(os.environ, {"COLUMNS": "200"}))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        status = main(words)
    assert status in (0, 1, 2, 130), (status, words)
    assert "Traceback" not in err.getvalue() + out.getvalue(), words
    if status == 2:
        assert (err.getvalue() + out.getvalue()).strip(), words
    return "refused" if status == 2 else "understood"


# ------------------------------------------------------------------------------------------------------ parameter trees

LEAVES = (
    [(), (0,), (1,), (7,), (1, 1), (1, 13), (13, 1), (0, 3), (3, 0), (7, 11), (17, 13)]
    + [(2, 3, 5), (1, 1, 1), (3, 3, 2, 4), (2, 1, 3, 1, 2), (2, 1, 2, 1, 3, 2), (1, 0, 2)]
)  # fmt: skip
NAMES = ("kernel", "bias", "scale", "embedding", "lm_head", "w", "query", "0")
DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "bool")


def parameter_tree(data: Any, folder: Path) -> str:
    """Odd leaves through every preset, traced: right shapes and dtypes, or a clear refusal."""
    del folder
    name = data.draw(st.sampled_from(PRESETS))
    leaf = st.tuples(st.sampled_from(LEAVES), st.sampled_from(DTYPES[:4]) | st.sampled_from(DTYPES))
    tree = data.draw(
        st.recursive(
            leaf | st.none(),
            lambda inner: st.dictionaries(st.sampled_from(NAMES), inner, max_size=3) | st.lists(inner, max_size=3),
            max_leaves=5,
        )
    )
    tree = tree or {"w": tree}  # None stands for no parameters at all
    is_leaf = lambda node: isinstance(node, tuple) and len(node) == 2 and isinstance(node[1], str)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda node: jax.ShapeDtypeStruct(node[0], node[1]), tree, is_leaf=is_leaf)
        tx = harness.build(learning_rate=0.01, weight_decay=0.1, **arguments(name))
        try:
            state = jax.eval_shape(tx.init, params)
            update = lambda g, s, p: optax.with_extra_args_support(tx).update(g, s, p, value=LOSS)
            updates, after = jax.eval_shape(update, params, state, params)
        except ValueError as error:
            kinds = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
            assert kinds & {"int32", "bool"} and "dtype" in str(error), error
            return "refused"
        assert signature(after) == signature(state)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert (u.shape, u.dtype) == (p.shape, p.dtype)
    return "right shapes and dtypes"


CASES: dict[str, Callable[[Any, Path], str]] = {
    "bytes of weight files": weight_file_bytes,
    "content of weight files": weight_file_structure,
    "pickles": pickles,
    "bytes of meta-training checkpoints": metatrain_checkpoint,
    "content of portable forms": portable_structure,
    "bytes of training checkpoints": train_checkpoint,
    "JSON lines of run folders": json_lines,
    "suites": suite_file,
    "recipes of meta-training": recipe,
    "command lines": command_line,
    "parameter trees": parameter_tree,
}
