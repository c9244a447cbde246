"""Cat-PO: preference optimisation of vision-language models with token-level rewards.

`catpo.pair`, `score`, `train`, `evaluate` and `write_report` are what the commands call. They are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from catpo.evaluation import evaluate as evaluate
    from catpo.pairing import pair as pair
    from catpo.report.build import report as write_report
    from catpo.rewards import RewardStore as RewardStore
    from catpo.scoring import score as score
    from catpo.trainer import CatPOConfig as CatPOConfig
    from catpo.trainer import CatPOTrainer as CatPOTrainer
    from catpo.training import train as train

__version__ = "0.1.0"

_LAZY = {
    "pair": ("catpo.pairing", "pair"),
    "score": ("catpo.scoring", "score"),
    "train": ("catpo.training", "train"),
    "evaluate": ("catpo.evaluation", "evaluate"),
    "write_report": ("catpo.report.build", "report"),
    "CatPOConfig": ("catpo.trainer", "CatPOConfig"),
    "CatPOTrainer": ("catpo.trainer", "CatPOTrainer"),
    "RewardStore": ("catpo.rewards", "RewardStore"),
}
"""Public name -> module and name there. `report` is a package here, hence `write_report`."""

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'catpo' has no attribute '{name}'")
    module, inside = _LAZY[name]
    return getattr(importlib.import_module(module), inside)


def __dir__() -> list[str]:
    return sorted(__all__)
