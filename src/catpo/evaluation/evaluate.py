"""`catpo evaluate`: a model answers a benchmark's items, the answers are graded and summed up. Knows no benchmark by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from catpo.config.command import command
from catpo.config.options import EvaluateOptions
from catpo.core.errors import UserError
from catpo.evaluation.benchmarks import Item, some
from catpo.evaluation.folder import EvaluationFolder, answers_items
from catpo.evaluation.grade import grade_answers, open_judges, write_scores
from catpo.evaluation.tasks import Task, answer_row, each_item, manifest_of, open_tasks, picture_files, without_skipped
from catpo.models import loading, reading
from catpo.models.family import Family
from catpo.models.likelihood import most_likely
from catpo.models.remote import PREFIX, ServedModel
from catpo.models.steering import Decoding, open_decoding
from catpo.runtime.blocks import Blocks, Rows
from catpo.runtime.progress import tell_complete, track
from catpo.runtime.sigterm import on_sigterm
from catpo.runtime.skip_log import SkipLog
from catpo.runtime.work_group import WorkGroup

PART = ".answers-{}.jsonl"
"""What each of several processes has answered: one row per batch."""
SHORT = 32
"""Tokens of a short answer: yes or no, a letter."""
TOGETHER = 2
"""Short answers about one picture that take the room of one in a batch."""


@dataclass(frozen=True)
class Asking:
    """An evaluation before its first answer: options checked, benchmarks opened."""

    options: EvaluateOptions
    tasks: list[Task]
    manifest: dict[str, Any]
    server: ServedModel | None
    steered: Decoding | None
    skip_log: SkipLog


def prepare(options: EvaluateOptions) -> Asking:
    """Everything that can be refused before a model is loaded.

    Raises:
        UserError: bad benchmark, option or judge; files or pictures are missing.
    """
    if options.model is None:
        raise UserError("nothing to evaluate: name a model with --model, or answers made elsewhere with --answers.")
    skip_log = SkipLog(options.on_error)
    tasks = open_tasks(
        options.benchmarks,
        data=options.data,
        limit=options.limit,
        is_shuffled=options.shuffled,
        is_answered_here=True,
        skipped=skip_log,
    )
    decoding: dict[str, Any] = {
        "temperature": 0.0,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
    }
    server = _server(options)
    steered = _steered(options, tasks)
    if steered is not None:
        decoding["steered"] = steered.identity
    if server is None:
        loading.check_options(options)
    if not skip_log.goes_on:
        _check_pictures(tasks)
    if options.judge is not None:
        open_judges(tasks, options.judge)  # a mistake in it is reported before hours of answering, not after
    return Asking(options, tasks, manifest_of(tasks, options, decoding), server, steered, skip_log)


@command(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Answer every item of the benchmarks greedily with a model, and score the answers; or score answers made elsewhere.

    Returns:
        What scores.json holds: {"benchmarks": {name: {"metrics": {metric: {"value", "low", "high"}}}}, …}.

    Raises:
        UserError: bad model, benchmark or option; files or pictures are missing; the output was created with other options,
            or another process is writing it.
    """
    if options.answers:
        return grade_answers(**vars(options))
    asking, group = prepare(options), WorkGroup()
    if asking.server and group.count > 1:
        raise UserError(
            f"{options.model} is asked by one process: its server takes many questions at once. Run catpo without a launcher."
        )
    folder = EvaluationFolder(options.output)
    with group.lock(options.output):
        if group.is_main:
            folder.check_same(asking.manifest)
        model = asking.server or loading.opened(options)
        if group.is_main:
            _begin(folder, asking, model)
        group.barrier("begun")
        tasks = without_skipped(asking.tasks, folder.read_manifest().get("skipped") or {})
        _answer(folder, tasks, model, asking, group)
        if asking.server:
            folder.note_server(asking.server.server.url, asking.server.answered_by)
        scores = group.broadcast("scores", lambda: write_scores(folder, asking.tasks, options.judge, options.progress))
    group.leave()
    return scores


def _begin(folder: EvaluationFolder, asking: Asking, model: Family | ServedModel) -> None:
    """Write evaluation.json, or check that it is of the same model and options."""
    adapter = asking.options.adapter
    of_model = {"model": model.model_id, "precision": model.precision, "model_hash": model.model_hash}
    manifest = {**asking.manifest, **of_model, "adapter": str(adapter) if adapter else None}
    folder.check_same(manifest)
    if folder.manifest.exists():
        return
    more: dict[str, Any] = {"skipped": _unusable(asking.tasks, asking.skip_log)} if asking.skip_log.goes_on else {}
    asking.skip_log.write(folder.path)
    if isinstance(model, Family):
        more |= {"generation_config": changed} if (changed := model.changed_by_config(is_sampled=False)) else {}
        more |= {"unknown_pictures": unknown} if (unknown := _beyond_scenes(model, asking.tasks)) else {}
    folder.write_manifest(manifest, **more)


def _beyond_scenes(model: Family, tasks: Sequence[Task]) -> list[str]:
    """Benchmarks whose pictures mean nothing to the model: any but the built-in scenes, if it is or was the built-in one."""
    others = [task.name for task in tasks if not (task.benchmark.data or task.name).startswith("scenes")]
    return others if others and loading.is_builtin(model) else []


def _server(options: EvaluateOptions) -> ServedModel | None:
    """The model of a server, if `model` names one."""
    model = options.model
    if not (isinstance(model, str) and model.startswith(PREFIX)):
        if options.base_url:
            raise UserError(f"base_url is for a model of a server. Name it so: --model {PREFIX}NAME.")
        return None
    of_loading = {name: getattr(options, name) for name in ("adapter", "device", "revision", "min_pixels", "max_pixels")}
    of_loading["dtype"] = options.dtype.replace("auto", "")
    for name, value in of_loading.items():
        if value:
            raise UserError(f"{name}={value} cannot be set from here: {model} is loaded by its server. Leave {name} out.")
    return ServedModel(model, base_url=options.base_url)


def _steered(options: EvaluateOptions, tasks: Sequence[Task]) -> Decoding | None:
    """How answers are decoded, if not plainly."""
    if options.decoding is None:
        return None
    if str(options.model).startswith(PREFIX):
        raise UserError(f"decoding={options.decoding}: {options.model} is decoded by its server. Leave decoding out.")
    for task, item in each_item(tasks):
        if item.options is not None:
            raise UserError(
                f"decoding={options.decoding}: {task.name} has the model choose among given answers, which are not decoded. "
                "Leave the benchmark out, or choose a protocol in which the model writes."
            )
    return open_decoding(options.decoding)


def _unusable(tasks: Sequence[Task], skipped: SkipLog) -> dict[str, str]:
    """Item -> why its picture cannot be opened."""
    opened: dict[int, UserError | None] = {}  # many questions are about one picture

    def use(asked: tuple[Task, Item]) -> None:
        for picture in asked[1].sample.images:
            if id(picture) not in opened:
                opened[id(picture)] = None
                try:
                    picture.open()
                except UserError as error:
                    opened[id(picture)] = error
            problem = opened[id(picture)]
            if problem:
                raise problem

    skipped.usable(each_item(tasks), use, lambda asked: f"{asked[0].name}/{asked[1].id}")
    return {row["what"]: row["why"] for row in skipped.rows}


def _check_pictures(tasks: Sequence[Task]) -> None:
    """Refuse to start where a picture is missing; nothing is skipped silently."""
    for task in tasks:
        paths, missing = picture_files(task.items)
        if missing:
            names = some([str(path) for path in missing])
            raise UserError(
                f"{task.name}: {len(missing):,} of {len(paths):,} pictures are missing: {names}. "
                f"`catpo data get {task.name}` shows where to get them."
            )


def _answer(
    folder: EvaluationFolder,
    tasks: Sequence[Task],
    model: Family | ServedModel,
    asking: Asking,
    group: WorkGroup,
) -> None:
    """Answer every open batch. Batches depend neither on what is done nor on who does it, so neither do answers."""
    options = asking.options
    shares = isinstance(model, Family) and reading.can_share(model)
    batches = _batches(tasks, options.batch_size, options.max_new_tokens, per_place=TOGETHER if shares else 1)
    keys = [[(task.name, item.id) for task, item in batch] for _, batch in batches]
    blocks = Blocks(
        group,
        folder.path,
        PART,
        lambda: folder.resume_answers(keys),
        len(batches),
        lambda number, rows: answers_items(rows, keys[number]),
    )
    total = sum(len(batch) for batch in keys)
    done = total - sum(len(keys[number]) for number in blocks.todo)
    shows_progress = options.progress and group.is_main
    if done == total and group.is_main and folder.scores.exists():
        tell_complete(folder.path, "Its answers are graded again.")
    with track(total, "Answering", "answers", done=done, enabled=shows_progress) as bar, on_sigterm() as stop:

        def answered(number: int) -> Rows:
            stop.leave_if_asked(f"{bar.count} of {total} answers are in {folder.path}.")
            tokens, batch = batches[number]
            answers = _asked(model, [item for _, item in batch], tokens, asking.steered)
            bar.advance(done + group.add("answered", len(batch)) - bar.count)
            return [answer_row(task, item, answer) for (task, item), answer in zip(batch, answers, strict=True)]

        blocks.run(answered, lambda _, rows: folder.append_answers(rows))


def _asked(
    family: Family | ServedModel, items: Sequence[Item], max_new_tokens: int, steered: Decoding | None = None
) -> list[str]:
    """Answers to one batch: written, or chosen where there are options."""
    samples = [item.sample for item in items]
    options = [item.options for item in items if item.options is not None]
    if not options:
        if isinstance(family, ServedModel):
            return family.generate(samples, max_new_tokens=max_new_tokens, temperature=0.0, batch_size=len(items))
        return family.generate(samples, max_new_tokens=max_new_tokens, batch_size=len(items), decoding=steered)
    if isinstance(family, ServedModel):
        raise UserError(
            "A server does not tell how likely it finds given answers. Choose a protocol in which the model writes."
        )
    return most_likely(family, samples, options)


def _batches(
    tasks: Sequence[Task], batch_size: int, max_new_tokens: int | None, *, per_place: int = 1
) -> list[tuple[int, list[tuple[Task, Item]]]]:
    """Longest answer and items of each batch: those with the same longest answer and about the same pictures together.

    So many short answers about one picture as `per_place` says count as one: it is read once, and is most of what they need.
    More tokens than the benchmark's own limit are for a model that thinks before it answers: then questions get them, too.
    """
    batches = []
    for task in tasks:
        longest = max_new_tokens or task.benchmark.max_new_tokens
        thinks = longest > task.benchmark.max_new_tokens
        lengths = [longest if thinks else min(item.max_new_tokens or longest, longest) for item in task.items]
        for tokens in dict.fromkeys(lengths):
            alike = [(task, item) for item, length in zip(task.items, lengths, strict=True) if length == tokens]
            is_short = tokens <= SHORT and all(item.options is None for _, item in alike)
            samples = [item.sample for _, item in alike]
            for groups in reading.batches(samples, batch_size, per_place=per_place if is_short else 1):
                batches.append((tokens, [alike[number] for number in chain.from_iterable(groups)]))
    return batches
