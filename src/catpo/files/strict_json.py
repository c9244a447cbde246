"""JSON as its standard has it: no NaN, no key twice, since readers disagree on both. Knows no file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin

from catpo.core.errors import UserError


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    >>> loads('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: key 'a' stands twice in one object

    Raises:
        ValueError: it is not JSON, or not in UTF-8; holds NaN or an infinity; a key stands twice.
        RecursionError: it is nested too deep.
    """
    return json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key '{double[:80]}' stands twice in one object")
    return made


Fields = Mapping[str, Any]
"""Name -> what stands there: `str`, `int` (a count, 0 or more), `list[str]`, `dict[str, int]`, `str | None` (or not there at
all), or fields again."""


def check_fields(row: Mapping[str, Any], fields: Fields, *, place: str, remedy: str) -> None:
    """Refuse a row that lacks a field or has something else in it; further fields are allowed.

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
        return type(value) is dict and all(fits(value.get(name), each) for name, each in kind.items())
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(fits(value, each) for each in inner)
    if origin is list:
        return type(value) is list and all(fits(each, inner[0]) for each in value)
    if origin is dict:
        return type(value) is dict and all(fits(each, inner[1]) for each in value.values())
    return type(value) is kind and (kind is not int or value >= 0)
