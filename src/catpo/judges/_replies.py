"""Replies that were paid for, kept in an append-only JSON Lines file under a hash of the question. Knows no judge.

Several processes may append to one file: a row is one write. A row torn by a killed process, or damaged, is ignored, and
asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catpo.core.checks import check_regular
from catpo.core.errors import UserError
from catpo.files.checksums import sealed, unsealed
from catpo.files.strict_json import parse_object

REPLY = {"asked": str, "reply": str, "model": str}


class Replies:
    """The rows of a file, by the hash of what was asked.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        check_regular(path)
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}). Check permissions, or name another cache.") from error
        self._rows = {row["asked"]: row for row in map(_row, content.split(b"\n")) if row}

    def get(self, asked: str) -> Mapping[str, Any] | None:
        """The row of a question, if there is one."""
        return self._rows.get(asked)

    def add(self, asked: str, **reply: Any) -> None:
        """Keep a reply; on disk before this returns.

        Raises:
            UserError: it cannot be written.
        """
        row = {"asked": asked, **reply}
        line = json.dumps(sealed(row), ensure_ascii=False).encode("utf-8") + b"\n"
        with self._lock:
            self._rows[asked] = row
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab+") as stream:
                    stream.write(line if _is_whole(stream) else b"\n" + line)
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                raise UserError(
                    f"{self.path} cannot be written ({error.strerror}), so replies would be paid for again. Check space and "
                    "permissions, or name another cache."
                ) from error


def hash_of(question: Any) -> str:
    """Hash of anything that JSON can hold; the order of keys does not matter."""
    text = json.dumps(question, sort_keys=True)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_object(line, place="", remedy="", fields=REPLY, loads=json.loads)
        return unsealed(row, place="", remedy="", line=line)
    except UserError:
        return None


def _is_whole(stream: Any) -> bool:
    """Whether the file is empty or ends with a newline."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(size - 1, 0))
    return stream.read(1) in (b"", b"\n")
