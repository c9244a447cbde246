"""Benchmarks opened for an evaluation: their items, pictures and options."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from catpo.config.options import EvaluateOptions
from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.spec import Spec, check_options, parse
from catpo.data.read import read_samples
from catpo.evaluation.benchmarks import Benchmark, FolderBenchmark, Item
from catpo.evaluation.benchmarks._files import Folder
from catpo.runtime.skip_log import SkipLog


@dataclass(frozen=True)
class Task:
    """A benchmark with its items."""

    spec: Spec
    benchmark: Benchmark
    items: list[Item]
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Official file -> SHA-256 of what was read."""

    @property
    def name(self) -> str:
        return self.spec.name


def open_tasks(
    benchmarks: Sequence[str | Spec],
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    is_shuffled: bool = False,
    is_answered_here: bool = False,
    skipped: SkipLog | None = None,
) -> list[Task]:
    """Every benchmark with what it asks.

    Args:
        benchmarks: with their options; each benchmark once.
        data: folder with official files.
        limit: only the first so many pictures of each benchmark.
        is_shuffled: each item gets the picture of another.
        is_answered_here: a model is asked; otherwise answers made elsewhere are graded.
        skipped: takes bad rows of data sets, if it goes on over them.

    Raises:
        UserError: bad benchmark or option; files are missing.
    """
    specs = [parse(benchmark) for benchmark in benchmarks]
    names = [spec.name for spec in specs]
    if not names:
        raise UserError("no benchmark is given. `catpo list benchmarks` shows them.")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"benchmark '{name}' is given twice. Evaluate its second options into another --output.")
    return [_open(spec, data, limit, is_shuffled, is_answered_here, skipped or SkipLog()) for spec in specs]


def _open(
    spec: Spec, data: str | Path | None, limit: int | None, is_shuffled: bool, is_answered_here: bool, skipped: SkipLog
) -> Task:
    make = registry.load("benchmarks", spec.name)
    benchmark: Benchmark = make(**check_options(make, spec))
    benchmark.is_answered_here = is_answered_here
    items, hashes = _items(spec, benchmark, data, skipped)
    if waits_for_answers(benchmark):
        return Task(spec, benchmark, items, hashes)
    if not items:
        raise UserError(f"{spec} asks nothing: {benchmark.data or data} holds no questions. Give it some, or another place.")
    items = _first_pictures(items, limit)
    return Task(spec, benchmark, _shuffle_pictures(items, spec) if is_shuffled else items, hashes)


def waits_for_answers(benchmark: Benchmark) -> bool:
    """Whether only answers made elsewhere say what was asked."""
    return isinstance(benchmark, FolderBenchmark) and benchmark.is_open and not benchmark.is_answered_here


def with_answered(task: Task, answered: Iterable[str], limit: int | None = None) -> Task:
    """The first pictures of a benchmark; an open one has just those items that are answered."""
    if not (isinstance(task.benchmark, FolderBenchmark) and waits_for_answers(task.benchmark)):
        return replace(task, items=_first_pictures(task.items, limit))
    return replace(task, items=_first_pictures([task.benchmark.item(name) for name in answered], limit))


def _first_pictures(items: list[Item], limit: int | None) -> list[Item]:
    if limit is None:
        return items
    pictures = set(list(dict.fromkeys(item.picture for item in items))[:limit])
    return [item for item in items if item.picture in pictures]


def _items(spec: Spec, benchmark: Benchmark, data: str | Path | None, skipped: SkipLog) -> tuple[list[Item], dict[str, str]]:
    """Items, and the hashes of the files they are made of."""
    if not isinstance(benchmark, FolderBenchmark):
        return benchmark.items(*read_samples(benchmark.data, skipped)), {}
    if data is None:
        raise UserError(
            f"{spec.name} is made of official files: say where they are with --data DIR. `catpo data get {spec.name}` shows "
            "which."
        )
    if not Path(data).is_dir():
        raise UserError(f"{data} is no folder. `catpo data get {spec.name}` shows what `--data` must hold.")
    folder = Folder(Path(data), spec.name, benchmark.sources, benchmark.pictures)
    return benchmark.opened(folder), folder.hashes


def _shuffle_pictures(items: Sequence[Item], spec: Spec, *, seed: int = 0) -> list[Item]:
    """Every item with the picture of another, no picture keeping its place; truth and question stay."""
    images = {item.picture: item.sample.images for item in items}
    names = list(images)
    if len(names) < 2:
        raise UserError(f"{spec}: shuffled needs two pictures or more. Raise `limit` or count.")
    others, rng = list(names), random.Random(seed)
    for last in range(len(others) - 1, 0, -1):  # Sattolo: one cycle, so nothing stays
        place = rng.randrange(last)
        others[last], others[place] = others[place], others[last]
    moved = dict(zip(names, others, strict=True))
    return [replace(item, sample=replace(item.sample, images=images[moved[item.picture]])) for item in items]


def each_item(tasks: Sequence[Task]) -> Iterator[tuple[Task, Item]]:
    """All items of all benchmarks, in order."""
    for task in tasks:
        for item in task.items:
            yield task, item


def without_skipped(tasks: Sequence[Task], skipped: Collection[str]) -> list[Task]:
    """The tasks without the items that an evaluation skips, named `benchmark/id`."""
    return [replace(task, items=[item for item in task.items if f"{task.name}/{item.id}" not in skipped]) for task in tasks]


def answer_row(task: Task, item: Item, answer: str) -> dict[str, str]:
    """A row of answers.jsonl."""
    return {"benchmark": task.name, "id": item.id, "prompt": item.sample.prompt, "answer": answer}


def manifest_of(tasks: Sequence[Task], options: EvaluateOptions, decoding: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay the same when an evaluation is resumed."""
    return {
        "format": 1,
        "benchmarks": {task.name: str(task.spec) for task in tasks},
        "data": str(options.data) if options.data is not None else None,
        "judge": options.judge,
        "limit": options.limit,
        "shuffled": options.shuffled,
        "decoding": dict(decoding),
        "items_hash": _hash_items(tasks),
        "data_hashes": {task.name: dict(task.hashes) for task in tasks if task.hashes},
    }


def _hash_items(tasks: Sequence[Task]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for task, item in each_item(tasks):
        digest.update(f"{task.name}\0{item.id}\0{item.sample.prompt}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
