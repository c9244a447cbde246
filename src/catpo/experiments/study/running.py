"""Runs cells one by one or in several processes; one that fails is named, the others run on. Knows no table."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch

from catpo.core.errors import Stopped, UserError
from catpo.experiments.study.cells import Keep
from catpo.runtime.progress import track
from catpo.runtime.sigterm import on_sigterm


@runtime_checkable
class Task(Protocol):
    """Pairs with scores, or a cell."""

    @property
    def name(self) -> str: ...
    def is_finished(self, output: Path) -> bool: ...
    def folder(self, output: Path) -> Path: ...
    def run(self, output: Path, *, keep: Keep = "nothing") -> None: ...


def run_all(
    tasks: Sequence[Task],
    output: Path,
    *,
    what: str,
    jobs: int = 1,
    alone: bool = False,
    keep: Mapping[str, Keep] = MappingProxyType({}),
) -> dict[str, str]:
    """Run the tasks that are not finished; returns name -> reason of those that failed.

    Args:
        tasks: in the order wanted; a task given twice runs once.
        output: folder of the studies.
        what: the tasks' name in the progress display.
        jobs: processes that share the cores; 1: this process.
        alone: run each in a process of its own, one after the other, so that time and memory can be measured.
        keep: name of a task -> what stays of its weights; of others nothing does.
    """
    unique = {task.name: task for task in tasks}
    left = [task for task in unique.values() if not task.is_finished(output)]
    kept: dict[str, Keep] = {name: keep.get(name, "nothing") for name in unique}
    failed = {}
    with track(len(unique), what, "done", done=len(unique) - len(left)) as bar, on_sigterm() as stop:
        outcomes: Iterator[tuple[Task, str]]
        if alone:
            outcomes = ((task, _run_alone(task, output, 1, kept[task.name])) for task in left)
        elif jobs > 1 and len(left) > 1:
            outcomes = _in_processes(left, output, jobs, kept)
        else:
            outcomes = ((task, _run(task, output, kept[task.name])) for task in left)
        for task, reason in outcomes:
            if reason:
                failed[task.name] = reason
            bar.advance(note=task.name + (" FAILED" if reason else ""))
            stop.leave_if_asked(f"{bar.count} of {len(unique)} cells are done in {output}.")
    return failed


def _run(task: Task, output: Path, keep: Keep) -> str:
    """Run a task; returns why it failed, or an empty text."""
    folder = task.folder(output)
    try:
        task.run(output, keep=keep)
    except Stopped:
        raise
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever it is, the other cells run on
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {error} (see {folder / 'error.txt'})"
    finally:
        gc.collect()  # a trainer is in a reference cycle, and the next model needs its memory
    (folder / "error.txt").unlink(missing_ok=True)
    return ""


def _in_processes(tasks: Sequence[Task], output: Path, jobs: int, keep: Mapping[str, Keep]) -> Iterator[tuple[Task, str]]:
    """`_run` in several processes. One that dies breaks the whole pool; the tasks left over then run alone."""
    orphans = []
    with _pool(min(jobs, len(tasks)), jobs) as pool:
        futures = {pool.submit(_run, task, output, keep[task.name]): task for task in tasks}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except BrokenProcessPool:
                    orphans.append(futures[future])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # when interrupted: start nothing more
    for task in orphans:
        yield task, _run_alone(task, output, jobs, keep[task.name])


def _run_alone(task: Task, output: Path, jobs: int, keep: Keep) -> str:
    """`_run` in a process of its own."""
    with _pool(1, jobs) as pool:
        try:
            return pool.submit(_run, task, output, keep).result()
        except BrokenProcessPool:
            return "its process was killed or ran out of memory. Give it more memory, or fewer --jobs."


def _pool(workers: int, jobs: int) -> ProcessPoolExecutor:
    """Fresh interpreters, since a forked one cannot use CUDA; each gets its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_process, (threads,))


def _start_process(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
