"""`celo2 describe`: where a preset sends every parameter of a model, without allocating any."""

import dataclasses

import jax

from celo2_harness import harness
from celo2_harness.lab.errors import InputError, input_errors
from celo2_harness.lab.tasks import MODELS, init_gpt


@dataclasses.dataclass(frozen=True)
class Config:
    """Show where a preset sends every parameter of a model, and what state it keeps."""

    model: str = "nano"
    """Size of the model: nano, small, gpt2 or gpt3-xl."""
    preset: str = "celo2"
    """Optimizer; `celo2 presets` lists them."""
    weights: str | None = None
    """Weights of the learned rule: a name, a file or hf://owner/repo; by default the preset's."""
    weight_decay: float = 0.1
    """Weight decay of hidden matrices."""
    strict: bool = False
    """Refuse parameters that no routing rule matches."""
    per_head: bool = False
    """Treat every attention head as a matrix of its own."""


def run(config: Config) -> int:
    """Prints the report; returns 0."""
    if config.model not in MODELS:
        raise InputError(f"model = {config.model!r}: expected one of {', '.join(MODELS)}")
    params = jax.eval_shape(lambda key: init_gpt(MODELS[config.model], key), jax.random.key(0))
    with input_errors():
        report = harness.describe(
            params,
            config.preset,
            weights=config.weights,
            weight_decay=config.weight_decay,
            strict=config.strict,
            per_head=config.per_head,
        )
    print(report)
    return 0
