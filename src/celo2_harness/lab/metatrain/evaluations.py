"""Scores of thetas along the way, and the choice of the best of them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.metatrain.card import write_weights
from celo2_harness.lab.metatrain.config import config_from
from celo2_harness.lab.metatrain.learned import AnyWeights
from celo2_harness.lab.training.folder import METRICS, Progress, read_header, read_lines

SNAPSHOT_FOLDER = "snapshots"
WEIGHTS_FILE = "weights.celo2"


class Evaluation(NamedTuple):
    """The way in which a run scores its thetas.

    Attributes:
        every: The number of iterations between evaluations; the start and the end are always among them.
        settings: The settings that determine a score, as JSON values.
        score: A function from weights to a number, lower is better; NaN where training with them diverged.
    """

    every: int
    settings: Mapping[str, Any]
    score: Callable[[Any], float]


def with_scores(
    progress: Iterator[Progress],
    evaluation: Evaluation,
    last: int,
    scored: set[int],
    save: Callable[[Path, Any], AnyWeights],
) -> Iterator[Progress]:
    """Adds a line with a score after every step that is one for evaluation.

    Args:
        progress: The run.
        evaluation: The evaluation that scores thetas.
        last: The last step, which is always one for evaluation.
        scored: The steps that have a score already.
        save: A function that writes the weights of a state to a path in the run folder, and returns them.

    Yields:
        What the run says, and after it the score with the path of the weights that have it.
    """
    for now in progress:
        yield now
        if now.step not in scored and (now.step % evaluation.every == 0 or now.step == last):
            path = Path(SNAPSHOT_FOLDER) / f"{now.step:08}.celo2"
            score = evaluation.score(save(path, now.state))
            line = {"kind": "evaluation", "score": score, "snapshot": str(path)}
            yield Progress(now.step, now.state, (line,), text=lambda score=score: f"score {score:.4f}", notable=True)


def select_weights(folder: str | Path, out: str | Path | None = None) -> AnyWeights:
    """Takes the theta with the lowest score of a run as its weights.

    Args:
        folder: A run folder with evaluations.
        out: The weight file to write, beside which its card goes; by default `weights.celo2` of the run folder, in
            place of the last theta.

    Returns:
        The weights; their provenance says which iteration they are of, and its score.

    Raises:
        InputError: If there are no evaluations, or none with a finite score.
        WeightsError: If the weights with the best score are damaged.
        OSError: If a file cannot be written.
    """
    folder = Path(folder)
    settings = read_header(folder)["settings"]
    lines = [line for line in read_lines(folder / METRICS) if line.get("kind") == "evaluation"]
    scored = [line for line in lines if line["score"] is not None]
    if not scored:
        raise InputError(
            f"run = {str(folder)!r}: {len(lines)} evaluations, none with a score, so there is nothing to select; celo2"
            " metatrain --eval-every makes them"
        )
    best, learned = min(scored, key=lambda line: line["score"]), config_from(settings["config"]).learned
    weights = learned.load(folder / best["snapshot"])
    selected = {"score": best["score"], "of": len(lines), "evaluation": settings["evaluation"]}
    weights = dataclasses.replace(weights, provenance={**weights.provenance, "selected": selected})
    write_weights(folder / WEIGHTS_FILE if out is None else Path(out), weights, learned)
    return weights
