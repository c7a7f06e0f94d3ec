"""`celo2 weights`: what a weight file holds, and copies of it in another layout."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np

from celo2_harness.lab.errors import InputError, input_errors
from celo2_harness.weights import LinearWeights, Weights, bundled_weights, load_weights, save_weights


@dataclasses.dataclass(frozen=True)
class Config:
    """Show what a weight file was trained as, or write it in another layout."""

    source: str | None = None
    """A bundled name, a file, or hf://owner/repo; by default the bundled files are listed."""
    out: Path | None = None
    """Write the weights to this file."""
    layout: Literal["celo2-harness", "published"] = "celo2-harness"
    """Layout of that file."""


def run(config: Config) -> int:
    """Prints the facts of one file or of all bundled ones; returns 0."""
    if config.out is not None and config.source is None:
        raise InputError("out needs source: name the weights to write")
    sources = bundled_weights() if config.source is None else (config.source,)
    for source in sources:
        try:
            with input_errors():
                weights = load_weights(source)
        except ImportError as error:
            raise InputError(str(error)) from error
        print(_facts(source, weights))
    if config.out is not None:
        with input_errors():
            save_weights(config.out, weights, layout=config.layout)
        print(f"written: {config.out}")
    return 0


def _facts(source: str, weights: Weights | LinearWeights) -> str:
    config = weights.config
    if isinstance(weights, LinearWeights):
        own = {name: ", ".join(f"{number:g}" for number in x) for name, x in weights.theta._asdict().items()}
    else:
        own = {"hidden units": np.shape(weights.theta.b0)[0]}
    values = {name.replace("_", " "): value for name, value in vars(config).items()}
    rows = {
        "kind": "linear rule" if isinstance(weights, LinearWeights) else "network",
        "numbers": sum(np.size(x) for x in weights.theta),
        **own,
        **{name: ", ".join(map(str, x)) if isinstance(x, tuple) else x for name, x in values.items()},
        **{name: json.dumps(value) for name, value in weights.provenance.items()},
    }
    width = max(map(len, rows))
    return "\n".join([source, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])
