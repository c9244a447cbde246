"""`catpo data convert`, which writes the pairs of any data set as a folder that every command reads. Knows no format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.data.pair_folder import ABOUT, ROWS, row_of
from catpo.data.read import open_data
from catpo.files.atomic import cut_back
from catpo.files.checksums import unsealed
from catpo.files.json_files import append_rows, read_json, write_json
from catpo.files.lock import lock
from catpo.files.provenance import check_same, versions
from catpo.files.strict_json import parse_object
from catpo.runtime.progress import tell_complete
from catpo.runtime.sigterm import on_sigterm

BLOCK = 256
"""Pairs converted between two writes."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Conversion:
    """The outcome of `convert_data`."""

    folder: Path
    pairs: int
    repeated: int
    """Rows that were left out, because their pair is there already."""

    def __str__(self) -> str:
        text = f"{self.pairs} pairs in {self.folder}"
        return f"{text} (not written again: {self.repeated} same as another pair)" if self.repeated else text


def convert_data(data: str | Path, output: str | Path) -> Conversion:
    """Write a data set's pairs as a folder that every command reads.

    Each pair and each picture is written once, pictures as they are. Until the last pair is written, the folder counts as
    unfinished; given again, the same data set goes on where it stopped.

    Raises:
        UserError: a row cannot be used (`catpo data check` shows all of them), or the folder holds other pairs.
    """
    folder = Path(output)
    with lock(folder), on_sigterm() as stop:
        about = _begin(folder, data)
        work = _Work(folder, data)
        for rows in work.new_blocks():
            stop.leave_if_asked(f"{work.written} pairs are in {folder}.")
            append_rows(folder / ROWS, rows)
            work.written += len(rows)
        if not work.written:
            raise UserError(f"{data} holds no preference pairs. `catpo data check` says what is wrong with its rows.")
        if about["complete"]:
            tell_complete(folder)
        else:
            write_json(folder / ABOUT, {**about, "pairs": work.written, "complete": True})
    return Conversion(folder, work.written, work.repeated)


def _begin(folder: Path, data: str | Path) -> Row:
    """What pairs.json says; it is written if there is none.

    Raises:
        UserError: the folder holds pairs of other data, or that something else wrote.
    """
    begun = {"format": 1, "data": str(data)}
    if not (folder / ABOUT).exists() and not (folder / ROWS).exists():
        write_json(folder / ABOUT, {**begun, "versions": versions(), "complete": False})
    about = read_json(folder / ABOUT, made_by="catpo data convert") if (folder / ABOUT).exists() else {}
    if "method" in about or not about.keys() >= {*begun, "versions", "complete"}:
        raise UserError(
            f"{folder} holds pairs that `catpo data convert` has not written. Choose another --output, or remove it."
        )
    check_same(about, begun, where=folder, ignore=about.keys() - begun.keys())
    return about


class _Work:
    """The rows of a data set, in its order, compared with those that are written already."""

    def __init__(self, folder: Path, data: str | Path) -> None:
        self.folder, self.data = folder, data
        self.there = _hashes(folder / ROWS)
        self.written, self.repeated = len(self.there), 0

    def new_blocks(self) -> Iterator[list[Row]]:
        """Rows that are not written yet.

        Raises:
            UserError: the data set is not the one of which the rows were written, or cannot be used.
        """
        block: list[Row] = []
        number = 0
        for row, key in self._unique_rows():
            if number >= len(self.there):
                block.append(row)
            elif self.there[number] != key:
                raise self._other(f"{self.folder / ROWS}:{number + 1} is another pair than {self.data} has there now")
            if len(block) == BLOCK:
                yield block
                block = []
            number += 1
        if number < len(self.there):
            raise self._other(f"{self.folder / ROWS} has {len(self.there)} pairs, {self.data} has {number}")
        if block:
            yield block

    def _unique_rows(self) -> Iterator[tuple[Row, bytes]]:
        """Each pair's row and its hash, once; its pictures are saved."""
        seen: dict[str, bytes] = {}
        for pair in open_data(self.data).pairs():
            row = row_of(self.folder, pair)
            key = _hash(_line(pair.id, row))
            if pair.id not in seen:
                seen[pair.id] = key
                yield row, key
            elif seen[pair.id] == key:
                self.repeated += 1
            else:
                raise UserError(f"{self.data} has two pairs with the id '{pair.id}'. Give one of them another id.")

    def _other(self, problem: str) -> UserError:
        return UserError(f"{problem}. Give the data as it was, choose another --output, or remove {self.folder}.")


def _line(name: str, row: Row) -> bytes:
    """The row as it is written, but for its checksum."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except ValueError as error:
        raise UserError(f"pair {name} cannot be written as JSON ({error}). Correct its 'meta'.") from error


def _hashes(path: Path) -> list[bytes]:
    """Of the rows of a file, after cutting off the torn last one of a killed process."""
    found: list[bytes] = []
    size, remedy = 0, f"Remove {path.parent} and start again."
    if not path.exists():
        return found
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.endswith(b"\n"):
                place = f"{path}:{number}"
                row = unsealed(parse_object(line, place=place, remedy=remedy), place=place, remedy=remedy, line=line)
                found.append(_hash(_line(place, row)))
                size += len(line)
    cut_back(path, size)
    return found


def _hash(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=8).digest()
