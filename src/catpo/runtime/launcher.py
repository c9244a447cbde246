"""What `torchrun` and `accelerate launch` say in the environment: this process's rank, and how many there are."""

from __future__ import annotations

import os

from catpo.core.errors import UserError


def is_main_process() -> bool:
    """Whether this process writes: of several that `torchrun` or `accelerate launch` started for one command, the first."""
    return process_number() == 0


def process_number() -> int:
    """Which of the processes that `torchrun` or `accelerate launch` started this is."""
    number, count = _from_launcher("RANK", 0), process_count()
    if not 0 <= number < count:
        raise UserError(
            f"RANK={number} in the environment must be from 0 to WORLD_SIZE - 1, which is {count - 1}. Start with torchrun or "
            "accelerate launch, which set both, or remove RANK."
        )
    return number


def process_count() -> int:
    """How many processes `torchrun` or `accelerate launch` started for one command."""
    count = _from_launcher("WORLD_SIZE", 1)
    if count < 1:
        raise UserError(f"WORLD_SIZE={count} in the environment must be 1 or more. Remove it to run one process.")
    return count


def _from_launcher(name: str, alone: int) -> int:
    """A number that launchers set in the environment."""
    text = os.environ.get(name, str(alone))
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name}={text!r} in the environment must be a whole number. Remove it to run one process.") from error
