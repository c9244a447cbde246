"""How a message for the user is printed, and what stands behind it. Knows no command."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from catpo.cli.streams import warn
from catpo.core.errors import UserError, is_unforeseen

LONGEST = 1500
"""Maximum characters of a message."""
TRACEBACK = "--traceback"
"""Before or after a command: show the error behind a message, as Python does."""


def taken(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without the flag, and whether it was there."""
    return [word for word in arguments if word != TRACEBACK], TRACEBACK in arguments


def explain(error: UserError, *, with_traceback: bool) -> None:
    """Print a message; where it stands for an error of another library, also that error, or how to see it."""
    if with_traceback:
        traceback.print_exception(error)
    advice = f" {TRACEBACK} shows the whole error." if is_unforeseen(error) and not with_traceback else ""
    warn(_shortened(str(error)) + advice)


def _shortened(message: str) -> str:
    """A message; a long one loses its middle, since it ends with what to do."""
    return message if len(message) <= LONGEST else f"{message[: LONGEST * 2 // 3]} … {message[-LONGEST // 3 :]}"
