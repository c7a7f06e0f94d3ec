"""A hook of mkdocs: the line `:::: PACKAGE` on a page becomes an entry for every public name of that package."""

import ast
import re
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "src"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Expands the lines, in the order of the imports in the package's `__init__`."""
    return re.sub(r"^:::: ([\w.]+)$", lambda match: entries(match[1]), markdown, flags=re.MULTILINE)


def entries(package: str) -> str:
    """The names that `from ... import NAME as NAME` makes public."""
    init = SOURCE.joinpath(*package.split("."), "__init__.py")
    names = [
        # Where it is defined: a function may have the name of its module.
        f"{node.module}.{alias.name}"
        for node in ast.parse(init.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    ]
    return "\n".join(f"::: {name}" for name in names)
