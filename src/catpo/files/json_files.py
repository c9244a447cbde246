"""JSON files that outlive a killed process: objects written whole, rows appended, a torn last line cut off. Knows no model.

Every object and row carries a checksum, which is compared when it is read, and which readers do not see.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from catpo.core.checks import check_regular
from catpo.core.errors import UserError
from catpo.files.atomic import cut_back, reason_of, write_atomic
from catpo.files.checksums import sealed, unsealed
from catpo.files.inside import stay_inside
from catpo.files.strict_json import Fields, check_fields, parse_object


def write_json(path: str | Path, fields: Mapping[str, Any]) -> None:
    """`write_atomic` of an object as indented JSON."""
    write_atomic(path, json.dumps(sealed(fields), ensure_ascii=False, indent=1) + "\n")


def read_json(
    path: str | Path, *, made_by: str = "catpo", fields: Fields | None = None, may_link: bool = False
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        made_by: the command that a message about a missing or damaged file names; empty for a file that users write.
        fields: what the object must have.
        may_link: for files of models, which in the hub's cache are links into another folder.

    Raises:
        UserError: it is missing, a link out of its folder, not JSON, not an object, not what was written, or without one of the
            fields.
    """
    path = Path(path)
    if not may_link:
        stay_inside(path, path.parent)
    check_regular(path)
    advice = f"It is written by `{made_by}`." if made_by else "Check the path."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). {advice}") from error
    remedy = f"Write it again with `{made_by}`." if made_by else "Correct it."
    value = unsealed(parse_object(content, place=str(path), remedy=remedy), place=str(path), remedy=remedy)
    check_fields(value, fields or {}, place=str(path), remedy=_start_again(path.parent))
    return value


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Append rows to a JSON Lines file in one write, on disk before it returns; returns the file's new size in bytes.

    Raises:
        UserError: it cannot be written.
    """
    try:
        content = _lines(rows).encode("utf-8")
        with open(path, "ab") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            return stream.tell()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be written ({reason_of(error)}). Check space and permissions, then run it again."
        ) from error


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`write_atomic` of a JSON Lines file."""
    write_atomic(path, _lines(rows))


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(sealed(row), ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: str | Path, fields: Fields | None = None, *, remove: Path | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file that this library wrote; none if it does not exist; a torn last line is left out.

    Args:
        path: of the file.
        fields: what every row must have.
        remove: what to delete when a row is damaged, named in the message; the file's folder if None.

    Raises:
        UserError: a line is not a JSON object, lacks a field, or is not what was written; names the line.
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
    stay_inside(path, path.parent)
    check_regular(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check permissions.") from error
    *lines, torn = content.split(b"\n")  # not splitlines(): U+2028 may stand inside a JSON text
    rows, remedy = [], _start_again(remove or path.parent)
    if _is_whole(torn[:-1]):  # no kill leaves a byte behind a row: it was a line break
        raise UserError(f"{path}:{len(lines) + 1} does not end with a line break. {remedy}")
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        row = parse_object(line, place=place, remedy=remedy, loads=json.loads)
        rows.append(unsealed(row, place=place, remedy=remedy, line=line))
        check_fields(rows[-1], fields or {}, place=place, remedy=remedy)
    return rows, len(content) - len(torn)


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _start_again(path: Path) -> str:
    return f"Remove {path} and start again."
