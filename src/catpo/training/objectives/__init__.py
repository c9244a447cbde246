"""One loss per file. A plugin defines `loss`, from what is exported here."""

from catpo.training.objectives._base import FORMS, LossOutput, Objective, build, output
from catpo.training.pair_stats import PairStats, ViewStats

__all__ = ["FORMS", "LossOutput", "Objective", "PairStats", "ViewStats", "build", "output"]
