"""Pictures in whatever form rows hold them: names, bytes, Base64, data URIs, file URLs, objects. Nothing is downloaded."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from catpo.core.errors import shown
from catpo.core.types import MAX_BYTES, Picture

if TYPE_CHECKING:
    from catpo.data.datasets._base import Row

INSIDE = ("image", "image_url", "url", "path")
"""Keys of an object that names a picture: OpenAI's and transformers' message parts, and the `datasets` library's cells."""
BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0AK", "Qk0", "Qk1", "Qk2", "Qk3")
"""How PNG, JPEG, GIF, WebP, TIFF and BMP begin in Base64."""
UNUSUAL = re.compile(r"^/|[:\\]|\.\.")
"""What every name has that leads out of a folder: a root, a drive or `..`."""
SHORTEST = 64
"""Characters of the shortest text that can be a picture in Base64."""


def picture(row: Row, field: str, value: Any, root: Path) -> Picture:
    """The picture that a cell holds or names; names are relative to `root` (resolved), or absolute and inside it.

    Raises:
        UserError: it is none, or its name or a link leaves `root`; names row and field.
    """
    if isinstance(value, Mapping):
        content = value.get("bytes")
        inside = next((value[key] for key in INSIDE if value.get(key)), None)
        if content is None and inside is None:
            raise row.error(field, "holds an object with neither 'bytes' nor 'path'")
        if content is not None and not isinstance(content, bytes | str):
            raise row.error(field, f"must hold the picture's bytes, not {type(content).__name__}")
        return picture(row, field, inside if content is None else content, root)
    if isinstance(value, bytes):
        return _from_bytes(row, field, value)
    if not isinstance(value, str):
        raise row.error(field, "is missing" if value is None else f"must be a text, not {type(value).__name__}")
    if value.startswith("data:"):
        return _from_bytes(row, field, _decoded(row, field, value.partition(",")[2]))
    if value.startswith(BASE64) and len(value) >= SHORTEST:
        return _from_bytes(row, field, _decoded(row, field, value))
    return _from_name(row, field, _path_of_url(row, field, row.checked(field, value)), root)


def _from_bytes(row: Row, field: str, content: bytes) -> Picture:
    if not content:
        raise row.error(field, "holds a picture of no bytes")
    if len(content) > MAX_BYTES:
        raise row.error(field, f"holds {len(content):,} bytes, more than {MAX_BYTES:,}. Make the picture smaller")
    return Picture(data=bytes(content), name=row.where)


def _decoded(row: Row, field: str, text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.error(field, f"begins like a picture in Base64, which it is not ({error})") from error


def _path_of_url(row: Row, field: str, name: str) -> str:
    """The path in a file URL; another URL is refused, and a path is left alone."""
    scheme, separator, _ = name.partition("://")
    if not separator or not scheme.isalnum():
        return name
    try:
        url = urlsplit(name)
    except ValueError as error:
        raise row.error(field, f"'{shown(name)}' is not a usable URL ({error})") from error
    if scheme.lower() != "file" or url.netloc not in ("", "localhost"):
        raise row.error(field, f"'{shown(name)}' is a URL, and nothing is downloaded. Save the picture, and give its path")
    return unquote(url.path)


def _from_name(row: Row, field: str, name: str, root: Path) -> Picture:
    try:
        if UNUSUAL.search(name) and _leaves(name, root):
            raise row.error(
                field,
                f"'{shown(name)}' leaves the folder {root}. Give a path inside it, or name the pictures' folder: images='DIR'",
            )
        path, mode = _followed(name, root)
        if path is None:
            raise row.error(field, f"'{shown(name)}' is a link that leads out of the folder. Put the picture inside")
        if not stat.S_ISREG(mode):
            raise row.error(field, f"'{shown(name)}' is not a file in {root}. Check the name")
    except (OSError, ValueError, RuntimeError) as error:  # NUL in the name, a name too long, a loop of links
        reason = getattr(error, "strerror", None) or error
        raise row.error(field, f"'{shown(name)}' is not a usable path ({reason})") from error
    return Picture(path=path, name=f"{name} ({row.where})")


def _followed(name: str, root: Path) -> tuple[Path | None, int]:
    """The file of a name with all links followed, None if they lead out of the folder; and its mode, 0 if there is none.

    Links are followed where there are any: a folder of many pictures seldom has one.
    """
    path, mode = os.fspath(root), stat.S_IFLNK if UNUSUAL.search(name) else 0
    parts = [part for part in name.split("/") if part not in ("", ".")]
    while parts and not stat.S_ISLNK(mode):
        path = f"{path}/{parts.pop(0)}"
        mode = _mode(path)
    if not stat.S_ISLNK(mode):
        return _path(path), mode
    resolved = (root / name).resolve()
    return (resolved, _mode(resolved)) if resolved.is_relative_to(root) else (None, 0)


_path = lru_cache(10_000)(Path)
"""Rows often share pictures, and a path takes as long to make as its file to find."""


def _mode(path: str | Path) -> int:
    """Kind and rights of a file or link; 0 if there is none."""
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0


def _leaves(name: str, root: Path) -> bool:
    """Whether a name is not one inside the folder, on any system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    is_foreign = windows.drive or (windows.is_absolute() and not posix.is_absolute())
    is_outside = posix.is_absolute() and not Path(name).resolve().is_relative_to(root)
    return bool(is_foreign or is_outside or ".." in posix.parts or ".." in windows.parts)
