"""One writer per folder, by an advisory lock that ends with the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.files.atomic import PART, check_path, make_folder

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, the rest works
    fcntl = None  # type: ignore[assignment]


_held: list[Any] = []
"""Open files of the locks that this process holds."""


def _let_go() -> None:
    """A forked worker would keep the lock for a moment after the process that took it was killed."""
    while _held:
        _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def lock(folder: str | Path) -> Iterator[Path]:
    """Create the folder and keep other processes from writing to it; a killed process leaves no lock behind.

    Raises:
        UserError: another live process holds the lock, or the folder cannot be created.
    """
    folder = Path(folder)
    check_path(folder)
    make_folder(folder)
    try:
        stream = open(folder / ".lock", "a+", encoding="ascii")  # noqa: SIM115 (held until the end)
    except OSError as error:
        raise UserError(f"{folder} cannot be used as output ({error.strerror}). Choose another --output.") from error
    with stream:
        _take(stream, folder)
        _held.append(stream)
        for part in [*folder.glob(".*.part"), *folder.glob("*/.*.part")]:
            if PART.fullmatch(part.name):  # of a killed process
                part.unlink(missing_ok=True)
        try:
            yield folder
        finally:
            if stream in _held:
                _held.remove(stream)


def _take(stream: Any, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.seek(0)
        holder = stream.read().strip() or "unknown"
        raise UserError(
            f"{folder} is being written by another catpo process (pid {holder}). Wait for it, or choose another --output."
        ) from error
    except OSError:  # a file system without locks
        return
    with suppress(OSError):  # on a full disk the holder's pid is not recorded
        os.truncate(stream.fileno(), 0)
        os.write(stream.fileno(), str(os.getpid()).encode())
