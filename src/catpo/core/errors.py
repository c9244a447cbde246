"""Errors that a user can act on, and helpers for their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What happened, on which item, and what to do next; shown without a traceback, exit code 2."""


class Stopped(Exception):
    """The process received SIGTERM and stopped where nothing is lost; says how far it got. Exit code 143."""


def shown(text: str, *, length: int = 80) -> str:
    r"""Somebody's text as a message quotes it: on one line, and shortened.

    >>> shown("a\nb"), len(shown("a" * 100))
    ('a\\nb', 80)
    """
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= length else text[: length - 3] + "..."


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """The end of an error message about an unknown word: the closest known word, or all known words.

    `prefix` goes before the closest word, e.g. the section of a recipe.

    >>> did_you_mean("alfa", ["alpha", "beta"])
    "Did you mean 'alpha'?"
    >>> did_you_mean("zzz", ["alpha", "beta"])
    'Known: alpha, beta.'
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"Did you mean '{prefix}{close[0]}'?"
    return f"Known: {', '.join(known)}." if known else "None are known."


def first_line(error: Exception) -> str:
    """An error's first line, with the second if the first ends with a colon."""
    first, _, rest = (str(error).strip() or type(error).__name__).partition("\n")
    return f"{first} {rest.strip().partition(chr(10))[0]}" if first.endswith(":") else first
