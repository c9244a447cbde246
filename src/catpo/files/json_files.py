"""JSON files that outlive a killed process: objects written whole, rows appended, a torn last line cut off. Knows no model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.files.atomic import cut_back, reason_of, write_atomic
from catpo.files.strict_json import Fields, check_fields, parse_object


def write_json(path: str | Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: str | Path, *, made_by: str = "catpo", fields: Fields | None = None) -> dict[str, Any]:
    """The object in a JSON file; `made_by` is the command that a message about a missing file names.

    Raises:
        UserError: it is missing, not JSON, not an object, or without one of the `fields` that it must have.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). It is written by `{made_by}`.") from error
    value = parse_object(content, place=str(path), remedy=f"Write it again with `{made_by}`.")
    check_fields(value, fields or {}, place=str(path), remedy=_start_again(path.parent))
    return value


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Append rows to a JSON Lines file in one write, on disk before it returns; returns the file's new size in bytes.

    Raises:
        UserError: it cannot be written.
    """
    try:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
        with open(path, "ab") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            return stream.tell()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be written ({reason_of(error)}). Check space and permissions, then run it again."
        ) from error


def read_rows(path: str | Path, fields: Fields | None = None, *, remove: Path | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file that this library wrote; none if it does not exist; a torn last line is left out.

    Args:
        path: of the file.
        fields: what every row must have.
        remove: what to delete when a row is damaged, named in the message; the file's folder if None.

    Raises:
        UserError: a line before the last is not a JSON object, or lacks a field; names the line.
    """
    return _complete_rows(Path(path), fields, remove)[0]


def repair_rows(path: str | Path, fields: Fields | None = None, *, remove: Path | None = None) -> list[dict[str, Any]]:
    """`read_rows`, after cutting a torn last line (of a killed process) off the file, so that it can be appended to."""
    rows, size = _complete_rows(Path(path), fields, remove)
    if Path(path).exists():
        cut_back(path, size)
    return rows


def _complete_rows(path: Path, fields: Fields | None, remove: Path | None) -> tuple[list[dict[str, Any]], int]:
    """Complete rows, and their size in bytes."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check permissions.") from error
    *lines, torn = content.split(b"\n")  # not splitlines(): U+2028 may stand inside a JSON text
    rows = []
    for number, line in enumerate(lines, start=1):
        place, remedy = f"{path}:{number}", _start_again(remove or path.parent)
        rows.append(parse_object(line, place=place, remedy=remedy, fields=fields, loads=json.loads))
    return rows, len(content) - len(torn)


def _start_again(path: Path) -> str:
    return f"Remove {path} and start again."
