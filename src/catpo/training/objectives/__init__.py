"""One loss per file. A plugin defines `loss`, from what is exported here."""

from catpo.training.objectives._base import FORMS, LossOutput, Objective, build, check_choice, output

__all__ = ["FORMS", "LossOutput", "Objective", "build", "check_choice", "output"]
