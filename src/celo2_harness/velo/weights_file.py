"""Weight files of VeLO.

- `"celo2-harness"`: says what it is (see `weights.container`).
- `"published"`, often called theta.state: {"lstm_init_state", "rnn_params", "ff_mod_stack"}; says nothing about itself.
- the same under "params" beside {"gen_id", "step"}, as the released file has it, with a file config.gin beside it.
"""

import dataclasses
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
    VeloConfig,
    VeloTheta,
    join_networks,
    split_networks,
    theta_shapes,
)
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

FORMAT = "celo2-harness velo weights"
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


@dataclasses.dataclass(frozen=True, eq=False)
class VeloWeights(LearnedWeights):
    """A VeLO: its numbers, its configuration, and how it was made.

    Weights are equal, and have the same hash, where numbers and configuration are the same.

    Attributes:
        theta: The arrays, float32.
        config: The configuration that theta was trained with.
        provenance: Free facts about the training run, JSON values.
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
        source: A path, "hf://owner/repo" (its theta.state) or "hf://owner/repo/file", or `VeloWeights` (returned
            unchanged). Only an hf:// source uses the network.
        published_as: The configuration of a file in a published layout, since it does not say.
        expect: A configuration; weights that were trained with another one are refused.

    Returns:
        The weights; theta as float32 NumPy arrays.

    Raises:
        WeightsError: If there is no such file, or the file is no weight file, is truncated, lacks a key, has an extra
            one, a wrong shape or a number that is not finite; if flags of a config.gin beside the file differ from
            `published_as`; or if the configuration is other than `expect` or not supported.
        ImportError: If huggingface-hub is missing, which hf:// needs.
    """
    if isinstance(source, VeloWeights):
        weights, name = source, "the given weights"
        _check(weights.theta, weights.config, name)
    elif not isinstance(source, (str, os.PathLike)):
        raise WeightsError(f"weights = {source!r}: expected VeloWeights, or a path.")
    else:
        name = os.fspath(source)
        weights = _parse(read_file(name, HUB_FILE), name, published_as)
    if expect is not None:
        refuse_difference(weights.config, expect, name)
    return weights


def save_velo_weights(
    path: str | os.PathLike[str],
    weights: VeloWeights,
    *,
    layout: Literal["celo2-harness", "published"] = "celo2-harness",
) -> None:
    """Writes a weight file of VeLO, atomically.

    Args:
        path: The file to write.
        weights: The weights to write.
        layout: "celo2-harness" (says what it is), or "published" (for programs that read theta.state; the
            configuration is lost).

    Raises:
        WeightsError: If shapes do not fit the configuration, or numbers are not finite.
    """
    _check(weights.theta, weights.config, os.fspath(path))
    if layout == "published":
        write(path, _published(jax.tree.map(lambda x: np.asarray(x, np.float32), weights.theta)))
    else:
        write(path, pack(FORMAT, weights.config, weights.provenance, as_mapping(weights.theta)))


def _check(theta: VeloTheta, config: VeloConfig, name: str) -> None:
    _check_config(config, name)
    read_arrays(as_mapping(theta), theta_shapes(config), name)


def _check_config(config: VeloConfig, name: str) -> None:
    if config.bugged_next_lstm_state:
        raise WeightsError(
            f"{name}: trained with bugged_next_lstm_state = True, expected False: such weights are not supported."
        )
    if config.lstm < 1 or config.bank < 1 or not np.isfinite(config.ff_mult):
        raise WeightsError(f"{name}: {config}: expected sizes of at least 1 and a finite factor.")


def _parse(data: bytes, name: str, published_as: VeloConfig) -> VeloWeights:
    content = restore(data, name)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{name}: not a weight file of VeLO: expected a mapping, got {type(content).__name__}.")
    if is_packed(content, FORMAT):
        config, provenance = unpack(content, VeloConfig, name)
        _check_config(config, name)
        theta = read_arrays(content.get("theta"), theta_shapes(config), name)
        check_digest(content, name)  # last: the checks before say more
        return VeloWeights(theta, config, provenance)
    _check_config(published_as, name)
    _check_gin(name, published_as)
    provenance = {}
    if "params" in content and "gen_id" in content:
        provenance = {key: np.asarray(content[key]).tolist() for key in ("gen_id", "step") if key in content}
        content = content["params"]
    return VeloWeights(_from_published(content, published_as, name), published_as, provenance)


def _from_published(content: Any, config: VeloConfig, name: str) -> VeloTheta:
    shapes = theta_shapes(config)
    start = content.get("lstm_init_state") if isinstance(content, Mapping) else None
    if isinstance(start, Mapping) and "values" in start and isinstance(start.get("fields"), Mapping):
        # Early Flax wrote {name, fields, values}, with numbers for keys.
        values = start["values"] if isinstance(start["values"], Mapping) else {}
        start = {str(field): values.get(str(key)) for key, field in start["fields"].items()}
        content = {**content, "lstm_init_state": start}
    # By number: sorted as words, w0__10 would come before w0__2.
    blocks = {f"w0__{i}": (config.bank, n, *NETWORK_SHAPES.b0) for i, n in enumerate(channel_counts(RULE))}
    layers = {key: (config.bank, *shape) for key, shape in NETWORK_SHAPES._asdict().items() if key != "w0"}
    parts = read_arrays(
        content,
        {
            "lstm_init_state": {"hidden": (1, config.lstm), "cell": (1, config.lstm)},
            "rnn_params": {module: getattr(shapes, field) for field, module in MODULES.items()},
            "ff_mod_stack": {"~": blocks | layers},
        },
        f"{name}, as lstm = {config.lstm} and bank = {config.bank}",
    )
    bank = parts["ff_mod_stack"]["~"]
    w0 = np.concatenate([bank[block] for block in blocks], axis=1)
    return VeloTheta(
        hidden=parts["lstm_init_state"]["hidden"][0],
        cell=parts["lstm_init_state"]["cell"][0],
        **{field: parts["rnn_params"][module] for field, module in MODULES.items()},
        bank=np.asarray(join_networks(Theta(w0, *(bank[key] for key in layers)))),
    )


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
