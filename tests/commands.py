"""The command line, run inside the test's own process."""

from __future__ import annotations

from typing import Any

from catpo.cli import main


def run(*arguments: Any) -> int:
    """The exit code of a command."""
    try:
        main.main([str(each) for each in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0
