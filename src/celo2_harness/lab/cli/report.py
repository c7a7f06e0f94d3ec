"""`celo2 report`: tables and pictures from result files."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table as RichTable

from celo2_harness import harness
from celo2_harness.lab.suites import InputError
from celo2_harness.lab.suites.pictures import draw
from celo2_harness.lab.suites.records import prepare_folder
from celo2_harness.lab.suites.report import (
    PAGE,
    Section,
    SectionMaker,
    provenance_lines,
    update_markdown,
    write_page,
    write_small,
)
from celo2_harness.lab.suites.result_files import TRAINING, read_results
from celo2_harness.lab.suites.results import sort_results
from celo2_harness.lab.suites.return_sections import return_sections
from celo2_harness.lab.suites.returns import RETURNS
from celo2_harness.lab.suites.tables import NONE, Table, overview_table, result_tables

OVERVIEW = "overview"
"""Title of the section on all tasks, where there are several."""


@dataclass(frozen=True)
class Config:
    """Make tables, pictures and one HTML page of the results of celo2 evaluate, compare and reinforce."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of results, or files."""
    out: Path | None = None
    """Folder of the pictures and the page; by default the first folder of results."""
    markdown: Path | None = None
    """A Markdown page whose tables, between <!-- report: TITLE --> and <!-- end of report -->, are written anew."""
    keep: Path | None = None
    """A .jsonl file to write all runs to, in a small form that can be kept under version control."""


def training_sections(records: Sequence[Mapping[str, Any]], folder: Path | None) -> list[Section]:
    """The sections of training runs; with a folder for them, their pictures too."""
    without_weights = {name for name, preset in harness.presets().items() if not preset.learned}
    tasks = sort_results(records, without_weights)
    pictures = lambda results: draw(results, folder) if folder else []
    sections = [Section(results.title, result_tables(results), pictures(results)) for results in tasks]
    return [Section(OVERVIEW, [overview_table(tasks)], []), *sections] if len(tasks) > 1 else sections


def sections_of(records: Sequence[Mapping[str, Any]], folder: Path | None) -> list[Section]:
    """The sections of all records, kind by kind; with a folder for them, their pictures too."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        kinds.setdefault(record.get("kind", TRAINING), []).append(record)
    return [section for kind, group in kinds.items() for section in SECTIONS[kind](group, folder)]


# Kind of record -> what makes sections of all records of that kind.
SECTIONS: dict[str, SectionMaker] = {TRAINING: training_sections, RETURNS: return_sections}


def run(config: Config) -> int:
    """Writes the report; returns 0."""
    if not config.results:
        raise InputError("results: expected one or more folders or files")
    records = read_results(config.results)
    folder = config.out or (config.results[0] if config.results[0].is_dir() else config.results[0].parent)
    prepare_folder(folder)
    sections = sections_of(records, folder)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for section in sections:
        for table in section.tables:
            console.print(_rich(table), "")
    write_page(folder / PAGE, sections, provenance_lines(records))
    if config.keep is not None:
        write_small(config.keep, records)
        print(f"kept: {config.keep}")
    if config.markdown is not None:
        left = ", ".join(map(repr, update_markdown(config.markdown, sections)))
        print(f"tables: {config.markdown}" + f" (left as they are: {left})" * bool(left))
    for section in sections:
        for picture in section.pictures:
            print(f"picture: {picture.path}")
    print(f"page: {folder / PAGE}")
    return 0


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(table.headings):
        shown.add_column(heading, justify="right" if number else "left")
    for row in table.rows:
        shown.add_row(*(cell or NONE for cell in row))
    shown.caption, shown.caption_justify = " ".join(table.notes), "left"
    return shown
