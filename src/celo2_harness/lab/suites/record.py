"""Records: what is kept of a finished run, and the files that hold them."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.training.folder import METRICS, read_lines
from celo2_harness.lab.training.locks import append_line
from celo2_harness.lab.training.reading import read
from celo2_harness.lab.training.settings import settings_key
from celo2_harness.weights.files import replace_file

RECORDS = "runs.jsonl"
FAILURES = ("diverged", "failed")
"""How a run can end without a final loss: its held-out loss was no finite number, or it stopped with an error."""

Curve = tuple[tuple[int, float | None], ...]
"""Pairs of step and value; None stands for a value that was no finite number."""


@dataclass(frozen=True)
class Record:
    """One run, of a task or of an agent.

    Attributes:
        name: The optimizer, as tables call it.
        status: "finished", "diverged" (the held-out loss was no finite number, and the run ended there), "failed" (it
            stopped with an error) or "unfinished".
        settings: The settings that determine its numbers: tables "optimizer", with a "learning_rate", and "run",
            with "steps" and "seed"; of an agent "environment", with the "game"; and what else the task says.
        task: The task, as tables call it.
        unit: The unit of the loss, for example "nats per byte".
        selection_seeds: The seeds that chose the best trial of the suite.
        report_seeds: The seeds that the best trial is shown on.
        baseline: The optimizer that others are timed to.
        reference: The optimizer that differences are taken to.
        error: The error of a run that failed.
        validation: The held-out loss.
        parameter_rms: The root mean square of the parameters.
        training: The mean training loss of the steps since the evaluation before.
        training_peak: The largest training loss of those steps.
        parameter_bytes: The memory of the parameters.
        state_bytes: The memory of the optimizer's state.
        guarded_steps: The number of steps that a guard skipped or clipped; None without a guard.
        step_milliseconds: The median time of a step, without compilation.
        seconds: The time of everything, compilation included.
        reached: The agent steps taken.
        episode_steps: The agent step at which each episode was over.
        returns: The return of each episode.
        versions: The versions of packages that it was made with.
        device: The device that it was made on.
        commit: The commit that it was made with.
    """

    name: str
    status: Literal["finished", "diverged", "failed", "unfinished"]
    settings: Mapping[str, Any]
    task: str = ""
    unit: str = "nats per byte"
    selection_seeds: tuple[int, ...] = ()
    report_seeds: tuple[int, ...] = ()
    baseline: str = "adamw"
    reference: str = "muon"
    error: str | None = None
    validation: Curve = ()
    parameter_rms: Curve = ()
    training: Curve = ()
    training_peak: Curve = ()
    parameter_bytes: int = 0
    state_bytes: int = 0
    guarded_steps: int | None = None
    step_milliseconds: float | None = None
    seconds: float | None = None
    reached: int | None = None
    episode_steps: tuple[int, ...] = ()
    returns: tuple[float, ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    device: str = "unknown device"
    commit: str | None = None

    def __post_init__(self):
        try:
            optimizer, run = self.settings["optimizer"], self.settings["run"]
            numbers = isinstance(optimizer["learning_rate"], float | int) and isinstance(run["steps"], int)
            fits = numbers and isinstance(run["seed"], int)
            fits = fits and isinstance(self.settings.get("environment", {"game": ""})["game"], str)
        except (KeyError, TypeError):
            fits = False
        if not fits:
            raise InputError("settings: expected `optimizer` with a learning_rate, `run` with steps and seed")
        if len(self.returns) != len(self.episode_steps):
            raise InputError("returns and episode_steps differ in length")
        if not self.is_agent and self.status == "finished" and not math.isfinite(self.final_loss):
            raise InputError("a finished run without a final held-out loss")

    @property
    def is_agent(self) -> bool:
        """Whether it is a run of reinforcement learning."""
        return "environment" in self.settings

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return float(self.settings["optimizer"]["learning_rate"])

    @property
    def weight_decay(self) -> float | None:
        """The weight decay; None where the settings do not say."""
        return self.settings["optimizer"].get("weight_decay")

    @property
    def seed(self) -> int:
        """The seed of the initial parameters and the batches."""
        return self.settings["run"]["seed"]

    @property
    def steps(self) -> int:
        """The length of the run."""
        return self.settings["run"]["steps"]

    @property
    def final_loss(self) -> float:
        """The last held-out loss; infinite if the run has none."""
        last = self.validation[-1][1] if self.validation and self.status == "finished" else None
        return math.inf if last is None else last

    def to_json(self) -> dict[str, Any]:
        """Returns the record as JSON can hold it, without the fields that have their defaults."""
        fields = {field.name: field for field in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in fields}
        return {name: value for name, value in values.items() if value != fields[name].default and value != {}}

    @classmethod
    def from_json(cls, table: Any, where: str = "") -> "Record":
        """Makes a record of what JSON holds.

        Args:
            table: The table.
            where: Where it stands, for messages.

        Raises:
            InputError: If the table is no record; the message names the key.
        """
        return read(cls, table, where)

    @classmethod
    def from_run(
        cls, name: str, header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], **facts: Any
    ) -> "Record":
        """Makes a record of the metrics of a run.

        Args:
            name: The optimizer, as tables call it.
            header: The first line of the metrics.
            lines: The other lines.
            **facts: Further fields of the record.

        Raises:
            InputError: If something in the metrics is missing.
        """
        try:
            facts |= {key: header[key] for key in ("versions", "device", "commit") if key in header}
            facts["status"] = lines[-1].get("status", "unfinished") if lines else "unfinished"
            facts["seconds"] = lines[-1]["seconds"] if lines else None
            if "environment" in header["settings"]:
                episodes = [line for line in lines if line["kind"] == "episode"]
                facts["reached"] = max((line["step"] for line in lines), default=0)
                facts["episode_steps"] = [line["step"] for line in episodes]
                facts["returns"] = [line["return"] for line in episodes]
            else:
                facts |= _losses(lines)
        except KeyError as error:
            raise InputError(f"its metrics are damaged: {error} is missing") from None
        return read(cls, {"name": name, "settings": header["settings"], **facts})


# Field of a record -> the measure in the metrics, and how many decimals are kept of it.
_CURVES = {
    "validation": ("validation_loss", 6),
    "parameter_rms": ("parameter_rms", 7),
    "training": ("loss", 6),
    "training_peak": ("largest_loss", 6),
}


def _losses(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what the metrics of a training run say."""

    def values(measure: str, decimals: int) -> list[tuple[int, float | None]]:
        found = [(line["step"], line[measure]) for line in lines if measure in line]
        return [(step, None if value is None else round(value, decimals)) for step, value in found]

    fields: dict[str, Any] = {field: values(*measure) for field, measure in _CURVES.items()}
    for line in lines:
        fields |= {name: line[name] for name in ("parameter_bytes", "state_bytes", "guarded_steps") if name in line}
    if times := [line["step_milliseconds"] for line in lines if "step_milliseconds" in line]:
        fields["step_milliseconds"] = round(statistics.median(times), 3)
    return fields


def append_record(path: Path, record: Record) -> None:
    """Appends a record to a file that other processes append to as well; it is on the disk afterwards."""
    append_line(path, json.dumps(record.to_json(), allow_nan=False))


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes records to one file, in place of what is there."""
    lines = [json.dumps(record.to_json(), allow_nan=False) + "\n" for record in records]
    replace_file(path, "".join(lines).encode())


def read_file(path: Path) -> list[Record]:
    """Reads the records of a file, in order; a missing file has none.

    Raises:
        InputError: If the file is damaged or holds something else; the message names file and line.
    """
    return [Record.from_json(table, f"{path}, line {number}") for number, table in enumerate(read_lines(path), start=1)]


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Reads the records of runs.

    Args:
        paths: Folders of `celo2 evaluate` or `celo2 compare`; folders of such files by any name, and of runs of
            `celo2 reinforce` at any depth; or files.

    Returns:
        The records in order. Of runs with the same settings the last one counts, unless only an earlier one is whole.

    Raises:
        InputError: If there are no runs, or a file is damaged or holds something else; the message names file and line.
    """
    records: dict[str, Record] = {}
    for path in paths:
        for record in _read(path):
            key = settings_key({"name": record.name, **record.settings})
            if key not in records or record.status in ("finished", "diverged"):
                records[key] = record
    if not records:
        raise InputError(f"{', '.join(map(str, paths))}: no runs there yet")
    return list(records.values())


def _read(path: Path) -> list[Record]:
    if path.is_file():
        return read_file(path)
    if not path.is_dir():
        raise InputError(f"{path}: there is no such folder or file")
    if (path / RECORDS).exists():
        return read_file(path / RECORDS)
    files = sorted(file for file in path.glob("*.jsonl") if file.name != METRICS)
    played = [record for file in sorted(path.rglob(METRICS)) if (record := read_agent(file)) is not None]
    if not files and not played:
        raise InputError(f"{path} holds no results; expected {RECORDS}, other .jsonl files, or runs of celo2 reinforce")
    return [record for file in files for record in read_file(file)] + played


def read_agent(path: Path) -> Record | None:
    """Reads the metrics of a run of `celo2 reinforce`, at its end or not.

    Args:
        path: The file of metrics.

    Returns:
        The record; None if the file is of another kind of run.

    Raises:
        InputError: If the file is damaged.
    """
    header, *lines = read_lines(path) or [{}]
    settings = header.get("settings")
    if not isinstance(settings, Mapping) or "environment" not in settings:
        return None
    try:
        return Record.from_run(str(settings.get("optimizer", {}).get("preset")), header, lines)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
