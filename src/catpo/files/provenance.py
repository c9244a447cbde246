"""The versions and options that a folder was created with, compared when work is resumed."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError

LIBRARIES = ("catpo", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "pillow")
"""Libraries that can change a number."""


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that can change a number; imports none of them.

    >>> versions()["python"] == platform.python_version()
    True
    """
    found = {library: _version(library) for library in LIBRARIES}
    return {"python": platform.python_version(), **{library: number for library, number in found.items() if number}}


@cache
def _version(library: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # --help does not wait for it

    try:
        return version(library)
    except PackageNotFoundError:
        return None


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], *, where: str | Path, ignore: Iterable[str] = ()) -> None:
    """Raise if work was begun with different options.

    >>> check_same({"seed": 0}, {"seed": 1}, where="pairs")
    Traceback (most recent call last):
    catpo.core.errors.UserError: pairs was begun with seed=0, now it is 1. Give the old value, or choose another --output.

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
