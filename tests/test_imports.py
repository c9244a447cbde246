"""Every module imports, and what must stay light does."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import catpo

MODULES = [module.name for module in pkgutil.walk_packages(catpo.__path__, "catpo.") if not module.name.endswith("__main__")]
TORCHLESS = [
    name
    for name in MODULES
    if name.split(".")[1] in {"core", "text", "files", "config", "data", "rewards", "judges", "reporting"}
]


SOURCE = Path(catpo.__file__).parent
ROOMS = sorted(path.parent for path in SOURCE.glob("*/__init__.py"))


def test_the_package_folder_fits_on_one_screen() -> None:
    assert len([path for path in SOURCE.iterdir() if path.name != "__pycache__"]) <= 20


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_room_says_what_it_imports_and_exports(room: Path) -> None:
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    starts = [line.partition(":")[0] for line in text.splitlines()]
    assert "May import" in starts and "Exports" in starts


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
