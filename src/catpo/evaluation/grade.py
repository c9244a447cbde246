"""What benchmarks ask, and what answers are worth: items, answers made elsewhere, grades, scores. Needs no model and no torch.

grades.jsonl is made of answers.jsonl, and scores.json last, so that it stands for a finished evaluation.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.intervals import interval
from catpo.core.spec import Spec, check_options, check_positive, parse
from catpo.data.read import read_samples
from catpo.evaluation.benchmarks import Benchmark, FolderBenchmark, Grade, Item
from catpo.evaluation.benchmarks._answers import read_records, some
from catpo.evaluation.benchmarks._files import Folder, Record
from catpo.evaluation.coverage import resample
from catpo.files.json_files import check_same, lock, read_json, read_rows, versions, write_atomic, write_json
from catpo.judges import Judge, open_judge
from catpo.runtime.progress import track
from catpo.runtime.skip_log import Skipped

ABOUT, ANSWERS, GRADES, SCORES = "evaluation.json", "answers.jsonl", "grades.jsonl", "scores.json"
BEGUN = {
    "benchmarks": dict[str, str], "data": str | None, "judge": str | None, "limit": int | None, "shuffled": bool,
    "decoding": dict, "skipped": dict[str, str] | None,
}  # fmt: skip
"""What grading reads in evaluation.json."""
ANSWER = {"benchmark": str, "id": str, "answer": str}
"""And in a row of answers.jsonl."""
RESAMPLES = 1000
LISTED = 100
"""Ids listed in scores.json of answers that are missing or empty."""


def grade(output: str | Path, *, judge: str | Spec | None = None, progress: bool = True) -> dict[str, Any]:
    """Grade and sum up again the answers that an evaluation has, without the model.

    Args:
        output: folder of the evaluation.
        judge: instead of the one that the evaluation was begun with.
        progress: show it on stderr.

    Raises:
        UserError: the folder holds no evaluation, or not all of its answers.
    """
    about = _read_begun(Path(output))
    specs = [parse(spec) for spec in about["benchmarks"].values()]
    tasks = open_tasks(
        specs,
        data=about.get("data"),
        limit=about["limit"],
        is_shuffled=about["shuffled"],
        is_answered_here="temperature" in about["decoding"],
        skipped=Skipped("skip" if "skipped" in about else "stop"),
    )
    with lock(output) as folder:
        rows = read_rows(folder / ANSWERS, ANSWER)
        tasks = [_with_answered(task, [row["id"] for row in rows if row["benchmark"] == task.name]) for task in tasks]
        return write_scores(folder, tasks, judge if judge is not None else about.get("judge"), progress)


def grade_answers(
    *,
    answers: str | Path | Sequence[str | Path],
    benchmarks: Sequence[str | Spec],
    output: str | Path,
    model: str | None = None,
    data: str | Path | None = None,
    judge: str | Spec | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score answers that were made elsewhere.

    Args:
        answers: one or more files: in the customary format of the one benchmark that is given; or JSON Lines with "benchmark",
            "id" and "answer", in any order, as `catpo evaluate` writes them.
        benchmarks: as for `evaluate`.
        output: folder for the evaluation.
        model: what the answers' model is called; the file's name if None.
        data: folder with the benchmark's official files.
        judge: for benchmarks that need one.
        limit: only the first so many pictures of each benchmark.
        progress: show it on stderr.

    Raises:
        UserError: an answer is missing (where the benchmark cannot do without), given twice, or for no item; names the items.
    """
    files = [Path(each) for each in ([answers] if isinstance(answers, str | Path) else answers)]
    check_positive(limit=limit)
    if judge is not None:
        parse(judge)
    whole = open_tasks(benchmarks, data=data)
    given = _given_answers(files, whole)
    tasks = [_with_answered(task, given[task.name], limit) for task in whole]
    _check_given(files, tasks, given)
    with lock(output) as folder:
        begun = about(tasks, data=data, judge=judge, limit=limit, shuffled=False, decoding={"answers": _names(files)})
        begun |= {"model": model or re.sub(r"\.jsonl?(\.gz)?$", "", files[0].name), "model_hash": None, "adapter": None}
        check_begun(folder, begun)
        write_json(folder / ABOUT, {**begun, "versions": versions()})
        rows = [
            answer_row(task, item, given[task.name][item.id]) for task, item in each_item(tasks) if item.id in given[task.name]
        ]
        write_atomic(folder / ANSWERS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return write_scores(folder, tasks, judge, progress)


def about(
    tasks: Sequence[Task],
    *,
    data: str | Path | None,
    judge: str | Spec | None,
    limit: int | None,
    shuffled: bool,
    decoding: Mapping[str, Any],
) -> dict[str, Any]:
    """What must stay the same when an evaluation is gone on with."""
    return {
        "format": 1,
        "benchmarks": {task.name: str(task.spec) for task in tasks},
        "data": str(data) if data is not None else None,
        "judge": str(judge) if judge is not None else None,
        "limit": limit,
        "shuffled": shuffled,
        "decoding": dict(decoding),
        "items_hash": _hash_items(tasks),
        "data_hashes": {task.name: dict(task.hashes) for task in tasks if task.hashes},
    }


def _read_begun(folder: Path) -> dict[str, Any]:
    return read_json(folder / ABOUT, made_by="catpo evaluate", fields=BEGUN)


def check_begun(folder: Path, begun: Mapping[str, Any]) -> None:
    """Refuse to go on with another model or other options than those the folder was begun with."""
    if (folder / ABOUT).exists():
        old = read_json(folder / ABOUT, made_by="catpo evaluate")
        check_same({key: old.get(key) for key in begun}, begun, where=folder)
    elif (folder / ANSWERS).exists():
        raise UserError(f"{folder} holds answers without {ABOUT}, so nobody knows whose they are. Choose another --output.")


# ---- what is asked --------------------------------------------------------------------------------------------------------


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
    skipped: Skipped | None = None,
    **counts: int | None,
) -> list[Task]:
    """Every benchmark with what it asks.

    Args:
        benchmarks: with their options; each benchmark once.
        data: folder with official files.
        limit: only the first so many pictures of each benchmark.
        is_shuffled: each item gets the picture of another.
        is_answered_here: a model is asked; otherwise answers made elsewhere are graded.
        skipped: takes bad rows of data sets, if it goes on over them.
        counts: other numbers that must be positive.

    Raises:
        UserError: bad benchmark, option or number; files are missing.
    """
    check_positive(limit=limit, **counts)
    specs = [parse(benchmark) for benchmark in benchmarks]
    names = [spec.name for spec in specs]
    if not names:
        raise UserError("no benchmark is given. `catpo list benchmarks` shows them.")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"benchmark '{name}' is given twice. Evaluate its second options into another --output.")
    return [_open(spec, data, limit, is_shuffled, is_answered_here, skipped or Skipped()) for spec in specs]


def _open(
    spec: Spec, data: str | Path | None, limit: int | None, is_shuffled: bool, is_answered_here: bool, skipped: Skipped
) -> Task:
    make = registry.load("benchmarks", spec.name)
    benchmark: Benchmark = make(**check_options(make, spec))
    benchmark.is_answered_here = is_answered_here
    items, hashes = _items(spec, benchmark, data, skipped)
    if _waits_for_answers(benchmark):
        return Task(spec, benchmark, items, hashes)
    if not items:
        raise UserError(f"{spec} asks nothing: {benchmark.data or data} holds no questions. Give it some, or another place.")
    items = _first_pictures(items, limit)
    return Task(spec, benchmark, _shuffle_pictures(items, spec) if is_shuffled else items, hashes)


def _waits_for_answers(benchmark: Benchmark) -> bool:
    """Whether only answers made elsewhere say what was asked."""
    return isinstance(benchmark, FolderBenchmark) and benchmark.is_open and not benchmark.is_answered_here


def _with_answered(task: Task, answered: Iterable[str], limit: int | None = None) -> Task:
    """The first pictures of a benchmark; an open one has just those items that are answered."""
    if not (isinstance(task.benchmark, FolderBenchmark) and _waits_for_answers(task.benchmark)):
        return replace(task, items=_first_pictures(task.items, limit))
    return replace(task, items=_first_pictures([task.benchmark.item(name) for name in answered], limit))


def _first_pictures(items: list[Item], limit: int | None) -> list[Item]:
    if limit is None:
        return items
    pictures = set(list(dict.fromkeys(item.picture for item in items))[:limit])
    return [item for item in items if item.picture in pictures]


def _items(spec: Spec, benchmark: Benchmark, data: str | Path | None, skipped: Skipped) -> tuple[list[Item], dict[str, str]]:
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


def without_skipped(tasks: Sequence[Task], folder: Path) -> list[Task]:
    """The tasks without the items that the evaluation in `folder` leaves out."""
    left_out = _read_begun(folder).get("skipped") or {}
    return [replace(task, items=[item for item in task.items if f"{task.name}/{item.id}" not in left_out]) for task in tasks]


def each_item(tasks: Sequence[Task]) -> Iterator[tuple[Task, Item]]:
    """All items of all benchmarks, in order."""
    for task in tasks:
        for item in task.items:
            yield task, item


def _hash_items(tasks: Sequence[Task]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for task, item in each_item(tasks):
        digest.update(f"{task.name}\0{item.id}\0{item.sample.prompt}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


# ---- answers made elsewhere -----------------------------------------------------------------------------------------------


def answer_row(task: Task, item: Item, answer: str) -> dict[str, str]:
    """A row of answers.jsonl."""
    return {"benchmark": task.name, "id": item.id, "prompt": item.sample.prompt, "answer": answer}


def _given_answers(files: Sequence[Path], tasks: Sequence[Task]) -> dict[str, dict[str, str]]:
    """Benchmark -> item id -> answer."""
    if not files:
        raise UserError("no file with answers is given: `--answers FILE`.")
    records = [record for file in files for record in read_records(file)]
    if all("benchmark" in record.row for record in records):
        given = _our_answers(records, tasks)
    elif len(tasks) == 1:
        given = {tasks[0].name: tasks[0].benchmark.match(records, tasks[0].items)}
    else:
        raise UserError(
            f"{_names(files)} does not say which of {', '.join(task.name for task in tasks)} it answers. Grade one benchmark "
            "at a time, or write rows with benchmark, id and answer."
        )
    return given


def _check_given(files: Sequence[Path], tasks: Sequence[Task], given: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse missing answers, unless the benchmark can be graded in part."""
    for task in tasks:
        missing = [item.id for item in task.items if item.id not in given[task.name]]
        if missing and (not task.benchmark.is_gradable_in_part or len(missing) == len(task.items)):
            raise UserError(
                f"{_names(files)} has no answer to item '{some(missing)}' of {task.name}. Add it, or lower `limit`."
            )


def _our_answers(records: Sequence[Record], tasks: Sequence[Task]) -> dict[str, dict[str, str]]:
    """Rows with benchmark, id and answer, as `catpo evaluate` writes them; those of other items are left out."""
    wanted = {(task.name, item.id) for task, item in each_item(tasks)}
    opened = {task.name for task in tasks if _waits_for_answers(task.benchmark)}
    given: dict[str, dict[str, str]] = {task.name: {} for task in tasks}
    double = []
    for record in records:
        name, key, answer = (record.row.get(field) for field in ("benchmark", "id", "answer"))
        if not (isinstance(name, str) and isinstance(key, str) and isinstance(answer, str)):
            raise UserError(f"{record.place} needs the texts 'benchmark', 'id' and 'answer'.")
        if (name, key) in wanted or name in opened:
            if key in given[name]:
                double.append(f"{record.place} answers item '{key}'")
            given[name][key] = answer
    if double:
        raise UserError(f"{some(double)} a second time. Remove one of each.")
    return given


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)


# ---- grades and scores ----------------------------------------------------------------------------------------------------


def write_scores(folder: Path, tasks: Sequence[Task], judge: str | Spec | None, progress: bool) -> dict[str, Any]:
    """grades.jsonl, then scores.json, out of answers.jsonl.

    Raises:
        UserError: an answer is missing, or a benchmark needs a judge and none is named.
    """
    begun = _read_begun(folder)
    answers = {(row["benchmark"], row["id"]): row["answer"] for row in read_rows(folder / ANSWERS, ANSWER)}
    judges = open_judges(tasks, judge)
    left_out = begun.get("skipped") or {}
    graded = {
        task.name: _grade_task(folder, task, answers, judges.get(task.name), progress)
        for task in without_skipped(tasks, folder)
    }
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for rows in graded.values() for row in rows)
    write_atomic(folder / GRADES, "".join(lines))
    kept = ("format", "model", "model_hash", "adapter", "limit", "shuffled", "decoding", "data_hashes", "versions", "server")
    scores = {
        **{key: begun.get(key) for key in kept if key != "server" or key in begun},
        **({"skipped": _skipped(left_out, tasks)} if "skipped" in begun else {}),
        "benchmarks": {task.name: _scores(task, graded[task.name], answers, judges.get(task.name)) for task in tasks},
    }
    write_json(folder / SCORES, scores)
    return scores


def _skipped(left_out: Mapping[str, str], tasks: Sequence[Task]) -> dict[str, Any]:
    """How many items were left out, and the first of them; all stand in evaluation.json."""
    rows = [{"what": name, "why": why} for name, why in left_out.items()]
    items = {f"{task.name}/{item.id}" for task, item in each_item(tasks)}
    return {"count": len(rows), "of": len(items | set(left_out)), "rows": rows[:LISTED]}


def open_judges(tasks: Sequence[Task], judge: str | Spec | None) -> dict[str, Judge]:
    """Benchmark -> the judge, decoding as its authors do, for those that need one.

    Raises:
        UserError: a benchmark needs a judge and none is named, or it is not known.
    """
    spec = None if judge is None else parse(judge)
    needing = [task for task in tasks if task.benchmark.needs_judge]
    if not needing:
        return {}
    if spec is None:
        raise UserError(
            f"{', '.join(task.name for task in needing)} is graded by a judge: name one with --judge (`catpo list judges`). "
            "The answers are kept."
        )
    made = open_judge(spec)
    return {task.name: made.decoding_as(task.benchmark.judge_decoding) for task in needing}


def _grade_task(
    folder: Path, task: Task, answers: Mapping[tuple[str, str], str], judge: Judge | None, progress: bool
) -> list[dict[str, Any]]:
    """A row per item that has an answer."""
    missing = [item.id for item in task.items if (task.name, item.id) not in answers]
    if missing and not task.benchmark.is_gradable_in_part:
        raise UserError(
            f"{folder} has no answer to item '{some(missing)}' of {task.name}. Give the same `catpo evaluate` command again."
        )
    items = [item for item in task.items if (task.name, item.id) in answers]
    if not task.benchmark.needs_judge:
        return [grade_row(task, item, answers[task.name, item.id]) for item in items]
    assert judge is not None
    with (
        ThreadPoolExecutor(judge.workers) as pool,
        track(len(items), f"Judging {task.name}", "answers", enabled=progress) as bar,
    ):
        rows = []
        try:
            for row in pool.map(lambda item: grade_row(task, item, answers[task.name, item.id], judge), items):
                rows.append(row)
                bar.advance()
        except BaseException:  # one failed or was interrupted: ask nothing more
            pool.shutdown(cancel_futures=True)
            raise
        return rows


def grade_row(task: Task, item: Item, answer: str, judge: Judge | None = None) -> dict[str, Any]:
    """A row of grades.jsonl; `judge` for benchmarks that need one."""
    has_judge = task.benchmark.needs_judge
    found: Grade = task.benchmark.grade(item, answer, judge) if has_judge else task.benchmark.grade(item, answer)  # type: ignore[call-arg]
    row: dict[str, Any] = {"benchmark": task.name, "id": item.id, "group": item.group, "picture": item.picture}
    row |= {"counts": dict(found.counts)}
    row |= {} if found.mentions is None else {"mentions": [list(mention) for mention in found.mentions]}
    row |= {} if found.is_right is None else {"right": found.is_right}
    row |= {} if found.has_verdict else {"verdict": False}
    return row | ({"notes": dict(found.notes)} if found.notes else {})


def _scores(
    task: Task, rows: Sequence[Mapping[str, Any]], answers: Mapping[tuple[str, str], str], judge: Judge | None
) -> dict[str, Any]:
    metrics = {}
    for name, values in resample(task.benchmark.summarise, rows, resamples=RESAMPLES).items():
        numbers = (float(values[0]), *interval(values[1:]))
        metrics[name] = {key: None if math.isnan(x) else x for key, x in zip(("value", "low", "high"), numbers, strict=True)}
    official = task.benchmark.official(_sums(rows))
    return {
        "options": str(task.spec),
        "data": task.benchmark.data,
        "items": len(rows),
        "pictures": len({row["picture"] for row in rows}),
        **_completeness(task, rows, answers),
        **({"tools": tools} if (tools := task.benchmark.provenance()) else {}),
        **({"judge": judge.identity} if judge else {}),
        "metrics": metrics,
        **({"official": official} if official else {}),
    }


def _completeness(task: Task, rows: Sequence[Mapping[str, Any]], answers: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """How many items of each group were asked and graded; which were left out, answered with nothing, or not decided."""
    graded = {row["id"] for row in rows}
    parts: dict[str, dict[str, int]] = {}
    for item in task.items:
        part = parts.setdefault(item.group, {"asked": 0, "graded": 0})
        part["asked"] += 1
        part["graded"] += item.id in graded
    missing = [item.id for item in task.items if item.id not in graded]
    empty = [item.id for item in task.items if not answers.get((task.name, item.id), "nothing").strip()]
    unread = [row["id"] for row in rows if row.get("verdict") is False]
    is_complete = not missing and not unread
    listed = {"missing": _listed(missing), "empty": _listed(empty), "without_verdict": _listed(unread)}
    return {"complete": is_complete, "parts": parts, **listed}


def _listed(names: Sequence[str]) -> dict[str, Any]:
    return {"count": len(names), "first": list(names[:LISTED])}


def _sums(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Group -> count -> sum over all rows."""
    sums: dict[str, dict[str, float]] = {}
    for row in rows:
        group = sums.setdefault(row["group"], dict.fromkeys(row["counts"], 0))
        for name, count in row["counts"].items():
            group[name] += count
    return sums
