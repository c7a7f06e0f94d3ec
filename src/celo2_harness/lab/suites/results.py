"""Results as tables need them: records sorted by task, and reduced to a row per optimizer."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites.rows import Row, first_at_or_below, summarize, weight_decay
from celo2_harness.lab.suites.single import settings_key
from celo2_harness.lab.tasks import MODELS
from celo2_harness.lab.training.settings import first_difference

Record = Mapping[str, Any]

# What has no say in which optimizer it is: the search, and the length that the task has too.
_SEARCHED = ("learning_rate", "weight_decay", "total_steps")
# What stands for the same as no entry.
_DEFAULTS = {"state_dtype": "float32", "weights": None}


class Results(NamedTuple):
    """The runs of one task.

    Attributes:
        title: What to call the task.
        unit: Of its loss.
        steps: The length of the runs.
        baseline: The optimizer that others are timed to.
        rival: The optimizer that differences are taken to.
        records: The runs, each with the label of its row for a `name`.
        rows: One for each optimizer.
    """

    title: str
    unit: str
    steps: int
    baseline: str
    rival: str
    records: list[dict[str, Any]]
    rows: list[Row]

    def searched(self) -> list[dict[str, Any]]:
        """Returns the runs of the search: those of the report would favour the trials that they are of."""
        return [r for r in self.records if r["seed"] in r.get("selection_seeds", [r["seed"]])]

    def runs_of(self, row: Row) -> list[dict[str, Any]]:
        """Returns the runs that a row is about."""
        trial = (row.name, row.learning_rate, row.weight_decay)
        return [
            r
            for r in self.records
            if (r["name"], r["learning_rate"], weight_decay(r)) == trial and r["seed"] in row.finals
        ]


def sort_results(records: Sequence[Record], without_weights: Collection[str] = ()) -> list[Results]:
    """Sorts records by task, and reduces those of each task to rows.

    Runs belong to one task if all of their settings but the optimizer, the seed and the interval of evaluations are
    the same, and to one row if the optimizer is the same but for learning rate and weight decay. What differs under one
    name is put behind it.

    Args:
        records: From `read_results`.
        without_weights: Presets that have no learned rule, for which weights mean nothing.

    Returns:
        One entry per task, in the order of the records.

    Raises:
        InputError: if records of one optimizer on one task come from different selections.
    """
    tasks: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        tasks.setdefault(settings_key(_task_settings(record)), []).append(dict(record))
    titles = _titles(list(tasks.values()))
    return [_sort_task(title, group, without_weights) for title, group in zip(titles, tasks.values(), strict=True)]


def _sort_task(title: str, records: list[dict[str, Any]], without_weights: Collection[str]) -> Results:
    labels = _labels(records, without_weights)
    for record in records:
        record["name"] = labels[settings_key({"name": record["name"], **_signature(record, without_weights)})]
    baseline = next((r["baseline"] for r in records if "baseline" in r), "adamw")
    rival = next((r["rival"] for r in records if "rival" in r), "muon")
    rows, groups = [], {}
    for record in records:
        groups.setdefault(record["name"], []).append(record)
    for name, group in groups.items():
        selections = {tuple(r["selection_seeds"]) for r in group if _is_split(r)}
        if len(selections) > 1 or (selections and not all(map(_is_split, group))):
            raise InputError(
                f"{title}: runs of {name} come from suites with different seeds for the selection; "
                "give them different labels, or report them one by one"
            )
        selection = next(iter(selections), None)
        try:
            rows += summarize(group, selection_seeds=selection)
        except ValueError as error:
            raise InputError(f"{title}: {error}") from None
    target = next((row.validation_loss for row in rows if row.name == baseline), math.nan)
    target = target if math.isfinite(target) else -math.inf  # which nobody reaches
    rows = [row._replace(steps_to_baseline=first_at_or_below(row.curve, target)) for row in rows]
    return Results(
        title=title,
        unit=next((r["unit"] for r in records if "unit" in r), "nats per byte"),
        steps=records[0]["settings"]["run"]["steps"],
        baseline=baseline,
        rival=rival,
        records=records,
        rows=rows,
    )


def _is_split(record: Record) -> bool:
    return set(record.get("selection_seeds", ())) != set(record.get("report_seeds", ()))


def _task_settings(record: Record) -> dict[str, Any]:
    settings = {name: value for name, value in record["settings"].items() if name != "optimizer"}
    settings["run"] = {"steps": settings["run"]["steps"]}
    return settings


def _titles(groups: Sequence[Sequence[Record]]) -> list[str]:
    titles = [next((r["task"] for r in group if "task" in r), None) or _guess(group[0]) for group in groups]
    result = []
    for i, title in enumerate(titles):
        same = [j for j, other in enumerate(titles) if other == title and j != i]
        mine, parts = _task_settings(groups[i][0]), []
        for j in same:
            difference = first_difference(mine, _task_settings(groups[j][0]))
            assert difference is not None  # or they would be one group
            name, value, _ = difference
            parts.append(f"{name.rpartition('.')[2]} {_short(value)}")
        result.append(title + (f" ({', '.join(dict.fromkeys(parts))})" if parts else ""))
    return result


def _guess(record: Record) -> str:
    """The task of a record that has no name for it: only language models were trained without one."""
    model = record["settings"].get("model")
    size = next((name for name, config in MODELS.items() if dataclasses.asdict(config) == model), None)
    return f"language_model {size}" if size else "language_model"


def _signature(record: Record, without_weights: Collection[str]) -> dict[str, Any]:
    """What makes the optimizer of a record, but for the search."""
    settings = record["settings"]["optimizer"]
    skipped = set(_SEARCHED)
    if str(settings.get("preset")) in without_weights:
        skipped |= {"weights", "weights_sha256"}
    return {
        name: value
        for name, value in settings.items()
        if name not in skipped and not (name in _DEFAULTS and value == _DEFAULTS[name])
    }


def _labels(records: Sequence[Record], without_weights: Collection[str]) -> dict[str, str]:
    """What to call each optimizer: its name, weights that come from a file, and whatever else tells it from others."""
    signatures: dict[str, tuple[str, dict[str, Any]]] = {}
    for record in records:
        signature = _signature(record, without_weights)
        signatures[settings_key({"name": record["name"], **signature})] = record["name"], signature
    labels = {}
    for key, (name, signature) in signatures.items():
        weights = signature.get("weights")
        labels[key] = name
        if weights and name == signature.get("preset") and ("/" in weights or "." in weights):
            labels[key] = f"{name} ({_short(weights)})"
    for key, label in list(labels.items()):
        others = [signatures[k][1] for k, other in labels.items() if other == label and k != key]
        mine, parts = signatures[key][1], []
        for other in others:
            difference = first_difference(mine, other)
            if difference:
                name, value, _ = difference
                parts.append(f"{name.rpartition('.')[2]} {'default' if value == 'absent' else _short(value)}")
        if parts:
            signatures[key] = (f"{label} ({', '.join(dict.fromkeys(parts))})", mine)
        else:
            signatures[key] = (label, mine)
    return {key: label for key, (label, _) in signatures.items()}


def _short(value: Any) -> str:
    """A path by the name of its file, or of its folder where the file is called as all others are."""
    text = str(value)
    if "/" not in text and not text.endswith((".celo2", ".state")):
        return text[:12] if len(text) > 24 else text
    path = Path(text)
    return path.parent.name if path.stem == "weights" and path.parent.name else path.stem
