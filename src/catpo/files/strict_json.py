"""JSON read strictly: no NaN and no duplicate key, on which readers disagree; and rows that have the fields they must have."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, get_args, get_origin

from catpo.core.errors import UserError

Fields = Mapping[str, Any]
"""Name -> what the field holds: `str`, `int` (a count, 0 or more), `list[str]`, `dict[str, int]`, `str | None` (or absent), or
fields again."""


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    >>> loads('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: key 'a' stands twice in one object

    Raises:
        ValueError: it is not JSON or not UTF-8, holds NaN, an infinity or a number as large as one, or repeats a key.
        RecursionError: it is nested too deep.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    return _decoder.decode(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:80]} is larger than any number of 64 bits")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        duplicate = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key '{duplicate[:80]}' stands twice in one object")
    return unique


# `json.loads` would make one for every text
_decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_refuse_duplicates)


def parse(content: str | bytes, *, place: str, remedy: str, loads: Callable[[str], Any] = loads) -> Any:
    """The value of a JSON text that a user can see.

    Args:
        content: the text, in UTF-8 if it is encoded.
        place: file and line, which a message starts with.
        remedy: what to do next, which a message ends with.
        loads: `json.loads` where this library wrote the text, so that NaN is one of its numbers.

    Raises:
        UserError: it is not UTF-8, or not JSON.
    """
    try:
        return loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 ({error.reason} at byte {error.start}). {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON ({error}). {remedy}") from error


def parse_object(
    content: str | bytes, *, place: str, remedy: str, fields: Fields | None = None, loads: Callable[[str], Any] = loads
) -> dict[str, Any]:
    """`parse` for a text that must be an object with these fields.

    Raises:
        UserError: it is not UTF-8, not JSON, not an object, or lacks a field.
    """
    value = parse(content, place=place, remedy=remedy, loads=loads)
    if not isinstance(value, dict):
        raise UserError(f"{place} must be a JSON object, not a {type(value).__name__}. {remedy}")
    check_fields(value, fields or {}, place=place, remedy=remedy)
    return value


def check_fields(row: Mapping[str, Any], fields: Fields, *, place: str, remedy: str) -> None:
    """Refuse a row that lacks a field or holds something else in it; other fields are allowed.

    >>> check_fields({"rows": []}, {"block": int}, place="part.jsonl:1", remedy="Remove part.jsonl.")
    Traceback (most recent call last):
    catpo.core.errors.UserError: part.jsonl:1 lacks 'block'. Remove part.jsonl.

    Raises:
        UserError: naming place, field and remedy.
    """
    for name, kind in fields.items():
        if not fits(row.get(name), kind):
            problem = f" has a '{name}' that catpo does not write" if name in row else f" lacks '{name}'"
            raise UserError(f"{place}{problem}. {remedy}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of a kind that `Fields` names.

    >>> fits([1, 2], list[int]), fits([True], list[int]), fits(-1, int), fits(None, int | None)
    (True, False, False, True)
    """
    if isinstance(kind, Mapping):
        return type(value) is dict and all(fits(value.get(name), inner) for name, inner in kind.items())
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(fits(value, option) for option in inner)
    if origin is list:
        return type(value) is list and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return type(value) is dict and all(fits(item, inner[1]) for item in value.values())
    return type(value) is kind and (kind is not int or value >= 0)
