"""Cat-PO: preference optimisation of vision-language models with token-level rewards.

`catpo.pair`, `score`, `train`, `evaluate` and `report` are what the commands call. They are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from catpo.evaluation.evaluate import evaluate as evaluate
    from catpo.pairing.pair import pair as pair
    from catpo.reporting.build import report as report
    from catpo.rewards.store import RewardStore as RewardStore
    from catpo.scoring.score import score as score
    from catpo.training.config import CatPOConfig as CatPOConfig
    from catpo.training.train import train as train
    from catpo.training.trainer import CatPOTrainer as CatPOTrainer

__version__ = "0.2.0"

_LAZY = {
    "pair": "catpo.pairing.pair",
    "score": "catpo.scoring.score",
    "train": "catpo.training.train",
    "evaluate": "catpo.evaluation.evaluate",
    "report": "catpo.reporting.build",
    "CatPOConfig": "catpo.training.trainer",
    "CatPOTrainer": "catpo.training.trainer",
    "RewardStore": "catpo.rewards.store",
}
"""Public name -> the module that defines it."""

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'catpo' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
