"""Blocks of work, done by one process or shared by several; the file that comes out is the same, in the same order.

Knows neither what a block holds nor what becomes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.files.json_files import append_rows, repair_rows
from catpo.runtime.work_group import WorkGroup

Rows = list[dict[str, Any]]
PART_ROW = {"block": int, "rows": list[dict]}
"""A line of the file in which one of several processes keeps its blocks."""


class Blocks:
    """The blocks of a folder that are not written yet.

    A process alone makes and writes block by block. Of several, each keeps its blocks in a file of its own, and the main
    process joins these at the end; a killed run resumes from them, with any number of processes.

    Args:
        part: name of those files, with a place for the rank, e.g. `answers.{}.part`.
        written: how many blocks the folder's own file holds; called in the main process.
        count: of all blocks.
        belongs: whether rows found in such a file are those of a block.

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
        in_parts = group.broadcast("beside", lambda: [*self._read_parts()])
        self.todo = [number for number in range(self.done, count) if number not in in_parts]
        """Blocks that no process has made yet."""

    def run(self, make: Callable[[int], Rows], write: Callable[[int, Rows], object]) -> None:
        """Make the blocks that are left, in any process and any order, and write them in order, in the main process."""
        if self.group.count > 1:
            for number in self.group.claim("todo", self.todo):
                append_rows(self.folder / self.part.format(self.group.number), [{"block": number, "rows": make(number)}])
            self.group.barrier("made")
        if self.group.is_main:
            made = self._read_parts()
            for number in range(self.done, self.count):
                write(number, made[number] if number in made else make(number))
            for file in self._files():
                file.unlink()

    def _read_parts(self) -> dict[int, Rows]:
        """Block number -> rows, of the blocks in the processes' own files."""
        made = {}
        for file in self._files():
            for line, row in enumerate(repair_rows(file, PART_ROW, remove=file), start=1):
                if row["block"] >= self.count or not self.belongs(row["block"], row["rows"]):
                    raise UserError(
                        f"{file}:{line} does not hold what belongs to block {row['block']}. Remove {file} and start again."
                    )
                made[row["block"]] = row["rows"]
        return made

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(self.part.format("*")))
