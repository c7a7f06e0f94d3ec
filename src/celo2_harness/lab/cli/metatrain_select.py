"""`celo2 metatrain select`: the best evaluated rule of a run as its weights."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from celo2_harness.lab.errors import input_errors
from celo2_harness.lab.metatrain import select_weights


@dataclass(frozen=True)
class Config:
    """Take the rule with the lowest score of a run, and write it with a card beside it."""

    run: tyro.conf.Positional[Path]
    """Folder of a run that was started with --eval-every."""
    out: Path | None = None
    """Weight file to write; by default weights.celo2 of the run, in place of the last rule."""


def run(config: Config) -> int:
    """Selects; returns 0."""
    with input_errors():
        weights = select_weights(config.run, config.out)
    chosen = weights.provenance["selected"]
    print(f"iteration {weights.provenance['iterations']}: score {chosen['score']:.4f}, the best of {chosen['of']}")
    print(f"weights: {config.run / 'weights.celo2' if config.out is None else config.out}")
    return 0
