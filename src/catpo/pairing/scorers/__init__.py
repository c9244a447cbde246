"""Scorers of sentences, one per file. A plugin defines `Scorer`, a subclass of the one exported here."""

from catpo.pairing.scorers._base import Scorer, check_scorer, scorer

__all__ = ["Scorer", "check_scorer", "scorer"]
