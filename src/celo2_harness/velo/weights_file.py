"""Weight files of VeLO, all Flax msgpack, none able to run code.

- `"celo2-harness"`: {"format", "version", "config", "provenance", "theta", "sha256"}; a file says what it is.
- `"published"`, often called theta.state: {"lstm_init_state", "rnn_params", "ff_mod_stack"}; says nothing about itself.
- the same under "params" beside {"gen_id", "step"}, often with a file config.gin beside it.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from celo2_harness.rule import Theta, channel_counts
from celo2_harness.velo.config import (
    NETWORK_SHAPES,
    RULE,
    VELO,
    Affine,
    VeloConfig,
    VeloTheta,
    join_networks,
    split_networks,
    theta_shapes,
)
from celo2_harness.weights import WeightsError
from celo2_harness.weights.weights_file import (
    check_digest,
    named_arrays,
    read_file,
    restore_content,
    with_digest,
    write_content,
)

FORMAT = "celo2-harness velo weights"
VERSION = 1
HUB_FILE = "theta.state"
# Fields of `VeloTheta` -> modules of the published layout.
MODULES = {
    "unused": "linear",
    "message": "linear_1",
    "own": "linear_2",
    "gates": "rnn/linear",
    "controls": "rnn_to_controls",
    "step_size": "step_size",
}
# Settings of a config.gin that change what theta computes, and the fields that they are here.
GIN_FLAGS = {
    "use_bugged_loss_features": "bugged_loss_features",
    "use_bugged_next_lstm_state": "bugged_next_lstm_state",
}


@dataclasses.dataclass(frozen=True)
class VeloWeights:
    """A VeLO: its numbers, its configuration, and how it was made.

    Attributes:
      theta: float32 arrays.
      config: what theta was trained as.
      provenance: free facts about the training run, JSON values.
    """

    theta: VeloTheta
    config: VeloConfig
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"VeloWeights({sum(np.size(x) for x in jax.tree.leaves(self.theta))} numbers, {self.config})"


def load_velo_weights(
    source: str | os.PathLike[str] | VeloWeights,
    *,
    published_as: VeloConfig = VELO,
    expect: VeloConfig | None = None,
) -> VeloWeights:
    """Loads a VeLO from a file or from the Hugging Face hub.

    Args:
      source: a path, "hf://owner/repo" (its theta.state) or "hf://owner/repo/file", or `VeloWeights` (returned
        unchanged). Only an hf:// source uses the network.
      published_as: what a file in a published layout was trained as, since it does not say.
      expect: refuse weights that were trained with another configuration.

    Returns:
      The weights; theta as float32 NumPy arrays.

    Raises:
      WeightsError: no such file, not a weight file, truncated, a missing or extra key, a wrong shape, a number that is
        not finite, flags of a config.gin beside the file that differ from `published_as`, a configuration other than
        `expect`, or one that is not supported.
      ImportError: hf:// without huggingface-hub.
    """
    if isinstance(source, VeloWeights):
        weights, name = source, "the given weights"
        _check(weights, name)
    elif not isinstance(source, (str, os.PathLike)):
        raise WeightsError(f"weights = {source!r}: expected VeloWeights, or a path.")
    else:
        name = os.fspath(source)
        weights = _parse(read_file(name, HUB_FILE), name, published_as)
    if expect is not None:
        _refuse_difference(weights.config, expect, name)
    return weights


def save_velo_weights(
    path: str | os.PathLike[str],
    weights: VeloWeights,
    *,
    layout: Literal["celo2-harness", "published"] = "celo2-harness",
) -> None:
    """Writes a weight file of VeLO, atomically.

    Args:
      path: the file to write.
      weights: what to write.
      layout: "celo2-harness" (says what it is), or "published" (for programs that read theta.state; the configuration
        is lost).

    Raises:
      WeightsError: shapes that do not fit the configuration, or numbers that are not finite.
    """
    path = Path(path)
    _check(weights, str(path))
    theta: VeloTheta = jax.tree.map(lambda x: np.asarray(x, np.float32), weights.theta)
    if layout == "published":
        write_content(path, _published(theta))
        return
    parts = {name: part._asdict() if isinstance(part, Affine) else part for name, part in theta._asdict().items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(dataclasses.asdict(weights.config)),
        "provenance": json.dumps(dict(weights.provenance)),
        "theta": parts,
    }
    write_content(path, with_digest(content))


def _parse(data: bytes, name: str, published_as: VeloConfig) -> VeloWeights:
    content = restore_content(data, name)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{name}: not a weight file of VeLO: expected a mapping, got {type(content).__name__}.")
    provenance: dict[str, Any] = {}
    if isinstance(content.get("format"), str) and content["format"] == FORMAT:
        config, provenance = _header(content, name)
        tree = _mapping(content.get("theta"), VeloTheta._fields, name)
        arrays = {field: tree[field] for field in ("hidden", "cell", "bank")}
        parts: dict[str, Any] = named_arrays(arrays, tuple(arrays), name)
        parts |= {field: Affine(**named_arrays(tree[field], Affine._fields, f"{name}: {field}")) for field in MODULES}
        theta = VeloTheta(**parts)
    else:
        config = published_as
        if "params" in content and "gen_id" in content:
            provenance = {key: _plain(content[key]) for key in ("gen_id", "step") if key in content}
            content = content["params"]
        theta = _from_published(content, name)
        _check_gin(name, config)
    weights = VeloWeights(theta, config, provenance)
    _check(weights, name)
    check_digest(content, name)  # last: the checks before say more
    return weights


def _from_published(content: Any, name: str) -> VeloTheta:
    parts = _mapping(content, ("lstm_init_state", "rnn_params", "ff_mod_stack"), name)
    modules = _mapping(parts["rnn_params"], tuple(MODULES.values()), f"{name}: rnn_params")
    start = _lstm_start(parts["lstm_init_state"], f"{name}: lstm_init_state")
    stack = _mapping(parts["ff_mod_stack"], ("~",), f"{name}: ff_mod_stack")["~"]
    # By number: sorted as words, w0__10 would come before w0__2.
    blocks = tuple(f"w0__{i}" for i in range(len(channel_counts(RULE))))
    bank = named_arrays(stack, blocks + Theta._fields[1:], f"{name}: ff_mod_stack")
    count = len(bank["b0"]) if bank["b0"].ndim else 0
    units = NETWORK_SHAPES.b0
    shapes = dict(zip(blocks, ((n, *units) for n in channel_counts(RULE)), strict=True))
    shapes |= dict(zip(Theta._fields[1:], NETWORK_SHAPES[1:], strict=True))
    for key, shape in shapes.items():
        if bank[key].shape != (count, *shape):
            raise WeightsError(f"{name}: ff_mod_stack: {key} has shape {bank[key].shape}, expected {(count, *shape)}.")
    w0 = np.concatenate([bank[block] for block in blocks], axis=1)
    return VeloTheta(
        **start,  # type: ignore[arg-type]
        **{
            field: Affine(**named_arrays(modules[module], Affine._fields, f"{name}: {module}"))
            for field, module in MODULES.items()
        },
        bank=np.asarray(join_networks(Theta(w0, *(bank[key] for key in Theta._fields[1:])))),
    )


def _lstm_start(tree: Any, name: str) -> dict[str, np.ndarray]:
    """{hidden, cell}, or in the way of early Flax {name, fields, values}, with numbers for keys."""
    if isinstance(tree, Mapping) and "values" in tree and isinstance(tree.get("fields"), Mapping):
        values = _mapping(tree["values"], tuple(map(str, tree["fields"])), name)
        tree = {str(field): values[str(key)] for key, field in tree["fields"].items()}
    arrays = named_arrays(tree, ("hidden", "cell"), name)
    for key, x in arrays.items():
        if x.ndim != 2 or x.shape[0] != 1:
            raise WeightsError(f"{name}: {key} has shape {x.shape}, expected one row.")
    return {key: x[0] for key, x in arrays.items()}


def _published(theta: VeloTheta) -> dict[str, Any]:
    networks = jax.tree.map(np.asarray, split_networks(theta.bank))
    blocks = np.split(networks.w0, np.cumsum(channel_counts(RULE))[:-1], axis=1)
    stack = {f"w0__{i}": block for i, block in enumerate(blocks)} | networks._asdict()
    del stack["w0"]
    return {
        "lstm_init_state": {"hidden": theta.hidden[None], "cell": theta.cell[None]},
        "rnn_params": {module: getattr(theta, field)._asdict() for field, module in MODULES.items()},
        "ff_mod_stack": {"~": stack},
    }


def _header(content: Mapping[str, Any], name: str) -> tuple[VeloConfig, dict[str, Any]]:
    if not isinstance(content.get("version"), int) or content["version"] != VERSION:
        raise WeightsError(
            f"{name}: format version {content.get('version')!r}, this package reads version {VERSION}."
            " Update celo2-harness."
        )
    try:
        fields, provenance = json.loads(content["config"]), json.loads(content["provenance"])
        return velo_config_from(fields), dict(provenance)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{name}: the header cannot be read ({type(error).__name__}: {error}).") from None


def velo_config_from(fields: Any) -> VeloConfig:
    """The configuration that `dataclasses.asdict` and JSON have made a record of.

    Raises:
      ValueError: fields that are missing, unknown, of another type or out of range.
    """
    kinds = {"lstm": int, "bank": int, "ff_mult": (int, float)} | dict.fromkeys(GIN_FLAGS.values(), bool)
    if not isinstance(fields, Mapping) or set(fields) != set(kinds):
        raise ValueError(f"fields {list(fields)}, expected {list(kinds)}")
    for field, kind in kinds.items():
        value = fields[field]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{field} = {value!r}, expected another type")
    if fields["lstm"] < 1 or fields["bank"] < 1 or not np.isfinite(fields["ff_mult"]):
        raise ValueError(f"sizes and factor out of range: {dict(fields)}")
    return VeloConfig(**fields)


def _check_gin(name: str, config: VeloConfig) -> None:
    """A config.gin beside the file knows the flags that the file does not."""
    path = Path(name).with_name("config.gin")
    if name.startswith("hf://") or not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    for flag, field in GIN_FLAGS.items():
        for value in re.findall(rf"^[^#\n]*\b{flag}\s*=\s*(True|False)\b", text, re.MULTILINE):
            if (value == "True") != getattr(config, field):
                raise WeightsError(
                    f"{name}: trained with {flag} = {value} ({path.name} beside it), expected {getattr(config, field)}."
                    f" Load it with published_as=VeloConfig({field}={value}, ...)."
                )


def _refuse_difference(config: VeloConfig, expect: VeloConfig, name: str) -> None:
    for field in dataclasses.fields(VeloConfig):
        got, wanted = getattr(config, field.name), getattr(expect, field.name)
        if got != wanted:
            raise WeightsError(
                f"{name}: trained with {field.name} = {got!r}, expected {wanted!r}."
                " Load weights of that configuration, or build with the configuration of the file."
            )


def _check(weights: VeloWeights, name: str) -> None:
    """Configuration supported, shapes those of the configuration, numbers finite."""
    config = weights.config
    if config.bugged_next_lstm_state:
        raise WeightsError(
            f"{name}: trained with bugged_next_lstm_state = True, expected False: such weights are not supported."
        )
    is_shape = lambda x: type(x) is tuple
    wanted = jax.tree.leaves(theta_shapes(config), is_leaf=is_shape)
    for (path, x), shape in zip(jax.tree_util.tree_flatten_with_path(weights.theta)[0], wanted, strict=True):
        key = jax.tree_util.keystr(path, simple=True, separator=".")
        if np.shape(x) != shape:
            raise WeightsError(
                f"{name}: {key} has shape {np.shape(x)}, expected {shape} for lstm = {config.lstm}, bank ="
                f" {config.bank}. Load it as what it was trained as."
            )
        if not np.all(np.isfinite(x)):
            raise WeightsError(f"{name}: {key} holds {np.sum(~np.isfinite(x))} numbers that are not finite.")


def _mapping(tree: Any, keys: tuple[str, ...], name: str) -> Mapping[str, Any]:
    """The tree, refusing anything but a mapping with these keys."""
    if not isinstance(tree, Mapping):
        raise WeightsError(f"{name}: expected a mapping with the keys {', '.join(keys)}.")
    missing, extra = [key for key in keys if key not in tree], [key for key in tree if key not in keys]
    if missing or extra:
        raise WeightsError(f"{name}: missing keys {missing}, unknown keys {extra}.")
    return tree


def _plain(value: Any) -> Any:
    """JSON has no arrays."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
