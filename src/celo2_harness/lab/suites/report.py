"""Reports from result files alone: one HTML page, and tables between markers of a Markdown page."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites.plots import Picture, draw, plot_returns
from celo2_harness.lab.suites.record import Record
from celo2_harness.lab.suites.results import results_by_task
from celo2_harness.lab.suites.returns import return_curves
from celo2_harness.lab.suites.tables import (
    Table,
    common_table,
    overview_table,
    result_tables,
    runs_table,
    to_html,
    to_markdown,
)
from celo2_harness.weights.files import replace_file

PAGE = "report.html"
OVERVIEW = "overview"
"""The title of the section on all tasks, where there are several."""
RETURNS = "returns"
"""The title of the section on agents."""
_MARKER = re.compile(r"<!-- report: (?P<title>[^\n]+?) -->\n.*?<!-- end of report -->", re.DOTALL)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.25em; margin-top: 2.5em; border-bottom: 1px solid #ddd; }
h3 { font-size: 1em; margin: 1.8em 0 .4em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .3em .7em; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
.notes { color: #555; font-size: 13px; max-width: 62em; } img { max-width: 100%; height: auto; display: block; }
"""


class Section(NamedTuple):
    """A part of a report.

    Attributes:
        title: The title.
        tables: The tables, which come first.
        pictures: The pictures, which come after them.
    """

    title: str
    tables: list[Table]
    pictures: list[Picture]


def report_sections(records: Sequence[Record], folder: Path | None = None) -> list[Section]:
    """Makes the sections of a report: all tasks together, every task, and agents.

    Args:
        records: The records.
        folder: The folder of the pictures; None for no pictures.

    Returns:
        The sections.
    """
    tasks = results_by_task([record for record in records if not record.is_agent])
    sections = [Section(OVERVIEW, [overview_table(tasks)], [])] if len(tasks) > 1 else []
    sections += [Section(task.title, result_tables(task), draw(task, folder) if folder else []) for task in tasks]
    if agents := [record for record in records if record.is_agent]:
        curves, pictures = return_curves(agents), []
        if folder is not None:
            pictures = [Picture("returns over agent steps", folder / f"{RETURNS}.png")]
            plot_returns(curves, pictures[0].path)
        sections.append(Section(RETURNS, [common_table(curves), runs_table(curves)], pictures))
    return sections


def write_page(path: Path, sections: Sequence[Section], provenance: Sequence[str]) -> None:
    """Writes a report as one HTML page that needs no other file.

    Args:
        path: The HTML file.
        sections: The sections.
        provenance: The lines of `provenance_lines`.
    """
    parts = ["<!doctype html>", '<html lang="en"><head><meta charset="utf-8"><title>celo2 report</title>']
    parts += [f"<style>{_STYLE}</style></head><body>", "<h1>celo2 report</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f'<div class="wide">{to_html(table)}</div>' for table in section.tables]
        for picture in section.pictures:
            title = html.escape(picture.title)
            data = base64.b64encode(picture.path.read_bytes()).decode()
            parts += [f"<h3>{title}</h3>", f'<img alt="{title}" src="data:image/png;base64,{data}">']
    parts += ["<h2>Made with</h2>", "<ul>", *(f"<li>{html.escape(line)}</li>" for line in provenance), "</ul>"]
    replace_file(path, "\n".join([*parts, "</body></html>", ""]).encode())


def provenance_lines(records: Sequence[Record]) -> list[str]:
    """Returns what runs were made with, each different combination once, with the number of runs."""
    counts: dict[str, int] = {}
    for record in records:
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        line = "; ".join(filter(None, [record.device, versions, f"commit {record.commit}"]))
        counts[line] = counts.get(line, 0) + 1
    return [f"{number} run{'s' * (number > 1)}: {line}" for line, number in counts.items()]


def update_markdown(path: Path, sections: Sequence[Section]) -> list[str]:
    """Writes tables between the markers of a Markdown page, in place of what is there.

    A pair of markers is `<!-- report: TITLE -->` and `<!-- end of report -->`, each on a line of its own; the title is
    that of a section, or * for all of them. Markers of other titles are left as they are: a page may be made of several
    reports.

    Args:
        path: The Markdown page.
        sections: The sections.

    Returns:
        The titles that were left.

    Raises:
        InputError: If the page cannot be read, has no markers, or none of a section that there is.
    """
    try:
        page = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"markdown: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    by_title = {section.title: section for section in sections}
    left = []

    def fill(match: re.Match[str]) -> str:
        title = match["title"]
        if title != "*" and title not in by_title:
            left.append(title)
            return match[0]
        chosen = sections if title == "*" else [by_title[title]]
        tables = "\n\n".join(to_markdown(table) for section in chosen for table in section.tables)
        return f"<!-- report: {title} -->\n\n{tables}\n\n<!-- end of report -->"

    page, number = _MARKER.subn(fill, page)
    if not number:
        raise InputError(
            f"markdown: {path} has no markers; put <!-- report: TITLE --> and <!-- end of report --> where tables go, "
            f"with one of {', '.join(map(repr, by_title))}, or * for all"
        )
    if len(left) == number:
        wanted = ", ".join(map(repr, left))
        raise InputError(f"markdown: {path} wants {wanted}; there is {', '.join(map(repr, by_title))}")
    replace_file(path, page.encode())
    return left
