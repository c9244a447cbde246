"""The layout stays readable: few names at the top, short functions and files, flat expressions, public names across modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "catpo"
FILES = sorted(SOURCE.rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NESTING = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.Lambda)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_first_screen_of_the_package_has_at_most_twenty_names() -> None:
    names = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert len(names) <= 20, sorted(names)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_is_longer_than_450_lines_and_no_function_longer_than_60(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_expression_nests_deeper_than_two_levels(path: Path) -> None:
    """Levels of comprehensions, conditional expressions and lambdas."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.expr):
            assert _levels(node) <= 2, f"line {node.lineno}"


def _levels(node: ast.AST) -> int:
    return isinstance(node, NESTING) + max(map(_levels, ast.iter_child_nodes(node)), default=0)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_module_imports_a_private_name_of_another(path: Path) -> None:
    """A folder's own modules may share a private helper module, such as `_files`."""
    package = ".".join(path.relative_to(SOURCE.parent).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("catpo"):
            assert not [
                alias.name
                for alias in node.names
                if alias.name.startswith("_") and not alias.name.startswith("__") and node.module != package
            ]
            outside = "_" in [part[0] for part in str(node.module).split(".")] and not str(node.module).startswith(package)
            assert not outside, node.module


@pytest.mark.parametrize("page", DOCUMENTS, ids=name)
def test_no_document_names_a_private_module(page: Path) -> None:
    assert list(_private(page.read_text(encoding="utf-8"))) == []


def _private(text: str) -> Iterator[str]:
    """Dotted names and paths below `catpo` with a component that starts with one underscore."""
    for found in re.findall(r"\bcatpo(?:[./]\w+)+", text):
        if re.search(r"[./]_[a-z]", found):
            yield found
