"""Checks of single values: a known word, a number in its range, a value of the right kind."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError, did_you_mean, shown


def check_word(owner: str, option: str, word: object, known: Sequence[str]) -> None:
    """Raise UserError unless an option's word is one of those known.

    >>> check_word("csr", "form", "codes", ("code", "paper"))
    Traceback (most recent call last):
    catpo.core.errors.UserError: csr has no form='codes'. Did you mean 'code'?
    """
    if word not in known:
        raise UserError(f"{owner} has no {option}='{word}'. {did_you_mean(str(word), known)}")


MOST = (1 << 31) - 1
"""The largest count: what every library below takes as one."""


LARGEST = 1e30
"""The largest measure: times a count it is still far within a float."""


def check_kind(what: str, value: Any, default: Any) -> None:
    """Raise UserError unless `value` is of the default's kind: truth value, number or text; other defaults say nothing.

    >>> check_kind("dpo(beta='high')", "high", 0.1)
    Traceback (most recent call last):
    catpo.core.errors.UserError: dpo(beta='high'): it must be a number, such as 0.1.
    """
    kinds: tuple[tuple[type, tuple[type, ...], str], ...] = (
        (bool, (bool,), "True or False"),
        (int, (int,), "a whole number"),
        (float, (int, float), "a number"),
        (str, (str,), "a text in quotes"),
    )
    for kind, allowed, words in kinds:
        if type(default) is kind and type(value) not in allowed:
            raise UserError(f"{what}: it must be {words}, such as {default!r}.")


def check_positive(**counts: int | None) -> None:
    """Raise UserError unless each is from 1 to `MOST`, or None.

    >>> check_positive(limit=0)
    Traceback (most recent call last):
    catpo.core.errors.UserError: limit=0 must be 1 or more.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name}={shown(repr(value))} must be 1 or more.")
        if value is not None and value > MOST:
            raise UserError(f"{name}={shown(repr(value))} is too large. Give at most {MOST}.")


def check_regular(path: str | Path) -> None:
    """Raise UserError for a pipe, a device or a socket: reading it could wait for ever, or never end.

    What is missing or may not be looked at is left to the reader, who says so.
    """
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} cannot be read (it is a pipe or a device, not a file). Give a file.")
