"""Weight files: both layouts come back as written, and whatever does not fit is refused by name."""

import dataclasses
import json
import pickle
import sys
import types

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import RANDOM, TINY, VELO_TINY, assert_trees_equal, random_theta
from hypothesis import given, settings, strategies as st

import celo2_harness as c2
from celo2_harness.rule import CELO2_CONFIG


def content_of(weights, tmp_path, layout="celo2-harness"):
    c2.save_weights(tmp_path / "w.celo2", weights, layout=layout)
    return flax.serialization.msgpack_restore((tmp_path / "w.celo2").read_bytes())


def write(path, content):
    path.write_bytes(flax.serialization.msgpack_serialize(content))
    return path


@pytest.mark.parametrize("layout", ["celo2-harness", "published"])
def test_round_trip(layout, tmp_path):
    weights = dataclasses.replace(RANDOM, provenance={"seed": 3, "sets": ["digits"]})
    c2.save_weights(tmp_path / "w", weights, layout=layout)
    loaded = c2.load_weights(tmp_path / "w", expect=CELO2_CONFIG)
    assert_trees_equal(loaded.theta, RANDOM.theta)
    assert loaded.config == CELO2_CONFIG
    assert loaded.provenance == (weights.provenance if layout == "celo2-harness" else {})
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_the_published_file(shared):
    path = shared / "oracle" / "celo2_official_theta.state"
    if not path.exists():
        pytest.skip(f"{path.name} is not there")
    raw = flax.serialization.msgpack_restore(path.read_bytes())["ff_mod_stack"]["~"]
    theta = c2.load_weights(path).theta
    np.testing.assert_array_equal(theta.w0, np.concatenate([raw[f"w0__{i}"] for i in range(14)]))
    for name in ("b0", "w1", "b1", "w2", "b2"):
        np.testing.assert_array_equal(getattr(theta, name), raw[name])
    assert sum(x.size for x in theta) == 347


def test_bundled_names_load():
    assert set(c2.bundled_weights()) == {"celo2", "celo2_base", "celo2_linear"}
    for name in ("celo2", "celo2_base"):
        weights = c2.load_weights(name, kind=c2.Weights)
        assert sum(x.size for x in weights.theta) == 347 and weights.config == CELO2_CONFIG


def test_a_linear_rule_comes_back_as_written(tmp_path):
    weights = c2.load_weights("celo2_linear", kind=c2.LinearWeights)
    assert weights.theta.weights.shape == weights.theta.slopes.shape == (3,) and weights.provenance
    changed = dataclasses.replace(weights, theta=weights.theta._replace(slopes=np.arange(3, dtype=np.float32)))
    c2.save_weights(tmp_path / "w", changed)
    loaded = c2.load_weights(tmp_path / "w", expect=weights.config)
    assert loaded == changed != weights and loaded.provenance == weights.provenance
    with pytest.raises(c2.WeightsError, match="the published layout holds networks only"):
        c2.save_weights(tmp_path / "w", changed, layout="published")
    with pytest.raises(c2.WeightsError, match="LinearWeights, expected Weights"):
        c2.load_weights(tmp_path / "w", kind=c2.Weights)
    with pytest.raises(c2.WeightsError, match="trained with power = 0.771, expected 0.5"):
        c2.load_weights(changed, expect=dataclasses.replace(weights.config, power=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum_decays": (0.9, 1.0)}, "decays must be numbers in"),
        ({"momentum_decays": (0.9,)}, r"weights has shape \(3,\), expected \(2,\)"),
        ({"power": -1.0}, "power = -1.0, expected"),
        ({"floor": 0.0}, "floor = 0.0, expected"),
        ({"floor": float("nan")}, "floor = nan, expected"),
        ({"power": "half"}, "power = 'half', expected"),
    ],
)
def test_linear_rules_that_cannot_be_are_refused(changes, message, tmp_path):
    linear = c2.load_weights("celo2_linear")
    content = content_of(linear, tmp_path)
    path = write(tmp_path / "bad", header(**changes)(content))
    with pytest.raises(c2.WeightsError, match=message):
        c2.load_weights(path)
    path = write(tmp_path / "bad", content | {"theta": content["theta"] | {"slopes": np.ones(3, np.float32)}})
    with pytest.raises(c2.WeightsError, match="damaged"):
        c2.load_weights(path)


def test_weights_pass_through():
    assert c2.load_weights(RANDOM) is RANDOM
    with pytest.raises(c2.WeightsError, match="momentum_decays"):
        c2.load_weights(TINY, expect=dataclasses.replace(TINY.config, momentum_decays=(0.5,)))


def test_weights_are_compared_and_hashed_by_their_numbers():
    weights, same = c2.load_weights("celo2"), c2.load_weights("celo2")
    other = dataclasses.replace(weights, theta=weights.theta._replace(b2=weights.theta.b2 + 1))
    slower = dataclasses.replace(weights, config=dataclasses.replace(CELO2_CONFIG, second_moment_decay=0.999))
    assert weights == same and hash(weights) == hash(same) and weights is not same
    assert len({weights, same, other, slower, VELO_TINY}) == 4 and weights != other and weights != "celo2"
    velo = dataclasses.replace(VELO_TINY, theta=jax.tree.map(jnp.asarray, VELO_TINY.theta))
    assert velo == VELO_TINY and hash(velo) == hash(VELO_TINY)


def test_a_file_of_another_configuration_runs(tmp_path):
    config = dataclasses.replace(TINY.config, momentum_decays=(0.5, 0.9), second_moment_decay=0.7)
    c2.save_weights(tmp_path / "w", c2.Weights(random_theta(5, 4), config))
    tx = c2.celo2_direction(str(tmp_path / "w"))
    params = {"w": jnp.ones((2, 3))}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert len(state.mu) == 2 and len(state.row) == 1
    np.testing.assert_allclose(state.mu[0]["w"], 0.5)
    np.testing.assert_allclose(state.nu["w"], 0.3, rtol=1e-6)
    assert np.all(np.isfinite(updates["w"]))


# ------------------------------------------------------------------------------------------------- mismatches, by name


def without(key):
    return lambda theta: {k: x for k, x in theta.items() if k != key}


CHANGES = {
    "missing key": (without("b1"), r"missing keys \['b1'\]"),
    "extra key": (lambda t: t | {"w3": t["w1"]}, r"unknown keys \['w3'\]"),
    "wrong shape": (lambda t: t | {"w1": t["w1"][:1]}, r"w1 has shape \(1, 8\), expected \(8, 8\)"),
    "not a number": (lambda t: t | {"b0": t["b0"] * np.nan}, "b0 holds 8 numbers that are not finite"),
    "infinite": (lambda t: t | {"b2": np.array([0, np.inf, 0], np.float32)}, "b2 holds 1 numbers"),
    "too large for float32": (lambda t: t | {"b2": np.array([0, 1e300, 0])}, "b2 holds 1 numbers"),
    "integers": (lambda t: t | {"b0": np.arange(8)}, "b0 is not an array of floating-point numbers"),
    "text": (lambda t: t | {"b0": "eight"}, "b0 is not an array"),
    "scalar bias": (lambda t: t | {"b0": np.float32(1) * np.ones(())}, "b0"),
    "no outputs": (lambda t: t | {"w2": t["w2"][:, :0], "b2": t["b2"][:0]}, "b2 is not .* empty"),
    "no mapping": (lambda t: [1, 2], "expected a mapping"),
}


@pytest.mark.parametrize("layout", ["celo2-harness", "published"])
@pytest.mark.parametrize("name", CHANGES)
def test_changed_arrays_are_refused(name, layout, tmp_path):
    change, message = CHANGES[name]
    content = content_of(RANDOM, tmp_path, layout)
    if layout == "published":
        content["ff_mod_stack"]["~"] = change(content["ff_mod_stack"]["~"])
    else:
        content["theta"] = change(content["theta"])
    with pytest.raises(c2.WeightsError, match=message):
        c2.load_weights(write(tmp_path / "bad", content))


def header(**changes):
    return lambda content: content | {"config": json.dumps(json.loads(content["config"]) | changes)}


HEADERS = {
    "unknown feature": (header(features=["gradient", "curvature"]), r"unknown features \['curvature'\]"),
    "nested feature": (header(features=[["gradient"]]), "feature"),
    "features as a number": (header(features=3), "features"),
    "decay above one": (header(second_moment_decay=1.5), "decays must be numbers"),
    "decay not a number": (header(second_moment_decay=float("nan")), "decays must be numbers"),
    "decays as a number": (header(momentum_decays=0.9), "momentum_decays|decays"),
    "no decays": (header(momentum_decays=[]), "at least one"),
    "unequal decays": (header(momentum_decays=[0.9]), "their numbers must be equal"),
    "unknown normalization": (header(normalization="per_stop"), "normalization = 'per_stop'"),
    "fewer features": (header(features=["gradient"]), r"w0 has shape \(30, 8\), expected \(1, 8\)"),
    "unknown field": (header(nesterov=True), "nesterov"),
    "config is a list": (lambda c: c | {"config": '["features"]'}, "header"),
    "config is a list of the right names": (
        lambda c: c | {"config": json.dumps(list(json.loads(c["config"])))},
        "header",
    ),
    "config is no JSON": (lambda c: c | {"config": "{"}, "header cannot be read"),
    "config is nested without end": (lambda c: c | {"config": "[" * 100_000}, "header cannot be read"),
    "config is an array": (lambda c: c | {"config": np.ones(3)}, "header cannot be read"),
    "no config": (lambda c: {k: x for k, x in c.items() if k != "config"}, "header cannot be read"),
    "provenance is a number": (lambda c: c | {"provenance": "3"}, "header cannot be read"),
    "version of the future": (lambda c: c | {"version": 2}, "version 2, this package reads version 1"),
    "version is an array": (lambda c: c | {"version": np.ones(2)}, "version"),
    "format is an array": (lambda c: c | {"format": np.ones(2)}, "not a weight file"),
    "another format": (lambda c: c | {"format": "celo3"}, "not a weight file of a learned rule"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_changed_headers_are_refused(name, tmp_path):
    change, message = HEADERS[name]
    path = write(tmp_path / "bad", change(content_of(RANDOM, tmp_path)))
    with pytest.raises(c2.WeightsError, match=message) as caught:
        c2.load_weights(path)
    assert str(path) in str(caught.value)


def test_other_decays_are_refused_with_expect(tmp_path):
    other = dataclasses.replace(CELO2_CONFIG, second_moment_decay=0.999)
    c2.save_weights(tmp_path / "w", dataclasses.replace(RANDOM, config=other))
    assert c2.load_weights(tmp_path / "w").config == other
    with pytest.raises(c2.WeightsError, match="second_moment_decay = 0.999, expected 0.95"):
        c2.load_weights(tmp_path / "w", expect=CELO2_CONFIG)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", b"PK\x03\x04", pickle.dumps({"theta": 1}), b"\x93\x01\x02\x03", b"\xa5hello", bytes(range(256))],
)
def test_bytes_of_something_else_are_refused(data, tmp_path):
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(c2.WeightsError, match="not a weight file"):
        c2.load_weights(tmp_path / "bad")


def test_places_that_hold_no_file(tmp_path):
    with pytest.raises(c2.WeightsError, match="cannot be read.*celo2"):
        c2.load_weights("cello2")
    with pytest.raises(c2.WeightsError, match="cannot be read"):
        c2.load_weights(tmp_path)
    with pytest.raises(c2.WeightsError, match="cannot be read"):
        c2.load_weights("null\0byte")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(65 * 2**20)  # sparse: takes no room
    with pytest.raises(c2.WeightsError, match="far too large"):
        c2.load_weights(tmp_path / "huge")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    c2.save_weights(folder / "own", TINY)
    c2.save_weights(folder / "published", RANDOM, layout="published")
    return folder


def loads_or_refuses(path):
    try:
        weights = c2.load_weights(path)
    except c2.WeightsError:
        return None
    assert all(np.all(np.isfinite(x)) for x in weights.theta)
    # What loads can be built with.
    params = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": jax.ShapeDtypeStruct((2,), jnp.float32)}
    jax.eval_shape(c2.scale_by_celo2(weights).init, params)
    return weights


@pytest.mark.parametrize("name", ["own", "published"])
def test_truncation_is_refused(name, files, tmp_path):
    data = (files / name).read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "bad").write_bytes(data[:length])
        assert loads_or_refuses(tmp_path / "bad") is None, length


def test_a_changed_number_is_noticed(files, tmp_path):
    tree = content_of(TINY, tmp_path)
    assert c2.load_weights(write(tmp_path / "same", tree)).config == TINY.config
    for change in (
        {"theta": tree["theta"] | {"b0": tree["theta"]["b0"] + 1}},
        {"provenance": '{"seed": 3}'},
        {"sha256": "0"},
        {"sha256": 7},
        {"sha256": None},
    ):
        with pytest.raises(c2.WeightsError, match="damaged: its content does not have the SHA-256"):
            c2.load_weights(write(tmp_path / "bad", tree | change))


@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("name", ["own", "published"])
def test_flipped_bytes_are_refused_or_harmless(name, data, files):
    content = bytearray((files / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (files / "flipped").write_bytes(content)
    loads_or_refuses(files / "flipped")


# ------------------------------------------------------------------------------------------------------------- writing


def test_saving_refuses_what_loading_would(tmp_path):
    path = tmp_path / "w"
    with pytest.raises(c2.WeightsError, match="published layout cannot say"):
        c2.save_weights(path, TINY, layout="published")
    with pytest.raises(c2.WeightsError, match="w0 has shape"):
        c2.save_weights(path, c2.Weights(TINY.theta))
    with pytest.raises(c2.WeightsError, match="not finite"):
        c2.save_weights(path, c2.Weights(RANDOM.theta._replace(b2=np.full(3, np.nan, np.float32))))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    c2.save_weights(tmp_path / "w", RANDOM)
    before = (tmp_path / "w").read_bytes()

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        c2.save_weights(tmp_path / "w", dataclasses.replace(RANDOM, provenance={"seed": 1}))
    assert (tmp_path / "w").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# ----------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub library that serves one local file."""
    calls = []
    c2.save_weights(tmp_path / "served", RANDOM)

    def hf_hub_download(repo_id, filename):
        calls.append((repo_id, filename))
        if "absent" in repo_id:
            raise LookupError("404")
        return str(tmp_path / "served")

    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_hub_names(hub):
    assert_trees_equal(c2.load_weights("hf://someone/rule").theta, RANDOM.theta)
    c2.load_weights("hf://someone/rule/folder/file.celo2")
    assert hub == [("someone/rule", "weights.celo2"), ("someone/rule", "folder/file.celo2")]
    with pytest.raises(c2.WeightsError, match="could not fetch 'weights.celo2'.*404"):
        c2.load_weights("hf://someone/absent")


@pytest.mark.parametrize("source", ["hf://", "hf://owner", "hf://owner/", "hf:///repo", "hf://owner/repo//file"])
def test_malformed_hub_names(source, hub):
    with pytest.raises(c2.WeightsError, match="expected hf://owner/repo"):
        c2.load_weights(source)
    assert not hub


def test_without_the_hub_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'celo2-harness\[hub\]'"):
        c2.load_weights("hf://owner/repo")
