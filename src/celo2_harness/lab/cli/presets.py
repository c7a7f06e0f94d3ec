"""`celo2 presets`: what `build` and the commands know by name."""

import dataclasses

from celo2_harness import harness


@dataclasses.dataclass(frozen=True)
class Config:
    """List the presets: what each does to hidden matrices and to the rest."""


def run(config: Config) -> int:
    """Prints two lines per preset; returns 0."""
    del config
    presets = harness.presets()
    width = max(map(len, presets))
    for preset in presets.values():
        rest = preset.hidden if preset.rest is None else preset.rest
        facts = [
            f"hidden: {preset.hidden.optimizer}",
            f"rest: {rest.optimizer} at {rest.learning_rate_factor:g}x",
            f"learning rate {preset.learning_rate:g}",
        ]
        if preset.weights is not None:
            facts.append(f"weights {preset.weights}")
        print(f"{preset.name:<{width}}  {preset.description}\n{'':<{width}}    {'; '.join(facts)}")
    return 0
