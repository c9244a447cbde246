"""What Ctrl-C is answered with: how to go on, where there is something to go on with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

from catpo.core.errors import UserError

GO_ON = ("pair", "score", "train", "evaluate", "rounds", "demo", "study", "detect")
"""Commands, besides `data convert`, that go on where they stopped."""


def interrupted(given: Sequence[str] | None) -> str:
    """The message to an interrupted command; its arguments are the process's if None.

    >>> interrupted(["score", "--pairs", "pairs"]), interrupted(["list"])
    ('interrupted. Give the same command again to go on.', 'interrupted.')
    """
    arguments = sys.argv[1:] if given is None else list(given)
    is_resumable = arguments[:1] in [[name] for name in GO_ON] or arguments[:2] == ["data", "convert"]
    goes_on = is_resumable and not {"--dry-run", "--no-resume", "--help", "-h"} & set(arguments) and _resumes(arguments)
    return "interrupted." + (" Give the same command again to go on." if goes_on else "")


def _resumes(arguments: Sequence[str]) -> bool:
    """Whether the recipe lets the run go on; `--resume` wins over it."""
    if arguments[0] != "train" or "--resume" in arguments:
        return True
    files = [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    files += [after for word, after in pairwise(arguments) if word == "--config"]
    from catpo.config import recipes

    try:
        return all(recipes.read(file)["train"].get("resume", True) for file in files)
    except UserError:
        return False
