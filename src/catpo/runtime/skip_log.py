"""What cannot be used: stop at the first, or leave it out and write down what and why. Knows no data set and no model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from catpo.core.errors import UserError, did_you_mean
from catpo.files.atomic import write_atomic

Item = TypeVar("Item")
Made = TypeVar("Made")
ON_ERROR = ("stop", "skip")
FILE = "skipped.jsonl"
LISTED = 100
"""Rows that stand in the result itself; all of them stand in `skipped.jsonl` beside it."""


class SkipLog:
    """The rows that one command leaves out; with `on_error='stop'` the first error goes on its way instead.

    >>> skipped = SkipLog("skip")
    >>> skipped.usable(["1", "x"], lambda text: _number(text), str)
    ['1']
    >>> skipped.summary()
    {'count': 1, 'of': 2, 'rows': [{'what': 'x', 'why': 'x is no number.'}]}

    Raises:
        UserError: another word than stop or skip.
    """

    def __init__(self, on_error: str = "stop") -> None:
        if on_error not in ON_ERROR:
            raise UserError(f"on_error='{on_error}' is not known. {did_you_mean(on_error, ON_ERROR)}")
        self.goes_on = on_error == "skip"
        self.rows: list[dict[str, str]] = []
        """What was left out, and why, in the order met."""
        self.kept = 0
        """Rows that were looked at and kept."""

    def note(self, what: str, why: UserError) -> None:
        """Leave something out.

        Raises:
            UserError: the reason, unless it is to be gone on.
        """
        if not self.goes_on:
            raise why
        self.rows.append({"what": what, "why": str(why)})

    def usable(self, items: Iterable[Item], use: Callable[[Item], Any], name: Callable[[Item], str]) -> list[Item]:
        """Those items with which `use` does not fail.

        Raises:
            UserError: the first failure, unless it is to be gone on; or none is left.
        """
        return list(self.sieve(items, use, name))

    def sieve(self, items: Iterable[Item], use: Callable[[Item], Any], name: Callable[[Item], str]) -> Iterator[Item]:
        """`usable`, one by one."""
        self.kept = 0
        for item in items:
            try:
                use(item)
            except UserError as error:
                self.note(name(item), error)
            else:
                self.kept += 1
                yield item
        if not self.kept and self.rows:
            raise UserError(f"none of {len(self.rows)} rows can be used. The first: {self.rows[0]['why']}")

    def summary(self) -> dict[str, Any]:
        """For the result's own file: how many of how many, and the first of them."""
        return {"count": len(self.rows), "of": len(self.rows) + self.kept, "rows": self.rows[:LISTED]}

    def write(self, folder: Path) -> None:
        """All of them into `skipped.jsonl`, and a line about them on stderr; nothing where nothing was skipped."""
        if self.rows:
            write_atomic(folder / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
            print(f"catpo: {len(self.rows)} of {len(self.rows) + self.kept} skipped, see {folder / FILE}", file=sys.stderr)


def _number(text: str) -> None:
    if not text.isdecimal():
        raise UserError(f"{text} is no number.")
