"""Preference pairs in a temporary file, so that memory holds those in use only, however many a data set has.

Pictures stay where they are; those that came with the rows of a stream go into the file. Knows no data set.
"""

from __future__ import annotations

import json
import mmap
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, TypeVar, cast, overload

import numpy as np
import pyarrow as pa

from catpo.core.conversation import Turn
from catpo.core.errors import UserError
from catpo.core.types import Picture, PreferencePair, Side, Span, same_prompt

Item = TypeVar("Item")
BLOCK = 256
"""Pairs that are written together."""
BLOCK_BYTES = 64 << 20
"""Bytes of pictures after which a block is written though it has fewer pairs."""
PICTURE = pa.struct(
    {
        "name": pa.binary(), "path": pa.binary(), "data": pa.binary(), "load": pa.int32(), "at": pa.string(),
        "expected": pa.string(),
    }
)  # fmt: skip
SCHEMA = pa.schema(
    {name: pa.string() for name in ("id", "prompt", "chosen", "rejected", "labels", "meta", "history")}
    | {"images": pa.list_(PICTURE), "prompt_number": pa.int64()}
)


class PairsAt(Sequence[PreferencePair]):
    """Pairs of several sources, read there whenever they are asked for; a slice or a selection shares the sources
    and is of the same class.

    Args:
        sources: anything with `len()` and `[i]`.
        numbers: which pairs, counted through all sources; all of them by default.
    """

    def __init__(self, sources: Sequence[Any], numbers: Sequence[int] | None = None) -> None:
        self._sources = sources
        self._starts = [0, *accumulate(len(source) for source in sources)]
        self._numbers = range(self._starts[-1]) if numbers is None else numbers

    def select(self, places: Sequence[int]) -> PairsAt:
        """The pairs at these places, in their order."""
        return type(self)(self._sources, array("q", (self._numbers[place] for place in places)))

    def ids(self) -> list[str]:
        """Of every pair; of spooled ones without reading the rest of them."""
        every = [pair_id for source in self._sources for pair_id in ids_of(source)]
        return [every[number] for number in self._numbers]

    def prompt_numbers(self) -> list[int]:
        """See `prompt_numbers`."""
        every: list[int] = []
        for source in self._sources:
            start = every[-1] + 1 if every else 0
            every += [start + number for number in prompt_numbers(source)]
        return [every[number] for number in self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, place: slice) -> PairsAt: ...
    def __getitem__(self, place: int | slice) -> PreferencePair | PairsAt:
        if isinstance(place, slice):
            return type(self)(self._sources, self._numbers[place])
        number = self._numbers[place]
        source = bisect_right(self._starts, number) - 1
        return cast(PreferencePair, self._sources[source][number - self._starts[source]])


class SpooledPairs(PairsAt):
    """Pairs in a temporary file.

    The file takes room in the system's folder for such (`TMPDIR`) and has no name there: nothing is left of a killed process.
    """

    @classmethod
    def of(cls, pairs: Iterable[PreferencePair]) -> SpooledPairs:
        """All of the pairs, read once.

        Raises:
            UserError: there is no room for the file; or one of the pairs raises it.
        """
        return cls([_File.written(pairs)])


def ids_of(pairs: Any) -> list[str]:
    """The ids of pairs with `len()` and `[i]`; of spooled ones without reading the rest of them."""
    if isinstance(pairs, PairsAt | _File):
        return pairs.ids()
    return [pairs[place].id for place in range(len(pairs))]


def prompt_numbers(pairs: Any) -> list[int]:
    """A number for each pair with `len()` and `[i]`: equal for those of one prompt that follow one another, as the pairs of
    ranked answers do; of spooled ones without reading them.
    """
    if isinstance(pairs, PairsAt | _File):
        return pairs.prompt_numbers()
    return [number for number, _ in _numbered(pairs[place] for place in range(len(pairs)))]


def _numbered(pairs: Iterable[PreferencePair]) -> Iterator[tuple[int, PreferencePair]]:
    number, before = -1, None
    for pair in pairs:
        number += before is None or not same_prompt(before, pair)
        yield number, pair
        before = pair


def select(pairs: Sequence[PreferencePair], places: Sequence[int]) -> Sequence[PreferencePair]:
    """The pairs at these places; of spooled ones without reading them."""
    return pairs.select(places) if isinstance(pairs, PairsAt) else [pairs[place] for place in places]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """So many of the items, evenly spread, in their order.

    >>> spread(["a", "b", "c", "d", "e"], 3)
    ['a', 'c', 'e']
    """
    if len(items) <= count:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, max(count, 0)).round()]


def joined(first: Sequence[PreferencePair], second: Sequence[PreferencePair]) -> Sequence[PreferencePair]:
    """The pairs of both, one after the other; each stays where it is."""
    if isinstance(first, SpooledPairs) and isinstance(second, SpooledPairs) and first._sources == second._sources:
        return SpooledPairs(first._sources, array("q", [*first._numbers, *second._numbers]))
    return PairsAt([first, second])


class _File:
    """Arrow record batches in a file without a name, mapped into memory page by page; worker processes share it."""

    def __init__(self, file: IO[bytes], loads: list[Callable[..., bytes]]) -> None:
        self.file, self.loads = file, loads
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(pages)))
        blocks = range(self.reader.num_record_batches)
        self.starts = [0, *accumulate(self.reader.get_batch(block).num_rows for block in blocks)]

    @classmethod
    def written(cls, pairs: Iterable[PreferencePair]) -> _File:
        loads: list[Callable[..., bytes]] = []
        with _disk_errors():
            file = tempfile.TemporaryFile(prefix="catpo-pairs-")  # noqa: SIM115 (until the last reader is gone)
            writer = pa.ipc.new_file(file, SCHEMA)
        for block in _blocks(_numbered(pairs)):
            rows = [(*_row(pair, loads), number) for number, pair in block]
            columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
            batch = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
            with _disk_errors():
                writer.write_batch(batch)
        with _disk_errors():
            writer.close()
            file.flush()
        return cls(file, loads)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self.file.fileno()), self.loads)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: int) -> PreferencePair:
        block = bisect_right(self.starts, number) - 1
        row = self.reader.get_batch(block).slice(number - self.starts[block], 1).to_pylist()[0]
        return PreferencePair(
            id=row["id"],
            images=tuple(_picture(each, self.loads) for each in row["images"]),
            prompt=row["prompt"],
            chosen=row["chosen"],
            rejected=row["rejected"],
            labels={
                cast(Side, side): tuple(Span(*span) for span in spans) for side, spans in json.loads(row["labels"]).items()
            },
            meta=json.loads(row["meta"]),
            history=tuple(Turn(*turn) for turn in json.loads(row["history"])),
        )

    def ids(self) -> list[str]:
        return self._column("id")

    def prompt_numbers(self) -> list[int]:
        return self._column("prompt_number")

    def _column(self, name: str) -> list[Any]:
        return [
            each
            for block in range(self.reader.num_record_batches)
            for each in self.reader.get_batch(block).column(name).to_pylist()
        ]


def _received(descriptor: Any, loads: list[Callable[..., bytes]]) -> _File:
    """In the process that gets the file."""
    return _File(open(descriptor.detach(), "rb"), loads)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The pairs cannot be kept in {tempfile.gettempdir()} ({error}). Make room there, or set TMPDIR to another folder."
        ) from error


def _blocks(pairs: Iterable[tuple[int, PreferencePair]]) -> Iterator[list[tuple[int, PreferencePair]]]:
    block: list[tuple[int, PreferencePair]] = []
    size = 0
    for number, pair in pairs:
        block.append((number, pair))
        size += sum(len(picture.data or b"") for picture in pair.images)
        if len(block) == BLOCK or size > BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _row(pair: PreferencePair, loads: list[Callable[..., bytes]]) -> tuple[Any, ...]:
    """A pair's cells in the order of `SCHEMA`, but for its prompt's number."""
    return (
        pair.id,
        pair.prompt,
        pair.chosen,
        pair.rejected,
        _text({side: [(span.start, span.end, span.label) for span in spans] for side, spans in pair.labels.items()}),
        _text(dict(pair.meta)),
        _text([(turn.role, turn.text) for turn in pair.history]),
        [_described(picture, loads) for picture in pair.images],
    )


def _text(value: dict[str, Any] | list[Any]) -> str:
    return json.dumps(value, default=str) if value else str(value)


def _described(picture: Picture, loads: list[Callable[..., bytes]]) -> tuple[Any, ...]:
    """A picture in the order of `PICTURE`, without its pixels, unless it has no other place; `loads` gets the functions that
    read pictures.
    """
    number = None
    if picture.load is not None:
        number = next((number for number, known in enumerate(loads) if known is picture.load), len(loads))
        loads[number:] = [picture.load]
    path = None if picture.path is None else _encoded(str(picture.path))
    return _encoded(picture.name), path, picture.data, number, _text(list(picture.at)), picture.expected


def _picture(row: dict[str, Any], loads: Sequence[Callable[..., bytes]]) -> Picture:
    return Picture(
        name=_decoded(row["name"]),
        path=None if row["path"] is None else Path(_decoded(row["path"])),
        data=row["data"],
        load=None if row["load"] is None else loads[row["load"]],
        at=tuple(json.loads(row["at"])),
        expected=row["expected"],
    )


def _encoded(name: str) -> bytes:
    """Names of files may hold bytes that are no text."""
    return name.encode("utf-8", "surrogatepass")


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogatepass")
