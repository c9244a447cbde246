"""Benchmarks opened for an evaluation: their items, pictures and options."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from catpo.config.options import EvaluateOptions
from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.spec import Spec, parse
from catpo.data.read import read_samples
from catpo.evaluation.benchmarks import Benchmark, Folder, FolderBenchmark, Item
from catpo.runtime.skip_log import SkipLog

Thing = TypeVar("Thing")


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
    """Open every benchmark with its items.

    Args:
        benchmarks: with their options; each benchmark once.
        data: folder with official files.
        limit: only the first N pictures of each benchmark.
        is_shuffled: each item gets the picture of another.
        is_answered_here: a model answers; otherwise answers made elsewhere are graded.
        skipped: collects bad rows of data sets, if they are skipped.

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
    benchmark: Benchmark = registry.opened("benchmarks", spec)
    benchmark.is_answered_here = is_answered_here
    items, hashes = _items(spec, benchmark, data, skipped)
    if waits_for_answers(benchmark):
        return Task(spec, benchmark, items, hashes)
    if not items:
        raise UserError(f"{spec} asks nothing: {benchmark.data or data} holds no questions. Add some, or give another place.")
    items = _limited(items, limit)
    if is_shuffled:
        items = _shuffle_pictures(items, spec)
    return Task(spec, benchmark, items, hashes)


def waits_for_answers(benchmark: Benchmark) -> bool:
    """Whether only answers made elsewhere say what was asked."""
    return isinstance(benchmark, FolderBenchmark) and benchmark.is_open and not benchmark.is_answered_here


def with_answered(task: Task, answered: Iterable[str], limit: int | None = None) -> Task:
    """The first pictures of a benchmark; an open one has exactly the items that are answered."""
    items = task.items
    if isinstance(task.benchmark, FolderBenchmark) and waits_for_answers(task.benchmark):
        items = [task.benchmark.item(name) for name in answered]
    return replace(task, items=_limited(items, limit))


def first_pictures(things: Sequence[Thing], pictures: Sequence[str], limit: int | None) -> list[Thing]:
    """The things that belong to the first `limit` pictures; `pictures` has the picture of each thing."""
    kept = set(list(dict.fromkeys(pictures))[:limit])
    return [thing for thing, picture in zip(things, pictures, strict=True) if picture in kept]


def _limited(items: Sequence[Item], limit: int | None) -> list[Item]:
    return first_pictures(items, [item.picture for item in items], limit)


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
        raise UserError(f"{data} is not a folder. `catpo data get {spec.name}` shows what `--data` must hold.")
    folder = Folder(Path(data), spec.name, benchmark.sources, benchmark.pictures)
    return benchmark.opened(folder), folder.hashes


def _shuffle_pictures(items: Sequence[Item], spec: Spec) -> list[Item]:
    """Every item with the picture of another, so that no picture keeps its place; truth and question stay."""
    images = {item.picture: item.sample.images for item in items}
    if len(images) < 2:
        raise UserError(f"{spec}: shuffled needs two pictures or more. Raise `limit` or count.")
    others, rng = list(images.values()), random.Random(0)
    for last in range(len(others) - 1, 0, -1):  # Sattolo's shuffle: one cycle, so nothing stays
        other = rng.randrange(last)
        others[last], others[other] = others[other], others[last]
    moved = dict(zip(images, others, strict=True))
    return [replace(item, sample=replace(item.sample, images=moved[item.picture])) for item in items]


def picture_files(items: Iterable[Item]) -> tuple[list[Path], list[Path]]:
    """The files of the pictures that items show, and those of them that are missing."""
    paths = list(dict.fromkeys(picture.path for item in items for picture in item.sample.images if picture.path))
    return paths, [path for path in paths if not path.is_file()]


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
        digest.update(f"{task.name}\0{item.id}\0{item.sample.asked}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
