"""The folder is the registry: every module keeps its folder's promise, and other packages can join."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from catpo.core import registry
from catpo.core.errors import UserError

PLUGINS = [(kind, name) for kind in registry.PLACES for name in registry.names(kind)]


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_every_plugin_defines_its_folders_public_name(kind: str, name: str) -> None:
    assert callable(registry.load(kind, name))
    folder, public = registry.PLACES[kind]
    tree = ast.parse(Path(str(importlib.import_module(f"{folder}.{name}").__file__)).read_text(encoding="utf-8"))
    assert public in [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_every_plugin_has_a_first_line_for_the_list(kind: str, name: str) -> None:
    (plugin,) = [plugin for plugin in registry.plugins(kind) if plugin.name == name]
    assert 10 < len(plugin.summary) < 130, plugin.summary
    assert plugin.summary.endswith("."), plugin.summary


def test_an_unknown_plugin_is_answered_with_the_closest() -> None:
    with pytest.raises(UserError, match=r"'catop' is not one of the objectives. Did you mean 'catpo'\?"):
        registry.load("objectives", "catop")


@pytest.mark.parametrize("name", ["_base", "__init__", "../errors", "catpo.dpo", "os"])
def test_only_plugins_can_be_loaded(name: str) -> None:
    with pytest.raises(UserError, match="is not one of the objectives"):
        registry.load("objectives", name)


def test_another_package_joins_through_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_signal.py").write_text('"""Constant."""\n\ndef score(evidence):\n    return evidence\n')
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("foreign", "foreign_signal", "catpo.signals")
    monkeypatch.setattr(registry, "entry_points_of", lambda kind: {"foreign": point} if kind == "signals" else {})
    assert "foreign" in registry.names("signals")
    assert "foreign" not in registry.names("objectives")
    assert registry.load("signals", "foreign")(3) == 3
    assert [plugin.summary for plugin in registry.plugins("signals") if plugin.name == "foreign"] == ["from another package"]


def test_our_own_plugin_cannot_be_replaced_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("dpo", "json:dumps", "catpo.objectives")
    monkeypatch.setattr(registry, "entry_points_of", lambda kind: {"dpo": point} if kind == "objectives" else {})
    assert registry.load("objectives", "dpo").__module__ == "catpo.training.objectives.dpo"


def test_listing_imports_no_plugin() -> None:
    code = "import sys; from catpo.core import registry as r; [r.plugins(k) for k in r.PLACES]; print(sorted(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'catpo.training.objectives.dpo'" not in shown
    assert "'torch'" not in shown
