"""Files that outlive a killed process: atomic writes, append-only rows, one writer per folder, versions. Knows no model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.files import strict_json
from catpo.files.atomic import cut_back, reason_of, write_atomic
from catpo.files.strict_json import Fields, check_fields


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
        value = strict_json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). It is written by `{made_by}`.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Write it again with `{made_by}`.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object. Write it again with `{made_by}`.")
    check_fields(value, fields or {}, place=str(path), remedy=_again(path.parent))
    return value


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Append rows to a JSON Lines file in one write, on disk before it returns; gives the file's new size in bytes.

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
        remove: what has to go, with all that was made since, where a row is not as it was written; the folder if None.

    Raises:
        UserError: a line before the last is not a JSON object, or lacks a field; names the line.
    """
    return _rows(Path(path), fields or {}, _again(remove or Path(path).parent))[0]


def repair_rows(path: str | Path, fields: Fields | None = None, *, remove: Path | None = None) -> list[dict[str, Any]]:
    """`read_rows`, after a torn last line (of a killed process) was cut off the file, so that it can be appended to."""
    rows, size = _rows(Path(path), fields or {}, _again(remove or Path(path).parent))
    if Path(path).exists():
        cut_back(path, size)
    return rows


def _again(place: Path) -> str:
    return f"Remove {place} and start again."


def _rows(path: Path, fields: Fields, remedy: str) -> tuple[list[dict[str, Any]], int]:
    """Complete rows, and their size in bytes."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check permissions.") from error
    lines = content.split(b"\n")  # not splitlines(): U+2028 may stand inside a JSON text
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is not valid JSON ({error}). {remedy}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} must be a JSON object. {remedy}")
        check_fields(row, fields, place=f"{path}:{number}", remedy=remedy)
        rows.append(row)
    return rows, len(content) - len(lines[-1])
