"""Rows of files that others wrote: a JSON list or JSON Lines, plain or packed with gzip. Every message names file and line."""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catpo.core.checks import check_regular
from catpo.core.errors import UserError
from catpo.files import strict_json
from catpo.files.checksums import unsealed

MAX_BYTES = 2_000_000_000
"""Larger files are refused; the largest official one, COCO's instances of train2014, has 448 million bytes."""
_HALVES = re.compile("[\ud800-\udfff]")
_WHOLE = re.compile(r"-?\d+\.0+")


@dataclass(frozen=True)
class Record:
    """A row of somebody's file."""

    place: str
    """File and line, for messages."""
    row: dict[str, Any]


def read_bytes(path: Path, *, most: int = MAX_BYTES) -> bytes:
    """Contents of a file, unpacked if its name ends with .gz.

    Raises:
        UserError: it cannot be read or unpacked, or has more than `most` bytes.
    """
    check_regular(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            content = stream.read(most + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path} cannot be read ({error}). Check the path, or get the file again.") from error
    if len(content) > most:
        raise UserError(f"{path} holds more than {most:,} bytes. Is it the right file? Give another, or parts of it.")
    return content


def decode(content: bytes, path: str | Path) -> str:
    """The bytes as text.

    Raises:
        UserError: they are not UTF-8; names the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line} is not UTF-8 (byte 0x{content[error.start]:02x} at {error.start}). Save the file as UTF-8."
        ) from error


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text.

    Raises:
        UserError: it is not JSON; names the place.
    """
    return strict_json.parse(text, place=place, remedy="Correct or remove it.")


def parse_records(text: str, place: str) -> list[Record]:
    """The objects of a JSON list, or of JSON Lines without blank lines; those that catpo wrote are compared with what it wrote.

    Raises:
        UserError: a row is not JSON or not an object, or holds half a character; names it.
    """
    records = []
    if text.lstrip().startswith("["):
        for number, row in enumerate(parse_json(text, place), start=1):
            records.append(_record(f"{place}: row {number}", row))
        return records
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): U+2028 may stand inside a JSON text
        if line.strip():
            row = parse_json(line.strip().removesuffix(","), f"{place}:{number}")  # SEED-Bench's lines end with commas
            records.append(_record(f"{place}:{number}", row))
    return records


def _record(place: str, row: Any) -> Record:
    if not isinstance(row, dict):
        raise UserError(f"{place} must be a JSON object.")
    for name, value in row.items():
        if isinstance(value, str) and not value.isascii() and _HALVES.search(value):
            raise UserError(f"{place}: '{name}' holds half a character (a lone surrogate). Remove it.")
    return Record(place, unsealed(row, place=place, remedy="Put it back as it was, or remove it."))


def as_id(value: Any) -> str | None:
    """An id as text, whatever tool wrote it; None for what is none.

    >>> as_id(7), as_id("a/7"), as_id(13557.0), as_id("13557.0"), as_id(True), as_id(0.5)
    ('7', 'a/7', '13557', '13557', None, None)
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int | str) or isinstance(value, bool):
        return None
    text = str(value)
    return text.partition(".")[0] if _WHOLE.fullmatch(text) else text
