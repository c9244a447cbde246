"""What the documents say is so: commands exist, examples run, links lead somewhere, equations stand where the map says."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import catpo
import family_table
import tiny
import tiny_families
from catpo.cli import main
from catpo.config import options
from catpo.config.recipes import starter
from catpo.core import registry
from catpo.core.spec import keyword_options
from catpo.data.pair_folder import write_pairs
from catpo.models.views import VIEWS, View
from catpo.rewards.fusion import Fusion
from catpo.training.objectives import build

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
COMMANDS = {command for command in main.app if not command.startswith("-")}
PLUGIN_PAGES = sorted((ROOT / "docs" / "how-to" / "plugins").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def console_lines() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for text in blocks(page, "console"):
            yield from ((page.name, line[2:]) for line in text.splitlines() if line.startswith("$ "))


MADE = ("reference/commands.md", "reference/plugins.md", "tutorial.ipynb")
"""Pages that exist on the site alone."""


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---- commands and links ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "line"), list(console_lines()))
def test_every_command_in_the_documents_is_understood(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-run").mkdir()
    (tmp_path / "my-run" / "recipe.yaml").write_text(starter())
    program, *tokens = shlex.split(line)
    assert program == "catpo"
    main.app.parse_args(tokens, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("src/catpo/config/shipped/**/*.yaml")], ids=relative)
def test_every_command_named_in_a_text_exists(page: Path) -> None:
    named = re.findall(r"(?:`|^#\s+|\$ |-m )catpo ([a-z]+)\b(?!=)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(named) <= COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_make_target_named_exists(page: Path) -> None:
    named = re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(named) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            path = page.parent / target.split("#")[0]
            assert path.exists() or path.resolve() in [ROOT / "docs" / name for name in MADE], target


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_file_named_exists(page: Path) -> None:
    named = re.findall(r"`((?:src|tests|docs|recipes|tools|bench)/[\w./-]+\.\w+)", page.read_text(encoding="utf-8"))
    ours = {f"src/{path}" for path in plugin_examples()}
    assert [path for path in named if not (ROOT / path).exists() and path not in ours] == []


def test_every_page_named_anywhere_exists() -> None:
    folders = [path for name in ("src", "tests", "tools", "bench", "recipes") for path in (ROOT / name).rglob("*")]
    read = [path for path in (*folders, *PAGES) if path.suffix in (".py", ".yaml", ".md") and path.is_file()]
    named = {(name, relative(path)) for path in read for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text("utf-8"))}
    assert len(named) > 40
    assert sorted((name, path) for name, path in named if not (ROOT / name).exists()) == []


def plugin_examples() -> set[str]:
    """Files that the pages about plugins tell the reader to write, as they would be called inside catpo."""
    return {
        f"{registry.PLACES[entry_points(page)[0].removeprefix('catpo.')][0].replace('.', '/')}/{name}"
        for page in PLUGIN_PAGES
        for name in re.findall(r"^# lookout/(\w+\.py)$", page.read_text(), flags=re.MULTILINE)
    }


def entry_points(page: Path) -> tuple[str, dict[str, str]]:
    """Group and entries of a page's piece of pyproject.toml."""
    (table,) = blocks(page, "toml")
    (group,) = re.findall(r'^\[project.entry-points."([\w.]+)"\]$', table, flags=re.MULTILINE)
    return group, dict(re.findall(r'^(\w+) = "([\w.]+)"$', table, flags=re.MULTILINE))


def test_version_and_changes_are_told() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == catpo.__version__
    headings = re.findall(r"^## ([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[:2] == ["Unreleased", catpo.__version__]


def test_the_new_names_of_the_upgrade_exist() -> None:
    page = (ROOT / "docs" / "how-to" / "upgrade.md").read_text(encoding="utf-8")
    new = set(re.findall(r"^\|[^|]*\| `\w+`[^|]* \| `(\w+)` \|$", page, flags=re.MULTILINE))
    known = {field.name for each in (*options.COMMANDS.values(), Fusion) for field in dataclasses.fields(each)}
    assert len(new) > 10
    assert new <= known


# ---- examples -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, builtin: Path) -> Path:
    """What the examples start from: pairs, their rewards, a model of a family that catpo does not know."""
    folder = tmp_path_factory.mktemp("made")
    write_pairs(folder / "pairs", tiny.pairs(), {})
    catpo.score(pairs=str(folder / "pairs"), model="builtin", output=folder / "rewards", progress=False)
    family = tiny_families.build("vipllava")
    family.model.save_pretrained(folder / "vip-llava")
    family.processor.save_pretrained(folder / "vip-llava")
    return folder


@pytest.fixture
def workplace(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("pairs", "vip-llava"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "docs" / "how-to" / "train.md", ROOT / "docs" / "reference" / "methods.md"],
    ids=relative,
)
def test_the_python_examples_run(page: Path, workplace: Path, made: Path) -> None:
    shutil.copytree(made / "rewards", workplace / "rewards")
    names: dict[str, Any] = {}
    for text in blocks(page, "python"):
        exec(compile(text, page.name, "exec"), names)


@pytest.fixture
def docs_site(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(ROOT / "tools")
    return import_module("docs_site")


def test_the_tutorials_notebook_runs(docs_site: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in docs_site.notebook((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile(cell["source"], cell["id"], "exec"), names)
    assert names["report"].stat().st_size > 10_000


def test_the_reference_has_every_command_and_every_name(docs_site: ModuleType) -> None:
    commands, plugins = docs_site.commands(), docs_site.plugins()
    assert re.findall(r"^## catpo ([a-z]+)$", commands, flags=re.MULTILINE) == [name for name in main.app if name in COMMANDS]
    for kind in registry.PLACES:
        assert all(f"| `{name}` | " in plugins for name in registry.names(kind))


@pytest.mark.parametrize("page", PLUGIN_PAGES, ids=relative)
def test_each_example_of_a_plugin_works_as_a_package_of_its_own(
    page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    site = workplace / "site"
    kind, plugins = entry_points(page)
    examples, programs = [], []
    for text in blocks(page, "python"):
        (examples if text.startswith("# lookout/") else programs).append(text)
    for text in examples:
        path = site / text.split("\n", 1)[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (site / "lookout-0.1.dist-info").mkdir()
    (site / "lookout-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lookout\nVersion: 0.1\n")
    lines = [f"{name} = {module}" for name, module in plugins.items()]
    (site / "lookout-0.1.dist-info" / "entry_points.txt").write_text(f"[{kind}]\n" + "\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(site)
    registry.entry_points_of.cache_clear()
    request.addfinalizer(registry.entry_points_of.cache_clear)
    for name in plugins:
        assert name in registry.names(kind.removeprefix("catpo."))
    assert programs
    for text in programs:
        exec(compile(text, page.name, "exec"), {})


# ---- the paper map --------------------------------------------------------------------------------------------------------

MAP = (ROOT / "docs" / "explanation" / "paper-map.md").read_text(encoding="utf-8")
EQUATIONS = re.findall(r"^\| (Eq\. [\d, -]+) \| [^|]+ \| `([\w.]+)` \| `([\w./]+)::(\w+)` \|$", MAP, flags=re.MULTILINE)
DEFAULTS = re.findall(r"\| `(\w+) (\w+)=([^`]+)` \|", MAP)


def numbers(text: str) -> set[int]:
    """Equations named in a text: `Eq. 6-7, 11` is 6, 7 and 11.

    >>> sorted(numbers("as in Eq. 6-7, 11; and Eq. 2"))
    [2, 6, 7, 11]
    """
    found = set()
    for each in re.findall(r"Eq\. ([\d, -]*\d)", text):
        for part in each.replace(" ", "").split(","):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def test_the_map_has_every_equation_of_the_paper() -> None:
    assert set().union(*(numbers(equation) for equation, *_ in EQUATIONS)) == set(range(1, 12))


@pytest.mark.parametrize(("equation", "function", "file", "test"), EQUATIONS)
def test_the_function_cites_its_equation_and_the_test_exists(equation: str, function: str, file: str, test: str) -> None:
    module, name = function.rsplit(".", 1)
    source = Path(str(import_module(module).__file__)).read_text(encoding="utf-8")
    (node,) = [each for each in ast.parse(source).body if isinstance(each, ast.FunctionDef) and each.name == name]
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    assert numbers(equation) <= numbers("\n".join(lines))
    assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("test", re.findall(r"`(tests/\w+\.py::\w+)`", MAP))
def test_every_test_named_in_the_map_exists(test: str) -> None:
    file, name = test.split("::")
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(("of", "option", "value"), DEFAULTS)
def test_the_defaults_in_the_map_are_in_force(of: str, option: str, value: str) -> None:
    assert _default(of, option) == ast.literal_eval(value.replace("\\", ""))


def _default(of: str, option: str) -> Any:
    if of in options.COMMANDS:
        return next(field.default for field in dataclasses.fields(options.COMMANDS[of]) if field.name == option)
    if of == "fusion":
        return getattr(Fusion(), option)
    kind = next(kind for kind in registry.PLACES if of in registry.names(kind))
    return keyword_options(registry.load(kind, of))[option]


@pytest.mark.parametrize("objective", sorted(set(re.findall(r"`(catpo\([^`]+\))`", MAP))))
def test_the_objectives_named_in_the_map_can_be_built(objective: str) -> None:
    assert inspect.isfunction(build(objective).loss)


def test_the_table_of_families_is_what_is_measured() -> None:
    assert family_table.table() in family_table.PAGE.read_text(), "python tests/family_table.py"


# ---- the page of methods --------------------------------------------------------------------------------------------------


def test_the_page_of_methods_has_every_objective_and_view_and_no_other() -> None:
    page = (ROOT / "docs" / "reference" / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)[(`].*\|$", page, flags=re.MULTILINE)
    assert set(rows) == {*registry.names("objectives"), *VIEWS} - {"perturbed"}
    for text in re.findall(r"`((?:\w+)\((?:[^`]*)\))`", page):
        name = text.partition("(")[0]
        if name in VIEWS:
            View.of(text)
        elif name in registry.names("objectives") and text not in ("vdpo(guidance=0.0)", "dpo(beta=0.0)"):
            build(text)
