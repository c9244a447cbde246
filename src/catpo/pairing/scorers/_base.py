"""The base of scorers: a picture is encoded once, then texts are compared with it. Knows no pairing method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from catpo.core import registry
from catpo.core.spec import Spec, check_options, parse
from catpo.core.types import Sample

if TYPE_CHECKING:
    from catpo.models.family import Family


class Scorer(ABC):
    """Base of every module in `scorers/`. Options are keyword arguments of its constructor, after the model that answers."""

    def __init__(self, family: Family) -> None:
        self.family = family

    @abstractmethod
    def look(self, samples: Sequence[Sample]) -> list[Any]:
        """Encode each sample's pictures, once."""

    @abstractmethod
    def relevance(self, seen: Sequence[Any], texts: Sequence[str]) -> list[float]:
        """How well each text fits its pictures, given what `look` returned for them, in [-1, 1]; larger is better."""


def scorer(text: str | Spec, family: Family) -> Scorer:
    """The scorer that `name(option=value)` stands for.

    Raises:
        UserError: no such scorer or option, or it cannot be loaded.
    """
    opened: Scorer = registry.opened("scorers", text, family)
    return opened


def check_scorer(text: str | Spec) -> None:
    """Raise UserError for a scorer or option that does not exist; loads no weights."""
    spec = parse(text)
    check_options(registry.load("scorers", spec.name), spec)
