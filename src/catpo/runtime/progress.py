"""Progress with rate and remaining time, on stderr: a bar on a terminal, else one line about every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from io import TextIOBase
from typing import Any, Generic, TextIO, TypeVar, overload

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""


@overload
def track(
    work: int,
    description: str,
    unit: str = ...,
    *,
    done: int = ...,
    enabled: bool = ...,
    stream: TextIO | TextIOBase | None = ...,
) -> Track[Any]: ...
@overload
def track(
    work: Collection[Item],
    description: str,
    unit: str = ...,
    *,
    done: int = ...,
    enabled: bool = ...,
    stream: TextIO | TextIOBase | None = ...,
) -> Track[Item]: ...
def track(
    work: int | Collection[Item],
    description: str,
    unit: str = "items",
    *,
    done: int = 0,
    enabled: bool = True,
    stream: TextIO | TextIOBase | None = None,
) -> Track[Item]:
    """Show progress over a collection, or over a number of things that you count yourself.

    `done` things were finished by an earlier run: they count, but not towards the rate.

        for pair in track(pairs, "Scoring", "pairs"): ...

        with track(500, "Answering", "pictures", done=128) as bar:
            bar.advance(32)
    """
    return Track(work, description, unit, done=done, enabled=enabled, stream=stream)


class Track(Generic[Item]):
    """See `track`. Iterate over it, or enter it and call `advance`."""

    def __init__(
        self,
        work: int | Collection[Item],
        description: str,
        unit: str,
        *,
        done: int,
        enabled: bool,
        stream: TextIO | TextIOBase | None,
    ) -> None:
        self.items: Collection[Item] = () if isinstance(work, int) else work
        self.total = work if isinstance(work, int) else len(work)
        self.description, self.unit, self.enabled = description, unit, enabled
        self.count = self.before = done
        self.note = ""
        self.stream: Any = stream or sys.stderr
        self.bar: Progress | None = None

    def __enter__(self) -> Track[Item]:
        self.started = self.last_line = time.monotonic()
        if self.enabled and self.stream.isatty():
            self.bar = _bar(self.stream)
            self.bar.start()
            self.task = self.bar.add_task(self.description, total=self.total, completed=self.count, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif self.enabled and kind is None:
            self._print(f"{self.count} {self.unit} in {clock(time.monotonic() - self.started)}{self._rate()}")

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self.items:
                yield item
                self.advance()

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """So many more are done; `note` is shown behind, e.g. "loss 0.65"."""
        self.count += count
        self.note = note or self.note
        if self.bar is not None:
            self.bar.update(self.task, completed=self.count, note=f"{self._rate()} {self.note}".strip(", "))
        elif self.enabled and time.monotonic() - self.last_line >= LINE_SECONDS and self.count < self.total:
            self.last_line = time.monotonic()
            self._print(f"{self.count}/{self.total} {self.unit}{self._rate()}{self._left()}{self.note and ', ' + self.note}")

    def _rate(self) -> str:
        """Of this run only: what was done before took no time now."""
        seconds, count = time.monotonic() - self.started, self.count - self.before
        if seconds <= 0 or not count:
            return ""
        rate = count / seconds
        return f", {rate:.1f}/s" if rate >= 1 else f", {1 / rate:.1f} s each"

    def _left(self) -> str:
        seconds, count = time.monotonic() - self.started, self.count - self.before
        return f", {clock(seconds / count * (self.total - self.count))} left" if count else ""

    def _print(self, text: str) -> None:
        print(f"{self.description}: {text}", file=self.stream, flush=True)


def clock(seconds: float) -> str:
    """Seconds as people read them.

    >>> clock(75), clock(3750)
    ('1:15', '1:02:30')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bar(stream: Any) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(file=stream),
    )
