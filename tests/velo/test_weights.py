"""Weight files of VeLO: every layout is read, and whatever does not fit is refused by name."""

import dataclasses
import json
import re

import flax.serialization
import jax
import numpy as np
import pytest
from helpers import RANDOM, VELO_TINY, assert_trees_equal, random_velo

import celo2_harness as c2
from celo2_harness.velo import VELO, VELO_S, load_velo_weights, save_velo_weights
from celo2_harness.weights.container import digest_of

TINY_CONFIG = VELO_TINY.config


def content(tmp_path, layout="published", weights=VELO_TINY):
    save_velo_weights(tmp_path / "w", weights, layout=layout)
    return flax.serialization.msgpack_restore((tmp_path / "w").read_bytes())


def write(path, tree):
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    return path


@pytest.mark.parametrize("layout", ["celo2-harness", "published"])
def test_round_trip(layout, tmp_path):
    weights = dataclasses.replace(VELO_TINY, provenance={"seed": 3})
    save_velo_weights(tmp_path / "w", weights, layout=layout)
    loaded = load_velo_weights(tmp_path / "w", published_as=TINY_CONFIG, expect=TINY_CONFIG)
    assert_trees_equal(loaded.theta, VELO_TINY.theta)
    assert loaded.config == TINY_CONFIG and loaded.provenance == ({"seed": 3} if layout == "celo2-harness" else {})
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    assert load_velo_weights(loaded) is loaded


def test_a_file_of_the_published_size(tmp_path):
    """2,320,385 numbers in 9,282,507 bytes, written by Flax from the tree that the published program has."""
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.normal(size=shape).astype(np.float32)
    affine = lambda inputs, outputs: {"w": array(inputs, outputs), "b": array(outputs)}
    counts = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
    tree = {
        "lstm_init_state": {"hidden": array(1, 512), "cell": array(1, 512)},
        "rnn_params": {
            **{name: affine(30, 512) for name in ("linear", "linear_1", "linear_2")},
            "rnn/linear": affine(1024, 2048),
            "rnn_to_controls": affine(512, 256),
            "step_size": affine(512, 1),
        },
        "ff_mod_stack": {
            "~": {f"w0__{i}": array(256, n, 4) for i, n in enumerate(counts)}
            | {"b0": array(256, 4), "w1": array(256, 4, 4), "b1": array(256, 4)}
            | {"w2": array(256, 4, 3), "b2": array(256, 3)}
        },
    }
    path = tmp_path / "theta.state"
    path.write_bytes(flax.serialization.to_bytes(tree))
    assert path.stat().st_size == 9_282_507
    weights = load_velo_weights(path)
    assert sum(x.size for x in jax.tree.leaves(weights.theta)) == 2_320_385 and weights.config == VELO
    bank = tree["ff_mod_stack"]["~"]
    np.testing.assert_array_equal(weights.theta.bank[7, 44:56], bank["w0__7"][7].ravel()[:12])
    np.testing.assert_array_equal(weights.theta.bank[:, -3:], bank["b2"])
    np.testing.assert_array_equal(weights.theta.gates.w, tree["rnn_params"]["rnn/linear"]["w"])
    with pytest.raises(c2.WeightsError, match=r"lstm = 64 and bank = 32: .*shape \(1, 512\), expected \(1, 64\)"):
        load_velo_weights(path, published_as=VELO_S)
    # Written again, the same bytes, whatever the order of the keys.
    save_velo_weights(tmp_path / "again", weights, layout="published")
    assert (tmp_path / "again").stat().st_size == 9_282_507


def test_other_encodings(tmp_path):
    tree = content(tmp_path)
    start = tree["lstm_init_state"]
    for fields in ({"0": "hidden", "1": "cell"}, {"0": "cell", "1": "hidden"}):
        old = {"name": "LSTMState", "fields": fields, "values": {key: start[name] for key, name in fields.items()}}
        loaded = load_velo_weights(write(tmp_path / "old", tree | {"lstm_init_state": old}), published_as=TINY_CONFIG)
        assert_trees_equal(loaded.theta, VELO_TINY.theta)
    wrapped = {"params": tree, "gen_id": "a run", "step": np.int32(7)}
    loaded = load_velo_weights(write(tmp_path / "wrapped", wrapped), published_as=TINY_CONFIG)
    assert_trees_equal(loaded.theta, VELO_TINY.theta)
    assert loaded.provenance == {"gen_id": "a run", "step": 7}


def edited(*keys, change):
    def edit(tree):
        if len(keys) == 1:
            return {**tree, keys[0]: change(tree[keys[0]])}
        return {**tree, keys[0]: edited(*keys[1:], change=change)(tree[keys[0]])}

    return edit


def without(*keys):
    if len(keys) == 1:
        return lambda tree: {k: v for k, v in tree.items() if k != keys[0]}
    return lambda tree: {**tree, keys[0]: without(*keys[1:])(tree[keys[0]])}


FAULTS = {
    "another size": (
        edited("lstm_init_state", "hidden", change=lambda x: x[:, :2]),
        r"hidden has shape \(1, 2\), expected",
    ),
    "two starts": (
        edited("lstm_init_state", "cell", change=lambda x: np.tile(x, (2, 1))),
        r"cell has shape \(2, 3\), expected \(1, 3\)",
    ),
    "a module less": (without("rnn_params", "rnn/linear"), r"rnn_params: missing keys \['rnn/linear'\]"),
    "a bias less": (without("rnn_params", "step_size", "b"), r"step_size: missing keys \['b'\]"),
    "no modules": (edited("rnn_params", change=lambda x: 3), "rnn_params: expected a mapping"),
    "a block less": (without("ff_mod_stack", "~", "w0__10"), r"missing keys \['w0__10'\]"),
    "a wide block": (
        edited("ff_mod_stack", "~", "w0__2", change=lambda x: np.tile(x, (1, 3, 1))),
        r"w0__2 has shape \(2, 3, 4\), expected \(2, 1, 4\)",
    ),
    "not a number": (
        edited("rnn_params", "rnn_to_controls", "b", change=lambda x: x * np.nan),
        "controls: b holds 2",
    ),
    "integers": (edited("rnn_params", "linear", "b", change=lambda x: x.astype(int)), "b is not an array of float"),
    "a rule of another kind": (lambda tree: {"ff_mod_stack": tree["ff_mod_stack"]}, "missing keys"),
    "a number": (lambda tree: 3, "not a weight file of VeLO"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name, tmp_path):
    change, message = FAULTS[name]
    path = write(tmp_path / "bad", change(content(tmp_path)))
    with pytest.raises(c2.WeightsError, match=message) as caught:
        load_velo_weights(path, published_as=TINY_CONFIG)
    assert str(path) in str(caught.value)


HEADERS = {
    "ff_mult": ({"ff_mult": 100.0}, "trained with ff_mult = 100.0, expected 1.0"),
    "bugged loss features": (
        {"bugged_loss_features": True},
        "trained with bugged_loss_features = True, expected False",
    ),
    "bugged LSTM state": ({"bugged_next_lstm_state": True}, "bugged_next_lstm_state = True, expected False"),
    "another size": ({"bank": 5}, "controls: w has shape"),
    "no number": ({"lstm": "3"}, "header cannot be read.*lstm = '3'"),
    "no truth value": ({"bugged_loss_features": 1}, "header cannot be read.*bugged_loss_features = 1"),
    "no size": ({"lstm": 0}, "expected sizes of at least 1"),
    "unknown field": ({"dropout": 1}, "header cannot be read.*dropout"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_mismatches_are_refused_by_name(name, tmp_path):
    changes, message = HEADERS[name]
    tree = content(tmp_path, "celo2-harness")
    tree["config"] = json.dumps(json.loads(tree["config"]) | changes)
    tree["sha256"] = digest_of(tree)
    with pytest.raises(c2.WeightsError, match=message):
        load_velo_weights(write(tmp_path / "bad", tree), expect=TINY_CONFIG)


@pytest.mark.parametrize("flag", ["use_bugged_loss_features", "use_bugged_next_lstm_state"])
def test_flags_beside_a_published_file(flag, tmp_path):
    content(tmp_path)
    gin = tmp_path / "config.gin"
    gin.write_text(f"# HyperV2.{flag} = True\nHyperV2.{flag} = False\nother.thing = True\n")
    load_velo_weights(tmp_path / "w", published_as=TINY_CONFIG)
    gin.write_text(f"HyperV2.{flag} = True\n")
    with pytest.raises(c2.WeightsError, match=re.escape(f"trained with {flag} = True (config.gin beside it)")):
        load_velo_weights(tmp_path / "w", published_as=TINY_CONFIG)
    if flag == "use_bugged_loss_features":
        bugged = dataclasses.replace(TINY_CONFIG, bugged_loss_features=True)
        assert load_velo_weights(tmp_path / "w", published_as=bugged).config == bugged


def test_each_kind_of_rule_has_its_own_files(tmp_path):
    content(tmp_path, "celo2-harness")
    with pytest.raises(c2.WeightsError, match="not a weight file of a learned rule"):
        c2.load_weights(tmp_path / "w")
    c2.save_weights(tmp_path / "celo2", RANDOM)
    with pytest.raises(c2.WeightsError, match="missing keys"):
        load_velo_weights(tmp_path / "celo2")
    with pytest.raises(c2.WeightsError, match="cannot be read .*Give a path"):
        load_velo_weights("velo")


@pytest.mark.parametrize("layout", ["celo2-harness", "published"])
def test_truncation_is_refused(layout, tmp_path):
    content(tmp_path, layout)
    data = (tmp_path / "w").read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "bad").write_bytes(data[:length])
        with pytest.raises(c2.WeightsError, match="bad"):
            load_velo_weights(tmp_path / "bad", published_as=TINY_CONFIG)


def test_saving_refuses_what_loading_would(tmp_path):
    with pytest.raises(c2.WeightsError, match="hidden has shape"):
        save_velo_weights(tmp_path / "w", dataclasses.replace(random_velo(lstm=4), config=TINY_CONFIG))
    assert not list(tmp_path.iterdir())
