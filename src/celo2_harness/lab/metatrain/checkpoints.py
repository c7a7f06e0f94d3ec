"""Checkpoints of a meta-training run: written whole or not at all, checked when read, the newest two kept.

A file is a line that says what it is, a line with the SHA-256 of the rest, and msgpack. Two forms:

- `checkpoints/ITERATION.msgpack` holds the whole state, so that a resumed run reaches the same bits.
- `portable.msgpack` holds theta, the state of the outer optimizer and the configuration, in a few kilobytes: enough to
  go on elsewhere with fresh inner tasks.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import flax.serialization
import jax
import numpy as np

from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.errors import RunError
from celo2_harness.lab.metatrain.learned import LEARNED
from celo2_harness.lab.metatrain.outer import MetaTrainState
from celo2_harness.rule import RuleConfig
from celo2_harness.weights.files import replace_file

KEEP = 2
"""How many checkpoints a run folder keeps."""
CHECKPOINT_FOLDER = "checkpoints"
PORTABLE_FILE = "portable.msgpack"
_SUFFIX = ".msgpack"
_TITLE = b"celo2 meta-training, version 1\n"


class Portable(NamedTuple):
    """What `portable.msgpack` holds.

    Attributes:
      config: of the run that wrote it.
      header: image sets, digest of the data, and what else the run wrote down.
      iteration: how many were done.
      theta: the rule.
      outer: the state of the outer optimizer, as nested dicts.
    """

    config: MetaTrainConfig
    header: dict[str, Any]
    iteration: int
    theta: Any
    outer: Any


def save_state(out: Path, state: MetaTrainState, header: Mapping[str, Any]) -> None:
    """Writes a checkpoint and the portable form into a run folder; of the checkpoints before, the newest stays.

    Args:
      out: the run folder.
      state: what to save.
      header: what made it, JSON values, "config" among them.

    Raises:
      OSError: if they cannot be written. Those that were there before are still there.
    """
    folder = out / CHECKPOINT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    whole = jax.tree.map(np.asarray, flax.serialization.to_state_dict(state))
    content = {"header": json.dumps(header), "state": whole}
    replace_file(folder / f"{int(state.iteration):08}{_SUFFIX}", _pack(content))
    part = {name: whole[name] for name in ("iteration", "theta", "outer")}
    replace_file(out / PORTABLE_FILE, _pack({"header": json.dumps(header), "state": part}))
    for path in saved_checkpoints(out)[:-KEEP]:
        path.unlink()


def saved_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted(path for path in (out / CHECKPOINT_FOLDER).glob(f"*{_SUFFIX}") if path.stem.isdecimal())


def restore_state(
    out: Path, like: MetaTrainState, warn: Callable[[str], None]
) -> tuple[MetaTrainState, dict[str, Any]]:
    """The newest checkpoint that can be read, and its header.

    Args:
      out: the run folder.
      like: a state of the same run, for structure, shapes and types.
      warn: told of every damaged checkpoint, which is renamed to end with `.damaged`.

    Raises:
      RunError: there is none, none can be read, or the newest is of another kind of run.
    """
    paths = saved_checkpoints(out)
    if not paths:
        raise RunError(f"out = {str(out)!r}: nothing to resume ({CHECKPOINT_FOLDER}/ holds no checkpoint).")
    for path in reversed(paths):
        try:
            content = _unpack(path)
        except RunError as error:
            aside = path.with_name(path.name + ".damaged")
            path.rename(aside)
            warn(f"{error} It is now {aside.name}; the checkpoint before it is used.")
            continue
        return fit_to(like, content["state"], str(path)), json.loads(content["header"])
    raise RunError(
        f"out = {str(out)!r}: none of {len(paths)} checkpoints can be read. Start again in another folder; if"
        f" {out / PORTABLE_FILE} is whole, with --continue-from it."
    )


def load_portable(path: str | Path) -> Portable:
    """Reads the portable form.

    Args:
      path: a `portable.msgpack`.

    Raises:
      RunError: no such file, another kind of file, a damaged one, or one with settings that this version lacks.
    """
    content = _unpack(Path(path))
    try:
        header, state = json.loads(content["header"]), content["state"]
        config = config_from(header["config"], str(path))
        theta = LEARNED[config.variant].theta(state["theta"])
        return Portable(config, header, int(state["iteration"]), theta, state["outer"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path}: not the portable form of a run ({type(error).__name__}: {error}).") from None


def config_from(record: Any, where: str) -> MetaTrainConfig:
    """The configuration that `dataclasses.asdict` and JSON have made a record of."""
    try:
        fields = _tuples(record)
        fields["rule"] = _checked(RuleConfig, fields["rule"])
        return _checked(MetaTrainConfig, fields)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(MetaTrainConfig))
        raise RunError(f"{where}: not a configuration of this version ({error}); known fields: {known}.") from None


def _checked(kind: type, fields: Mapping[str, Any]) -> Any:
    """A frozen record of fields that have the types that it names."""
    for name, hint in get_type_hints(kind).items():
        if name in fields and not _fits(fields[name], hint):
            raise ValueError(f"{name} = {str(fields[name])[:80]}: expected {hint}")
    return kind(**fields)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type that the configurations use; whole numbers are numbers, and truth is none."""
    arguments = get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_fits(value, choice) for choice in arguments)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in arguments
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(wanted) and all(map(_fits, value, wanted))
    return isinstance(value, (int, float) if hint is float else hint) and not isinstance(value, bool)


def _tuples(value: Any) -> Any:
    """JSON has lists where there were tuples."""
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def fit_to(like: Any, saved: Any, where: str) -> Any:
    """Nested dicts as a tree of the structure, shapes and types of `like`."""
    try:
        tree = flax.serialization.from_state_dict(like, _with_nones(flax.serialization.to_state_dict(like), saved))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{where}: another structure than this run has ({error}).") from None
    for (path, wanted), got in zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(tree), strict=True):
        if np.shape(got) != wanted.shape or np.asarray(got).dtype != wanted.dtype:
            raise RunError(
                f"{where}: {jax.tree_util.keystr(path)} is {np.asarray(got).dtype} {np.shape(got)}, this run has"
                f" {wanted.dtype} {wanted.shape}."
            )
    return jax.tree.map(jax.numpy.asarray, tree)


def _with_nones(like: Any, saved: Any) -> Any:
    """Nested dicts with None for what `like` has as None and a file of an earlier version lacks."""
    if not isinstance(like, Mapping) or not isinstance(saved, Mapping):
        return saved
    absent = {name: None for name, value in like.items() if value is None and name not in saved}
    return {name: _with_nones(like.get(name), value) for name, value in saved.items()} | absent


def _pack(content: Mapping[str, Any]) -> bytes:
    packed = flax.serialization.msgpack_serialize(dict(content))
    return _TITLE + hashlib.sha256(packed).hexdigest().encode() + b"\n" + packed


def _unpack(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error}).") from None
    title, rest = content[: len(_TITLE)], content[len(_TITLE) :]
    if title != _TITLE:
        raise RunError(f"{path}: not a file of a meta-training run, or damaged: it starts with {title[:20]!r}.")
    digest, _, packed = rest.partition(b"\n")
    if hashlib.sha256(packed).hexdigest().encode() != digest:
        raise RunError(f"{path}: damaged or cut short: its {len(packed)} bytes do not have the SHA-256 that it says.")
    content: Any = flax.serialization.msgpack_restore(packed)
    return content
