"""What weight files of every kind of rule share: where they come from, what is in them, and how that is checked.

A file is Flax msgpack and cannot run code. Ours says what it is: {"format", "version", "config", "provenance", "theta",
"sha256"}, configuration and provenance as JSON, theta as nested mappings of arrays.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from beartype.door import is_bearable

from celo2_harness.weights.files import replace_file

VERSION = 1
_MAXIMUM_BYTES = 64 * 2**20  # far above any theta; a model checkpoint given by mistake is not read whole

Config = TypeVar("Config")


class WeightsError(ValueError):
    """A weight file that is missing, damaged, or not what it should be; the message names what and where."""


class LearnedWeights:
    """A theta and its configuration; equal where all numbers are, and hashable, so that caches can take it."""

    theta: Any
    config: Any

    def _content(self) -> tuple[Any, ...]:
        arrays = map(np.asarray, jax.tree.leaves(self.theta))
        return self.config, *((x.shape, x.tobytes()) for x in arrays)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())


def read_file(source: str, hub_file: str, hint: str = "") -> bytes:
    """The bytes of a path or of hf://owner/repo.

    Args:
        source: A path, "hf://owner/repo" or "hf://owner/repo/file".
        hub_file: The file in a repository where none is named.
        hint: Further sources, which an error suggests to give.

    Raises:
        WeightsError: If it cannot be read, or is far too large.
        ImportError: If huggingface-hub is missing, which hf:// needs.
    """
    path = _fetch(source, hub_file) if source.startswith("hf://") else Path(source)
    try:
        size = path.stat().st_size
        if size <= _MAXIMUM_BYTES:
            return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no possible path
        reason = getattr(error, "strerror", error)
        raise WeightsError(f"{source}: cannot be read ({reason}). Give {hint}a path, or hf://owner/repo.") from None
    raise WeightsError(f"{source}: {size} bytes is far too large for a weight file of a rule.")


def _fetch(source: str, hub_file: str) -> Path:
    parts = source.removeprefix("hf://").split("/")
    if len(parts) < 2 or not all(parts):
        raise WeightsError(f"{source}: expected hf://owner/repo or hf://owner/repo/file.")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ImportError(f"{source} needs huggingface-hub: pip install 'celo2-harness[hub]'") from None
    file = "/".join(parts[2:]) or hub_file
    try:
        return Path(hf_hub_download(repo_id="/".join(parts[:2]), filename=file))
    except Exception as error:  # the hub library raises many kinds; all mean "not fetched"
        raise WeightsError(
            f"{source}: could not fetch {file!r} from the hub ({type(error).__name__}: {error})"
        ) from error


def restore(data: bytes, name: str) -> Any:
    """Nested mappings of arrays from msgpack.

    Raises:
        WeightsError: If the bytes are something else.
    """
    try:
        return _msgpack().msgpack_restore(data)
    except Exception as error:  # msgpack, struct and numpy errors alike: the bytes are not a weight file
        raise WeightsError(
            f"{name}: not a weight file, or truncated ({len(data)} bytes; {type(error).__name__}: {error})."
        ) from None


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes nested mappings of arrays as msgpack; a kill leaves the old file or the new one."""
    replace_file(Path(path), _msgpack().msgpack_serialize(dict(content)))


def _msgpack() -> Any:
    # All of Flax comes with it, which takes as long as the rest of this package to import.
    import flax.serialization

    return flax.serialization


def pack(kind: str, config: Any, provenance: Mapping[str, Any], theta: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file that says what it is."""
    content = {
        "format": kind,
        "version": VERSION,
        "config": json.dumps(dataclasses.asdict(config)),
        "provenance": json.dumps(dict(provenance)),
        "theta": theta,
    }
    return {**content, "sha256": digest_of(content)}


def is_packed(content: Any, kind: str) -> bool:
    """Returns whether the content of a file says that it is of a kind."""
    # Values may be arrays, which compare elementwise.
    found = content.get("format") if isinstance(content, Mapping) else None
    return isinstance(found, str) and found == kind


def unpack(content: Mapping[str, Any], config: type[Config], name: str) -> tuple[Config, dict[str, Any]]:
    """Configuration and provenance of a file that says what it is.

    Args:
        content: The content of the file.
        config: The class of the configuration, a dataclass.
        name: The name of the file, for messages.

    Raises:
        WeightsError: If the version is another one, or the header cannot be read.
    """
    if not isinstance(content.get("version"), int) or content["version"] != VERSION:
        raise WeightsError(
            f"{name}: format version {content.get('version')!r}, this package reads version {VERSION}."
            " Update celo2-harness."
        )
    try:
        values, provenance = json.loads(content["config"]), json.loads(content["provenance"])
        types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(config)}  # type: ignore[arg-type]
        if not isinstance(values, dict) or set(values) != set(types):
            raise ValueError(f"it has {list(values)}, expected {sorted(types)} with values")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        for key, value in values.items():
            if not is_bearable(value, types[key]) or (isinstance(value, bool) and types[key] is not bool):
                raise ValueError(f"{key} = {value!r}, expected {types[key]}")
        return config(**values), dict(provenance)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{name}: the header cannot be read ({type(error).__name__}: {error}).") from None


def check_digest(content: Mapping[str, Any], name: str) -> None:
    """Refuses a file whose configuration, provenance or numbers are not as they were written.

    Raises:
        WeightsError: If they have another SHA-256 than the file says.
    """
    if not isinstance(content.get("sha256"), str) or content["sha256"] != digest_of(content):
        raise WeightsError(f"{name}: damaged: its content does not have the SHA-256 that it says. Copy the file again.")


def digest_of(content: Mapping[str, Any]) -> str:
    """The SHA-256 of configuration, provenance and numbers."""
    digest = hashlib.sha256()

    def add(tree: Any) -> None:
        if isinstance(tree, Mapping):
            for name in sorted(tree):
                digest.update(f"{name}\n".encode())
                add(tree[name])
        elif isinstance(tree, str):
            digest.update(tree.encode())
        else:
            digest.update(f"{np.shape(tree)}\n".encode() + np.asarray(tree, "<f4").tobytes())

    add({name: content[name] for name in ("config", "provenance", "theta")})
    return digest.hexdigest()


def read_arrays(tree: Any, shapes: Any, name: str) -> Any:
    """The arrays of nested mappings, as float32.

    Args:
        tree: Nested mappings of arrays.
        shapes: The expected shape, or a mapping or NamedTuple of such.
        name: The name of the tree, for messages.

    Returns:
        The arrays, in mappings and NamedTuples like those of `shapes`.

    Raises:
        WeightsError: If keys are missing or extra, or an array is not of floating-point numbers, has another shape, or
            holds numbers that are not finite.
    """
    if isinstance(shapes, Mapping) or hasattr(shapes, "_fields"):
        parts = shapes if isinstance(shapes, Mapping) else shapes._asdict()
        if not isinstance(tree, Mapping):
            raise WeightsError(f"{name}: expected a mapping with the keys {', '.join(parts)}.")
        missing, extra = [key for key in parts if key not in tree], [key for key in tree if key not in parts]
        if missing or extra:
            raise WeightsError(f"{name}: missing keys {missing}, unknown keys {extra}.")
        read = {key: read_arrays(tree[key], part, f"{name}: {key}") for key, part in parts.items()}
        return read if isinstance(shapes, Mapping) else type(shapes)(**read)
    if not isinstance(tree, np.ndarray) or not np.issubdtype(tree.dtype, np.floating):
        raise WeightsError(f"{name} is not an array of floating-point numbers.")
    with np.errstate(over="ignore"):  # too large for float32 is infinite, and refused as such
        x = tree.astype(np.float32)
    if x.shape != shapes:
        raise WeightsError(f"{name} has shape {x.shape}, expected {shapes}.")
    if not np.all(np.isfinite(x)):
        raise WeightsError(f"{name} holds {np.sum(~np.isfinite(x))} numbers that are not finite.")
    return x


def as_mapping(theta: Any) -> Any:
    """Nested NamedTuples of arrays as nested mappings of float32 arrays, as files hold them."""
    if hasattr(theta, "_asdict"):
        return {key: as_mapping(part) for key, part in theta._asdict().items()}
    return np.asarray(theta, np.float32)


def refuse_difference(config: Any, expect: Any, name: str) -> None:
    """Refuses another configuration than the expected one, by the first field that differs.

    Raises:
        WeightsError: If they differ.
    """
    for field in dataclasses.fields(expect):
        got, wanted = getattr(config, field.name), getattr(expect, field.name)
        if got != wanted:
            raise WeightsError(
                f"{name}: trained with {field.name} = {got!r}, expected {wanted!r}."
                " Load weights of that configuration, or build with the configuration of the file."
            )
