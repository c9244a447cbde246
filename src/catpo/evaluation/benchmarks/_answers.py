"""Answers made elsewhere: files in the usual formats, matched to items by id or by order. Knows no benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.files.records import Record, decode, parse_records, read_bytes

ANSWER_FIELDS = ("answer", "response", "text", "caption", "prediction", "output")
"""What files call the answer, in the order looked for."""
ID_FIELDS = ("id", "question_id", "image_id")
QUESTION_FIELDS = ("question", "prompt")
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


def text_of(record: Record, fields: Sequence[str] = ANSWER_FIELDS) -> str:
    """The answer in a row.

    Raises:
        UserError: the row has none of the fields, or it is not text.
    """
    name, value = _first(record, fields, "has no answer")
    if not isinstance(value, str):
        raise UserError(f"{record.place}: '{name}' must be a text, not {value!r}.")
    return value


def id_of(record: Record, fields: Sequence[str] = ID_FIELDS) -> str:
    """The id in a row, as text.

    Raises:
        UserError: the row has none of the fields, or it is neither number nor text.
    """
    name, value = _first(record, fields, "does not say what it answers")
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise UserError(f"{record.place}: '{name}' must be a number or a text, not {value!r}.")
    return str(value)


def _first(record: Record, fields: Sequence[str], problem: str) -> tuple[str, Any]:
    """Name and value of the first field that the row has."""
    for name in fields:
        if name in record.row:
            return name, record.row[name]
    raise UserError(f"{record.place} {problem}: it needs one of the fields {', '.join(fields)}.")


def by_id(
    records: Sequence[Record],
    wanted: Iterable[str],
    *,
    id_fields: Sequence[str] = ID_FIELDS,
    answer_fields: Sequence[str] = ANSWER_FIELDS,
    as_id: Callable[[str], str] = str,
    repeats: bool = False,
) -> dict[str, str]:
    """Id -> answer.

    Args:
        records: in any order.
        wanted: every id that can be answered.
        id_fields: what the id may be called.
        answer_fields: what the answer may be called.
        as_id: turns an id of the file into one of those wanted.
        repeats: an id may come again with the same answer.

    Raises:
        UserError: rows answer unknown ids, or one id twice; names all of them.
    """
    known = dict.fromkeys(wanted)
    rows = [(as_id(id_of(record, id_fields)), record) for record in records]
    unknown = [f"{name} ({record.place})" for name, record in rows if name not in known]
    if unknown:
        example = next(iter(known), "none")
        raise UserError(f"{some(unknown)}: no such item, one is called '{example}'. Is this file for this benchmark?")
    answers: dict[str, str] = {}
    double = []
    for name, record in rows:
        answer = text_of(record, answer_fields)
        if name in answers and not (repeats and answers[name] == answer):
            double.append(f"{name} ({record.place})")
        answers[name] = answer
    if double:
        raise UserError(f"{some(double)}: answered again. Remove one of each.")
    return answers


def in_order(
    records: Sequence[Record], questions: Sequence[tuple[str, str]], *, answer_fields: Sequence[str] = ANSWER_FIELDS
) -> dict[str, str]:
    """Id -> answer, where the n-th row answers the n-th question.

    Args:
        records: as many as there are questions.
        questions: (id, text) of each item; a row that repeats its question must repeat this text.
        answer_fields: what the answer may be called.

    Raises:
        UserError: there are more or fewer rows, or a row repeats another question; names it.
    """
    if len(records) != len(questions):
        file = records[0].place.rpartition(":")[0]
        raise UserError(
            f"{file} has {len(records)} answers to {len(questions)} questions. Answers are matched by their order, so all must "
            "be there, with an empty text where there is none."
        )
    answers = {}
    for record, (name, question) in zip(records, questions, strict=True):
        repeated = [record.row[field] for field in QUESTION_FIELDS if isinstance(record.row.get(field), str)]
        # a prompt may add an image token before the question, and an instruction after it
        if repeated and " ".join(question.split()) not in " ".join(repeated[0].split()):
            raise UserError(
                f"{record.place} answers {repeated[0]!r} where question {name}, {question!r}, belongs. Put the answers in the "
                "order of the questions, or choose the labels that they were made with."
            )
        answers[name] = text_of(record, answer_fields)
    return answers


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are.

    >>> some(["a", "b"])
    'a, b'
    """
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
