"""One VLM architecture per file. A plugin defines `Family`, a subclass of the one exported here."""

from catpo.models.family import Encoded, Family

__all__ = ["Encoded", "Family"]
