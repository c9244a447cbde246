"""Atomic writes: a reader sees a whole file or none, even if the writer is killed."""

from __future__ import annotations

import glob
import os
import re
from contextlib import suppress
from pathlib import Path

import psutil

from catpo.core.errors import UserError, shown

PART = re.compile(r"\..+\.\d+\.part")
"""A file that `write_atomic` has not finished."""


def write_atomic(path: str | Path, content: str | bytes, *, is_durable: bool = True) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part.

    With `is_durable=False`, it survives a killed process but not a power cut, and does not wait for the disk.

    Raises:
        UserError: it cannot be written (no space, no permission); the old file is untouched.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    # bytes of a path that are no UTF-8 become \udcff and the like, which JSON reads back as they were
    content = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    check_path(path)
    try:
        with open(part, "wb") as stream:
            stream.write(content)
            stream.flush()
            if is_durable:
                os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError, ValueError):
            part.unlink()
        if isinstance(error, OSError | ValueError):  # ValueError: a NUL in the name, half a character in the text
            raise UserError(
                f"{_shown(path)} cannot be written ({reason_of(error)}). Check space, permissions and name."
            ) from error
        raise


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left of this file, where no lock does so for the folder."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        number = part.name.split(".")[-2]
        if PART.fullmatch(part.name) and not psutil.pid_exists(int(number)):
            part.unlink(missing_ok=True)


def check_path(path: Path) -> None:
    """Raise UserError for a path that no file can have."""
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} cannot be written (a path holds no NUL character). Give another --output.")


def cut_back(path: str | Path, size: int) -> None:
    """Truncate a file to `size` bytes, if it is longer.

    Raises:
        UserError: it cannot be written.
    """
    try:
        if os.path.getsize(path) > size:
            os.truncate(path, size)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Check permissions, then run it again.") from error


def make_folder(folder: str | Path) -> None:
    """Create a folder and its parents, if missing.

    Raises:
        UserError: it cannot be created.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{_shown(folder)} cannot be used as a folder ({reason_of(error)}). Choose another --output, or remove what "
            "is there."
        ) from error


def reason_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _shown(path: str | Path) -> str:
    return shown(str(path), length=500)
