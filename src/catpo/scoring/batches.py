"""The batches of the scoring pass: which pairs go together, encoded and packed. Needs no weights, so it runs in any process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from catpo.core.errors import UserError
from catpo.core.types import SIDES, PreferencePair, Side
from catpo.models.family import Encoded, Family
from catpo.models.packing import Batch, Prefix, by_prompt, pack, row_length
from catpo.models.questions import with_questions
from catpo.models.views import OtherPictures
from catpo.runtime.workers import in_workers

SORTED_PAIRS = 32
"""Pairs sorted by length together, unless a batch holds more; their pixels are in memory."""


@dataclass(frozen=True)
class Window:
    """Pairs that are sorted by length together: a part of a shard, as places in the data set."""

    shard: int
    places: range
    is_last: bool
    """Of the shard."""
    reads_another: bool
    """Whether the pairs are read with another picture too."""


@dataclass(frozen=True)
class Prepared:
    """A batch as the model reads it."""

    places: list[int]
    """Of its pairs in the data set."""
    encoded: list[Encoded]
    """Without pixels, which are in the rows."""
    rows: Batch
    pieces: list[dict[Side, list[str]]]
    """The text of each token of each pair's responses."""
    with_another: Batch | None = None
    """The rows with another picture, if they are known to be read and every pair has one."""


@dataclass(frozen=True)
class _Row:
    """Pairs that share a row: those of one prompt, or one."""

    places: list[int]
    encoded: list[Encoded]

    @cached_property
    def length(self) -> int:
        return self.encoded[0].length if len(self.encoded) == 1 else row_length(self.encoded)


@dataclass(frozen=True)
class Preparation:
    """Makes the batches of a window."""

    reader: Family
    """The model's family; its weights are not used."""
    pairs: Sequence[PreferencePair]
    others: OtherPictures
    batch_size: int
    batch_tokens: int
    max_length: int | None = None
    ask: Callable[[PreferencePair], Sequence[str]] | None = None
    """Yes/no questions about a pair's pictures, which are read beside its responses."""

    def windows(self, shard: int, places: slice, reads_another: bool) -> Iterator[Window]:
        """The parts of a shard: the pixels of a whole one may not fit in memory."""
        size = max(SORTED_PAIRS, self.batch_size)
        for start in range(places.start, places.stop, size):
            end = min(start + size, places.stop)
            yield Window(shard, range(start, end), end == places.stop, reads_another)

    def __call__(self, window: Window) -> tuple[Window, list[Prepared]]:
        """The window with its batches, of rows of similar length, so that little is padded. They depend on its pairs only.

        Raises:
            UserError: a pair cannot be encoded; names it.
        """
        pairs = [self.pairs[place] for place in window.places]
        encoded = self.reader.encode_all(pairs, max_length=self.max_length)
        if self.ask is not None:
            asked = zip(pairs, encoded, strict=True)
            encoded = [with_questions(self.reader, pair, item, self.ask(pair)) for pair, item in asked]
        rows = sorted(self._rows(window.places, encoded), key=lambda row: (-row.length, row.encoded[0].pair_id))
        batches = []
        while rows:
            most = max(1, self.batch_tokens // rows[0].length)
            sums = accumulate(len(row.places) for row in rows[:most])
            count = max(1, sum(pair_count <= self.batch_size for pair_count in sums))
            places = [place for row in rows[:count] for place in row.places]
            items = [item for row in rows[:count] for item in row.encoded]
            rows = rows[count:]
            batches.append(self._prepared(places, items, window.reads_another))
        return window, batches

    def _rows(self, places: Sequence[int], encoded: Sequence[Encoded]) -> Iterator[_Row]:
        """Pairs of one prompt share a row as long as it is no more than a batch."""
        groups = by_prompt(encoded) if self.reader.shares_prefix else [[index] for index in range(len(encoded))]
        for group in groups:
            row = _Row([], [])
            for index in group:
                longer = _Row([*row.places, places[index]], [*row.encoded, encoded[index]])
                is_full = len(longer.places) > self.batch_size or longer.length > self.batch_tokens
                if is_full and row.places:
                    yield row
                    longer = _Row([places[index]], [encoded[index]])
                row = longer
            yield row

    def _prepared(self, places: list[int], encoded: list[Encoded], reads_another: bool) -> Prepared:
        pieces: list[dict[Side, list[str]]] = []
        for item in encoded:  # the last token of a response is the end-of-sequence token
            pieces.append({side: [*self.reader.pieces(item.response_ids[side][:-1]), ""] for side in SIDES})
        rows = packed(self.reader, encoded)
        another = None
        if reads_another:
            another = with_another(self.reader, [self.pairs[place] for place in places], self.others)
        return Prepared(places, [replace(item, pixels={}) for item in encoded], rows, pieces, another)


@dataclass(frozen=True)
class _Encoding:
    """Encodes a pair only to see whether that can be done."""

    reader: Family
    pairs: Sequence[PreferencePair]
    max_length: int | None

    def __call__(self, place: int) -> str | None:
        try:
            self.reader.encode(self.pairs[place], max_length=self.max_length)
        except UserError as error:
            return str(error)
        return None


def encoding_problems(
    pairs: Sequence[PreferencePair], family: Family, max_length: int | None, worker_count: int
) -> Iterator[str | None]:
    """Why the model cannot read each of the pairs; None if it can."""
    return in_workers(_Encoding(family.reader(), pairs, max_length), range(len(pairs)), worker_count)


def packed(family: Family, encoded: Sequence[Encoded]) -> Batch:
    """The rows of some pairs, with a shared prefix where the family can."""
    prefix: Prefix = "shared" if family.shares_prefix else "separate"
    return pack(family, encoded, prefix=prefix)


def with_another(family: Family, pairs: Sequence[PreferencePair], others: OtherPictures) -> Batch | None:
    """The rows of some pairs with the pictures of others; None if a pair finds no other."""
    encoded = []
    for pair in pairs:
        images = others.of(pair)
        if images is None:
            return None
        encoded.append(family.encode(replace(pair, images=images)))
    return packed(family, encoded)
