"""What is in wheel and sdist, how large they are, and that both are built without network; a new environment runs the wheel."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import catpo

ROOT = Path(__file__).parent.parent
ASSETS = (
    "models/builtin/model.safetensors",
    "models/builtin/tokenizer.json",
    "data/scenes/sprites.png",
    "text/objects.json",
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make dist`: an sdist, and a wheel built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(dist / f"catpo-{catpo.__version__}-py3-none-any.whl")


def test_twine_finds_nothing_wrong(dist: Path) -> None:
    pytest.importorskip("twine")
    ran = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout


def test_the_sdist_has_what_is_needed_to_build_test_and_read(dist: Path) -> None:
    root = f"catpo-{catpo.__version__}"
    with tarfile.open(dist / f"{root}.tar.gz") as archive:
        names = set(archive.getnames())
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "mkdocs.yml", "README.md", "CHANGELOG.md", "docs/index.md"):
        assert f"{root}/{name}" in names
    assert f"{root}/tests/test_packaging.py" in names


def test_every_source_file_and_asset_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    there = set(wheel.namelist())
    source = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "catpo").rglob("*") if path.is_file()}
    assert {path for path in source if "__pycache__" not in path} <= there
    assert {f"catpo/{asset}" for asset in ASSETS} <= there
    assert any(name.endswith(".html.j2") for name in there)


def test_nothing_else_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {"catpo", f"catpo-{catpo.__version__}.dist-info"}
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
    metadata = wheel.read(f"catpo-{catpo.__version__}.dist-info/METADATA").decode()
    for line in ("Requires-Python: >=3.10", "License-Expression: Apache-2.0", "Requires-Dist: transformers<6,>=5.8"):
        assert line in metadata
    points = wheel.read(f"catpo-{catpo.__version__}.dist-info/entry_points.txt").decode()
    assert "catpo = catpo.cli.main:main" in points


def test_a_new_environment_runs_the_installed_wheel(dist: Path, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """catpo comes from the wheel alone; what it depends on, from the environment of the tests."""
    venv.create(tmp_path / "env", with_pip=False)
    env = tmp_path / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(env), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel.filename)], check=True, capture_output=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script, quiet = env.parent / "catpo", {"HF_HUB_OFFLINE": "1"}
    for arguments, expected in {("--version",): catpo.__version__, ("list", "signals"): "patch_entropy"}.items():
        ran = subprocess.run([script, *arguments], cwd=tmp_path, env=quiet, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert expected in ran.stdout
    code = "import catpo; print(catpo.__file__)"
    where = subprocess.run([env, "-c", code], cwd=tmp_path, env=quiet, capture_output=True, text=True, check=True).stdout
    assert where.startswith(str(tmp_path))


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
