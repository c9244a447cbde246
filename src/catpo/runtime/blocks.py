"""Blocks of work that one process does one after the other, or several share: the same file comes out, in the same order.

Knows neither what a block is nor what is made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.files.json_files import append_rows, repair_rows
from catpo.runtime.work_group import WorkGroup

Rows = list[dict[str, Any]]
MADE = {"block": int, "rows": list[dict]}
"""A row of what one of several processes has made."""


class Blocks:
    """The blocks of a folder that are not written yet.

    One process makes and writes block by block. Several write what they make into a file each, which the first joins in the
    end; a killed run goes on from there, with any number of processes.

    Args:
        part: name of those files, with a place for the process, e.g. `answers.{}.part`.
        written: how many blocks are in the folder's own file; asked in the first process.
        count: all blocks.
        belongs: whether rows that stand in such a file are those of a block.

    Raises:
        UserError: such a file holds something else.
    """

    def __init__(
        self,
        group: WorkGroup,
        folder: Path,
        part: str,
        written: Callable[[], int],
        count: int,
        belongs: Callable[[int, Rows], bool],
    ) -> None:
        self.group, self.folder, self.part, self.count, self.belongs = group, folder, part, count, belongs
        self.done = group.broadcast("done", written)
        beside = group.broadcast("beside", lambda: [*self._made()])
        self.todo = [number for number in range(self.done, count) if number not in beside]
        """Blocks that nobody has made yet."""

    def run(self, make: Callable[[int], Rows], write: Callable[[int, Rows], object]) -> None:
        """Make what is left, by `make` in any process and any order, and write it in order, in the first."""
        if self.group.count > 1:
            for number in self.group.claim("todo", self.todo):
                append_rows(self.folder / self.part.format(self.group.number), [{"block": number, "rows": make(number)}])
            self.group.barrier("made")
        if self.group.is_main:
            made = self._made()
            for number in range(self.done, self.count):
                write(number, made[number] if number in made else make(number))
            for file in self._files():
                file.unlink()

    def _made(self) -> dict[int, Rows]:
        """What several processes have made and is not joined yet, by number."""
        made = {}
        for file in self._files():
            for line, row in enumerate(repair_rows(file, MADE, remove=file), start=1):
                if row["block"] >= self.count or not self.belongs(row["block"], row["rows"]):
                    raise UserError(
                        f"{file}:{line} does not hold what belongs to block {row['block']}. Remove {file} and start again."
                    )
                made[row["block"]] = row["rows"]
        return made

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(self.part.format("*")))
