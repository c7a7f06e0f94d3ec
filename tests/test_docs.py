"""The documentation agrees with the code: its examples run, and what it lists is what there is."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path

import jax
import pytest

from celo2_harness import harness, schedules
from celo2_harness.lab.cli.main import COMMANDS
from celo2_harness.lab.cli.report import sections_of
from celo2_harness.lab.suites import OPTIMIZERS, suites
from celo2_harness.lab.suites.report import update_markdown
from celo2_harness.lab.suites.result_files import read_results
from celo2_harness.lab.tasks import TASKS
from celo2_harness.routing import BUILT_IN

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "celo2_harness"
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]}
# Read before any test has run: doctests register presets of their own.
PRESETS = harness.presets()
# Names that a page may use without saying where they come from.
PRELUDES = {
    "docs/guide/routing.md": """
import jax.numpy as jnp
params = {"embed": {"embedding": jnp.ones((16, 8))}, "fc": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
"""
}
# Compiling a step of meta-training takes as long as all other examples together.
SLOW = ("docs/research/meta-training.md",)
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


def _tables(page: str, marker: str) -> list[tuple[str, list[list[str]]]]:
    """Every table that follows an HTML comment `marker`: what the comment says after a colon, and the table's cells."""
    found = []
    for match in re.finditer(rf"<!-- {marker}(?:: (\S+))? -->\n+((?:\|.*\n)+)", PAGES[page]):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in match[2].splitlines()[2:]]
        found.append((match[1], [[cell.strip("| ") for cell in row] for row in rows]))
    return found


@pytest.fixture
def quick_compilation():
    """Examples run a step or two, so compiling well costs more than it saves."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("quick_compilation")
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


def test_presets_are_listed():
    ((_, rows),) = _tables("docs/guide/choosing-a-preset.md", "presets")
    listed = [(name.strip("`"), float(rate), description) for name, rate, description in rows]
    assert listed == [(p.name, p.learning_rate, p.description) for p in PRESETS.values()]


def test_tasks_are_listed():
    ((_, rows),) = _tables("docs/research/tasks.md", "tasks")
    expected = [(name, size, what) for name, kind in TASKS.items() for size, what in kind.sizes.items()]
    assert [(name.strip("`"), size.strip("`"), what) for name, size, what in rows] == expected


def test_meaning_of_the_learning_rate():
    """The table of learning rates of the rest agrees with the presets' factors."""
    lines = dict(
        re.findall(r"^\| `(\w+)` \| [^|]*η[^|]* \| ([^|]*η), ", PAGES["docs/guide/choosing-a-preset.md"], re.MULTILINE)
    )
    factors = {name: 1.0 if rate == "η" else float(rate.removesuffix(" η")) for name, rate in lines.items()}
    assert factors == {p.name: (p.rest or p.hidden).learning_rate_factor for p in PRESETS.values()}


def test_schedules_are_listed():
    ((_, rows),) = _tables("docs/guide/choosing-a-preset.md", "schedules")
    assert [name.strip("`") for name, _ in rows] == list(schedules.SCHEDULES)


def test_optimizers_of_suites_are_listed():
    ((_, rows),) = _tables("docs/research/evaluation.md", "optimizers")
    assert [(name.strip("`"), text) for name, text in rows] == [(n, row.description) for n, row in OPTIMIZERS.items()]


def test_suites_are_listed():
    listed = re.findall(
        r"^\| `(\w+)` \| [^|]+ \|$", PAGES["docs/research/evaluation.md"].partition("## Writing")[0], re.MULTILINE
    )
    assert sorted(listed) == sorted(suites())


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
        sections = sections_of(read_results([ROOT / folder]), None)
        update_markdown(copy, sections)
        titles |= {section.title for section in sections}
    assert copy.read_text() == PAGES[page]
    assert set(re.findall(r"<!-- report: (.+) -->", PAGES[page])) <= titles


_DEFAULTS = [(page, name) for page in PAGES for name, _ in _tables(page, "defaults")]


@pytest.mark.parametrize("page, name", _DEFAULTS)
def test_options_and_defaults(page, name):
    """Tables after `<!-- defaults: name -->` list all parameters in order, with their defaults as code."""
    module, _, attribute = name.rpartition(".")
    function = getattr(importlib.import_module(module), attribute)
    expected = []
    for parameter in inspect.signature(function).parameters.values():
        default = parameter.default
        if default is inspect.Parameter.empty:
            default = ""
        elif dataclasses.is_dataclass(default) and default == type(default)():
            default = f"{type(default).__name__}()"
        else:
            default = repr(default)
        expected.append((parameter.name, default))
    ((_, rows),) = [table for table in _tables(page, "defaults") if table[0] == name]
    listed = [(row[0].strip("`"), row[1].strip("`")) for row in rows]
    # A default that is described in words, not quoted, is not compared.
    words = {row[0].strip("`") for row in rows if row[1] and not row[1].startswith("`")}
    assert listed == [(n, dict(listed)[n] if n in words else default) for n, default in expected]


def test_defaults_are_quoted():
    assert len(_DEFAULTS) >= 10


def test_routing_rules_are_listed():
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| `(\w+)` \|", PAGES["docs/guide/routing.md"], re.MULTILINE)
    expected = [(str(i), rule.name, rule.label) for i, rule in enumerate(BUILT_IN, start=1)]
    assert [(number, name.strip(), label) for number, name, label in rows] == expected


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


def test_layout_is_complete():
    """The layout on the architecture page names every module and folder of the package, and nothing else."""
    block = re.search(r"src/celo2_harness/\n(.*?)```", PAGES["docs/architecture.md"], re.DOTALL)
    assert block is not None
    listed = {line.split()[0] for line in block[1].splitlines() if not line.startswith("    ")}
    there = {
        path.name + "/" * path.is_dir()
        for path in PACKAGE.iterdir()
        if path.name not in ("py.typed", "__pycache__") and (path.is_dir() or path.suffix == ".py")
    }
    assert listed == there


ARROWS = {
    "rule": set(),
    "routing": set(),
    "schedules": set(),
    "sharding": set(),
    "weights": {"rule"},
    "blocks": {"rule", "weights"},
    "velo": {"blocks", "rule", "weights"},
    "presets": {"blocks", "rule", "velo", "weights"},
    "harness": {"presets", "routing", "blocks", "rule", "schedules", "sharding", "velo", "weights"},
}


@pytest.mark.parametrize("part", ARROWS)
def test_arrows_point_one_way(part):
    """No part of the package imports what the architecture page says it does not know."""
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else (PACKAGE / part).rglob("*.py")
    known = {name for _, name, _ in pkgutil.iter_modules([str(PACKAGE)])}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                top, _, below = name.partition(".")
                if top == "celo2_harness":
                    other = below.split(".")[0]
                    allowed = (
                        ARROWS[part] | {part, "_types", "_trees", "_version", "plugins"} | ({"__version__"} - known)
                    )
                    assert other in allowed, f"{file.relative_to(PACKAGE)} imports {name}"
                assert not (part == "rule" and top == "optax"), f"{file.relative_to(PACKAGE)} imports {name}"


def test_public_names_are_on_an_api_page():
    """Everything exported has an entry on an API page."""
    import celo2_harness

    entries = set(re.findall(r"^::: ([\w.]+)", "\n".join(PAGES.values()), re.MULTILINE))
    documented = {entry.rpartition(".")[2] for entry in entries}
    public = {name for name, value in vars(celo2_harness).items() if name[0] != "_" and not inspect.ismodule(value)}
    missing = public - documented
    assert not missing
    for entry in entries:
        pkgutil.resolve_name(entry)
