"""`catpo detect`: which words of answers about pictures are in doubt, by asking the model itself about each. Trains nothing.

Knows nothing of how the result is shown; `catpo.reporting.detections` and the terminal do that.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from catpo.config.command import command
from catpo.config.options import DetectOptions
from catpo.core.conversation import DEFAULT_PROMPT
from catpo.core.errors import UserError
from catpo.core.intervals import auroc_between
from catpo.core.spec import Spec
from catpo.core.types import Picture, Sample
from catpo.data.picture_folder import pictures_in
from catpo.data.read import read_samples
from catpo.files.atomic import check_path
from catpo.files.checksums import checksum
from catpo.files.json_files import append_rows, read_json, repair_rows, write_json, write_rows
from catpo.files.lock import lock
from catpo.files.provenance import check_same, versions
from catpo.models import loading
from catpo.models.family import Family
from catpo.models.remote import PREFIX
from catpo.models.steering import Decoding, open_decoding
from catpo.rewards.word_rewards import Probe
from catpo.runtime.progress import tell_complete, track
from catpo.runtime.sigterm import on_sigterm
from catpo.runtime.skip_log import SkipLog
from catpo.scoring.answer_words import WordJudge
from catpo.scoring.claims import AUTO, BUILTIN, Asker
from catpo.text.object_words import classes

ABOUT, ROWS = "detect.json", "words.jsonl"
OBJECTS, OF_DATA = "objects", "data"
ROW = {"picture": str, "text": str, "words": list[dict]}
"""What every row of words.jsonl has."""
SETTINGS = {"settings": dict, "complete": bool}


@dataclass(frozen=True)
class Detection:
    """A finished detection."""

    path: Path
    """Its folder."""
    rows: Sequence[Mapping[str, Any]]
    """Of words.jsonl: picture, text, and its words with start, end, object, kind, question, logit, grounded, and with a truth
    in_picture."""
    items: Sequence[Item]
    about: Mapping[str, Any]
    """detect.json."""


@dataclass(frozen=True)
class Item:
    """Pictures, what is asked about them, and the answer if it is given."""

    name: str
    """Of its pictures, or of their row."""
    sample: Sample
    text: str | None = None


@command(DetectOptions)
def detect(options: DetectOptions) -> Detection:
    """Find the words of a model's answers, or of given captions, that are likely not true of the picture.

    Every object word is judged by what the model itself says when it is asked for it ("Is there a dog in the image?"), or by a
    probe; `kinds` adds attributes, counts and relations. A killed run resumes when the same command is given again, and writes
    the same file.

    Raises:
        UserError: an option, picture, caption or model cannot be used; the output was begun with other options, or another
            process is writing it.
    """
    _check(options)
    probe = Probe.read(options.probe) if options.probe else None
    steered = open_decoding(options.decoding) if options.decoding else None
    skipped = SkipLog(options.on_error)
    items, vocabulary = _items(options, skipped)
    items = skipped.usable(items, _use, lambda item: item.name)
    if options.truth and not all("present" in item.sample.truth for item in items):
        source = options.data or options.captions
        raise UserError(f"{source} does not list the objects of all its pictures (truth['present']). Leave --truth out.")
    with lock(options.output) as folder:
        family = loading.opened(options)
        judge = WordJudge(family, chosen_asker(options, family, vocabulary), probe, options.batch_size)
        about = _begin(folder, _settings(options, family, items, judge, steered))
        rows = _resume(folder, items, options.batch_size)
        if about["complete"] and len(rows) == len(items):
            tell_complete(folder)
        else:
            skipped.write(folder)
            rows = _judged(folder, items, rows, judge, options, steered)
            about = {**about, **_summary(rows, options), "complete": True}
            write_json(folder / ABOUT, about)
    return Detection(folder, rows, items, about)


def _check(options: DetectOptions) -> None:
    """What can be refused at once."""
    check_path(options.output)
    loading.check_options(options)
    if isinstance(options.model, str) and options.model.startswith(PREFIX):
        raise UserError(f"{options.model}: a server does not tell how sure its model is of yes and no. Name a model to load.")
    if (options.images is None and options.captions is None) == (options.data is None):
        raise UserError("Give pictures, either as --images FOLDER (with --captions, if there are answers) or as --data.")
    if options.truth and options.data is None and options.captions is None:
        raise UserError(
            "--truth compares with the objects that are listed: give --data, e.g. scenes(count=300), or --captions whose rows "
            'have a truth: {"present": ["dog", …]}.'
        )
    if options.captions is not None and options.decoding is not None:
        raise UserError(f"decoding={options.decoding}: the captions are given, nothing is decoded. Leave one of them out.")
    if options.probe is not None and options.kinds != (OBJECTS,):
        raise UserError(f"kinds={', '.join(options.kinds)}: a probe judges objects only. Leave kinds or probe out.")
    if options.question.count("{}") != 1:
        raise UserError(f"question={options.question!r}: write {{}} where the word goes, once.")
    if options.question != DetectOptions.question and OBJECTS not in options.kinds:
        raise UserError(
            f"question={options.question!r} is for objects, of which kinds={', '.join(options.kinds)} asks nothing."
        )
    Asker.of(options.nouns or BUILTIN, options.kinds, {})


def chosen_asker(options: DetectOptions, family: Family, vocabulary: Mapping[str, str] | None) -> Asker:
    """What finds the words: what is named; else the data set's own words, or what knows the model's; says which."""
    wordings = {OBJECTS: options.question} if OBJECTS in options.kinds else {}
    if options.nouns is None and vocabulary:
        asker = Asker.of(OF_DATA, options.kinds, wordings, vocabulary)
    else:
        knows_builtin = options.truth or loading.is_builtin(family)
        asker = Asker.of(options.nouns or (BUILTIN if knows_builtin else AUTO), options.kinds, wordings)
    finder = {BUILTIN: f"the {len(classes())} built-in objects", OF_DATA: "the data set's own"}
    print(f"catpo: words are found with {finder.get(asker.found_by, asker.found_by)}.", file=sys.stderr)
    if options.images is not None and loading.is_builtin(family):
        print(f"catpo: {loading.SCENES_ONLY}", file=sys.stderr)
    return asker


def _items(options: DetectOptions, skipped: SkipLog) -> tuple[list[Item], Mapping[str, str] | None]:
    """What is judged, and the data set's own words, if it has any: surface form -> object."""
    if options.captions is not None:
        return _captioned(options, skipped), None
    if options.data is not None:
        samples, vocabulary = read_samples(options.data, skipped, options.limit)
        if options.prompt is not None:
            samples = [replace(each, prompt=options.prompt) for each in samples]
        names = [", ".join(picture.name for picture in each.images if picture.name) or each.id for each in samples]
        return [Item(name, sample) for name, sample in zip(names, samples, strict=True)], vocabulary
    assert options.images is not None
    pictures, other_count = pictures_in(options.images)
    if other_count:
        print(f"catpo: {other_count:,} files of {options.images} are no pictures by name; left out.", file=sys.stderr)
    prompt = options.prompt or DEFAULT_PROMPT
    return [Item(picture.name, Sample(picture.name, (picture,), prompt)) for picture in pictures[: options.limit]], None


def _captioned(options: DetectOptions, skipped: SkipLog) -> list[Item]:
    """One item per row of a file of captions, which are read as rows of a folder are."""
    assert options.captions is not None
    folder = options.images or options.captions.parent
    columns = {"columns": {"prompt": "caption"}, "ignore": ["prompt"]}
    given = Spec("folder", {"source": str(options.captions), "images": str(folder), **columns})
    prompt, items = options.prompt or DEFAULT_PROMPT, []
    for row in read_samples(given, skipped, options.limit)[0]:
        paths = [picture.path for picture in row.images if picture.path is not None]
        name = ", ".join(path.relative_to(folder.resolve()).as_posix() for path in paths) or f"row {row.id}"
        items.append(Item(name, replace(row, prompt=prompt), row.prompt))
    return items


def _use(item: Item) -> None:
    for picture in item.sample.images:
        picture.open()


def _settings(
    options: DetectOptions, family: Family, items: Sequence[Item], judge: WordJudge, steered: Decoding | None
) -> dict[str, Any]:
    """Everything that changes a number."""
    decoding: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    if steered is not None:
        decoding["steered"] = steered.identity
    asked = [[*map(Picture.digest, item.sample.images), item.sample.asked, item.text] for item in items]
    return {
        "model": family.model_id,
        "model_hash": family.model_hash,
        "precision": family.precision,
        "adapter": str(options.adapter) if options.adapter else None,
        "items": checksum(repr(asked).encode()),
        **judge.provenance(),
        "decoding": decoding,
        "truth": options.truth,
    }


def _begin(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """detect.json, written or compared."""
    path = folder / ABOUT
    if path.is_file():
        about = read_json(path, made_by="catpo detect", fields=SETTINGS)
        check_same(about["settings"], settings, where=folder)
        return about
    if (folder / ROWS).exists():
        raise UserError(f"{folder} holds {ROWS} without {ABOUT}, so its options are unknown. Choose another --output.")
    about = {"format": 2, "settings": dict(settings), "versions": versions(), "complete": False}
    write_json(path, about)
    return about


def _resume(folder: Path, items: Sequence[Item], batch_size: int) -> list[dict[str, Any]]:
    """The rows of whole batches; the rest, of a killed process, is cut off."""
    rows = repair_rows(folder / ROWS, ROW)
    for number, (row, item) in enumerate(zip(rows, items, strict=False), start=1):
        if row["picture"] != item.name:
            raise UserError(f"{folder / ROWS}:{number} is not about '{item.name}', whose turn it is. Remove {folder}.")
    count = len(rows) if len(rows) >= len(items) else len(rows) // batch_size * batch_size
    if count > len(items):
        raise UserError(f"{folder / ROWS} has {count} rows for {len(items)} texts. Remove {folder} and start again.")
    if count < len(rows):
        write_rows(folder / ROWS, rows[:count])
    return rows[:count]


def _judged(
    folder: Path,
    items: Sequence[Item],
    rows: list[dict[str, Any]],
    judge: WordJudge,
    options: DetectOptions,
    steered: Decoding | None,
) -> list[dict[str, Any]]:
    """All rows: those that are there, and those of the items that are left."""
    done, rows = len(rows), list(rows)
    with track(len(items), "Detecting", "texts", done=done, enabled=options.progress) as bar, on_sigterm() as stop:
        for start in range(done, len(items), options.batch_size):
            stop.leave_if_asked(f"{start} of {len(items)} texts are judged in {folder}.")
            batch = items[start : start + options.batch_size]
            new = _rows(batch, judge, options, steered)
            append_rows(folder / ROWS, new)
            rows += new
            bar.advance(len(batch))
    return rows


def _rows(batch: Sequence[Item], judge: WordJudge, options: DetectOptions, steered: Decoding | None) -> list[dict[str, Any]]:
    unanswered = [item.sample for item in batch if item.text is None]
    how: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "batch_size": len(batch), "decoding": steered}
    answers = iter(judge.family.generate(unanswered, **how) if unanswered else [])
    texts = [next(answers) if item.text is None else item.text for item in batch]
    rows = []
    for item, text, words in zip(batch, texts, judge.words([item.sample for item in batch], texts), strict=True):
        found = [dict(vars(word)) for word in words]
        if options.truth:
            for word in (word for word in found if word["kind"] == OBJECTS):
                word["in_picture"] = word["object"] in item.sample.truth["present"]
        rows.append({"picture": item.name, "text": text, "words": found})
    return rows


def _summary(rows: Sequence[Mapping[str, Any]], options: DetectOptions) -> dict[str, Any]:
    """How many words were judged, and with a truth how well."""
    counts = {"texts": len(rows), "words": sum(len(row["words"]) for row in rows)}
    return {"counts": counts, **({"auroc": judged_by_truth(rows)} if options.truth else {})}


def judged_by_truth(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """AUROC of the words' logits for being in the picture, with its 95 % interval over pictures; each object counts once per
    text. Null where all words are in their pictures, or none.
    """
    logits, labels, texts = [], [], []
    for number, row in enumerate(rows):
        once = {word["object"]: word for word in row["words"] if "in_picture" in word and word["logit"] is not None}
        logits += [word["logit"] for word in once.values()]
        labels += [int(word["in_picture"]) for word in once.values()]
        texts += [number] * len(once)
    figures = auroc_between(logits, labels, texts)._asdict()
    known = {name: None if math.isnan(figure) else figure for name, figure in figures.items()}
    return {**known, "in_picture": sum(labels), "not_in_picture": len(labels) - sum(labels)}
