"""Grades and scores of answers, whether a model just gave them or they were made elsewhere. Needs no model and no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from catpo.config.command import command
from catpo.config.options import EvaluateOptions
from catpo.core.errors import UserError
from catpo.core.spec import Spec, parse
from catpo.evaluation.benchmarks import Grade, Item, Record, check_repeated, read_records, some
from catpo.evaluation.bootstrap import estimate, resample
from catpo.evaluation.folder import EvaluationFolder
from catpo.evaluation.tasks import (
    Task,
    answer_row,
    each_item,
    manifest_of,
    open_tasks,
    waits_for_answers,
    with_answered,
    without_skipped,
)
from catpo.files.lock import lock
from catpo.files.records import as_id
from catpo.judges import Judge, open_judge
from catpo.runtime.progress import track
from catpo.runtime.skip_log import SkipLog
from catpo.text.thoughts import without_thoughts

KEPT = ("format", "model", "model_hash", "adapter", "limit", "shuffled", "decoding", "data_hashes", "versions")
"""Fields of evaluation.json that scores.json repeats."""
KEPT_IF_THERE = ("server", "generation_config", "unknown_pictures")
RESAMPLES = 1000
LISTED = 100
"""Ids listed in scores.json of answers that are missing or empty."""
QUOTED = 300
"""Characters of a judge's reply that cannot be read."""


def grade(output: str | Path, *, judge: str | Spec | None = None, progress: bool = True) -> dict[str, Any]:
    """Grade and sum up again the answers that an evaluation has, without the model.

    Args:
        output: folder of the evaluation.
        judge: replaces the one that the evaluation was started with.
        progress: show it on stderr.

    Raises:
        UserError: the folder holds no evaluation, or not all of its answers.
    """
    folder = EvaluationFolder(output)
    manifest = folder.read_manifest()
    tasks = open_tasks(
        list(manifest["benchmarks"].values()),
        data=manifest.get("data"),
        limit=manifest["limit"],
        is_shuffled=manifest["shuffled"],
        is_answered_here="temperature" in manifest["decoding"],
        skipped=SkipLog("skip" if "skipped" in manifest else "stop"),
    )
    with lock(output):
        answered: dict[str, list[str]] = {task.name: [] for task in tasks}
        for row in folder.read_answers():
            answered.setdefault(row["benchmark"], []).append(row["id"])
        tasks = [with_answered(task, answered[task.name]) for task in tasks]
        return write_scores(folder, tasks, judge if judge is not None else manifest.get("judge"), progress)


@command(EvaluateOptions)
def grade_answers(options: EvaluateOptions) -> dict[str, Any]:
    """Score answers that were made elsewhere; options that concern a model to be loaded are not used.

    `answers` are files in the usual format of the one benchmark given, or JSON Lines with "benchmark", "id" and "answer", in
    any order, as `catpo evaluate` writes them. `model` is what their model is called; the file's name if None.

    Raises:
        UserError: an answer is missing (where the benchmark cannot do without), given twice, or for no item; names the items.
    """
    files = options.answers
    if options.decoding is not None:
        raise UserError(f"decoding={options.decoding}: the answers of {files[0]} are written already. Leave decoding out.")
    if options.judge is not None:
        parse(options.judge)
    whole = open_tasks(options.benchmarks, data=options.data)
    given = _given_answers(files, whole)
    tasks = [with_answered(task, given[task.name], options.limit) for task in whole]
    _check_given(files, tasks, given)
    folder = EvaluationFolder(options.output)
    model = options.model or re.sub(r"\.jsonl?(\.gz)?$", "", files[0].name)
    manifest = manifest_of(tasks, replace(options, shuffled=False), {"answers": _names(files)})
    manifest |= {"model": model, "model_hash": None, "adapter": None}
    with lock(options.output):
        folder.check_same(manifest)
        folder.write_manifest(manifest)
        rows = []
        for task, item in each_item(tasks):
            if item.id in given[task.name]:
                rows.append(answer_row(task, item, given[task.name][item.id]))
        folder.write_answers(rows)
        return write_scores(folder, tasks, options.judge, options.progress)


def _given_answers(files: Sequence[Path], tasks: Sequence[Task]) -> dict[str, dict[str, str]]:
    """Benchmark -> item id -> answer."""
    if not files:
        raise UserError("no file with answers is given: `--answers FILE`.")
    records = [record for file in files for record in read_records(file)]
    if all("benchmark" in record.row for record in records):
        return _our_answers(records, tasks)
    if len(tasks) == 1:
        return {tasks[0].name: tasks[0].benchmark.match(records, tasks[0].items)}
    raise UserError(
        f"{_names(files)} does not say which of {', '.join(task.name for task in tasks)} it answers. Grade one benchmark "
        "at a time, or write rows with benchmark, id and answer."
    )


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
    wanted = {(task.name, item.id): item for task, item in each_item(tasks)}
    opened = {task.name for task in tasks if waits_for_answers(task.benchmark)}
    given: dict[str, dict[str, str]] = {task.name: {} for task in tasks}
    double = []
    for record in records:
        name, key, answer = record.row.get("benchmark"), as_id(record.row.get("id")), record.row.get("answer")
        if not (isinstance(name, str) and key is not None and isinstance(answer, str)):
            raise UserError(f"{record.place} needs the texts 'benchmark', 'id' and 'answer'.")
        if (name, key) in wanted:
            check_repeated(record, wanted[name, key])
        if (name, key) in wanted or name in opened:
            if key in given[name]:
                double.append(f"{record.place} answers item '{key}'")
            given[name][key] = answer
    if double:
        raise UserError(f"{some(double)} a second time. Remove one of each.")
    return given


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)


def write_scores(folder: EvaluationFolder, tasks: Sequence[Task], judge: str | Spec | None, progress: bool) -> dict[str, Any]:
    """grades.jsonl, then scores.json, from answers.jsonl.

    Raises:
        UserError: an answer is missing, or a benchmark needs a judge and none is named.
    """
    manifest = folder.read_manifest()
    answers = {(row["benchmark"], row["id"]): row["answer"] for row in folder.read_answers()}
    judges = open_judges(tasks, judge)
    skipped = manifest.get("skipped") or {}
    graded = {}
    for task in without_skipped(tasks, skipped):
        graded[task.name] = _grade_task(folder, task, answers, judges.get(task.name), progress)
    folder.write_grades(row for rows in graded.values() for row in rows)
    scores = {key: manifest.get(key) for key in KEPT}
    scores |= {key: manifest[key] for key in KEPT_IF_THERE if key in manifest}
    if "skipped" in manifest:
        scores["skipped"] = _skipped(skipped, tasks)
    scores["benchmarks"] = {task.name: _scores(task, graded[task.name], answers, judges.get(task.name)) for task in tasks}
    folder.write_scores(scores)
    return scores


def _skipped(left_out: Mapping[str, str], tasks: Sequence[Task]) -> dict[str, Any]:
    """How many items were skipped, and the first of them; evaluation.json lists all."""
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
    opened = open_judge(spec)
    return {task.name: opened.decoding_as(task.benchmark.judge_decoding) for task in needing}


def _grade_task(
    folder: EvaluationFolder, task: Task, answers: Mapping[tuple[str, str], str], judge: Judge | None, progress: bool
) -> list[dict[str, Any]]:
    """A row per item that has an answer."""
    missing = [item.id for item in task.items if (task.name, item.id) not in answers]
    if missing and not task.benchmark.is_gradable_in_part:
        raise UserError(
            f"{folder.path} has no answer to item '{some(missing)}' of {task.name}. Run the same `catpo evaluate` command "
            "again."
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
        # where one fails, map asks nothing more
        for row in pool.map(lambda item: grade_row(task, item, answers[task.name, item.id], judge), items):
            rows.append(row)
            bar.advance()
        return rows


def grade_row(task: Task, item: Item, answer: str, judge: Judge | None = None) -> dict[str, Any]:
    """A row of grades.jsonl, of the answer without a model's thoughts; `judge` for benchmarks that need one."""
    judges = [judge] if task.benchmark.needs_judge else []
    said, thought = without_thoughts(answer)
    graded: Grade = task.benchmark.grade(item, said, *judges)
    row: dict[str, Any] = {"benchmark": task.name, "id": item.id, "group": item.group, "picture": item.picture}
    if thought:
        row["thought"] = thought
    row["counts"] = dict(graded.counts)
    if graded.mentions is not None:
        row["mentions"] = [list(mention) for mention in graded.mentions]
    if graded.is_right is not None:
        row["right"] = graded.is_right
    if not graded.has_verdict:
        row["verdict"] = False
    if graded.notes:
        row["notes"] = dict(graded.notes)
    return row


def _scores(
    task: Task, rows: Sequence[Mapping[str, Any]], answers: Mapping[tuple[str, str], str], judge: Judge | None
) -> dict[str, Any]:
    metrics = {}
    for name, values in resample(task.benchmark.summarise, rows, resamples=RESAMPLES).items():
        metrics[name] = {key: _or_none(figure) for key, figure in estimate(values)._asdict().items()}
    scores = {"options": str(task.spec), "data": task.benchmark.data, "items": len(rows)}
    scores |= {"pictures": len({row["picture"] for row in rows}), **_completeness(task, rows, answers)}
    tools, official = task.benchmark.provenance(), task.benchmark.official(_sums(rows))
    if tools:
        scores["tools"] = tools
    if judge:
        scores["judge"] = judge.identity
    scores["metrics"] = metrics
    if official:
        scores["official"] = official
    return scores


def _or_none(figure: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(figure) else figure


def _completeness(task: Task, rows: Sequence[Mapping[str, Any]], answers: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """How many items of each group were asked and graded; which are missing, answered with nothing, or without a verdict.

    If answers had thoughts in them, also which: they were taken out, and of a thought that did not end nothing is left.
    """
    graded = {row["id"] for row in rows}
    parts: dict[str, dict[str, int]] = {}
    for item in task.items:
        part = parts.setdefault(item.group, {"asked": 0, "graded": 0})
        part["asked"] += 1
        part["graded"] += item.id in graded
    missing = [item.id for item in task.items if item.id not in graded]
    empty = [item.id for item in task.items if not answers.get((task.name, item.id), "nothing").strip()]
    unread = [row for row in rows if row.get("verdict") is False]
    is_complete = not missing and not unread
    listed = {"missing": _listed(missing), "empty": _listed(empty), "without_verdict": _listed([row["id"] for row in unread])}
    if unread:
        reply = str(unread[0].get("notes", {}).get("reply", ""))
        listed["without_verdict"] |= {"reply": reply[:QUOTED], "form": task.benchmark.judge_form}
    thoughts = {name: [row["id"] for row in rows if row.get("thought") == name] for name in ("removed", "unfinished")}
    listed |= {f"thoughts_{name}": _listed(ids) for name, ids in thoughts.items() if any(thoughts.values())}
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
