"""Judging thetas along the way on a task of the caller's, and choosing the best of them."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from celo2_harness.lab.metatrain.card import write_weights
from celo2_harness.lab.metatrain.errors import RunError
from celo2_harness.lab.metatrain.learned import AnyWeights, load_rule, save_rule
from celo2_harness.lab.training.settings import first_difference
from celo2_harness.weights.files import replace_file

EVALUATIONS_FILE = "evaluations.jsonl"
SNAPSHOT_FOLDER = "snapshots"


class Evaluation(NamedTuple):
    """How a run judges its thetas.

    Attributes:
      every: iterations between evaluations; the start and the end are always among them.
      settings: what determines a score, JSON values.
      score: from weights to a number, lower is better; NaN where training with them diverged, None if it was stopped.
    """

    every: int
    settings: Mapping[str, Any]
    score: Callable[[Any], float | None]


def read_evaluations(out: Path) -> list[dict[str, Any]]:
    """The evaluations of a run folder; a last line that a kill has cut short is left out.

    Raises:
      RunError: a line that is something else.
    """
    path = out / EVALUATIONS_FILE
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            record = None
        if not _is_record(record):
            raise RunError(f"{path} is damaged: line {number} is no evaluation. Mend or remove the line.")
        records.append(record)
    return records


def _is_record(record: Any) -> bool:
    kinds = {"iteration": int, "score": (int, float, type(None)), "snapshot": str, "evaluation": dict}
    return isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in kinds.items())


class Judge:
    """Evaluates thetas of a run; those that were evaluated before are not again, since they are the same bits.

    Args:
      out: the run folder.
      evaluation: how; None for not at all.
      last: the iteration that is evaluated besides multiples of `every`.

    Raises:
      RunError: the folder has evaluations with other settings.
    """

    def __init__(self, out: Path, evaluation: Evaluation | None, last: int):
        self._out, self._evaluation, self._last = out, evaluation, last
        self._records = read_evaluations(out)
        if evaluation is None:
            return
        settings = json.loads(json.dumps(evaluation.settings))
        for record in self._records:
            if difference := first_difference(record["evaluation"], settings):
                name, old, new = difference
                raise RunError(
                    f"{out / EVALUATIONS_FILE}: evaluated with {name} = {old}, asked for {new}. Give the same, or move"
                    " the file away."
                )

    def due(self, iteration: int) -> bool:
        """Whether the theta of an iteration has to be evaluated."""
        if self._evaluation is None or any(record["iteration"] == iteration for record in self._records):
            return False
        return iteration % self._evaluation.every == 0 or iteration == self._last

    def evaluate(self, iteration: int, weights: AnyWeights) -> dict[str, Any] | None:
        """Saves a snapshot and its score. Returns the record, or None if the evaluation was stopped."""
        assert self._evaluation is not None
        name = f"{SNAPSHOT_FOLDER}/{iteration:08}.celo2"
        (self._out / SNAPSHOT_FOLDER).mkdir(exist_ok=True)
        save_rule(self._out / name, weights)
        score = self._evaluation.score(weights)
        if score is None:
            return None
        record = {
            "iteration": iteration,
            "score": score if math.isfinite(score) else None,
            "snapshot": name,
            "evaluation": dict(self._evaluation.settings),
        }
        self._records.append(record)
        self._records.sort(key=lambda record: record["iteration"])
        lines = "".join(json.dumps(record) + "\n" for record in self._records)
        replace_file(self._out / EVALUATIONS_FILE, lines.encode())
        return record


def select_weights(run: str | Path, out: str | Path | None = None) -> AnyWeights:
    """Takes the theta with the lowest score of a run as its weights.

    Args:
      run: the run folder, with evaluations.
      out: the weight file to write, and a card beside it with the same name and `.md`; by default `weights.celo2` of
        the run folder, in place of the last theta.

    Returns:
      The weights; their provenance says which iteration they are of, and its score.

    Raises:
      RunError: no evaluations, or none with a finite score.
      WeightsError: a damaged snapshot.
      OSError: files that cannot be written.
    """
    run = Path(run)
    records = read_evaluations(run)
    scored = [record for record in records if record["score"] is not None]
    if not scored:
        raise RunError(
            f"run = {str(run)!r}: {len(records)} evaluations, none with a score, so there is nothing to select."
            f" celo2 metatrain --eval-every writes them to {EVALUATIONS_FILE}."
        )
    best = min(scored, key=lambda record: record["score"])
    weights = load_rule(run / best["snapshot"])
    selected = {"score": best["score"], "of": len(records), "evaluation": best["evaluation"]}
    weights = dataclasses.replace(weights, provenance={**weights.provenance, "selected": selected})
    write_weights(run / "weights.celo2" if out is None else Path(out), weights)
    return weights
