"""Errors that a user can act on, and helpers for their messages."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What happened, on which item, and what to do next; shown without a traceback, exit code 2."""


class Unforeseen(UserError):
    """What a `border` made of an error for which there is no message of its own; `__cause__` is that error."""


class Stopped(Exception):
    """The process was asked to stop (SIGTERM, Ctrl-C) and did where nothing is lost; says how far it got."""

    def __init__(self, message: str, *, exit_code: int = 143) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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


REASON = 400
"""Characters of another library's words in a message."""


def first_line(error: BaseException) -> str:
    """An error's first line, with the second if the first ends with a colon."""
    first, _, rest = (str(error).strip() or type(error).__name__).partition("\n")
    return f"{first} {rest.strip().partition(chr(10))[0]}" if first.endswith(":") else first


def _nothing(error: BaseException) -> bool:
    return False


@contextmanager
def border(problem: str, advice: str, *, passes: Callable[[BaseException], bool] = _nothing) -> Iterator[None]:
    """The net around other people's code that reads other people's files: whatever it raises becomes a message.

    Args:
        problem: the thing, and what cannot be done with it: `picture 'a.png' cannot be read`.
        advice: what to do next, as a sentence.
        passes: whether an error says nothing of the thing, as running out of memory does; it is raised as it is.

    >>> with border("shelf.txt cannot be read", "Write it again."):
    ...     [][0]
    Traceback (most recent call last):
    catpo.core.errors.Unforeseen: shelf.txt cannot be read (list index out of range). Write it again.

    Raises:
        Unforeseen: anything but a UserError was raised inside.
    """
    try:
        yield
    except (UserError, Stopped):
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of a library in Rust; derived from BaseException
        if not (is_panic or isinstance(error, Exception)) or passes(error):
            raise
        raise Unforeseen(f"{problem} ({reason_of(error)}). {advice}") from error


def reason_of(error: BaseException) -> str:
    r"""Why something failed, on one line: the system's words, or the first line of the error's own.

    >>> reason_of(KeyError("size")), reason_of(ValueError("no\nnumber."))
    ("KeyError: 'size'", 'no')
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = first_line(error)
    return shown(f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text, length=REASON).rstrip(".")


def is_unforeseen(error: BaseException | None) -> bool:
    """Whether a message comes from a `border`, whatever was put in front of it on its way."""
    while error is not None and not isinstance(error, Unforeseen):
        error = error.__cause__
    return error is not None
