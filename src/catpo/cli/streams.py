"""What is printed, on whatever stdout and stderr are: terminals that know ASCII only, pipes, or closed. Knows no command."""

from __future__ import annotations

import os
import sys


def prepare() -> None:
    """Make stdout and stderr take any text: what they cannot show is escaped, and where they are closed, nothing is shown."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `>&-`; the next file that is opened would take its place, and get what libraries print
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(*texts: object) -> None:
    """Print lines, without what a terminal acts on."""
    for text in texts:
        print(_shown(text))


def warn(*texts: object) -> None:
    """The same, on stderr and as catpo."""
    for text in texts:
        print(f"catpo: {_shown(text)}", file=sys.stderr)


def _shown(text: object) -> str:
    from catpo.text.words import plain  # imports NumPy, which help needs not

    return plain(str(text).encode("utf-8", "backslashreplace").decode("utf-8"))  # bytes of a path that are no UTF-8
