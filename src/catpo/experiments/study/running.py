"""Runs cells one after the other or in several processes; one that fails is named, the others go on. Knows no table."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from catpo.core.errors import Stopped, UserError
from catpo.runtime.progress import track
from catpo.runtime.sigterm import on_sigterm


@runtime_checkable
class Task(Protocol):
    """What can be run: pairs with scores, or a cell."""

    @property
    def name(self) -> str: ...
    def is_finished(self, output: Path) -> bool: ...
    def folder(self, output: Path) -> Path: ...
    def run(self, output: Path, *, keep_model: bool = False) -> None: ...


def run_all(
    tasks: Sequence[Task], output: Path, *, what: str, jobs: int = 1, alone: bool = False, keep_models: bool = False
) -> dict[str, str]:
    """Run what is not finished; gives name -> reason of those that failed.

    Args:
        tasks: in the order wanted; the same task twice is run once.
        output: of the study.
        what: what progress calls them.
        jobs: processes at the same time, which share the cores; 1: this process.
        alone: each in a process of its own, one after the other, so that time and memory can be measured.
        keep_models: keep the weights.
    """
    different = {task.name: task for task in tasks}
    left = [task for task in different.values() if not task.is_finished(output)]
    failed = {}
    with track(len(different), what, "done", done=len(different) - len(left)) as bar, on_sigterm() as stop:
        if alone:
            done: Iterator[tuple[Task, str]] = (each for task in left for each in _in_processes([task], output, 1, keep_models))
        elif jobs > 1 and len(left) > 1:
            done = _in_processes(left, output, jobs, keep_models)
        else:
            done = ((task, _reason(task, output, keep_models)) for task in left)
        for task, reason in done:
            if reason:
                failed[task.name] = reason
            bar.advance(note=task.name + (" FAILED" if reason else ""))
            stop.leave_if_asked(f"{bar.count} of {len(different)} cells are done in {output}.")
    return failed


def _reason(task: Task, output: Path, keep_model: bool) -> str:
    """Run a task; why it failed, or nothing."""
    try:
        task.run(output, keep_model=keep_model)
    except Stopped:
        raise
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever it is, the other cells go on
        folder = task.folder(output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {error} (see {folder / 'error.txt'})"
    finally:
        gc.collect()  # a trainer refers to itself, and the next model needs the room
    (task.folder(output) / "error.txt").unlink(missing_ok=True)
    return ""


def _in_processes(tasks: Sequence[Task], output: Path, jobs: int, keep_models: bool) -> Iterator[tuple[Task, str]]:
    """The same in processes of their own. One that dies takes the pool with it, so what was left is run again one by one."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    fresh = lambda workers: ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(threads,)
    )
    orphans = []
    with fresh(min(jobs, len(tasks))) as pool:
        futures: dict[Future[str], Task] = {pool.submit(_reason, task, output, keep_models): task for task in tasks}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except BrokenProcessPool:
                    orphans.append(futures[future])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # when interrupted: begin nothing more
    for task in orphans:
        with fresh(1) as pool:
            try:
                yield task, pool.submit(_reason, task, output, keep_models).result()
            except BrokenProcessPool:
                yield task, "its process was ended from outside or ran out of memory. Give it more memory, or fewer --jobs."


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
