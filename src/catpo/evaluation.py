"""`catpo evaluate`: a model answers a benchmark's items, the answers are graded and summed up. Knows no benchmark by name.

Three files, each made of the one before: answers.jsonl (grows batch by batch, and is gone on with after a kill), grades.jsonl,
scores.json (last, so that it stands for a finished evaluation). Grading alone can be repeated at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from catpo import registry
from catpo.benchmarks._base import Benchmark, Item
from catpo.comparison import resample
from catpo.data import open_data
from catpo.errors import UserError
from catpo.families import _base as families
from catpo.families._base import Family
from catpo.intervals import interval
from catpo.progress import track
from catpo.runs import (
    append_rows,
    check_same,
    lock,
    read_json,
    read_rows,
    repair_rows,
    versions,
    write_atomic,
    write_json,
)
from catpo.spec import Spec, check_options, parse

ABOUT, ANSWERS, GRADES, SCORES = "evaluation.json", "answers.jsonl", "grades.jsonl", "scores.json"
RESAMPLES = 1000


def evaluate(
    *,
    model: str | Path | Family,
    benchmarks: Sequence[str | Spec],
    output: str | Path,
    adapter: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 96,
    shuffled: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask a model everything that the benchmarks ask, greedily, and score its answers.

    Args:
        model: hub id, folder, `builtin`, or a loaded family.
        benchmarks: with their options, e.g. `scenes(count=500)`; each benchmark once.
        output: folder for answers.jsonl, grades.jsonl and scores.json.
        adapter: LoRA adapter put on the model.
        limit: only the first so many pictures of each benchmark.
        batch_size: answers at once, and between two writes.
        max_new_tokens: where a caption is cut; questions are cut sooner.
        shuffled: a control: each question is asked with another picture. A model that looks must fail.
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `cpu`, `cuda`, ...; None takes what there is.
        progress: show it on stderr.

    Returns:
        What scores.json holds: {"benchmarks": {name: {"metrics": {metric: {"value", "low", "high"}}}}, …}.

    Raises:
        UserError: bad model, benchmark or option; the output was begun with others, or another process is writing it.
    """
    tasks = [_Task.open(parse(benchmark), limit, shuffled) for benchmark in benchmarks]
    _check_tasks(tasks, limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens)
    begun: dict[str, Any] = {
        "format": 1,
        "benchmarks": {task.name: str(task.spec) for task in tasks},
        "limit": limit,
        "shuffled": shuffled,
        "decoding": {"temperature": 0.0, "max_new_tokens": max_new_tokens, "batch_size": batch_size},
        "items_hash": _hash_items(tasks),
    }
    with lock(output) as folder:
        _check_begun(folder, begun)
        family = families.load(model, adapter=adapter, device=device, dtype=dtype) if isinstance(model, str | Path) else model
        begun |= {"model": family.model_id, "model_hash": family.model_hash, "adapter": str(adapter) if adapter else None}
        _check_begun(folder, begun)
        if not (folder / ABOUT).exists():
            write_json(folder / ABOUT, {**begun, "versions": versions()})
        _answer(folder, tasks, family, batch_size, max_new_tokens, progress)
        return _grade(folder, tasks)


def grade(output: str | Path) -> dict[str, Any]:
    """Grade and sum up again the answers that an evaluation has, without the model.

    Raises:
        UserError: the folder holds no evaluation, or not all of its answers.
    """
    about = read_json(Path(output) / ABOUT, made_by="catpo evaluate")
    tasks = [_Task.open(parse(spec), about["limit"], about["shuffled"]) for spec in about["benchmarks"].values()]
    with lock(output) as folder:
        return _grade(folder, tasks)


def grade_answers(
    *, answers: str | Path, benchmarks: Sequence[str | Spec], output: str | Path, model: str, limit: int | None = None
) -> dict[str, Any]:
    """Score answers that were made elsewhere.

    Args:
        answers: JSON Lines with "benchmark", "id" and "answer" for every item, in any order.
        benchmarks: as for `evaluate`.
        output: folder for the evaluation.
        model: what the answers' model is called.
        limit: only the first so many pictures of each benchmark.

    Raises:
        UserError: an answer is missing or given twice; names the item.
    """
    tasks = [_Task.open(parse(benchmark), limit, False) for benchmark in benchmarks]
    _check_tasks(tasks, limit=limit)
    begun = {
        "format": 1,
        "benchmarks": {task.name: str(task.spec) for task in tasks},
        "limit": limit,
        "shuffled": False,
        "decoding": {"answers": Path(answers).name},
        "items_hash": _hash_items(tasks),
        "model": model,
        "model_hash": None,
        "adapter": None,
    }
    given = _given_answers(Path(answers))
    rows = []
    for task, item in _each_item(tasks):
        if (task.name, item.id) not in given:
            raise UserError(f"{answers} has no answer to item '{item.id}' of {task.name}. Add it, or lower `limit`.")
        rows.append(_answer_row(task, item, given[task.name, item.id]))
    with lock(output) as folder:
        _check_begun(folder, begun)
        write_json(folder / ABOUT, {**begun, "versions": versions()})
        write_atomic(folder / ANSWERS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return _grade(folder, tasks)


# ---- what is asked --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A benchmark with its items."""

    spec: Spec
    benchmark: Benchmark
    items: list[Item]

    @property
    def name(self) -> str:
        return self.spec.name

    @classmethod
    def open(cls, spec: Spec, limit: int | None, shuffled: bool) -> _Task:
        make = registry.load("benchmarks", spec.name)
        benchmark = make(**check_options(make, spec))
        dataset = open_data(benchmark.data)
        items = benchmark.items(list(dataset.samples()), dataset.vocabulary)
        if not items:
            raise UserError(f"{spec} asks nothing: {benchmark.data} is empty.")
        if limit is not None:
            pictures = set(list(dict.fromkeys(item.picture for item in items))[:limit])
            items = [item for item in items if item.picture in pictures]
        return cls(spec, benchmark, _shuffle_pictures(items, spec) if shuffled else items)


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


def _each_item(tasks: Sequence[_Task]) -> Iterator[tuple[_Task, Item]]:
    for task in tasks:
        for item in task.items:
            yield task, item


def _hash_items(tasks: Sequence[_Task]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for task, item in _each_item(tasks):
        digest.update(f"{task.name}\0{item.id}\0{item.sample.prompt}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _check_tasks(tasks: Sequence[_Task], **counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be 1 or more.")
    names = [task.name for task in tasks]
    if not names:
        raise UserError("no benchmark is given. `catpo list benchmarks` shows them.")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"benchmark '{name}' is given twice. Evaluate its second options into another --output.")


def _check_begun(folder: Path, begun: Mapping[str, Any]) -> None:
    """Refuse to go on with another model or other options than those the folder was begun with."""
    if (folder / ABOUT).exists():
        old = read_json(folder / ABOUT, made_by="catpo evaluate")
        check_same({key: old.get(key) for key in begun}, begun, where=folder)
    elif (folder / ANSWERS).exists():
        raise UserError(f"{folder} holds answers without {ABOUT}, so nobody knows whose they are. Choose another --output.")


# ---- answers --------------------------------------------------------------------------------------------------------------


def _answer(folder: Path, tasks: Sequence[_Task], family: Family, batch_size: int, max_new_tokens: int, progress: bool) -> None:
    """Every batch that is not answered yet. Batches do not depend on what is done, so neither do answers."""
    batches = _batches(tasks, batch_size, max_new_tokens)
    done = _resume(folder / ANSWERS, batches)
    total, before = (sum(len(batch) for _, batch in some) for some in (batches, batches[:done]))
    with track(total, "Answering", "answers", done=before, enabled=progress) as bar:
        for tokens, batch in batches[done:]:
            samples = [item.sample for _, item in batch]
            answers = family.generate(samples, max_new_tokens=tokens, temperature=0.0, batch_size=batch_size)
            append_rows(folder / ANSWERS, [_answer_row(*each, answer) for each, answer in zip(batch, answers, strict=True)])
            bar.advance(len(batch))


def _batches(tasks: Sequence[_Task], batch_size: int, max_new_tokens: int) -> list[tuple[int, list[tuple[_Task, Item]]]]:
    """Longest answer and items of each batch: items in order, those with the same longest answer together."""
    batches = []
    for task in tasks:
        lengths = [min(item.max_new_tokens or max_new_tokens, max_new_tokens) for item in task.items]
        for tokens in dict.fromkeys(lengths):
            alike = [(task, item) for item, length in zip(task.items, lengths, strict=True) if length == tokens]
            batches += [(tokens, alike[start : start + batch_size]) for start in range(0, len(alike), batch_size)]
    return batches


def _answer_row(task: _Task, item: Item, answer: str) -> dict[str, str]:
    return {"benchmark": task.name, "id": item.id, "prompt": item.sample.prompt, "answer": answer}


def _resume(path: Path, batches: Sequence[tuple[int, Sequence[tuple[_Task, Item]]]]) -> int:
    """How many batches are answered; part of one (of a killed process) is dropped."""
    rows = repair_rows(path)
    wanted = [(task.name, item.id) for _, batch in batches for task, item in batch]
    for number, (row, key) in enumerate(zip(rows, wanted, strict=False), start=1):
        if (row.get("benchmark"), row.get("id")) != key:
            raise UserError(
                f"{path}:{number} answers '{row.get('id')}' where '{key[1]}' belongs. Remove the folder and start again."
            )
    if len(rows) > len(wanted):
        raise UserError(f"{path} has {len(rows)} answers to {len(wanted)} items. Remove the folder and start again.")
    done = answered = 0
    while done < len(batches) and answered + len(batches[done][1]) <= len(rows):
        answered += len(batches[done][1])
        done += 1
    if answered < len(rows):
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:answered]))
    return done


def _given_answers(path: Path) -> dict[tuple[str, str], str]:
    if not path.is_file():
        raise UserError(f"{path} does not exist. Give a .jsonl file with benchmark, id and answer.")
    given: dict[tuple[str, str], str] = {}
    for number, row in enumerate(read_rows(path), start=1):
        if not all(isinstance(row.get(field), str) for field in ("benchmark", "id", "answer")):
            raise UserError(f"{path}:{number} needs the texts 'benchmark', 'id' and 'answer'.")
        if (row["benchmark"], row["id"]) in given:
            raise UserError(f"{path}:{number} answers item '{row['id']}' a second time. Remove one of them.")
        given[row["benchmark"], row["id"]] = row["answer"]
    return given


# ---- grades and scores ----------------------------------------------------------------------------------------------------


def _grade(folder: Path, tasks: Sequence[_Task]) -> dict[str, Any]:
    """grades.jsonl, then scores.json."""
    about = read_json(folder / ABOUT, made_by="catpo evaluate")
    answers = {(row["benchmark"], row["id"]): row["answer"] for row in read_rows(folder / ANSWERS)}
    graded = {task.name: [_grade_row(folder, task, item, answers) for item in task.items] for task in tasks}
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for rows in graded.values() for row in rows)
    write_atomic(folder / GRADES, "".join(lines))
    scores = {
        **{key: about.get(key) for key in ("format", "model", "model_hash", "adapter", "limit", "shuffled", "decoding")},
        "versions": about.get("versions"),
        "benchmarks": {task.name: _scores(task, graded[task.name]) for task in tasks},
    }
    write_json(folder / SCORES, scores)
    return scores


def _grade_row(folder: Path, task: _Task, item: Item, answers: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    if (task.name, item.id) not in answers:
        raise UserError(
            f"{folder} has no answer to item '{item.id}' of {task.name}. Give the same `catpo evaluate` command again."
        )
    found = task.benchmark.grade(item, answers[task.name, item.id])
    row = {"benchmark": task.name, "id": item.id, "group": item.group, "picture": item.picture, "counts": dict(found.counts)}
    return row if found.mentions is None else {**row, "mentions": [list(mention) for mention in found.mentions]}


def _scores(task: _Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metrics = {}
    for name, values in resample(task.benchmark.summarise, rows, resamples=RESAMPLES).items():
        numbers = (float(values[0]), *interval(values[1:]))
        metrics[name] = {key: None if math.isnan(x) else x for key, x in zip(("value", "low", "high"), numbers, strict=True)}
    return {
        "options": str(task.spec),
        "data": task.benchmark.data,
        "items": len(rows),
        "pictures": len({row["picture"] for row in rows}),
        "metrics": metrics,
    }
