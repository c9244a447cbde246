"""`catpo data check`, which lists all problems of a data set at once, and `catpo data convert`, which writes the common format.

Knows no format; token counts come from a model's own processor.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from catpo.core.errors import UserError
from catpo.core.types import SIDES, PreferencePair, Sample
from catpo.data.pair_folder import ABOUT, ROWS, append_pairs
from catpo.data.read import open_data, scan
from catpo.files.json_files import write_json
from catpo.files.lock import lock
from catpo.files.provenance import versions

OWN = re.compile(r"(?<!field )'[^']*'|\b[0-9a-f]{16}\b|\d[\d,.]*")
"""What is a row's own in a message: quoted texts, except names of fields; ids of pairs; numbers."""
BLOCK = 256
"""Pairs converted between two writes."""


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
        self.first_places: dict[tuple[Any, ...], str] = {}
        """Texts and pictures -> the row that had them first."""
        self.pictures: set[str] = set()
        self.rows: set[str] = set()
        self.pairs = self.samples = 0

    def check(self, where: str, row: PreferencePair | Sample | UserError) -> None:
        self.rows.add(where)
        if isinstance(row, UserError):
            self._add("unusable row", where, str(row).removeprefix(where).lstrip(": ,"))
            return
        try:
            for image in row.images:
                image.open()
            digests = [image.digest() for image in row.images]
        except UserError as error:
            self._add("broken picture", where, str(error))
            return
        self.pictures.update(digests)
        if isinstance(row, Sample):
            self.samples += 1
            return
        self.pairs += 1
        self._find_duplicate(where, row, digests)
        self._measure(where, row)

    def _add(self, kind: str, where: str, what: str) -> None:
        self.problems.append(Problem(kind, where, what))

    def _find_duplicate(self, where: str, pair: PreferencePair, digests: Sequence[str]) -> None:
        asked = (*digests, pair.history, pair.prompt)
        keys: dict[str, tuple[Any, ...]] = {"pair": (*asked, pair.chosen, pair.rejected)}
        for side in SIDES:
            keys[f"{side} response"] = (side, *asked, pair.response(side))
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
        return DataReport(name, len(self.rows), self.pairs, self.samples, len(self.pictures), lengths, self.problems)


def convert_data(data: str | Path, output: str | Path) -> int:
    """Write a data set's pairs as a folder that every command reads; returns their number.

    Each picture is kept as it is, once. Until the last pair is written, the folder counts as unfinished.

    Raises:
        UserError: a row cannot be used (`catpo data check` shows all of them), or the folder holds pairs already.
    """
    folder = Path(output)
    with lock(folder):
        if (folder / ROWS).exists():
            raise UserError(f"{folder} holds pairs already. Choose another --output, or remove it.")
        metadata = {"format": 1, "data": str(data), "versions": versions()}
        write_json(folder / ABOUT, {**metadata, "complete": False})
        pairs, count = open_data(data).pairs(), 0
        while block := list(islice(pairs, BLOCK)):
            append_pairs(folder, block)
            count += len(block)
        if not count:
            raise UserError(f"{data} holds no preference pairs. `catpo data check` says what is wrong with its rows.")
        write_json(folder / ABOUT, {**metadata, "pairs": count, "complete": True})
    return count
