"""Several processes of one command, as `torchrun` or `accelerate launch` start them: who takes which part of the work.

They agree through the key-value store that torch's launchers bring along, on one machine or many. Knows no model, no file but
the lock of a folder.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed

from catpo.core.errors import UserError
from catpo.files.lock import lock
from catpo.runtime.launcher import process_count, process_number

Item = TypeVar("Item")
Made = TypeVar("Made")
PATIENCE = timedelta(days=30)
"""How long one process waits for another. A dead one is the launcher's to notice: it ends the others."""
_works = itertools.count()


class WorkGroup:
    """The processes that share one piece of work; alone, a process is a team of one.

    Every process makes its teams in the same order and calls the same methods with the same names.

        with (team := Team()).lock(output):
            todo = team.agree("todo", find_what_is_missing)
            for item in team.claim("todo", todo):
                do(item)
            team.wait("done")
    """

    def __init__(self) -> None:
        self.count = process_count()
        self.number = process_number()
        self.is_main = self.number == 0
        self._store = distributed.PrefixStore(f"catpo/{next(_works)}", _common_store(self.count))

    @contextmanager
    def lock(self, folder: str | Path) -> Iterator[Path]:
        """`runs.lock`, taken by the first process for all. The others go on when it has it."""
        if not self.is_main:
            self._store.get("locked")
            yield Path(folder)
            return
        with lock(folder) as made:
            self._store.set("locked", "1")
            yield made

    def broadcast(self, name: str, make: Callable[[], Made]) -> Made:
        """What the first process makes, given to all; JSON."""
        if self.is_main:
            made = make()
            self._store.set(name, json.dumps(made))
            return made
        return json.loads(self._store.get(name))

    def claim(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Those of the items that this process shall work on: always the next that nobody has."""
        mine = -1
        for number, item in enumerate(items):
            if mine < number:
                mine = self._store.add(f"{name} claimed", 1) - 1
            if mine == number:
                yield item

    def add(self, name: str, amount: int) -> int:
        """Counts what all have done; returns the sum so far."""
        return self._store.add(name, amount)

    def barrier(self, name: str) -> None:
        """Goes on when every process has come here."""
        if self._store.add(f"{name} came", 1) == self.count:
            self._store.set(f"{name} all", "1")
        self._store.get(f"{name} all")

    def leave(self) -> None:
        """The last call of a team: the first process, which may hold the store, stays until the others are gone."""
        if self._store.add("left", 1) == self.count:
            self._store.set("all left", "1")
        if self.is_main:
            self._store.get("all left")


@cache
def _common_store(count: int) -> Any:
    if count == 1:
        return distributed.HashStore()
    _check_meeting_place()
    store, _, _ = next(distributed.rendezvous("env://"))
    store.set_timeout(PATIENCE)
    return store


def _check_meeting_place() -> None:
    """Raises UserError unless the environment says where the processes meet."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"WORLD_SIZE says that several processes run, but MASTER_ADDR={address!r} and MASTER_PORT={port!r} do not say "
            "where they meet. Start with torchrun or accelerate launch, which set them, or remove WORLD_SIZE."
        )
