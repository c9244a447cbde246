"""Limits on work that other people's files decide: how long it may take, and how much memory. Knows no model and no template.

Python-level work is stopped in whatever thread does it, and goes on being cheap: a context costs a few microseconds. What is
stuck inside one call of a library can only be stopped from outside, so `check_ends` tries work in a process of its own first.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from catpo.core.errors import UserError

SECONDS = 10.0
"""How long such work may take; what it is meant for takes milliseconds."""
MEMORY = 2 << 30
"""Bytes that it may take."""
TICK = 0.1
"""Seconds between two looks at the work that goes on."""
IDLE = 100
"""Looks without any work after which nobody looks any more."""
HEAVY = 3
"""Exit code of a trial that was stopped."""


class _TooMuch(BaseException):
    """Raised in the thread whose work is over its limit; no `except Exception` on the way out takes it."""


class _Work:
    def __init__(self) -> None:
        self.thread, self.until, self.memory = threading.get_ident(), time.monotonic() + SECONDS, 0
        self.is_stopped = False

    def is_too_much(self) -> bool:
        """Memory is that of the whole process, so it is looked at only once the work has taken far longer than it should."""
        now, in_use = time.monotonic(), psutil.Process().memory_info().rss
        self.memory = self.memory or in_use
        return now > self.until or in_use > self.memory + MEMORY


class _Watch:
    """A thread that looks at the work of all others."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.works: set[_Work] = set()
        self.is_watching = False

    def begin(self) -> _Work:
        work = _Work()
        with self.lock:
            self.works.add(work)
            if not self.is_watching:
                self.is_watching = True
                threading.Thread(target=self._watch, name="catpo-limits", daemon=True).start()
        return work

    def end(self, work: _Work) -> None:
        with self.lock:
            self.works.discard(work)
        if work.is_stopped:  # the exception is on its way: it must arrive here
            for _ in range(1000):
                pass

    def _watch(self) -> None:
        idle = 0
        while idle < IDLE:
            time.sleep(TICK)
            with self.lock:
                idle = 0 if self.works else idle + 1
                for work in [work for work in self.works if work.is_too_much()]:
                    self.works.discard(work)
                    work.is_stopped = True
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(work.thread), ctypes.py_object(_TooMuch))
                self.is_watching = idle < IDLE


_watch = _Watch()


def _anew() -> None:
    """A forked process has none of the threads, and perhaps a lock that one of them held."""
    global _watch
    _watch = _Watch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_anew)


@contextmanager
def limited(what: str, advice: str) -> Iterator[None]:
    """Work inside that takes more than `SECONDS` or `MEMORY` is stopped; in any thread of any process.

    Args:
        what: as the subject of the message.
        advice: what to do next, as a sentence.

    Raises:
        UserError: it was stopped.
    """
    work = _watch.begin()
    try:
        try:
            yield
        finally:
            _watch.end(work)
    except _TooMuch as stop:
        raise _too_much(what, advice) from stop


def check_ends(work: Callable[[], object], what: str, advice: str) -> None:
    """Do something in a copy of this process that can be stopped from outside; whatever it raises there says nothing.

    Nothing is tried where copies of a process with many libraries are not safe (macOS) or there are none (Windows).

    Raises:
        UserError: it takes more than `SECONDS` or `MEMORY`, or ends the process.
    """
    if sys.platform != "linux":
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the copy needs none of them
        copy = os.fork()
    if copy == 0:
        _try_and_leave(work)
    until = time.monotonic() + SECONDS
    wait, (done, status) = 0.001, os.waitpid(copy, os.WNOHANG)
    while not done and time.monotonic() < until:
        time.sleep(wait)
        wait, (done, status) = min(2 * wait, TICK), os.waitpid(copy, os.WNOHANG)
    if not done:
        os.kill(copy, signal.SIGKILL)
        os.waitpid(copy, 0)
    if not done or status != 0:
        raise _too_much(what, advice)


def _try_and_leave(work: Callable[[], object]) -> None:
    """In the copy: nothing of what the process would do at its end is done, and nothing is said."""
    code = 0
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        with suppress(ImportError, ValueError, OSError):
            import resource

            most = psutil.Process().memory_info().vms + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it would say that there was a fork
        work()
    except BaseException as error:
        code = HEAVY if any(isinstance(each, MemoryError | _TooMuch) for each in (error, error.__cause__)) else 0
    finally:
        os._exit(code)


def _too_much(what: str, advice: str) -> UserError:
    return UserError(f"{what} takes more than {SECONDS:g} seconds or {MEMORY >> 20:,} MiB of memory. {advice}")
