"""The card of a weight file: what made it, for people."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from celo2_harness.lab.metatrain.learned import AnyWeights, LearnedRule
from celo2_harness.weights.files import replace_file


def write_weights(path: Path, weights: AnyWeights, learned: LearnedRule) -> None:
    """Writes the weights that a run has made, and their card beside them, with the ending `.md`."""
    # The weights last: a run that has them is not gone on with, so that a card after a kill would stay missing.
    replace_file(path.with_suffix(".md"), make_card(path.stem, weights).encode())
    learned.save(path, weights)


def make_card(name: str, weights: AnyWeights) -> str:
    """Returns a card in Markdown.

    Args:
        name: The heading.
        weights: The weights, with the provenance that `run_metatrain` gives them.
    """
    facts = weights.provenance
    config: dict[str, Any] = facts["config"]
    rows = {
        "variant": config["variant"],
        "numbers": str(sum(np.size(x) for x in jax.tree.leaves(weights.theta))),
        "data": f"{', '.join(facts['sets'])}; SHA-256 of pixels and labels `{facts['data_sha256']}`",
        **({"text": f"SHA-256 `{facts['text_sha256']}`"} if "text_sha256" in facts else {}),
        "start": f"the weights `{facts['start_from']}`" if facts["start_from"] else "random numbers",
        "iterations": f"theta of iteration {facts['iterations']:,} of {config['iterations']:,}, seed {config['seed']}",
        "choice": _choice(facts),
        "outer optimizer": f"AdamW, peak learning rate {config['outer_learning_rate']:g},"
        f" {config['outer_schedule']} schedule",
        "time": f"{facts['seconds']:,.0f} s on {facts['device']}",
        "meta-loss": _losses(facts["final_meta_loss"]),
        "versions": ", ".join(f"{package} {version}" for package, version in facts["versions"].items()),
        **_digest(facts),
        "commit": f"`{facts['commit']}`" if facts["commit"] else "not run from a checkout",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# {name}\n\n| | |\n| --- | --- |\n{table}\n\nThe header inside the file holds the whole configuration.\n"


def _digest(facts: Any) -> dict[str, str]:
    """The digest that `benchmarks/reproduce_weights.py` checks."""
    digest = facts.get("theta_digest")
    return {f"SHA-256 of theta at iteration {digest['iteration']}": f"`{digest['sha256']}`"} if digest else {}


def _choice(facts: Any) -> str:
    if "selected" not in facts:
        return "the last theta, no selection"
    chosen = facts["selected"]
    settings = ", ".join(f"{name} {value}" for name, value in chosen["evaluation"].items())
    return f"the best of {chosen['of']} evaluated thetas, score {chosen['score']:.4f} ({settings})"


def _losses(losses: Any) -> str:
    return ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()) if losses else "not measured"
