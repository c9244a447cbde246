"""Checksums of what catpo writes and reads back: in each JSON object and row, and of files as a whole.

They reveal damage and edits, not forgery: whoever can write a file can write its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from catpo.core.errors import UserError

KEY = "catpo_checksum"
"""Field of a JSON object with the checksum of its other fields."""
_BEFORE = f', "{KEY}": "'.encode()
HASH = "sha256_4mib"
"""Hash of a file: that of the hashes of its parts, so that several threads can share the work."""
CHUNK = 1 << 22
"""Bytes of a part."""
THREADS = min(8, os.cpu_count() or 1)


def checksum(content: bytes) -> str:
    """BLAKE2b of 16 bytes, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The object with the checksum of its fields as its last one.

    >>> sealed({"a": 1})
    {'a': 1, 'catpo_checksum': '6903fb303cd60ccb0a2b9c2592fa773b'}
    """
    own = {name: value for name, value in fields.items() if name != KEY}
    return {**own, KEY: checksum(_text(own))}


def unsealed(fields: dict[str, Any], *, place: str, remedy: str, line: bytes = b"") -> dict[str, Any]:
    """The object as it was sealed; one without a checksum, of an older version or another writer, is returned as it is.

    Args:
        fields: as they were read.
        place: file and line, which a message starts with.
        remedy: what to do with a damaged one, which a message ends with.
        line: the text that was read, where it is at hand: hashing it is faster than writing the fields anew.

    Raises:
        UserError: a field is not what was written.
    """
    last = next(reversed(fields), "")
    if KEY not in fields and not _is_spoilt_key(last):
        return fields
    written = fields.pop(KEY, None)
    head, _, tail = line.rpartition(_BEFORE)
    is_same_text = checksum(head + b"}") == written and tail.rstrip() == f'{written}"}}'.encode()
    if not is_same_text and checksum(_text(fields)) != written:
        raise UserError(
            f"{place} is not what catpo wrote. If you edited it, remove its '{KEY}', too; if not, it is damaged. {remedy}"
        )
    return fields


def _is_spoilt_key(name: str) -> bool:
    """Whether a name is `KEY` but for a character or two."""
    return len(name) == len(KEY) and sum(mine != theirs for mine, theirs in zip(name, KEY, strict=True)) <= 2


def _text(fields: Mapping[str, Any]) -> bytes:
    """An object in the form in which rows are written."""
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")


# ---- whole files ----------------------------------------------------------------------------------------------------------


def describe_file(path: Path) -> dict[str, Any]:
    """Size and hash of a file, which is read once, by several threads if it is large.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    starts = range(0, size, CHUNK)
    if len(starts) <= 1:
        digests = [_part(path, start) for start in starts]
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            digests = list(pool.map(lambda start: _part(path, start), starts))
    return {"bytes": size, HASH: hashlib.sha256("".join(digests).encode()).hexdigest()}


def _part(path: Path, start: int) -> str:
    with open(path, "rb") as stream:
        stream.seek(start)
        return hashlib.sha256(stream.read(CHUNK)).hexdigest()


def problem_with(folder: Path, name: str, written: Any) -> str:
    """What is wrong with a file of a folder, given what `describe_file` said of it; empty if nothing.

    Of files that an older version described, only the size is compared.
    """
    path = folder / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return "leads out of the folder"
    if not path.is_file():
        return "is missing"
    try:
        found = describe_file(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    is_same = isinstance(written, Mapping) and all(value == written.get(key, value) for key, value in found.items())
    return "" if is_same and written else "is damaged"
