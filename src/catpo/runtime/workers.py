"""Worker processes that prepare batches while a model runs: how many there are, what they are fed, how they end.

Knows no pairs and no model.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, get_worker_info

from catpo.core.errors import Unforeseen, UserError, first_line, is_unforeseen

Item = TypeVar("Item")
Value = TypeVar("Value")
MOST = 4
"""Workers by default, where there are as many CPUs."""
SHARED_MEMORY = Path("/dev/shm")
"""Where workers leave their tensors; containers often have 64 MB of it, which no batch of pictures fits into."""
ROOM = 4 << 30
"""Bytes of free shared memory below which there are no workers by default."""

REFUSED, BEHIND = "refused", "behind"
"""Keys of the message that a worker gives in place of a value (torch would put the worker's traceback before it), and of the
error behind the message."""


def default_count(device: str) -> int:
    """Workers if no number is given: on a GPU one per free CPU, at most `MOST`; none on a CPU, which they would share.

    There are none either in a process that may start no others, or where there is too little shared memory.
    """
    if device != "cuda" or multiprocessing.current_process().daemon:
        return 0
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < ROOM:
        return 0
    here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))  # processes of this machine, each with its own workers
    return max(0, min(MOST, usable_cpus() // here - 1))


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_workers(make: Callable[[Item], Value], items: Iterable[Item], count: int) -> Generator[Value, None, None]:
    """`make` of every item in their order, made by `count` workers; by this process if 0.

    Each worker is one item ahead; `items` are drawn here. `make` and its values are pickled if there are workers.

    Raises:
        UserError: `make` raised it, at the item's turn; or a worker was killed.
    """
    loader: Any = DataLoader(
        _Made(Guarded(make)),
        batch_size=None,
        sampler=items,
        collate_fn=_unchanged,
        num_workers=count,
        prefetch_factor=1 if count else None,
    )
    with explained(count):
        with _held_signals():
            values = iter(loader)
        for value in values:
            yield opened(value)


def opened(value: Any) -> Any:
    """A value from a `Guarded` function.

    Raises:
        UserError: the function raised it.
    """
    if isinstance(value, dict) and REFUSED in value:
        if value[BEHIND]:
            raise Unforeseen(value[REFUSED]) from InWorker(value[BEHIND])
        raise UserError(value[REFUSED])
    return value


class InWorker(Exception):
    """The traceback of an error in a worker process, as text."""


class Guarded(Generic[Item, Value]):
    """A function for workers: what it refuses comes back as a value, see `opened`; signals are left to the main process."""

    def __init__(self, make: Callable[[Item], Value]) -> None:
        self.make = make
        # a fork server imports what its workers need once, and not each of them again
        multiprocessing.set_forkserver_preload(["__main__", type(make).__module__])
        self._settled: int | None = None
        """The worker process whose signals are settled."""

    def __call__(self, item: Item) -> Value | dict[str, str]:
        if get_worker_info() is None:
            return self.make(item)
        if self._settled != os.getpid():
            _leave_signals_to_the_main_process()
            self._settled = os.getpid()
        try:
            return self.make(item)
        except UserError as error:
            behind = "".join(traceback.format_exception(error)) if is_unforeseen(error) else ""
            return {REFUSED: str(error), BEHIND: behind}


def _leave_signals_to_the_main_process() -> None:
    """Ctrl-C and a scheduler's SIGTERM reach workers too, but what is begun is finished; only the main process ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    if main is None or not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _held_signals() -> Iterator[None]:
    """Processes started inside get no signal before they are ready for it; those of this process come afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def explained(count: int) -> Iterator[None]:
    """Explains what goes wrong with `count` workers.

    Raises:
        UserError: a worker was killed, or cannot get what it needs.
    """
    if count:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are parallel already; forked, they would warn
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"A process that prepares batches ended ({first_line(error)}): usually memory ran out, or shared memory "
            f"({SHARED_MEMORY}). Give fewer of them: dataloader_num_workers, {count} now; 0 is none."
        ) from error
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if not count or "pickle" not in str(error):
            raise
        raise UserError(
            f"The pairs cannot be sent to the processes that prepare batches ({first_line(error)}). Give "
            "dataloader_num_workers=0."
        ) from error


class _Made(Dataset[Any]):
    """What `make` makes of an item, as a data set whose index is the item."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, item: Any) -> Any:
        return self.make(item)


def _unchanged(value: Any) -> Any:
    return value
