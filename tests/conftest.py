"""What every test stands on: offline, one thread, shapes checked at call time; the packaged model and the outside data."""

from __future__ import annotations

import gc
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a worker per core, not a pool per worker
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Float[Tensor, "tokens"] is checked here and nowhere else; the options in `config` are validated, and converted, by pydantic
ROOMS = sorted(path.name for path in (Path(__file__).parent.parent / "src" / "catpo").iterdir() if path.is_dir())
install_import_hook([f"catpo.{room}" for room in ROOMS if room not in ("config", "__pycache__")], "checking.checked")

settings.register_profile("few", max_examples=25, deadline=None, derandomize=True, database=None)
settings.register_profile("nightly", max_examples=3000, deadline=None, print_blob=True)
settings.load_profile("few")  # unless --hypothesis-profile names another

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep a million objects of imported libraries out of every garbage collection that follows."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real photographs and recorded benchmark data that no package ships; tests that need it skip without it."""
    folder = Path(os.environ.get("CATPO_SHARED", ROOT.parent / "shared"))
    if not (folder / "real-data").is_dir():
        pytest.skip(f"{folder} has no real-data; name the folder in CATPO_SHARED")
    return folder


@pytest.fixture(scope="session")
def builtin() -> Path:
    """The packaged vision-language model."""
    from catpo.models.loading import BUILTIN

    assert (BUILTIN / "model.safetensors").is_file(), f"{BUILTIN} is not packaged; see tools/train_builtin_vlm.py"
    return BUILTIN


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk, as a user has one. Tests read it, and leave it as it is."""
    from tiny import llava

    path = tmp_path_factory.mktemp("model")
    family = llava()
    family.model.save_pretrained(path)
    family.processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward store of eight pairs, scored with that model."""
    from catpo.models import loading
    from catpo.scoring.score import score_pairs
    from tiny import pairs

    path = tmp_path_factory.mktemp("rewards") / "store"
    score_pairs(pairs(8), loading.load(folder), path, progress=False)
    return path
