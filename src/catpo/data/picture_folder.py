"""The pictures of a folder, by the names of its files. Knows nothing of prompts or answers."""

from __future__ import annotations

from pathlib import Path

from catpo.core.errors import UserError, shown
from catpo.core.types import Picture
from catpo.files.inside import stay_inside

ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".avif",
    ".jp2", ".j2k", ".ico",
)  # fmt: skip
"""How the names of pictures end, in lower case."""


def pictures_in(folder: Path) -> tuple[list[Picture], int]:
    """The pictures of a folder and of the folders in it, by name, and how many other files there are, hidden ones
    among them.

    A file alone is a folder of one picture.

    Raises:
        UserError: there is no such folder, no picture in it, or a link leads out of it.
    """
    if folder.is_file():
        return [Picture(path=folder, name=folder.name)], 0
    if not folder.is_dir():
        raise UserError(f"'{shown(str(folder), length=500)}' is neither a folder nor a picture. Check the path.")
    pictures, other_count = [], 0
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            stay_inside(path, folder)
        if path.is_dir():
            continue
        if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
            pictures.append(Picture(path=path, name=path.relative_to(folder).as_posix()))
        else:
            other_count += 1
    if not pictures:
        held = f"{other_count:,} other file{'s' * (other_count > 1)}"
        what = f"holds no picture (a file named .png, .jpg, .webp, …), but {held}" if other_count else "is empty"
        raise UserError(f"{folder} {what}. Give the folder that holds the pictures.")
    return pictures, other_count
