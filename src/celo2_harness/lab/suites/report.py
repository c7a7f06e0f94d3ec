"""Reports from result files alone: one HTML page, and tables between markers of a Markdown page."""

import base64
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.suites.pictures import Picture
from celo2_harness.lab.suites.tables import Table, to_html, to_markdown
from celo2_harness.weights.files import replace_file

PAGE = "report.html"
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
        title: Its heading.
        tables: Come first.
        pictures: Come after them.
    """

    title: str
    tables: list[Table]
    pictures: list[Picture]


SectionMaker = Callable[[Sequence[Mapping[str, Any]], Path | None], list[Section]]


def write_page(path: Path, sections: Sequence[Section], provenance: Sequence[str]) -> None:
    """Writes a report as one HTML page that needs no other file.

    Args:
        path: Where it goes.
        sections: Its parts.
        provenance: What the runs were made with, a line each.
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


def provenance_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what runs were made with, each different combination once, with the number of runs.

    >>> provenance_lines([{"device": "cpu", "commit": "abc", "versions": {"jax": "0.10"}}] * 2)
    ['2 runs: cpu; jax 0.10; commit abc']
    """
    counts: dict[str, int] = {}
    for record in records:
        versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
        device, commit = record.get("device", "unknown device"), f"commit {record.get('commit')}"
        line = "; ".join(part for part in (device, versions, commit) if part)
        counts[line] = counts.get(line, 0) + 1
    return [f"{number} run{'s' * (number > 1)}: {line}" for line, number in counts.items()]


def update_markdown(path: Path, sections: Sequence[Section]) -> list[str]:
    """Writes tables between the markers of a Markdown page, in place of what is there.

    A pair of markers is `<!-- report: TITLE -->` and `<!-- end of report -->`, each on a line of its own; the title is
    that of a section, or * for all of them. Markers of other titles are left as they are: a page may be made of several
    reports.

    Args:
        path: The page.
        sections: What there is.

    Returns:
        The titles that were left.

    Raises:
        InputError: if the page cannot be read, has no markers, or none of a section that there is.
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


# What tables and pictures need, and what says where the numbers come from.
_KEPT = (
    "kind", "task", "suite", "selection_seeds", "report_seeds", "equal_trials", "baseline", "rival", "name",
    "learning_rate", "seed", "unit", "parameter_bytes", "state_bytes", "status", "error", "validation_loss",
    "validation", "parameter_rms", "training", "training_peak", "guarded_steps", "step_milliseconds", "seconds",
    "reached", "episode_steps", "returns", "settings", "versions", "device", "commit",
)  # fmt: skip


def write_small(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes records to one file that is fit to be kept under version control.

    Losses have six decimals, weights go by the name of their file, and nothing else tells of the machine's folders.

    Args:
        path: Where the JSON Lines go.
        records: From `read_results`.
    """
    lines = [json.dumps(_small({name: r[name] for name in _KEPT if name in r}), allow_nan=False) for r in records]
    replace_file(path, ("\n".join(lines) + "\n").encode())


def _small(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {key: _small(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_small(item, name) for item in value]
    if isinstance(value, float) and name in ("validation_loss", "validation", "training", "training_peak"):
        return round(value, 6)
    if isinstance(value, float) and name == "parameter_rms":
        return round(value, 7)
    if isinstance(value, str) and name == "weights" and "/" in value and "://" not in value:
        file = Path(value)
        return f"{file.parent.name}/{file.name}" if file.stem == "weights" else file.name
    return value
