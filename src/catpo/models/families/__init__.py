"""One VLM architecture per file. A plugin defines `Family`, a subclass of the one exported here."""

from catpo.core.types import PatchGrid
from catpo.models.family import Encoded, Family, Pixels, Size

__all__ = ["Encoded", "Family", "PatchGrid", "Pixels", "Size"]
