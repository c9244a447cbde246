"""Progress with rate and remaining time, on stderr: a bar on a terminal, otherwise a line about every ten seconds."""

from __future__ import annotations

import sys
import time
from io import TextIOBase
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from catpo.core.errors import shown

LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""


class Track:
    """Progress over `total` things; `done` of them were finished by an earlier run and do not count towards the rate.

    with track(500, "Answering", "pictures", done=128) as bar:
        bar.advance(32)
    """

    def __init__(
        self,
        total: int,
        description: str,
        unit: str = "items",
        *,
        done: int = 0,
        enabled: bool = True,
        stream: TextIO | TextIOBase | None = None,
    ) -> None:
        self.total, self.description, self.unit, self.enabled = total, description, unit, enabled
        self.count = self.before = done
        self.note = ""
        self.stream: Any = stream or sys.stderr
        self.bar: Progress | None = None

    def __enter__(self) -> Track:
        self.started = self.last_line = time.monotonic()
        if self.enabled and self.stream.isatty():
            columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self.bar = Progress(TextColumn("{task.description}"), *columns, console=Console(file=self.stream))
            self.task = self.bar.add_task(self.description, total=self.total, completed=self.count, note="")
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif self.enabled and kind is None:
            self._print(f"{self.count} {self.unit} in {clock(time.monotonic() - self.started)}{self._rate()}")

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count more things as done; `note` is shown last, e.g. "loss 0.65"."""
        self.count += count
        self.note = note or self.note
        if self.bar is not None:
            self.bar.update(self.task, completed=self.count, note=f"{self._rate()} {self.note}".strip(", "))
        elif self.enabled and time.monotonic() - self.last_line >= LINE_SECONDS and self.count < self.total:
            self.last_line = time.monotonic()
            note = f", {self.note}" if self.note else ""
            self._print(f"{self.count}/{self.total} {self.unit}{self._rate()}{self._left()}{note}")

    def tell(self, text: str) -> None:
        """A line that stays: above the bar, or with the others."""
        if self.bar is not None:
            self.bar.console.print(f"{self.count}/{self.total} {self.unit}: {text}", highlight=False, markup=False)
        elif self.enabled:
            self.last_line = time.monotonic()
            self._print(f"{self.count}/{self.total} {self.unit}{self._left()}, {text}")

    def _seconds_each(self) -> float:
        """Of what this run did, since an earlier run's part took no time now; 0 before anything is done."""
        done = self.count - self.before
        return (time.monotonic() - self.started) / done if done else 0.0

    def _rate(self) -> str:
        seconds = self._seconds_each()
        if not seconds:
            return ""
        return f", {1 / seconds:.1f}/s" if seconds <= 1 else f", {seconds:.1f} s each"

    def _left(self) -> str:
        seconds = self._seconds_each()
        return f", {clock(seconds * (self.total - self.count))} left" if seconds else ""

    def _print(self, text: str) -> None:
        print(f"{self.description}: {text}", file=self.stream, flush=True)


track = Track


def tell_complete(output: object, rest: str = "Nothing was done again.") -> None:
    """Say on stderr that an earlier run had finished an output with the same options."""
    print(f"catpo: {shown(str(output), length=500)} is complete already. {rest}", file=sys.stderr)


def clock(seconds: float) -> str:
    """Seconds as people read them.

    >>> clock(75), clock(3750)
    ('1:15', '1:02:30')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
