"""Paths stay in their folder: neither a name recorded in a file nor a link leads out of it."""

from __future__ import annotations

from pathlib import Path

from catpo.core.errors import UserError, shown


def stay_inside(path: Path, folder: Path) -> Path:
    """The path, if it lies in the folder when all links are followed; the folder itself may be a link.

    Raises:
        UserError: it leads out.
    """
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, NUL in a name
        raise UserError(f"{shown(str(path), length=500)} is not a usable path ({error}). Correct or remove it.") from error
    if not is_inside:
        raise UserError(
            f"{shown(str(path), length=500)} leads out of {folder} ({shown(str(path.resolve()), length=500)}). Put what is "
            "there into the folder, and no link."
        )
    return path
