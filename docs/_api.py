"""A hook of mkdocs: the line `:::: PACKAGE` on a page becomes an entry for every public name of that package."""

import ast
import re
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "src"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Expands the lines."""
    return re.sub(r"^:::: ([\w.]+)$", lambda match: entries(match[1]), markdown, flags=re.MULTILINE)


def entries(package: str) -> str:
    """The names that `from ... import NAME as NAME` makes public, functions before classes."""
    init = SOURCE.joinpath(*package.split("."), "__init__.py")
    names = sorted(
        # By the module that defines it: a function may have the name of its module.
        (alias.name[0].isupper(), alias.name, node.module)
        for node in ast.parse(init.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    )
    return "\n".join(f"::: {module}.{name}" for _, name, module in names)
