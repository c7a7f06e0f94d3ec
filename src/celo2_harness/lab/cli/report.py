"""`celo2 report`: tables and pictures from result files."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table as RichTable

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites.record import read_records, write_records
from celo2_harness.lab.suites.report import PAGE, provenance_lines, report_sections, update_markdown, write_page
from celo2_harness.lab.suites.tables import NONE, Table
from celo2_harness.lab.training.folder import prepare_folder


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
    """A .jsonl file to write all runs to."""


def run(config: Config) -> int:
    """Writes the report; returns 0."""
    if not config.results:
        raise InputError("results: expected one or more folders or files")
    records = read_records(config.results)
    folder = config.out or (config.results[0] if config.results[0].is_dir() else config.results[0].parent)
    prepare_folder(folder)
    sections = report_sections(records, folder)
    print_tables([table for section in sections for table in section.tables])
    write_page(folder / PAGE, sections, provenance_lines(records))
    if config.keep is not None:
        write_records(config.keep, records)
        print(f"kept: {config.keep}")
    if config.markdown is not None:
        left = ", ".join(map(repr, update_markdown(config.markdown, sections)))
        print(f"tables: {config.markdown}" + f" (left as they are: {left})" * bool(left))
    for section in sections:
        for picture in section.pictures:
            print(f"picture: {picture.path}")
    print(f"page: {folder / PAGE}")
    return 0


def print_tables(tables: Sequence[Table]) -> None:
    """Prints tables to the terminal."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for number, heading in enumerate(table.headings):
            shown.add_column(heading, justify="right" if number else "left")
        for row in table.rows:
            shown.add_row(*(cell or NONE for cell in row))
        shown.caption, shown.caption_justify = " ".join(table.notes), "left"
        console.print(shown, "")
