"""One writer per folder: by an advisory lock that ends with the process, or by a file where the file system has none."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from catpo.core.errors import UserError
from catpo.files.atomic import PART, check_path, make_folder
from catpo.files.inside import stay_inside

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


_streams: list[Any] = []
"""Open files of the locks that this process holds."""


def _let_go() -> None:
    """A forked worker would keep the lock for a moment after the process that took it was killed."""
    while _streams:
        _streams.pop().close()


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
    stay_inside(folder / ".lock", folder)  # it is truncated
    try:
        stream = open(folder / ".lock", "a+", encoding="ascii")  # noqa: SIM115 (held until the end)
    except OSError as error:
        raise UserError(f"{folder} cannot be used as output ({error.strerror}). Choose another --output.") from error
    with stream, _held(stream, folder):
        _streams.append(stream)
        for part in [*folder.glob(".*.part"), *folder.glob("*/.*.part")]:
            if PART.fullmatch(part.name):  # of a killed process
                part.unlink(missing_ok=True)
        try:
            yield folder
        finally:
            if stream in _streams:
                _streams.remove(stream)


@contextmanager
def _held(stream: Any, folder: Path) -> Iterator[None]:
    try:
        if fcntl is None:
            raise OSError("no advisory locks on Windows")
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        has_locks = True
    except BlockingIOError as error:
        stream.seek(0)
        raise _taken(folder, f"pid {stream.read().strip() or 'unknown'}") from error
    except OSError:  # a file system without locks, as some network file systems are
        has_locks = False
    if not has_locks:
        with _owner_file(folder):
            yield
        return
    with suppress(OSError):  # on a full disk the holder's pid is not recorded
        os.truncate(stream.fileno(), 0)
        os.write(stream.fileno(), str(os.getpid()).encode())
    yield


@contextmanager
def _owner_file(folder: Path) -> Iterator[None]:
    """The lock as a file that exists while its owner works; of a killed owner on this machine it is taken over."""
    path, me = folder / ".lock-owner", f"pid {os.getpid()} on {platform.node()}"
    if _is_stale(path):
        taken = path.with_name(f".lock-owner.{os.getpid()}")
        with suppress(FileNotFoundError):  # another process took it over
            os.rename(path, taken)
            if _is_stale(taken):
                taken.unlink()
            else:  # another process took it over in between, and this is its own
                os.rename(taken, path)
    try:
        with open(path, "x", encoding="utf-8") as stream:
            stream.write(me)
    except FileExistsError as error:
        owner = path.read_text(encoding="utf-8", errors="replace")
        raise _taken(folder, owner, f" If that process is gone, remove {path}.") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _is_stale(path: Path) -> bool:
    """Whether the owner ran on this machine and no longer lives."""
    try:
        owner = re.fullmatch(r"pid (\d+) on (.*)", path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False
    return owner is not None and owner[2] == platform.node() and not psutil.pid_exists(int(owner[1]))


def _taken(folder: Path, owner: str, advice: str = "") -> UserError:
    return UserError(
        f"{folder} is being written by another catpo process ({owner}). Wait for it, or choose another --output.{advice}"
    )
