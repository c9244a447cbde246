"""Answers made elsewhere: files in the usual formats, matched to items by id or by order. Knows no benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catpo.core.errors import UserError
from catpo.files.records import Record, as_id, decode, parse_records, read_bytes

if TYPE_CHECKING:
    from catpo.evaluation.benchmarks._base import Item

ANSWER_FIELDS = ("answer", "response", "text", "caption", "prediction", "output")
"""What files call the answer, in the order looked for."""
ID_FIELDS = ("id", "question_id", "image_id")
QUESTION_FIELDS = ("question", "prompt", "query")
PICTURE_FIELDS = ("image", "image_file", "image_path", "file_name")
TRUTH_FIELDS = ("label", "gt_answer")
ONLY_ANSWERS = ("prediction", "model_answer")
"""What no file calls the right answer."""
LONGEST_NAME = 255
"""Characters; what is longer is the picture itself."""
MAX_BYTES = 200_000_000
"""Of a file of answers; the largest official one has a few million."""
SHOWN = 10
"""Ids named in a message."""


def read_records(path: Path) -> list[Record]:
    """The rows of a file of answers: a JSON list or JSON Lines, plain or packed with gzip.

    Raises:
        UserError: there is no such file, it is empty, not UTF-8, or a row is not a JSON object.
    """
    problem = "does not exist"
    if path.is_file():
        records = parse_records(decode(read_bytes(path, most=MAX_BYTES), path), str(path))
        if records:
            return records
        problem = "has no answers in it"
    raise UserError(f"{path} {problem}. Give a file with answers: `--answers FILE`.")


def text_of(record: Record, fields: Sequence[str] = ANSWER_FIELDS, *, question: str = "") -> str:
    """The answer in a row.

    Args:
        record: the row.
        fields: what the answer may be called, in the order looked for.
        question: what was asked; a field that repeats it is no answer.

    Raises:
        UserError: the row has none of the fields, it is not text, or another may hold the model's answer as well.
    """
    name, value = _first(record, fields, "has no answer")
    if not isinstance(value, str):
        raise UserError(f"{record.place}: '{name}' must be a text, not {value!r}.")
    for other in fields if name not in ONLY_ANSWERS else ():
        text = record.row.get(other)
        if isinstance(text, str) and text.strip() not in ("", value.strip()) and not _repeats(text, question):
            raise UserError(
                f"{record.place} has two answers: '{name}' is {value[:80]!r}, '{other}' is {text[:80]!r}. Leave the model's in "
                "every row, and remove the other field."
            )
    return value


def id_of(record: Record, fields: Sequence[str] = ID_FIELDS) -> str:
    """The id in a row, as text; 13557.0 is 13557.

    Raises:
        UserError: the row has none of the fields, or it is neither a whole number nor text.
    """
    name, value = _first(record, fields, "does not say what it answers")
    found = as_id(value)
    if found is None:
        raise UserError(f"{record.place}: '{name}' must be a whole number or a text, not {value!r}.")
    return found


def _first(record: Record, fields: Sequence[str], problem: str) -> tuple[str, Any]:
    """Name and value of the first field that the row has."""
    for name in fields:
        if name in record.row:
            return name, record.row[name]
    raise UserError(f"{record.place} {problem}: it needs one of the fields {', '.join(fields)}.")


def check_repeated(record: Record, item: Item, *, asks_freely: bool = False) -> None:
    """Refuse a row that repeats another question, picture or right answer than those of the item that it answers.

    Args:
        record: the row.
        item: what its id, or its place in the file, stands for.
        asks_freely: the model may have been asked in any words.

    Raises:
        UserError: names file, row and field.
    """
    known = {} if asks_freely else dict.fromkeys(QUESTION_FIELDS, question_of(item))
    known |= dict.fromkeys(PICTURE_FIELDS, item.picture) | dict.fromkeys(TRUTH_FIELDS, item.expected)
    for field, right in known.items():
        value = record.row.get(field)
        if not isinstance(value, str) or not right:
            continue
        if field not in PICTURE_FIELDS:
            is_same = _repeats(value, right)
        else:
            names = {_picture_name(name) for name in (right, *(picture.name for picture in item.sample.images))}
            is_same = len(value) > LONGEST_NAME or _picture_name(value) in names
        if not is_same:
            raise UserError(
                f"{record.place}: '{field}' is {value[:200]!r}, where that of item {item.id} is {right!r}. Give each answer "
                "the id or the place of its own question, and take the benchmark's files that it was made with; or remove the "
                f"field '{field}' from all rows, if it means something else."
            )


def question_of(item: Item) -> str:
    """What an item asks, without an instruction that only some add."""
    return str(item.sample.truth.get("question", item.sample.prompt))


def _repeats(text: str, question: str) -> bool:
    """Whether a text has the words of a question in it: a prompt may add an image token before it, and an instruction after."""
    return bool(question) and f" {_words(question)} " in f" {_words(text)} "


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _picture_name(file: str) -> str:
    """A picture's name without folder, ending, and COCO's prefix and zeros."""
    name = re.split(r"[/\\]", file)[-1]
    return re.sub(r"^(COCO_(train|val)2014_)?0*(?=.)|\.(jpe?g|png|webp)$", "", name)


def by_id(
    records: Sequence[Record],
    wanted: Iterable[str],
    *,
    id_fields: Sequence[str] = ID_FIELDS,
    answer_fields: Sequence[str] = ANSWER_FIELDS,
    as_id: Callable[[str], str] = str,
    repeats: bool = False,
    items: Iterable[Item] = (),
) -> dict[str, str]:
    """Id -> answer.

    Args:
        records: in any order.
        wanted: every id that can be answered.
        id_fields: what the id may be called.
        answer_fields: what the answer may be called.
        as_id: turns an id of the file into one of those wanted.
        repeats: an id may come again with the same answer.
        items: what is asked, so that rows which contradict their item are refused.

    Raises:
        UserError: rows answer unknown ids, or one id twice (names all of them), or a row contradicts its item.
    """
    known, asked = dict.fromkeys(wanted), {item.id: item for item in items}
    rows = [(as_id(id_of(record, id_fields)), record) for record in records]
    unknown = [f"{name} ({record.place})" for name, record in rows if name not in known]
    if unknown:
        example = next(iter(known), "none")
        raise UserError(f"{some(unknown)}: no such item, one is called '{example}'. Is this file for this benchmark?")
    answers: dict[str, str] = {}
    double = []
    for name, record in rows:
        answer = _checked(record, asked.get(name), answer_fields)
        if name in answers and not (repeats and answers[name] == answer):
            double.append(f"{name} ({record.place})")
        answers[name] = answer
    if double:
        raise UserError(f"{some(double)}: answered again. Remove one of each.")
    return answers


def in_order(
    records: Sequence[Record], items: Sequence[Item], *, answer_fields: Sequence[str] = ANSWER_FIELDS
) -> dict[str, str]:
    """Id -> answer, where the n-th row answers the n-th item.

    Args:
        records: as many as there are items; a row that repeats question, picture or right answer must repeat this item's.
        items: what is asked.
        answer_fields: what the answer may be called.

    Raises:
        UserError: there are more or fewer rows, or a row repeats something else; names it.
    """
    if len(records) != len(items):
        file = records[0].place.rpartition(":")[0]
        raise UserError(
            f"{file} has {len(records)} answers to {len(items)} questions. Answers are matched by their order, so all must be "
            "there, with an empty text where there is none; or give each its id."
        )
    pairs = zip(records, items, strict=True)
    return {item.id: _checked(record, item, answer_fields) for record, item in pairs}


def _checked(record: Record, item: Item | None, answer_fields: Sequence[str]) -> str:
    """The answer in a row that does not contradict its item."""
    if item is None:
        return text_of(record, answer_fields)
    check_repeated(record, item)
    return text_of(record, answer_fields, question=question_of(item))


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are.

    >>> some(["a", "b"])
    'a, b'
    """
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
