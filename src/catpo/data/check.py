"""`catpo data check` and `catpo data convert`: everything that is wrong with a data set at once, and the common format.

Knows no format; token counts come from a model's own processor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Protocol, runtime_checkable

from catpo.core.errors import UserError
from catpo.core.types import SIDES, PreferencePair, Sample
from catpo.data.pair_folder import ABOUT, ROWS, append_pairs
from catpo.data.read import open_data, scan
from catpo.files.json_files import write_json
from catpo.files.lock import lock
from catpo.files.provenance import versions

BLOCK = 256
"""Pairs converted between two writes."""


@dataclass(frozen=True)
class Problem:
    """Something about one row that a later step would refuse, or that nobody can have meant."""

    kind: str
    """unusable row, broken picture, duplicate pair, duplicate chosen (or rejected) response, or over-long."""
    where: str
    """File and row."""
    what: str


@dataclass(frozen=True)
class Lengths:
    """How long something is, over all pairs."""

    unit: str
    least: int
    median: float
    most: int

    @classmethod
    def of(cls, unit: str, values: Iterable[int]) -> Lengths | None:
        numbers = list(values)
        return cls(unit, min(numbers), median(numbers), max(numbers)) if numbers else None


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


@runtime_checkable
class Encoder(Protocol):
    """A model's family, as far as counting tokens needs it."""

    def encode(self, pair: PreferencePair) -> Any: ...


def check_data(
    data: str | Path, *, family: Encoder | None = None, max_length: int | None = None, limit: int | None = None
) -> DataReport:
    """Read every row, open every picture, and gather what is wrong.

    Args:
        data: folder, file or `name(option=value)` of a data set.
        family: the model whose tokens are counted; without one, words are.
        max_length: most tokens of the prompt and the longer response (needs `family`).
        limit: the first so many rows only.

    Raises:
        UserError: the data set cannot be read at all.
    """
    if max_length is not None and family is None:
        raise UserError("max_length counts tokens, so it needs a model: --model.")
    checker = _Checker(family, max_length)
    for where, row in islice(scan(data), limit):
        checker.take(where, row)
    return checker.report(str(data))


class _Checker:
    """Takes rows one by one; keeps numbers, not rows."""

    def __init__(self, family: Encoder | None, max_length: int | None) -> None:
        self.family, self.max_length = family, max_length
        self.problems: list[Problem] = []
        self.lengths: dict[str, list[int]] = defaultdict(list)
        self.first: dict[tuple[str, ...], str] = {}
        self.pictures: set[str] = set()
        self.places: set[str] = set()
        self.pairs = self.samples = 0

    def take(self, where: str, row: PreferencePair | Sample | UserError) -> None:
        self.places.add(where)
        if isinstance(row, UserError):
            self.problems.append(Problem("unusable row", where, _without_place(str(row), where)))
            return
        try:
            for image in row.images:
                image.open()
                self.pictures.add(image.digest())
        except UserError as error:
            self.problems.append(Problem("broken picture", where, str(error)))
            return
        if isinstance(row, Sample):
            self.samples += 1
            return
        self.pairs += 1
        self._look_for_twins(where, row)
        self._measure(where, row)

    def _look_for_twins(self, where: str, pair: PreferencePair) -> None:
        images = [image.digest() for image in pair.images]
        same_answers = {"pair": (*images, pair.prompt, pair.chosen, pair.rejected)}
        same_answers |= {f"{side} response": (side, *images, pair.prompt, pair.response(side)) for side in SIDES}
        for what, key in same_answers.items():
            before = self.first.setdefault(key, where)
            if before != where:
                self.problems.append(Problem(f"duplicate {what}", where, f"is that of {before}"))
                return

    def _measure(self, where: str, pair: PreferencePair) -> None:
        if self.family is None:
            self.lengths["prompt"].append(len(pair.prompt.split()))
            for side in SIDES:
                self.lengths[side].append(len(pair.response(side).split()))
            return
        try:
            encoded = self.family.encode(pair)
        except UserError as error:
            self.problems.append(Problem("unusable row", where, str(error)))
            return
        self.lengths["picture"].append(len(encoded.patches))
        self.lengths["prompt"].append(len(encoded.prompt_ids))
        for side in SIDES:
            self.lengths[side].append(len(encoded.response_ids[side]))
        longest = len(encoded.prompt_ids) + max(len(ids) for ids in encoded.response_ids.values())
        if self.max_length is not None and longest > self.max_length:
            self.problems.append(Problem("over-long", where, f"{longest} tokens exceed max_length={self.max_length}"))

    def report(self, name: str) -> DataReport:
        unit = dict.fromkeys(("prompt", *SIDES), "tokens" if self.family else "words") | {"picture": "image tokens"}
        lengths = {name: found for name, values in self.lengths.items() if (found := Lengths.of(unit[name], values))}
        return DataReport(name, len(self.places), self.pairs, self.samples, len(self.pictures), lengths, self.problems)


def _without_place(message: str, where: str) -> str:
    return message.removeprefix(where).lstrip(": ,")


def convert_data(data: str | Path, output: str | Path) -> int:
    """Write a data set's pairs as a folder that every command reads; gives their number.

    Pictures are kept as they are, each once. Until the last pair is written, the folder counts as unfinished.

    Raises:
        UserError: a row cannot be used (`catpo data check` shows all of them), or the folder holds pairs already.
    """
    folder = Path(output)
    with lock(folder):
        if (folder / ROWS).exists():
            raise UserError(f"{folder} holds pairs already. Choose another --output, or remove it.")
        about = {"format": 1, "data": str(data), "versions": versions()}
        write_json(folder / ABOUT, {**about, "complete": False})
        count = 0
        for block in _blocks(open_data(data).pairs()):
            append_pairs(folder, block)
            count += len(block)
        if not count:
            raise UserError(f"{data} holds no preference pairs. `catpo data check` says what is wrong with its rows.")
        write_json(folder / ABOUT, {**about, "pairs": count, "complete": True})
    return count


def _blocks(pairs: Iterator[PreferencePair]) -> Iterator[list[PreferencePair]]:
    while block := list(islice(pairs, BLOCK)):
        yield block
