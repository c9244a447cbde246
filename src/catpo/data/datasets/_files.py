"""Rows of JSON, JSON Lines and CSV files, opened as what they hold, whatever their name says; read strictly."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from catpo.core.checks import check_regular
from catpo.core.errors import UserError
from catpo.data.datasets._base import Row
from catpo.files.checksums import unsealed
from catpo.files.records import decode, parse_json, read_bytes
from catpo.files.strict_json import loads, parse, parse_object

JSON, CSV = (".json", ".jsonl"), (".csv", ".tsv")
MARK = b"\xef\xbb\xbf"
"""A byte order mark."""
MAX_LINE = 16_000_000
"""Bytes of the longest row of a file that has one per line."""
ONE_PER_LINE = "Each line must be one JSON object, in UTF-8; rows(source='FILE') reads a JSON list, too."
MAKE_AGAIN = "Put the line back as it was, remove it, or make the data again."
LISTS = {"images", "conversations", "messages", "rejected_conversations", "rejected_messages", "completions"}
"""Columns of a CSV file whose cells are JSON."""


def rows_of(path: Path, root: Path) -> Iterator[Row]:
    """Every row of a file, numbered from 0; one that cannot be read comes with its problem.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    if path.suffix.lower() in CSV:
        return _csv_rows(path, root)
    return (_row(f"{path}, row {number}", root, partial(_object, value)) for number, value in enumerate(_json_values(path)))


def _row(where: str, root: Path, read: Callable[[str], dict[str, Any]]) -> Row:
    try:
        return Row(where, read(where), root)
    except UserError as error:
        return Row(where, {}, root, problem=error)


def _object(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, bytes):
        return line_object(where, value)
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object, not a {type(value).__name__}. Correct the row or remove it.")
    return value


def is_lines(path: Path) -> bool:
    """Whether a file has a JSON object on each line, rather than one JSON list or object; says nothing of later lines."""
    _, line = next(numbered_lines(path), (0, b""))
    if path.suffix == ".jsonl":
        return not line.lstrip().startswith(b"[") or not _is_json(path)
    try:
        first = loads(line)
    except (ValueError, RecursionError):
        return False
    is_alone = len(line) + len(MARK) + 2 >= path.stat().st_size
    return isinstance(first, dict) and not is_alone


def _is_json(path: Path) -> bool:
    try:
        loads(decode(read_bytes(path), path))
    except (UserError, ValueError, RecursionError):
        return False
    return True


def _json_values(path: Path) -> Iterator[Any]:
    """Values of a JSON list or of an object by picture number (HA-DPO), or lines as they are."""
    if is_lines(path):
        yield from (line for _, line in numbered_lines(path))
        return
    values = parse_json(decode(read_bytes(path), path), str(path))
    if isinstance(values, dict) and values and all(isinstance(value, dict) for value in values.values()):
        values = [{"image_id": number, **value} for number, value in values.items()]
    if not isinstance(values, list):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, not a list of rows. Give it one: [{{...}}, ...].")
    yield from values


def line_object(where: str, line: bytes) -> dict[str, Any]:
    """The object on a line.

    Raises:
        UserError: the line is too long, is no JSON object, or is one of catpo's that was changed.
    """
    if len(line) > MAX_LINE:
        raise UserError(f"{where} is longer than {MAX_LINE:,} bytes. {ONE_PER_LINE}")
    return unsealed(parse_object(line, place=where, remedy=ONE_PER_LINE), place=where, remedy=MAKE_AGAIN, line=line)


def numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; of one that is too long, its beginning."""
    check_regular(file)
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), start=1):
                content = line.removeprefix(MARK) if number == 1 else line
                if content.strip():
                    yield number, content
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}). Check the path.") from error


def _csv_rows(path: Path, root: Path) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    check_regular(path)
    try:
        with _long_cells(), open(path, newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream, delimiter=delimiter, strict=True)
            names = table.fieldnames or []
            if len(set(names)) < len(names) or not names:
                raise UserError(
                    f"{path} must begin with a line of different column names, not {', '.join(names) or 'nothing'}."
                )
            for number, cells in enumerate(table):
                yield _row(f"{path}, row {number}", root, partial(_csv_values, cells))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}). Save it as CSV in UTF-8, with a line of column names.") from error


def _csv_values(cells: dict[Any, Any], where: str) -> dict[str, Any]:
    """Texts, and lists in JSON as lists."""
    if None in cells or None in cells.values():
        raise UserError(f"{where} has more or fewer cells than the first line has names. Correct the row or remove it.")
    values: dict[str, Any] = {}
    for name, cell in cells.items():
        is_list = name in LISTS and cell.lstrip().startswith("[")
        place = f"{where}: field '{name}'"
        values[name] = parse(cell, place=place, remedy="Correct the row or remove it.") if is_list else cell or None
    return values


@contextmanager
def _long_cells() -> Iterator[None]:
    """Cells as long as a line may be; the module has one limit for all readers."""
    before = csv.field_size_limit(MAX_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)
