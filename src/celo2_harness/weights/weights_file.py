"""Weight files: the numbers of a learned rule together with what they were trained as.

Two layouts are read and written, both Flax msgpack, neither able to run code:

- `"celo2-harness"`: {"format", "version", "config", "provenance", "theta", "sha256"}; a file says what it is, and
  shows when a byte has changed. Files of before have no "sha256".
- `"published"`: {"ff_mod_stack": {"~": {w0__0 .. w0__13, b0, w1, b1, w2, b2}}}, the layout of the published Celo2,
  which says nothing about itself and is taken to have the published configuration.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from celo2_harness.rule.config import CELO2_CONFIG, Normalization, RuleConfig, Theta
from celo2_harness.rule.features import FEATURES, channel_counts
from celo2_harness.weights.files import replace_file

FORMAT = "celo2-harness weights"
VERSION = 1
HUB_FILE = "weights.celo2"
_MAXIMUM_BYTES = 64 * 2**20  # far above any theta; a model checkpoint given by mistake is not read whole


class WeightsError(ValueError):
    """A weight file that is missing, damaged, or not what it should be; the message names what and where."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """A learned rule: its numbers, its configuration, and how it was made.

    Attributes:
      theta: float32 arrays.
      config: features, decays and normalisation that theta was trained with.
      provenance: free facts about the training run (data, iterations, seed, ...), JSON values.
    """

    theta: Theta
    config: RuleConfig = CELO2_CONFIG
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        size = sum(np.size(x) for x in self.theta)
        return f"Weights({size} numbers, hidden {np.shape(self.theta.b0)[0]}, {self.config})"


def bundled_weights() -> tuple[str, ...]:
    """Names of the weight files inside the package.

    >>> "celo2" in bundled_weights()
    True
    """
    folder = resources.files("celo2_harness.weights")
    return tuple(sorted(f.name.removesuffix(".celo2") for f in folder.iterdir() if f.name.endswith(".celo2")))


def load_weights(source: str | os.PathLike[str] | Weights, *, expect: RuleConfig | None = None) -> Weights:
    """Loads a learned rule by bundled name, from a file, or from the Hugging Face hub.

    Args:
      source: a bundled name ("celo2"), a path, "hf://owner/repo" or "hf://owner/repo/file", or `Weights` (returned
        unchanged), or the name of an installed package's weights. Only an hf:// source uses the network.
      expect: refuse weights that were trained with another configuration.

    Returns:
      The weights; theta as float32 NumPy arrays.

    Raises:
      WeightsError: no such name or file, not a weight file, truncated, a missing or extra key, a wrong shape, a number
        that is not finite, an unknown feature or version, or a configuration other than `expect`.
      ImportError: hf:// without huggingface-hub.

    Example:
      >>> weights = load_weights("celo2")
      >>> weights.theta.w0.shape, weights.config.second_moment_decay
      ((30, 8), 0.95)
    """
    if isinstance(source, Weights):
        weights, name = source, "the given weights"
    elif not isinstance(source, (str, os.PathLike)):
        raise WeightsError(f"weights = {source!r}: expected Weights, a name or a path.")
    else:
        name = os.fspath(source)
        weights = _parse(_read(name), name)
    if expect is not None:
        for field in dataclasses.fields(RuleConfig):
            got, wanted = getattr(weights.config, field.name), getattr(expect, field.name)
            if got != wanted:
                raise WeightsError(
                    f"{name}: trained with {field.name} = {got!r}, expected {wanted!r}."
                    " Load weights of that configuration, or build with the configuration of the file."
                )
    return weights


def save_weights(
    path: str | os.PathLike[str], weights: Weights, *, layout: Literal["celo2-harness", "published"] = "celo2-harness"
) -> None:
    """Writes a weight file, atomically.

    Args:
      path: the file to write.
      weights: what to write.
      layout: "celo2-harness" (says what it is), or "published" (for programs that read the published file; the
        configuration is lost, so only the published one is accepted).

    Raises:
      WeightsError: shapes that do not fit the configuration, numbers that are not finite, or a configuration that the
        published layout cannot express.

    Example:
      >>> path = str(getfixture("tmp_path") / "copy.celo2")
      >>> save_weights(path, load_weights("celo2"))
      >>> load_weights(path).config == load_weights("celo2").config
      True
    """
    path = Path(path)
    _check(weights, str(path))
    theta = {name: np.asarray(x, np.float32) for name, x in weights.theta._asdict().items()}
    if layout == "published":
        if weights.config != CELO2_CONFIG:
            raise WeightsError(
                f"{path}: the published layout cannot say {weights.config}, only the published configuration."
                ' Save with layout="celo2-harness".'
            )
        blocks = np.split(theta.pop("w0"), np.cumsum(channel_counts(weights.config))[:-1])
        content: dict[str, Any] = {"ff_mod_stack": {"~": {f"w0__{i}": block for i, block in enumerate(blocks)} | theta}}
    else:
        content = with_digest(
            {
                "format": FORMAT,
                "version": VERSION,
                "config": json.dumps(dataclasses.asdict(weights.config)),
                "provenance": json.dumps(dict(weights.provenance)),
                "theta": theta,
            }
        )
    write_content(path, content)


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file that says what it is, with the SHA-256 of configuration, provenance and numbers."""
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
    return {**content, "sha256": digest.hexdigest()}


def check_digest(content: Mapping[str, Any], name: str) -> None:
    """Refuses a file whose configuration, provenance or numbers are not as they were written.

    Raises:
      WeightsError: they have another SHA-256 than the file says.
    """
    if "sha256" not in content:
        return
    try:
        wanted = with_digest(content)["sha256"]
    except (TypeError, ValueError) as error:  # parts of other types
        raise WeightsError(f"{name}: damaged ({type(error).__name__}: {error}).") from None
    if not isinstance(content["sha256"], str) or content["sha256"] != wanted:
        raise WeightsError(f"{name}: damaged: its content does not have the SHA-256 that it says. Copy the file again.")


def write_content(path: Path, content: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays as msgpack; a kill leaves the old file or the new one."""
    replace_file(path, _msgpack().msgpack_serialize(dict(content)))


def _msgpack() -> Any:
    """Flax's serialization. All of Flax comes with it, which takes as long as the rest of this package to import."""
    import flax.serialization

    return flax.serialization


def _read(source: str) -> bytes:
    if source in bundled_weights():
        return (resources.files("celo2_harness.weights") / f"{source}.celo2").read_bytes()
    return read_file(source, HUB_FILE, f"one of the bundled names {', '.join(bundled_weights())}, ")


def read_file(source: str, hub_file: str, hint: str = "") -> bytes:
    """The bytes of a path or of hf://owner/repo; `hint` is what else an error suggests to give.

    Raises:
      WeightsError: it cannot be read, or is far too large.
      ImportError: hf:// without huggingface-hub.
    """
    path = _fetch(source, hub_file) if source.startswith("hf://") else Path(source)
    try:
        if path.stat().st_size > _MAXIMUM_BYTES:
            raise WeightsError(f"{source}: {path.stat().st_size} bytes is far too large for a weight file of a rule.")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no possible path
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"{source}: cannot be read ({getattr(error, 'strerror', error)}). Give {hint}a path, or hf://owner/repo."
        ) from None


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


def restore_content(data: bytes, name: str) -> Any:
    """Nested dicts of arrays from msgpack.

    Raises:
      WeightsError: the bytes are something else.
    """
    try:
        return _msgpack().msgpack_restore(data)
    except Exception as error:  # msgpack, struct and numpy errors alike: the bytes are not a weight file
        raise WeightsError(
            f"{name}: not a weight file, or truncated ({len(data)} bytes; {type(error).__name__}: {error})."
        ) from None


def _parse(data: bytes, name: str) -> Weights:
    content = restore_content(data, name)
    # Values may be arrays, which compare elementwise.
    if isinstance(content, Mapping) and isinstance(content.get("format"), str) and content["format"] == FORMAT:
        config, provenance = _header(content, name)
        theta = content.get("theta")
    elif isinstance(content, Mapping) and "ff_mod_stack" in content:
        config, provenance = CELO2_CONFIG, {}
        stack = content["ff_mod_stack"]
        theta = _join_blocks(stack.get("~") if isinstance(stack, Mapping) else None, name)
    else:
        raise WeightsError(
            f"{name}: not a weight file of a learned rule: expected the key 'format' = {FORMAT!r} or 'ff_mod_stack'."
        )
    arrays = named_arrays(theta, Theta._fields, name)
    weights = Weights(Theta(**arrays), config, provenance)
    _check(weights, name)
    check_digest(content, name)  # last: the checks before say more
    return weights


def _header(content: Mapping[str, Any], name: str) -> tuple[RuleConfig, Mapping[str, Any]]:
    if not isinstance(content.get("version"), int) or content["version"] != VERSION:
        raise WeightsError(
            f"{name}: format version {content.get('version')!r}, this package reads version {VERSION}."
            " Update celo2-harness."
        )
    try:
        fields, provenance = json.loads(content["config"]), json.loads(content["provenance"])
        expected = {field.name for field in dataclasses.fields(RuleConfig)}
        if not isinstance(fields, dict) or set(fields) != expected:
            raise WeightsError(f"{name}: the header has {list(fields)}, expected {sorted(expected)} with values.")
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return RuleConfig(**fields), dict(provenance)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{name}: the header cannot be read ({type(error).__name__}: {error}).") from None


def named_arrays(tree: Any, names: tuple[str, ...], name: str) -> dict[str, np.ndarray]:
    """The arrays of a mapping, refusing missing and extra keys and anything that is not a float array."""
    if not isinstance(tree, Mapping):
        raise WeightsError(f"{name}: expected a mapping of arrays with the keys {', '.join(names)}.")
    missing, extra = [n for n in names if n not in tree], [n for n in tree if n not in names]
    if missing or extra:
        raise WeightsError(f"{name}: missing keys {missing}, unknown keys {extra}.")
    for key in names:
        if not isinstance(tree[key], np.ndarray) or not np.issubdtype(tree[key].dtype, np.floating):
            raise WeightsError(f"{name}: {key} is not an array of floating-point numbers.")
    with np.errstate(over="ignore"):  # too large for float32 is infinite, and refused as such
        return {key: tree[key].astype(np.float32) for key in names}


def _join_blocks(stack: Any, name: str) -> dict[str, np.ndarray]:
    """The published layout keeps the first layer as one block per feature group."""
    counts = channel_counts(CELO2_CONFIG)
    blocks = tuple(f"w0__{i}" for i in range(len(counts)))
    arrays = named_arrays(stack, blocks + Theta._fields[1:], name)
    hidden = arrays["b0"].shape
    for block, count in zip(blocks, counts, strict=True):
        if arrays[block].shape != (count, *hidden):
            raise WeightsError(f"{name}: {block} has shape {arrays[block].shape}, expected {(count, *hidden)}.")
    return {"w0": np.concatenate([arrays.pop(block) for block in blocks])} | arrays


def _check(weights: Weights, name: str) -> None:
    """Configuration known, shapes consistent, numbers finite."""
    config = weights.config
    check_config(config, name)
    theta = weights.theta
    hidden = np.shape(theta.b0)[0] if np.ndim(theta.b0) == 1 else 0
    outputs = np.shape(theta.b2)[0] if np.ndim(theta.b2) == 1 else 0
    inputs = sum(channel_counts(config))
    shapes = ((inputs, hidden), (hidden,), (hidden, hidden), (hidden,), (hidden, outputs), (outputs,))
    if not hidden or not outputs:
        raise WeightsError(
            f"{name}: b0 {np.shape(theta.b0)} and b2 {np.shape(theta.b2)} must be vectors that are not empty."
        )
    for key, x, shape in zip(Theta._fields, theta, shapes, strict=True):
        if np.shape(x) != shape:
            raise WeightsError(f"{name}: {key} has shape {np.shape(x)}, expected {shape}.")
        if not np.all(np.isfinite(x)):
            raise WeightsError(f"{name}: {key} holds {np.sum(~np.isfinite(x))} numbers that are not finite.")


def check_config(config: RuleConfig, name: str) -> None:
    """Refuses a configuration that no rule can have.

    Raises:
      WeightsError: an unknown feature or normalisation, decays out of range, numbers of decays that do not pair.
    """
    for field in ("features", "momentum_decays", "factored_decays"):
        if not isinstance(getattr(config, field), tuple):
            raise WeightsError(f"{name}: {field} = {getattr(config, field)!r}, expected a tuple.")
    if config.normalization not in get_args(Normalization):
        raise WeightsError(
            f"{name}: normalization = {config.normalization!r}, expected one of {', '.join(get_args(Normalization))}."
        )
    if not config.features:
        raise WeightsError(f"{name}: features = (), expected at least one of {', '.join(FEATURES)}.")
    unknown = [feature for feature in config.features if not isinstance(feature, str) or feature not in FEATURES]
    if unknown:
        raise WeightsError(f"{name}: unknown features {unknown}; known: {', '.join(FEATURES)}.")
    decays = (*config.momentum_decays, config.second_moment_decay, *config.factored_decays)
    if not all(isinstance(d, (int, float)) and 0.0 <= d < 1.0 for d in decays) or not (
        config.momentum_decays and config.factored_decays
    ):
        raise WeightsError(f"{name}: decays must be numbers in [0, 1), at least one of each kind; got {decays}.")
    if "factored_momentum" in config.features and len(config.momentum_decays) != len(config.factored_decays):
        raise WeightsError(
            f"{name}: factored_momentum pairs momentum_decays {config.momentum_decays} with factored_decays"
            f" {config.factored_decays}; their numbers must be equal."
        )
