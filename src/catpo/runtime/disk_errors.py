"""Error messages for refused writes (full disk, quota, permissions), also those of safetensors and torch."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from catpo.core.errors import UserError

REFUSED = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
}  # fmt: skip
"""Space, quota, size limit, read-only, permission, the device itself."""
TORCH = re.compile(r"PytorchStreamWriter|inline_container|file write failed|iostream error")


def refusal(error: BaseException) -> str | None:
    """Why a write was refused, in the system's words; None for any other error.

    >>> refusal(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    'No space left on device'
    >>> refusal(RuntimeError("I/O error: File too large (os error 27)"))
    'File too large'
    """
    if isinstance(error, OSError):
        return (error.strerror or str(error)) if error.errno in REFUSED else None
    number = re.search(r"os error (\d+)", str(error))
    if number:
        return os.strerror(int(number[1])) if int(number[1]) in REFUSED else None
    return "a file could not be written to its end" if TORCH.search(str(error)) else None


@contextmanager
def explained(left: Callable[[], str]) -> Iterator[None]:
    """Turn a refused write into a message that ends with `left()`: what is complete on disk, and what to do next.

    Raises:
        UserError: a write was refused.
    """
    try:
        yield
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and refusal(cause):
            raise UserError(f"{error} {left()}") from cause
        raise
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        file = getattr(error, "filename", None)
        raise UserError(f"{f'{file}: ' if file else ''}{reason}. {left()}") from error
