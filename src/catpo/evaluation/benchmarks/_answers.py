"""Answers made elsewhere: files in the customary formats, matched to items by id or by order. Knows no benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.evaluation.benchmarks._files import Record, contents, decode, parse_records

ANSWER_FIELDS = ("answer", "response", "text", "caption", "prediction", "output")
"""What files call the answer, in the order looked for."""
ID_FIELDS = ("id", "question_id", "image_id")
MAX_BYTES = 200_000_000
"""Of a file of answers; the largest official one has some millions."""
SHOWN = 10
"""Ids named in a message."""


def read_records(path: Path) -> list[Record]:
    """The rows of a file of answers: a JSON list or JSON Lines, or either packed with gzip.

    Raises:
        UserError: there is no such file, it is empty, not UTF-8, or a row is not a JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist. Give a file with answers: `--answers FILE`.")
    records = parse_records(decode(contents(path, most=MAX_BYTES), path), str(path))
    if not records:
        raise UserError(f"{path} has no answers in it. Give a file with answers: `--answers FILE`.")
    return records


def text_of(record: Record, fields: Sequence[str] = ANSWER_FIELDS) -> str:
    """The answer in a row.

    Raises:
        UserError: the row has none of the fields, or it is no text.
    """
    found = next((name for name in fields if name in record.row), None)
    if found is None:
        raise UserError(f"{record.place} has no answer: it needs one of the fields {', '.join(fields)}.")
    if not isinstance(record.row[found], str):
        raise UserError(f"{record.place}: '{found}' must be a text, not {record.row[found]!r}.")
    return record.row[found]


def id_of(record: Record, fields: Sequence[str] = ID_FIELDS) -> str:
    """The id in a row, as text.

    Raises:
        UserError: the row has none of the fields, or it is neither number nor text.
    """
    found = next((name for name in fields if name in record.row), None)
    value: Any = record.row[found] if found else None
    if found is None:
        raise UserError(f"{record.place} does not say what it answers: it needs one of the fields {', '.join(fields)}.")
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise UserError(f"{record.place}: '{found}' must be a number or a text, not {value!r}.")
    return str(value)


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
        as_id: an id as the file has it -> as it is wanted.
        repeats: an id may come again with the same answer.

    Raises:
        UserError: rows answer unknown ids, or one id twice; names all of them.
    """
    rows = [(as_id(id_of(record, id_fields)), record) for record in records]
    known = dict.fromkeys(wanted)
    unknown = [f"{name} ({record.place})" for name, record in rows if name not in known]
    if unknown:
        example = next(iter(known), "none")
        raise UserError(f"{some(unknown)}: no such item, one is called '{example}'. Is this file for this benchmark?")
    seen: dict[str, str] = {}
    double = []
    for name, record in rows:
        answer = text_of(record, answer_fields)
        if name in seen and not (repeats and seen[name] == answer):
            double.append(f"{name} ({record.place})")
        seen[name] = answer
    if double:
        raise UserError(f"{some(double)}: answered again. Remove one of each.")
    return seen


def in_order(
    records: Sequence[Record],
    questions: Sequence[tuple[str, str]],
    *,
    answer_fields: Sequence[str] = ANSWER_FIELDS,
    question_fields: Sequence[str] = ("question", "prompt"),
) -> dict[str, str]:
    """Id -> answer where the n-th row answers the n-th question.

    Args:
        records: as many as there are questions.
        questions: (id, text) of each item.
        answer_fields: what the answer may be called.
        question_fields: where a row may repeat its question; what is there must begin with the question's text.

    Raises:
        UserError: there are more or fewer rows, or a row repeats another question; names it.
    """
    if len(records) != len(questions):
        file = records[0].place.rpartition(":")[0]
        raise UserError(
            f"{file} has {len(records)} answers to {len(questions)} questions. Answers are matched by their order, so all must "
            "be there, an empty text for none."
        )
    for record, (name, question) in zip(records, questions, strict=True):
        repeated = next((record.row[field] for field in question_fields if isinstance(record.row.get(field), str)), None)
        if repeated is not None and not _same_question(repeated, question):
            raise UserError(
                f"{record.place} answers {repeated!r} where question {name}, {question!r}, belongs. Put the answers in the "
                "order of the questions, or choose the labels that they were made with."
            )
    return {name: text_of(record, answer_fields) for record, (name, _) in zip(records, questions, strict=True)}


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are.

    >>> some(["a", "b"])
    'a, b'
    """
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _same_question(repeated: str, question: str) -> bool:
    """Prompts may add to a question: an image token before it, an instruction behind."""
    return " ".join(question.split()) in " ".join(repeated.split())
