"""Griffe extension: renders this project's docstring habits.

Docstrings write `Example:`, bare doctests and `Source:`; Griffe's Google parser knows only `Examples:`.
"""

import re

import griffe

_BARE_DOCTEST = re.compile(r"(?:^|(?<=\n\n))(>>> .*(?:\n.+)*)")


def render(text: str) -> str:
    """Rewrites one docstring, already without its indentation."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^(?:Source|References):\s+", "**Source:** ", text, flags=re.MULTILINE)
    return _BARE_DOCTEST.sub(lambda found: "Examples:\n" + re.sub("^", "    ", found[1], flags=re.MULTILINE), text)


class Docstrings(griffe.Extension):
    """Applies `render` to every docstring as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = render(obj.docstring.value)
