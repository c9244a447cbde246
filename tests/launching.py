"""Several processes as `torchrun` starts them, forked from this one, so that nothing has to be imported again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from accelerate.state import AcceleratorState, GradientState
from torch import distributed

from catpo import processes

fork = multiprocessing.get_context("fork")


def together(count: int, function: Callable[[], Any], **environment: str) -> list[Any]:
    """What `function` returns in each of the processes; when one fails the others are ended, as a launcher does.

    Raises:
        AssertionError: one failed; with what it printed.
    """
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), **environment}
    pipes = [fork.Pipe(duplex=False) for _ in range(count)]
    started = []
    for number, (_, write) in enumerate(pipes):
        ranks = {"RANK": str(number), "LOCAL_RANK": str(number)}
        started.append(fork.Process(target=_run, args=(function, {**common, **ranks}, write)))
        started[-1].start()
        write.close()
    results: dict[int, Any] = {}
    try:
        while len(results) < count:
            for read in wait([read for number, (read, _) in enumerate(pipes) if number not in results], timeout=120) or [None]:
                assert read is not None, "the processes wait for one another"
                number = [each for each, _ in pipes].index(read)
                is_done, results[number] = read.recv()
                assert is_done, f"process {number} of {count}:\n{results[number]}"
    finally:
        for process in started:
            process.kill() if len(results) < count else None
            process.join()
    return [results[number] for number in range(count)]


def _run(function: Callable[[], Any], environment: dict[str, str], write: Any) -> None:
    os.environ.update(environment)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    processes._common_store.cache_clear()
    try:
        write.send((True, function()))
    except BaseException:
        write.send((False, traceback.format_exc()))
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        write.close()
        os._exit(0)  # nothing of the test run is to be cleaned up here


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
