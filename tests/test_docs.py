"""The documentation keeps its word: examples run, links and names exist, tables are those of the kept runs."""

import ast
import dataclasses
import doctest
import importlib
import re
import typing
from pathlib import Path

import pytest

import celo2_harness
from celo2_harness import harness
from celo2_harness.lab.cli.main import COMMANDS
from celo2_harness.lab.suites.record import read_records
from celo2_harness.lab.suites.report import report_sections, update_markdown

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "celo2_harness"
TOP = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "meta-training/README.md"]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*(ROOT / name for name in TOP), *sorted(ROOT.glob("docs/**/*.md"))]
}
# Read before any test has run: doctests register presets of their own.
PRESETS = harness.presets()
# Names that a page may use without saying where they come from.
PRELUDES = {
    "docs/guide/routing.md": """
import jax.numpy as jnp
params = {"embed": {"embedding": jnp.ones((16, 8))}, "fc": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
"""
}
# These compile the learned rule, or a step of meta-training, more than a few times.
SLOW = ("docs/guide/blocks.md", "docs/guide/wrappers.md", "docs/research/meta-training.md", "docs/research/velo.md")
_BLOCK = re.compile(
    r"(?P<skip><!-- not run: [^>]+ -->\s*)?^(?P<indent>[ ]*)```(?P<language>python|pycon)\b[^\n]*\n"
    r"(?P<code>.*?)^[ ]*```",
    re.MULTILINE | re.DOTALL,
)


def _blocks(page: str) -> list[tuple[int, str, str]]:
    """Line, language and code of every block of a page that is to be run."""
    found = []
    for match in _BLOCK.finditer(PAGES[page]):
        if not match["skip"]:
            line = PAGES[page].count("\n", 0, match.start("code"))
            code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
            found.append((line, match["language"], code))
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES if _blocks(page)]
)
def test_examples_run(page, tmp_path, monkeypatch):
    """Blocks of one page share their names, in order. A block after `<!-- not run: reason -->` is left out."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "documentation"}
    exec(PRELUDES.get(page, ""), namespace)
    runner = doctest.DocTestRunner()
    for line, language, code in _blocks(page):
        if language == "python":
            exec(compile("\n" * line + code, str(ROOT / page), "exec"), namespace)
        else:
            test = doctest.DocTestParser().get_doctest(code, namespace, page, str(ROOT / page), line)
            report: list[str] = []
            runner.run(test, out=report.append, clear_globs=False)
            assert not runner.summarize(verbose=False).failed, "".join(report)
            namespace = test.globs


def test_every_block_is_found():
    """The pattern above misses no fence, however it is indented or titled."""
    for page, text in PAGES.items():
        assert len(re.findall(r"^\s*(?:```|~~~) ?(?:python|pycon|py)\b", text, re.MULTILINE)) == len(
            list(_BLOCK.finditer(text))
        ), page


def _anchor(heading: str) -> str:
    """The anchor that mkdocs and code hosts give a heading."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Files that a page links to are there, and so are the headings in them."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in map(_anchor, headings), target


def test_names_exist():
    """`c2.NAME` and `harness.NAME` in a sentence or a block are names of the package."""
    for page, text in PAGES.items():
        for module, name in re.findall(r"\b(c2|harness)\.(?!(?:py|md)\b)([A-Za-z_]\w*)", text):
            holder = celo2_harness if module == "c2" else harness
            assert hasattr(holder, name), f"{page}: {module}.{name}"


def test_the_guide_knows_every_preset():
    named = set(re.findall(r"`(\w+)`", PAGES["docs/guide/choosing-a-preset.md"]))
    assert set(PRESETS) <= named


def _options(config: type) -> set[str]:
    hints = typing.get_type_hints(config, include_extras=True)
    names = {"--help"}
    for name, hint in hints.items():
        kind = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        # The fields of a record inside are options without a prefix.
        names |= _options(kind) if dataclasses.is_dataclass(kind) else {"--" + name.replace("_", "-")}
        for extra in getattr(hint, "__metadata__", ()):
            names.update(getattr(extra, "aliases", None) or ())
    return names


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    """Every `celo2 COMMAND --option` on a page, in a block or inline, names a command and options that there are."""
    for command, rest in re.findall(r"(?:^\s*|`|/)celo2 ([a-z]+)([^`\n]*)", PAGES[page], re.MULTILINE):
        longer = " ".join([command, *rest.split()[:1]])
        command = longer if longer in COMMANDS else command
        assert command in COMMANDS, f"celo2 {command}"
        options = _options(importlib.import_module(COMMANDS[command].module).Config)
        for option in re.findall(r"(?<= )--[a-z][a-z-]*", rest):
            assert option in options, f"celo2 {command} {option}"


@pytest.mark.parametrize(
    "page, folders",
    [
        ("docs/results.md", ["results"]),
        ("docs/research/stability.md", ["results/stability", "results/long", "results/widths"]),
    ],
)
def test_tables_of_results_are_those_of_the_kept_runs(tmp_path, page, folders):
    """Between its markers, a page of results says what `celo2 report FOLDER --markdown` writes there."""
    if not (ROOT / "results").is_dir():
        pytest.skip("no runs are kept")
    copy = tmp_path / "page.md"
    copy.write_text(PAGES[page])
    titles = set()
    for folder in folders:
        sections = report_sections(read_records([ROOT / folder]))
        update_markdown(copy, sections)
        titles |= {section.title for section in sections}
    assert copy.read_text() == PAGES[page]
    assert set(re.findall(r"<!-- report: (.+) -->", PAGES[page])) <= titles


def test_pages_are_short():
    assert len(PAGES["README.md"].split()) <= 600
    read = [text for page, text in PAGES.items() if page.startswith(("docs/index", "docs/start/", "docs/guide/"))]
    assert sum(len(text.split()) for text in read) <= 15_000


# What each part of the core may import of the others; the lab may import everything.
ARROWS = {
    "rule": set(),
    "routing": {"rule"},
    "schedules": set(),
    "sharding": set(),
    "weights": {"rule"},
    "blocks": {"rule", "weights"},
    "velo": {"blocks", "rule", "weights"},
    "roles": set(),
    "presets": {"roles", "blocks", "rule", "velo", "weights"},
    "harness": {"presets", "roles", "routing", "blocks", "rule", "schedules", "sharding", "velo", "weights"},
}


def _imports(file: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_nothing_above_the_lab_imports_it():
    for file in PACKAGE.rglob("*.py"):
        if "lab" not in file.relative_to(PACKAGE).parts:
            assert not any(name.startswith("celo2_harness.lab") for name in _imports(file)), file


@pytest.mark.parametrize("part", ARROWS)
def test_arrows_point_one_way(part):
    """No part of the core imports what the page on architecture draws above it."""
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else (PACKAGE / part).rglob("*.py")
    for file in files:
        for name in _imports(file):
            top, _, below = name.partition(".")
            other = below.split(".")[0]
            if top == "celo2_harness" and other[0] != "_" and other != "plugins":
                assert other in ARROWS[part] | {part}, f"{file.relative_to(PACKAGE)} imports {name}"
            assert not (part == "rule" and top == "optax"), f"{file.relative_to(PACKAGE)} imports {name}"
