"""Stop cleanly on SIGTERM, which a scheduler sends before it takes the machine away, at a point where nothing is lost.

with on_sigterm() as stop:
    for shard in shards:
        stop.leave_if_asked(f"{done} shards are in {folder}.")
        ...
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from catpo.core.errors import Stopped

AGAIN = "Give the same command again to go on."


class Stop:
    """Whether SIGTERM, or Ctrl-C where `on_ctrl_c` listens, was received."""

    is_asked = False
    cause, exit_code = "SIGTERM", 143

    def leave_if_asked(self, done: str, next_step: str = AGAIN) -> None:
        """Call this where everything done so far is on disk; `done` says what that is.

        Raises:
            Stopped: SIGTERM was received.
        """
        if self.is_asked:
            raise Stopped(f"{self.cause}: {done} {next_step}", exit_code=self.exit_code)


_listening: list[Stop] = []


@contextmanager
def on_sigterm() -> Iterator[Stop]:
    """Inside it, SIGTERM only sets `is_asked`; a second one ends the process.

    Nothing changes in a thread or where another handler is installed. A nested `on_sigterm` shares the outer one's `Stop`.
    """
    if _listening:
        yield _listening[0]
        return
    stop = Stop()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield stop
        return

    def ask(*_: Any) -> None:
        stop.is_asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ask)
    _listening.append(stop)
    try:
        yield stop
    finally:
        _listening.remove(stop)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def on_ctrl_c(stop: Stop, until: str) -> Iterator[None]:
    """Inside it, Ctrl-C asks `stop` as SIGTERM does; a second one interrupts at once.

    Nothing changes in a thread or where another handler is installed. `until` says what is done first, e.g. "this step".
    """
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return

    def ask(*_: Any) -> None:
        stop.is_asked, stop.cause, stop.exit_code = True, "Ctrl-C", 130
        signal.signal(signal.SIGINT, usual)
        print(f"catpo: stopping after {until}; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
