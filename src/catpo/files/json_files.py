"""Files that outlive a killed process: atomic writes, append-only rows, one writer per folder, versions. Knows no model."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, the rest works
    fcntl = None  # type: ignore[assignment]

from catpo.core.errors import UserError, shown
from catpo.files import strict_json
from catpo.files.fields import Fields, check_fields

LIBRARIES = ("catpo", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "pillow")
"""What `versions` tells: libraries that can change a number."""


PART = re.compile(r"\..+\.\d+\.part")
"""A file that `write_atomic` has not finished."""


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that can change a number; imports none of them.

    >>> versions()["python"] == platform.python_version()
    True
    """
    from importlib.metadata import PackageNotFoundError, version  # --help does not wait for it

    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def write_atomic(path: str | Path, content: str | bytes, *, is_durable: bool = True) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part.

    Not durable: survives a killed process, not a power cut, and costs no wait for the disk; for many small files.

    Raises:
        UserError: it cannot be written (no space, no permission); the old file is untouched.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    content = content if isinstance(content, bytes) else content.encode("utf-8")
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
                f"{_shown(path)} cannot be written ({_reason(error)}). Check space, permissions and name."
            ) from error
        raise


def check_path(path: Path) -> None:
    """Raises UserError for a path that no file can have."""
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} cannot be written (a path holds no NUL character). Give another --output.")


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
            f"{path} cannot be written ({_reason(error)}). Check space and permissions, then run it again."
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


def cut_back(path: str | Path, size: int) -> None:
    """Make a file as short as it was.

    Raises:
        UserError: it cannot be changed.
    """
    try:
        if os.path.getsize(path) > size:
            os.truncate(path, size)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Check permissions, then run it again.") from error


def make_folder(folder: str | Path) -> None:
    """Make a folder and those above it, where they are not there yet.

    Raises:
        UserError: it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{_shown(folder)} cannot be used as a folder ({_reason(error)}). Choose another --output, or remove what is there."
        ) from error


def _again(place: Path) -> str:
    return f"Remove {place} and start again."


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _shown(path: str | Path) -> str:
    return shown(str(path), length=500)


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


def is_main_process() -> bool:
    """Whether this process writes: of several that `torchrun` or `accelerate launch` started for one command, the first."""
    return process_number() == 0


def process_number() -> int:
    """Which of the processes that `torchrun` or `accelerate launch` started this is."""
    number, count = _from_launcher("RANK", 0), process_count()
    if not 0 <= number < count:
        raise UserError(
            f"RANK={number} in the environment must be from 0 to WORLD_SIZE - 1, which is {count - 1}. Start with torchrun or "
            "accelerate launch, which set both, or remove RANK."
        )
    return number


def process_count() -> int:
    """How many processes `torchrun` or `accelerate launch` started for one command."""
    count = _from_launcher("WORLD_SIZE", 1)
    if count < 1:
        raise UserError(f"WORLD_SIZE={count} in the environment must be 1 or more. Remove it to run one process.")
    return count


def _from_launcher(name: str, alone: int) -> int:
    """A number that launchers set in the environment."""
    text = os.environ.get(name, str(alone))
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name}={text!r} in the environment must be a whole number. Remove it to run one process.") from error


@contextmanager
def lock(folder: str | Path) -> Iterator[Path]:
    """Make the folder and keep every other process from writing to it; a killed process leaves no lock behind.

    Raises:
        UserError: another live process holds it, or the folder cannot be made.
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
        for part in [*folder.glob(".*.part"), *folder.glob("*/.*.part")]:
            if PART.fullmatch(part.name):  # of a killed process
                part.unlink(missing_ok=True)
        yield folder


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
    with suppress(OSError):  # a full disk: who holds it is not told
        os.truncate(stream.fileno(), 0)
        os.write(stream.fileno(), str(os.getpid()).encode())


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], *, where: str | Path, ignore: Iterable[str] = ()) -> None:
    """Refuse to continue work that was begun with other options.

    >>> check_same({"seed": 0}, {"seed": 1}, where="pairs")
    Traceback (most recent call last):
    catpo.errors.UserError: pairs was begun with seed=0, now it is 1. Give the old value, or choose another --output.

    Raises:
        UserError: a field differs; names the first.
    """
    ignored = set(ignore)
    for key in [*new, *(key for key in old if key not in new)]:
        if key not in ignored and old.get(key) != new.get(key):
            before, now = old.get(key), new.get(key)
            raise UserError(
                f"{where} was begun with {key}={before!r}, now it is {now!r}. Give the old value, or choose another --output."
            )
