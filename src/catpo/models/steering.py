"""Decodings: what becomes of the scores of a next token before one is chosen. Knows none by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from catpo.core import registry
from catpo.core.types import Sample
from catpo.models.views import View

if TYPE_CHECKING:
    from catpo.models.family import Family

Scores = Float[Tensor, "answers vocabulary"]
Steering = Callable[[Sequence[int], Scores, Scores | None], Scores]
"""From the samples' numbers, the model's logits of their next tokens, and those behind another view of the pictures if there
is one, to the scores from which tokens are chosen.
"""


class Decoding(ABC):
    """Base of every module in `scoring/decodings/`. Options are keyword arguments of its constructor."""

    view: View | None = None
    """Of the pictures, which are read twice: as they are, and as this view shows them."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be the same for two answers to be decoded alike: name and all options, as JSON holds them."""

    @abstractmethod
    def steering(self, family: Family, samples: Sequence[Sample]) -> Steering:
        """What changes the scores of the answers to these samples.

        Args:
            family: the model that answers.
            samples: in the order of their numbers; a sample may stand there several times.
        """


def open_decoding(text: str) -> Decoding:
    """The decoding that `name(option=value)` stands for.

    Raises:
        UserError: no such decoding or option.
    """
    decoding: Decoding = registry.opened("decodings", text)
    return decoding
