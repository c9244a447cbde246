"""Processes of one command, as `torchrun` or `accelerate launch` start them: which rank does which part of the work.

They communicate through the key-value store of torch's launchers, on one machine or many. Knows no model, and no file but a
folder's lock.
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
Value = TypeVar("Value")
PATIENCE = timedelta(days=30)
"""How long one process waits for another. A dead one is the launcher's to notice: it ends the others."""
_group_count = itertools.count()


class WorkGroup:
    """The processes that share one piece of work; a process alone is a group of one.

    Every rank creates its groups in the same order and calls the same methods with the same names.

        with (group := WorkGroup()).lock(output):
            missing = group.broadcast("missing", find_missing)
            for item in group.claim("missing", missing):
                work_on(item)
            group.barrier("done")
    """

    def __init__(self) -> None:
        self.count = process_count()
        self.number = process_number()
        """This process's rank."""
        self.is_main = self.number == 0
        self._store = distributed.PrefixStore(f"catpo/{next(_group_count)}", _common_store(self.count))

    @contextmanager
    def lock(self, folder: str | Path) -> Iterator[Path]:
        """`files.lock.lock`, taken by the main process for all; the others wait until it has it."""
        if not self.is_main:
            self._store.get("locked")
            yield Path(folder)
            return
        with lock(folder) as locked:
            self._store.set("locked", "1")
            yield locked

    def broadcast(self, name: str, make: Callable[[], Value]) -> Value:
        """The value that the main process makes, in every process; JSON."""
        if self.is_main:
            value = make()
            self._store.set(name, json.dumps(value))
            return value
        return json.loads(self._store.get(name))

    def claim(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items that this rank claims from a shared counter; each goes to one rank."""
        mine = -1
        for number, item in enumerate(items):
            if mine < number:
                mine = self._store.add(f"{name} claimed", 1) - 1
            if mine == number:
                yield item

    def add(self, name: str, amount: int) -> int:
        """Add to a sum over all ranks; returns the sum so far."""
        return self._store.add(name, amount)

    def barrier(self, name: str) -> None:
        """Wait until every rank is here."""
        if self._store.add(f"{name} came", 1) == self.count:
            self._store.set(f"{name} all", "1")
        self._store.get(f"{name} all")

    def leave(self) -> None:
        """The last call: the main process, which may host the store, stays until the others have left."""
        if self._store.add("left", 1) == self.count:
            self._store.set("all left", "1")
        if self.is_main:
            self._store.get("all left")


@cache
def _common_store(count: int) -> Any:
    if count == 1:
        return distributed.HashStore()
    _check_address()
    store, _, _ = next(distributed.rendezvous("env://"))
    store.set_timeout(PATIENCE)
    return store


def _check_address() -> None:
    """Raises UserError unless the environment says where the processes meet."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"WORLD_SIZE says that several processes run, but MASTER_ADDR={address!r} and MASTER_PORT={port!r} do not say "
            "where they meet. Start with torchrun or accelerate launch, which set them, or remove WORLD_SIZE."
        )
