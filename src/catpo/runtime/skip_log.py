"""Rows that cannot be used: stop at the first, or skip them and list them in `skipped.jsonl`. Knows no data set."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from catpo.core.errors import UserError, did_you_mean, shown
from catpo.files.atomic import write_atomic

Item = TypeVar("Item")
ON_ERROR = ("stop", "skip")
FILE = "skipped.jsonl"
LISTED = 100
"""Rows listed in the result itself; `skipped.jsonl` beside it lists all."""


class SkipLog:
    """The rows that one command leaves out; with `on_error='stop'`, the first error is raised instead.

    Raises:
        UserError: `on_error` is neither stop nor skip.
    """

    def __init__(self, on_error: str = "stop") -> None:
        if on_error not in ON_ERROR:
            raise UserError(f"on_error='{on_error}' is not known. {did_you_mean(on_error, ON_ERROR)}")
        self.goes_on = on_error == "skip"
        self.rows: list[dict[str, str]] = []
        """What was left out and why, in the order met."""
        self.kept = 0
        """Rows that were looked at and kept."""

    def note(self, what: str, why: UserError) -> None:
        """Record something as left out.

        Raises:
            UserError: `why` itself, if errors are not skipped.
        """
        if not self.goes_on:
            raise why
        self.rows.append({"what": what, "why": str(why)})

    def usable(self, items: Iterable[Item], use: Callable[[Item], Any], name: Callable[[Item], str]) -> list[Item]:
        """The items for which `use` raises no error.

        Raises:
            UserError: the first failure, if errors are not skipped; or no item is left.
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
        """For the result's own file: how many were left out of how many, and the first `LISTED` of them."""
        return {"count": len(self.rows), "of": len(self.rows) + self.kept, "rows": self.rows[:LISTED]}

    def write(self, folder: Path) -> None:
        """Write all of them to `skipped.jsonl` and a line about it to stderr; nothing if nothing was skipped."""
        if self.rows:
            write_atomic(folder / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
            where = shown(str(folder / FILE), length=1000)
            print(f"catpo: {len(self.rows)} of {len(self.rows) + self.kept} skipped, see {where}", file=sys.stderr)
