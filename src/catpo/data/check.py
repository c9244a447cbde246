"""`catpo data check`, which lists all problems of a data set at once.

Knows no format; token counts come from a model's own processor.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from catpo.core.errors import UserError
from catpo.core.types import SIDES, Picture, PreferencePair, Sample
from catpo.data.read import scan

OWN = re.compile(r"(?<!field )'[^']*'|\b[0-9a-f]{16}\b|\d[\d,.]*")
"""What is a row's own in a message: quoted texts, except names of fields; ids of pairs; numbers."""


@dataclass(frozen=True)
class Problem:
    """Something about one row that a later step would refuse, or that is surely a mistake."""

    kind: str
    """unusable row, broken picture, duplicate pair, duplicate chosen (or rejected) response, or over-long."""
    where: str
    """File and row."""
    what: str


@dataclass(frozen=True)
class Lengths:
    """Lengths of one part of many pairs."""

    unit: str
    least: int
    median: float
    most: int
    mean: float

    @classmethod
    def of(cls, unit: str, values: Sequence[int]) -> Lengths:
        return cls(unit, min(values), median(values), max(values), sum(values) / len(values))


@dataclass(frozen=True)
class DataReport:
    """What `catpo data check` found."""

    name: str
    rows: int
    pairs: int
    samples: int
    pictures: int
    """Different ones."""
    lengths: Mapping[str, Lengths]
    """Of prompt, chosen and rejected, in tokens of the model or in words; of the picture in image tokens."""
    problems: list[Problem] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def grouped(self) -> list[tuple[Problem, int]]:
        """Equal problems of several rows as the first of them, and their number; in the order of the rows."""
        groups: dict[tuple[str, str], list[Problem]] = {}
        for problem in self.problems:
            groups.setdefault((problem.kind, OWN.sub("…", problem.what)), []).append(problem)
        return [(group[0], len(group)) for group in groups.values()]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def check_data(data: str | Path, *, family: Any = None, max_length: int | None = None, limit: int | None = None) -> DataReport:
    """Read every row, open every picture, and collect what is wrong.

    Args:
        data: folder, file or `name(option=value)` of a data set.
        family: the model (`Family`) whose tokens are counted; without one, words are.
        max_length: largest number of tokens of the prompt with the longer response (needs `family`).
        limit: read at most this many rows.

    Raises:
        UserError: the data set cannot be read at all.
    """
    if max_length is not None and family is None:
        raise UserError("max_length counts tokens, so it needs a model: --model.")
    checker = _Checker(family, max_length)
    for where, row in islice(scan(data), limit):
        checker.check(where, row)
    return checker.report(str(data))


class _Checker:
    """Checks row by row; keeps numbers, not rows."""

    def __init__(self, family: Any, max_length: int | None) -> None:
        self.family, self.max_length = family, max_length
        self.problems: list[Problem] = []
        self.lengths: dict[str, list[int]] = defaultdict(list)
        self.first_places: dict[bytes, str] = {}
        """Hash of texts and pictures -> the row that had them first."""
        self.pictures: set[str] = set()
        """Hashes of those that can be opened."""
        self.last_row = ""
        self.rows = self.pairs = self.samples = 0

    def check(self, where: str, row: PreferencePair | Sample | UserError) -> None:
        self.rows += where != self.last_row  # the pairs of one row come one after the other
        self.last_row = where
        if isinstance(row, UserError):
            self._add("unusable row", where, str(row).removeprefix(where).lstrip(": ,"))
            return
        try:
            digests = [self._opened(image) for image in row.images]
        except UserError as error:
            self._add("broken picture", where, str(error))
            return
        if isinstance(row, Sample):
            self.samples += 1
            return
        self.pairs += 1
        self._find_duplicate(where, row, digests)
        self._measure(where, row)

    def _add(self, kind: str, where: str, what: str) -> None:
        self.problems.append(Problem(kind, where, what))

    def _opened(self, image: Picture) -> str:
        """The picture's hash; the same bytes are decoded once."""
        digest = image.digest()
        if digest not in self.pictures:
            image.open()
            self.pictures.add(digest)
        return digest

    def _find_duplicate(self, where: str, pair: PreferencePair, digests: Sequence[str]) -> None:
        asked = repr((digests, pair.history, pair.prompt))
        chosen, rejected = (_hash(f"{side} {asked}{pair.response(side)}") for side in SIDES)
        keys = {"pair": chosen + rejected, "chosen response": chosen, "rejected response": rejected}
        for what, key in keys.items():
            first = self.first_places.setdefault(key, where)
            if first != where:
                self._add(f"duplicate {what}", where, f"is that of {first}")
                return

    def _measure(self, where: str, pair: PreferencePair) -> None:
        if self.family is None:
            for name, text in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
                self.lengths[name].append(len(text.split()))
            return
        try:
            encoded = self.family.encode(pair)
        except UserError as error:
            self._add("unusable row", where, str(error))
            return
        self.lengths["picture"].append(len(encoded.patches))
        self.lengths["prompt"].append(len(encoded.prompt_ids))
        for side in SIDES:
            self.lengths[side].append(len(encoded.response_ids[side]))
        longest = len(encoded.prompt_ids) + max(len(ids) for ids in encoded.response_ids.values())
        if self.max_length is not None and longest > self.max_length:
            self._add("over-long", where, f"{longest} tokens exceed max_length={self.max_length}")

    def report(self, name: str) -> DataReport:
        unit = "tokens" if self.family else "words"
        lengths = {}
        for part, values in self.lengths.items():
            lengths[part] = Lengths.of("image tokens" if part == "picture" else unit, values)
        return DataReport(name, self.rows, self.pairs, self.samples, len(self.pictures), lengths, self.problems)
