"""What a data set offers: samples (pictures with prompts), pairs (preferences), or both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from catpo.errors import UserError
from catpo.types import PreferencePair, Sample


class Dataset:
    """Base of every module in `datasets/`; a data set overrides what it has."""

    name: str = "dataset"
    vocabulary: Mapping[str, str] | None = None
    """Surface form -> object, for the words that can be checked against `Sample.truth`; None: the built-in table."""

    def samples(self) -> Iterator[Sample]:
        """Pictures with prompts, in a fixed order.

        Raises:
            UserError: this data set has none.
        """
        raise UserError(f"{self.name} has no samples to answer, only finished pairs. Give it to `catpo score`.")

    def pairs(self) -> Iterator[PreferencePair]:
        """Preference pairs, in a fixed order.

        Raises:
            UserError: this data set has none.
        """
        raise UserError(f"{self.name} has no preference pairs. Make some: `catpo pair --data {self.name} --output pairs`.")
