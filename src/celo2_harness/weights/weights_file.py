"""Weight files of learned rules: the numbers together with what they were trained as.

A file says whether it holds a network or a linear rule (see `linear_file`). Of networks two layouts are read and
written: our own, which says what it is (see `container`), and "published", {"ff_mod_stack":
{"~": {w0__0 .. w0__13, b0, w1, b1, w2, b2}}}, the layout of the published Celo2, which says nothing about itself and is
taken to have the published configuration.
"""

import dataclasses
import os
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal, TypeVar, overload

import numpy as np

from celo2_harness.rule import LinearConfig
from celo2_harness.rule.config import CELO2_CONFIG, RuleConfig, Theta
from celo2_harness.rule.features import FEATURES, channel_counts
from celo2_harness.weights.container import (
    LearnedWeights,
    WeightsError,
    as_mapping,
    check_digest,
    is_packed,
    pack,
    read_arrays,
    read_file,
    refuse_difference,
    restore,
    unpack,
    write,
)
from celo2_harness.weights.linear_file import FORMAT as LINEAR_FORMAT, LinearWeights, pack_linear, parse_linear

FORMAT = "celo2-harness weights"
HUB_FILE = "weights.celo2"


@dataclasses.dataclass(frozen=True, eq=False)
class Weights(LearnedWeights):
    """A learned network: its numbers, its configuration, and how it was made.

    Weights are equal, and have the same hash, where numbers and configuration are the same.

    Attributes:
        theta: The arrays, float32.
        config: Features, decays and normalisation that theta was trained with.
        provenance: Free facts about the training run (data, iterations, seed, ...), JSON values.

    Example:
        >>> load_weights("celo2") == load_weights("celo2")
        True
    """

    theta: Theta
    config: RuleConfig = CELO2_CONFIG
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        size = sum(np.size(x) for x in self.theta)
        return f"Weights({size} numbers, hidden {np.shape(self.theta.b0)[0]}, {self.config})"


_Source = str | os.PathLike[str] | Weights | LinearWeights
Kind = TypeVar("Kind", Weights, LinearWeights)


def bundled_weights() -> tuple[str, ...]:
    """Names of the weight files inside the package.

    Example:
        >>> "celo2" in bundled_weights()
        True
    """
    folder = resources.files("celo2_harness.weights")
    return tuple(sorted(f.name.removesuffix(".celo2") for f in folder.iterdir() if f.name.endswith(".celo2")))


@overload
def load_weights(source: _Source, *, kind: type[Kind], expect: RuleConfig | LinearConfig | None = None) -> Kind: ...
@overload
def load_weights(
    source: _Source, *, kind: None = None, expect: RuleConfig | LinearConfig | None = None
) -> Weights | LinearWeights: ...
def load_weights(source: Any, *, kind: Any = None, expect: RuleConfig | LinearConfig | None = None) -> Any:
    """Loads a learned rule by bundled name, from a file, or from the Hugging Face hub.

    Args:
        source: A bundled name ("celo2"), a path, "hf://owner/repo" or "hf://owner/repo/file", or `Weights` or
            `LinearWeights` (returned unchanged). Only an hf:// source uses the network.
        kind: `Weights` or `LinearWeights`; the other kind of rule is refused. None: either.
        expect: A configuration; weights that were trained with another one are refused.

    Returns:
        `Weights` or `LinearWeights`, as the file says; theta as float32 NumPy arrays.

    Raises:
        WeightsError: If there is no such name or file, or the file is no weight file, is truncated, lacks a key, has
            an extra one, a wrong shape, a number that is not finite, an unknown feature or version, another kind than
            `kind`, or a configuration other than `expect`.
        ImportError: If huggingface-hub is missing, which hf:// needs.

    Example:
        >>> weights = load_weights("celo2", kind=Weights)
        >>> weights.theta.w0.shape, weights.config.second_moment_decay
        ((30, 8), 0.95)
    """
    if isinstance(source, (Weights, LinearWeights)):
        weights, name = source, "the given weights"
    elif not isinstance(source, (str, os.PathLike)):
        raise WeightsError(f"weights = {source!r}: expected Weights, LinearWeights, a name or a path.")
    else:
        name = os.fspath(source)
        weights = _parse(_read(name), name)
    if kind is not None and not isinstance(weights, kind):
        raise WeightsError(
            f"{name}: {type(weights).__name__}, expected {kind.__name__}. A network (Weights) goes to celo2_direction,"
            " a linear rule (LinearWeights) to linear_direction; the preset celo2 takes either."
        )
    if expect is not None:
        refuse_difference(weights.config, expect, name)
    return weights


def save_weights(
    path: str | os.PathLike[str],
    weights: Weights | LinearWeights,
    *,
    layout: Literal["celo2-harness", "published"] = "celo2-harness",
) -> None:
    """Writes a weight file, atomically.

    Args:
        path: The file to write.
        weights: The weights to write.
        layout: "celo2-harness" (says what it is), or "published" (for programs that read the published file; the
            configuration is lost, so only the published one is accepted).

    Raises:
        WeightsError: If shapes do not fit the configuration, numbers are not finite, or the published layout cannot
            express the configuration.

    Example:
        >>> path = str(getfixture("tmp_path") / "copy.celo2")
        >>> save_weights(path, load_weights("celo2"))
        >>> load_weights(path).config == load_weights("celo2").config
        True
    """
    name = os.fspath(path)
    if isinstance(weights, LinearWeights):
        if layout == "published":
            raise WeightsError(f'{name}: the published layout holds networks only. Save with layout="celo2-harness".')
        write(path, pack_linear(weights, name))
        return
    check_config(weights.config, name)
    theta = as_mapping(weights.theta)
    read_arrays(theta, _shapes(theta, weights.config, name), name)
    if layout == "published":
        if weights.config != CELO2_CONFIG:
            raise WeightsError(
                f"{path}: the published layout cannot say {weights.config}, only the published configuration."
                ' Save with layout="celo2-harness".'
            )
        blocks = np.split(theta.pop("w0"), np.cumsum(channel_counts(weights.config))[:-1])
        write(path, {"ff_mod_stack": {"~": {f"w0__{i}": block for i, block in enumerate(blocks)} | theta}})
    else:
        write(path, pack(FORMAT, weights.config, weights.provenance, theta))


def _read(source: str) -> bytes:
    if source in bundled_weights():
        return (resources.files("celo2_harness.weights") / f"{source}.celo2").read_bytes()
    return read_file(source, HUB_FILE, f"one of the bundled names {', '.join(bundled_weights())}, ")


def _parse(data: bytes, name: str) -> Weights | LinearWeights:
    content = restore(data, name)
    if is_packed(content, LINEAR_FORMAT):
        return parse_linear(content, name)
    if is_packed(content, FORMAT):
        config, provenance = unpack(content, RuleConfig, name)
        check_config(config, name)
        tree = content.get("theta")
        theta = read_arrays(tree, _shapes(tree, config, name), name)
        check_digest(content, name)  # last: the checks before say more
        return Weights(theta, config, provenance)
    if not isinstance(content, Mapping) or "ff_mod_stack" not in content:
        raise WeightsError(
            f"{name}: not a weight file of a learned rule: expected the key 'format' = {FORMAT!r} or"
            f" {LINEAR_FORMAT!r}, or 'ff_mod_stack'."
        )
    stack = content["ff_mod_stack"].get("~") if isinstance(content["ff_mod_stack"], Mapping) else None
    # The first layer is one block per feature.
    shapes = _shapes(stack, CELO2_CONFIG, name)._asdict()
    hidden = shapes.pop("w0")[1]
    blocks = {f"w0__{i}": (count, hidden) for i, count in enumerate(channel_counts(CELO2_CONFIG))}
    parts = read_arrays(stack, blocks | shapes, name)
    return Weights(Theta(np.concatenate([parts.pop(block) for block in blocks]), **parts))


def _shapes(theta: Any, config: RuleConfig, name: str) -> Theta:
    """The shapes of a theta with as many hidden units and outputs as this one."""
    sizes = {"b0": 1, "b2": 1}  # what is missing is refused later, with all keys that are
    for key in sizes:
        if isinstance(theta, Mapping) and key in theta:
            if np.ndim(theta[key]) != 1 or not np.size(theta[key]):
                raise WeightsError(f"{name}: {key} is not an array with one axis, or it is empty.")
            sizes[key] = np.size(theta[key])
    inputs, hidden, outputs = sum(channel_counts(config)), sizes["b0"], sizes["b2"]
    shapes: Any = ((inputs, hidden), (hidden,), (hidden, hidden), (hidden,), (hidden, outputs), (outputs,))
    return Theta(*shapes)


def check_config(config: RuleConfig, name: str) -> None:
    """Refuses a configuration that no rule can have.

    Raises:
        WeightsError: If a feature is unknown, decays are out of range, or numbers of decays do not pair.
    """
    unknown = [feature for feature in config.features if feature not in FEATURES]
    if unknown or not config.features:
        raise WeightsError(f"{name}: unknown features {unknown}; expected at least one of {', '.join(FEATURES)}.")
    decays = (*config.momentum_decays, config.second_moment_decay, *config.factored_decays)
    if not all(0.0 <= d < 1.0 for d in decays) or not (config.momentum_decays and config.factored_decays):
        raise WeightsError(f"{name}: decays must be numbers in [0, 1), at least one of each kind; got {decays}.")
    if "factored_momentum" in config.features and len(config.momentum_decays) != len(config.factored_decays):
        raise WeightsError(
            f"{name}: factored_momentum pairs momentum_decays {config.momentum_decays} with factored_decays"
            f" {config.factored_decays}; their numbers must be equal."
        )
