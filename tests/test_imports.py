"""Every module imports, and what must stay light does."""

from __future__ import annotations

import configparser
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import catpo

ROOT = Path(__file__).parent.parent
MODULES = [module.name for module in pkgutil.walk_packages(catpo.__path__, "catpo.") if not module.name.endswith("__main__")]
TORCHLESS = [
    name
    for name in MODULES
    if name.split(".")[1] in {"core", "text", "files", "config", "data", "rewards", "judges", "reporting"}
]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    importlib.import_module(module)


def test_reports_stores_data_and_recipes_start_without_torch() -> None:
    code = f"import importlib, sys; [importlib.import_module(name) for name in {TORCHLESS}]; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


@pytest.mark.parametrize("name", [name for name in catpo.__all__ if name != "__version__"])
def test_the_python_api_is_loaded_when_asked_for(name: str) -> None:
    assert callable(getattr(catpo, name))
    assert name in dir(catpo)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        _ = catpo.tarin  # type: ignore[attr-defined]


def test_every_room_has_an_import_contract() -> None:
    """A new room is a decision: it gets a contract in .importlinter, and its `__init__` says the same in words."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    under_contract = {name.rsplit(":", 1)[1] for name in contracts.sections() if contracts[name].get("type") == "forbidden"}
    rooms = {path.parent.name for path in (ROOT / "src" / "catpo").glob("*/__init__.py")}
    assert rooms - {"cli"} <= under_contract  # cli imports everything
    for room in rooms:
        said = (ROOT / "src" / "catpo" / room / "__init__.py").read_text(encoding="utf-8")
        assert "May import: " in said and "Exports: " in said, room
