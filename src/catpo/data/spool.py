"""Preference pairs in a temporary file, so that memory holds only those in use, however large the data set.

Pictures stay where they are; only those that came with the rows of a stream go into the file. Knows no data set.
"""

from __future__ import annotations

import io
import mmap
import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from typing import IO, Any, TypeVar, overload

import numpy as np

from catpo.core.errors import UserError
from catpo.core.types import PreferencePair

Item = TypeVar("Item")


class SpooledPairs(Sequence[PreferencePair]):
    """Pairs that are read from a temporary file on access; a slice or a selection shares the file.

    The file is in the system's temporary folder (`TMPDIR`) and has no name there: a killed process leaves nothing behind.
    """

    def __init__(self, file: _File, numbers: Sequence[int]) -> None:
        self._file, self._numbers = file, numbers

    @classmethod
    def of(cls, pairs: Iterable[PreferencePair]) -> SpooledPairs:
        """All of the pairs, read once.

        Raises:
            UserError: there is no room for the file; or one of the pairs raises it.
        """
        file = _File.written(pairs)
        return cls(file, range(len(file.starts) - 1))

    def select(self, indices: Sequence[int]) -> SpooledPairs:
        """The pairs at these indices, in their order."""
        return SpooledPairs(self._file, array("q", (self._numbers[index] for index in indices)))

    def ids(self) -> list[str]:
        """The id of every pair, without reading the rest of it."""
        return [self._file.id(number) for number in self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> SpooledPairs: ...
    def __getitem__(self, index: int | slice) -> PreferencePair | SpooledPairs:
        if isinstance(index, slice):
            return SpooledPairs(self._file, self._numbers[index])
        return self._file.pair(self._numbers[index])

    def __iter__(self) -> Iterator[PreferencePair]:
        return map(self._file.pair, self._numbers)


def ids_of(pairs: Sequence[PreferencePair]) -> list[str]:
    """The pairs' ids; of spooled ones without reading the rest of them."""
    return pairs.ids() if isinstance(pairs, SpooledPairs) else [pair.id for pair in pairs]


def select(pairs: Sequence[PreferencePair], indices: Sequence[int]) -> Sequence[PreferencePair]:
    """The pairs at these indices; of spooled ones without reading them."""
    return pairs.select(indices) if isinstance(pairs, SpooledPairs) else [pairs[index] for index in indices]


def joined(first: Sequence[PreferencePair], second: Sequence[PreferencePair]) -> Sequence[PreferencePair]:
    """The pairs of both, one after the other; parts of one file stay in it."""
    if isinstance(first, SpooledPairs) and isinstance(second, SpooledPairs) and first._file is second._file:
        return SpooledPairs(first._file, array("q", [*first._numbers, *second._numbers]))
    return [*first, *second]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spaced, in their order.

    >>> spread(["a", "b", "c", "d", "e"], 3)
    ['a', 'c', 'e']
    """
    if len(items) <= count:
        return list(items)
    return [items[int(index)] for index in np.linspace(0, len(items) - 1, max(count, 0)).round()]


class _File:
    """Every pair pickled after its id, in a file without a name that is mapped into memory; worker processes share it."""

    def __init__(self, file: IO[bytes], starts: array[int], loads: list[Callable[..., bytes]]) -> None:
        self.file, self.starts, self.loads = file, starts, loads
        # an empty file cannot be mapped
        self.pages = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if starts[-1] else b"")

    @classmethod
    def written(cls, pairs: Iterable[PreferencePair]) -> _File:
        starts, loads = array("q", [0]), list[Callable[..., bytes]]()
        with _disk_errors():
            file = tempfile.TemporaryFile(prefix="catpo-pairs-")  # noqa: SIM115 (open until the last reader is gone)
        for pair in pairs:
            loads += [image.load for image in pair.images if image.load and not any(image.load is known for known in loads)]
            content = io.BytesIO()
            _Pickler(content, loads).dump(pair)
            with _disk_errors():
                size = file.write(pickle.dumps(pair.id) + content.getvalue())
            starts.append(starts[-1] + size)
        with _disk_errors():
            file.flush()
        return cls(file, starts, loads)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self.file.fileno()), self.starts, self.loads)

    def id(self, number: int) -> str:
        return pickle.loads(self._record(number))

    def pair(self, number: int) -> PreferencePair:
        stream = io.BytesIO(self._record(number))
        pickle.load(stream)  # the id
        return _Unpickler(stream, self.loads).load()

    def _record(self, number: int) -> memoryview:
        return self.pages[self.starts[number] : self.starts[number + 1]]


class _Pickler(pickle.Pickler):
    """Writes a number for a function that loads pictures: it may hold a whole data set, and stays in memory."""

    def __init__(self, stream: io.BytesIO, loads: Sequence[Callable[..., bytes]]) -> None:
        super().__init__(stream)
        self.numbers = {id(load): number for number, load in enumerate(loads)}

    def persistent_id(self, value: Any) -> int | None:
        return self.numbers.get(id(value))


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, loads: Sequence[Callable[..., bytes]]) -> None:
        super().__init__(stream)
        self.loads = loads

    def persistent_load(self, number: int) -> Callable[..., bytes]:
        return self.loads[number]


def _received(descriptor: Any, starts: array[int], loads: list[Callable[..., bytes]]) -> _File:
    """Runs in the process that receives the file."""
    return _File(open(descriptor.detach(), "rb"), starts, loads)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The pairs cannot be kept in {tempfile.gettempdir()} ({error}). Make room there, or set TMPDIR to another folder."
        ) from error
