"""A hook of mkdocs: notebooks become pages, with the outputs that are saved in them."""

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for every notebook; the notebook itself stays, to be downloaded."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            assert file.abs_src_path is not None
            page = file.src_uri.removesuffix(".ipynb") + ".md"
            text = to_markdown(json.loads(Path(file.abs_src_path).read_text()), Path(file.src_uri).name)
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to a notebook lead to its page, but for those that say `download`."""
    return markdown.replace(".ipynb)", ".md)").replace(".ipynb?download)", ".ipynb)")


def to_markdown(notebook: dict[str, Any], name: str) -> str:
    """The cells of a notebook as Markdown, and a link to the file under the title."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            title, _, rest = source.partition("\n")
            if title.startswith("# "):
                source = f"{title}\n\nThis page is a notebook: [download it]({name}?download).\n{rest}"
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += [_output(output) for output in cell["outputs"]]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="Output of the cell above" src="data:image/png;base64,{data["image/png"].strip()}">'
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f"```text\n{text.rstrip()}\n```"
