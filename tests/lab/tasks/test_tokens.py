"""Token shards and the task on them: nothing lost between text and windows, and what is refused."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import celo2_harness as c2
from celo2_harness.lab.cli.main import main
from celo2_harness.lab.tasks import (
    TOKEN_MODELS,
    GPTConfig,
    LanguageModel,
    Task,
    gpt_loss,
    init_gpt,
    make_task,
    open_tokens,
    tokenizing,
    write_tokens,
)
from celo2_harness.lab.tasks.tokenizing import END_OF_TEXT, read_pieces
from celo2_harness.lab.training.loop import evaluate, init_state, train_step

LINES = [f"{n} plus {n * 7 % 50} makes <|endoftext|> größer than {n * 3}\n" for n in range(400)]
TINY = GPTConfig(width=16, layers=1, heads=2, context=8, vocabulary=300)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, lines in (("a.txt", LINES[:250]), ("b.txt", LINES[250:])):
        (folder / name).write_text("".join(lines))
    return folder / "a.txt", folder / "b.txt"


@pytest.fixture(scope="module")
def shards(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    # Through the command, and in several shards of each part.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "SHARD_TOKENS", 500)
        patch.setattr(tokenizing, "_PIECES_AT_ONCE", 1)
        patch.setattr(tokenizing, "_PIECE_BYTES", 400)
        assert main(["data", "tokens", *map(str, texts), "--out", str(folder), "--train-vocabulary", "300"]) == 0
    return folder


def _decode(folder, ids):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(list(ids), skip_special_tokens=False)


def test_tokens_are_the_text(texts, shards):
    data = open_tokens(shards, context=8)
    assert data.vocabulary == 300 and len(data.train) > 2
    whole = "".join(path.read_text() + END_OF_TEXT for path in texts)
    held_out = _decode(shards, np.concatenate(data.held_out))
    assert _decode(shards, np.concatenate(data.train)) + held_out == whole
    # From the first line that starts in the last tenth.
    size = sum(path.stat().st_size for path in texts)
    length = len(held_out.removesuffix(END_OF_TEXT).encode())
    assert size / 10 - 60 < length <= size / 10
    # The words of the text are characters, only the ends of files are the token.
    end = json.loads((shards / "tokenizer.json").read_text())["model"]["vocab"][END_OF_TEXT]
    assert (np.concatenate([*data.train, *data.held_out]) == end).sum() == len(texts)


def test_headers_give_digests_and_the_tokenizer_is_trained_on_the_training_part(texts, shards, tmp_path):
    header = json.loads((shards / "tokens.json").read_text())
    for shard in header["train"] + header["held_out"]:
        assert shard["sha256"] == hashlib.sha256(np.load(shards / shard["file"]).tobytes()).hexdigest()
    # Another held-out part, the same tokenizer.
    other = [tmp_path / "a.txt", tmp_path / "b.txt"]
    other[0].write_bytes(texts[0].read_bytes())
    kept = sum(piece.size for piece in read_pieces(texts, 1000) if piece.part == "train") - texts[0].stat().st_size
    rest = texts[1].stat().st_size - kept
    other[1].write_bytes(texts[1].read_bytes()[:kept] + b"z" * (rest - 1) + b"\n")
    assert write_tokens(other, tmp_path / "out", train_vocabulary=300)["tokenizer"] == header["tokenizer"]


def test_a_tokenizer_file_makes_the_same_tokens(texts, shards, tmp_path):
    header = write_tokens(texts, tmp_path, tokenizer=str(shards / "tokenizer.json"))
    assert len(header["train"]) == 1  # one shard instead of several
    whole = np.concatenate(open_tokens(shards, 8).train)
    np.testing.assert_array_equal(np.load(tmp_path / "train_00000.npy"), whole)


def test_pieces_are_the_files_whatever_their_size(texts):
    whole = "".join(path.read_text() for path in texts)
    for size in (1, 100, 10**6):
        pieces = list(read_pieces(texts, size))
        assert "".join(piece.text for piece in pieces) == whole
        assert sum(piece.size for piece in pieces) == len(whole.encode())
        assert sum(piece.ends for piece in pieces) == 2
        assert [piece.part for piece in pieces] == sorted((piece.part for piece in pieces), reverse=True)


def _handmade(folder, train, held_out, vocabulary=60):
    parts = {}
    for part, arrays in (("train", train), ("held_out", held_out)):
        parts[part] = []
        for number, array in enumerate(arrays):
            np.save(folder / f"{part}{number}.npy", np.array(array, np.uint16))
            parts[part].append({"file": f"{part}{number}.npy", "tokens": len(array), "sha256": f"{part}{array}"})
    header = {"format": 1, "vocabulary": vocabulary, "tokenizer": {"name": "x", "sha256": "y"}, **parts}
    (folder / "tokens.json").write_text(json.dumps(header))
    return header


def test_windows_are_drawn_evenly_from_all_shards_and_never_across(tmp_path):
    # Shards of 6, 2 (too short for a window) and 4 tokens hold 3 + 0 + 1 windows of 4.
    _handmade(tmp_path, [range(6), range(20, 22), range(40, 44)], [range(10)])
    data = open_tokens(tmp_path, context=3)
    windows = data.sample(0, 0, 4000, 3)
    starts, counts = np.unique(windows[:, 0], return_counts=True)
    assert starts.tolist() == [0, 1, 2, 40]
    assert abs(counts - 1000).max() < 150  # five standard deviations
    np.testing.assert_array_equal(windows, windows[:, :1] + np.arange(4))
    np.testing.assert_array_equal(windows[:5], data.sample(0, 0, 4000, 3)[:5])
    assert (windows != data.sample(0, 1, 4000, 3)).any() and (windows != data.sample(1, 0, 4000, 3)).any()


def test_held_out_windows_are_spread_without_overlap(tmp_path):
    _handmade(tmp_path, [range(6)], [range(10), range(20, 22), range(40, 47)])
    data = open_tokens(tmp_path, context=3)
    assert data.spread(3, 100)[:, 0].tolist() == [0, 3, 6, 40, 43]
    assert data.spread(3, 9)[:, 0].tolist() == [0, 6, 43]
    assert data.spread(3, 1).tolist() == [[0, 1, 2, 3]]


@pytest.mark.slow
def test_loss_falls(shards):
    task = LanguageModel(TINY, open_tokens(shards, 8), 16)
    assert isinstance(task, Task) and len({task, task}) == 1
    assert task.tokens_per_batch == 128 and task.unit == "nats per token"
    tx = optax.adam(1e-2)
    state, held_out = init_state(task, tx, 0), task.validation()
    before = float(evaluate(task, state.params, held_out))
    assert before == pytest.approx(math.log(300), abs=0.1)
    params, opt_state = state.params, state.opt_state
    for step in range(60):
        params, opt_state, _ = train_step(task, tx, params, opt_state, task.batch(0, step))
    assert float(evaluate(task, params, held_out)) < 0.7 * before


def test_descriptions_tell_data_apart(shards, tmp_path):
    task = LanguageModel(TINY, open_tokens(shards, 8), 16)
    described = task.describe()
    assert json.loads(json.dumps(described)) == described
    assert described == LanguageModel(TINY, open_tokens(shards, 8), 16).describe()
    _handmade(tmp_path, [range(20)], [range(20)])
    assert dataclasses.replace(task, data=open_tokens(tmp_path, 8)).describe() != described
    assert dataclasses.replace(task, batch_size=15).describe() != described


@pytest.mark.parametrize(
    ("size", "millions"),
    [("small", 1.85), ("gpt2-124m", 124.3), pytest.param("gpt3-xl-1.3b", 1315, marks=pytest.mark.slow)],
)
def test_models_have_the_sizes_that_the_table_says(size, millions):
    shapes = jax.eval_shape(lambda key: init_gpt(TOKEN_MODELS[size], key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_a_tied_head_is_the_table_of_embeddings():
    tied = dataclasses.replace(TINY, tied=True)
    params = init_gpt(TINY, jax.random.key(0))
    shared = init_gpt(tied, jax.random.key(0))
    names = lambda tree: {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    (lost,) = names(params) - names(shared)
    assert "head" in lost and names(shared) < names(params)
    # The same loss as an untied model whose head holds the same numbers.
    table = params["token_embedding"]["embedding"]
    params["head"]["kernel"] = params["head"]["kernel"].replace(table[...].T)
    for name in ("token_embedding", "position_embedding", "blocks", "norm"):
        shared[name] = params[name]
    windows = jnp.arange(18).reshape(2, 9) * 16
    assert float(gpt_loss(tied, shared, windows)) == pytest.approx(float(gpt_loss(TINY, params, windows)), rel=1e-6)
    labels = {str(path[0].key): label for path, label in jax.tree_util.tree_leaves_with_path(c2.label_params(shared))}
    assert labels["token_embedding"] == "embedding" and "head" not in labels


def test_bad_shards_are_told(tmp_path, shards):
    def refused(match, context=3, **options):
        with pytest.raises(ValueError, match=match):
            open_tokens(tmp_path, context, **options)

    with pytest.raises(ValueError, match="make some with celo2 data tokens TEXT"):
        make_task("token_language_model")
    with pytest.raises(ValueError, match="no train shard of 129 tokens"):
        _handmade(tmp_path, [range(6)], [range(6)])
        make_task("token_language_model", "small", tmp_path)
    header = _handmade(tmp_path, [range(6)], [range(6)])
    refused("a vocabulary of 60, the model has 50", vocabulary=50)
    refused("no train shard of 7 tokens, which a context of 6 needs; the longest has 6", context=6)
    _handmade(tmp_path, [range(6)], [])
    refused("no held_out shard of 4 tokens")
    _handmade(tmp_path, [[0, 1, 2, 60, 4, 5]], [range(6)])
    with pytest.raises(ValueError, match="holds the token 60, but tokens.json says that all are below 60"):
        open_tokens(tmp_path, 3).sample(0, 0, 50, 3)
    np.save(tmp_path / "train0.npy", np.arange(5, dtype=np.uint16))
    refused(r"train0.npy is uint16 \(5,\), tokens.json says uint16 \(6,\)")
    np.save(tmp_path / "train0.npy", np.arange(6))
    refused(r"train0.npy is int64 \(6,\)")
    (tmp_path / "train0.npy").write_bytes(b"\x93NUMPY")
    refused("cannot read the shard .*train0.npy")
    (tmp_path / "train0.npy").unlink()
    refused("cannot read the shard .*train0.npy")
    (tmp_path / "tokens.json").write_text(json.dumps({**header, "format": 2}))
    refused("has format 2, this version reads 1")
    (tmp_path / "tokens.json").write_text("{}")
    refused("is no header of token shards .KeyError: 'format'")
    (tmp_path / "tokens.json").write_text("[")
    refused("is no header of token shards .JSONDecodeError")
    (tmp_path / "tokens.json").unlink()
    refused("cannot read .*tokens.json .No such file or directory.; expected a folder made by celo2 data tokens")


def test_bad_texts_are_told(tmp_path, texts, shards):
    def refused(match, paths=texts, out=tmp_path / "out", **options):
        with pytest.raises(ValueError, match=match):
            write_tokens([Path(path) for path in paths], out, **options)
        assert not (tmp_path / "out" / "tokens.json").exists()

    vocabulary = {"train_vocabulary": 300}
    refused("give the name or file of one, or the vocabulary")
    refused("not both", tokenizer="x", **vocabulary)
    refused("has token shards already", out=shards, **vocabulary)
    refused("none is not there; give text files", [tmp_path / "none"], **vocabulary)
    refused("is a folder; give text files", [tmp_path], **vocabulary)
    for name, content in (("empty", b""), ("latin", b"gr\xfc\xdfe\n" * 50), ("line", b"x" * 1000)):
        (tmp_path / name).write_bytes(content)
    refused("empty; give files with some text", [tmp_path / "empty"], **vocabulary)
    refused("latin is not UTF-8", [tmp_path / "latin"], **vocabulary)
    refused("no line starts in the last 10%", [tmp_path / "line"], **vocabulary)
    refused("train_vocabulary = 256: expected 257", train_vocabulary=256)
    refused("train_vocabulary = 65537: expected 257", train_vocabulary=65537)
    refused("latin'?: no tokenizer.json", tokenizer=str(tmp_path / "latin"))


def test_the_command_tells_errors_in_a_line(capsys, tmp_path, texts):
    assert main(["data", "tokens", str(texts[0]), "--out", str(tmp_path / "x")]) == 2
    assert "celo2: error: tokenizer: give the name or file of one" in capsys.readouterr().err
