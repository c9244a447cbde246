"""What is in the wheel, how large it is, and that the project can be built without network."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ASSETS = (
    "models/builtin/model.safetensors",
    "models/builtin/tokenizer.json",
    "data/scenes/sprites.png",
    "text/objects.json",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, capture_output=True)
    (path,) = folder.glob("catpo-*.whl")
    return zipfile.ZipFile(path)


def test_every_source_file_and_asset_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    there = set(wheel.namelist())
    source = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "catpo").rglob("*") if path.is_file()}
    assert {path for path in source if "__pycache__" not in path} <= there
    assert {f"catpo/{asset}" for asset in ASSETS} <= there
    assert any(name.endswith(".html.j2") for name in there)


def test_nothing_else_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {"catpo", f"catpo-{_version(wheel)}.dist-info"}
    assert [name for name in wheel.namelist() if "__pycache__" in name or "/." in name] == []


def test_the_wheel_is_small(wheel: zipfile.ZipFile) -> None:
    sizes = {info.filename: info.compress_size for info in wheel.infolist()}
    assert sum(size for name, size in sizes.items() if "/models/builtin/" in name) <= 16e6
    assert sum(sizes.values()) <= 20e6


def test_licences_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    texts = [name for name in wheel.namelist() if "LICENSE" in name or "NOTICE" in name]
    assert any(name.endswith("licenses/LICENSE") for name in texts)
    assert any(name.endswith("licenses/NOTICE") for name in texts)
    assert any("noto" in name.lower() for name in texts)
    assert "Apache License" in wheel.read(next(name for name in texts if name.endswith("/LICENSE"))).decode()


def test_the_metadata_says_what_is_needed(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(f"catpo-{_version(wheel)}.dist-info/METADATA").decode()
    for line in ("Requires-Python: >=3.10", "License-Expression: Apache-2.0", "Requires-Dist: transformers<6,>=5.8"):
        assert line in metadata
    points = wheel.read(f"catpo-{_version(wheel)}.dist-info/entry_points.txt").decode()
    assert "catpo = catpo.cli.main:main" in points


@pytest.mark.slow
def test_the_commands_run_from_the_unpacked_wheel_outside_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import catpo; "
        "assert catpo.__file__.startswith(sys.path[0]), catpo.__file__; "
        "catpo.pair(model='builtin', data='scenes(count=24)', output='pairs', progress=False); "
        "store = catpo.score(pairs='pairs', model='builtin', output='rewards', limit=2, progress=False); "
        "print(catpo.report(output='report.html', pairs='pairs', rewards='rewards'))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "report.html").stat().st_size > 10_000


def _version(wheel: zipfile.ZipFile) -> str:
    return (
        next(name for name in wheel.namelist() if name.endswith("/METADATA")).split("/")[0].split("-")[1].removesuffix(".dist")
    )
