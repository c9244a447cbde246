"""This process's rank and the number of processes, as `torchrun` and `accelerate launch` set them in the environment."""

from __future__ import annotations

import os

from catpo.core.errors import UserError


def is_main_process() -> bool:
    """Whether this is rank 0, the process that writes."""
    return process_number() == 0


def process_number() -> int:
    """The rank of this process.

    Raises:
        UserError: RANK or WORLD_SIZE is not a number, or out of range.
    """
    number, count = _from_environment("RANK", 0), process_count()
    if not 0 <= number < count:
        raise UserError(
            f"RANK={number} in the environment must be from 0 to WORLD_SIZE - 1, which is {count - 1}. Start with torchrun or "
            "accelerate launch, which set both, or remove RANK."
        )
    return number


def local_process_number() -> int:
    """The number of this process among those on the same machine.

    Raises:
        UserError: LOCAL_RANK is not a number.
    """
    return _from_environment("LOCAL_RANK", 0)


def process_count() -> int:
    """How many processes the launcher started for this command; 1 without a launcher."""
    count = _from_environment("WORLD_SIZE", 1)
    if count < 1:
        raise UserError(f"WORLD_SIZE={count} in the environment must be 1 or more. Remove it to run one process.")
    return count


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name}={text!r} in the environment must be a whole number. Remove it to run one process.") from error
