"""`catpo evaluate`: a model answers a benchmark's items, the answers are graded and summed up. Knows no benchmark by name.

Three files, each made of the one before: answers.jsonl (grows batch by batch, and is gone on with after a kill), grades.jsonl,
scores.json (last, so that it stands for a finished evaluation). Grading alone can be repeated at any time (`grade.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.core.spec import Spec
from catpo.core.types import Picture
from catpo.evaluation.benchmarks import Item
from catpo.evaluation.benchmarks._answers import some
from catpo.evaluation.folder import ABOUT, ANSWER, ANSWERS, about, answer_row, check_begun, without_skipped
from catpo.evaluation.grade import grade_answers, open_judges, write_scores
from catpo.evaluation.tasks import Task, each_item, open_tasks
from catpo.files.atomic import write_atomic
from catpo.files.json_files import append_rows, read_json, repair_rows, write_json
from catpo.files.provenance import versions
from catpo.files.strict_json import check_fields, fits
from catpo.models import loading
from catpo.models.family import Family
from catpo.models.likelihood import most_likely
from catpo.models.remote import PREFIX, ServedModel
from catpo.runtime.blocks import Blocks, Rows
from catpo.runtime.progress import track
from catpo.runtime.sigterm import on_sigterm
from catpo.runtime.skip_log import SkipLog
from catpo.runtime.work_group import WorkGroup

SERVER = {"server": {"answered_by": list[str]}}
"""What evaluation.json keeps of a server."""
PART = ".answers-{}.jsonl"
"""What each of several processes has answered: one row per batch."""


def evaluate(
    *,
    benchmarks: Sequence[str | Spec],
    output: str | Path,
    model: str | Path | Family | None = None,
    answers: str | Path | Sequence[str | Path] = (),
    data: str | Path | None = None,
    judge: str | Spec | None = None,
    base_url: str | None = None,
    adapter: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    shuffled: bool = False,
    on_error: str = "stop",
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask a model everything that the benchmarks ask, greedily, and score its answers; or score answers made elsewhere.

    Args:
        benchmarks: with their options, e.g. `scenes(count=500)`; each benchmark once.
        output: folder for answers.jsonl, grades.jsonl and scores.json.
        model: hub id, folder, `builtin`, or a loaded family; `openai:NAME` is a model of a running server; with
            `answers`, what their model is called.
        answers: files with answers made elsewhere, see `catpo.evaluation.grade.grade_answers`; no model is loaded then.
        data: folder with the official files of the benchmarks; `catpo data get NAME` shows which.
        judge: who grades what needs a judge, e.g. `openai(model='gpt-4-0314')`.
        base_url: address of that server up to `/v1`; OPENAI_BASE_URL or OpenAI's own if None.
        adapter: LoRA adapter put on the model.
        limit: only the first so many pictures of each benchmark.
        batch_size: answers at once, and between two writes.
        max_new_tokens: where an answer is cut, yes/no answers sooner; each benchmark's own if None: 96, or what papers have.
        on_error: `skip` leaves out items whose picture cannot be used, and says in `scores.json` which.
        trust_remote_code: run Python code that the checkpoint brings along.
        shuffled: a control: each question is asked with another picture. A model that looks must fail.
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `cpu`, `cuda`, ...; None takes what there is.
        progress: show it on stderr.

    Returns:
        What scores.json holds: {"benchmarks": {name: {"metrics": {metric: {"value", "low", "high"}}}}, …}.

    Raises:
        UserError: bad model, benchmark or option; files or pictures are missing; the output was begun with others, or another
            process is writing it.
    """
    if answers:
        return grade_answers(
            answers=answers,
            benchmarks=benchmarks,
            output=output,
            model=str(model) if model is not None else None,
            data=data,
            judge=judge,
            limit=limit,
            progress=progress,
        )
    if model is None:
        raise UserError("nothing to evaluate: name a model with --model, or answers made elsewhere with --answers.")
    numbers = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    skipped = SkipLog(on_error)
    tasks = open_tasks(
        benchmarks, data=data, limit=limit, is_shuffled=shuffled, is_answered_here=True, skipped=skipped, **numbers
    )
    decoding = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    begun = about(tasks, data=data, judge=judge, limit=limit, shuffled=shuffled, decoding=decoding)
    served = _served(model, base_url, adapter=adapter, device=device, dtype=dtype if dtype != "auto" else None)
    if not skipped.goes_on:
        _check_pictures(tasks)
    if judge is not None:
        open_judges(tasks, judge)  # a mistake in it is told before hours of answering, not after
    group = WorkGroup()
    if served and group.count > 1:
        raise UserError(f"{model} is asked by one process: its server takes many questions at once. Start catpo by itself.")
    with group.lock(output) as folder:
        if group.is_main:
            check_begun(folder, begun)
        family = served or (
            loading.load(model, adapter=adapter, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            if isinstance(model, str | Path)
            else model
        )
        if group.is_main:
            begun |= {"model": family.model_id, "model_hash": family.model_hash, "adapter": str(adapter) if adapter else None}
            check_begun(folder, begun)
            if not (folder / ABOUT).exists():
                unusable = _unusable(tasks, skipped) if skipped.goes_on else {}
                skipped.write(folder)
                write_json(folder / ABOUT, {**begun, "versions": versions(), **unusable})
        group.barrier("begun")
        _answer(folder, without_skipped(tasks, folder), family, batch_size, max_new_tokens, progress and group.is_main, group)
        if served:
            _note_server(folder, served)
        scores = group.broadcast("scores", lambda: write_scores(folder, tasks, judge, progress))
    group.leave()
    return scores


def _served(model: str | Path | Family, base_url: str | None, **loading: Any) -> ServedModel | None:
    """The model of a server, if `model` is one; `loading` is what only a model loaded here can do."""
    if not (isinstance(model, str) and model.startswith(PREFIX)):
        if base_url:
            raise UserError(f"base_url is for a model of a server. Name it so: --model {PREFIX}NAME.")
        return None
    for name, value in loading.items():
        if value:
            raise UserError(f"{name}={value} cannot be set from here: {model} is loaded by its server. Leave {name} out.")
    return ServedModel(model, base_url=base_url)


def _note_server(folder: Path, served: ServedModel) -> None:
    """Where the answers came from, and what the server called the model."""
    noted = {"server": {"answered_by": []}, **read_json(folder / ABOUT, made_by="catpo evaluate")}
    check_fields(noted, SERVER, place=str(folder / ABOUT), remedy=f"Remove {folder} and start again.")
    names = served.answered_by | set(noted["server"]["answered_by"])
    write_json(folder / ABOUT, {**noted, "server": {"url": served.server.url, "answered_by": sorted(names)}})


def _unusable(tasks: Sequence[Task], skipped: SkipLog) -> dict[str, Any]:
    """Which items' pictures cannot be opened, as `evaluation.json` keeps it."""
    opened: dict[int, UserError | None] = {}  # many questions are about one picture

    def use(found: tuple[Task, Item]) -> None:
        for picture in found[1].sample.images:
            if id(picture) not in opened:
                opened[id(picture)] = _error_of(picture)
            if error := opened[id(picture)]:
                raise error

    skipped.usable(each_item(tasks), use, lambda found: f"{found[0].name}/{found[1].id}")
    return {"skipped": {row["what"]: row["why"] for row in skipped.rows}}


def _error_of(picture: Picture) -> UserError | None:
    try:
        picture.open()
    except UserError as error:
        return error
    return None


def _check_pictures(tasks: Sequence[Task]) -> None:
    """Refuse to start where a picture is not in the folder; nothing is left out in silence."""
    for task in tasks:
        paths = dict.fromkeys(picture.path for item in task.items for picture in item.sample.images if picture.path)
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise UserError(
                f"{task.name}: {len(missing):,} of {len(paths):,} pictures are missing: {some(missing)}. "
                f"`catpo data get {task.name}` shows where to get them."
            )


# ---- answers --------------------------------------------------------------------------------------------------------------


def _answer(
    folder: Path,
    tasks: Sequence[Task],
    family: Family | ServedModel,
    batch_size: int,
    max_new_tokens: int | None,
    progress: bool,
    group: WorkGroup,
) -> None:
    """Every batch that is not answered yet. Batches do not depend on what is done nor by whom, so neither do answers."""
    batches = _batches(tasks, batch_size, max_new_tokens)

    def belongs(number: int, rows: Rows) -> bool:
        asked = [(task.name, item.id) for task, item in batches[number][1]]
        return all(fits(row, ANSWER) for row in rows) and [(row["benchmark"], row["id"]) for row in rows] == asked

    blocks = Blocks(group, folder, PART, lambda: _resume(folder / ANSWERS, batches), len(batches), belongs)
    total, left = (sum(len(batches[number][1]) for number in numbers) for numbers in (range(len(batches)), blocks.todo))
    with track(total, "Answering", "answers", done=total - left, enabled=progress) as bar, on_sigterm() as stop:

        def answered(number: int) -> Rows:
            stop.leave_if_asked(f"{bar.count} of {total} answers are in {folder}.")
            tokens, batch = batches[number]
            answers = _asked(family, [item for _, item in batch], tokens)
            bar.advance(total - left + group.add("answered", len(batch)) - bar.count)
            return [answer_row(*each, answer) for each, answer in zip(batch, answers, strict=True)]

        blocks.run(answered, lambda _, rows: append_rows(folder / ANSWERS, rows))


def _asked(family: Family | ServedModel, items: Sequence[Item], max_new_tokens: int) -> list[str]:
    """Answers to one batch: written, or chosen where there are options."""
    samples = [item.sample for item in items]
    options = [item.options for item in items if item.options is not None]
    if not options:
        return family.generate(samples, max_new_tokens=max_new_tokens, temperature=0.0, batch_size=len(items))
    if isinstance(family, ServedModel):
        raise UserError(
            "A server does not tell how likely it finds given answers. Choose a protocol in which the model writes."
        )
    return most_likely(family, samples, options)


def _batches(tasks: Sequence[Task], batch_size: int, max_new_tokens: int | None) -> list[tuple[int, list[tuple[Task, Item]]]]:
    """Longest answer and items of each batch: items in order, those with the same longest answer together."""
    batches = []
    for task in tasks:
        longest = max_new_tokens or task.benchmark.max_new_tokens
        lengths = [min(item.max_new_tokens or longest, longest) for item in task.items]
        for tokens in dict.fromkeys(lengths):
            alike = [(task, item) for item, length in zip(task.items, lengths, strict=True) if length == tokens]
            batches += [(tokens, alike[start : start + batch_size]) for start in range(0, len(alike), batch_size)]
    return batches


def _resume(path: Path, batches: Sequence[tuple[int, Sequence[tuple[Task, Item]]]]) -> int:
    """How many batches are answered; part of one (of a killed process) is dropped."""
    rows = repair_rows(path, ANSWER)
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
